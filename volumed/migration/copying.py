"""One copy of a volume's data to other storage, from its record to the commit that makes it count.

What it makes is hidden until then. A crash, or an error, anywhere before leaves something that belongs to a copy which
never became ready, and `volumed.migration.copies` takes it away.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from volumed.core.core import Core
from volumed.core.planning import CreateVolume
from volumed.core.presence import handle_of
from volumed.driver import Capability, Driver
from volumed.errors import AlreadyExists, IntegrityError, InUse, NotFound, VolumedError
from volumed.migration import losses
from volumed.migration.move import Step
from volumed.migration.movers import block, kept
from volumed.migration.movers.chunks import Chunks
from volumed.migration.movers.device import DeviceMover
from volumed.migration.movers.mover import Control, Verified
from volumed.migration.movers.tree import TreeMover
from volumed.migration.places import at, place_of
from volumed.migration.points import Points
from volumed.migration.undo import refuse_second
from volumed.model import Copy, CopyKind, CopyState, MovePath, Volume, VolumeMode, now
from volumed.store.repository import Transaction
from volumed.store.store import Conflict
from volumed.testing import crash

AnyMover = DeviceMover | TreeMover


class Copying:
    def __init__(self, core: Core, copy: Copy, control: Control) -> None:
        self._core = core
        self._repository = core.repository
        self.copy = copy
        self.control = control
        self.step = Step("preparing", 0, 0, time.monotonic())

    @property
    def workdir(self) -> Path:
        return workdir_of(self._core, self.copy)

    def run(self) -> None:
        """Raises what went wrong; then nothing of it counts."""
        with Points(self._core).of(self._source(), self.copy.snapshot, self.copy.id) as point:
            self._note(point=self.copy.point or point.text)
            base = self._base()
            made = self._make(point.volume, base)
            self._note(made=made.id, base=base.id if base else None)
            crash.point("copy.made")
            found = self._fill(point.volume, made, base)
        self._check_origin(found)
        crash.point("copy.proven")
        self._commit(made, found)
        crash.point("copy.committed")

    def _note(self, **fields: object) -> None:
        changed = msgspec.structs.replace(self.copy, **fields)
        with self._repository.transaction() as transaction:
            transaction.put(changed)
        self.copy = changed

    # What is read
    def _source(self) -> Volume:
        """The volume, or what holds the backup."""
        held = self._origin()
        volume = self._repository.volume(held.made if held and held.made else self.copy.volume_id)
        if volume is None:
            raise NotFound("was removed a moment ago", subject=f"volume {self.copy.volume_name}")
        refuse_second(self._repository, volume)
        return volume

    def _origin(self) -> Copy | None:
        """The backup that is restored. Raises NotFound when it is gone."""
        if self.copy.of is None:
            return None
        found = self._repository.copy(self.copy.of)
        if found is None or found.state is not CopyState.READY:
            raise NotFound("was removed a moment ago", subject=f"backup {self.copy.of}")
        return found

    # What is made
    def _base(self) -> Copy | None:
        """The latest backup of the volume there, when it can be what this one begins as; else all is copied."""
        if self.copy.base is None:
            return None
        base, backend = self._repository.copy(self.copy.base), self._core.backends.get(self.copy.target.backend)
        held = self._repository.volume(base.made) if base and base.made else None
        usable = (
            base is not None
            and held is not None
            and base.state is CopyState.READY
            and Capability.CLONE in backend.capabilities
            and held.filesystem == self.copy.target.filesystem
            and (held.size or 0) <= (self.copy.target.size or held.size or 0)
            and kept.digest(workdir_of(self._core, base), base.path) == base.digest
        )
        return base if usable else None

    def _make(self, source: Volume, base: Copy | None) -> Volume:
        target = self.copy.target
        name = self.copy.name or self.copy.volume_name
        if self.copy.kind is CopyKind.BACKUP:  # should the ledger be lost, its mark says what it is
            name = f"{name[:200]}-backup-{self.copy.created:%Y%m%d-%H%M%S}"
        return self._core.volumes.create(
            CreateVolume(
                name=name,
                backend=target.backend,
                size=target.size,
                mode=source.mode,
                filesystem="" if base else target.filesystem or "",
                mount_options=target.mount_options,
                options=target.options,
                labels=source.labels if self.copy.name else {},
                encryption=source.encryption,
                source=str(base.made) if base else "",
                hidden=self.copy.id,
            )
        )

    def _fill(self, source: Volume, made: Volume, base: Copy | None) -> Verified:
        self.workdir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self.workdir, ignore_errors=True)
        if base is not None:
            shutil.copytree(workdir_of(self._core, base), self.workdir)
        self.workdir.mkdir(mode=0o700, exist_ok=True)
        with (
            self._present(source) as original,
            self._present(made) as target,
            contextlib.closing(self._mover(original, target)) as mover,
        ):
            if self.copy.path is MovePath.TREE:
                subject = f"volume {self.copy.volume_name}"
                losses.check_tree(original, self._target_driver, self.copy.accepted, subject=subject)
            if base is not None and self.copy.path is MovePath.BLOCK:
                mover.watch()  # all of them are looked at
            self._copy(mover)
            crash.point("copy.filled")
            return self._prove(mover, made)

    @contextlib.contextmanager
    def _present(self, volume: Volume) -> Iterator[Path]:
        """At the volume's own path, with its lock held; not there any more afterwards. Raises InUse."""
        core, backend = self._core, self._core.backends.get(volume.backend)
        presence = core.mounts.presence
        with core.locks.hold(volume.id, subject=f"volume {volume.name}"):
            handle_of(volume)
            backend.call_holding(lambda: _unmount(core, volume))
            try:
                yield backend.call_holding(lambda: presence.establish(volume, backend.driver))
            finally:
                backend.call_holding(lambda: presence.remove(volume, backend.driver))
                with self._repository.transaction() as transaction:
                    transaction.touch(volume.id)

    def _mover(self, source: Path, target: Path) -> AnyMover:
        if self.copy.path is MovePath.BLOCK:
            if (self.workdir / "chunks").exists():
                Chunks.kept(self.workdir / "chunks").close()  # its base is on stable storage
            return DeviceMover(source, target, self.workdir)
        return TreeMover(source, target, self.workdir, losses=losses.forgone(self._target_driver, self.copy.accepted))

    @property
    def _target_driver(self) -> Driver:
        return self._core.backends.get(self.copy.target.backend).driver

    def _copy(self, mover: AnyMover) -> None:
        expected = mover.estimate(self.control).bytes
        self._note(expected=expected)
        self.step = Step("copying", expected, self.control.bytes, time.monotonic())
        self._note(copied=mover.round(self.control, last=True).changed)

    def _prove(self, mover: AnyMover, made: Volume) -> Verified:
        self.step = Step("verifying", self.copy.expected, self.control.bytes, time.monotonic())
        found = mover.verify(self.control)
        if found.differences:
            raise IntegrityError(
                f"the copy is not what was read: {'; '.join(found.differences[:10])}",
                subject=f"volume {self.copy.volume_name}",
                hint=f"look at backend {made.backend}; nothing was changed",
            )
        return found

    def _check_origin(self, found: Verified) -> None:
        """What was read of a backup is what was proven when it was made."""
        held = self._origin()
        if held is None or held.digest == found.digest or held.accepted:
            return
        before = workdir_of(self._core, held)
        known = kept.digest(before, held.path) == held.digest
        other = kept.differences(before, self.workdir, held.path, beginning=True) if known else []
        if known and not other:  # its device is larger than the volume's was
            return
        raise IntegrityError(
            f"is not what it was when it was made: {'; '.join(other[:10]) or 'its digest differs'}",
            subject=f"backup {held.id}",
            hint="restore another one; nothing was changed",
        )

    # When it counts
    def _commit(self, made: Volume, found: Verified) -> None:
        size = found.bytes if self.copy.path is MovePath.TREE else block.size_in(self.workdir)
        ready = msgspec.structs.replace(
            self.copy, state=CopyState.READY, digest=found.digest, bytes=size, files=found.files, ended=now()
        )
        if self.copy.kind is CopyKind.BACKUP:
            self._finish(ready, lambda transaction: None)
        elif self.copy.name:
            hidden = self._repository.volume(made.id) or made
            shown = msgspec.structs.replace(hidden, hidden=None)
            try:
                self._finish(ready, lambda transaction: transaction.name(shown, previous=hidden))
            except Conflict:
                raise AlreadyExists("was made by somebody else meanwhile", subject=f"volume {made.name}") from None
        else:
            self._put_back(made, ready)
        self._core.events.publish(f"{ready.kind}.ready", ready.volume_name, told(ready), copy=ready.id)

    def _finish(self, ready: Copy, also: Callable[[Transaction], None]) -> None:
        with self._repository.transaction() as transaction:
            transaction.put(ready)
            also(transaction)
        self.copy = ready

    def _put_back(self, made: Volume, ready: Copy) -> None:
        """The volume and what was made exchange their places, in one transaction; what the volume had is hidden then,
        and goes."""
        core = self._core
        with core.locks.hold(self.copy.volume_id, subject=f"volume {self.copy.volume_name}"):
            volume = check_replaceable(core, self.copy.volume_id)
            backend = core.backends.get(volume.backend)
            backend.call_holding(lambda: _unmount(core, volume))
            with core.locks.hold(made.id):
                current, fresh = self._repository.volume(volume.id), self._repository.volume(made.id)
                if current is None or fresh is None:
                    raise NotFound("was removed a moment ago", subject=f"volume {volume.name}")

                def swap(transaction: Transaction) -> None:
                    here, there = place_of(current), place_of(fresh)
                    transaction.swap((current, at(current, there)), (fresh, at(fresh, here)))
                    transaction.touch(current.id, rewritten=True)

                self._finish(ready, swap)


def _unmount(core: Core, volume: Volume) -> None:
    with core.mounts.unmounted(volume, core.backends.get(volume.backend)):
        pass


def check_replaceable(core: Core, volume_id: str) -> Volume:
    """Raises NotFound, InUse for a volume whose data cannot be replaced now."""
    volume = core.repository.volume(volume_id)
    if volume is None:
        raise NotFound("is not there any more", subject=f"volume {volume_id}", hint="restore it under a name instead")
    subject = f"volume {volume.name}"
    refuse_second(core.repository, volume)
    holders = core.mounts.holders(volume)
    holders += [f"node {each.node}, which has it attached" for each in core.repository.attachments(volume.id)]
    if holders:
        raise InUse(
            "is in use by", holders=holders, subject=subject, hint="stop them first, or restore it under a name"
        )
    snapshots = [snapshot.name for snapshot in core.repository.snapshots(volume.id)]
    if snapshots:
        raise InUse("has snapshots, which would go", holders=snapshots, subject=subject, hint="remove them first")
    return volume


def workdir_of(core: Core, copy: Copy) -> Path:
    return core.settings.state_dir / "copies" / copy.id


def path_of(volume: Volume) -> MovePath:
    return MovePath.BLOCK if volume.mode is VolumeMode.BLOCK else MovePath.TREE


def told(copy: Copy) -> str:
    where = copy.name or (f"backup {copy.id}" if copy.kind is CopyKind.BACKUP else "itself")
    return f"{copy.kind} to {where} on {copy.target.backend}: proven as blake3 {copy.digest[:16]}"


def failed(copy: Copy, error: VolumedError) -> Copy:
    return msgspec.structs.replace(copy, state=CopyState.FAILED, error=str(error), ended=now())
