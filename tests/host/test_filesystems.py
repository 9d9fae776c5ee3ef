"""File systems on real devices: made, checked after an unclean end, grown, and refused when they are not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh
from volumed.errors import IntegrityError, InvalidRequest
from volumed.host import filesystems, loop
from volumed.host.linux import LinuxHost
from volumed.units import MIB

pytestmark = pytest.mark.root

SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}


@pytest.fixture(params=filesystems.NAMES)
def kind(request: pytest.FixtureRequest) -> filesystems.Filesystem:
    return filesystems.get(request.param)


@pytest.fixture
def image(tmp_path: Path, kind: filesystems.Filesystem) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZES[kind.name])
    return path


@pytest.fixture
def device(image: Path) -> Iterator[Path]:
    attached = loop.attach(image, direct_io=True, readonly=False)
    yield attached
    loop.detach(attached)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def uuid(device: Path) -> str:
    return sh("blkid", "-p", "-s", "UUID", "-o", "value", device)


def test_made_checked_and_mounted(kind: filesystems.Filesystem, device: Path, target: Path, host: LinuxHost) -> None:
    kind.mkfs(host, device, options=())
    kind.check(host, device)
    host.mount(device, target, fstype=kind.name, options=kind.mount_options)
    (target / "file").write_text("kept")
    host.unmount(target)
    kind.check(host, device)


def test_after_an_unclean_end(
    kind: filesystems.Filesystem, device: Path, image: Path, target: Path, host: LinuxHost, tmp_path: Path
) -> None:
    """A copy of the disk while it is written to is what a power cut leaves."""
    kind.mkfs(host, device, options=())
    host.mount(device, target, fstype=kind.name, options=kind.mount_options)
    with (target / "file").open("w") as file:
        file.write("synced")
        file.flush()
        os.fsync(file.fileno())
    crashed = Path(shutil.copy(image, tmp_path / "crashed"))
    host.unmount(target)
    other = loop.attach(crashed, direct_io=True, readonly=False)
    try:
        kind.check(host, other)
        host.mount(other, target, fstype=kind.name, options=kind.mount_options)
        assert (target / "file").read_text() == "synced"
        host.unmount(target)
    finally:
        loop.detach(other)


def test_what_was_not_made_there_is_refused_and_left_alone(
    kind: filesystems.Filesystem, device: Path, host: LinuxHost
) -> None:
    with device.open("r+b", buffering=0) as opened:
        opened.write(b"somebody's data!" * 4096)
        os.fsync(opened)
    before = device.open("rb").read(MIB)
    with pytest.raises(IntegrityError, match=f"does not hold the {kind.name} that was made on it"):
        kind.check(host, device)
    assert device.open("rb").read(MIB) == before


def test_a_copy_gets_an_identity_and_a_size_of_its_own(
    kind: filesystems.Filesystem, device: Path, image: Path, target: Path, host: LinuxHost, tmp_path: Path
) -> None:
    kind.mkfs(host, device, options=())
    copied = Path(shutil.copy(image, tmp_path / "copied"))
    os.truncate(copied, SIZES[kind.name] + 64 * MIB)
    other = loop.attach(copied, direct_io=True, readonly=False)
    second = tmp_path / "second"
    second.mkdir()
    try:
        kind.renew(host, other)
        assert uuid(device) != uuid(other)
        host.mount(device, target, fstype=kind.name, options=kind.mount_options)
        host.mount(other, second, fstype=kind.name, options=kind.mount_options)  # beside its original
        kind.grow(host, other, second)
        room = os.statvfs(second).f_blocks - os.statvfs(target).f_blocks
        assert room * os.statvfs(second).f_frsize > 48 * MIB
        host.unmount(second)
        host.unmount(target)
    finally:
        loop.detach(other)


def test_a_device_in_use_elsewhere_is_not_repaired(device: Path, target: Path, host: LinuxHost) -> None:
    """It looks unclean because it is mounted, perhaps in a container's namespace alone."""
    ext4 = filesystems.get("ext4")
    ext4.mkfs(host, device, options=())
    host.mount(device, target, fstype="ext4")
    try:
        (target / "file").write_text("x")
        ext4.check(host, device)
    finally:
        host.unmount(target)


def test_damage_that_only_a_person_may_repair(device: Path, host: LinuxHost) -> None:
    ext4 = filesystems.get("ext4")
    ext4.mkfs(host, device, options=())
    sh("debugfs", "-w", "-R", "clri <2>", device)  # no root directory any more
    sh("debugfs", "-w", "-R", "ssv state 2", device)  # and the file system knows that it has errors
    with pytest.raises(IntegrityError, match="(?s)cannot repair it by itself.*take a copy"):
        ext4.check(host, device)


def test_options_that_mkfs_refuses(kind: filesystems.Filesystem, device: Path, host: LinuxHost) -> None:
    with pytest.raises(InvalidRequest, match="refused"):
        kind.mkfs(host, device, options=("--nonsense",))
