"""Everything a tree can hold, from every kind of local storage to every other, and compared by somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem
from tests.harness.volumed import Volumed
from tests.migration import trees
from tests.migration.conftest import Mover

pytestmark = [pytest.mark.root, pytest.mark.slow]

KINDS = {"folders-a": {}, "images-a": {"size": "300m"}, "btrfs-a": {"size": "300m"}}
TARGETS = ("folders-b", "images-b", "btrfs-b")
PATHS = {("images-a", "images-b"): "block", ("btrfs-a", "btrfs-b"): "native"}


@pytest.fixture
def volumed(tmp_path: Path, make_filesystem: MakeFilesystem) -> Iterator[Volumed]:
    """Each kind twice, on storage of its own."""
    folder = tmp_path / "volumed"
    folder.mkdir()
    tables = ""
    for end in "ab":
        tables += f"""
[backends.folders-{end}]
driver = "directory"
path = "{make_filesystem("ext4")}/volumes"
[backends.images-{end}]
driver = "image"
path = "{folder}/images-{end}"
[backends.btrfs-{end}]
driver = "btrfs"
path = "{make_filesystem("btrfs")}/volumes"
"""
    made = Volumed(folder, backends=tables, only=True, default_backends=("folders-a",))
    try:
        yield made
    finally:
        for path in (*tmp_path.glob("ext4-*"), *tmp_path.glob("btrfs-*")):
            if path.is_dir():
                trees.unlock(path)
        made.clean_up()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", KINDS)
def test_everything_arrives_and_comes_back(mover: Mover, source: str, target: str) -> None:
    before = mover.create("data", source, **KINDS[source])
    path = mover.mount("data")
    trees.make_everything(path)
    everything = trees.picture(path)
    mover.unmount("data")
    accepted = [] if KINDS.get(source) == {} or target != "folders-b" else ["size"]
    moved = mover.move("data", target, keep_source="0s", accept_loss=accepted)
    assert moved["phase"] in ("kept", "done"), moved
    assert moved["path"] == PATHS.get((source, target), "tree")
    after = mover.volume("data")
    assert (after["id"], after["backend"]) == (before["id"], target)
    assert trees.picture(mover.mount("data")) == everything
    mover.unmount("data")
    back = mover.move("data", source, keep_source="0s", accept_loss=["size"])
    assert back["phase"] in ("kept", "done"), back
    path = mover.mount("data")
    assert trees.picture(path) == everything
    trees.unlock(path)
    mover.unmount("data")
    mover.assert_clean()
