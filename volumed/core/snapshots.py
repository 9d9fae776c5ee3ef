"""Snapshots: points in time of a volume, on the volume's own storage."""

from __future__ import annotations

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.events import Events
from volumed.core.journal import Journal
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts
from volumed.core.names import check_name, name_for_claim
from volumed.core.options import nearest
from volumed.core.presence import handle_of
from volumed.core.provision import Provision, snapshot_driver
from volumed.core.volumes import Volumes
from volumed.driver import Capability
from volumed.errors import AlreadyExists, InvalidRequest, NotFound
from volumed.model import (
    Claim,
    CopyId,
    OperationKind,
    Snapshot,
    SnapshotState,
    Volume,
    VolumeId,
    VolumeState,
    new_snapshot_id,
    now,
)
from volumed.store.repository import Repository
from volumed.testing import crash


class Snapshots:
    def __init__(
        self,
        *,
        repository: Repository,
        backends: Backends,
        volumes: Volumes,
        mounts: Mounts,
        locks: KeyedLocks,
        journal: Journal,
        provision: Provision,
        events: Events,
    ) -> None:
        self._repository = repository
        self._backends = backends
        self._volumes = volumes
        self._mounts = mounts
        self._locks = locks
        self._journal = journal
        self._provision = provision
        self._events = events

    def list(self, reference: str | None = None) -> list[Snapshot]:
        """Of one volume, or all."""
        return self._repository.snapshots(self._volumes.get(reference).id if reference else None)

    def get(self, reference: str, name: str) -> Snapshot:
        """Raises NotFound, naming the nearest snapshot."""
        volume = self._volumes.get(reference)
        snapshot = self._repository.snapshot_by_name(volume.id, name)
        if snapshot is None:
            known = [found.name for found in self._repository.snapshots(volume.id)]
            raise NotFound(
                f"there is no snapshot {name[:100]!r}", subject=f"volume {volume.name}", hint=nearest(name, known)
            )
        return snapshot

    def create(self, reference: str, name: str = "", *, hidden: CopyId | None = None) -> Snapshot:
        """A snapshot of what the volume holds now; named after the time when no name is given.

        Raises AlreadyExists for a name that is taken, InUse when only an unused volume can be snapshotted.
        """
        volume = self._volumes.get(reference)
        name = name or f"{now():%Y%m%d-%H%M%S}"
        check_name(name, what="snapshot")
        return self._begin(volume, name, None, hidden=hidden)

    def create_claimed(self, volume: Volume, claim: str) -> Snapshot:
        """A snapshot by the name that an orchestrator gave it, unique over all volumes; the same again returns it.

        Raises AlreadyExists when the name belongs to a snapshot of another volume.
        """
        name = name_for_claim(claim)
        there = self._claimed(volume, claim)
        return there or self._begin(volume, name, Claim(name=claim))

    def _claimed(self, volume: Volume, claim: str) -> Snapshot | None:
        there = self._repository.snapshot_by_claim(claim)
        if there is None or there.state is not SnapshotState.READY:
            return None
        if there.volume_id != volume.id:
            raise AlreadyExists(f"{claim!r} is a snapshot of another volume", subject=f"volume {volume.name}")
        return there

    def _begin(self, volume: Volume, name: str, claim: Claim | None, *, hidden: CopyId | None = None) -> Snapshot:
        backend = self._backends.get(volume.backend)
        backend.require(Capability.SNAPSHOT)
        return backend.call(lambda: self._create(volume.id, name, claim, hidden, backend))

    def _create(
        self, volume_id: VolumeId, name: str, claim: Claim | None, hidden: CopyId | None, backend: Backend
    ) -> Snapshot:
        with self._locks.hold(volume_id):
            volume = self._settled(volume_id)
            backend = self._backends.get(volume.backend)
            there = self._claimed(volume, claim.name) if claim else None
            if there is not None:
                return there
            if self._repository.snapshot_by_name(volume.id, name) is not None:
                raise AlreadyExists(f"has a snapshot {name!r} already", subject=f"volume {volume.name}")
            snapshot = Snapshot(
                id=new_snapshot_id(),
                name=name,
                volume_id=volume.id,
                state=SnapshotState.CREATING,
                created=now(),
                size=volume.size,
                claim=claim,
                hidden=hidden,
            )
            with self._journal.recorded(OperationKind.SNAPSHOT_CREATE, volume, snapshot_id=snapshot.id) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(snapshot)
                    transaction.put(operation)
                crash.point("snapshot-create.reserved")
                with self._mounts.quiescent(volume, backend, live=Capability.SNAPSHOT_LIVE):
                    crash.point("snapshot-create.quiescent")
                    handle = snapshot_driver(backend).snapshot(handle_of(volume), snapshot.id)
                    crash.point("snapshot-create.stored")
                ready = msgspec.structs.replace(snapshot, handle=handle, state=SnapshotState.READY)
                with self._repository.transaction() as transaction:
                    transaction.put(ready)
                    transaction.delete(operation)
                crash.point("snapshot-create.committed")
        self._events.publish("snapshot.created", volume.name, f"snapshot {name} taken", snapshot=name)
        return ready

    def remove(self, reference: str, name: str) -> None:
        """Raises NotFound."""
        self.remove_one(self.get(reference, name))

    def remove_one(self, snapshot: Snapshot) -> None:
        """Raises InvalidRequest for one of a group: its others would be worth less without it."""
        if snapshot.group_id is not None:
            raise InvalidRequest(
                f"was taken with others, as group snapshot {snapshot.group_id}, and goes with them",
                subject=f"snapshot {snapshot.name}",
                hint="remove the group",
            )
        self.destroy(snapshot)

    def destroy(self, snapshot: Snapshot) -> None:
        """Whatever it belongs to; gone already is success."""
        volume = self._repository.volume(snapshot.volume_id)
        if volume is None:
            return
        backend = self._backends.get(volume.backend)
        backend.call(lambda: self._remove(volume.id, snapshot, backend))
        self._events.publish(
            "snapshot.removed", volume.name, f"snapshot {snapshot.name} removed", snapshot=snapshot.name
        )

    def _remove(self, volume_id: VolumeId, snapshot: Snapshot, backend: Backend) -> None:
        with self._locks.hold(volume_id):
            volume = self._settled(volume_id)
            backend = self._backends.get(volume.backend)
            current = self._repository.snapshot(volume_id, snapshot.id)
            if current is None:
                return
            doomed = msgspec.structs.replace(current, state=SnapshotState.DELETING)
            with self._journal.recorded(OperationKind.SNAPSHOT_DELETE, volume, snapshot_id=snapshot.id) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(doomed)
                    transaction.put(operation)
                crash.point("snapshot-delete.marked")
                if doomed.handle is not None:
                    snapshot_driver(backend).delete_snapshot(doomed.handle)
                crash.point("snapshot-delete.destroyed")
                with self._repository.transaction() as transaction:
                    transaction.delete(doomed)
                    transaction.delete(operation)
            crash.point("snapshot-delete.committed")

    def restore(self, reference: str, name: str, *, dry_run: bool = False) -> Volume:
        """Put the volume back to the snapshot; what was written since is lost. Raises InUse naming its holders."""
        snapshot = self.get(reference, name)
        volume = self._volumes.get(reference)
        backend = self._backends.get(volume.backend)
        backend.require(Capability.SNAPSHOT)
        if dry_run:
            with self._locks.hold(volume.id), self._mounts.unmounted(volume, backend):
                return volume
        return backend.call(lambda: self._restore(volume.id, snapshot, backend))

    def _restore(self, volume_id: VolumeId, snapshot: Snapshot, backend: Backend) -> Volume:
        with self._locks.hold(volume_id):
            volume = self._settled(volume_id)
            backend = self._backends.get(volume.backend)
            current = self._repository.snapshot(volume_id, snapshot.id)
            if current is None or current.handle is None or current.state is not SnapshotState.READY:
                raise NotFound(f"snapshot {snapshot.name!r} was removed", subject=f"volume {volume.name}")
            with self._mounts.unmounted(volume, backend):
                with self._journal.recorded(
                    OperationKind.SNAPSHOT_RESTORE, volume, snapshot_id=snapshot.id
                ) as operation:
                    volume = msgspec.structs.replace(volume, state=VolumeState.RESTORING)
                    with self._repository.transaction() as transaction:
                        transaction.put(volume)
                        transaction.put(operation)
                        transaction.touch(volume.id, rewritten=True)
                    crash.point("snapshot-restore.recorded")
                    self._provision.restore(volume, backend, current)
                    volume = msgspec.structs.replace(volume, state=VolumeState.READY)
                    with self._repository.transaction() as transaction:
                        transaction.put(volume)
                        transaction.delete(operation)
                crash.point("snapshot-restore.committed")
        self._events.publish("snapshot.restored", volume.name, f"put back to snapshot {snapshot.name}")
        return volume

    def _settled(self, volume_id: VolumeId) -> Volume:
        volume = self._repository.volume(volume_id)
        settled = self._journal.settle(volume) if volume else None
        if settled is None:
            raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
        return settled
