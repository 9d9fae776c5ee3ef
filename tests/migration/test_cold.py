"""Moves of volumes that nobody uses, as an operator makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.harness.volumed import ApiError
from tests.migration.conftest import Mover
from volumed.migration.movers.device import DeviceMover
from volumed.migration.movers.mover import Control
from volumed.units import MIB

pytestmark = pytest.mark.root


def test_a_device_goes_elsewhere_and_is_the_same_volume(mover: Mover) -> None:
    before = mover.create("data", "sized", size="64m", filesystem="ext4")
    path = mover.mount("data")
    (path / "file").write_bytes(b"here" * 1000)
    mover.unmount("data")
    moved = mover.move("data", "images")
    assert (moved["phase"], moved["path"], moved["error"]) == ("kept", "block", ""), moved
    assert len(moved["digest"]) == 64
    after = mover.volume("data")
    assert (after["id"], after["name"], after["backend"], after["size"]) == (
        before["id"],
        "data",
        "images",
        before["size"],
    )
    path = mover.mount("data")
    assert (path / "file").read_bytes() == b"here" * 1000
    mover.unmount("data")
    mover.assert_clean()
    mover.volumed.api.post("migrations", "data", "finish")
    assert mover.volumed.stored() == []
    mover.assert_clean()


@pytest.mark.parametrize("size", [3 * MIB + 512, MIB - 3 * 512, 5 * MIB])
def test_a_device_of_any_size_is_copied_to_its_last_sector(tmp_path: Path, size: int) -> None:
    devices = []
    for name, content in (("source", os.urandom(size)), ("target", bytes(size))):
        (tmp_path / name).write_bytes(content)
        devices.append(Path(sh("losetup", "--find", "--show", "--sector-size", "512", tmp_path / name).strip()))
    source, target = devices
    mover = DeviceMover(source, target, tmp_path)
    try:
        mover.round(Control(), last=True)
        found = mover.verify(Control())
        assert (found.differences, found.bytes) == ([], size)
    finally:
        mover.close()
        for device in devices:
            sh("losetup", "--detach", device)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_raw_device_goes_block_by_block(mover: Mover) -> None:
    content = mover.create_raw("raw")
    moved = mover.move("raw", "images", keep_source="0s")
    assert (moved["phase"] in ("kept", "done"), moved["path"]) == (True, "block"), moved
    (there,) = (mover.volumed.folder / "images-2").glob("v*.img")
    assert there.read_bytes() == content
    assert there.stat().st_blocks * 512 < 2 * MIB  # holes stayed holes
    with pytest.raises(ApiError, match="a device cannot shrink"):
        mover.begin("raw", "sized", size="16m")
    with pytest.raises(ApiError, match="backend local holds trees and has no devices"):
        mover.begin("raw", "local")
    mover.assert_clean()


def test_a_volume_that_is_removed_takes_its_kept_source_along(mover: Mover) -> None:
    mover.create("data", "sized", size="16m")
    assert mover.move("data", "images")["phase"] == "kept"
    assert len(mover.volumed.stored()) == 1
    mover.volumed.api.delete("volumes", "data")
    wait_until(lambda: mover.outcome("data")["phase"] == "done")
    assert mover.volumed.stored() == []
    mover.assert_clean()


def test_a_move_after_a_move_leaves_each_source_in_its_time(mover: Mover) -> None:
    mover.create("data", "sized", size="16m")
    first = mover.move("data", "images")
    second = mover.move("data", "sized")
    assert (first["phase"], second["phase"]) == ("kept", "kept")
    assert len(mover.volumed.stored()) == 2  # the first source, and where it is now
    with pytest.raises(ApiError, match="was moved on since"):
        mover.volumed.api.post("migrations", first["id"], "rollback", body={})
    for each in (first, second):
        mover.volumed.api.post("migrations", each["id"], "finish")
    assert len(mover.volumed.stored()) == 1
    assert mover.volume("data")["backend"] == "sized"
    mover.assert_clean()
