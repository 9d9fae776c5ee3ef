"""What `docker volume inspect` shows of a volume under Status: from the ledger and memory, no storage is asked."""

from __future__ import annotations

from typing import Any

from volumed.core.core import Core
from volumed.core.mounts import describe
from volumed.model import Volume
from volumed.units import format_size


def status_of_volume(core: Core, volume: Volume) -> dict[str, Any]:
    status: dict[str, Any] = {"id": volume.id, "backend": volume.backend, "state": volume.state}
    if volume.size is not None:
        status["size"] = format_size(volume.size)
    if volume.filesystem:
        status["fs"] = volume.filesystem
    usage = core.usage.latest(volume.id)
    if usage is not None and usage.used is not None:
        status["used"] = format_size(usage.used)
    snapshots = [snapshot.name for snapshot in core.repository.snapshots(volume.id)]
    if snapshots:
        status["snapshots"] = snapshots
    if volume.labels:
        status["labels"] = volume.labels
    status["used by"] = [
        describe(binding, consumer)
        for binding in core.bindings.of_volume(volume.id)
        for consumer in binding.consumers or (None,)
    ]
    return status
