"""Who may use a volume beside whom: access modes, held to over all engines and nodes alike.

Two uses are compatible when each one's mode bears the other. A use without a mode is a Docker or Podman container's:
it goes together with any other that asks for no more than that, on every node that its storage reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from volumed.driver import BlockDriver, Capability, Driver
from volumed.model import AccessMode, Attachment, Binding, Volume, VolumeMode


class Use(NamedTuple):
    """`path` tells two uses by one consumer apart; the same path is the same use."""

    node: str
    path: str
    mode: AccessMode | None
    readonly: bool

    @property
    def writes(self) -> bool:
        return not (self.readonly or (self.mode is not None and self.mode.reader_only))


def one_node_only(volume: Volume, driver: Driver, capabilities: Container[Capability]) -> bool:
    """Whether two nodes cannot have the volume at once, whatever a container engine asks: its storage does not reach
    both, or what lies on its device is a file system that knows of one kernel alone."""
    holds_filesystem = isinstance(driver, BlockDriver) and volume.mode is VolumeMode.FILESYSTEM
    return holds_filesystem or Capability.MULTI_NODE not in capabilities


def use_of(binding: Binding, *, one_node: bool = False) -> Use:
    """`one_node`: that an engine which says nothing means one node alone."""
    path = binding.path or f"{binding.engine}:{binding.mount_id}"
    unsaid = AccessMode.SINGLE_NODE_MULTI_WRITER if one_node else None
    return Use(node=binding.node, path=path, mode=binding.access or unsaid, readonly=binding.readonly)


def attachment_use(attachment: Attachment) -> Use:
    return Use(node=attachment.node, path="", mode=attachment.access, readonly=attachment.readonly)


def _one_node(mine: Use, other: Use) -> bool:
    return mine.node == other.node


def _nobody_writes(_: Use, other: Use) -> bool:
    return not other.writes


_BEARS: dict[AccessMode, Callable[[Use, Use], bool]] = {
    AccessMode.SINGLE_NODE_WRITER: _one_node,
    AccessMode.SINGLE_NODE_MULTI_WRITER: _one_node,
    AccessMode.SINGLE_NODE_SINGLE_WRITER: lambda mine, other: False,
    AccessMode.SINGLE_NODE_READER_ONLY: lambda mine, other: _one_node(mine, other) and _nobody_writes(mine, other),
    AccessMode.MULTI_NODE_READER_ONLY: _nobody_writes,
    AccessMode.MULTI_NODE_SINGLE_WRITER: lambda mine, other: (
        not (mine.writes and other.writes) or _one_node(mine, other)
    ),
    AccessMode.MULTI_NODE_MULTI_WRITER: lambda mine, other: True,
}


def bears(mine: Use, other: Use) -> bool:
    """Whether `mine`'s access mode allows `other` beside it."""
    return mine.mode is None or _BEARS[mine.mode](mine, other)


def conflicts(mine: Use, others: Iterable[Use]) -> list[Use]:
    """Those that `mine` cannot be beside."""
    return [
        other
        for other in others
        if (other.node, other.path) != (mine.node, mine.path) and not (bears(mine, other) and bears(other, mine))
    ]
