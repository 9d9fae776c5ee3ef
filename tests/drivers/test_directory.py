"""`directory` on a file system without project quotas. With them: tests/vm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, sh
from volumed.driver import Capability, Driver, VolumeSpec
from volumed.errors import BackendUnavailable, NotSupported
from volumed.host.linux import LinuxHost
from volumed.model import VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed_drivers.directory import DirectoryDriver, DirectoryOptions

pytestmark = pytest.mark.root


def make(path: Path) -> DirectoryDriver:
    driver = DirectoryDriver("folders", DirectoryOptions(path=path), LinuxHost())
    driver.probe()
    return driver


class TestDirectoryDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self, tmp_path: Path) -> MakeDriver:
        return lambda: DirectoryDriver("folders", DirectoryOptions(path=tmp_path / "volumes"), LinuxHost())

    def make_stranger(self, driver: Driver, name: str) -> None:
        assert isinstance(driver, DirectoryDriver)
        folder = driver._path / name
        folder.mkdir()
        (folder / "file").write_bytes(b"old")


def spec(size: int | None = None) -> VolumeSpec:
    return VolumeSpec(new_volume_id(), size, VolumeMode.FILESYSTEM, DirectoryDriver.VolumeOptions())


def test_a_size_is_refused_with_the_reason_and_the_alternative(tmp_path: Path) -> None:
    driver = make(tmp_path)
    assert "prjquota" in driver.probe().lacking[Capability.SIZE]
    with pytest.raises(NotSupported, match="driver image or btrfs"):
        driver.create(spec(1 << 30))
    assert list(driver.list()) == []


def test_a_full_volume_is_removed_with_all_it_holds(tmp_path: Path) -> None:
    driver = make(tmp_path)
    handle = driver.create(spec()).handle
    deep = tmp_path / handle / "data"
    for _ in range(50):
        deep = deep / ("d" * 60)
        deep.mkdir()
        (deep / "file").write_text("x")
    driver.delete(handle)
    assert list(tmp_path.iterdir()) == []


def test_what_is_immutable_is_removed_as_well(make_filesystem: MakeFilesystem) -> None:
    path = make_filesystem("ext4", size=64 << 20) / "volumes"
    driver = make(path)
    handle = driver.create(spec()).handle
    (path / handle / "data" / "frozen").mkdir()
    (path / handle / "data" / "frozen" / "file").write_text("x")
    (path / handle / "data" / "link").symlink_to("frozen")
    sh("chattr", "-R", "+i", path / handle / "data" / "frozen")
    driver.delete(handle)
    assert list(path.iterdir()) == []


def test_what_is_not_ours_is_neither_listed_nor_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "vvvv").write_text("not a volume")
    assert list(make(tmp_path).list()) == []


def test_nobody_but_root_reaches_the_data_through_the_backends_folder(tmp_path: Path) -> None:
    driver = make(tmp_path / "volumes")
    handle = driver.create(spec()).handle
    assert (tmp_path / "volumes" / handle).stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailable, match="backend folders: .*file/volumes cannot be made: Not a directory"):
        make(tmp_path / "file" / "volumes")
