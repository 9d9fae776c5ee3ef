"""Volumes attached to machines, on storage that must be told who will use them (`SupportsAttach`).

The ledger's `Attachment` is written before the storage is asked and deleted after the storage let go, so whatever a
crash cuts short is known, and the reconciler finishes it. On other storage nothing here does anything.
"""

from __future__ import annotations

import threading

import msgspec

from volumed.core.access import attachment_use, conflicts
from volumed.core.backends import Backend, Backends
from volumed.core.presence import handle_of
from volumed.driver import SupportsAttach
from volumed.errors import (
    CapacityExhausted,
    InUse,
    NotFound,
    NotSupported,
    PermissionDenied,
    PreconditionFailed,
    VolumedError,
)
from volumed.model import AccessMode, Attachment, Volume, VolumeId, now
from volumed.store.repository import Repository
from volumed.testing import crash

# After any other error the storage may still do what it was asked.
_REFUSALS = (InUse, CapacityExhausted, PreconditionFailed, NotFound, NotSupported, PermissionDenied)


def attacher(backend: Backend) -> SupportsAttach | None:
    """The backend's driver, if its volumes are attached to machines."""
    return backend.driver if isinstance(backend.driver, SupportsAttach) else None


class Reach:
    def __init__(self, *, node: str, repository: Repository, backends: Backends) -> None:
        self._node = node
        self._repository = repository
        self._backends = backends
        self._own: dict[str, str] = {}  # by backend: what it calls this machine
        self._learning = threading.Lock()

    # Names of machines
    def own_machines(self) -> dict[str, str]:
        """What the backends call this machine, as far as they were asked; touches no storage."""
        return dict(self._own)

    def learn(self, backend: Backend) -> None:
        """Ask a backend what it calls this machine; it is not asked again. Raises BackendUnavailable."""
        driver = attacher(backend)
        if driver is not None and backend.name not in self._own:
            machine = driver.identity()
            with self._learning:
                self._own = self._own | {backend.name: machine}

    def machine(self, backend: Backend, node: str) -> str:
        """What the backend calls a node's machine; empty where nothing is attached. Raises PreconditionFailed."""
        if attacher(backend) is None:
            return ""
        if node == self._node:
            self.learn(backend)
            return self._own[backend.name]
        known = self._repository.node(node)
        machine = known.machines.get(backend.name, "") if known else ""
        if not machine:
            raise PreconditionFailed(
                f"node {node} has not told what its machine is called there",
                subject=f"backend {backend.name}",
                hint="start volumed on that node, with this backend in its settings",
            )
        return machine

    # Attaching. The caller holds the volume's lock, and is on a worker of its backend
    def attach_here(self, volume: Volume) -> None:
        """To this node, because it is about to use the volume. Raises InUse, and what the storage raises."""
        backend = self._backends.get(volume.backend)
        if attacher(backend) is None:
            return
        there = self._repository.attachment(volume.id, self._node)
        if there is not None and there.ordered and there.attached:
            return  # whoever ordered it has the storage's word
        wanted = there or Attachment(
            volume_id=volume.id,
            node=self._node,
            access=AccessMode.SINGLE_NODE_MULTI_WRITER,
            since=now(),
            ordered=False,
            machine=self.machine(backend, self._node),
        )
        self.attach(volume, wanted)

    def attach(self, volume: Volume, wanted: Attachment) -> None:
        """As the record says, which is in the ledger afterwards, or as it was before when the storage refused."""
        self.check_others(volume, wanted)
        before = self._repository.attachment(volume.id, wanted.node)
        with self._repository.transaction() as transaction:
            transaction.put(wanted)
        driver = attacher(self._backends.get(volume.backend))
        if driver is None:
            return
        crash.point("attach.recorded")
        try:
            driver.attach(handle_of(volume), wanted.machine)
        except VolumedError as error:
            self._take_back(wanted, before, refused=isinstance(error, _REFUSALS))
            raise
        crash.point("attach.attached")
        if not wanted.attached:
            with self._repository.transaction() as transaction:
                transaction.put(msgspec.structs.replace(wanted, attached=True))

    def _take_back(self, wanted: Attachment, before: Attachment | None, *, refused: bool) -> None:
        """What is not known to be refused stays, as this node's own to detach: nobody was told of it."""
        with self._repository.transaction() as transaction:
            if before is not None:
                transaction.put(msgspec.structs.replace(before, revision=wanted.revision, attached=False))
            elif refused:
                transaction.delete(wanted)
            else:
                transaction.put(msgspec.structs.replace(wanted, ordered=False))

    def check_others(self, volume: Volume, wanted: Attachment) -> None:
        """Raises InUse when it cannot be attached to this node beside those that have it."""
        there = [other for other in self._repository.attachments(volume.id) if other.node != wanted.node]
        refused = conflicts(attachment_use(wanted), [attachment_use(other) for other in there])
        if refused:
            raise InUse(
                f"cannot be attached to node {wanted.node} ({wanted.access}) beside",
                holders=[f"node {use.node} ({use.mode})" for use in refused],
                subject=f"volume {volume.name}",
                hint=f"detach it there first; if that node is dead: volumectl takeover {volume.name}",
            )

    # Detaching
    def detach_here(self, volume: Volume) -> None:
        """From this node, which has let go of the volume. What an orchestrator ordered is the orchestrator's to end."""
        if attacher(self._backends.get(volume.backend)) is None:
            return
        there = self._repository.attachment(volume.id, self._node)
        if there is not None and not there.ordered:
            self.detach(volume, there)

    def detach(self, volume: Volume, attachment: Attachment, *, force: bool = False) -> None:
        """The storage lets go, then the ledger forgets."""
        driver = attacher(self._backends.get(volume.backend))
        if driver is not None and attachment.machine and volume.handle is not None:
            driver.detach(volume.handle, attachment.machine, force=force)
            crash.point("detach.detached")
        with self._repository.transaction() as transaction:
            transaction.delete(attachment)

    def left_here(self) -> set[VolumeId]:
        """Volumes that are attached to this node for its own use."""
        return {
            attachment.volume_id
            for attachment in self._repository.attachments()
            if attachment.node == self._node and not attachment.ordered
        }
