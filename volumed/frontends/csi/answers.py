"""The core's records as the interface's messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from volumed.core.core import Core
from volumed.core.health import Ailment, Severity
from volumed.driver import Capability
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.model import GroupSnapshot, Snapshot, Volume

SEVERITIES = {
    Severity.DEGRADED: csi.DEGRADED,
    Severity.INACCESSIBLE: csi.INACCESSIBLE,
    Severity.DATA_LOSS: csi.DATA_LOSS,
}


def volume_message(core: Core, volume: Volume) -> csi.Volume:
    return csi.Volume(
        volume_id=volume.id,
        capacity_bytes=volume.size or 0,
        content_source=_source(volume),
        accessible_topology=topology_of(core, volume),
    )


def topology_of(core: Core, volume: Volume) -> list[csi.Topology]:
    """Nothing for a volume that every node reaches."""
    if Capability.MULTI_NODE in core.backends.get(volume.backend).capabilities:
        return []
    return [csi.Topology(segments=core.attachments.topology)]


def _source(volume: Volume) -> csi.VolumeContentSource | None:
    kind, _, identifier = volume.claim.source.partition(":") if volume.claim else ("", "", "")
    if kind == "snapshot":
        return csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id=identifier))
    if kind == "volume":
        return csi.VolumeContentSource(volume=csi.VolumeContentSource.VolumeSource(volume_id=identifier))
    return None


def snapshot_message(core: Core, snapshot: Snapshot, *, placed: bool = False) -> csi.Snapshot:
    """`placed`: the caller said itself where the snapshot must be usable, so it need not be told. (csi-sanity 5.6
    fails whoever tells: it compares the messages with what Go keeps beside their fields.)"""
    source = None if placed else core.repository.volume(snapshot.volume_id)
    return csi.Snapshot(
        snapshot_id=snapshot.id,
        source_volume_id=snapshot.volume_id,
        size_bytes=snapshot.size or 0,
        creation_time=_timestamp(snapshot.created.timestamp()),
        ready_to_use=snapshot.handle is not None,
        group_snapshot_id=snapshot.group_id or "",
        accessible_topology=topology_of(core, source) if source else [],
    )


def group_message(core: Core, group: GroupSnapshot, members: Iterable[Snapshot]) -> csi.VolumeGroupSnapshot:
    return csi.VolumeGroupSnapshot(
        group_snapshot_id=group.id,
        snapshots=[snapshot_message(core, snapshot) for snapshot in members],
        creation_time=_timestamp(group.created.timestamp()),
        ready_to_use=True,
    )


def _timestamp(seconds: float) -> Timestamp:
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def condition_message(ailments: Sequence[Ailment]) -> csi.VolumeCondition:
    """Health for callers of 1.12."""
    if not ailments:
        return csi.VolumeCondition(abnormal=False, message="healthy")
    return csi.VolumeCondition(abnormal=True, message="; ".join(ailment.text for ailment in ailments))


def health_message(volume: Volume, ailments: Iterable[Ailment]) -> csi.VolumeHealth:
    return csi.VolumeHealth(
        volume_id=volume.id,
        health_statuses=[
            csi.VolumeHealth.VolumeHealthEntry(
                status=SEVERITIES[ailment.severity], reason=ailment.reason, message=ailment.text
            )
            for ailment in ailments
        ],
    )
