"""The life of volumes and snapshots, as an orchestrator's controller asks for it."""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import Int64Value

from volumed.core.core import Core
from volumed.core.placement import Needs, choose_backend
from volumed.driver import BlockDriver, Capability
from volumed.errors import CapacityExhausted, InvalidRequest, NotFound, OutOfRange, VolumedError
from volumed.frontends.csi import answers, capabilities
from volumed.frontends.csi.paging import read_page, take
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.requests import (
    KUBERNETES,
    find_volume,
    read_creation,
    read_modification,
    read_range,
    read_usage,
    read_usages,
    required,
)
from volumed.host import filesystems
from volumed.model import Snapshot, Volume, VolumeId, VolumeMode


class Controller:
    def __init__(self, core: Core) -> None:
        self._core = core

    def controller_get_capabilities(
        self, _: csi.ControllerGetCapabilitiesRequest
    ) -> csi.ControllerGetCapabilitiesResponse:
        return csi.ControllerGetCapabilitiesResponse(capabilities=capabilities.controller(self._core))

    # Volumes
    def create_volume(self, request: csi.CreateVolumeRequest) -> csi.CreateVolumeResponse:
        volume = self._core.volumes.create(read_creation(self._core, request))
        return csi.CreateVolumeResponse(volume=answers.volume_message(self._core, volume))

    def delete_volume(self, request: csi.DeleteVolumeRequest) -> csi.DeleteVolumeResponse:
        try:
            volume = find_volume(self._core, request.volume_id)
            self._core.volumes.remove(volume.id)
        except NotFound:
            pass  # gone already
        return csi.DeleteVolumeResponse()

    def controller_publish_volume(
        self, request: csi.ControllerPublishVolumeRequest
    ) -> csi.ControllerPublishVolumeResponse:
        required(request.volume_id, "volume id")
        node = required(request.node_id, "node id")
        if not request.HasField("volume_capability"):
            raise InvalidRequest("no volume capability is given")
        usage = read_usage(request.volume_capability, readonly=request.readonly)
        volume = find_volume(self._core, request.volume_id)
        self._core.publications.check_usage(volume, usage)
        self._core.attachments.attach(volume, node, access=usage.access, readonly=usage.readonly, block=usage.block)
        return csi.ControllerPublishVolumeResponse()

    def controller_unpublish_volume(
        self, request: csi.ControllerUnpublishVolumeRequest
    ) -> csi.ControllerUnpublishVolumeResponse:
        """An unknown volume or node has nothing attached: success."""
        volume_id = VolumeId(required(request.volume_id, "volume id"))
        if self._core.repository.volume(volume_id) is not None:
            self._core.attachments.detach(volume_id, request.node_id)
        return csi.ControllerUnpublishVolumeResponse()

    def validate_volume_capabilities(
        self, request: csi.ValidateVolumeCapabilitiesRequest
    ) -> csi.ValidateVolumeCapabilitiesResponse:
        required(request.volume_id, "volume id")
        usages = read_usages(request.volume_capabilities)
        volume = find_volume(self._core, request.volume_id)
        try:
            for usage in usages:
                self._core.publications.check_usage(volume, usage)
        except VolumedError as error:
            return csi.ValidateVolumeCapabilitiesResponse(message=str(error))
        return csi.ValidateVolumeCapabilitiesResponse(
            confirmed=csi.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
                mutable_parameters=request.mutable_parameters,
            )
        )

    def list_volumes(self, request: csi.ListVolumesRequest) -> csi.ListVolumesResponse:
        found, token = self._volumes(request.max_entries, request.starting_token)
        nodes = self._core.attachments.nodes()
        answer = csi.ListVolumesResponse(next_token=token)
        for volume, ailments in zip(found, self._core.health.known_of_all(found), strict=True):
            entry = answer.entries.add()
            answers.write_volume(entry.volume, self._core, volume)
            entry.status.published_node_ids.extend(sorted(nodes.get(volume.id, ())))
            entry.status.volume_condition.CopyFrom(answers.condition_message(ailments))
        return answer

    def _volumes(self, max_entries: int, starting_token: str) -> tuple[list[Volume], str]:
        page = read_page("volumes", max_entries=max_entries, starting_token=starting_token)
        found, token = take(
            page,
            "volumes",
            lambda after, limit: self._core.volumes.list(after=after, limit=limit),
            lambda each: each.id,
        )
        return list(found), token

    def controller_get_volume(self, request: csi.ControllerGetVolumeRequest) -> csi.ControllerGetVolumeResponse:
        volume = find_volume(self._core, request.volume_id)
        return csi.ControllerGetVolumeResponse(
            volume=answers.volume_message(self._core, volume),
            status=csi.ControllerGetVolumeResponse.VolumeStatus(
                published_node_ids=sorted(self._core.attachments.nodes().get(volume.id, ())),
                volume_condition=answers.condition_message(self._core.health.examine(volume)),
            ),
        )

    def get_capacity(self, request: csi.GetCapacityRequest) -> csi.GetCapacityResponse:
        """As the backend was last measured; 0 where none fits: then nothing can be made there."""
        usages = [read_usage(capability) for capability in request.volume_capabilities]
        block = any(usage.block for usage in usages)
        filesystem = next((usage.filesystem for usage in usages if usage.filesystem), "")
        place = dict(request.accessible_topology.segments)
        try:
            name = request.parameters.get("class", "")
            chosen = self._core.classes.get(name) if name else None
            backend = choose_backend(
                self._core.backends,
                Needs(
                    mode=VolumeMode.BLOCK if block else VolumeMode.FILESYSTEM,
                    size=1,
                    filesystem=filesystem or request.parameters.get("fs", ""),
                    multi_node=not all(usage.access.single_node for usage in usages),
                    capabilities=chosen.requires if chosen else frozenset(),
                    places=(place,) if place else (),
                    region=chosen.topology if chosen else {},
                ),
                here=self._core.attachments.topology,
                name=request.parameters.get("backend", ""),
                among=chosen.backends if chosen else (),
            )
        except VolumedError:
            return csi.GetCapacityResponse(available_capacity=0)
        capacity = backend.measured
        if capacity is None:
            return csi.GetCapacityResponse(available_capacity=0)
        least = 0
        if isinstance(backend.driver, BlockDriver) and not block:
            least = filesystems.get(filesystem or request.parameters.get("fs", "ext4")).minimum_size
        return csi.GetCapacityResponse(
            available_capacity=capacity.available,
            maximum_volume_size=Int64Value(value=capacity.available),
            minimum_volume_size=Int64Value(value=least),
        )

    def controller_expand_volume(
        self, request: csi.ControllerExpandVolumeRequest
    ) -> csi.ControllerExpandVolumeResponse:
        """Storage, device and file system at once: nothing is left for the node."""
        required(request.volume_id, "volume id")
        grown = expand(self._core, request.volume_id, request, request.capacity_range)
        return csi.ControllerExpandVolumeResponse(capacity_bytes=grown.size or 0, node_expansion_required=False)

    def controller_modify_volume(
        self, request: csi.ControllerModifyVolumeRequest
    ) -> csi.ControllerModifyVolumeResponse:
        volume = find_volume(self._core, request.volume_id)
        wanted = read_modification(self._core, request.mutable_parameters)
        self._core.volumes.modify(
            volume.id, labels=wanted.labels, mount_options=wanted.mount_options, options=wanted.options
        )
        return csi.ControllerModifyVolumeResponse()

    # Health
    def controller_get_volume_health(
        self, request: csi.ControllerGetVolumeHealthRequest
    ) -> csi.ControllerGetVolumeHealthResponse:
        volume = find_volume(self._core, request.volume_id)
        return csi.ControllerGetVolumeHealthResponse(
            volume_health=answers.health_message(volume, self._core.health.examine(volume))
        )

    def controller_list_volume_health(
        self, request: csi.ControllerListVolumeHealthRequest
    ) -> csi.ControllerListVolumeHealthResponse:
        """As the ledger and the last probe know it: a list must not wait for every storage there is."""
        found, token = self._volumes(request.max_entries, request.starting_token)
        return csi.ControllerListVolumeHealthResponse(
            entries=[
                answers.health_message(volume, ailments)
                for volume, ailments in zip(found, self._core.health.known_of_all(found), strict=True)
            ],
            next_token=token,
        )

    # Snapshots
    def create_snapshot(self, request: csi.CreateSnapshotRequest) -> csi.CreateSnapshotResponse:
        capabilities.require(self._core, Capability.SNAPSHOT)
        required(request.name, "snapshot name")
        required(request.source_volume_id, "source volume id")
        unknown = [key for key in request.parameters if not key.startswith(KUBERNETES)]
        if unknown:
            raise InvalidRequest(f"a snapshot has no parameter {unknown[0][:60]!r}")
        volume = find_volume(self._core, request.source_volume_id)
        places = request.accessibility_requirements.requisite
        if places and not any(self._core.attachments.reachable_from(volume, dict(place.segments)) for place in places):
            raise CapacityExhausted(
                f"its snapshots lie on backend {volume.backend}, out of reach from there",
                subject=f"volume {volume.name}",
            )
        snapshot = self._core.snapshots.create_claimed(volume, request.name)
        return csi.CreateSnapshotResponse(snapshot=answers.snapshot_message(self._core, snapshot, placed=bool(places)))

    def delete_snapshot(self, request: csi.DeleteSnapshotRequest) -> csi.DeleteSnapshotResponse:
        snapshot = self._core.repository.snapshot_by_id(required(request.snapshot_id, "snapshot id"))
        if snapshot is not None:
            self._core.snapshots.remove_one(snapshot)
        return csi.DeleteSnapshotResponse()

    def get_snapshot(self, request: csi.GetSnapshotRequest) -> csi.GetSnapshotResponse:
        snapshot = self._core.repository.snapshot_by_id(required(request.snapshot_id, "snapshot id"))
        if snapshot is None:
            raise NotFound("there is no such snapshot", subject=f"snapshot {request.snapshot_id}")
        return csi.GetSnapshotResponse(snapshot=answers.snapshot_message(self._core, snapshot))

    def list_snapshots(self, request: csi.ListSnapshotsRequest) -> csi.ListSnapshotsResponse:
        page = read_page("snapshots", max_entries=request.max_entries, starting_token=request.starting_token)

        def look(after: str, limit: int) -> list[Snapshot]:
            if request.snapshot_id:
                one = self._core.repository.snapshot_by_id(request.snapshot_id)
                fits = one is not None and request.source_volume_id in ("", one.volume_id) and one.id > after
                return [one] if one is not None and fits else []
            if request.source_volume_id:
                of_volume = self._core.repository.snapshots(VolumeId(request.source_volume_id))
                return [snapshot for snapshot in of_volume if snapshot.id > after][:limit]
            return self._core.repository.snapshots_in_order(after=after, limit=limit)

        found, token = take(page, "snapshots", look, lambda each: each.id)
        entries = [
            csi.ListSnapshotsResponse.Entry(snapshot=answers.snapshot_message(self._core, snapshot))
            for snapshot in found
        ]
        return csi.ListSnapshotsResponse(entries=entries, next_token=token)


def expand(
    core: Core,
    volume_id: str,
    request: csi.ControllerExpandVolumeRequest | csi.NodeExpandVolumeRequest,
    given: csi.CapacityRange,
) -> Volume:
    """Grow to what is required; large enough already is success. Raises OutOfRange, InvalidRequest."""
    wanted = read_range(given)
    if not wanted.required and not wanted.limit:
        raise InvalidRequest("no capacity range is given")
    volume = find_volume(core, volume_id)
    if request.HasField("volume_capability"):
        usage = read_usage(request.volume_capability)
        if usage.block is not (volume.mode is VolumeMode.BLOCK):
            raise InvalidRequest(f"is a {volume.mode} volume", subject=f"volume {volume.name}")
    if volume.size is not None and volume.size >= wanted.required:
        if 0 < wanted.limit < volume.size:
            raise OutOfRange(
                f"has {volume.size} bytes already, and {wanted.limit} are the limit", subject=f"volume {volume.name}"
            )
        return volume
    return core.volumes.expand(volume.id, wanted.required)
