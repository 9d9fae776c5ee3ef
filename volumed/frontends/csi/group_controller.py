"""Snapshots of several volumes at one instant."""

from __future__ import annotations

from collections.abc import Iterable

from volumed.core.core import Core
from volumed.driver import Capability
from volumed.errors import InvalidRequest
from volumed.frontends.csi import answers, capabilities
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.requests import KUBERNETES, find_volume, required
from volumed.model import GroupSnapshot, Snapshot


class GroupController:
    def __init__(self, core: Core) -> None:
        self._core = core

    def group_controller_get_capabilities(
        self, _: csi.GroupControllerGetCapabilitiesRequest
    ) -> csi.GroupControllerGetCapabilitiesResponse:
        return csi.GroupControllerGetCapabilitiesResponse(capabilities=capabilities.group(self._core))

    def create_volume_group_snapshot(
        self, request: csi.CreateVolumeGroupSnapshotRequest
    ) -> csi.CreateVolumeGroupSnapshotResponse:
        capabilities.require(self._core, Capability.GROUP_SNAPSHOT)
        name = required(request.name, "group snapshot name")
        if not request.source_volume_ids:
            raise InvalidRequest("no source volume ids are given")
        unknown = [key for key in request.parameters if not key.startswith(KUBERNETES)]
        if unknown:
            raise InvalidRequest(f"a group snapshot has no parameter {unknown[0][:60]!r}")
        volumes = [find_volume(self._core, volume_id).id for volume_id in request.source_volume_ids]
        group = self._core.groups.create(name, volumes)
        members = self._core.groups.members(group)
        return csi.CreateVolumeGroupSnapshotResponse(group_snapshot=answers.group_message(self._core, group, members))

    def delete_volume_group_snapshot(
        self, request: csi.DeleteVolumeGroupSnapshotRequest
    ) -> csi.DeleteVolumeGroupSnapshotResponse:
        group_id = required(request.group_snapshot_id, "group snapshot id")
        group = self._core.repository.group_snapshot(group_id)
        if group is not None:
            _check_members(group, self._core.groups.members(group), request.snapshot_ids)
            self._core.groups.remove(group_id)
        return csi.DeleteVolumeGroupSnapshotResponse()

    def get_volume_group_snapshot(
        self, request: csi.GetVolumeGroupSnapshotRequest
    ) -> csi.GetVolumeGroupSnapshotResponse:
        group = self._core.groups.get(required(request.group_snapshot_id, "group snapshot id"))
        members = self._core.groups.members(group)
        _check_members(group, members, request.snapshot_ids)
        return csi.GetVolumeGroupSnapshotResponse(group_snapshot=answers.group_message(self._core, group, members))


def _check_members(group: GroupSnapshot, members: Iterable[Snapshot], named: Iterable[str]) -> None:
    """The caller's list is a second opinion on what belongs to the group. None given: no opinion; one that a deletion
    cut short has taken already may be named. Raises InvalidRequest."""
    known = {snapshot_id for _, snapshot_id in group.members}
    given = set(named)
    there = {snapshot.id for snapshot in members}
    if given and (given - known or there - given):
        raise InvalidRequest("the snapshot ids are not those of the group", subject=f"group snapshot {group.id}")
