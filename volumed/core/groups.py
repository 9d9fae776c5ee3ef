"""Snapshots of several volumes at one instant: all are held still, then all are taken, then all are let go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.events import Events
from volumed.core.journal import Journal
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts
from volumed.core.names import name_for_claim
from volumed.core.presence import handle_of
from volumed.core.provision import snapshot_driver
from volumed.core.snapshots import Snapshots
from volumed.driver import Capability
from volumed.errors import AlreadyExists, InUse, InvalidRequest, NotFound
from volumed.model import (
    GroupSnapshot,
    Operation,
    OperationKind,
    Snapshot,
    SnapshotState,
    Volume,
    new_group_snapshot_id,
    new_snapshot_id,
    now,
)
from volumed.store.repository import Repository
from volumed.testing import crash


class GroupSnapshots:
    def __init__(
        self,
        *,
        repository: Repository,
        backends: Backends,
        snapshots: Snapshots,
        mounts: Mounts,
        locks: KeyedLocks,
        journal: Journal,
        events: Events,
    ) -> None:
        self._repository = repository
        self._backends = backends
        self._snapshots = snapshots
        self._mounts = mounts
        self._locks = locks
        self._journal = journal
        self._events = events

    def get(self, group_id: str) -> GroupSnapshot:
        """Raises NotFound."""
        group = self._repository.group_snapshot(group_id)
        if group is None:
            raise NotFound("there is no such group snapshot", subject=f"group snapshot {group_id[:100]}")
        return group

    def members(self, group: GroupSnapshot) -> list[Snapshot]:
        found = [self._repository.snapshot(*member) for member in group.members]
        return [snapshot for snapshot in found if snapshot is not None]

    def create(self, name: str, volume_ids: Iterable[str]) -> GroupSnapshot:
        """Crash-consistent over all of the volumes. The same name and volumes again return the group that is there.

        Raises NotFound for an unknown volume, AlreadyExists for a name that belongs to another set of volumes, InUse
        when more than one volume is in use that cannot be held still.
        """
        stem = name_for_claim(name)
        wanted = sorted(set(volume_ids))
        if not wanted:
            raise InvalidRequest("no volumes are given", subject=f"group snapshot {name[:100]}")
        there = self._same(name, wanted)
        if there is not None:
            return there
        volumes = [self._volume(volume_id) for volume_id in wanted]
        for volume in volumes:
            self._backends.get(volume.backend).require(Capability.GROUP_SNAPSHOT)
        first = self._backends.get(volumes[0].backend)
        return first.call(lambda: self._create(name, stem, wanted))

    def _same(self, name: str, wanted: Sequence[str]) -> GroupSnapshot | None:
        there = self._repository.group_snapshot_by_name(name)
        if there is None:
            return None
        if sorted(volume_id for volume_id, _ in there.members) != list(wanted):
            raise AlreadyExists("exists already, of other volumes", subject=f"group snapshot {name[:100]}")
        return there

    def _volume(self, volume_id: str) -> Volume:
        volume = self._repository.volume(volume_id)
        if volume is None:
            raise NotFound("there is no such volume", subject=f"volume {volume_id[:100]}")
        return volume

    def _create(self, name: str, stem: str, wanted: Sequence[str]) -> GroupSnapshot:
        subject = f"group snapshot {name[:100]}"
        with ExitStack() as held:
            held.enter_context(self._locks.hold(f"group:{name}", subject=subject))
            for volume_id in wanted:  # in the order of the ids: two groups never wait for one another
                held.enter_context(self._locks.hold(volume_id))
            there = self._same(name, wanted)
            if there is not None:
                return there
            volumes = [self._settled(volume_id) for volume_id in wanted]
            self._check_stillness(volumes)
            group = self._take(name, stem, volumes)
        self._events.publish("group-snapshot.created", name, f"taken of {len(volumes)} volumes at one instant")
        return group

    def _settled(self, volume_id: str) -> Volume:
        volume = self._journal.settle(self._volume(volume_id))
        if volume is None:
            raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
        return volume

    def _check_stillness(self, volumes: Iterable[Volume]) -> None:
        """While all others are frozen, one volume that is written to is taken at an instant of theirs; two are not."""
        moving = [
            volume
            for volume in volumes
            if self._mounts.holders(volume) and not self._mounts.can_freeze(volume, self._backends.get(volume.backend))
        ]
        if len(moving) > 1:
            moving.sort(key=lambda volume: volume.name)
            raise InUse(
                "cannot be held still together while they are in use",
                holders=[f"volume {volume.name} by {', '.join(self._mounts.holders(volume))}" for volume in moving],
                hint="stop the users of all but one of them, or take snapshots one by one",
            )

    def _take(self, name: str, stem: str, volumes: Sequence[Volume]) -> GroupSnapshot:
        group_id, instant = new_group_snapshot_id(), now()
        planned = [
            Snapshot(
                id=new_snapshot_id(),
                name=f"{stem[:200]}-{group_id[1:13]}",
                volume_id=volume.id,
                state=SnapshotState.CREATING,
                created=instant,
                size=volume.size,
                group_id=group_id,
            )
            for volume in volumes
        ]
        with ExitStack() as journalled:
            operations = [
                journalled.enter_context(
                    self._journal.recorded(OperationKind.SNAPSHOT_CREATE, volume, snapshot_id=snapshot.id)
                )
                for volume, snapshot in zip(volumes, planned, strict=True)
            ]
            with self._repository.transaction() as transaction:
                for record in (*planned, *operations):
                    transaction.put(record)
            crash.point("group-snapshot.reserved")
            taken = self._take_all(volumes, planned)
            group = GroupSnapshot(
                id=group_id,
                name=name,
                created=instant,
                members=tuple((snapshot.volume_id, snapshot.id) for snapshot in taken),
            )
            self._commit(group, taken, operations)
            crash.point("group-snapshot.committed")
        return group

    def _take_all(self, volumes: Sequence[Volume], planned: Sequence[Snapshot]) -> list[Snapshot]:
        taken: list[Snapshot] = []
        with ExitStack() as still:
            for volume in volumes:
                still.enter_context(
                    self._mounts.quiescent(volume, self._backend(volume), live=Capability.SNAPSHOT_LIVE)
                )
            crash.point("group-snapshot.still")
            for volume, snapshot in zip(volumes, planned, strict=True):
                handle = snapshot_driver(self._backend(volume)).snapshot(handle_of(volume), snapshot.id)
                taken.append(msgspec.structs.replace(snapshot, handle=handle, state=SnapshotState.READY))
                crash.point("group-snapshot.one")
        return taken

    def _commit(self, group: GroupSnapshot, taken: Iterable[Snapshot], operations: Iterable[Operation]) -> None:
        """All of them are there from one instant on."""
        with self._repository.transaction() as transaction:
            for record in (*taken, group):
                transaction.put(record)
            for operation in operations:
                transaction.delete(operation)

    def _backend(self, volume: Volume) -> Backend:
        return self._backends.get(volume.backend)

    def remove(self, group_id: str) -> None:
        """With all its snapshots; gone already is success."""
        group = self._repository.group_snapshot(group_id)
        if group is None:
            return
        for snapshot in self.members(group):
            self._snapshots.destroy(snapshot)
        crash.point("group-snapshot.emptied")
        with self._repository.transaction() as transaction:
            transaction.delete(group)
        self._events.publish("group-snapshot.removed", group.name, f"removed with {len(group.members)} snapshots")
