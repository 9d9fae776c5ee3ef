"""LUKS2 headers by the real cryptsetup, on a file: what needs no device-mapper. The rest: tests/vm/guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from volumed.errors import CommandFailed, IntegrityError
from volumed.host import luks
from volumed.host.linux import LinuxHost
from volumed.units import MIB

pytestmark = pytest.mark.root

ONE, TWO = "the-first-key-0123456789", "the-second-key 0123456789 \u00e9"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(bytes(32 * MIB))
    return path


def test_keys_come_and_go(device: Path) -> None:
    host = LinuxHost()
    luks.format_device(host, device, ONE)
    assert luks.fits(host, device, ONE)
    assert not luks.fits(host, device, TWO)
    luks.add_key(host, device, known=ONE, new=TWO)
    assert luks.fits(host, device, ONE)
    assert luks.fits(host, device, TWO)
    luks.remove_key(host, device, ONE)
    assert not luks.fits(host, device, ONE)
    assert luks.fits(host, device, TWO)
    assert list(host.private_folder("keys").iterdir()) == []


def test_a_key_that_fits_nothing_adds_none(device: Path) -> None:
    host = LinuxHost()
    luks.format_device(host, device, ONE)
    with pytest.raises(CommandFailed) as refused:
        luks.add_key(host, device, known="of somebody else", new=TWO)
    assert "somebody else" not in str(refused.value)
    assert not luks.fits(host, device, TWO)
    assert list(host.private_folder("keys").iterdir()) == []


def test_what_has_no_header_is_said(device: Path) -> None:
    with pytest.raises(IntegrityError, match="bears no LUKS header"):
        luks.fits(LinuxHost(), device, ONE)


def test_the_header_takes_what_is_counted_for_it(device: Path) -> None:
    host = LinuxHost()
    luks.format_device(host, device, ONE)
    told = host.run(["cryptsetup", "luksDump", device]).stdout
    offset = next(line.split()[1] for line in told.splitlines() if line.strip().startswith("offset:"))
    assert int(offset) == luks.OVERHEAD


def test_what_is_not_open_is_closed(device: Path) -> None:
    luks.close(LinuxHost(), "volumed-nonesuch-crypt")
