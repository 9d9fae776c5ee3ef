"""Runs inside the machine: `lvm` on a real thin pool, under the suite that all drivers pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh
from volumed.driver import Capability, Driver, VolumeSpec
from volumed.errors import BackendUnavailable, CapacityExhausted
from volumed.host.linux import LinuxHost
from volumed.model import VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver, _write_device
from volumed.units import MIB
from volumed_drivers.lvm import LvmDriver, LvmOptions

DISK = os.environ.get("VOLUMED_DISK", "")


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    # Neither is what is tested, and both are slow on an emulated machine.
    Path("/etc/lvm/lvmlocal.conf").write_text("backup { backup=0 archive=0 }\nactivation { monitoring=0 }\n")
    sh("vgcreate", "-q", "vg0", DISK)
    sh("lvcreate", "-q", "--type", "thin-pool", "-L", "512m", "-n", "pool", "vg0")
    # With one volume active the pool stays, and is not checked anew by each that comes and goes. By its name it is one
    # of volumed's, so that nothing is importable.
    sh("lvcreate", "-q", "-y", "-V", "4m", "--thinpool", "vg0/pool", "-n", f"s{'0' * 32}")
    yield "vg0"
    sh("vgremove", "-ff", "-y", "-q", "vg0")


@pytest.fixture(autouse=True)
def _nothing_between_tests(group: str) -> Iterator[None]:
    yield
    names = sh("lvs", "--noheadings", "-o", "lv_name", "@volumed").split()
    if names:
        sh("lvremove", "-ff", "-y", "-q", *(f"{group}/{name}" for name in names))


class TestLvmDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self, group: str) -> MakeDriver:
        return lambda: LvmDriver("thin", LvmOptions(vg=group, thinpool="pool"), LinuxHost())

    def make_stranger(self, driver: Driver, name: str) -> None:
        sh("lvcreate", "-q", "-y", "-V", "16m", "--thinpool", "vg0/pool", "-n", name)
        _write_device(Path("/dev/vg0") / name, b"old")


def make(group: str, pool: str = "pool", full_at: float = 95) -> LvmDriver:
    return LvmDriver("thin", LvmOptions(vg=group, thinpool=pool, full_at=full_at), LinuxHost())


def spec(size: int) -> VolumeSpec:
    return VolumeSpec(new_volume_id(), size, VolumeMode.BLOCK, LvmDriver.VolumeOptions())


def test_what_is_missing_is_said(group: str) -> None:
    with pytest.raises(BackendUnavailable, match="there is no thin pool vg0/puddle.*lvcreate --type thin-pool"):
        make(group, "puddle").probe()
    with pytest.raises(BackendUnavailable, match="nonesuch"):
        make("nonesuch").probe()


def test_live_copies_can_be_had(group: str) -> None:
    found = make(group).probe()
    assert found.lacking == {}
    assert Capability.SNAPSHOT_LIVE in LvmDriver.all_capabilities()


def test_others_volumes_are_neither_listed_nor_touched(group: str) -> None:
    sh("lvcreate", "-q", "-y", "-V", "16m", "--thinpool", f"{group}/pool", "-n", "somebodys")
    driver = make(group)
    assert list(driver.list()) == []
    assert driver.mappings() == {}
    sh("lvremove", "-y", "-q", f"{group}/somebodys")


def test_a_pool_that_is_full_takes_no_more(group: str) -> None:
    driver = make(group, full_at=1)
    handle = driver.create(spec(64 * MIB)).handle
    device = driver.map(handle)
    with device.open("r+b", buffering=0) as opened:
        for _ in range(16):
            opened.write(os.urandom(MIB))
        os.fsync(opened)
    driver.unmap(handle)
    with pytest.raises(CapacityExhausted, match="vg0/pool is full.*lvextend"):
        driver.create(spec(16 * MIB))


def test_a_volume_is_thin(group: str) -> None:
    driver = make(group)
    handle = driver.create(spec(4096 * MIB)).handle
    assert driver.inspect(handle).size == 4096 * MIB
    assert (driver.inspect(handle).used or 0) < MIB
    driver.delete(handle)


def test_devices_are_found_by_name_after_a_restart(group: str) -> None:
    driver = make(group)
    handle = driver.create(spec(16 * MIB)).handle
    device = driver.map(handle)
    assert make(group).mapped(handle) == device == Path("/dev/vg0") / handle
    driver.unmap(handle)
