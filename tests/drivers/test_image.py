"""`image` on file systems that can share data between files and on one that cannot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, fill_disk, sh, wait_until
from volumed.driver import Capability, Driver, VolumeSpec
from volumed.errors import CapacityExhausted, NotSupported, OutOfRange
from volumed.host.linux import LinuxHost
from volumed.model import VolumeId, VolumeMode, new_snapshot_id, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import GIB, MIB
from volumed_drivers.image import ImageDriver, ImageOptions, ImageVolumeOptions

pytestmark = pytest.mark.root


def make(path: Path, *, preallocate: bool = False) -> ImageDriver:
    driver = ImageDriver("files", ImageOptions(path=path, preallocate=preallocate), LinuxHost())
    driver.probe()
    return driver


def spec(size: int, *, preallocate: bool | None = None, volume_id: VolumeId | None = None) -> VolumeSpec:
    options = ImageVolumeOptions(preallocate=preallocate)
    return VolumeSpec(volume_id or new_volume_id(), size, VolumeMode.BLOCK, options)


class ImageConformance(DriverConformance):
    def make_stranger(self, driver: Driver, name: str) -> None:
        assert isinstance(driver, ImageDriver)
        (driver._path / name).write_bytes(b"old".ljust(16 * MIB - 100, b"\0"))  # ends within a block


class TestOnExt4(ImageConformance):
    @pytest.fixture
    def make_driver(self, tmp_path: Path) -> MakeDriver:
        return lambda: ImageDriver("files", ImageOptions(path=tmp_path / "images"), LinuxHost())


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
class TestWithReflinks(ImageConformance):
    @pytest.fixture
    def make_driver(self, make_filesystem: MakeFilesystem, kind: str) -> MakeDriver:
        path = make_filesystem(kind)
        return lambda: ImageDriver("files", ImageOptions(path=path), LinuxHost())

    def test_it_says_so(self, make_driver: MakeDriver) -> None:
        assert make_driver().probe().lacking == {}


def test_live_copies_are_lacking_without_reflinks(tmp_path: Path) -> None:
    live = {Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE, Capability.NATIVE_COPY}
    assert set(make(tmp_path).probe().lacking) == live
    assert list(tmp_path.iterdir()) == []  # the probe leaves nothing


def test_sparse_by_default_and_preallocated_on_request(tmp_path: Path) -> None:
    driver = make(tmp_path)
    assert driver.inspect(driver.create(spec(64 * MIB)).handle).used == 0
    assert (driver.inspect(driver.create(spec(64 * MIB, preallocate=True)).handle).used or 0) >= 64 * MIB
    eager = make(tmp_path, preallocate=True)
    assert (eager.inspect(eager.create(spec(64 * MIB)).handle).used or 0) >= 64 * MIB
    assert eager.inspect(eager.create(spec(64 * MIB, preallocate=False)).handle).used == 0


def test_a_preallocated_volume_that_does_not_fit_is_refused(make_filesystem: MakeFilesystem) -> None:
    driver = make(make_filesystem("ext4", size=64 * MIB))
    with pytest.raises(CapacityExhausted, match="backend files: there is no room for 1073741824 bytes"):
        driver.create(spec(GIB, preallocate=True))
    for found in driver.list():
        driver.delete(found.handle)
    assert list(driver.list()) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_full_disk_is_no_reason_to_call_the_backend_dead(make_filesystem: MakeFilesystem, kind: str) -> None:
    """It can do what it could, serves what it has, and says of a new volume that there is no room."""
    path = make_filesystem(kind, size=320 * MIB)
    driver = make(path / "images")
    lacking, handle = driver.probe().lacking, driver.create(spec(16 * MIB)).handle
    filler = fill_disk(path)
    assert driver.probe().lacking == lacking
    ImageDriver("files", ImageOptions(path=path / "images"), LinuxHost()).probe()  # a daemon that starts just then
    driver.map(handle)
    driver.unmap(handle)
    with pytest.raises(CapacityExhausted, match=r"backend files: (.* is full|there is no room for .*)\. free some"):
        driver.create(spec(16 * MIB))
    filler.unlink()
    assert [found.handle for found in driver.list()] == [handle]  # nothing half made
    sh("sync", "--file-system", path)  # btrfs gives space back with a commit
    wait_until(lambda: driver.capacity().available > MIB, timeout=90)
    driver.create(spec(16 * MIB))


def use_up_files(folder: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        for number in range(10**6):
            (folder / str(number)).touch()


def test_a_disk_without_room_for_one_more_file(make_filesystem: MakeFilesystem, tmp_path: Path) -> None:
    path = make_filesystem("ext4", size=16 * MIB)
    driver = make(path)
    use_up_files(path)
    driver.probe()
    with pytest.raises(CapacityExhausted, match="backend files: there is no room for"):
        driver.create(spec(4 * MIB))
    beside = make(tmp_path / "beside")
    with pytest.raises(CapacityExhausted, match=f"backend files: {path} is full"):
        driver.way_from(beside)
    with pytest.raises(NotSupported, match=f"{path}: whether it shares data with .*beside cannot be tried: No space"):
        beside.way_from(driver)  # by other ways what is there can still leave it


def test_a_daemon_that_starts_on_a_disk_without_room_for_one_more_file(make_filesystem: MakeFilesystem) -> None:
    """Full is not unable."""
    path = make_filesystem("xfs")
    filler = fill_disk(path)
    use_up_files(path)
    driver = ImageDriver("files", ImageOptions(path=path), LinuxHost())
    reasons = set(driver.probe().lacking.values())
    assert reasons == {f"{path} is full: whether it can share data between files will be tried when it has room"}
    filler.unlink()
    assert driver.probe().lacking == {}


def test_a_snapshot_that_finds_no_room_says_so(make_filesystem: MakeFilesystem) -> None:
    """It takes none for its data, but for where that lies, and that is in many places."""
    path = make_filesystem("xfs")
    driver = make(path)
    handle = driver.create(spec(256 * MIB)).handle
    with (path / f"{handle}.img").open("r+b", buffering=0) as image:
        for place in range(0, 256 * MIB, 8192):
            os.pwrite(image.fileno(), b"data", place)
        os.fsync(image.fileno())
    with fill_disk(path).open("r+b") as filler:
        filler.truncate(filler.seek(0, os.SEEK_END) - 256 * 1024)  # enough for one more file
    (path / "one more").touch()
    with pytest.raises(CapacityExhausted, match=f"backend files: there is no room for {256 * MIB} bytes in {path}"):
        driver.snapshot(handle, new_snapshot_id())
    assert list(driver.list_snapshots()) == []


@pytest.mark.parametrize("size", [1, 4095, 2**63 - 1, 17 * 2**40])
def test_sizes_that_cannot_be(tmp_path: Path, size: int) -> None:
    """The last: more than ext4 can hold in one file (16 TiB)."""
    with pytest.raises(OutOfRange):
        make(tmp_path).create(spec(size))


def test_discard_gives_space_back(tmp_path: Path) -> None:
    driver = make(tmp_path)
    handle = driver.create(spec(256 * MIB)).handle
    device = driver.map(handle)
    target = tmp_path / "mounted"
    target.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    driver.host.mount(device, target, fstype="ext4", options=("discard",))
    try:
        with (target / "file").open("wb") as file:
            file.write(os.urandom(100 * MIB))
            os.fsync(file.fileno())
        assert (driver.inspect(handle).used or 0) > 100 * MIB
        (target / "file").unlink()
        os.sync()
        # ext4 discards in the background, once the transaction that freed the blocks is on the disk.
        wait_until(lambda: (driver.inspect(handle).used or 0) < 50 * MIB)
    finally:
        driver.host.unmount(target)
        driver.unmap(handle)


def test_io_bypasses_the_hosts_cache(tmp_path: Path) -> None:
    driver = make(tmp_path)
    device = driver.map(handle := driver.create(spec(16 * MIB)).handle)
    assert Path("/sys/block", device.name, "loop/dio").read_text().strip() == "1"
    driver.unmap(handle)


def test_the_logical_block_never_changes(make_filesystem: MakeFilesystem) -> None:
    """Left to the kernel it grows from 512 to 4096 when the file is first shared, and no XFS on it can be mounted."""
    driver = make(make_filesystem("xfs"))
    handle = driver.create(spec(16 * MIB)).handle
    for _ in range(2):
        device = driver.map(handle)
        assert Path("/sys/block", device.name, "queue/logical_block_size").read_text().strip() == "4096"
        driver.unmap(handle)
        driver.snapshot(handle, new_snapshot_id())


def test_another_file_of_the_same_name_is_another_device(tmp_path: Path) -> None:
    """The device is found by the file's inode: a file put in the place of the volume's does not get its device."""
    driver = make(tmp_path)
    handle = driver.create(spec(16 * MIB)).handle
    device = driver.map(handle)
    image = tmp_path / f"{handle}.img"
    aside = image.rename(tmp_path / "aside")
    image.write_bytes(bytes(16 * MIB))
    assert driver.mapped(handle) is None
    image.unlink()
    aside.rename(image)
    assert driver.mapped(handle) == device
    driver.unmap(handle)


def test_a_copy_that_does_not_fit_is_refused_before_it_fills_the_disk(make_filesystem: MakeFilesystem) -> None:
    path = make_filesystem("ext4", size=128 * MIB)
    driver = make(path)
    handle = driver.create(spec(64 * MIB, preallocate=True)).handle
    (path / "filler").write_bytes(bytes(20 * MIB))
    with pytest.raises(CapacityExhausted, match="a copy needs"):
        driver.snapshot(handle, new_snapshot_id())
    assert list(driver.list_snapshots()) == []


def test_images_are_private(tmp_path: Path) -> None:
    driver = make(tmp_path / "images")
    handle = driver.create(spec(16 * MIB)).handle
    driver.snapshot(handle, new_snapshot_id())
    assert (tmp_path / "images").stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "images").iterdir())
