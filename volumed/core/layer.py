"""A device-mapper node between a volume's device and whoever uses it, so that the volume can be moved under them.

It leads to the device and does nothing else (dm-linear), until a live move swaps its table. What is in use already
cannot be put under it, so it is there from the beginning, wherever the machine has device-mapper. Its name is the
volume's id, not what the storage calls it: that changes with a move. Where it leads is the kernel's to say.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from volumed.driver import Host
from volumed.errors import HostError, IntegrityError, MountFailed, VolumedError
from volumed.host import mapper
from volumed.host.holders import is_claimed
from volumed.host.mapper import Mirrored
from volumed.model import Volume, VolumeId
from volumed.testing import crash

_log = logging.getLogger(__name__)


def _name(volume_id: VolumeId) -> str:
    return f"volumed-{volume_id}"


class Layer:
    """Every method bears that there is no node: then the device is what is used."""

    def __init__(self, host: Host, *, wanted: bool) -> None:
        self._host = host
        self.wanted = wanted and host.device_mapper

    def node(self, volume_id: VolumeId) -> Path | None:
        return mapper.node(_name(volume_id)) if self._host.device_mapper else None

    def shown(self, volume_id: VolumeId, device: Path | None) -> Path | None:
        """What is seen of the volume over `device`, its own; with none on this machine any more, the node that is left
        over a disk that was pulled."""
        node = self.node(volume_id)
        if node is None:
            return device
        if device is None:
            return None if mapper.legs(node.name) else node
        return node if mapper.leads_to(node.name, device) else device

    def over(self, volume: Volume, device: Path, *, fresh: bool) -> Path:
        """The node, leading to the device; or the device where there is none and none can be. `fresh`: nobody can have
        the device itself open. Raises MountFailed when a node leads elsewhere."""
        node = self.node(volume.id)
        if node is not None and not mapper.legs(node.name):
            mapper.remove(self._host, node.name)  # of a disk that was pulled, and is back
            node = None
        if node is not None:
            if mapper.leads_to(node.name, device):
                return node
            raise MountFailed(
                f"its node {node} leads to another device",
                subject=f"volume {volume.name}",
                hint="stop what uses it, then it is put right",
            )
        try:
            if not self.wanted or not fresh or is_claimed(device):
                return device
            made = mapper.create(self._host, _name(volume.id), mapper.linear(device, mapper.size_of(device)))
        except (VolumedError, OSError) as error:
            _log.warning("it is used without device-mapper: %s", error, extra={"volume": volume.name})
            return device
        crash.point("layer.made")
        return made

    def remove(self, volume_id: VolumeId, device: Path | None) -> None:
        """Unless it leads to another device that is there: to the volume's other place. Raises InUse."""
        node = self.node(volume_id)
        if node is None:
            return
        legs = mapper.legs(node.name)
        if not legs or (device is not None and mapper.leads_to(node.name, device)):
            mapper.remove(self._host, node.name)
            crash.point("layer.removed")

    def resize(self, volume_id: VolumeId, device: Path) -> None:
        """As large as its device is now."""
        node = self.node(volume_id)
        if node is not None and mapper.leads_to(node.name, device):
            size = mapper.size_of(device)
            if mapper.size_of(node) != size:
                mapper.resize(self._host, node.name, mapper.linear(device, size))

    # A live move
    def mirror(self, volume: Volume, source: Path, target: Path) -> Mirrored:
        """Begin to copy what is at the source to the target, and to write everything to both; or go on with that."""
        node = self._required(volume, source)
        mapper.require_blocks(source, target)
        size = mapper.size_of(node)
        wanted = mapper.mirror(source, target, size)
        if mapper.size_of(target) < size:
            raise HostError(f"has {mapper.size_of(target)} bytes, and {size} are to be copied", subject=str(target))
        if _legs_of(mapper.table(self._host, node.name)) != _legs_of(wanted):
            mapper.swap(self._host, node.name, wanted)
        # What storage frees in part reads differently on another: then the two could not be compared.
        with contextlib.suppress(OSError):
            Path("/sys/class/block", node.resolve().name, "queue", "discard_max_bytes").write_text("0")
        return self.mirrored(volume)

    def mirrored(self, volume: Volume) -> Mirrored:
        """Raises HostError when it is no mirror, or a leg of it has failed."""
        node = self.node(volume.id)
        state = mapper.mirrored(self._host, node.name) if node else None
        if state is None or not state.alive:
            raise HostError(
                "its source or its target failed while it was copied",
                subject=f"volume {volume.name}",
                hint="look at both backends, and at the kernel's log",
            )
        return state

    def lead(self, volume_id: VolumeId, device: Path) -> float:
        """To this device alone; what a leg that failed kept back goes there. Where there is no node it is success.
        Returns the seconds for which a writer may have waited. Raises IntegrityError when it leads elsewhere."""
        node = self.node(volume_id)
        if node is None or not mapper.legs(node.name):
            return 0.0
        if not mapper.leads_to(node.name, device):
            raise IntegrityError(
                f"its node {node} leads to another device than {device}",
                subject=f"volume {volume_id}",
                hint="stop what uses it, and look at both devices before it is used again",
            )
        wanted = mapper.linear(device, mapper.size_of(node))
        if mapper.table(self._host, node.name) == wanted and len(mapper.legs(node.name)) == 1:
            return 0.0
        return mapper.swap(self._host, node.name, wanted)

    def _required(self, volume: Volume, device: Path) -> Path:
        node = self.node(volume.id)
        if node is None or not mapper.leads_to(node.name, device):
            raise HostError(
                "is used without device-mapper",
                subject=f"volume {volume.name}",
                hint="when it is next mounted it is put under it",
            )
        return node

    # What a crash or a hand left
    def nodes(self) -> dict[VolumeId, Path]:
        """Every node of ours on this machine."""
        found = mapper.MAPPER.iterdir() if self._host.device_mapper else iter(())
        return {VolumeId(match[1]): path for path in found if (match := mapper.VOLUME_NODE.fullmatch(path.name))}

    def remove_node(self, path: Path) -> None:
        mapper.remove(self._host, path.name)


class NoLayer(Layer):
    """For what is on this machine beside the volume's own place: it is never used by anybody."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, wanted=False)

    def node(self, volume_id: VolumeId) -> Path | None:
        return None


def _legs_of(table: str) -> tuple[str, ...]:
    """What a table leads to, whichever options the kernel adds to its line."""
    words = table.split()
    return (words[2], *(word for word in words[3:] if ":" in word)) if len(words) > 2 else ()
