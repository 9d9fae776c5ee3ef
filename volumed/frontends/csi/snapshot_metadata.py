"""Which blocks of a snapshot hold data, and which differ between two: what a backup has to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from volumed.core.core import Core
from volumed.driver import Capability, Extent, SupportsChangedBlocks
from volumed.errors import InvalidRequest, NotFound, NotSupported, OutOfRange, PreconditionFailed
from volumed.frontends.csi import capabilities
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.requests import required
from volumed.model import Handle, Snapshot

# Runs in one message, when the caller does not say: about 20 KiB of it.
RESULTS, MOST_RESULTS = 1024, 65536


class _Asked(NamedTuple):
    snapshot: Snapshot
    handle: Handle
    driver: SupportsChangedBlocks


class SnapshotMetadata:
    def __init__(self, core: Core) -> None:
        self._core = core

    def get_metadata_allocated(
        self, request: csi.GetMetadataAllocatedRequest
    ) -> Iterator[csi.GetMetadataAllocatedResponse]:
        asked = self._asked(request.snapshot_id, "snapshot id")
        _check_window(asked.snapshot, request.starting_offset, request.max_results)
        extents = self._look(asked, lambda: asked.driver.allocated(asked.handle))
        for part in _parts(extents, start=request.starting_offset, at_once=request.max_results):
            yield csi.GetMetadataAllocatedResponse(
                block_metadata_type=csi.VARIABLE_LENGTH,
                volume_capacity_bytes=asked.snapshot.size or 0,
                block_metadata=part,
            )

    def get_metadata_delta(self, request: csi.GetMetadataDeltaRequest) -> Iterator[csi.GetMetadataDeltaResponse]:
        base = self._asked(request.base_snapshot_id, "base snapshot id")
        target = self._asked(request.target_snapshot_id, "target snapshot id")
        if base.snapshot.volume_id != target.snapshot.volume_id:
            raise InvalidRequest(
                "are snapshots of two volumes", subject=f"snapshots {base.snapshot.id} and {target.snapshot.id}"
            )
        _check_window(target.snapshot, request.starting_offset, request.max_results)
        extents = self._look(target, lambda: target.driver.changed(base.handle, target.handle))
        for part in _parts(extents, start=request.starting_offset, at_once=request.max_results):
            yield csi.GetMetadataDeltaResponse(
                block_metadata_type=csi.VARIABLE_LENGTH,
                volume_capacity_bytes=target.snapshot.size or 0,
                block_metadata=part,
            )

    def _asked(self, snapshot_id: str, what: str) -> _Asked:
        capabilities.require(self._core, Capability.CHANGED_BLOCKS)
        snapshot = self._core.repository.snapshot_by_id(required(snapshot_id, what))
        volume = self._core.repository.volume(snapshot.volume_id) if snapshot else None
        if snapshot is None or volume is None:
            raise NotFound("there is no such snapshot", subject=f"snapshot {snapshot_id}")
        if snapshot.handle is None:
            raise PreconditionFailed("is not ready yet", subject=f"snapshot {snapshot_id}")
        backend = self._core.backends.get(volume.backend)
        try:
            backend.require(Capability.CHANGED_BLOCKS)
        except NotSupported as error:
            raise PreconditionFailed(error.text, subject=error.subject, hint="make a full backup") from None
        if not isinstance(backend.driver, SupportsChangedBlocks):
            raise TypeError(backend.driver_name)
        return _Asked(snapshot, snapshot.handle, backend.driver)

    def _look(self, asked: _Asked, look: Callable[[], Iterable[Extent]]) -> list[Extent]:
        volume = self._core.volumes.get(asked.snapshot.volume_id)
        return self._core.backends.get(volume.backend).call(lambda: list(look()))


def _check_window(snapshot: Snapshot, start: int, at_once: int) -> None:
    if start < 0 or (snapshot.size is not None and start > snapshot.size):
        raise OutOfRange(
            f"the starting offset {start} is outside of its {snapshot.size} bytes", subject=f"snapshot {snapshot.id}"
        )
    if at_once < 0:
        raise InvalidRequest("max_results cannot be negative")


def _parts(extents: Iterable[Extent], *, start: int, at_once: int) -> Iterator[list[csi.BlockMetadata]]:
    """Messages' worth of what ends after `start`, cut off there; one empty one when there is nothing."""
    size = min(at_once or RESULTS, MOST_RESULTS)
    part: list[csi.BlockMetadata] = []
    said = False
    for extent in extents:
        end = extent.offset + extent.length
        if end <= start:
            continue
        offset = max(extent.offset, start)
        part.append(csi.BlockMetadata(byte_offset=offset, size_bytes=end - offset))
        if len(part) == size:
            yield part
            part, said = [], True
    if part or not said:
        yield part
