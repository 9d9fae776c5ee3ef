"""Storage that wants to be told which machine will use a volume, for tests: mixed into a driver of trees.

    class AttachedMemoryDriver(AttachedToMachines, MemoryDriver):
        machine = "machine-1"

Who has a volume attached lies in a folder and outlives the daemon. A tree can be mounted only on a machine that has it,
and a volume that anybody has cannot be deleted: so a core that forgets either is caught.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from volumed.driver import FilesystemDriver, Holder, SupportsAttach, SupportsFencing
from volumed.errors import HostError, InUse
from volumed.model import Handle


class AttachedToMachines(FilesystemDriver, SupportsAttach):
    machine: ClassVar[str] = "machine-1"

    def attachments_folder(self) -> Path:
        raise NotImplementedError("the class that mixes this in says where it keeps them")

    def _of(self, handle: Handle) -> Path:
        return self.attachments_folder() / handle

    def identity(self) -> str:
        return self.machine

    def attach(self, handle: Handle, machine: str) -> None:
        others = [other for other in self.machines(handle) if other != machine]
        if others:
            raise InUse("is attached to", holders=others, subject=f"backend {self.backend}")
        self._of(handle).mkdir(parents=True, exist_ok=True)
        (self._of(handle) / machine).touch()

    def detach(self, handle: Handle, machine: str, *, force: bool = False) -> None:
        (self._of(handle) / machine).unlink(missing_ok=True)

    def machines(self, handle: Handle) -> Sequence[str]:
        folder = self._of(handle)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        if self.machine not in self.machines(handle):
            raise HostError("no device of it came", subject=f"machine {self.machine}")
        super().mount(handle, target, options=options, readonly=readonly)  # type: ignore[safe-super]

    def delete(self, handle: Handle) -> None:
        if self.machines(handle):
            raise InUse("is attached to", holders=self.machines(handle), subject=f"backend {self.backend}")
        super().delete(handle)  # type: ignore[safe-super]
        shutil.rmtree(self._of(handle), ignore_errors=True)


class FencedMachines(AttachedToMachines, SupportsFencing):
    """One that is fenced has lost the volume at once."""

    def holders(self, handle: Handle) -> Sequence[Holder]:
        return [
            Holder(id=machine, node="", ours=machine == self.machine, text=f"machine {machine}")
            for machine in self.machines(handle)
        ]

    def fence(self, handle: Handle, holder: Holder) -> None:
        self.detach(handle, holder.id, force=True)
