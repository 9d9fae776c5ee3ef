"""Copies of volumes on other storage."""

from __future__ import annotations

import os

import pytest

from tests.harness.volumed import ApiError
from tests.migration import trees
from tests.migration.conftest import Mover

pytestmark = pytest.mark.root
MIB = 1 << 20


def test_a_tree_is_copied_to_other_storage_and_the_original_stays(mover: Mover) -> None:
    mover.create("data", "sized", size="64m")
    path = mover.mount("data")
    (path / "folder").mkdir(mode=0o750)
    for number in range(20):
        (path / "folder" / str(number)).write_bytes(os.urandom(1000 * number))
    os.link(path / "folder" / "7", path / "linked")
    os.setxattr(path / "linked", "user.note", b"x")
    content = trees.picture(path)
    with pytest.raises(ApiError, match="is in use by"):
        mover.volumed.api.post("volumes", "data", "copy", body={"name": "copy", "backend": "tree"})
    mover.unmount("data")
    assert mover.volumed.ctl("clone", "data", "copy", "--to", "tree").stdout == "copy\n"
    for name, backend in (("copy", "tree"), ("data", "sized")):
        assert mover.volume(name)["backend"] == backend
        assert trees.picture(mover.mount(name)) == content
        mover.unmount(name)
    mover.assert_clean()


def test_what_would_be_lost_is_refused(mover: Mover) -> None:
    mover.create("data", "sized", size="64m")
    refused = mover.volumed.ctl("clone", "data", "copy", "--to", "local", check=False)
    assert "is not enforced any more" in refused.stderr
    assert [each["name"] for each in mover.volumed.api.get("volumes")["volumes"]] == ["data"]
    mover.volumed.ctl("clone", "data", "copy", "--to", "local", "--accept-loss", "size")
    mover.assert_clean()


def test_a_raw_device_is_copied(mover: Mover) -> None:
    made = mover.create("raw", "sized", size="16m", mode="block")
    image = mover.volumed.folder / "images" / f"{made['id']}.img"
    with image.open("r+b") as opened:
        opened.seek(MIB)
        opened.write(os.urandom(MIB))
    mover.volumed.api.post("volumes", "raw", "copy", body={"name": "copy", "backend": "images"})
    (there,) = (mover.volumed.folder / "images-2").glob("v*.img")
    assert there.read_bytes() == image.read_bytes()
    mover.assert_clean()


def test_a_copy_that_does_not_fit_leaves_nothing(mover: Mover) -> None:
    mover.create("data", "sized", size="64m")
    (mover.mount("data") / "file").write_bytes(os.urandom(20 * MIB))
    mover.unmount("data")
    with pytest.raises(ApiError, match="do not fit into 16 MiB"):
        mover.volumed.api.post("volumes", "data", "copy", body={"name": "copy", "backend": "images", "size": "16m"})
    assert len(mover.volumed.stored()) == 1
    mover.assert_clean()
