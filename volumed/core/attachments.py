"""Which nodes there are, and which volume an orchestrator means for which of them."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from volumed.core.access import attachment_use, conflicts, one_node_only, use_of
from volumed.core.backends import Backend, Backends
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import describe_each
from volumed.core.placement import reaches
from volumed.core.reach import Reach, attacher
from volumed.driver import Capability
from volumed.errors import AlreadyExists, CapacityExhausted, InUse, NotFound, PreconditionFailed
from volumed.model import AccessMode, Attachment, Node, Volume, VolumeId, now
from volumed.store.repository import Repository

# The key of a node's own name in its topology.
NODE_KEY = "volumed.csi/node"


class Attachments:
    def __init__(
        self,
        *,
        node: str,
        topology: dict[str, str],
        limit: int,
        repository: Repository,
        backends: Backends,
        reach: Reach,
        locks: KeyedLocks,
    ) -> None:
        """`topology`: where this node is, beside its name. `limit`: volumes of one node; 0: any number."""
        self._limit = limit
        self._node = node
        self._configured = {NODE_KEY: node, **topology}
        self.topology = self._configured
        self._repository = repository
        self._backends = backends
        self._reach = reach
        self._locks = locks

    def register(self) -> None:
        """Write this node into the ledger, where whoever attaches a volume looks for it: where it is, by its settings
        and by what its backends found, and what they call its machine."""
        found = {key: value for backend in self._backends.all() for key, value in backend.topology.items()}
        self.topology = self._configured | found
        known = self._repository.node(self._node)
        configured = {backend.name for backend in self._backends.all()}
        kept = {name: machine for name, machine in known.machines.items() if name in configured} if known else {}
        wanted = Node(
            revision=known.revision if known else 0,
            name=self._node,
            topology=self.topology,
            machines=kept | self._reach.own_machines(),
        )
        if wanted != known:
            with self._repository.transaction() as transaction:
                transaction.put(wanted)

    def reachable_from(self, volume: Volume, topology: dict[str, str]) -> bool:
        """Whether a node with this topology can have the volume; segments that are not told fit."""
        return reaches(self._backends.get(volume.backend), topology, self.topology)

    def attach(
        self, volume: Volume, node: str, *, access: AccessMode, readonly: bool = False, block: bool = False
    ) -> None:
        """Say that the volume is meant for the node, and attach it there where the storage wants that. The same again
        is success.

        Raises NotFound for an unknown node, PreconditionFailed when it cannot reach the volume, AlreadyExists when it
        is attached there otherwise, InUse when an access mode forbids it beside another node.
        """
        known = self._repository.node(node)
        if known is None:
            raise NotFound("there is no such node", subject=f"node {node[:100]}", hint="start volumed on it")
        backend = self._backends.get(volume.backend)
        if not access.single_node:
            backend.require(Capability.MULTI_NODE)
        if not self.reachable_from(volume, known.topology):
            raise PreconditionFailed(
                f"lies on backend {volume.backend}, which node {node} cannot reach", subject=f"volume {volume.name}"
            )
        wanted = Attachment(volume_id=volume.id, node=node, access=access, since=now(), readonly=readonly, block=block)
        if attacher(backend) is None:
            self._attach(volume.id, wanted, backend)
        else:
            backend.call(lambda: self._attach(volume.id, wanted, backend))

    def _attach(self, volume_id: VolumeId, wanted: Attachment, backend: Backend) -> None:
        with self._locks.hold(volume_id):
            volume = self._repository.volume(volume_id)
            if volume is None:
                raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
            there = self._repository.attachment(volume.id, wanted.node)
            if there is not None and there.ordered:
                if _usage(there) != _usage(wanted):
                    raise AlreadyExists(
                        f"is attached to node {wanted.node} already, for another usage", subject=f"volume {volume.name}"
                    )
                if there.attached or not there.machine:
                    return
            if there is None:
                self._check_room(wanted.node)
            self._check_holders(volume, wanted, backend)
            self._reach.attach(
                volume,
                msgspec.structs.replace(
                    wanted,
                    revision=there.revision if there else 0,
                    attached=there.attached if there else False,
                    machine=self._reach.machine(backend, wanted.node),
                ),
            )

    def _check_room(self, node: str) -> None:
        if not self._limit:
            return
        count = sum(attachment.node == node for attachment in self._repository.attachments())
        if count >= self._limit:
            raise CapacityExhausted(
                f"has {count} volumes attached, and {self._limit} are its limit", subject=f"node {node}"
            )

    def _check_holders(self, volume: Volume, wanted: Attachment, backend: Backend) -> None:
        """Engines that use it on other nodes, and order nothing."""
        one_node = one_node_only(volume, backend.driver, backend.capabilities)
        others = {
            use_of(binding, one_node=one_node): binding
            for binding in self._repository.bindings(volume.id)
            if binding.node != wanted.node and not binding.staging
        }
        refused = conflicts(attachment_use(wanted), others)
        if refused:
            raise InUse(
                f"cannot be attached to node {wanted.node} ({wanted.access}) beside",
                holders=[line for use in refused for line in describe_each(others[use])],
                subject=f"volume {volume.name}",
                hint="stop them first",
            )

    def readonly_here(self, volume_id: VolumeId) -> bool:
        """Whether the volume is attached to this node for reading alone."""
        return any(
            attachment.readonly and attachment.node == self._node
            for attachment in self._repository.attachments(volume_id)
        )

    def nodes(self) -> dict[VolumeId, set[str]]:
        """Of every volume that has any: the nodes that it is attached to or staged on."""
        found: dict[VolumeId, set[str]] = defaultdict(set)
        for attachment in self._repository.attachments():
            if attachment.ordered:
                found[attachment.volume_id].add(attachment.node)
        for binding in self._repository.bindings():
            if binding.path:
                found[binding.volume_id].add(binding.node)
        return found

    def detach(self, volume_id: VolumeId, node: str = "") -> None:
        """What was ordered is taken back: for one node, or for all when none is named; not attached is success. Where
        the node still uses the volume otherwise, it keeps it until it has let go."""
        volume = self._repository.volume(volume_id)
        if volume is None:
            return
        backend = self._backends.get(volume.backend)
        if attacher(backend) is None:
            self._detach(volume, node, backend)
        else:
            backend.call(lambda: self._detach(volume, node, backend))

    def _detach(self, volume: Volume, node: str, backend: Backend) -> None:
        with self._locks.hold(volume.id):
            for attachment in self._repository.attachments(volume.id):
                if not attachment.ordered or (node and attachment.node != node):
                    continue
                if attacher(backend) is not None and self._repository.bindings(volume.id, node=attachment.node):
                    with self._repository.transaction() as transaction:
                        transaction.put(msgspec.structs.replace(attachment, ordered=False))
                else:
                    self._reach.detach(volume, attachment)


def _usage(attachment: Attachment) -> tuple[AccessMode, bool, bool]:
    return attachment.access, attachment.readonly, attachment.block
