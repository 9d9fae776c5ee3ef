"""`btrfs` on a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, sh
from volumed.driver import Driver, VolumeSpec
from volumed.errors import BackendUnavailable, OutOfRange
from volumed.host.linux import LinuxHost
from volumed.model import VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.btrfs import BtrfsDriver, BtrfsOptions

pytestmark = pytest.mark.root


class TestBtrfsDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self, make_filesystem: MakeFilesystem) -> MakeDriver:
        path = make_filesystem("btrfs")
        return lambda: BtrfsDriver("tree", BtrfsOptions(path=path / "volumes"), LinuxHost())

    def make_stranger(self, driver: Driver, name: str) -> None:
        assert isinstance(driver, BtrfsDriver)
        sh("btrfs", "subvolume", "create", driver._path / name)
        (driver._path / name / "file").write_bytes(b"old")


@pytest.fixture
def driver(make_filesystem: MakeFilesystem) -> BtrfsDriver:
    made = BtrfsDriver("tree", BtrfsOptions(path=make_filesystem("btrfs") / "volumes"), LinuxHost())
    made.probe()
    return made


def spec(size: int | None) -> VolumeSpec:
    return VolumeSpec(new_volume_id(), size, VolumeMode.FILESYSTEM, BtrfsDriver.VolumeOptions())


def test_another_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="not on btrfs"):
        BtrfsDriver("tree", BtrfsOptions(path=tmp_path), LinuxHost()).probe()


def test_a_size_too_small_for_a_qgroup_is_refused(driver: BtrfsDriver) -> None:
    with pytest.raises(OutOfRange, match="too small"):
        driver.create(spec(1))
    assert list(driver.list()) == []


def test_subvolumes_that_a_container_made_inside_go_with_the_volume(driver: BtrfsDriver) -> None:
    handle = driver.create(spec(None)).handle
    inside = driver._path / handle
    sh("btrfs", "subvolume", "create", inside / "outer")
    sh("btrfs", "subvolume", "create", inside / "outer" / "inner one")
    driver.delete(handle)
    assert list(driver.list()) == []


def test_no_qgroup_is_left_behind(driver: BtrfsDriver) -> None:
    before = sh("btrfs", "qgroup", "show", "--raw", driver._path).splitlines()
    for _ in range(3):
        driver.delete(driver.create(spec(16 * MIB)).handle)
    sh("btrfs", "filesystem", "sync", driver._path)
    assert len(sh("btrfs", "qgroup", "show", "--raw", driver._path).splitlines()) == len(before)


def test_used_is_what_was_written(driver: BtrfsDriver) -> None:
    handle = driver.create(spec(64 * MIB)).handle
    (driver._path / handle / "file").write_bytes(b"x" * 8 * MIB)
    sh("btrfs", "filesystem", "sync", driver._path)
    assert 8 * MIB <= (driver.inspect(handle).used or 0) <= 12 * MIB
