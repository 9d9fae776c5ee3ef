"""Runs inside the machine: `ceph-rbd` with what only a kernel has, krbd and rbd-nbd, on the cluster of the host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh
from tests.harness.processes import pids_with
from volumed.driver import VolumeSpec, Worker
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.ceph_rbd import CephRbdDriver, RbdOptions, RbdVolumeOptions

MONITORS = os.environ.get("VOLUMED_MONITORS", "")
KEY = Path("/root/ceph.key")
METHOD = os.environ.get("VOLUMED_MAP_WITH", "auto")
# A Python that loads librbd is slow to start on an emulated machine.
_workers: list[Worker] = []


def make() -> CephRbdDriver:
    options = RbdOptions.model_validate(
        {
            "monitors": MONITORS,
            "conf": "/nonexistent",
            "pool": "rbd",
            "key": f"file:{KEY}",
            "map-with": METHOD,
            "timeout": 60,
        }
    )
    driver = CephRbdDriver("ceph", options, LinuxHost())
    driver._cluster._idle = _workers
    return driver


@pytest.fixture(autouse=True)
def _nothing_between_tests() -> Iterator[None]:
    yield
    driver = make()
    for volume_id in driver.mappings():
        driver.unmap(Handle(volume_id))
    for found in driver.list_snapshots():
        driver.delete_snapshot(found.handle)
    for volume in driver.list():
        driver.delete(volume.handle)


class TestConformance(DriverConformance):
    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        return make


def _created(driver: CephRbdDriver) -> Handle:
    return driver.create(VolumeSpec(new_volume_id(), 64 * MIB, VolumeMode.BLOCK, RbdVolumeOptions())).handle


def test_the_best_way_is_found() -> None:
    facts = make().probe().facts
    assert facts["map-with"] == ("krbd" if METHOD == "auto" else METHOD)


def test_the_key_is_nowhere_to_be_read() -> None:
    driver = make()
    device = driver.map(_created(driver))
    key = KEY.read_text().strip()
    for root in ("/sys/bus/rbd/devices", "/run/volumed"):
        assert subprocess.run(["grep", "-rqF", key, root], check=False).returncode != 0, root
    assert pids_with(key) == []
    assert device.is_block_device()


def test_a_file_system_grows_in_use(tmp_path: Path) -> None:
    driver = make()
    handle = _created(driver)
    device = driver.map(handle)
    sh("mkfs.ext4", "-q", device)
    driver.host.mount(device, tmp_path, fstype="ext4")
    try:
        driver.expand(handle, 128 * MIB)
        sh("resize2fs", device)
        assert os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize > 100 * MIB
        (tmp_path / "file").write_bytes(os.urandom(80 * MIB))
    finally:
        driver.host.unmount(tmp_path)


def test_discard_gives_room_back() -> None:
    """Of whole objects, which is what is counted. A discard that a file system splits elsewhere frees their insides."""
    driver = make()
    handle = _created(driver)
    device = driver.map(handle)
    with device.open("r+b") as opened:
        opened.write(os.urandom(32 * MIB))
        opened.flush()
        os.fsync(opened)
    assert driver.inspect(handle).used == 32 * MIB
    sh("blkdiscard", device)
    assert driver.inspect(handle).used == 0
