"""The containers that use a volume, held still for the end of its move and let go after it.

Who holds no file of it is frozen for that moment, and sees the new place when it goes on. Who holds one must be
stopped and started: a file that is open stays where it is, and would be written to at the old place.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from volumed.core.core import Core
from volumed.driver import MountEntry
from volumed.errors import HostError, InUse, MountFailed, NotSupported, VolumedError
from volumed.host import swap
from volumed.host.helpers import born
from volumed.migration.move import StopWriters
from volumed.migration.movers.mover import Busy, EngineSilent, Writers
from volumed.migration.writers.engines import Container, ContainerEngine, DockerEngine, PodmanEngine
from volumed.model import Binding, Engine, Volume

RUNNING = frozenset({"running", "restarting"})
ENDED = frozenset({"exited", "created", "dead", "stopped"})


class How(enum.StrEnum):
    """What we did to a container, or are about to."""

    NOTHING = "nothing"  # it is paused, or ended by itself
    FROZEN = "frozen"
    STOPPED = "stopped"


class Held(msgspec.Struct, frozen=True):
    """A container as it was before it was held, and how it is."""

    engine: Engine
    id: str
    name: str
    status: str
    started: str
    obstacle: str
    targets: tuple[str, ...]  # where it sees the volume
    readonly: tuple[str, ...] = ()  # where of these it must not write
    how: How = How.NOTHING
    # Of one that is frozen, or paused: its first process, with which all others of it end, and when that was born. The
    # kernel gives the numbers of processes and of namespaces anew.
    pid: int = 0
    born: int | None = None

    @property
    def writable(self) -> Iterable[str]:
        return (target for target in self.targets if target not in self.readonly)

    @property
    def lives(self) -> bool:
        return self.pid != 0 and self.born is not None and born(self.pid) == self.born


class ContainerWriters(Writers):
    def __init__(
        self, engines: Iterable[ContainerEngine], path: Path, bindings: Sequence[Binding], *, freeze: bool
    ) -> None:
        """`path`: where the volume is mounted on this node. `bindings`: of others than ourselves. `freeze`: whoever
        holds no file is frozen and not stopped."""
        self._engines = {engine.engine: engine for engine in engines}
        self._path = path
        self._bindings = bindings
        self._freeze = freeze
        self._old: MountEntry | None = None

    def plan(self) -> bytes:
        """In the order of their start. Raises InUse for a hold whose container is not known."""
        own = swap.mount_in(os.getpid(), str(self._path))
        all_readonly = own is not None and "ro" in own.options
        targets: dict[tuple[Engine, str], dict[str, bool]] = {}
        for binding in self._bindings:
            if not binding.consumers:
                raise InUse(
                    "is used by a container that cannot be told",
                    holders=[f"{binding.engine} mount id {binding.mount_id[:12]}"],
                    hint="it is known when the engine answers; or stop it yourself",
                )
            for consumer in binding.consumers:
                targets.setdefault((binding.engine, consumer.id), {})[consumer.target] = (
                    consumer.readonly or all_readonly
                )
        held = []
        for (engine, identifier), places in targets.items():
            found = self._engine(engine).look(identifier)
            if found is not None and found.status not in RUNNING | {"paused"}:
                raise InUse(
                    f"is {found.status} and holds the volume: it is about to start, or to end, or files are copied",
                    subject=f"container {found.name}",
                )
            if found is not None:
                held.append(
                    Held(
                        engine=engine,
                        id=identifier,
                        name=found.name,
                        status=found.status,
                        started=found.started,
                        obstacle=found.obstacle,
                        targets=tuple(sorted(places)),
                        readonly=tuple(sorted(target for target, readonly in places.items() if readonly)),
                    )
                )
        return msgspec.json.encode(sorted(held, key=lambda each: each.started))

    def describe(self, plan: bytes) -> Sequence[str]:
        held = "frozen for a moment, or stopped and started again" if self._freeze else "stopped and started again"
        return [
            f"{each.engine} container {each.name} is {'kept paused' if each.status == 'paused' else held}"
            for each in _decoded(plan)
        ]

    def hold(self, plan: bytes, note: Callable[[bytes], None]) -> None:
        """Last started, first stopped."""
        held = _decoded(plan)
        for each in held:  # before any is touched
            self._check_holdable(self._engine(each.engine), each)
        for number, each in reversed(list(enumerate(held))):
            try:
                self._hold(self._engine(each.engine), each, partial(_change, held, note, number))
            except EngineSilent:
                raise
            except HostError as error:  # refused, most likely as its user did something to it a moment ago
                raise Busy(error.text, subject=error.subject) from None

    def _hold(self, engine: ContainerEngine, held: Held, noted: Callable[..., None]) -> None:
        found = engine.look(held.id)
        if found is None or found.status in ENDED:
            return
        if found.status == "paused":
            self._check_paused(held, found.pid)
            noted(started=found.started, pid=found.pid, born=born(found.pid))
        elif found.status not in RUNNING:
            raise Busy(f"is {found.status}", subject=f"container {held.name}")
        elif not (self._freeze and found.status == "running" and self._frozen_idle(engine, held, found, noted)):
            self._stop(engine, held, noted)

    def _check_holdable(self, engine: ContainerEngine, held: Held) -> None:
        found = engine.look(held.id)
        if found is not None and found.status == "paused":
            self._check_paused(held, found.pid)
        elif found is not None and found.status in RUNNING and not (self._freeze and self._idle(held, found.pid)):
            self._check_stoppable(held)

    def _check_paused(self, held: Held, pid: int) -> None:
        """By its user, who may want it so."""
        reason = ""
        if not self._freeze:
            reason = "the volume's file system mounted, which its device cannot be copied under"
        elif not self._idle(held, pid):
            reason = "a file open on the volume"
        if reason:
            raise InUse(
                f"is paused with {reason}",
                subject=f"container {held.name}",
                hint="stop it, or let it go on, and try again",
            )

    def _frozen_idle(self, engine: ContainerEngine, held: Held, found: Container, noted: Callable[..., None]) -> bool:
        """Frozen, and found to hold nothing. What is seen before it is frozen may be otherwise a moment later, but one
        that is busy now is not worth freezing."""
        if not self._idle(held, found.pid):
            return False
        noted(how=How.FROZEN, started=found.started, pid=found.pid, born=born(found.pid))
        engine.pause(held.id)
        if self._idle(held, found.pid):
            return True
        engine.resume(held.id)
        return False

    def _idle(self, held: Held, pid: int) -> bool:
        """Whether each of its mounts of the volume can be swapped."""
        own = swap.mount_in(os.getpid(), str(self._path))
        for target in held.targets:
            entry = swap.mount_in(pid, target)
            # A folder of the volume alone, or an older mount: only the engine knows how to make it again.
            if entry is None or not swap.is_same(entry, own) or swap.users(pid, entry):
                return False
        return not swap.has_namespaces_within(pid)

    def _stop(self, engine: ContainerEngine, held: Held, noted: Callable[..., None]) -> None:
        self._check_stoppable(held)
        noted(how=How.STOPPED, pid=0, born=None)
        engine.stop(held.id)

    @staticmethod
    def _check_stoppable(held: Held) -> None:
        if held.obstacle:
            raise InUse(
                f"holds files of the volume and is not stopped by us: {held.obstacle}",
                subject=f"container {held.name}",
                hint="stop it yourself, or let the move wait until nobody uses the volume",
            )

    def seal(self, plan: bytes) -> None:
        """Who is frozen may be let go by its user at any time, be it to end it."""
        for each in _decoded(plan):
            for target in each.writable:
                self._seal(each, target)

    def check_alone(self, plan: bytes) -> None:
        held = _decoded(plan)
        if all(self._engine(each.engine).asks_for_each for each in held):
            return
        self._old = swap.mount_in(os.getpid(), str(self._path))
        came = self._came(held)
        if came:
            raise Busy(f"is used by what was started meanwhile: {', '.join(came)}")

    def left_behind(self, plan: bytes) -> Sequence[str]:
        return [
            f"{who} was started in the instant of the switch and sees the old place: restart it; what it wrote is there"
            for who in self._came(_decoded(plan))
        ]

    def _came(self, held: Sequence[Held]) -> list[str]:
        if self._old is None:
            return []
        return swap.elsewhere(self._old, {swap.mount_namespace(each.pid) for each in held if each.lives})

    def _seal(self, held: Held, target: str) -> None:
        own, entry = swap.mount_in(os.getpid(), str(self._path)), swap.mount_in(held.pid, target)
        if not swap.is_same(entry, own) or not held.lives:
            return  # its user ended it: what has that number now is nobody's we hold
        try:
            swap.set_readonly(held.pid, target, readonly=True)
        except MountFailed as error:
            if held.lives:
                raise Busy(f"was let go, and writes: {error.text}", subject=f"container {held.name}") from None

    def release(self, plan: bytes, note: Callable[[bytes], None], *, moved: bool) -> Sequence[str]:
        stranded, silent, held = [], None, _decoded(plan)
        for number, each in enumerate(held):
            try:
                self._release(each, partial(_change, held, note, number), moved=moved)
            except EngineSilent as error:
                silent = error
            except VolumedError as error:
                stranded.append(f"container {each.name} could not be brought back as it was: {error}")
        if silent is not None:
            raise silent
        return stranded

    def _release(self, held: Held, noted: Callable[..., None], *, moved: bool) -> None:
        engine = self._engine(held.engine)
        found = engine.look(held.id)
        if found is None:
            return  # removed meanwhile, by whoever may
        # One that was started since was given what the path shows, as we were asked.
        if found.status in {"paused", "running"} and found.started == held.started:
            if moved and not self._show_new_place(engine, held, found, noted):
                engine.start(held.id)
                return
            if not moved and held.pid:
                try:
                    for target in held.writable:
                        swap.set_readonly(found.pid, target, readonly=False)
                except VolumedError:
                    self._go_on(engine, held, found)  # it can read at least, and tell its people
                    raise
        self._go_on(engine, held, found)

    @staticmethod
    def _go_on(engine: ContainerEngine, held: Held, found: Container) -> None:
        if held.how is How.FROZEN and found.status == "paused":
            engine.resume(held.id)
        elif held.how is How.STOPPED and found.status in ENDED:
            engine.start(held.id)

    def _show_new_place(
        self, engine: ContainerEngine, held: Held, found: Container, noted: Callable[..., None]
    ) -> bool:
        """Whether it could be. One that cannot be shown it is stopped; a frozen one dies before it runs again."""
        try:
            for target in held.targets:
                own, entry = swap.mount_in(os.getpid(), str(self._path)), swap.mount_in(found.pid, target)
                if own is None:
                    raise MountFailed("nothing is mounted there", subject=str(self._path))
                if not swap.is_same(entry, own):
                    swap.swap(found.pid, target, self._path, readonly=target in held.readonly)
                elif held.pid and target not in held.readonly:  # the old place, which is the volume again
                    swap.set_readonly(found.pid, target, readonly=False)
        except VolumedError:
            if found.status != "paused" and held.obstacle:
                raise
            noted(how=How.STOPPED)  # to be started again, however often that fails
            if found.status == "paused":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found.pid, signal.SIGKILL)  # acts in the instant in which it is let go
                engine.resume(held.id)
            engine.stop(held.id)  # to wait until it has ended, and not to be restarted before we do
            return False
        return True

    def _engine(self, engine: Engine) -> ContainerEngine:
        try:
            return self._engines[engine]
        except KeyError:
            raise NotSupported(f"containers of {engine} cannot be stopped from here") from None


def stopping_writers(core: Core) -> StopWriters:
    """As the engine of migrations asks: None when somebody uses the volume whom we cannot hold still, so that it has to
    wait until they are gone."""
    settings = core.settings.engines
    engines: list[ContainerEngine] = []
    if settings.docker.enabled:
        engines.append(DockerEngine(settings.docker.socket))
    if settings.podman.enabled:
        engines.append(PodmanEngine(core.host, settings.podman.command, arguments=settings.podman.arguments))
    known = {engine.engine for engine in engines}

    def make(volume: Volume, bindings: list[Binding], *, freeze: bool) -> Writers | None:
        if any(binding.engine not in known or binding.node != core.node or binding.staging for binding in bindings):
            return None
        return ContainerWriters(engines, core.mounts.presence.path(volume.id), bindings, freeze=freeze)

    return make


def _change(held: list[Held], note: Callable[[bytes], None], number: int, **fields: object) -> None:
    """What is about to be done to one of them is written down before."""
    held[number] = msgspec.structs.replace(held[number], **fields)
    note(msgspec.json.encode(held))


def _decoded(plan: bytes) -> list[Held]:
    return msgspec.json.decode(plan, type=list[Held]) if plan else []
