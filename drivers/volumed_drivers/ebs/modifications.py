"""ModifyVolume: size, type, IOPS and throughput of a volume in use; what EC2 then does in the background."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from volumed.errors import BackendError
from volumed.model import Handle
from volumed.testing import crash
from volumed_drivers.ebs.client import Ec2, Item, Lookups, Waited, until
from volumed_drivers.ebs.disks import Disk, Disks, filters

_APPLIED = Waited(300.0, "EC2 has not changed the volume in time", "it goes on by itself: try again later")


class Modifications:
    def __init__(self, ec2: Ec2, disks: Disks, *, subject: str) -> None:
        self._ec2, self._disks = ec2, disks
        self._shared: Lookups[Item] = Lookups(self._fetch, {}, subject)

    def _fetch(self, disk_ids: Sequence[str]) -> Mapping[str, Item]:
        """The latest of each."""
        told = self._ec2.describe(
            "describe_volumes_modifications", "VolumesModifications", Filters=filters(**{"volume-id": disk_ids})
        )
        return {each["VolumeId"]: each for each in sorted(told, key=lambda each: each["StartTime"])}

    def apply(self, disk: Disk, met: Callable[[Disk], bool], **parameters: Any) -> Disk:
        """The disk as it is afterwards: usable from "optimizing" on, which may take hours. What was begun before and
        goes on still is waited for. Raises PreconditionFailed when EC2 allows no further change for now."""
        if self._shared.ask(disk.id).get("ModificationState") != "modifying":
            self._ec2.call("modify_volume", VolumeId=disk.id, **parameters)
            crash.point("ebs.modify.asked")
        until(lambda: self._is_applied(disk), _APPLIED, subject=f"EBS volume {disk.id}")
        handle = Handle(disk.volume_id)
        return self._disks.wait(handle, lambda now: now if now is not None and met(now) else None, _APPLIED)

    def _is_applied(self, disk: Disk) -> bool | None:
        told = self._shared.ask(disk.id)
        if told.get("ModificationState") == "failed":
            raise BackendError(
                f"EC2 could not change it: {told.get('StatusMessage', '')}", subject=f"EBS volume {disk.id}"
            )
        return True if told.get("ModificationState") in ("optimizing", "completed") else None
