"""What is wrong with a volume, for whoever must decide whether to go on using it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from volumed.core.backends import Backend, Backends
from volumed.core.presence import Observed, Presence, handle_of
from volumed.errors import NotFound, VolumedError
from volumed.model import Operation, Volume, VolumeState
from volumed.store.repository import Repository


class Severity(enum.StrEnum):
    """CSI's three (VolumeHealthErrorType)."""

    DEGRADED = "degraded"
    INACCESSIBLE = "inaccessible"
    DATA_LOSS = "data-loss"


class Ailment(NamedTuple):
    severity: Severity
    reason: str  # one word, for programs
    text: str  # for people


class Health:
    def __init__(self, *, node: str, repository: Repository, backends: Backends, presence: Presence) -> None:
        self._node = node
        self._repository = repository
        self._backends = backends
        self._presence = presence

    def known(self, volume: Volume) -> list[Ailment]:
        """From the ledger and the last probe alone: touches no storage."""
        return self._known(volume, self._repository.operation(volume.id))

    def known_of_all(self, volumes: Iterable[Volume]) -> list[list[Ailment]]:
        """As `known`, of each; the journal is read once."""
        operations = {operation.volume_id: operation for operation in self._repository.operations()}
        return [self._known(volume, operations.get(volume.id)) for volume in volumes]

    def _known(self, volume: Volume, operation: Operation | None) -> list[Ailment]:
        found = []
        backend = self._backends.get(volume.backend)
        if not backend.health.ok:
            found.append(
                Ailment(Severity.INACCESSIBLE, "BackendUnavailable", f"{backend.name}: {backend.health.error}")
            )
        if operation is not None and operation.error:
            found.append(Ailment(Severity.DEGRADED, "OperationStuck", f"{operation.kind}: {operation.error}"))
        if volume.state is VolumeState.RESTORING:
            found.append(Ailment(Severity.DEGRADED, "Restoring", "is being put back to a snapshot"))
        return found

    def examine(self, volume: Volume) -> list[Ailment]:
        """Storage and this node are looked at now."""
        found = self.known(volume)
        if found or volume.handle is None:
            return found
        backend = self._backends.get(volume.backend)
        try:
            backend.call(lambda: backend.driver.inspect(handle_of(volume)))
        except NotFound as error:
            return [Ailment(Severity.DATA_LOSS, "StorageGone", str(error))]
        except VolumedError as error:
            return [Ailment(Severity.INACCESSIBLE, "StorageFails", str(error))]
        return self._on_node(volume, backend)

    def _on_node(self, volume: Volume, backend: Backend) -> list[Ailment]:
        """Bound here and not mounted here."""
        if not self._repository.bindings(volume.id, node=self._node):
            return []
        try:
            observed = backend.call(lambda: self._presence.observe(volume, backend.driver))
        except VolumedError as error:
            return [Ailment(Severity.INACCESSIBLE, "MountFails", str(error))]
        if observed is Observed.MOUNTED:
            return []
        text = f"is in use on node {self._node} and what is mounted there is: {observed}"
        return [Ailment(Severity.INACCESSIBLE, "NotMounted", text)]
