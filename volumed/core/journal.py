"""The journal: a row for each change that touches storage, until it is finished or undone.

What becomes of a row that a crash or an error left is a rule of its kind. Undone: what nobody was told of, a volume
or a snapshot in the making. Finished: what was promised and may be half done, a removal, a restore, a growth. Both
are safe to repeat, and are: at start, on the timer, and when somebody next wants to change the volume.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from volumed import context
from volumed.core.backends import Backend, Backends
from volumed.core.encryption import overhead
from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.core.presence import handle_of
from volumed.core.provision import Provision, snapshot_driver
from volumed.errors import InUse, VolumedError
from volumed.model import Operation, OperationKind, Snapshot, SnapshotId, Volume, VolumeState, now
from volumed.store.repository import Repository
from volumed.testing import crash

_log = logging.getLogger(__name__)

# How long the start waits for a backend's rows; the rest is finished in the background.
RECOVERY_PATIENCE = 5.0
_SERVING_THE_FUTURE = (OperationKind.EXPAND, OperationKind.SNAPSHOT_RESTORE, OperationKind.MODIFY, OperationKind.ROTATE)


class Journal:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        backends: Backends,
        provision: Provision,
        locks: KeyedLocks,
        events: Events,
        observe: Callable[[str, str, float], None],
    ) -> None:
        """`observe` is told kind, outcome and seconds of every operation."""
        self._node = node
        self._repository = repository
        self._backends = backends
        self._provision = provision
        self._locks = locks
        self._events = events
        self._observe = observe
        self._rules: dict[OperationKind, Callable[[Operation, Volume, Backend], None]] = {
            OperationKind.CREATE: self._undo_create,
            OperationKind.DELETE: self._finish_delete,
            OperationKind.EXPAND: self._finish_expand,
            OperationKind.SNAPSHOT_CREATE: self._undo_snapshot,
            OperationKind.SNAPSHOT_DELETE: self._finish_snapshot_delete,
            OperationKind.SNAPSHOT_RESTORE: self._finish_restore,
            OperationKind.MODIFY: self._undo_modify,
            OperationKind.IMPORT: self._settle_import,
            OperationKind.ROTATE: self._finish_rotation,
        }

    @contextlib.contextmanager
    def recorded(
        self,
        kind: OperationKind,
        volume: Volume,
        *,
        size: int | None = None,
        snapshot_id: SnapshotId | None = None,
        options: dict[str, str] | None = None,
    ) -> Iterator[Operation]:
        """A row for what the block does. The block puts it with its first transaction and deletes it with its last;
        when the block fails in between, the kind's rule is applied at once. The caller holds the volume's lock."""
        migration = self._repository.migration_of(volume.id)
        if migration is not None:
            raise InUse(
                f"is being moved to backend {migration.target.backend}",
                subject=f"volume {volume.name}",
                hint=f"wait for it (volumectl migration follow {migration.id})"
                + ("" if migration.phase.committed else f", or end it: volumectl migration abort {migration.id}"),
            )
        superseded = self._repository.operation(volume.id)
        operation = Operation(
            revision=superseded.revision if superseded else 0,
            kind=kind,
            volume_id=volume.id,
            node=self._node,
            request_id=context.request_id.get(),
            started=now(),
            size=size,
            snapshot_id=snapshot_id,
            options=options or {},
        )
        begun = time.monotonic()
        outcome = "failed"
        try:
            yield operation
            outcome = "done"
        except BaseException:
            self._after_failure(volume)
            raise
        finally:
            self._observe(kind, outcome, time.monotonic() - begun)

    def _after_failure(self, volume: Volume) -> None:
        """The error at hand is what the caller must hear, not that of cleaning up after it."""
        try:
            with context.request(context.request_id.get(), timeout=RECOVERY_PATIENCE):
                self.settle(volume)
        except VolumedError as error:
            _log.warning("volume %s: cleaning up will be tried again: %s", volume.name, error)
        except Exception:
            _log.exception("volume %s: cleaning up will be tried again", volume.name)

    def settle(self, volume: Volume) -> Volume | None:
        """Finish or undo what the journal holds of this volume; the volume as it is then, None when it is gone.

        The caller holds the volume's lock. Raises what the storage raises; the row then keeps the reason.
        """
        operation = self._repository.operation(volume.id)
        current = self._repository.volume(volume.id)
        if operation is None:
            return current
        if current is None:  # the row of a volume that is gone has nothing to do any more
            with self._repository.transaction() as transaction:
                transaction.delete(operation)
            return None
        backend = self._backends.get(current.backend)
        try:
            self._rules[operation.kind](operation, current, backend)
        except VolumedError as error:
            self._set_aside(operation, current, str(error))
            raise
        except Exception as error:
            self._set_aside(operation, current, repr(error))
            raise
        crash.point("journal.settled")
        self._events.publish(
            "operation.recovered",
            current.name,
            f"{operation.kind} was cut short, and is settled",
        )
        return self._repository.volume(volume.id)

    def settle_for_removal(self, volume: Volume) -> Volume | None:
        """As `settle`, but what only serves a volume's future is superseded by its removal: a growth or a restore that
        cannot be finished must not keep it for ever."""
        operation = self._repository.operation(volume.id)
        if operation is not None and operation.kind in _SERVING_THE_FUTURE:
            return self._repository.volume(volume.id)
        return self.settle(volume)

    def _set_aside(self, operation: Operation, volume: Volume, error: str) -> None:
        if operation.error == error:
            return
        with self._repository.transaction() as transaction:
            transaction.put(msgspec.structs.replace(operation, error=error))
        self._events.publish(
            "operation.stuck", volume.name, f"{operation.kind} cannot be settled: {error}", level=logging.ERROR
        )

    def recover(self, *, patience: float = RECOVERY_PATIENCE) -> None:
        """Settle every row of this node. One bad row, or one dead backend, stops neither the others nor the start."""
        rows: dict[str, list[Volume]] = defaultdict(list)
        for operation in self._repository.operations():
            volume = self._repository.volume(operation.volume_id)
            if operation.node != self._node:
                continue
            if volume is None:
                with self._repository.transaction() as transaction:
                    transaction.delete(operation)
                continue
            rows[volume.backend].append(volume)
        for name, volumes in rows.items():
            try:
                with context.request(timeout=patience):
                    self._backends.get(name).call(partial(self._settle_each, volumes))
            except VolumedError as error:
                _log.warning("backend %s: recovery goes on later: %s", name, error, extra={"backend": name})

    def _settle_each(self, volumes: list[Volume]) -> None:
        for volume in volumes:
            try:
                with self._locks.hold(volume.id, wait=0.0):  # whoever holds it settles it
                    self.settle(volume)
            except VolumedError as error:
                _log.warning("volume %s: %s", volume.name, error, extra={"volume": volume.name})
            except Exception:
                _log.exception("volume %s: recovery failed", volume.name, extra={"volume": volume.name})

    # The rules
    def _undo_create(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        self._provision.destroy(volume, backend)
        with self._repository.transaction() as transaction:
            transaction.delete(volume)
            transaction.delete(operation)

    _finish_delete = _undo_create  # the same steps, for another reason

    def _finish_expand(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        """Grow on, unless the storage never began to: then the refusal stands and the row has nothing left to do."""
        size = operation.size or 0
        there = backend.driver.inspect(handle_of(volume)).size
        begun = there is not None and volume.size is not None and there > volume.size + overhead(volume)
        grown = self._provision.expand(volume, backend, size) if begun else volume
        with self._repository.transaction() as transaction:
            transaction.put(grown)
            transaction.delete(operation)

    def _undo_snapshot(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        driver = snapshot_driver(backend)
        for found in driver.list_snapshots():
            if found.snapshot_id == operation.snapshot_id:
                driver.delete_snapshot(found.handle)
        with self._repository.transaction() as transaction:
            snapshot = self._snapshot(operation)
            if snapshot is not None:
                transaction.delete(snapshot)
            transaction.delete(operation)

    _finish_snapshot_delete = _undo_snapshot

    def _finish_restore(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        snapshot = self._snapshot(operation)
        if snapshot is not None:
            self._provision.withdraw(volume, backend)
            self._provision.restore(volume, backend, snapshot)
        with self._repository.transaction() as transaction:
            transaction.put(msgspec.structs.replace(volume, state=VolumeState.READY))
            transaction.delete(operation)

    def _undo_modify(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        """The storage as the ledger still says: nobody was told of anything else."""
        self._provision.modify(volume, backend)
        with self._repository.transaction() as transaction:
            transaction.delete(operation)

    def _finish_rotation(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        self._provision.rekey(volume, backend)
        with self._repository.transaction() as transaction:
            transaction.delete(operation)

    def _settle_import(self, operation: Operation, volume: Volume, backend: Backend) -> None:
        """Finish it once the storage has begun: what was there before us must not go with us. Else forget it."""
        begun = backend.driver.find(volume.id) is not None
        adopted = self._provision.adopt(volume, backend, operation.options["reference"]) if begun else None
        with self._repository.transaction() as transaction:
            if adopted is not None:
                transaction.put(adopted)
            else:
                transaction.delete(volume)
            transaction.delete(operation)

    def _snapshot(self, operation: Operation) -> Snapshot | None:
        if operation.snapshot_id is None:
            return None
        return self._repository.snapshot(operation.volume_id, operation.snapshot_id)
