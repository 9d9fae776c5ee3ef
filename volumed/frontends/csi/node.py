"""Volumes on this machine, as an orchestrator's node agent asks for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from volumed.core.core import Core
from volumed.core.usage import Room
from volumed.errors import InvalidRequest, NotFound
from volumed.frontends.csi import answers, capabilities
from volumed.frontends.csi.consumers import engine_of, holder_of
from volumed.frontends.csi.controller import expand
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.requests import (
    KUBERNETES,
    find_volume,
    read_ephemeral,
    read_usage,
    required,
)
from volumed.model import Binding, Volume, VolumeId

# What kubelet calls a pod's inline volume: a hash of pod and volume name.
_INLINE_ID = re.compile(r"csi-[0-9a-f]{64}")


class Node:
    def __init__(self, core: Core) -> None:
        self._core = core

    def node_get_capabilities(self, _: csi.NodeGetCapabilitiesRequest) -> csi.NodeGetCapabilitiesResponse:
        return csi.NodeGetCapabilitiesResponse(capabilities=capabilities.node(self._core))

    def node_get_info(self, _: csi.NodeGetInfoRequest) -> csi.NodeGetInfoResponse:
        return csi.NodeGetInfoResponse(
            node_id=self._core.node,
            max_volumes_per_node=self._core.settings.csi.max_volumes,
            accessible_topology=csi.Topology(segments=self._core.attachments.topology),
        )

    # Presence
    def node_stage_volume(self, request: csi.NodeStageVolumeRequest) -> csi.NodeStageVolumeResponse:
        required(request.volume_id, "volume id")
        path = _path(request.staging_target_path, "staging target path")
        _require_capability(request)
        usage = read_usage(request.volume_capability)
        volume = find_volume(self._core, request.volume_id)
        self._core.publications.stage(volume, path, usage, engine=engine_of(path))
        return csi.NodeStageVolumeResponse()

    def node_unstage_volume(self, request: csi.NodeUnstageVolumeRequest) -> csi.NodeUnstageVolumeResponse:
        required(request.volume_id, "volume id")
        path = _path(request.staging_target_path, "staging target path")
        volume = find_volume(self._core, request.volume_id)
        self._core.publications.unstage(volume.id, path)
        return csi.NodeUnstageVolumeResponse()

    def node_publish_volume(self, request: csi.NodePublishVolumeRequest) -> csi.NodePublishVolumeResponse:
        volume_id = required(request.volume_id, "volume id")
        path = _path(request.target_path, "target path")
        _require_capability(request)
        readonly = request.readonly or self._core.attachments.readonly_here(VolumeId(volume_id))
        usage = read_usage(request.volume_capability, readonly=readonly)
        engine, consumer = holder_of(path, request.volume_context, readonly=usage.readonly)
        if _is_inline(request.volume_context):
            wanted = read_ephemeral(self._core, volume_id, request.volume_context, usage)
            self._core.publications.publish_ephemeral(wanted, path, usage, engine=engine, consumer=consumer)
            return csi.NodePublishVolumeResponse()
        volume = find_volume(self._core, volume_id)
        self._core.publications.publish(
            volume, path, usage, engine=engine, consumer=consumer, staged_at=request.staging_target_path
        )
        return csi.NodePublishVolumeResponse()

    def node_unpublish_volume(self, request: csi.NodeUnpublishVolumeRequest) -> csi.NodeUnpublishVolumeResponse:
        volume_id = required(request.volume_id, "volume id")
        path = _path(request.target_path, "target path")
        try:
            volume = find_volume(self._core, volume_id)
        except NotFound:
            # An inline volume goes with its publication; the retry of a call whose answer was lost finds it gone.
            if _INLINE_ID.fullmatch(volume_id) and not self._core.publications.is_mounted(path):
                return csi.NodeUnpublishVolumeResponse()
            raise
        self._core.publications.unpublish(volume.id, path)
        return csi.NodeUnpublishVolumeResponse()

    # Looking
    def node_get_volume_stats(self, request: csi.NodeGetVolumeStatsRequest) -> csi.NodeGetVolumeStatsResponse:
        required(request.volume_id, "volume id")
        path = _path(request.volume_path, "volume path")
        volume = find_volume(self._core, request.volume_id)
        self._at(volume, path)
        found = self._core.usage.statistics(volume)
        usage = [_usage(found.space, csi.VolumeUsage.BYTES)]
        if found.inodes is not None:
            usage.append(_usage(found.inodes, csi.VolumeUsage.INODES))
        ailments = self._core.health.known(volume)
        return csi.NodeGetVolumeStatsResponse(usage=usage, volume_condition=answers.condition_message(ailments))

    def _at(self, volume: Volume, path: str) -> Binding:
        """What is staged or published at a path. Raises NotFound."""
        found = self._core.publications.find(volume.id, str(Path(path)))
        if found is None:
            raise NotFound(f"is neither staged nor published at {path}", subject=f"volume {volume.name}")
        return found

    def node_expand_volume(self, request: csi.NodeExpandVolumeRequest) -> csi.NodeExpandVolumeResponse:
        required(request.volume_id, "volume id")
        path = _path(request.volume_path, "volume path")
        volume = find_volume(self._core, request.volume_id)
        self._at(volume, path)
        if request.HasField("capacity_range"):
            volume = expand(self._core, request.volume_id, request, request.capacity_range)
        return csi.NodeExpandVolumeResponse(capacity_bytes=volume.size or 0)

    # Health
    def node_get_volume_health(self, request: csi.NodeGetVolumeHealthRequest) -> csi.NodeGetVolumeHealthResponse:
        volume = find_volume(self._core, request.volume_id)
        for path in (request.volume_publish_path, request.staging_target_path):
            if path:
                self._at(volume, path)
        return csi.NodeGetVolumeHealthResponse(
            volume_health=answers.health_message(volume, self._core.health.examine(volume))
        )

    def node_get_storage_health(self, _: csi.NodeGetStorageHealthRequest) -> csi.NodeGetStorageHealthResponse:
        """Backends that are not well, as they were last probed."""
        return csi.NodeGetStorageHealthResponse(
            backend_health=[
                csi.NodeGetStorageHealthResponse.StorageBackendHealth(
                    status=csi.STORAGE_UNREACHABLE,
                    reason="BackendUnavailable",
                    message=f"backend {backend.name}: {backend.health.error}",
                )
                for backend in self._core.backends.all()
                if not backend.health.ok
            ]
        )


def _require_capability(request: csi.NodeStageVolumeRequest | csi.NodePublishVolumeRequest) -> None:
    if not request.HasField("volume_capability"):
        raise InvalidRequest("no volume capability is given")


def _path(text: str, what: str) -> str:
    if not text:
        raise InvalidRequest(f"no {what} is given")
    return text


def _is_inline(context: Mapping[str, str]) -> bool:
    return context.get(f"{KUBERNETES}ephemeral") == "true"


def _usage(room: Room, unit: csi.VolumeUsage.Unit) -> csi.VolumeUsage:
    return csi.VolumeUsage(total=room.total, used=room.used, available=room.available, unit=unit)
