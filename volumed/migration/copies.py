"""Clones on other storage, backups and restores, as an operator sees them. Each has a thread of its own.

A copy that a crash or an error cut short is nothing: what it made is taken away, now or when its storage answers.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import msgspec

from volumed import context
from volumed.core.core import Core
from volumed.core.names import check_name
from volumed.errors import AlreadyExists, InUse, InvalidRequest, NotFound, OperationPending, VolumedError
from volumed.migration import losses
from volumed.migration.copying import Copying, check_replaceable, failed, path_of, workdir_of
from volumed.migration.explaining import explained
from volumed.migration.inspection import Inspection
from volumed.migration.movers.mover import Control, Stopped
from volumed.migration.planner import Wish
from volumed.migration.points import Points
from volumed.migration.progress import Progress, progress_of
from volumed.migration.undo import refuse_second
from volumed.model import Copy, CopyId, CopyKind, CopyState, MovePath, Volume, new_copy_id, now
from volumed.testing import crash

_log = logging.getLogger(__name__)
AT_ONCE = 4  # more would only take each other's bandwidth
SWEEP = 5.0


class _Running(NamedTuple):
    thread: threading.Thread
    work: Copying


class Copies:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._repository = core.repository
        self._inspection, self._points = Inspection(core), Points(core)
        self._guard = threading.Lock()
        self._running: dict[CopyId, _Running] = {}
        self._errors: dict[CopyId, VolumedError] = {}
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._closing = threading.Event()
        self._workdirs = core.settings.state_dir / "copies"

    # Asking
    def all(self) -> list[Copy]:
        return self._repository.copies()

    def get(self, reference: str) -> Copy:
        """By its id or the beginning of it. Raises NotFound."""
        found = self._repository.copy(reference)
        if found is None and len(reference) >= 8:
            found = next((copy for copy in self.all() if copy.id.startswith(reference)), None)
        if found is None:
            raise NotFound("there is no such copy", subject=f"copy {reference[:100]}", hint="see `backup ls`")
        return found

    def backup(self, reference: str) -> Copy:
        """One that is there: by its id, the beginning of it, or its volume's name or id: then the latest."""
        ready = [copy for copy in self.all() if copy.is_backup]
        for copy in reversed(ready):
            named = reference in (copy.id, copy.volume_name, copy.volume_id)
            if named or (len(reference) >= 8 and copy.id.startswith(reference)):
                return copy
        raise NotFound("there is no such backup", subject=f"backup {reference[:100]}", hint="see `backup ls`")

    def find(self, reference: str) -> Copy:
        """Any of them as `get`, else a backup as `backup`."""
        try:
            return self.get(reference)
        except NotFound:
            return self.backup(reference)

    def volume_of(self, copy: Copy) -> Volume:
        """That it became. Raises NotFound."""
        return self._core.volumes.get(self.get(copy.id).made or "")

    def progress(self, copy: Copy) -> Progress | None:
        """None when it does not run now."""
        running = self._running.get(copy.id)
        return progress_of(running.work.step, running.work.control) if running else None

    # Beginning
    def begin_clone(self, reference: str, name: str, wish: Wish) -> Copy:
        """`reference`: VOLUME or VOLUME@SNAPSHOT. Of a volume in use only where its backend takes snapshots of such.
        The same again joins the one that runs. Raises InUse, AlreadyExists, and as a move does, PreconditionFailed
        with what would be lost."""
        running = next((copy for copy in self.all() if copy.name == name and not copy.state.ended), None)
        if running is not None:
            return running
        volume, snapshot = self._volume(reference)
        self._check_free(name)
        return self._begin(CopyKind.CLONE, volume, wish, name=name, snapshot=snapshot)

    def begin_backup(self, reference: str, wish: Wish, *, full: bool = False) -> Copy:
        """Incremental on the volume's latest backup there, unless `full`."""
        volume, snapshot = self._volume(reference)
        held = [
            copy
            for copy in self.all()
            if copy.is_backup
            and (copy.volume_id, copy.target.backend, copy.accepted) == (volume.id, wish.backend, wish.accept)
        ]
        base = held[-1].id if held and not full else None
        return self._begin(CopyKind.BACKUP, volume, wish, snapshot=snapshot, base=base)

    def begin_restore(self, reference: str, name: str, wish: Wish | None) -> Copy:
        """A new volume with a backup's data; without a wish where the volume was, as it was."""
        held = self.backup(reference)
        volume = self._held(held)
        name = name or held.volume_name
        self._check_free(name)
        if wish is None or not wish.backend:
            there = self._repository.volume(held.volume_id)
            if there is None:
                raise InvalidRequest("is of a volume that is gone: say where to", subject=f"backup {held.id}")
            wish = msgspec.structs.replace(wish or Wish(backend=""), backend=there.backend)
        return self._begin(CopyKind.RESTORE, volume, wish, name=name, held=held)

    def begin_restore_in_place(self, reference: str, *, by: str = "") -> Copy:
        """The backup's data instead of what the volume has now. Raises InUse for a volume that is used."""
        held = self.backup(reference)
        volume = check_replaceable(self._core, held.volume_id)
        wish = Wish(
            backend=volume.backend,
            size=volume.size,
            filesystem=volume.filesystem or "",
            options=volume.options,
            accept=("size",),
            by=by,
        )
        return self._begin(CopyKind.RESTORE, self._held(held), wish, held=held)

    def _held(self, held: Copy) -> Volume:
        volume = self._repository.volume(held.made) if held.made else None
        if volume is None:
            raise NotFound("its data is gone", subject=f"backup {held.id}", hint="run `volumectl doctor`")
        return volume

    def _volume(self, reference: str) -> tuple[Volume, str]:
        name, _, snapshot = reference.partition("@")
        volume = self._core.volumes.get(name)
        refuse_second(self._repository, volume)
        self._points.check(volume, snapshot)
        return volume, snapshot

    def _check_free(self, name: str) -> None:
        check_name(name)
        taken = self._repository.volume_by_name(name) is not None
        if taken or any(copy.name == name and not copy.state.ended for copy in self.all()):
            raise AlreadyExists("exists already", subject=f"volume {name}", hint="choose another name")

    def _begin(
        self,
        kind: CopyKind,
        source: Volume,
        wish: Wish,
        *,
        name: str = "",
        snapshot: str = "",
        base: CopyId | None = None,
        held: Copy | None = None,
    ) -> Copy:
        """`source`: whose data is read; of a restore what holds the backup `held`."""
        path = path_of(source)
        shown = source
        if held is not None and path is MovePath.TREE:
            shown = msgspec.structs.replace(source, size=held.size)  # where it lies now it may have been given one
        plan = self._inspection.plan(shown, msgspec.structs.replace(wish, path=str(path)), anywhere=held is not None)
        lost = [loss for loss in plan.losses if loss.kind not in ("snapshots", "multi-node")]  # the original keeps them
        losses.check(lost, wish.accept, subject=f"volume {held.volume_name if held else source.name}")
        copy = Copy(
            id=new_copy_id(),
            kind=kind,
            state=CopyState.COPYING,
            node=self._core.node,
            volume_id=held.volume_id if held else source.id,
            volume_name=held.volume_name if held else source.name,
            target=plan.target,
            path=path,
            created=now(),
            name=name,
            snapshot=snapshot,
            size=shown.size,
            of=held.id if held else None,
            base=base,
            point=held.point if held else "",
            by=wish.by,
            bandwidth=wish.bandwidth,
            accepted=() if kind is CopyKind.RESTORE and not name else wish.accept,
            expected=plan.bytes,
        )
        with self._repository.transaction() as transaction:
            transaction.put(copy)
        crash.point("copy.recorded")
        self._spawn(copy)
        return copy

    # Ending
    def wait(self, copy: Copy, *, timeout: float) -> Copy:
        """Until it has ended. Raises what it failed with, OperationPending when it goes on."""
        running = self._running.get(copy.id)
        if running is not None:
            running.thread.join(timeout)
        ended = self.get(copy.id)
        if ended.state is CopyState.COPYING:
            raise OperationPending("goes on", subject=f"{copy.kind} {copy.id}", hint="ask again to join it")
        if ended.state is CopyState.FAILED:
            raise self._errors.get(copy.id) or VolumedError(ended.error, subject=f"{copy.kind} {copy.id}")
        return ended

    def stop_one(self, reference: str) -> Copy:
        """What it made goes."""
        copy = self.get(reference)
        running = self._running.get(copy.id)
        if running is None:
            raise InvalidRequest(f"is {copy.state}, and does not run", subject=f"{copy.kind} {copy.id}")
        running.work.control.stop()
        running.thread.join(context.remaining(60.0))
        return self.get(copy.id)

    def remove(self, reference: str) -> Copy:
        """A backup with its data; of what has ended otherwise, its record. Raises InUse for one that runs, or is being
        restored."""
        copy = self.get(reference)
        subject = f"{copy.kind} {copy.id}"
        users = [each.id for each in self.all() if each.state is CopyState.COPYING and copy.id in (each.of, each.base)]
        if copy.state is CopyState.COPYING or users:
            holders = [f"copy {each}" for each in users] or ["itself: it is being made"]
            raise InUse("is in use by", holders=holders, subject=subject, hint="wait for it, or stop it")
        with self._repository.transaction() as transaction:
            removing = msgspec.structs.replace(copy, state=CopyState.REMOVING)
            transaction.put(removing)
        crash.point("copy.removing")
        self._clear(removing)
        return removing

    def _clear(self, copy: Copy) -> None:
        """All that it made and is not to stay."""
        for volume in self._repository.hidden_volumes():
            if volume.hidden == copy.id and not _is_kept(copy, volume):
                self._core.volumes.discard(volume)
        for snapshot in self._repository.hidden_snapshots():
            if snapshot.hidden == copy.id:
                self._core.snapshots.destroy(snapshot)
        crash.point("copy.cleared")
        if not copy.is_backup:
            shutil.rmtree(workdir_of(self._core, copy), ignore_errors=True)
        if copy.state is CopyState.REMOVING:
            with self._repository.transaction() as transaction:
                transaction.delete(copy)

    # Running
    def recover(self) -> None:
        """Before anything is served: what was cut short is nothing."""
        for copy in self.all():
            if copy.state is CopyState.COPYING and copy.node == self._core.node:
                self._fail(copy, VolumedError("the daemon ended in the middle of it", hint="begin it again"))

    def start(self) -> None:
        threading.Thread(target=self._sweep, name="copies", daemon=True).start()

    def stop(self) -> None:
        self._closing.set()
        with self._guard:
            running = list(self._running.values())
        for each in running:
            each.work.control.stop()
        for each in running:
            each.thread.join(timeout=5.0)

    def _spawn(self, copy: Copy) -> None:
        work = Copying(self._core, copy, Control(rate=copy.bandwidth))
        thread = threading.Thread(target=self._run, args=(work,), name=f"copy-{copy.id[-6:]}", daemon=True)
        with self._guard:
            self._running[copy.id] = _Running(thread, work)
        thread.start()

    def _run(self, work: Copying) -> None:
        copy = work.copy
        try:
            with context.request(copy.id[-12:]):
                while not self._room.acquire(timeout=0.2):
                    work.control.check()
                try:
                    work.run()
                finally:
                    self._room.release()
        except Stopped as error:
            self._fail(copy, error)
        except VolumedError as error:
            error = self._explained(copy, error)
            _log.warning("%s of %s: %s", copy.kind, copy.volume_name, error, extra={"volume": copy.volume_name})
            self._fail(copy, error)
        except Exception as error:
            _log.exception("%s %s failed", copy.kind, copy.id)
            self._fail(copy, VolumedError(f"a bug: {error!r}"))
        finally:
            self._clear_quietly(self._repository.copy(copy.id))
            with self._guard:
                del self._running[copy.id]

    def _explained(self, copy: Copy, error: VolumedError) -> VolumedError:
        target = self._core.backends.get(copy.target.backend)
        return explained(error, target, volume_name=copy.volume_name)

    def _fail(self, copy: Copy, error: VolumedError) -> None:
        current = self._repository.copy(copy.id)
        if current is None or current.state is not CopyState.COPYING:
            return
        self._errors[copy.id] = error
        with self._repository.transaction() as transaction:
            transaction.put(failed(current, error))
        self._core.events.publish(
            f"{copy.kind}.failed", copy.volume_name, str(error), level=logging.ERROR, copy=copy.id
        )

    def _clear_quietly(self, copy: Copy | None) -> None:
        if copy is None:
            return
        try:
            with context.request(timeout=60.0):
                self._clear(copy)
        except VolumedError as error:
            _log.warning("what is left of %s %s goes later: %s", copy.kind, copy.id, error)
        except Exception:
            _log.exception("what is left of %s %s goes later", copy.kind, copy.id)

    def _sweep(self) -> None:
        """What a crash, or storage that did not answer, left."""
        while True:
            with contextlib.suppress(VolumedError):
                self._sweep_once()
            if self._closing.wait(SWEEP):
                return

    def _sweep_once(self) -> None:
        copies = {copy.id: copy for copy in self.all() if copy.node == self._core.node}
        owners = {volume.hidden for volume in self._repository.hidden_volumes() if not self._stays(volume, copies)}
        owners |= {snapshot.hidden for snapshot in self._repository.hidden_snapshots()}
        owners |= {copy.id for copy in copies.values() if copy.state is CopyState.REMOVING}
        for owner in owners:
            if owner in copies and owner not in self._running:
                self._clear_quietly(self._repository.copy(owner))
        for folder in self._workdirs.glob("*"):
            self._sweep_workdir(folder)

    def _sweep_workdir(self, folder: Path) -> None:
        """Looked at in this order: one that begins now is COPYING, one that ends now is READY."""
        if folder.name in self._running:
            return
        copy = self._repository.copy(folder.name)
        if copy is None or not (copy.is_backup or copy.state is CopyState.COPYING):
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _stays(volume: Volume, copies: dict[CopyId, Copy]) -> bool:
        copy = copies.get(volume.hidden) if volume.hidden else None
        return copy is not None and _is_kept(copy, volume)


def _is_kept(copy: Copy, volume: Volume) -> bool:
    """Whether the hidden volume is a backup that is there."""
    return copy.is_backup and copy.made == volume.id
