"""`ceph-rbd` on a real cluster, its images in loop devices by qemu-storage-daemon (krbd and rbd-nbd: tests/vm)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.drivers.conftest import CEPH_PATIENCE, MakeRbd
from tests.harness.ceph import POOL, Ceph
from tests.harness.processes import pids_with
from volumed.driver import Driver, Extent, VolumeSpec
from volumed.errors import BackendUnavailable, ConfigError, InUse, InvalidRequest, NotFound, OutOfRange
from volumed.model import Handle, VolumeId, VolumeMode, new_snapshot_id, new_volume_id
from volumed.testing import crash
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.ceph_rbd import CephRbdDriver, RbdOptions, RbdVolumeOptions

pytestmark = pytest.mark.root


class TestConformance(DriverConformance):
    @pytest.fixture
    def make_driver(self, make_rbd: MakeRbd) -> MakeDriver:
        return make_rbd

    def make_stranger(self, driver: Driver, name: str) -> None:
        assert isinstance(driver, CephRbdDriver)
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"old".ljust(16 * MIB, b"\0"))
            file.flush()
            sh("rbd", "-c", driver._options.conf, "import", file.name, f"{POOL}/{name}")


def spec(size: int = 64 * MIB, *, volume_id: VolumeId | None = None, data_pool: str | None = None) -> VolumeSpec:
    options = RbdVolumeOptions(data_pool=data_pool)
    return VolumeSpec(volume_id or new_volume_id(), size, VolumeMode.BLOCK, options, {"name": "data"})


def write(device: Path, data: bytes, *, at: int = 0) -> None:
    with device.open("r+b", buffering=0) as opened:
        opened.seek(at)
        opened.write(data)
        os.fsync(opened)


def test_what_maps_is_told_and_can_be_forced(make_rbd: MakeRbd) -> None:
    facts = make_rbd(**{"map-with": "auto"}).probe().facts
    assert facts["map-with"] == "qsd"  # this kernel has neither of the others
    assert facts["not krbd"] == "this kernel has no module rbd"
    assert "rbd-nbd" in facts["not nbd"] or "no module nbd" in facts["not nbd"]
    assert len(facts["cluster"]) == 36
    with pytest.raises(ConfigError, match="backend ceph: nothing here can map an image: this kernel has no module rbd"):
        make_rbd(**{"map-with": "krbd"}).probe()


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ("layering,telepathy", "telepathy: not among"),
        ("exclusive-lock", "layering is needed"),
        ("layering,object-map", "object-map needs exclusive-lock"),
    ],
)
def test_features_that_cannot_be(features: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RbdOptions(pool="p", key="env:KEY", features=features)


def test_features_and_data_pool_are_those_that_were_asked_for(ceph: Ceph, make_rbd: MakeRbd) -> None:
    ceph.make_pool("data")
    key = ceph.make_user("both", mon="profile rbd", osd=f"profile rbd pool={POOL}, profile rbd pool=data")
    driver = make_rbd(features="layering,exclusive-lock", user="both", key=f"file:{key}")
    handle = driver.create(spec(data_pool="data")).handle
    told = json.loads(ceph.rbd("info", f"{POOL}/{handle}", "--format", "json"))
    assert set(told["features"]) == {"layering", "exclusive-lock", "data-pool"}
    assert told["data_pool"] == "data"
    write(driver.map(handle), b"x" * MIB)
    assert "rbd_data." in sh("rados", "-c", ceph.conf, "-p", "data", "ls")


def test_a_namespace_keeps_its_own(ceph: Ceph, make_rbd: MakeRbd) -> None:
    with pytest.raises(BackendUnavailable, match="no namespace tenant in pool rbd.*rbd namespace create rbd/tenant"):
        make_rbd(namespace="tenant").probe()
    ceph.rbd("namespace", "create", f"{POOL}/tenant")
    driver = make_rbd(namespace="tenant")
    driver.probe()
    made = driver.create(spec())
    write(driver.map(made.handle), b"mine")
    assert [found.handle for found in driver.list()] == [made.handle]
    assert list(make_rbd().list()) == []
    driver.unmap(made.handle)
    driver.delete(made.handle)


def test_one_that_is_half_made_is_known_as_such(ceph: Ceph, make_rbd: MakeRbd) -> None:
    volume_id = new_volume_id()
    ceph.rbd("create", f"{POOL}/{volume_id}", "--size", "64M")
    ceph.rbd("create", f"{POOL}/somebodys", "--size", "64M")
    driver = make_rbd()
    assert [(found.volume_id, found.whole) for found in driver.list()] == [(volume_id, False)]
    driver.create(spec(volume_id=volume_id))
    assert [(found.whole, dict(found.mark)) for found in driver.list()] == [(True, {"name": "data"})]


@pytest.mark.parametrize("size", [0, 2**62])
def test_sizes_that_cannot_be(make_rbd: MakeRbd, size: int) -> None:
    with pytest.raises(OutOfRange):
        make_rbd().create(spec(size))


def test_a_file_system_grows_in_use_and_gives_room_back(make_rbd: MakeRbd, tmp_path: Path) -> None:
    driver = make_rbd()
    handle = driver.create(spec(400 * MIB)).handle
    device = driver.map(handle)
    sh("mkfs.xfs", "-q", device)
    driver.host.mount(device, tmp_path, fstype="xfs")
    try:
        driver.expand(handle, 600 * MIB)
        sh("xfs_growfs", tmp_path)
        assert os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize > 500 * MIB
        with (tmp_path / "file").open("wb") as file:
            file.write(os.urandom(80 * MIB))
            os.fsync(file.fileno())
        full = driver.inspect(handle).used or 0
        (tmp_path / "file").unlink()

        def smaller() -> bool:
            sh("fstrim", tmp_path)
            return (driver.inspect(handle).used or 0) < full - 40 * MIB

        wait_until(smaller, timeout=60)
    finally:
        driver.host.unmount(tmp_path)
        driver.unmap(handle)


# Copies
def test_a_parent_that_is_deleted_goes_when_its_clones_need_it_no_more(ceph: Ceph, make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    parent = driver.create(spec()).handle
    write(driver.map(parent), b"inherited")
    driver.unmap(parent)
    child = driver.clone(parent, spec()).handle
    driver.delete(parent)
    assert driver.find(VolumeId(parent)) is None

    def gone() -> bool:
        driver.probe()
        return parent not in ceph.rbd("trash", "ls", POOL)

    wait_until(gone, timeout=120)
    assert "parent" not in json.loads(ceph.rbd("info", f"{POOL}/{child}", "--format", "json"))
    assert driver.map(child).open("rb").read(9) == b"inherited"


def test_what_cannot_be_removed_from_the_trash_keeps_nothing_else_there(
    ceph: Ceph, make_rbd: MakeRbd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The data of the first lie in a pool that the user may not write to."""
    ceph.make_pool("data")
    denied, free = sorted(new_volume_id() for _ in range(2))
    (tmp_path / "data").write_bytes(os.urandom(MIB))
    ceph.rbd("import", str(tmp_path / "data"), f"{POOL}/{denied}", "--data-pool", "data")
    ceph.rbd("create", f"{POOL}/{free}", "--size", "64M")
    for image in (denied, free):
        ceph.rbd("trash", "mv", f"{POOL}/{image}")
    make_rbd().probe()
    left = ceph.rbd("trash", "ls", POOL).split()
    assert denied in left
    assert free not in left
    assert f"{denied}: " in caplog.text
    ceph.rbd("trash", "rm", f"{POOL}/{left[left.index(denied) - 1]}", "--force")


class Killed(BaseException):
    """Raised at a crash point: nothing is cleaned up behind it."""


@pytest.mark.parametrize("undone", [True, False], ids=["undone", "finished"])
@pytest.mark.parametrize("point", ["ceph-rbd.clone.snapshot", "ceph-rbd.clone.made"])
def test_a_clone_that_was_cut_short(
    ceph: Ceph, make_rbd: MakeRbd, monkeypatch: pytest.MonkeyPatch, point: str, undone: bool
) -> None:
    driver = make_rbd()
    source = driver.create(spec()).handle
    write(driver.map(source), b"copied")
    driver.unmap(source)
    wanted = spec(96 * MIB)

    def kill(name: str) -> None:
        if name == point:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(crash, "point", kill)
        with pytest.raises(Killed):
            driver.clone(source, wanted)
    again = make_rbd()
    if undone:
        left = again.find(wanted.id)
        assert (left is not None) == (point == "ceph-rbd.clone.made")
        if left is not None:
            again.delete(left)
    else:
        made = again.clone(source, wanted)
        assert made.size == 96 * MIB
        assert again.map(made.handle).open("rb").read(6) == b"copied"
        again.unmap(made.handle)
        again.delete(made.handle)
    again.delete(source)
    assert ceph.rbd("ls", POOL) == ""
    assert source not in ceph.rbd("trash", "ls", POOL)


_LOOK_OFTEN = """
import json, os, sys, time
from volumed_drivers.ceph_worker import Connection
from volumed_drivers.rbd_watchers import opened

hello, pool, image, snapshot = json.loads(sys.stdin.readline())
connection, ends = Connection(hello), time.monotonic() + 10
while time.monotonic() < ends:
    with opened(connection, (pool, ""), image, snapshot=snapshot) as found:
        assert found.size() == 64 << 20
os._exit(0)
"""


def test_looking_at_a_snapshot_often_neither_hangs_nor_kills_a_worker(ceph: Ceph, make_rbd: MakeRbd) -> None:
    """librbd does both to who opens an image at a snapshot and soon closes it, one time in some hundred when the
    machine is busy. So this looks some thousand times, from several processes at once."""
    driver = make_rbd()
    handle = driver.create(spec()).handle
    name = driver.snapshot(handle, new_snapshot_id()).partition("@")[2]
    user = {"user": driver._options.user, "key": driver._cluster.key()}
    hello = {"conf": str(ceph.conf), **user, "settings": {}, "timeout": CEPH_PATIENCE}
    asked = json.dumps([hello, POOL, handle, name])
    argv, pipe = [sys.executable, "-c", _LOOK_OFTEN], subprocess.PIPE
    looking = [subprocess.Popen(argv, stdin=pipe, stderr=pipe, text=True) for _ in range(6)]
    try:
        for process in looking:
            assert process.stdin is not None
            process.stdin.write(f"{asked}\n")
            process.stdin.flush()
        said = [process.communicate(timeout=CEPH_PATIENCE)[1] for process in looking]
    finally:
        for process in looking:
            process.kill()
    assert [process.returncode for process in looking] == [0] * len(looking), said


def test_a_snapshot_that_is_gone_is_named(make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    handle = driver.create(spec()).handle
    gone = Handle(f"{handle}@{new_snapshot_id()}")
    with pytest.raises(NotFound, match=f"snapshot {gone.partition('@')[2]} of image rbd/{handle} is gone"):
        driver.restore(handle, gone)
    with pytest.raises(NotFound, match=f"image rbd/{handle[:-1]}. is gone"):
        driver.delete(handle)
        driver.restore(handle, gone)


def test_changed_blocks(make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    handle = driver.create(spec()).handle
    device = driver.map(handle)
    write(device, b"a" * MIB, at=8 * MIB)
    base = driver.snapshot(handle, new_snapshot_id())
    write(device, b"b" * MIB, at=32 * MIB)
    target = driver.snapshot(handle, new_snapshot_id())
    assert list(driver.allocated(base)) == [Extent(8 * MIB, MIB)]
    assert list(driver.allocated(target)) == [Extent(8 * MIB, MIB), Extent(32 * MIB, MIB)]
    assert list(driver.changed(base, target)) == [Extent(32 * MIB, MIB)]
    assert list(driver.changed(target, target)) == []


def test_an_image_that_somebody_made_becomes_a_volume(ceph: Ceph, make_rbd: MakeRbd) -> None:
    ceph.rbd("create", f"{POOL}/theirs", "--size", "64M")
    driver = make_rbd()
    assert list(driver.importable()) == ["theirs"]
    wanted = spec()
    for _ in range(2):
        assert driver.adopt("theirs", wanted._replace(size=None)) == (Handle(wanted.id), 64 * MIB)
    assert [found.volume_id for found in driver.list()] == [wanted.id]
    assert list(driver.importable()) == []
    with pytest.raises(NotFound, match="image rbd/nonesuch is gone"):
        driver.adopt("nonesuch", spec())


# One node at a time
def test_another_node_is_refused_and_told_who_has_it(make_rbd: MakeRbd) -> None:
    here, there = make_rbd(node="here"), make_rbd(node="there")
    handle = here.create(spec()).handle
    here.map(handle)
    with pytest.raises(InUse, match=r"image rbd/v.*is mapped by: node here \(client\.\d+ at 127\.0\.0\.1:0/\d+\)"):
        there.map(handle)
    with pytest.raises(InUse, match="is mapped by: node here"):
        there.delete(handle)
    assert there.mapped(handle) is None
    assert there.mappings() == {}
    here.unmap(handle)
    there.map(handle)
    assert [(holder.node, holder.ours) for holder in there.holders(handle)] == [("there", True)]
    assert [(holder.node, holder.ours) for holder in here.holders(handle)] == [("there", False)]


def test_one_that_was_mapped_by_hand_is_seen(ceph: Ceph, make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    handle = driver.create(spec()).handle
    by_hand = subprocess.Popen(
        ["rbd", "-c", ceph.conf, "watch", f"{POOL}/{handle}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert by_hand.stdout is not None
        assert "press enter" in by_hand.stdout.readline()
        with pytest.raises(InUse, match=r"is mapped by: \(client\.\d+ at"):
            driver.map(handle)
    finally:
        by_hand.communicate("\n", timeout=30)
    driver.map(handle)


def test_only_one_of_many_nodes_that_come_at_once_gets_it(make_rbd: MakeRbd) -> None:
    nodes = [make_rbd(node=f"node-{number}") for number in range(4)]
    handle = nodes[0].create(spec()).handle
    for node in nodes:
        node.probe()  # so that they come at the same time, each with a connection that is there

    def take(driver: CephRbdDriver) -> bool:
        try:
            driver.map(handle)
        except InUse:
            return False
        return True

    with ThreadPoolExecutor(len(nodes)) as pool:
        got = list(pool.map(take, nodes))
    assert sum(got) == 1
    assert [node.mapped(handle) is not None for node in nodes] == got


def test_one_that_is_fenced_writes_no_more(make_rbd: MakeRbd) -> None:
    old, new = make_rbd(node="old"), make_rbd(node="new")
    handle, other = old.create(spec()).handle, old.create(spec()).handle
    device, unharmed = old.map(handle), old.map(other)
    write(device, b"before")
    (holder,) = new.holders(handle)
    new.fence(handle, holder)
    new.fence(handle, holder)
    with pytest.raises(OSError):
        write(device, b"behind")
    write(unharmed, b"goes on")  # of the same machine: a client of its own
    assert new.map(handle).open("rb").read(6) == b"before"
    with pytest.raises(OSError):
        write(device, b"behind")
    new.unmap(handle)
    assert new.map(handle).open("rb").read(6) == b"before"


def test_nobody_fences_itself_nor_a_whole_machine(make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    handle = driver.create(spec()).handle
    device = driver.map(handle)
    (holder,) = driver.holders(handle)
    with pytest.raises(InvalidRequest, match="is this very node"):
        driver.fence(handle, holder)
    for address in ("127.0.0.1", "127.0.0.1:0/0", "127.0.0.1:6800"):
        with pytest.raises(InvalidRequest, match="names no single client"):
            driver.fence(handle, holder._replace(id=address, ours=False))
    write(device, b"goes on")


# Helpers
def test_a_device_whose_process_was_killed_is_made_anew(make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    handle = driver.create(spec()).handle
    device = driver.map(handle)
    write(device, b"kept")
    (helper,) = driver.host.helpers("rbd-qsd-")
    os.kill(helper.pid, signal.SIGKILL)
    wait_until(lambda: driver.mapped(handle) is None)
    assert driver.mappings() == {}
    (holder,) = driver.holders(handle)  # the cluster believes for half a minute that it lives
    assert not holder.ours
    with pytest.raises(InUse, match="is mapped by: node here"):
        make_rbd(node="there").map(handle)
    assert driver.map(handle).open("rb").read(4) == b"kept"
    assert len(driver.host.helpers("rbd-qsd-")) == 1
    driver.unmap(handle)
    assert not any("nodes-" in entry.target.as_posix() for entry in driver.host.mounts())


def test_the_key_is_nowhere_to_be_read(make_rbd: MakeRbd, rbd_key: Path) -> None:
    driver, key = make_rbd(), rbd_key.read_text()
    driver.map(driver.create(spec()).handle)
    (helper,) = driver.host.helpers("rbd-qsd-")
    runtime = driver.host.private_folder("any").parents[1]
    assert subprocess.run(["grep", "-rqF", key, runtime], check=False).returncode == 1
    assert pids_with(key) == []
    assert key not in str(driver.probe())
    assert helper.running
