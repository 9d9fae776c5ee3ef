"""EBS volumes of ours: known by their tags, so that EC2 alone tells which there are.

A volume of volumed's may have several disks for a moment: a restore makes the next one from the snapshot and then
deletes the one before. The one of the highest generation is the volume, from the instant that EC2 has made it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from volumed.errors import BackendError, DeadlineExceeded, NotFound, VolumedError
from volumed.model import Handle
from volumed.testing import crash
from volumed.units import GIB
from volumed_drivers.ebs.client import Ec2, Item, Lookups, Waited, code_of, until

OWNER, VOLUME, GENERATION, SNAPSHOT, MARK = (
    f"volumed:{word}" for word in ("owner", "volume", "generation", "snapshot", "mark:")
)
NAME = "Name"  # what the console shows
# Seconds after which Describe shows at the latest what EC2 said it made.
SETTLED = 30.0
_LONG_AGO = timedelta(minutes=15)  # more than clocks may differ: EC2 refuses a signature that is 5 minutes off
_MADE = Waited(120.0, "EC2 has not made the volume in time", "does the KMS key exist, and may it be used?")
SHOWN = Waited(60.0, "EC2 does not show the volume as ours yet")
_DELETED = Waited(60.0, "EC2 has not deleted the volume in time")

T = TypeVar("T")


class Attached(NamedTuple):
    machine: str
    device: str  # as it was asked for: /dev/sdf
    state: str  # attaching, attached, detaching, busy


class Disk(NamedTuple):
    """One EBS volume."""

    id: str
    state: str  # creating, available, in-use, deleting, deleted, error
    size: int
    zone: str
    type: str
    iops: int | None
    throughput: int | None
    shared: bool  # can be attached to several instances at once
    created: datetime
    attached: tuple[Attached, ...]
    tags: Mapping[str, str]

    @property
    def volume_id(self) -> str:
        return self.tags.get(VOLUME, "")

    @property
    def generation(self) -> int:
        return int(self.tags.get(GENERATION, "1"))

    @property
    def mark(self) -> dict[str, str]:
        return {key.removeprefix(MARK): value for key, value in self.tags.items() if key.startswith(MARK)}

    @property
    def serial(self) -> str:
        """Of the device: the id without its dash."""
        return self.id.replace("-", "")


def gib(size: int) -> int:
    return max(1, math.ceil(size / GIB))


def tags_of(item: Item) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags", ())}


def tagged(kind: str, tags: Mapping[str, str]) -> list[Item]:
    """As Create calls take them, which then make the thing with its tags in one step."""
    return [{"ResourceType": kind, "Tags": pairs(tags)}]


def pairs(tags: Mapping[str, str]) -> list[Item]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def filters(**wanted: Sequence[str]) -> list[Item]:
    return [{"Name": name, "Values": list(values)} for name, values in wanted.items()]


def read(item: Item) -> Disk:
    return Disk(
        id=item["VolumeId"],
        state=item["State"],
        size=item["Size"] * GIB,
        zone=item["AvailabilityZone"],
        type=item["VolumeType"],
        iops=item.get("Iops") or None,
        throughput=item.get("Throughput") or None,
        shared=bool(item.get("MultiAttachEnabled")),
        created=item["CreateTime"],
        attached=tuple(
            Attached(each["InstanceId"], each.get("Device", ""), each["State"])
            for each in item.get("Attachments", ())
            if each["State"] != "detached"
        ),
        tags=tags_of(item),
    )


class Disks:
    def __init__(self, ec2: Ec2, *, owner: str, subject: str) -> None:
        """`owner`: on everything that is ours, and on nothing else."""
        self._ec2, self._owner, self._subject = ec2, owner, subject
        self._shared: Lookups[list[Disk]] = Lookups(self._fetch, [], subject)
        self._gone: set[str] = set()  # deleted by us: a stale answer may still show them

    # Looking
    def _fetch(self, volume_ids: Sequence[str]) -> Mapping[str, list[Disk]]:
        found: dict[str, list[Disk]] = {}
        for disk in self._described({f"tag:{OWNER}": [self._owner], f"tag:{VOLUME}": volume_ids}):
            found.setdefault(disk.volume_id, []).append(disk)
        return found

    def _described(self, wanted: Mapping[str, Sequence[str]]) -> list[Disk]:
        items = self._ec2.describe("describe_volumes", "Volumes", Filters=filters(**wanted))
        return [disk for disk in map(read, items) if self._there(disk)]

    def _there(self, disk: Disk) -> bool:
        return disk.id not in self._gone and disk.state not in ("deleting", "deleted")

    def all(self, handle: Handle) -> list[Disk]:
        """Every disk of one volume, the one that is the volume first."""
        found = [disk for disk in self._shared.ask(handle) if self._there(disk)]
        return sorted(found, key=lambda disk: (-disk.generation, disk.created))

    def find(self, handle: Handle) -> Disk | None:
        return next(iter(self.all(handle)), None)

    def current(self, handle: Handle) -> Disk:
        """Raises NotFound."""
        found = self.find(handle)
        if found is None:
            raise NotFound("EC2 has no such volume", subject=f"volume {handle} of {self._subject}")
        return found

    def owned(self) -> list[Disk]:
        """What is the volume, of all volumes of ours."""
        return self._newest(self._described({f"tag:{OWNER}": [self._owner]}))

    def attached_to(self, machine: str) -> list[Disk]:
        return self._newest(
            self._described({f"tag:{OWNER}": [self._owner], "attachment.instance-id": [machine]}),
        )

    @staticmethod
    def _newest(disks: Sequence[Disk]) -> list[Disk]:
        newest = {disk.volume_id: disk for disk in sorted(disks, key=lambda disk: disk.generation) if disk.volume_id}
        return list(newest.values())

    def by_id(self, disk_id: str) -> Disk:
        """Of anybody's. Raises NotFound."""
        return read(self._ec2.describe("describe_volumes", "Volumes", VolumeIds=[disk_id])[0])

    def free(self, zone: str) -> list[Disk]:
        """Whatever lies in the zone and is attached nowhere."""
        return self._described({"status": ["available"], "availability-zone": [zone]})

    def wait(
        self, handle: Handle, judge: Callable[[Disk | None], T | None], waited: Waited, *, at_once: bool = True
    ) -> T:
        """Look at the volume until `judge` answers. Raises DeadlineExceeded, and what `judge` raises."""
        subject = f"volume {handle} of {self._subject}"
        return until(lambda: judge(self.find(handle)), waited, subject=subject, at_once=at_once)

    # Changing
    def make(self, handle: Handle, tags: Mapping[str, str], generation: int, **parameters: Any) -> Disk:
        """One disk, however often it is asked for: the volume and its generation are the ClientToken.

        EC2 repeats what it answered to a token for a day, even if that disk was deleted since; then the next
        generation is made.
        """
        while True:
            marked = {**tags, OWNER: self._owner, VOLUME: handle, GENERATION: str(generation)}
            try:
                made = self._ec2.call(
                    "create_volume",
                    ClientToken=f"{handle}-{generation}",
                    TagSpecifications=tagged("volume", marked),
                    **parameters,
                )
            except VolumedError as error:
                if code_of(error) != "IdempotentParameterMismatch":
                    raise
            else:
                crash.point("ebs.create.made")
                shown = self._shown(handle, made) if made["VolumeId"] not in self._gone else None
                if shown is not None:
                    return self.finish(shown)
            generation += 1

    def _shown(self, handle: Handle, made: Item) -> Disk | None:
        """What EC2 says it made, if it is there, be it a moment later. Raises DeadlineExceeded when the caller's
        patience ends before that can be told."""

        def look() -> Disk | None:
            return next((disk for disk in self.all(handle) if disk.id == made["VolumeId"]), None)

        if datetime.now(UTC) - made["CreateTime"] > _LONG_AGO:
            return look()
        ends = time.monotonic() + SETTLED
        try:
            return until(look, SHOWN._replace(seconds=SETTLED), subject=f"EBS volume {made['VolumeId']}")
        except DeadlineExceeded:
            if time.monotonic() < ends:
                raise
            return None

    def finish(self, disk: Disk) -> Disk:
        """One that was found, once it can be used."""

        def judge(now: Disk | None) -> Disk | None:
            if now is None or now.id != disk.id or now.state == "creating":
                return None
            if now.state == "error":
                raise BackendError("EC2 could not make the volume", subject=f"EBS volume {disk.id}", hint=_MADE.hint)
            return now

        if disk.state in ("available", "in-use"):
            return disk
        return self.wait(Handle(disk.volume_id), judge, _MADE, at_once=False)

    def delete(self, disk: Disk) -> None:
        """Gone already is success. Raises InUse while it is attached."""
        until(lambda: self._delete(disk), _DELETED, subject=f"EBS volume {disk.id}")
        self._gone.add(disk.id)

    def _delete(self, disk: Disk) -> bool | None:
        """None while it is being made, or changed, at this moment."""
        try:
            self._ec2.call("delete_volume", VolumeId=disk.id)
        except NotFound:
            pass
        except VolumedError as error:
            if code_of(error) != "IncorrectState":
                raise
            return None
        return True

    def tag(self, disk_id: str, tags: Mapping[str, str]) -> None:
        self._ec2.call("create_tags", Resources=[disk_id], Tags=pairs(tags))

    def adopt(self, handle: Handle, disk_id: str, tags: Mapping[str, str]) -> None:
        self.tag(disk_id, {**tags, OWNER: self._owner, VOLUME: handle, GENERATION: "1"})
