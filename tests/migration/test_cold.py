"""Moves of volumes that nobody uses, as an operator makes them."""

from __future__ import annotations

import pytest

from tests.migration.conftest import Mover

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
