"""An EBS volume per volume, attached to the EC2 instance that uses it; snapshots and clones by EBS snapshots.

Volumes and snapshots are known by their tags. A device is found by its serial number, which is the volume's id: by
udev's events, under whatever name the kernel gives it (NVMe), or by the name it was attached as (Xen).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from volumed.driver import (
    BlockDriver,
    Capability,
    CreatedVolume,
    Driver,
    Facts,
    Found,
    FoundSnapshot,
    Host,
    Options,
    Probe,
    SupportsAttach,
    SupportsClone,
    SupportsExpand,
    SupportsImport,
    SupportsModify,
    SupportsNativeCopy,
    SupportsSnapshots,
    Tell,
    VolumeSpec,
)
from volumed.errors import (
    AlreadyExists,
    BackendError,
    ConfigError,
    DeadlineExceeded,
    InUse,
    InvalidRequest,
    NotSupported,
    OutOfRange,
    PreconditionFailed,
)
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing import crash
from volumed_drivers.ebs.attachments import Attachments, on
from volumed_drivers.ebs.client import Ec2
from volumed_drivers.ebs.disks import MARK, NAME, OWNER, SHOWN, Disk, Disks, gib
from volumed_drivers.ebs.modifications import Modifications
from volumed_drivers.ebs.options import LONGEST, EbsOptions, EbsVolumeOptions
from volumed_drivers.ebs.snapshots import Snapshots
from volumed_drivers.ebs.types import Wanted

# The key that Kubernetes' nodes, and so ours, carry their zone under.
ZONE_KEY = "topology.kubernetes.io/zone"
DEVICE_TIMEOUT = 60.0  # seconds from the attachment to the kernel's event


class EbsDriver(
    BlockDriver,
    SupportsAttach,
    SupportsSnapshots,
    SupportsClone,
    SupportsExpand,
    SupportsModify,
    SupportsImport,
    SupportsNativeCopy,
):
    BackendOptions = EbsOptions
    VolumeOptions = EbsVolumeOptions
    # A snapshot is taken when CreateSnapshot returns; a clone must wait until it is stored.
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.SIZE, Capability.SNAPSHOT_LIVE})
    mutable: ClassVar[frozenset[str]] = frozenset({"type", "iops", "throughput"})

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, EbsOptions)
        self._options = options
        self._subject = f"backend {backend}"
        keys = (options.access_key, options.secret_key) if options.access_key and options.secret_key else None
        self._ec2 = Ec2(
            subject=self._subject,
            region=options.region,
            endpoint=options.endpoint,
            metadata=options.metadata_endpoint,
            keys=keys,
        )
        owner = options.owner or backend
        self._disks = Disks(self._ec2, owner=owner, subject=self._subject)
        self._snapshots = Snapshots(self._ec2, owner=owner, subject=self._subject)
        self._attachments = Attachments(self._ec2, self._disks, subject=self._subject)
        self._modifications = Modifications(self._ec2, self._disks, subject=self._subject)
        self._known: dict[Handle, Disk] = {}  # by which `mapped` finds a device without asking EC2

    @property
    def _zone(self) -> str:
        return self._options.zone or self._ec2.metadata.read("placement/availability-zone")

    def probe(self) -> Probe:
        zone, region = self._zone, self._ec2.region
        zones = self._ec2.describe("describe_availability_zones", "AvailabilityZones")
        names = sorted(each["ZoneName"] for each in zones)
        if zone not in names:
            raise ConfigError(
                f"region {region} has no zone {zone}", subject=self._subject, hint=f"it has {', '.join(names)}"
            )
        return Probe(
            lacking={},
            facts={"region": region, "zone": zone, "type": self._options.type},
            topology={ZONE_KEY: zone},
        )

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        wanted, size = self._wanted(spec.options), self._size(spec)
        wanted.check(gib(size), subject=self._subject)
        found = self._disks.find(Handle(spec.id))
        disk = self._disks.finish(found) if found is not None else self._make(spec, wanted, size)
        return self._created(disk)

    def _make(self, spec: VolumeSpec, wanted: Wanted, size: int, *, snapshot: str = "") -> Disk:
        key = self._options.kms_key
        return self._disks.make(
            Handle(spec.id),
            self._tags(spec),
            1,
            AvailabilityZone=self._zone,
            Size=gib(size),
            **wanted.parameters(),
            **({"Encrypted": True} if key or self._options.encrypted else {}),
            **({"KmsKeyId": key} if key else {}),
            **({"SnapshotId": snapshot} if snapshot else {}),
        )

    def _created(self, disk: Disk) -> CreatedVolume:
        return CreatedVolume(Handle(disk.volume_id), disk.size)

    def _size(self, spec: VolumeSpec) -> int:
        if spec.size is None:
            raise OutOfRange("an EBS volume needs a size", subject=self._subject)
        return spec.size

    def _wanted(self, options: Options) -> Wanted:
        """The volume's own options before the backend's; IOPS and throughput belong to the type they stand beside."""
        assert isinstance(options, EbsVolumeOptions)
        if options.type is not None and options.type != self._options.type:
            return Wanted(options.type, options.iops, options.throughput)
        return Wanted(
            self._options.type, options.iops or self._options.iops, options.throughput or self._options.throughput
        )

    def _tags(self, spec: VolumeSpec) -> dict[str, str]:
        marks = {f"{MARK}{key}": value for key, value in spec.mark.items()}
        for key, value in marks.items():
            if len(value) > LONGEST:
                raise InvalidRequest(f"a tag takes {LONGEST} characters, and {key} has more", subject=self._subject)
        named = {NAME: spec.mark["name"]} if "name" in spec.mark else {}
        return {**named, **self._options.tags, **marks}

    def delete(self, handle: Handle) -> None:
        disks = self._disks.all(handle)
        self._check_unattached(disks)
        for disk in reversed(disks):  # the volume itself last
            self._disks.delete(disk)
            crash.point("ebs.delete.one")
        self._snapshots.delete(handle)
        self._known.pop(handle, None)

    @staticmethod
    def _check_unattached(disks: Iterable[Disk]) -> None:
        for disk in disks:
            holders = [f"instance {each.machine} ({each.state})" for each in disk.attached]
            if holders:
                raise InUse("is attached to", holders=holders, subject=f"EBS volume {disk.id}", hint="detach it first")

    def inspect(self, handle: Handle) -> Facts:
        return Facts(size=self._disks.current(handle).size, used=None)

    def list(self) -> Iterable[Found]:
        disks = self._disks.owned()
        for disk in disks:
            whole = disk.state in ("available", "in-use")
            yield Found(Handle(disk.volume_id), VolumeId(disk.volume_id), disk.mark, whole)
        made = {disk.volume_id for disk in disks}
        for copied in {snapshot.name for snapshot in self._snapshots.owned()} - made:
            if copied.startswith("v"):  # a clone that was begun
                yield Found(Handle(copied), VolumeId(copied), whole=False)

    def find(self, volume_id: VolumeId) -> Handle | None:
        there = self._disks.find(Handle(volume_id)) or self._snapshots.all(volume_id)
        return Handle(volume_id) if there else None

    # Attachments
    def identity(self) -> str:
        return self._ec2.metadata.read("instance-id")

    def attach(self, handle: Handle, machine: str) -> None:
        self._attachments.attach(handle, machine)

    def detach(self, handle: Handle, machine: str, *, force: bool = False) -> None:
        self._attachments.detach(handle, machine, force=force)
        self._known.pop(handle, None)

    def machines(self, handle: Handle) -> Sequence[str]:
        return [each.machine for each in self._disks.current(handle).attached]

    # Devices
    def map(self, handle: Handle) -> Path:
        """Attaches it to this instance, should nobody have done so."""
        machine = self.identity()
        disk = self._known[handle] = self._attachments.attach(handle, machine)
        try:
            return self.host.wait_for_device(*self._choices(disk), timeout=DEVICE_TIMEOUT)
        except DeadlineExceeded as error:
            there = on(disk, machine)
            raise BackendError(
                f"is attached to this instance as {there.device if there else '?'}, and no device of it is here",
                subject=f"EBS volume {disk.id}",
                hint=f"was it pulled? Detach it by force and try again; {error.hint}".rstrip("; "),
                retry_after=5.0,
            ) from error

    def _choices(self, disk: Disk) -> Sequence[Mapping[str, str]]:
        """NVMe tells the serial number behind the model's name, virtio alone. Xen tells none, but keeps the name."""
        machine = next((each.device for each in disk.attached if each.device), "")
        xen = machine.replace("/dev/sd", "/dev/xvd")
        by_name = [{"DEVNAME": xen}] if xen.startswith("/dev/xvd") else []
        return [{"ID_SERIAL_SHORT": disk.serial}, {"ID_SERIAL": disk.serial}, *by_name]

    def unmap(self, handle: Handle) -> None:
        disk = self._disks.find(handle)
        if disk is None or on(disk, self.identity()) is None:
            self._known.pop(handle, None)
            return
        device = self.host.find_device(*self._choices(disk))
        if device is not None:
            self.host.check_unheld(device)
        self._attachments.detach(handle, self.identity(), force=False)
        self._known.pop(handle, None)

    def mapped(self, handle: Handle) -> Path | None:
        disk = self._known.get(handle)
        if disk is None:
            disk = self._disks.find(handle)
            if disk is None or on(disk, self.identity()) is None:
                return None
            self._known[handle] = disk
        return self.host.find_device(*self._choices(disk))

    def mappings(self) -> Mapping[VolumeId, Path]:
        found = (
            (disk, self.host.find_device(*self._choices(disk))) for disk in self._disks.attached_to(self.identity())
        )
        return {VolumeId(disk.volume_id): device for disk, device in found if device is not None}

    # Changes
    def expand(self, handle: Handle, size: int) -> int:
        disk = self._disks.current(handle)
        if disk.size < size:
            Wanted(disk.type).check_size(gib(size), subject=self._subject)
            disk = self._modifications.apply(disk, lambda disk: disk.size >= size, Size=gib(size))
        self._await_growth(disk)
        return disk.size

    def _await_growth(self, disk: Disk) -> None:
        device = self.host.find_device(*self._choices(disk)) if disk.attached else None
        if device is not None:
            self.host.wait_for_device_size(device, disk.size, timeout=DEVICE_TIMEOUT)

    def modify(self, handle: Handle, options: Options) -> None:
        disk, wanted = self._disks.current(handle), self._wanted(options)
        wanted.check(gib(disk.size), subject=self._subject)
        if not wanted.met_by(disk.type, disk.iops, disk.throughput):
            self._modifications.apply(
                disk, lambda disk: wanted.met_by(disk.type, disk.iops, disk.throughput), **wanted.parameters()
            )

    # Copies
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        self._snapshots.take(self._disks.current(handle), snapshot_id, self._options.tags)
        return Handle(snapshot_id)

    def delete_snapshot(self, snapshot: Handle) -> None:
        self._snapshots.delete(snapshot)

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        for name in sorted({snapshot.name for snapshot in self._snapshots.owned()}):
            if name.startswith("s"):
                yield FoundSnapshot(Handle(name), SnapshotId(name))

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """The next disk is made from the snapshot, and is the volume from then on; then the one before goes."""
        disks = self._disks.all(handle)
        self._check_unattached(disks)
        old = self._disks.current(handle)
        source = self._snapshots.completed(snapshot)
        self._known.pop(handle, None)
        self._disks.make(
            handle,
            old.tags,
            old.generation + 1,
            AvailabilityZone=old.zone,
            Size=gib(max(old.size, source.size)),
            SnapshotId=source.id,
            **Wanted.of(old.type, old.iops, old.throughput).parameters(),
        )
        crash.point("ebs.restore.made")
        for disk in disks:
            self._disks.delete(disk)
            crash.point("ebs.restore.deleted")

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        wanted, size = self._copy_of(self._snapshots.current(snapshot).size, spec)
        found = self._disks.find(Handle(spec.id))
        if found is not None:
            return self._created(self._disks.finish(found))
        source = self._snapshots.completed(snapshot)
        return self._created(self._make(spec, wanted, size, snapshot=source.id))

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._copy_disk(self._disks.current(source), spec, None)

    def _copy_disk(self, origin: Disk, spec: VolumeSpec, tell: Tell | None) -> CreatedVolume:
        wanted, size = self._copy_of(origin.size, spec)
        found = self._disks.find(Handle(spec.id))
        if found is not None:
            disk = self._disks.finish(found)
        else:
            self._snapshots.take(origin, spec.id, self._options.tags)
            disk = self._make(spec, wanted, size, snapshot=self._snapshots.completed(spec.id, tell).id)
        self._snapshots.delete(spec.id)
        return self._created(disk)

    def _copy_of(self, least: int, spec: VolumeSpec) -> tuple[Wanted, int]:
        wanted, size = self._wanted(spec.options), self._size(spec)
        if size < least:
            raise OutOfRange(f"{least} bytes do not fit into {size}", subject=self._subject)
        wanted.check(gib(size), subject=self._subject)
        return wanted, size

    # Moves
    def way_from(self, source: Driver) -> str:
        if not isinstance(source, EbsDriver):
            raise NotSupported("EBS makes volumes from snapshots of its own alone", subject=self._subject)
        if (self._ec2.region, self._options.endpoint) != (source._ec2.region, source._options.endpoint):
            raise NotSupported(
                f"its snapshots lie in region {source._ec2.region}, and here it is {self._ec2.region}",
                subject=self._subject,
            )
        if self._zone != source._zone:
            raise NotSupported(
                f"no instance reaches both zone {source._zone} and zone {self._zone}, to compare the copy",
                subject=self._subject,
            )
        return "an EBS snapshot, and a volume made from it"

    def take_from(self, source: Driver, handle: Handle, spec: VolumeSpec, tell: Tell) -> CreatedVolume:
        """The snapshot is the target's, under the name of its volume: what deletes that deletes both."""
        self.way_from(source)
        assert isinstance(source, EbsDriver)
        return self._copy_disk(source._disks.current(handle), spec, tell)

    # Import
    def importable(self) -> Iterable[str]:
        for disk in self._disks.free(self._zone):
            if OWNER not in disk.tags:
                yield disk.id

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        subject = f"EBS volume {reference[:40]}"
        disk = self._disks.by_id(reference)
        if disk.volume_id == spec.id:
            return CreatedVolume(Handle(spec.id), disk.size)
        if OWNER in disk.tags:
            raise AlreadyExists(f"is volume {disk.volume_id} of {disk.tags[OWNER]} already", subject=subject)
        if disk.zone != self._zone:
            raise PreconditionFailed(f"lies in zone {disk.zone}, the backend in {self._zone}", subject=subject)
        if spec.size is not None and spec.size > disk.size:
            raise OutOfRange(f"has {disk.size} bytes only", subject=subject, hint="adopt it first, then expand it")
        self._check_unattached([disk])
        self._disks.adopt(Handle(spec.id), disk.id, self._tags(spec))
        shown = self._disks.wait(Handle(spec.id), lambda disk: disk, SHOWN)
        return self._created(shown)
