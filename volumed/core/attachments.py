"""Which nodes there are, and which volume an orchestrator means for which of them."""

from __future__ import annotations

from collections import defaultdict

from volumed.core.access import attachment_use, conflicts
from volumed.core.backends import Backends
from volumed.core.locks import KeyedLocks
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
        locks: KeyedLocks,
    ) -> None:
        """`topology`: where this node is, beside its name. `limit`: volumes of one node; 0: any number."""
        self._limit = limit
        self._node = node
        self.topology = {NODE_KEY: node, **topology}
        self._repository = repository
        self._backends = backends
        self._locks = locks

    def register(self) -> None:
        """Write this node into the ledger, where whoever attaches a volume looks for it."""
        known = self._repository.node(self._node)
        if known is not None and known.topology == self.topology:
            return
        with self._repository.transaction() as transaction:
            revision = known.revision if known else 0
            transaction.put(Node(revision=revision, name=self._node, topology=self.topology))

    def reachable_from(self, volume: Volume, topology: dict[str, str]) -> bool:
        """Whether a node with this topology can have the volume; segments that are not told fit."""
        if Capability.MULTI_NODE in self._backends.get(volume.backend).capabilities:
            return True
        return all(self.topology.get(key) == value for key, value in topology.items())

    def attach(
        self, volume: Volume, node: str, *, access: AccessMode, readonly: bool = False, block: bool = False
    ) -> None:
        """Say that the volume is meant for the node. The same again is success.

        Raises NotFound for an unknown node, PreconditionFailed when it cannot reach the volume, AlreadyExists when it
        is attached there otherwise, InUse when an access mode forbids it beside another node.
        """
        known = self._repository.node(node)
        if known is None:
            raise NotFound("there is no such node", subject=f"node {node[:100]}", hint="start volumed on it")
        if not access.single_node:
            self._backends.get(volume.backend).require(Capability.MULTI_NODE)
        if not self.reachable_from(volume, known.topology):
            raise PreconditionFailed(
                f"lies on backend {volume.backend}, which node {node} cannot reach", subject=f"volume {volume.name}"
            )
        with self._locks.hold(volume.id):
            wanted = Attachment(
                volume_id=volume.id, node=node, access=access, since=now(), readonly=readonly, block=block
            )
            if self._is_there(volume, wanted):
                return
            self._check_room(node)
            with self._repository.transaction() as transaction:
                transaction.put(wanted)

    def _check_room(self, node: str) -> None:
        if not self._limit:
            return
        count = sum(attachment.node == node for attachment in self._repository.attachments())
        if count >= self._limit:
            raise CapacityExhausted(
                f"has {count} volumes attached, and {self._limit} are its limit", subject=f"node {node}"
            )

    def _is_there(self, volume: Volume, wanted: Attachment) -> bool:
        there = self._repository.attachments(volume.id)
        for attachment in there:
            if attachment.node == wanted.node:
                if _usage(attachment) == _usage(wanted):
                    return True
                raise AlreadyExists(
                    f"is attached to node {wanted.node} already, for another usage", subject=f"volume {volume.name}"
                )
        others = {attachment_use(attachment): attachment for attachment in there}
        refused = conflicts(attachment_use(wanted), others)
        if refused:
            raise InUse(
                f"cannot be attached to node {wanted.node} ({wanted.access}) beside",
                holders=[f"node {use.node} ({use.mode})" for use in refused],
                subject=f"volume {volume.name}",
                hint="detach it there first",
            )
        return False

    def nodes(self) -> dict[VolumeId, set[str]]:
        """Of every volume that has any: the nodes that it is attached to or staged on."""
        found: dict[VolumeId, set[str]] = defaultdict(set)
        for attachment in self._repository.attachments():
            found[attachment.volume_id].add(attachment.node)
        for binding in self._repository.bindings():
            if binding.path:
                found[binding.volume_id].add(binding.node)
        return found

    def detach(self, volume_id: VolumeId, node: str = "") -> None:
        """From one node, or from all when none is named; not attached is success."""
        with self._locks.hold(volume_id), self._repository.transaction() as transaction:
            for attachment in self._repository.attachments(volume_id):
                if not node or attachment.node == node:
                    transaction.delete(attachment)


def _usage(attachment: Attachment) -> tuple[AccessMode, bool, bool]:
    return attachment.access, attachment.readonly, attachment.block
