"""Runs inside the machine: `iscsi` on the kernel's own target (LIO), under the suite that all drivers pass."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.conftest import sh, wait_until
from volumed import context
from volumed.driver import Capability, VolumeSpec
from volumed.errors import (
    AlreadyExists,
    BackendUnavailable,
    CapacityExhausted,
    InUse,
    InvalidRequest,
    NotFound,
    OperationPending,
    OutOfRange,
    PermissionDenied,
)
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.iscsi import IscsiDriver, IscsiOptions, IscsiVolumeOptions, driver

IQN = "iqn.2026-01.org.example:storage"
TARGET = Path("/sys/kernel/config/target")
TPG = TARGET / "iscsi" / IQN / "tpgt_1"
FILES = Path("/root/luns")
CLAIMS = Path("/root/claims")
COUNT = 12


def put(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture(scope="module", autouse=True)
def _storage() -> None:
    """Twelve disks of 16 MiB, at two portals."""
    for module in ("target_core_mod", "target_core_iblock", "iscsi_target_mod", "iscsi_tcp", "dm_multipath"):
        sh("modprobe", module)
    if not TARGET.is_dir():
        sh("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    Path("/etc/iscsi/initiatorname.iscsi").write_text("InitiatorName=iqn.2026-01.org.example:guest\n")
    # Rules that give nothing the driver looks for, and fork several processes for each device: slow where emulated.
    rules = Path("/run/udev/rules.d")
    rules.mkdir(exist_ok=True)
    for name in ("55-scsi-sg3_id", "58-scsi-sg3_symlink", "69-lvm"):
        (rules / f"{name}.rules").symlink_to("/dev/null")
    sh("udevadm", "control", "--reload")
    FILES.mkdir()
    (TPG / "np" / "127.0.0.1:3260").mkdir(parents=True)
    (TPG / "np" / "127.0.0.2:3260").mkdir()
    for number in range(COUNT):
        renew(number)
        disk = TARGET / "core" / "iblock_0" / f"disk{number}"
        disk.mkdir(parents=True)
        put(disk / "control", f"udev_path={loop_of(number)}")
        put(disk / "enable", "1")
        put(disk / "wwn" / "vpd_unit_serial", f"volumed-{number:04}")
        lun = TPG / "lun" / f"lun_{number}"
        lun.mkdir(parents=True)
        (lun / "disk").symlink_to(disk)
    for name, value in (("generate_node_acls", 1), ("demo_mode_write_protect", 0), ("authentication", 0)):
        put(TPG / "attrib" / name, str(value))
    put(TPG / "enable", "1")
    sh("iscsid")
    wait_until(lambda: "@ISCSIADM_ABSTRACT_NAMESPACE" in Path("/proc/net/unix").read_text())


def renew(number: int) -> None:
    file = FILES / f"{number}.img"
    with file.open("wb") as opened:
        opened.truncate(16 * MIB)
    sh("losetup", "--find", file)


def loop_of(number: int) -> str:
    return sh("losetup", "--noheadings", "--output", "NAME", "--associated", FILES / f"{number}.img").strip()


def records() -> list[Path]:
    """Of open-iscsi: of targets, with what it logs in by."""
    return [path for path in Path("/etc/iscsi/nodes").rglob("*") if path.is_file()]


def grow(lun: int, size: int) -> None:
    """As the target's admin does."""
    file = FILES / f"{lun}.img"
    if file.stat().st_size < size:
        os.truncate(file, size)
        sh("losetup", "--set-capacity", loop_of(lun))


def clear(lun: int) -> None:
    """As the target's admin does: quicker than a volume's deletion, which has tests of its own."""
    with (FILES / f"{lun}.img").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(0)
        file.truncate(size)


@pytest.fixture(autouse=True)
def _nothing_between_tests() -> Iterator[None]:
    yield
    made = make()
    for claim in list(made._claims.all()):
        made.unmap(claim.handle)
        made._claims.drop(claim)
        clear(claim.lun)
    assert made._sessions.of(IQN) == []


class Grown(IscsiDriver):
    """With an admin who makes a LUN larger when he is asked to."""

    def expand(self, handle: Handle, size: int) -> int:
        grow(int(handle.partition("@")[0]), size)
        return super().expand(handle, size)


def make(kind: type[IscsiDriver] = IscsiDriver, **options: Any) -> IscsiDriver:
    wanted: dict[str, Any] = {"portal": "127.0.0.1", "iqn": IQN, "luns": f"0-{COUNT - 1}", "claims": CLAIMS} | options
    made = kind("array", IscsiOptions(**wanted), LinuxHost())
    made.probe()
    return made


def spec(size: int = 16 * MIB, **options: Any) -> VolumeSpec:
    return VolumeSpec(new_volume_id(), size, VolumeMode.BLOCK, IscsiVolumeOptions(**options), {"name": "data"})


class TestIscsiDriver(DriverConformance):
    size: ClassVar[int] = 16 * MIB

    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        return lambda: make(Grown)


def test_only_the_lun_that_is_used_becomes_a_device_and_the_last_takes_the_session() -> None:
    made = make()
    one, other = (made.create(spec()).handle for _ in range(2))
    assert made._sessions.of(IQN) == []
    made.map(one)
    assert [path.lun for path in made._sessions.paths(IQN)] == [int(one.partition("@")[0])]
    made.map(other)
    made.unmap(one)
    assert len(made._sessions.of(IQN)) == 1
    made.unmap(other)
    assert made._sessions.of(IQN) == []
    assert records() == []


def test_a_lun_that_holds_anything_is_never_given_out() -> None:
    made = make(luns="3")
    handle = made.create(spec(lun=3)).handle
    sh("mkfs.ext4", "-q", made.map(handle))
    made.unmap(handle)
    made._claims.drop(made._claim(handle))  # as if another cluster had made it
    with pytest.raises(CapacityExhausted, match=r"no LUN is free.*LUN 3 holds something: ext4"):
        made.create(spec())
    with pytest.raises(InvalidRequest, match=r"LUN 3 holds something: ext4.*volumectl import.*blkdiscard"):
        made.create(spec(lun=3))
    assert list(made.list()) == []
    adopted = made.adopt(handle, spec()._replace(size=None))
    assert adopted.handle == handle
    assert "ext4" in sh("wipefs", "--no-act", made.map(handle))
    made.unmap(handle)


def test_data_without_a_signature_is_seen_too() -> None:
    made = make()
    handle = made.create(spec(lun=4)).handle
    with made.map(handle).open("r+b") as device:
        device.seek(-4096, os.SEEK_END)
        device.write(b"somebody's")
    made.unmap(handle)
    made._claims.drop(made._claim(handle))
    with pytest.raises(InvalidRequest, match="LUN 4 holds something: data"):
        made.create(spec(lun=4))
    made.adopt(handle, spec())


def test_a_claim_that_was_not_looked_at_is_never_wiped() -> None:
    made = make()
    handle = made.create(spec(lun=5)).handle
    made.map(handle).write_bytes(b"precious")
    made.unmap(handle)
    made._claims.put(made._claim(handle)._replace(taken=False))  # as a crash in create leaves one that is not ours
    made.delete(handle)
    assert made._claims.get(handle) is None
    made.adopt(handle, spec())
    assert made.map(handle).open("rb").read(8) == b"precious"
    made.unmap(handle)


def test_a_lun_has_one_owner() -> None:
    made = make()
    first = spec(lun=6)
    made.create(first)
    with pytest.raises(AlreadyExists, match=f"LUN 6 of {IQN} is volume {first.id} already"):
        make().create(spec(lun=6))
    assert "6@" + IQN not in list(made.importable())
    with pytest.raises(OutOfRange, match="LUN 7 has .* only"):
        made.create(spec(1 << 40, lun=7))
    with pytest.raises(NotFound, match="shows us no LUN 99.*initiator name"):
        made.create(spec(lun=99))
    with pytest.raises(InvalidRequest, match="iqn alone"):
        made.create(spec(iqn=IQN))
    assert len(list(made.list())) == 1


def test_wiping_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_STEP", 4 * MIB)
    made = make()
    handle = made.create(spec(lun=8)).handle
    made.map(handle).write_bytes(b"x" * 16 * MIB)
    monkeypatch.setattr(driver, "_SPARE", 1e9)
    with context.request(timeout=100.0), pytest.raises(OperationPending, match="LUN 8 is being overwritten: 0 %"):
        made.delete(handle)
    assert [found.whole for found in made.list()] == [False]
    monkeypatch.setattr(driver, "_SPARE", 10.0)
    make().delete(handle)
    assert not any((FILES / "8.img").read_bytes())


def test_the_target_must_be_made_larger_first() -> None:
    made = make()
    handle = made.create(spec(lun=9)).handle
    with pytest.raises(OutOfRange, match="LUN 9 has 16 MiB only.*make it larger on the target"):
        made.expand(handle, 64 * MIB)


def test_chap(tmp_path: Path) -> None:
    put(TPG / "auth" / "userid", "guest")
    put(TPG / "auth" / "password", "a-long-secret")
    put(TPG / "attrib" / "authentication", "1")
    try:
        secret = tmp_path / "secret"
        secret.write_text("a-long-secret")
        made = make(user="guest", password=f"file:{secret}")
        handle = made.create(spec(lun=1)).handle
        assert made.map(handle)
        (record,) = records()
        assert "a-long-secret" in record.read_text()
        assert record.stat().st_mode & 0o077 == 0
        made.unmap(handle)
        assert not record.exists()
        secret.write_text("a-wrong-secret")
        with pytest.raises(PermissionDenied, match="refuses us.*look at user, password") as refused:
            made.map(handle)
        assert "secret" not in str(refused.value)
        with pytest.raises(PermissionDenied):
            make().map(handle)
        secret.write_text("a-long-secret")
        made.delete(handle)
    finally:
        put(TPG / "attrib" / "authentication", "0")


def test_a_target_that_is_away_is_said() -> None:
    with pytest.raises(BackendUnavailable, match="no portal of .* answers"):
        make(portal="127.0.0.1:3999")
    put(TPG / "enable", "0")
    try:
        with pytest.raises(BackendUnavailable, match="no session with"):
            IscsiDriver("array", IscsiOptions(portal="127.0.0.1", iqn=IQN, claims=CLAIMS), LinuxHost()).create(
                spec(lun=2)
            )
    finally:
        put(TPG / "enable", "1")


@pytest.fixture
def _multipathd() -> Iterator[None]:
    """Ended by a signal: the answer to its own `shutdown` is lost when it has gone before it gave it."""
    Path("/etc/multipath.conf").write_text("defaults {\n user_friendly_names yes\n}\n")
    with subprocess.Popen(["multipathd", "-d"]) as daemon:
        yield
        daemon.terminate()


@pytest.mark.usefixtures("_multipathd")
def test_many_paths_are_one_device() -> None:
    made = make(portal="127.0.0.1,127.0.0.2", multipath=True)
    handle = made.create(spec(lun=10)).handle
    device = made.map(handle)
    assert device.resolve().name.startswith("dm-")
    wait_until(lambda: len(list(Path("/sys/block", device.resolve().name, "slaves").iterdir())) == 2, timeout=60)
    assert made.mapped(handle) is not None
    assert made.mapped(handle).resolve() == device.resolve()  # type: ignore[union-attr]
    with device.open("rb"), pytest.raises(InUse):
        made.unmap(handle)
    grow(10, 32 * MIB)
    assert made.expand(handle, 32 * MIB) == 32 * MIB
    assert int(sh("blockdev", "--getsize64", device)) == 32 * MIB
    made.unmap(handle)
    assert made.mapped(handle) is None
    assert made._sessions.of(IQN) == []


def test_capabilities() -> None:
    assert {Capability.SIZE, Capability.EXPAND, Capability.IMPORT} <= IscsiDriver.all_capabilities()
