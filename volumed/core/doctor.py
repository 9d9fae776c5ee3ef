"""`volumectl doctor`: ledger, machine and storage compared, each difference named with what would be done about it.

What is safe is done with `fix`. Data is deleted only when it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.bindings import Bindings
from volumed.core.encryption import Encryption
from volumed.core.journal import Journal
from volumed.core.locks import KeyedLocks
from volumed.core.presence import Presence, remove_mount_point
from volumed.core.reconcile import TABLE, Action, Desired, Reconciler
from volumed.driver import Driver, Found, FoundSnapshot, SupportsAttach, SupportsSnapshots
from volumed.errors import OperationPending, VolumedError
from volumed.model import Snapshot, SnapshotId, SnapshotState, Volume, VolumeId, VolumeState
from volumed.store.repository import Repository


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`id` names the finding again in another run. `destroys`: fixing it deletes data, so it must be named."""

    id: str
    kind: str  # orphan-volume, missing-storage, stuck-operation, ...
    subject: str
    text: str
    action: str
    destroys: bool = False
    fixed: bool = False
    error: str = ""


class _Case(NamedTuple):
    finding: Finding
    fix: Callable[[], None] | None  # None: only a person can


class Doctor:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        backends: Backends,
        presence: Presence,
        bindings: Bindings,
        journal: Journal,
        reconciler: Reconciler,
        encryption: Encryption,
        locks: KeyedLocks,
    ) -> None:
        self._node = node
        self._repository = repository
        self._backends = backends
        self._presence = presence
        self._bindings = bindings
        self._journal = journal
        self._reconciler = reconciler
        self._encryption = encryption
        self._locks = locks

    def examine(self) -> list[Finding]:
        return [case.finding for case in self._cases()]

    def fix(self, wanted: Iterable[str] = (), *, destroy: Iterable[str] = ()) -> list[Finding]:
        """Do what the findings' actions say: of those with the ids in `wanted`, or of all; data is deleted only for
        those whose id is in `destroy`. Returns all findings, each with whether it is fixed, or why not."""
        only, named = frozenset(wanted), frozenset(destroy)
        return [self._treat(case, only=only, named=named) for case in list(self._cases())]

    def _treat(self, case: _Case, *, only: frozenset[str], named: frozenset[str]) -> Finding:
        finding = case.finding
        chosen = finding.id in named if finding.destroys else (not only or finding.id in only)
        if case.fix is None or not chosen:
            return finding
        try:
            case.fix()
        except VolumedError as error:
            return msgspec.structs.replace(finding, error=str(error))
        return msgspec.structs.replace(finding, fixed=True)

    def _cases(self) -> Iterator[_Case]:
        yield from self._operations()
        yield from self._machine()
        yield from self._strangers()
        yield from self._opened()
        yield from self._containers()
        for backend in self._backends.all():
            try:
                yield from self._storage(backend)
            except VolumedError as error:
                yield _only_report("backend-unavailable", f"backend {backend.name}", str(error), "repair the backend")

    def _operations(self) -> Iterator[_Case]:
        for operation in self._repository.operations():
            if not operation.error:
                continue  # it is running
            volume = self._repository.volume(operation.volume_id)
            name = volume.name if volume else operation.volume_id
            yield _Case(
                Finding(
                    id=f"operation:{operation.volume_id}",
                    kind="stuck-operation",
                    subject=f"volume {name}",
                    text=f"{operation.kind} begun {operation.started:%Y-%m-%d %H:%M:%S}Z stuck: {operation.error}",
                    action="try to settle it again",
                ),
                partial(self._settle, volume),
            )

    def _settle(self, volume: Volume | None) -> None:
        if volume is not None:
            with self._locks.hold(volume.id, wait=5.0):
                self._journal.settle(volume)

    def _machine(self) -> Iterator[_Case]:
        """Volumes whose presence on this node is not what their bindings ask for."""
        bound = {binding.volume_id for binding in self._repository.bindings(node=self._node)}
        present = self._presence.scan() | self._reconciler.mapped()
        for volume_id in sorted(bound | present):
            volume = self._repository.volume(volume_id)
            if volume is None and volume_id not in self._presence.mounted_ids():
                yield _only_report(
                    "orphan-device", f"device of {volume_id}", "is on this node for no volume of the ledger", "free it"
                )
            if volume is None or volume.handle is None or volume.state is not VolumeState.READY:
                continue
            if volume.hidden or self._repository.migration_of(volume_id) is not None:
                continue  # held as its copy or its move needs it
            backend = self._backends.get(volume.backend)
            try:
                observed = backend.call(partial(self._presence.observe, volume, backend.driver))
            except VolumedError as error:
                yield _only_report("mount-unknown", f"volume {volume.name}", str(error), "repair the backend")
                continue
            action = TABLE[Desired.BOUND if volume_id in bound else Desired.UNBOUND, observed]
            if action is Action.NOTHING:
                continue
            kind, text, remedy = _MACHINE[action]
            finding = Finding(
                id=f"{kind}:{volume_id}", kind=kind, subject=f"volume {volume.name}", text=text, action=remedy
            )
            fixable = action not in (Action.REPORT, Action.NAME)
            yield _Case(finding, partial(self._reconciler.converge, volume_id) if fixable else None)

    def _strangers(self) -> Iterator[_Case]:
        """What lies in our folder of mounts and belongs to no volume."""
        mounted = self._presence.scan()
        for path in sorted(self._presence.mounts_dir.iterdir()):
            volume_id = VolumeId(path.name)
            if self._repository.volume(volume_id) is not None:
                continue
            if volume_id in mounted:
                text, action = "is mounted and belongs to no volume of the ledger", "unmount it"
            else:
                text, action = "is an empty mount point of no volume", "remove the empty folder"

            def fix(path: Path = path) -> None:
                self._presence.host.unmount(path)
                remove_mount_point(path)

            finding = Finding(
                id=f"stranger:{path.name}", kind="orphan-mount", subject=str(path), text=text, action=action
            )
            yield _Case(finding, fix)

    def _opened(self) -> Iterator[_Case]:
        """Nodes of device-mapper for no volume of the ledger: of encrypted devices, and those over devices."""
        for stored_as, path in sorted(self._encryption.nodes().items()):
            known = self._repository.volume_stored_as(stored_as) or self._repository.migration_holding(stored_as)
            if known is None:
                finding = Finding(
                    id=f"opened:{path.name}",
                    kind="orphan-device",
                    subject=str(path),
                    text="is open for no volume of the ledger",
                    action="close it",
                )
                yield _Case(finding, partial(self._encryption.close_node, path))
        layer = self._presence.layer
        for volume_id, path in sorted(layer.nodes().items()):
            if self._repository.volume(volume_id) is None:
                finding = Finding(
                    id=f"node:{path.name}",
                    kind="orphan-device",
                    subject=str(path),
                    text="is there for no volume of the ledger",
                    action="remove it",
                )
                yield _Case(finding, partial(layer.remove_node, path))

    def _containers(self) -> Iterator[_Case]:
        for name, container in sorted(self._bindings.missing_mounts()):
            yield _only_report(
                "mount-missing",
                f"volume {name}",
                f"container {container} runs on it and it is not mounted",
                "restart the container",
            )

    def _storage(self, backend: Backend) -> Iterator[_Case]:
        """The backend's volumes and snapshots beside the ledger's."""
        there = {found.volume_id: found for found in backend.call(lambda: list(backend.driver.list()))}
        known = {volume.stored_as: volume for volume in self._repository.volumes() if volume.backend == backend.name}
        for volume_id in sorted(there.keys() - known.keys()):
            made_since = self._repository.volume_stored_as(volume_id)
            if made_since is None and self._repository.migration_holding(volume_id) is None:
                yield self._orphan(backend, there[volume_id])
        for volume_id in sorted(known.keys() - there.keys()):
            volume = self._repository.volume_stored_as(volume_id)
            if volume is not None and volume.state is VolumeState.READY:
                yield _only_report(
                    "missing-storage",
                    f"volume {volume.name}",
                    f"backend {backend.name} has nothing of it any more",
                    f"put it back from a backup, or give it up: volumectl rm {volume.name}",
                )
        if isinstance(backend.driver, SupportsSnapshots):
            yield from self._snapshots(backend, backend.driver)
        if isinstance(backend.driver, SupportsAttach):
            for volume in known.values():
                yield from self._attached(volume, backend, backend.driver)

    def _snapshots(self, backend: Backend, driver: SupportsSnapshots) -> Iterator[_Case]:
        at_rest = self._at_rest()
        there = {found.snapshot_id: found for found in backend.call(lambda: list(driver.list_snapshots()))}
        at_rest &= self._at_rest()
        known: dict[SnapshotId, Snapshot] = {}
        for snapshot in self._repository.snapshots():
            volume = self._repository.volume(snapshot.volume_id)
            if volume is not None and volume.backend == backend.name:
                known[snapshot.id] = snapshot
        left_behind = {
            snapshot.id
            for migration in self._repository.migrations()
            if not migration.phase.ended
            for snapshot in migration.snapshots
        }
        for snapshot_id in sorted(there.keys() - known.keys() - left_behind):
            yield self._orphan_snapshot(backend, driver, there[snapshot_id])
        for snapshot_id in sorted(known.keys() - there.keys()):
            if known[snapshot_id].state is SnapshotState.READY and known[snapshot_id].volume_id in at_rest:
                yield _only_report(
                    "missing-storage",
                    f"snapshot {known[snapshot_id].name}",
                    f"backend {backend.name} has nothing of it any more",
                    "remove the snapshot",
                )

    def _at_rest(self) -> set[VolumeId]:
        """Of one that is being put back to a snapshot, its storage may tell nothing meanwhile."""
        return {volume.id for volume in self._repository.volumes() if volume.state is VolumeState.READY}

    def _attached(self, volume: Volume, backend: Backend, driver: SupportsAttach) -> Iterator[_Case]:
        """Who has the volume by the storage's word, beside the ledger's; not while somebody is changing it."""
        handle = volume.handle
        if handle is None:
            return
        try:
            with self._locks.hold(volume.id, wait=0.0):
                there = set(backend.call(lambda: driver.machines(handle)))
                known = self._repository.attachments(volume.id)
        except OperationPending:
            return
        subject = f"volume {volume.name}"
        for machine in sorted(there - {attachment.machine for attachment in known}):
            text = f"is attached to {machine}, and not by volumed"
            yield _only_report("attached-elsewhere", subject, text, "detach it there by hand, or find out who did it")
        for attachment in known:
            if attachment.attached and attachment.machine not in there:
                text = f"is not attached to {attachment.machine} any more, and node {attachment.node} should have it"
                yield _only_report("not-attached", subject, text, "restart what uses it there")

    def _orphan(self, backend: Backend, found: Found) -> _Case:
        finding = Finding(
            id=f"orphan:{backend.name}:{found.volume_id}",
            kind="orphan-volume",
            subject=f"backend {backend.name}",
            text=f"holds {found.volume_id}, which the ledger does not know",
            action="delete it with its data",
            destroys=True,
        )
        return _Case(finding, lambda: _destroy(backend, backend.driver, found))

    def _orphan_snapshot(self, backend: Backend, driver: SupportsSnapshots, found: FoundSnapshot) -> _Case:
        finding = Finding(
            id=f"orphan:{backend.name}:{found.snapshot_id}",
            kind="orphan-snapshot",
            subject=f"backend {backend.name}",
            text=f"holds snapshot {found.snapshot_id}, which the ledger does not know",
            action="delete it with its data",
            destroys=True,
        )
        return _Case(finding, lambda: backend.call(lambda: driver.delete_snapshot(found.handle)))


_MACHINE = {
    Action.MOUNT: ("not-mounted", "is bound and not mounted", "mount it"),
    Action.UNMOUNT: ("not-bound", "is present on this node and nobody is bound to it", "unmount it"),
    Action.NAME: ("lost-device", "its device has gone from this machine", "stop what uses it"),
    Action.REPORT: ("foreign-mount", "something else is mounted at its path", "look at it, and unmount it by hand"),
}


def _destroy(backend: Backend, driver: Driver, found: Found) -> None:
    backend.call(lambda: driver.delete(found.handle))


def _only_report(kind: str, subject: str, text: str, action: str) -> _Case:
    return _Case(Finding(id=f"{kind}:{subject}", kind=kind, subject=subject, text=text, action=action), None)
