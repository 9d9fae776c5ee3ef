"""Moves by which the storage itself brings the data: images on one file system, subvolumes from btrfs to btrfs."""

from __future__ import annotations

import contextlib
import http.client
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeFilesystem, sh, wait_until
from tests.crash.killing import crash_points
from tests.harness.volumed import ApiError, Volumed
from tests.migration import trees
from tests.migration.conftest import Mover
from tests.migration.test_crash import data_of, fill, survive
from tests.migration.test_verify import outcomes, verified

pytestmark = pytest.mark.root
MIB = 1 << 20
# Source and target, and how the storage says that it copies.
WAYS = {
    ("sized", "images"): "both files share their data (reflink) until one of them is written",
    ("tree-a", "tree-b"): "btrfs send and receive",
    ("tree-a", "tree-c"): "a snapshot",
}
PAIRS = list(WAYS)
# Of images, which the driver passes when it clones as well; and of btrfs that are two.
POINTS = {
    ("sized", "images"): ["image.copy.new", "native.taken"],
    ("tree-a", "tree-b"): ["native.btrfs.sending", "native.btrfs.received", "native.btrfs.made", "native.taken"],
    ("tree-a", "tree-c"): ["native.btrfs.made"],
}


@pytest.fixture
def volumed(tmp_path: Path, make_filesystem: MakeFilesystem) -> Iterator[Volumed]:
    """On XFS, whose files can share data; with an image backend elsewhere, and three of btrfs on two file systems."""
    folder = make_filesystem("xfs", size=2 << 30) / "v"
    folder.mkdir()
    trees_of = [make_filesystem("btrfs"), make_filesystem("btrfs")]
    more = f"""
[backends.images]
driver = "image"
path = "{folder}/images-2"
[backends.elsewhere]
driver = "image"
path = "{tmp_path}/images"
[backends.tree-a]
driver = "btrfs"
path = "{trees_of[0]}/volumes"
[backends.tree-b]
driver = "btrfs"
path = "{trees_of[1]}/volumes"
[backends.tree-c]
driver = "btrfs"
path = "{trees_of[0]}/others"
[backends.refusing]
driver = "image"
path = "{folder}/images-3"
disabled-capabilities = ["native-copy"]
"""
    made = Volumed(folder, backends=more)
    try:
        yield made
    finally:
        for path in trees_of:
            trees.unlock(path)
        made.clean_up()


def plan(mover: Mover, to: str, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = mover.volumed.api.post("volumes", "data", "migration-plan", body={"backend": to, **body})
    return found


def left(mover: Mover) -> list[str]:
    """What lies on the storage of the btrfs besides whole volumes."""
    below = mover.volumed.folder.parents[1]
    return sorted(path.name for kind in ("volumes", "others") for path in below.glob(f"btrfs-?/{kind}/*.*"))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_it_is_chosen_explained_and_proven(mover: Mover, pair: tuple[str, str]) -> None:
    source, target = pair
    held = fill(mover, source)
    told = plan(mover, target)
    assert (told["path"], told["way"], told["rejected"]) == ("native", WAYS[pair], {})
    assert WAYS[pair] in mover.volumed.ctl("migrate", "data", "--to", target, "--dry-run").stdout
    moved = mover.move("data", target)
    assert moved["phase"] == "kept", moved
    assert (moved["path"], moved["copied"]) == ("native", 0), moved  # this machine wrote nothing of it
    assert len(moved["digest"]) == 64
    assert outcomes(verified(mover)) == ["equal", "equal"]  # with its record, and so is the source
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    assert left(mover) == []
    mover.assert_clean()


def test_another_path_is_taken_where_there_is_none_or_when_told(mover: Mover) -> None:
    fill(mover, "sized")
    other = plan(mover, "elsewhere")
    assert other["path"] == "block"
    assert "cannot share data between files" in other["rejected"]["native"]
    assert "turned off" in plan(mover, "refusing")["rejected"]["native"]
    assert "no native-copy" in plan(mover, "local", accept_loss=["size"])["rejected"]["native"]
    assert plan(mover, "tree-a")["rejected"]["native"] == "only a btrfs sends to a btrfs"
    for path in ("block", "tree"):
        assert plan(mover, "images", path=path)["path"] == path
    with pytest.raises(ApiError, match="cannot go by native"):
        plan(mover, "elsewhere", path="native")
    mover.mount("data")
    assert "it is in use" in plan(mover, "images")["rejected"]["native"]
    assert plan(mover, "images", path="native")["pause"] > 0
    mover.unmount("data")


def test_told_so_it_goes_while_it_is_in_use(mover: Mover) -> None:
    """The storage brings what there is, and what is written after that comes when its users have ended."""
    fill(mover, "sized")
    path = mover.mount("data")
    reference = mover.begin("data", "images", path="native", wait=True)
    wait_until(lambda: mover.volumed.api.get("migrations", reference)["phase"] == "converging", timeout=60)
    (path / "later").write_bytes(os.urandom(100_000))
    held = data_of(path)
    mover.unmount("data")
    moved = mover.outcome(reference)
    assert (moved["phase"], moved["path"]) == ("kept", "native"), moved
    assert 0 < moved["copied"] < 16 * MIB
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    mover.assert_clean()


def test_a_raw_device_grows_on_its_way(mover: Mover) -> None:
    content = mover.create_raw("data")
    moved = mover.move("data", "images", size="48m", keep_source="0s")
    assert (moved["path"], moved["copied"]) == ("native", 0), moved
    (there,) = (mover.volumed.folder / "images-2").glob("v*.img")
    assert there.read_bytes() == content + bytes(16 * MIB)
    mover.assert_clean()


def test_what_the_storage_copied_wrongly_is_found(mover: Mover) -> None:
    """One byte, flipped between its copy and the comparison: it is put right, as if it had been written since."""
    held, volumed = fill(mover, "sized"), mover.volumed
    volumed.stop()
    volumed.start(env={"VOLUMED_CRASH_AT": "native.taken"})
    with contextlib.suppress(OSError, http.client.HTTPException, ApiError, ValueError):
        mover.move("data", "images")
    assert volumed.wait_end() == -9, volumed.log()[-3000:]
    (image,) = (volumed.folder / "images-2").glob("v*.img")
    with image.open("r+b", buffering=0) as opened:
        place = next(at for at in range(0, 64 * MIB, MIB) if any(os.pread(opened.fileno(), MIB, at)))
        (byte,) = os.pread(opened.fileno(), 1, place + 5000)
        os.pwrite(opened.fileno(), bytes([byte ^ 1]), place + 5000)
        os.fsync(opened.fileno())
    volumed.start()
    moved = mover.outcome("data")
    assert (moved["phase"], moved["copied"]) == ("kept", MIB), moved
    (source,) = (volumed.folder / "images").glob("v*.img")
    assert image.read_bytes() == source.read_bytes()
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")


@pytest.mark.parametrize("target", ["tree-b", "tree-c"])
@pytest.mark.parametrize("longest", [False, True])
def test_everything_a_tree_has_comes_along(mover: Mover, target: str, longest: bool) -> None:
    """A path beyond PATH_MAX cannot be sent: a tree with one goes by files."""
    mover.create("data", "tree-a", size="300m")
    path = mover.mount("data")
    trees.make_everything(path)
    if not longest:
        sh("rm", "-rf", path / "deeper")
    everything = trees.picture(path)
    mover.unmount("data")
    expected = "tree" if longest and target == "tree-b" else "native"
    assert mover.move("data", target, keep_source="0s")["path"] == expected
    assert trees.picture(mover.mount("data")) == everything
    mover.unmount("data")
    mover.assert_clean()


def test_a_tree_in_use_is_sent_and_what_changed_comes_after(mover: Mover) -> None:
    mover.create("data", "tree-a", size="300m")
    path = mover.mount("data")
    for number in range(50):
        (path / str(number)).write_bytes(os.urandom(100_000))
    os.link(path / "1", path / "one")
    reference = mover.begin("data", "tree-b", bandwidth="1m", wait=True)
    wait_until(lambda: mover.volumed.api.get("migrations", reference)["phase"] == "seeding", timeout=60)
    wait_until(lambda: any(name.endswith(".sent") for name in left(mover)), timeout=60)
    with (path / "7").open("r+b") as opened:  # as large as it was
        opened.seek(50_000)
        opened.write(b"changed")
    (path / "8").unlink()
    (path / "one").unlink()
    os.link(path / "2", path / "one")
    (path / "new").write_bytes(b"new")
    mover.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
    wait_until(lambda: mover.volumed.api.get("migrations", reference)["phase"] == "converging", timeout=120)
    (path / "9").write_bytes(b"later")
    everything = trees.picture(path)
    mover.unmount("data")
    moved = mover.outcome(reference)
    assert (moved["phase"], moved["path"]) == ("kept", "native"), moved
    assert 0 < moved["copied"] < 4 * MIB
    assert trees.picture(mover.mount("data")) == everything
    mover.unmount("data")
    assert left(mover) == []
    mover.assert_clean()


def test_aborted_while_it_is_sent_it_leaves_nothing(mover: Mover) -> None:
    mover.create("data", "tree-a", size="300m")
    path = mover.mount("data")
    (path / "large").write_bytes(os.urandom(8 * MIB))
    mover.unmount("data")
    before = data_of(path)
    reference = mover.begin("data", "tree-b", bandwidth="256k")
    wait_until(lambda: (mover.volumed.api.get("migrations", reference)["progress"] or {"done": 0})["done"], timeout=60)
    mover.volumed.api.post("migrations", reference, "abort")
    assert mover.outcome(reference)["phase"] == "aborted"
    assert left(mover) == []
    assert before == data_of(path)
    mover.assert_clean()


def test_what_was_written_since_is_carried_back(mover: Mover) -> None:
    fill(mover, "tree-a")
    assert mover.move("data", "tree-b")["path"] == "native"
    path = mover.mount("data")
    (path / "since").write_bytes(b"since")
    there = data_of(path)
    mover.unmount("data")
    mover.volumed.api.post("migrations", "data", "rollback", body={"carry": True})
    back = mover.outcome("data")
    assert (back["phase"], back["path"]) == ("kept", "tree"), back
    assert mover.volume("data")["backend"] == "tree-a"
    assert data_of(mover.mount("data")) == there
    mover.unmount("data")
    mover.assert_clean()


def test_every_point_is_tried() -> None:
    here = {point for points in POINTS.values() for point in points}
    local = {point for point in crash_points() if point.startswith(("native.btrfs.", "native.taken"))}
    assert local <= here


def survive_copy(mover: Mover, pair: tuple[str, str], point: str) -> dict[str, bytes]:
    held = fill(mover, pair[0])
    survive(mover.volumed, point, lambda: mover.move("data", pair[1], keep_source="0s"))
    return held


def assert_there(mover: Mover, backend: str, held: dict[str, bytes]) -> None:
    assert mover.volume("data")["backend"] == backend
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    wait_until(lambda: left(mover) == [], timeout=60)
    mover.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "point"), [(pair, point) for pair in PAIRS for point in POINTS[pair]])
def test_killed_while_the_storage_copies(mover: Mover, pair: tuple[str, str], point: str) -> None:
    held = survive_copy(mover, pair, point)
    wait_until(lambda: mover.volumed.api.get("migrations", "data")["phase"] == "done", timeout=120)
    assert_there(mover, pair[1], held)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["native.btrfs.sending", "native.btrfs.made"])
def test_killed_and_aborted_it_leaves_nothing(mover: Mover, point: str) -> None:
    """What it had begun at the source as well."""
    volumed, held = mover.volumed, fill(mover, "tree-a")
    reference = ""

    def begin() -> None:
        nonlocal reference
        reference = mover.begin("data", "tree-b", bandwidth="64k")
        mover.outcome(reference)

    survive(volumed, point, begin)
    volumed.api.post("migrations", reference, "abort")
    assert mover.outcome(reference)["phase"] == "aborted"
    assert_there(mover, "tree-a", held)
