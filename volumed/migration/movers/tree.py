"""Trees of files, copied entry by entry with everything a POSIX tree has. The work is done by a child process
(`volumed.migration.tree`), which tracks what changes between rounds where the kernel can tell."""

from __future__ import annotations

import os
import time
from pathlib import Path

from volumed.migration.movers.child import ChildMover
from volumed.migration.movers.mover import Control, Estimate, Round, Verified
from volumed.migration.session import Session
from volumed.migration.tree import reading

# Of a file that changed: what the next round is expected to read. Sizes are known only by looking.
_GUESS = 64 << 10
MOST_DIFFERENCES = 100
# More than there may be cores: each waits for storage at times, when it opens what is in no cache.
_LEAST_WORKERS, _MOST_WORKERS = 4, 8


def differences(before: Path, after: Path, *, losses: frozenset[str] = frozenset()) -> list[str]:
    """What the second of two workdirs knows otherwise than the first, for people, at most a hundred."""
    found = reading.differences(before / "tree.db", after / "tree.db", losses=losses, most=MOST_DIFFERENCES)
    return [f"{ascii(path)[1:-1] or '.'} {text}" for path, text in found]


def digest(workdir: Path) -> str:
    """Of all that a finished copy knows."""
    return reading.digest(workdir / "tree.db")


class TreeMover(ChildMover):
    def __init__(
        self, source: Path, target: Path, workdir: Path, *, losses: frozenset[str] = frozenset(), filled: bool = False
    ) -> None:
        """`losses`: words of `FilesystemDriver.cannot_hold` that the operator does without; what is named is neither
        copied nor compared. `filled`: the target was given the source's data as it was a while ago; files are read on
        both sides, and only what differs is written."""
        super().__init__(source, target, workdir)
        self._filled = filled
        self._losses = losses

    def _begun(self) -> Session:
        settings = {
            "source": str(self.source),
            "target": str(self.target),
            "workdir": str(self.workdir),
            "losses": sorted(self._losses),
            "filled": self._filled,
            "workers": max(_LEAST_WORKERS, min(_MOST_WORKERS, len(os.sched_getaffinity(0)))),
        }
        return Session("volumed.migration.tree.child", settings, self.workdir / "tree.log")

    def round(self, control: Control, *, last: bool = False) -> Round:
        begun = time.monotonic()
        done = self._child().order("copy", control, last=last)
        return Round(done["bytes"], done["files"] + done["removed"], time.monotonic() - begun)

    def pending(self) -> Estimate | None:
        names = self._child().order("pending", Control())
        return None if names is None else Estimate(names * _GUESS, names)

    def changed(self) -> bool | None:
        changed: bool | None = self._child().order("changed", Control())
        return changed

    def verify(self, control: Control) -> Verified:
        told = self._child().order("compare", control)
        return Verified(
            digest=told["digest"],
            differences=[f"{ascii(path)[1:-1] or '.'} {text}" for path, text in told["different"]],
            bytes=told["bytes"],
            files=told["files"],
        )

    def read(self, control: Control) -> Verified:
        """All of the source, past every cache, into a workdir that knew nothing; the target is not looked at."""
        told = self._child().order("read", control)
        return Verified(digest=told["digest"], bytes=told["bytes"], files=told["files"])
