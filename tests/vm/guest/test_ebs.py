"""Runs inside the machine: `ebs` on disks that are really plugged in and pulled, EC2 being on the host."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.conftest import sh
from volumed.driver import Driver, VolumeSpec
from volumed.host.linux import LinuxHost
from volumed.model import VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import GIB
from volumed_drivers.ebs import EbsDriver, EbsOptions, disks

EC2 = os.environ.get("VOLUMED_EC2", "")


def make(owner: str = "") -> EbsDriver:
    options = EbsOptions(
        endpoint=EC2, metadata_endpoint=EC2, access_key="env:EC2_KEY", secret_key="env:EC2_SECRET", owner=owner
    )
    return EbsDriver("cloud", options, LinuxHost())


@pytest.fixture(autouse=True)
def _nothing_between_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(disks, "SETTLED", 2.0)  # nothing that EC2 shows here is stale
    yield
    driver = make()
    for found in list(driver.list()):
        driver.unmap(found.handle)
        driver.delete(found.handle)
    for snapshot in list(driver.list_snapshots()):
        driver.delete_snapshot(snapshot.handle)


class TestEbsDriver(DriverConformance):
    size: ClassVar[int] = 2 * GIB  # half of it can be made, too

    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        return make

    def make_stranger(self, driver: Driver, name: str) -> str:
        """A volume of another ledger's, which then forgets it."""
        other = make("somebody else")
        _, handle = self._create(other)
        self._write(other, handle, b"old")
        disk = other._disks.current(handle)
        other._ec2.call("delete_tags", Resources=[disk.id], Tags=[{"Key": key} for key in disk.tags])
        return disk.id


def test_a_nitro_instances_disk_is_found_by_its_serial_and_its_partition_is_not() -> None:
    driver = make()
    handle = driver.create(VolumeSpec(new_volume_id(), GIB, VolumeMode.BLOCK, driver.VolumeOptions())).handle
    device = driver.map(handle)
    assert device.name.startswith("nvme")
    one_partition = bytes(446) + struct.pack("<8B2I", 0, 0, 0, 0, 0x83, 0, 0, 0, 2048, 131072) + bytes(48) + b"\x55\xaa"
    device.write_bytes(one_partition)
    sh("blockdev", "--rereadpt", device)
    sh("udevadm", "settle")
    assert Path(f"{device}p1").is_block_device()
    assert make().mapped(handle) == driver.map(handle) == device
    driver.unmap(handle)
    assert not device.exists()
