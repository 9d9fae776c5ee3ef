"""Devices, copied block by block by a child process (`volumed.migration.movers.device_child`)."""

from __future__ import annotations

from pathlib import Path

from volumed.migration.movers.child import ChildMover
from volumed.migration.movers.mover import Control, Estimate, Round, Verified
from volumed.migration.session import Session


class DeviceMover(ChildMover):
    def __init__(self, source: Path, target: Path, workdir: Path, *, filled: bool = False) -> None:
        """`filled`: see `BlockMover`."""
        super().__init__(source, target, workdir)
        self._filled = filled

    def _begun(self) -> Session:
        settings = {
            "source": str(self.source),
            "target": str(self.target),
            "workdir": str(self.workdir),
            "filled": self._filled,
        }
        return Session("volumed.migration.movers.device_child", settings, self.workdir / "device.log")

    def round(self, control: Control, *, last: bool = False) -> Round:
        return Round(**self._child().order("round", control, last=last))

    def pending(self) -> Estimate | None:
        return Estimate(**self._child().order("pending", Control()))

    def verify(self, control: Control) -> Verified:
        return Verified(**self._child().order("verify", control))

    def read(self, control: Control) -> Verified:
        return Verified(**self._child().order("read", control))

    def forget(self) -> None:
        self.close()
        (self.workdir / "chunks").unlink(missing_ok=True)
