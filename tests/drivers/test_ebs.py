"""`ebs` against EC2 as it behaves: what it is asked, how often, and what becomes of its answers. The device side is a
host that shows what was attached; real disks, and the suite that all drivers pass, come in the machine (tests/vm)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.conftest import wait_until
from tests.harness.ec2 import KEYS, REGION, ZONES, Ec2Server, Hardware, ec2_server
from volumed import context, redact
from volumed.driver import CreatedVolume, VolumeSpec
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    DeadlineExceeded,
    InUse,
    InvalidRequest,
    NotFound,
    NotSupported,
    OutOfRange,
    PermissionDenied,
    PreconditionFailed,
    VolumedError,
)
from volumed.model import Handle, VolumeId, VolumeMode, new_snapshot_id, new_volume_id
from volumed.testing.fake_host import FakeHost
from volumed.units import GIB, TIB
from volumed_drivers.ebs import EbsDriver, EbsOptions, EbsVolumeOptions, disks
from volumed_drivers.ebs.client import DESCRIBES_PER_SECOND, Gate

OURS = [{"Name": "tag-key", "Values": ["volumed:snapshot"]}]


class Shown(Hardware):
    """Attached disks are devices of the fake host, known as Nitro instances know them."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.forced: list[bool] = []

    def attached(self, disk: str, machine: str, name: str) -> None:
        self.host.devices[("ID_SERIAL_SHORT", disk.replace("-", "")),] = Path(f"/dev/{disk}")

    def detached(self, disk: str, machine: str, *, force: bool) -> None:
        self.forced.append(force)
        self.host.devices.pop((("ID_SERIAL_SHORT", disk.replace("-", "")),), None)


@pytest.fixture
def hardware() -> Shown:
    return Shown()


@pytest.fixture
def ec2(hardware: Shown) -> Iterator[Ec2Server]:
    with ec2_server(hardware) as server:
        yield server


Make = Callable[..., EbsDriver]


@pytest.fixture
def make(ec2: Ec2Server, hardware: Shown, monkeypatch: pytest.MonkeyPatch) -> Make:
    key, secret = next(iter(KEYS.items()))
    monkeypatch.setenv("TEST_EC2_KEY", key)
    monkeypatch.setenv("TEST_EC2_SECRET", secret)

    def make(backend: str = "cloud", **options: Any) -> EbsDriver:
        keys = {"access_key": "env:TEST_EC2_KEY", "secret_key": "env:TEST_EC2_SECRET"}
        every = {"endpoint": ec2.url, "metadata_endpoint": ec2.url} | keys | options
        return EbsDriver(backend, EbsOptions(**every), hardware.host)

    return make


@pytest.fixture
def driver(make: Make) -> EbsDriver:
    return make()


def spec(size: int = GIB, volume_id: VolumeId | None = None, **options: Any) -> VolumeSpec:
    wanted = EbsVolumeOptions(**options)
    return VolumeSpec(volume_id or new_volume_id(), size, VolumeMode.FILESYSTEM, wanted, {"name": "pgdata"})


def only_disk(ec2: Ec2Server) -> dict[str, Any]:
    (found,) = ec2.client.describe_volumes(Filters=[{"Name": "tag-key", "Values": ["volumed:volume"]}])["Volumes"]
    return dict(found)


def only_snapshot(ec2: Ec2Server) -> str:
    (found,) = ec2.client.describe_snapshots(OwnerIds=["self"], Filters=OURS)["Snapshots"]
    return str(found["SnapshotId"])


# Making
def test_a_volume_is_as_it_was_asked_for(ec2: Ec2Server, make: Make) -> None:
    driver = make(type="io2", iops=1000, kms_key="alias/data", tags={"team": "web"})
    made = driver.create(spec(10 * GIB + 1))
    disk = only_disk(ec2)
    assert made.size == 11 * GIB == disk["Size"] * GIB
    assert (disk["VolumeType"], disk["Iops"], disk["Encrypted"], disk["AvailabilityZone"]) == (
        "io2",
        1000,
        True,
        ZONES[0],
    )
    assert disk["KmsKeyId"].endswith("alias/data")
    tags = {tag["Key"]: tag["Value"] for tag in disk["Tags"]}
    assert tags == {
        "Name": "pgdata",
        "team": "web",
        "volumed:owner": "cloud",
        "volumed:volume": made.handle,
        "volumed:generation": "1",
        "volumed:mark:name": "pgdata",
    }


def test_a_volumes_own_options_go_before_the_backends(ec2: Ec2Server, make: Make) -> None:
    make(type="io2", iops=1000).create(spec(10 * GIB, type="gp3", throughput=200, iops=4000))
    disk = only_disk(ec2)
    assert (disk["VolumeType"], disk["Iops"], disk["Throughput"]) == ("gp3", 4000, 200)


def test_a_retry_never_makes_a_second_volume(ec2: Ec2Server, make: Make) -> None:
    """Neither when the answer to the first call was lost, nor while EC2 does not show what it made."""
    ec2.layer.manners.stale, ec2.layer.manners.stale_share = 3600.0, 1.0
    volume_id = new_volume_id()
    with context.request(timeout=0.0), pytest.raises(DeadlineExceeded):
        make()._make(spec(volume_id=volume_id), make()._wanted(EbsVolumeOptions()), GIB)
    drivers = [make() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(driver.create, spec(volume_id=volume_id)) for driver in drivers]
        wait_until(lambda: ec2.count("CreateVolume") == 4)
        ec2.layer.manners.stale = 0.0
        assert len({each.result(60) for each in made}) == 1
    assert only_disk(ec2)["Tags"]


def test_the_same_id_after_a_deletion_is_a_new_volume(
    ec2: Ec2Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EC2 answers to a token it knows with the disk that is gone."""
    monkeypatch.setattr(disks, "SETTLED", 2.0)
    volume_id = new_volume_id()
    for driver in (make(), make()):
        handle = driver.create(spec(volume_id=volume_id)).handle
        first = only_disk(ec2)["VolumeId"]
        driver.delete(handle)
        make().create(spec(volume_id=volume_id))
        assert only_disk(ec2)["VolumeId"] != first
        driver.delete(handle)


REFUSED = [
    (spec(65 * TIB, type="gp3"), r"1 GiB to 64 TiB"),
    (spec(17 * TIB, type="gp2"), r"cannot have 17 TiB.*1 GiB to 16 TiB"),
    (spec(3 * GIB, type="io1", iops=100), r"cannot have 3 GiB.*4 GiB to 16 TiB"),
    (spec(100 * GIB, type="st1"), r"cannot have 100 GiB"),
    (spec(2 * TIB, type="standard"), r"cannot have 2 TiB"),
    (spec(10 * GIB, type="gp3", iops=2999), r"2999 IOPS are not possible"),
    (spec(10 * GIB, type="gp3", iops=5001), r"5001 IOPS are not possible.*3000 to 5000 are"),
    (spec(16 * TIB, type="gp3", iops=999999), r"3000 to 80000"),
    (spec(4 * GIB, type="io1", iops=201), r"100 to 200 are, 50 for each GiB"),
    (spec(4 * GIB, type="io2"), r"needs iops"),
    (spec(4 * GIB, type="gp2", iops=100), r"iops cannot be chosen for gp2.*only for gp3, io1, io2"),
    (spec(4 * GIB, type="gp2", throughput=200), r"throughput cannot be chosen for gp2"),
    (spec(4 * GIB, type="gp3", throughput=751), r"751 MiB/s are not possible with 3000 IOPS.*125 to 750"),
]


@pytest.mark.parametrize(("wanted", "said"), REFUSED)
def test_what_ec2_would_refuse_is_refused_before(
    ec2: Ec2Server, driver: EbsDriver, wanted: VolumeSpec, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        driver.create(wanted)
    assert ec2.layer.calls == []


def test_a_small_gp3_has_its_3000_iops(driver: EbsDriver) -> None:
    driver.create(spec(GIB, iops=3000, throughput=750))


# Attaching
def test_an_attached_volume_is_found_by_its_serial(ec2: Ec2Server, make: Make) -> None:
    ec2.layer.manners.delay = ec2.layer.manners.stale = 0.3
    driver = make()
    handle = driver.create(spec()).handle
    device = driver.map(handle)
    assert device == Path(f"/dev/{only_disk(ec2)['VolumeId']}")
    assert driver.machines(handle) == [ec2.layer.instance] == [driver.identity()]
    again = make()
    assert again.mapped(handle) == device
    assert again.mappings() == {VolumeId(handle): device}
    driver.unmap(handle)
    assert driver.mapped(handle) is None
    assert driver.machines(handle) == []


def test_xen_knows_no_serials_but_keeps_the_name(make: Make, hardware: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def attached(disk: str, machine: str, name: str) -> None:
        hardware.host.devices[("DEVNAME", name.replace("/dev/sd", "/dev/xvd")),] = Path("/dev/xvdf")

    monkeypatch.setattr(hardware, "attached", attached)
    driver = make()
    assert driver.map(driver.create(spec()).handle) == Path("/dev/xvdf")


def test_attach_bears_repeating_and_refuses_a_second_machine(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec()).handle
    other = ec2.instance()
    driver.attach(handle, other)
    driver.attach(handle, other)
    assert ec2.count("AttachVolume") == 1
    with pytest.raises(InUse, match=f"is attached to: instance {other}.*detach it there first"):
        driver.map(handle)
    with pytest.raises(InUse, match=f"is attached to: instance {other} "):
        driver.delete(handle)
    driver.detach(handle, other)
    driver.detach(handle, other)
    driver.map(handle)


def test_another_machine_was_quicker_and_ec2_does_not_show_it(
    ec2: Ec2Server, driver: EbsDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = driver.create(spec()).handle
    other, disk = ec2.instance(), only_disk(ec2)["VolumeId"]
    ask = driver._attachments._ask

    def late(*arguments: Any) -> None:
        ec2.client.attach_volume(VolumeId=disk, InstanceId=other, Device="/dev/sdf")
        ask(*arguments)

    monkeypatch.setattr(driver._attachments, "_ask", late)
    with pytest.raises(InUse, match=f"instance {other}"):
        driver.map(handle)


def test_a_machine_of_another_zone_never_gets_it(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec()).handle
    far = ec2.instance(ZONES[1])
    with pytest.raises(PreconditionFailed, match=f"lies in zone {ZONES[0]}, and instance {far} in {ZONES[1]}"):
        driver.attach(handle, far)
    with pytest.raises(PreconditionFailed, match="i-0123456789abcdef0.*does it still run"):
        driver.attach(handle, "i-0123456789abcdef0")


def test_a_machine_takes_so_many_and_no_more(ec2: Ec2Server, driver: EbsDriver) -> None:
    ec2.layer.manners.most_attached = 2
    there = len(ec2.client.describe_instances()["Reservations"][0]["Instances"][0]["BlockDeviceMappings"])
    handles = [driver.create(spec()).handle for _ in range(3 - there)]
    for handle in handles[:-1]:
        driver.map(handle)
    with pytest.raises(CapacityExhausted, match=f"instance {ec2.layer.instance}: takes no more volumes"):
        driver.map(handles[-1])


def test_a_name_that_somebody_else_took_is_left_to_him(ec2: Ec2Server, driver: EbsDriver) -> None:
    first, second = (driver.create(spec()).handle for _ in range(2))
    driver.map(first)
    by_hand = ec2.client.create_volume(Size=1, AvailabilityZone=ZONES[0])["VolumeId"]
    ec2.client.attach_volume(VolumeId=by_hand, InstanceId=ec2.layer.instance, Device="/dev/sdg")
    driver.map(second)
    names = [each["Device"] for disk in ec2.client.describe_volumes()["Volumes"] for each in disk["Attachments"]]
    assert len(set(names)) == len(names)


def test_force_is_only_used_when_it_is_said(ec2: Ec2Server, driver: EbsDriver, hardware: Shown) -> None:
    handle = driver.create(spec()).handle
    driver.map(handle)
    driver.unmap(handle)
    driver.map(handle)
    driver.detach(handle, driver.identity(), force=True)
    assert hardware.forced == [False, True]


def test_a_machine_that_does_not_let_go_is_said(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec()).handle
    driver.map(handle)
    ec2.layer.manners.delay = 3600
    with context.request(timeout=1.0), pytest.raises(DeadlineExceeded, match="has not detached.*unmount it there"):
        driver.unmap(handle)


def test_a_disk_that_was_pulled_is_said_and_comes_back(ec2: Ec2Server, driver: EbsDriver, hardware: Shown) -> None:
    handle = driver.create(spec()).handle
    driver.map(handle)
    hardware.host.devices.clear()
    assert driver.mapped(handle) is None
    with pytest.raises(
        BackendError, match=r"EBS volume vol-\w+: is attached to this instance as /dev/sdf, and no device"
    ):
        driver.map(handle)
    driver.detach(handle, driver.identity(), force=True)
    assert driver.map(handle)


# Calls
def busiest_second(ec2: Ec2Server) -> int:
    """How many look-ups arrived in it."""
    looks = [at for at, action in ec2.layer.calls if action.startswith("Describe")]
    return max(sum(begun <= at < begun + 1 for at in looks) for begun in looks)


def test_fifty_attaches_at_once_cost_three_looks_a_second(ec2: Ec2Server, driver: EbsDriver) -> None:
    ec2.layer.manners.delay, ec2.layer.manners.most_attached = 0.5, 100
    with ThreadPoolExecutor(50) as pool:
        handles = [made.handle for made in pool.map(lambda _: driver.create(spec()), range(50))]
        ec2.layer.calls.clear()
        devices = list(pool.map(driver.map, handles))
    assert len(set(devices)) == 50
    assert busiest_second(ec2) <= DESCRIBES_PER_SECOND
    assert ec2.count("AttachVolume") == 50


@settings(max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3), st.floats(0, 3)), min_size=8, max_size=40))
def test_however_long_calls_are_on_their_way_three_arrive_a_second(
    steps: list[tuple[bool, float, float]],
) -> None:
    """A clock that only the steps move: whether a call is begun or one comes back, how long it is on its way there, and
    how long until it is answered."""
    now, arrived = 1000.0, []
    on_their_way: list[float] = []  # when each is answered

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: now)
        patched.setattr(time, "sleep", sleep)
        gate = Gate(DESCRIBES_PER_SECOND, 1.0)
        for begin, there, back in steps:
            if on_their_way and (not begin or len(on_their_way) == DESCRIBES_PER_SECOND):
                answered = min(on_their_way)
                on_their_way.remove(answered)
                now = max(now, answered)
                gate.leave()
            else:
                gate.enter(0.0, subject="")
                arrived.append(now + there)
                on_their_way.append(now + there + back)
    arrived.sort()
    for first, fourth in zip(arrived, arrived[DESCRIBES_PER_SECOND:], strict=False):
        assert fourth - first >= 1 - 1e-6  # of a float


def test_a_turn_that_never_comes_is_not_waited_for_without_end() -> None:
    gate = Gate(1, 0.0)
    gate.enter(0.0, subject="")
    with pytest.raises(DeadlineExceeded, match="backend cloud: EC2 did not answer in time"):
        gate.enter(0.0, subject="backend cloud")


def test_every_attempt_takes_a_turn_and_gives_it_back(ec2: Ec2Server, driver: EbsDriver) -> None:
    """Also those that boto3 makes by itself, and what is no answer at all: or there would be no turn left."""
    ec2.layer.manners.throttled = 0.5
    ec2.layer.calls.clear()
    for _ in range(2):
        assert list(driver.list()) == []
    ec2.layer.manners.throttled = 0.0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ec2.layer, "_shown", lambda *_: b"<no XML")
        for _ in range(DESCRIBES_PER_SECOND):
            with pytest.raises(BackendUnavailable):
                list(driver.list())
    assert list(driver.list()) == []
    assert busiest_second(ec2) <= DESCRIBES_PER_SECOND


def test_throttling_is_borne(ec2: Ec2Server, driver: EbsDriver) -> None:
    ec2.layer.manners.throttled = 0.3
    handle = driver.create(spec()).handle
    assert driver.map(handle)
    driver.unmap(handle)
    driver.delete(handle)
    assert only_none(ec2)


def only_none(ec2: Ec2Server) -> bool:
    ec2.layer.manners.throttled = 0
    return not ec2.client.describe_volumes(Filters=[{"Name": "tag-key", "Values": ["volumed:volume"]}])["Volumes"]


def test_throttling_without_end_is_said(ec2: Ec2Server, driver: EbsDriver) -> None:
    driver.identity()
    ec2.layer.manners.throttled = 1.0
    with pytest.raises(BackendUnavailable, match="RequestLimitExceeded.*too many calls"):
        driver.probe()


def test_everything_works_through_delays_and_stale_answers(ec2: Ec2Server, make: Make) -> None:
    ec2.layer.manners.delay = ec2.layer.manners.stale = 1.0
    driver = make()
    volume_id = new_volume_id()
    handle = driver.create(spec(volume_id=volume_id)).handle
    driver.map(handle)
    assert driver.expand(handle, 2 * GIB) == 2 * GIB
    driver.unmap(handle)
    snapshot = driver.snapshot(handle, new_snapshot_id())
    driver.restore(handle, snapshot)
    assert driver.inspect(handle).size == 2 * GIB
    copy = driver.clone(handle, spec(2 * GIB)).handle
    assert {found.handle for found in driver.list()} == {handle, copy}
    for each in (handle, copy):
        driver.delete(each)
        assert driver.find(VolumeId(each)) is None
    driver.delete_snapshot(snapshot)
    assert list(driver.list_snapshots()) == []


# Growing and changing
def test_growth_waits_for_ec2_and_then_for_the_kernel(ec2: Ec2Server, driver: EbsDriver, hardware: Shown) -> None:
    ec2.layer.manners.delay = 0.5
    handle = driver.create(spec()).handle
    device = driver.map(handle)
    assert driver.expand(handle, 2 * GIB) == 2 * GIB
    assert driver.inspect(handle).size == 2 * GIB
    assert ("wait_for_device_size", str(device), str(2 * GIB)) in [
        tuple(map(str, call)) for call in hardware.host.calls
    ]
    assert driver.expand(handle, GIB) == 2 * GIB


def test_a_second_change_within_six_hours_is_refused_and_said(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec()).handle
    driver.expand(handle, 2 * GIB)
    with pytest.raises(PreconditionFailed, match="maximum modification rate.*try again later") as refused:
        driver.expand(handle, 3 * GIB)
    assert refused.value.retry_after
    assert driver.inspect(handle).size == 2 * GIB
    with pytest.raises(OutOfRange, match="64 TiB"):
        driver.expand(handle, 65 * TIB)


def test_type_and_speed_can_be_changed(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec(10 * GIB)).handle
    wanted = EbsVolumeOptions(type="io2", iops=500)
    driver.modify(handle, wanted)
    assert (only_disk(ec2)["VolumeType"], only_disk(ec2)["Iops"]) == ("io2", 500)
    driver.modify(handle, wanted)
    assert ec2.count("ModifyVolume") == 1
    with pytest.raises(OutOfRange, match="100 to 10000"):
        driver.modify(handle, EbsVolumeOptions(type="io2", iops=20000))


# Copies
def test_a_copy_keeps_the_kind_and_the_mark(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec(10 * GIB, type="io2", iops=500)).handle
    snapshot = driver.snapshot(handle, new_snapshot_id())
    driver.restore(handle, snapshot)
    disk = only_disk(ec2)
    assert (disk["VolumeType"], disk["Iops"], disk["SnapshotId"]) == ("io2", 500, only_snapshot(ec2))
    assert [found.mark for found in driver.list()] == [{"name": "pgdata"}]


def test_a_clone_leaves_no_snapshot_behind(ec2: Ec2Server, driver: EbsDriver) -> None:
    ec2.layer.manners.delay = 0.5
    source = driver.create(spec()).handle
    driver.clone(source, spec())
    assert list(driver.list_snapshots()) == []
    assert ec2.client.describe_snapshots(OwnerIds=["self"], Filters=OURS)["Snapshots"] == []


def test_a_snapshot_that_is_being_stored_is_waited_for(ec2: Ec2Server, driver: EbsDriver) -> None:
    handle = driver.create(spec()).handle
    ec2.layer.manners.delay = 3600
    snapshot = driver.snapshot(handle, new_snapshot_id())
    with (
        context.request(timeout=10.0),
        pytest.raises(DeadlineExceeded, match=r"not stored the snapshot yet.*43% of snap-"),
    ):
        driver.create_from_snapshot(snapshot, spec())


# Moves
def test_data_of_another_backend_comes_by_a_snapshot_of_which_nothing_stays(ec2: Ec2Server, make: Make) -> None:
    one, other, wanted = make("one"), make("other", type="io2", iops=500), spec(4 * GIB)
    ec2.layer.manners.delay = 0.5
    handle, told = one.create(spec(3 * GIB)).handle, list[int]()
    assert "snapshot" in other.way_from(one)
    for _ in range(2):
        made = other.take_from(one, handle, wanted, told.append)
        assert made == CreatedVolume(Handle(wanted.id), 4 * GIB)
    (disk,) = [each for each in ec2.client.describe_volumes()["Volumes"] if each["Size"] == 4]
    assert (disk["VolumeType"], disk["SnapshotId"][:5]) == ("io2", "snap-")
    assert sum(told) == 3 * GIB
    assert [[found.handle for found in each.list()] for each in (one, other)] == [[handle], [wanted.id]]
    assert ec2.client.describe_snapshots(OwnerIds=["self"], Filters=OURS)["Snapshots"] == []


def test_a_copy_that_is_called_off_is_found_and_removed(ec2: Ec2Server, make: Make) -> None:
    one, other, wanted = make("one"), make("other"), spec()
    handle = one.create(spec()).handle
    ec2.layer.manners.delay = 3600

    def call_off(done: int) -> None:
        raise OutOfRange("no more")

    with pytest.raises(OutOfRange, match="no more"):
        other.take_from(one, handle, wanted, call_off)
    assert other.find(wanted.id) == Handle(wanted.id)
    other.delete(Handle(wanted.id))
    assert ec2.client.describe_snapshots(OwnerIds=["self"], Filters=OURS)["Snapshots"] == []
    assert [found.handle for found in one.list()] == [handle]


def test_another_zone_or_region_is_too_far_to_compare(make: Make) -> None:
    one = make("one")
    with pytest.raises(NotSupported, match=f"no instance reaches both zone {ZONES[0]} and zone {ZONES[1]}"):
        make("far", zone=ZONES[1]).way_from(one)
    with pytest.raises(NotSupported, match="lie in region eu-1, and here"):
        make("farther").way_from(make("abroad", region="eu-1"))


# Adopting
def test_a_volume_made_by_hand_becomes_ours(ec2: Ec2Server, driver: EbsDriver) -> None:
    by_hand = ec2.client.create_volume(Size=3, AvailabilityZone=ZONES[0])["VolumeId"]
    far = ec2.client.create_volume(Size=3, AvailabilityZone=ZONES[1])["VolumeId"]
    driver.create(spec())
    assert list(driver.importable()) == [by_hand]
    wanted = spec()._replace(size=None)
    for _ in range(2):
        assert driver.adopt(by_hand, wanted) == CreatedVolume(Handle(wanted.id), 3 * GIB)
    assert driver.find(wanted.id) == Handle(wanted.id)
    assert driver.map(Handle(wanted.id))
    with pytest.raises(AlreadyExists, match=f"is volume {wanted.id} of cloud already"):
        driver.adopt(by_hand, spec())
    with pytest.raises(PreconditionFailed, match=f"lies in zone {ZONES[1]}"):
        driver.adopt(far, spec())
    with pytest.raises(NotFound):
        driver.adopt("vol-0123456789abcdef0", spec())


def test_backends_of_one_account_do_not_see_one_another(make: Make) -> None:
    one, other = make("one"), make("other")
    handle = one.create(spec()).handle
    snapshot = one.snapshot(handle, new_snapshot_id())
    assert list(other.list()) == []
    assert list(other.list_snapshots()) == []
    other.delete(handle)
    other.delete_snapshot(snapshot)
    assert [found.handle for found in one.list()] == [handle]
    assert [found.handle for found in one.list_snapshots()] == [snapshot]


# Where and who
def test_the_instance_tells_where_it_is(ec2: Ec2Server, driver: EbsDriver) -> None:
    found = driver.probe()
    assert found.topology == {"topology.kubernetes.io/zone": ZONES[0]}
    assert found.facts["region"] == REGION


def test_its_role_is_enough(ec2: Ec2Server, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    assert make(access_key=None, secret_key=None).probe()


def test_a_zone_that_is_none_is_said(make: Make) -> None:
    with pytest.raises(ConfigError, match=f"region {REGION} has no zone mars-1a.*{ZONES[0]}"):
        make(zone="mars-1a").probe()


def test_a_machine_that_is_no_instance_is_said(make: Make) -> None:
    with pytest.raises(BackendUnavailable, match="does not tell instance-id.*is this an EC2 instance"):
        make(metadata_endpoint="http://127.0.0.1:1").identity()


def test_an_api_that_is_away_is_said(make: Make) -> None:
    driver = make(endpoint="http://127.0.0.1:1")
    with pytest.raises(BackendUnavailable, match="backend cloud: EC2 does not answer"):
        driver.create(spec())


def test_a_wrong_key_is_said_and_not_shown(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_EC2_KEY", "AKIAWRONGWRONG")
    monkeypatch.setenv("TEST_EC2_SECRET", "wrong-and-never-shown")
    with pytest.raises(PermissionDenied, match="AuthFailure.*what the README lists") as refused:
        make().create(spec())
    assert "wrong-and-never-shown" not in str(refused.value)
    assert "wrong-and-never-shown" not in redact.blank("wrong-and-never-shown")


def test_a_changed_key_is_taken_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    monkeypatch.setenv("TEST_EC2_KEY", "AKIAWRONGWRONG")
    with pytest.raises(PermissionDenied):
        driver.create(spec())
    monkeypatch.setenv("TEST_EC2_KEY", next(iter(KEYS)))
    driver.create(spec())


@pytest.mark.parametrize(
    "wrong",
    [
        {"access_key": "env:X"},
        {"tags": {"aws:x": "y"}},
        {"tags": {"volumed:owner": "me"}},
        {"type": "gp9"},
        {"endpoint": "ftp://x"},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EbsOptions(**wrong)


def test_a_mark_that_no_tag_can_hold_is_refused(driver: EbsDriver) -> None:
    with pytest.raises(InvalidRequest, match="a tag takes 256 characters"):
        driver.create(spec()._replace(mark={"name": "x" * 257}))


def test_the_sdk_is_loaded_by_the_first_call_alone() -> None:
    program = (
        "import sys; from volumed_drivers.ebs import EbsDriver, EbsOptions; import volumed.testing.fake_host as fake;"
        "EbsDriver('x', EbsOptions(region='r'), fake.FakeHost());"
        "sys.exit(any(name.startswith(('boto', 'aws')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False).returncode == 0


def test_a_missing_sdk_is_said(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("botocore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "botocore.config", None)
    with pytest.raises(ConfigError, match=r"boto3 is not installed.*pip install 'volumed\[ebs\]'"):
        make().create(spec())


def test_errors_all_name_their_backend(ec2: Ec2Server, driver: EbsDriver) -> None:
    failing: list[Callable[[], object]] = [
        lambda: driver.inspect(Handle("v-none")),
        lambda: driver.map(Handle("v-none")),
        lambda: driver.expand(Handle("v-none"), GIB),
        lambda: driver.create_from_snapshot(Handle("s-none"), spec()),
        lambda: driver.clone(Handle("v-none"), spec()),
    ]
    for call in failing:
        with pytest.raises(NotFound) as refused:
            call()
        assert isinstance(refused.value, VolumedError)
        assert "backend cloud" in str(refused.value)
