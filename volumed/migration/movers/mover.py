"""What carries a volume's data from one place to another: the seam between the engine and each data path.

The engine (`volumed.migration.engine`) decides when: it journals the phases, calls a mover's `round` until what is left
is small, stops whoever writes, calls the last `round`, `verify`, and commits. A mover knows two places on this node and
nothing of volumes, backends or the ledger.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from volumed.errors import HostError, VolumedError

# Of a throttled copy: how long it may run ahead of its rate before it has to wait.
BURST = 0.25


class Stopped(VolumedError):
    """The copy was told to stop: the move is paused, aborted, or the daemon ends. What was copied stays, and counts."""

    code = "operation_pending"


class Busy(VolumedError):
    """Somebody took the volume in the moment before it was to be held still."""

    code = "in_use"
    retry_after = 1.0


class EngineSilent(HostError):
    """A container engine does not answer: it may be starting anew."""

    retry_after = 1.0


class Estimate(NamedTuple):
    """What there is to copy."""

    bytes: int
    files: int = 0


class Round(NamedTuple):
    """What one round did. `changed`: bytes that it had to write; 0 when nothing had changed since the last one."""

    changed: int
    files: int = 0
    seconds: float = 0.0


class Verified(NamedTuple):
    """`digest` stands for all of the data (of a tree: with its metadata), the same whatever the order of the work.
    `differences`: paths or extents that are not the same on both sides, for people, at most a hundred."""

    digest: str
    differences: Sequence[str] = ()
    bytes: int = 0
    files: int = 0


class Control:
    """Between the engine and a running copy; used from any number of threads.

    `rate`: bytes a second, 0 for no limit; may change at any time. Counters only ever grow.
    """

    def __init__(self, *, rate: int = 0, tell: Callable[[], None] = lambda: None) -> None:
        """`tell` is called after counters changed; it is cheap."""
        self.rate = rate
        self.bytes = 0
        self.files = 0
        self._tell = tell
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._due = 0.0  # when what was let through so far is paid for

    def stop(self) -> None:
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raises Stopped. To be called at least every 100 ms of work."""
        if self._stop.is_set():
            raise Stopped("the copy was told to stop")

    def admit(self, amount: int) -> None:
        """Wait until `amount` bytes may be read or written within the rate. Raises Stopped."""
        rate = self.rate
        if rate > 0:
            with self._lock:
                self._due = due = max(self._due, time.monotonic() - BURST) + amount / rate
            # In slices, so that another rate is heeded at once.
            while self.rate == rate and (wait := due - time.monotonic()) > 0:
                if self._stop.wait(min(wait, 0.2)):
                    break
            if self.rate != rate:
                with self._lock:
                    self._due = 0.0
        self.check()

    def done(self, *, bytes: int = 0, files: int = 0) -> None:
        """So much is copied (in `round`) or compared (in `verify`) since the last call."""
        with self._lock:
            self.bytes += bytes
            self.files += files
        self._tell()


class Mover(ABC):
    """One move's data path. `workdir` is a folder of this move alone, on local storage, and outlives the process: what
    a mover must know to go on after kill -9 lies there, written so that a torn write is noticed. It is removed with the
    move. A mover made again over the same places and workdir goes on where the last one was, and copies nothing again
    that `round` had copied and that did not change since.

    Threads of a mover run at the lowest I/O and CPU priority, but for those of a last round and its proof.
    """

    def __init__(self, source: Path, target: Path, workdir: Path) -> None:
        """Both present: roots of mounted trees, or devices (or image files). Does no I/O."""
        self.source = source
        self.target = target
        self.workdir = workdir

    @abstractmethod
    def estimate(self, control: Control) -> Estimate:
        """Look at the source and count; bounded by what one walk or one look at the map of extents costs."""

    def watch(self) -> None:  # noqa: B027 (one that needs none has none)
        """Begin to track what changes at the source, so that later rounds read only that. Called before the first
        round, and again after a restart, when everything must be taken as changed."""

    @abstractmethod
    def round(self, control: Control, *, last: bool = False) -> Round:
        """Make the target what the source is now: the first time everything, then what changed. `last`: nobody writes
        to the source any more; on return target and source agree, and the target is on stable storage.

        Raises CapacityExhausted when the target is full, HostError naming the path or extent, Stopped.
        """

    def pending(self) -> Estimate | None:
        """What the next round would have to copy, as far as it is known without looking; None when it is not."""
        return None

    def changed(self) -> bool | None:
        """Whether anything was written to the source since the last round began; None when that cannot be told."""
        return None

    @abstractmethod
    def verify(self, control: Control) -> Verified:
        """Digests (blake3) of what was read from the source, by the rounds, against what is read back from the target,
        past every cache. Called after the last round, while nobody writes; and before it, to prove early most of it:
        what was proven by an earlier call and not written since is not read again.
        """

    def forget(self) -> None:  # noqa: B027 (one that keeps to what it wrote has nothing to forget)
        """Before another than `round` writes to the target: what is known of it holds no more, even after a crash."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Stop tracking, let go of files. The workdir stays."""


class Writers(ABC):
    """The consumers of one volume on this node, held still for the last round and let go after it.

    The engine writes `plan()` down with the migration before it calls `hold`, and after a crash hands it to a new
    instance's `release`: however the move ended, every container is back as it was.
    """

    @abstractmethod
    def plan(self) -> bytes:
        """Who will be stopped or frozen and how, as they are now, to be let go by it later. Touches nobody."""

    @abstractmethod
    def describe(self, plan: bytes) -> Sequence[str]:
        """A line for each, for people: `docker container web-1 is stopped and started again`."""

    @abstractmethod
    def hold(self, plan: bytes, note: Callable[[bytes], None]) -> None:
        """From its return on none of them writes, unless their user lets them. `note` is given the plan with what is
        about to be done to one of them, before it is done. Called without any lock of ours: an engine may call us back
        from it (Unmount). When it raises, `release` is called. Raises InUse, and Busy when it may do a moment later."""

    @abstractmethod
    def seal(self, plan: bytes) -> None:
        """From its return on none of them can write to the old place, whatever their user does, until they are let go.
        Asks no engine, as its caller holds the volume's lock. Raises Busy."""

    @abstractmethod
    def check_alone(self, plan: bytes) -> None:
        """As late as can be: raises Busy when a container uses the volume that was started since the plan, by an engine
        that does not ask us. Asks no engine."""

    @abstractmethod
    def left_behind(self, plan: bytes) -> Sequence[str]:
        """A line for each that came after that and sees the old place."""

    @abstractmethod
    def release(self, plan: bytes, note: Callable[[bytes], None], *, moved: bool) -> Sequence[str]:
        """Let go on whom we held, in the order of their start; whatever of it is done already is success, and what
        their user did to them meanwhile stays done. `moved`: the path of the volume on the host shows the new place
        now, and whoever was only frozen must see it there, too. `note`: as of `hold`. Returns a line for each who could
        not be brought back, and goes on with the others. Raises EngineSilent when an engine did not answer, and all is
        to be tried again."""
