"""Which instance has which disk: attached under a name that is free there, and waited for until it is so."""

from __future__ import annotations

import itertools
import string
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from volumed.errors import CapacityExhausted, InUse, NotFound, PreconditionFailed, VolumedError
from volumed.model import Handle
from volumed.testing import crash
from volumed_drivers.ebs.client import Ec2, Waited, code_of, until
from volumed_drivers.ebs.disks import Attached, Disk, Disks

# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/device_naming.html
NAMES = (
    *(f"/dev/sd{letter}" for letter in string.ascii_lowercase[5:16]),
    *(f"/dev/xvd{first}{second}" for first in "bc" for second in string.ascii_lowercase),
)
_ATTACHED = Waited(120.0, "EC2 has not attached it in time")
_DETACHED = Waited(
    120.0, "EC2 has not detached it in time", "the instance may still hold it: unmount it there, or detach by force"
)


def on(disk: Disk, machine: str) -> Attached | None:
    return next((each for each in disk.attached if each.machine == machine), None)


def _in_use(disk: Disk, machines: Sequence[str]) -> InUse:
    return InUse(
        "is attached to",
        holders=[f"instance {name}" for name in machines],
        subject=f"EBS volume {disk.id}",
        hint="detach it there first",
    )


class Attachments:
    def __init__(self, ec2: Ec2, disks: Disks, *, subject: str) -> None:
        self._ec2, self._disks, self._subject = ec2, disks, subject
        self._lock = threading.Lock()
        self._taken: dict[str, set[str]] = {}  # names, by machine: as EC2 told them last, and ours since
        self._attaching: dict[str, set[str]] = defaultdict(set)
        self._zones: dict[str, str] = {}

    def attach(self, handle: Handle, machine: str) -> Disk:
        """See `SupportsAttach.attach`."""
        disk = self._disks.wait(handle, lambda disk: self._settled(handle, disk, machine), _ATTACHED)
        if on(disk, machine) is None:
            self._ask(disk, machine)
            crash.point("ebs.attach.asked")
        elif self._is_attached(disk, machine):
            return disk
        return self._disks.wait(handle, lambda disk: self._arrived(disk, machine), _ATTACHED, at_once=False)

    def _settled(self, handle: Handle, disk: Disk | None, machine: str) -> Disk | None:
        """The disk, as soon as it is neither being made nor on its way from a machine. Raises NotFound, and InUse for
        one that could be attached twice; of any other EC2 itself says best who has it, as this look may be stale."""
        if disk is None:
            return self._disks.current(handle)
        others = [each.machine for each in disk.attached if each.machine != machine and each.state != "detaching"]
        if others and disk.shared:
            raise _in_use(disk, others)
        leaving = any(each.state == "detaching" for each in disk.attached)
        return None if leaving or disk.state == "creating" else disk

    def _ask(self, disk: Disk, machine: str) -> None:
        until(lambda: self._asked(disk, machine), _ATTACHED, subject=f"EBS volume {disk.id}")

    def _asked(self, disk: Disk, machine: str) -> bool | None:
        """None when asking again may help."""
        with self._name(machine) as name:
            self._check_zone(disk, machine)
            try:
                self._ec2.call("attach_volume", VolumeId=disk.id, InstanceId=machine, Device=name)
            except VolumedError as error:
                return self._judged(error, disk, machine, name)
            self._taken.setdefault(machine, set()).add(name)
            return True

    def _check_zone(self, disk: Disk, machine: str) -> None:
        zone = self._zones.get(machine, disk.zone)
        if zone != disk.zone:
            raise PreconditionFailed(
                f"lies in zone {disk.zone}, and instance {machine} in {zone}",
                subject=f"EBS volume {disk.id}",
                hint="copy it there: a snapshot can be used in every zone",
            )

    def _judged(self, error: VolumedError, disk: Disk, machine: str, name: str) -> bool | None:
        code = code_of(error)
        if code == "VolumeInUse":
            return self._judged_by_holder(disk, machine)
        if code == "InvalidParameterValue" and "in use" in error.text:  # the name: somebody else was quicker
            self._taken.setdefault(machine, set()).add(name)
            return None
        if code == "IncorrectState":  # being made still, whatever Describe shows
            return None
        if code.startswith("InvalidInstanceID"):
            raise PreconditionFailed(error.text, subject=f"instance {machine}", hint="does it still run?") from None
        if code == "AttachmentLimitExceeded":
            raise CapacityExhausted(
                f"takes no more volumes: {error.text}", subject=f"instance {machine}", hint=error.hint
            ) from None
        raise error

    def _judged_by_holder(self, disk: Disk, machine: str) -> bool | None:
        """An earlier call of ours may have attached it; one that is on its way elsewhere is waited for."""
        now = self._disks.by_id(disk.id)
        others = [each.machine for each in now.attached if each.machine != machine and each.state != "detaching"]
        if others:
            raise _in_use(disk, others)
        return True if on(now, machine) is not None else None

    def _arrived(self, disk: Disk | None, machine: str) -> Disk | None:
        return disk if disk is not None and self._is_attached(disk, machine) else None

    @staticmethod
    def _is_attached(disk: Disk, machine: str) -> bool:
        found = on(disk, machine)
        return found is not None and found.state in ("attached", "busy")

    @contextmanager
    def _name(self, machine: str) -> Iterator[str]:
        """A device name that nobody has on the machine. Raises CapacityExhausted."""
        if machine not in self._taken:
            told = self._names_on(machine)
            with self._lock:
                self._taken.setdefault(machine, set()).update(told)
        with self._lock:
            taken = self._taken.get(machine, set()) | self._attaching[machine]
            name = next((name for name in NAMES if name not in taken), None)
            if name is None:
                self._taken.pop(machine, None)  # to be read again: others may have left since
                raise CapacityExhausted(f"has {len(taken)} volumes, the most it can", subject=f"instance {machine}")
            self._attaching[machine].add(name)
        try:
            yield name
        finally:
            with self._lock:
                self._attaching[machine].discard(name)

    def _names_on(self, machine: str) -> set[str]:
        try:
            told = self._ec2.describe("describe_instances", "Reservations", InstanceIds=[machine])
        except NotFound as error:
            raise PreconditionFailed(error.text, subject=f"instance {machine}", hint="does it still run?") from None
        instances = [*itertools.chain.from_iterable(each["Instances"] for each in told)]
        for instance in instances:
            self._zones[machine] = instance["Placement"]["AvailabilityZone"]
        return {each["DeviceName"] for instance in instances for each in instance.get("BlockDeviceMappings", ())}

    def detach(self, handle: Handle, machine: str, *, force: bool) -> None:
        """See `SupportsAttach.detach`."""
        disk = self._disks.find(handle)
        there = on(disk, machine) if disk is not None else None
        if disk is None or there is None:
            return
        if there.state != "detaching" or force:
            self._let_go(disk, machine, force=force)
        crash.point("ebs.detach.asked")

        def gone(disk: Disk | None) -> bool | None:
            return True if disk is None or on(disk, machine) is None else None

        self._disks.wait(handle, gone, _DETACHED, at_once=False)
        with self._lock:
            self._taken.get(machine, set()).discard(there.device)

    def _let_go(self, disk: Disk, machine: str, *, force: bool) -> None:
        try:
            self._ec2.call("detach_volume", VolumeId=disk.id, InstanceId=machine, Force=force)
        except NotFound:
            return
        except VolumedError as error:
            if code_of(error) not in ("IncorrectState", "InvalidAttachment.NotFound"):
                raise
