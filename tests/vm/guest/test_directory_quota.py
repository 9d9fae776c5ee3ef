"""Runs inside the machine: `directory` on an XFS with project quotas, where sizes are enforced, for root as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh
from volumed.driver import Capability, VolumeSpec
from volumed.host.linux import LinuxHost
from volumed.model import VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.directory import DirectoryDriver, DirectoryOptions

DISK = os.environ.get("VOLUMED_DISK", "")
MOUNT = Path("/mnt/quota")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    sh("mkfs.xfs", "-q", "-f", DISK)
    MOUNT.mkdir(exist_ok=True)
    sh("mount", "-o", "prjquota", DISK, MOUNT)
    yield MOUNT / "volumes"
    sh("umount", MOUNT)


@pytest.fixture(autouse=True)
def _nothing_between_tests(folder: Path) -> Iterator[None]:
    yield
    driver = make(folder)
    for found in list(driver.list()):
        driver.delete(found.handle)


def make(folder: Path) -> DirectoryDriver:
    driver = DirectoryDriver("folders", DirectoryOptions(path=folder), LinuxHost())
    driver.probe()
    return driver


class TestDirectoryDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self, folder: Path) -> MakeDriver:
        return lambda: DirectoryDriver("folders", DirectoryOptions(path=folder), LinuxHost())


def test_sizes_are_not_lacking(folder: Path) -> None:
    assert set(make(folder).probe().lacking) == {Capability.MULTI_NODE}


def test_used_is_what_was_written(folder: Path) -> None:
    driver = make(folder)
    handle = driver.create(VolumeSpec(new_volume_id(), 64 * MIB, VolumeMode.FILESYSTEM, driver.VolumeOptions())).handle
    (folder / handle / "data" / "file").write_bytes(os.urandom(8 * MIB))
    os.sync()
    assert 8 * MIB <= (driver.inspect(handle).used or 0) <= 9 * MIB


def test_a_volumes_quota_goes_with_it(folder: Path) -> None:
    driver = make(folder)
    handle = driver.create(VolumeSpec(new_volume_id(), 64 * MIB, VolumeMode.FILESYSTEM, driver.VolumeOptions())).handle
    project = int((folder / handle / "project").read_text())
    assert driver.host.project_limit(folder, project=project) == 64 * MIB
    driver.delete(handle)
    assert driver.host.project_limit(folder, project=project) == 0


def test_df_inside_shows_the_volumes_size(folder: Path) -> None:
    driver = make(folder)
    handle = driver.create(VolumeSpec(new_volume_id(), 64 * MIB, VolumeMode.FILESYSTEM, driver.VolumeOptions())).handle
    room = os.statvfs(folder / handle / "data")
    assert room.f_blocks * room.f_frsize == 64 * MIB
