"""Runs inside the machine: `cephfs` by the kernel's client, on the cluster of the host."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from volumed.driver import VolumeSpec, Worker
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.cephfs import CephFsDriver, CephFsOptions

KEY = Path("/root/ceph.key")
# A Python that loads librados is slow to start on an emulated machine.
_workers: list[Worker] = []


def make() -> CephFsDriver:
    options = CephFsOptions.model_validate(
        {
            "monitors": os.environ.get("VOLUMED_MONITORS", ""),
            "conf": "/nonexistent",
            "filesystem": "files",
            "user": "files",
            "key": f"file:{KEY}",
            "mount-with": "kernel",
            "timeout": 60,
        }
    )
    driver = CephFsDriver("files", options, LinuxHost())
    driver._cluster._idle = _workers
    return driver


@pytest.fixture(autouse=True)
def _nothing_between_tests() -> Iterator[None]:
    yield
    driver = make()
    for volume in driver.list():
        driver.delete(volume.handle)


class TestConformance(DriverConformance):
    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        return make


def created(driver: CephFsDriver) -> Handle:
    driver.probe()
    spec = VolumeSpec(new_volume_id(), 16 * MIB, VolumeMode.FILESYSTEM, driver.VolumeOptions())
    return driver.create(spec).handle


def test_the_key_is_nowhere_to_be_read(tmp_path: Path) -> None:
    driver = make()
    handle = created(driver)
    driver.mount(handle, tmp_path, options=("noatime",), readonly=False)
    try:
        key = KEY.read_text().strip()
        assert key not in Path("/proc/self/mountinfo").read_text()
        for root in ("/sys/kernel/debug/ceph", "/run/volumed"):
            assert subprocess.run(["grep", "-rqsF", key, root], check=False).returncode != 0
        (entry,) = [entry for entry in driver.host.mounts() if entry.target == tmp_path]
        assert entry.fstype == "ceph"
        assert "noatime" in entry.options
    finally:
        driver.unmount(handle, tmp_path)


def test_a_quota_binds_the_kernel_and_cannot_be_lifted(tmp_path: Path) -> None:
    driver = make()
    handle = created(driver)
    driver.mount(handle, tmp_path, options=(), readonly=False)
    try:
        with pytest.raises(PermissionError):
            os.setxattr(tmp_path, "ceph.quota.max_bytes", b"0")
        with pytest.raises(OSError) as full, (tmp_path / "file").open("wb", buffering=0) as file:
            for _ in range(64):
                file.write(bytes(MIB))
                os.fsync(file)
        assert full.value.errno == errno.EDQUOT
    finally:
        driver.unmount(handle, tmp_path)
