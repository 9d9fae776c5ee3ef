"""Moves that are disturbed: by an operator, by a container, by a crash, by storage that lies or is full."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeFilesystem, wait_until
from tests.harness.volumed import ApiError, Volumed
from tests.migration.conftest import Mover

pytestmark = pytest.mark.root
MIB = 1 << 20
SLOW = "4m"  # a second, so that there is something to disturb


@pytest.fixture
def data(mover: Mover) -> bytes:
    """Of the file `data` on the volume `data`, on `sized`."""
    mover.create("data", "sized", size="64m")
    content = os.urandom(24 * MIB)
    (mover.mount("data") / "data").write_bytes(content)
    mover.unmount("data")
    return content


def state(mover: Mover, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = mover.volumed.api.get("migrations", reference)
    return found


def wait_for_some(mover: Mover, reference: str, least: int = 6 * MIB) -> None:
    """Until some of it is copied."""
    wait_until(lambda: ((state(mover, reference)["progress"] or {}).get("done") or 0) >= least)


def assert_moved(mover: Mover, content: bytes, backend: str = "images") -> None:
    assert mover.volume("data")["backend"] == backend
    assert (mover.mount("data") / "data").read_bytes() == content
    mover.unmount("data")
    mover.assert_clean()


def image(volumed: Volumed) -> Path:
    """The target's."""
    (found,) = (volumed.folder / "images-2").glob("v*.img")
    return found


def test_paused_and_resumed_it_copies_nothing_twice(mover: Mover, data: bytes) -> None:
    reference = mover.begin("data", "images", bandwidth=SLOW)
    wait_for_some(mover, reference)
    mover.volumed.api.post("migrations", reference, "pause")
    assert mover.outcome(reference)["paused"]
    wait_until(lambda: state(mover, reference)["progress"] is None)
    mover.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
    mover.volumed.api.post("migrations", reference, "resume")
    moved = mover.outcome(reference)
    assert moved["phase"] == "kept", moved
    assert moved["copied"] <= moved["expected"] - 5 * MIB  # of the round that was counted: the second
    assert_moved(mover, data)


def test_killed_it_goes_on_where_it_was(mover: Mover, data: bytes) -> None:
    reference = mover.begin("data", "images", bandwidth=SLOW)
    wait_for_some(mover, reference)
    mover.volumed.kill()
    mover.volumed.start()
    mover.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
    moved = mover.outcome(reference)
    assert moved["phase"] == "kept", moved
    assert moved["copied"] <= moved["expected"] - 5 * MIB
    assert_moved(mover, data)


def test_a_flipped_byte_is_caught_and_named(mover: Mover, data: bytes) -> None:
    reference = mover.begin("data", "images", bandwidth=SLOW)
    wait_for_some(mover, reference, 16 * MIB)
    mover.volumed.api.post("migrations", reference, "pause")
    mover.outcome(reference)
    target = image(mover.volumed)
    with target.open("r+b", buffering=0) as opened:
        place = next(at for at in range(0, 64 * MIB, MIB) if any(os.pread(opened.fileno(), MIB, at)))
        (byte,) = os.pread(opened.fileno(), 1, place + 5000)
        os.pwrite(opened.fileno(), bytes([byte ^ 1]), place + 5000)
        os.fsync(opened.fileno())
    mover.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
    mover.volumed.api.post("migrations", reference, "resume")
    failed = mover.outcome(reference)
    assert failed["phase"] == "failed"
    assert f"the copy is not what was read: bytes {place} to {place + MIB - 1}" in failed["error"]
    assert not list((mover.volumed.folder / "images-2").glob("v*"))
    assert_moved(mover, data, backend="sized")


def test_aborted_it_leaves_nothing(mover: Mover, data: bytes) -> None:
    reference = mover.begin("data", "images", bandwidth=SLOW)
    wait_for_some(mover, reference)
    mover.volumed.api.post("migrations", reference, "abort")
    assert mover.outcome(reference)["phase"] == "aborted"
    assert not list((mover.volumed.folder / "images-2").glob("v*"))
    assert_moved(mover, data, backend="sized")
    with pytest.raises(ApiError, match="is aborted and cannot be paused"):
        mover.volumed.api.post("migrations", reference, "pause")


def test_other_changes_wait_for_it(mover: Mover, data: bytes) -> None:
    api = mover.volumed.api
    api.post("volumes", "data", "snapshots", body={"name": "before"})
    before = api.post("volumes", "data", "backup", body={"backend": "folders", "accept_loss": ["size"]})
    *_, backup = api.lines("copies", before["id"], "follow")
    assert backup["state"] == "ready", backup
    reference = mover.begin("data", "images", bandwidth=SLOW, accept_loss=["snapshots"])
    wait_for_some(mover, reference, 1)
    volume = mover.volume("data")
    for words, body in (
        (("volumes", "data", "snapshots"), {"name": "one"}),
        (("volumes", "data", "snapshots", "before", "restore"), {}),
        (("volumes", "data", "migrate"), {"backend": "tree"}),
        (("volumes", "data", "copy"), {"name": "copy", "backend": "tree"}),
        (("volumes", "data", "backup"), {"backend": "tree"}),
        (("volumes",), {"name": "clone", "source": "data"}),
        (("copies", backup["id"], "restore"), {"in_place": True}),
    ):
        with pytest.raises(ApiError) as refused:
            api.post(*words, body=body)
        said = f"{refused.value} {refused.value.hint}"
        assert re.search(r"is being moved to backend images|which moves it", said), (words, said)
        assert reference in said, (words, said)
    with pytest.raises(ApiError, match="is being moved to backend images"):
        api.delete("volumes", "data", "snapshots", "before")
    assert mover.volume("data") == volume
    assert [each["name"] for each in api.get("volumes", "data", "snapshots")] == ["before"]
    assert [each["name"] for each in api.get("volumes")["volumes"]] == ["data"]
    with pytest.raises(ApiError, match="volumed itself, which moves it"):
        api.delete("volumes", "data")
    api.post("migrations", reference, "throttle", body={"bandwidth": None})
    assert mover.outcome(reference)["phase"] == "kept"
    assert_moved(mover, data)


def test_it_does_not_grow_meanwhile(mover: Mover) -> None:
    mover.create("data", "sized", size="300m", filesystem="xfs")
    (mover.mount("data") / "data").write_bytes(os.urandom(8 * MIB))
    mover.unmount("data")
    reference = mover.begin("data", "images", bandwidth=SLOW)
    with pytest.raises(ApiError, match="is being moved to backend images"):
        mover.volumed.api.post("volumes", "data", "expand", body={"size": 400 * MIB})
    mover.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
    assert mover.outcome(reference)["phase"] == "kept"
    assert mover.volume("data")["size"] == 300 * MIB


def test_a_container_that_starts_meanwhile_writes_and_loses_nothing(mover: Mover, data: bytes) -> None:
    reference = mover.begin("data", "images", bandwidth=SLOW)
    wait_for_some(mover, reference)
    path = mover.mount("data", "container")
    content = os.urandom(MIB) + data[MIB:]
    with (path / "data").open("r+b") as opened:
        opened.write(content[:MIB])
    mover.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
    wait_until(lambda: (state(mover, reference)["progress"] or {}).get("step") == "waiting until nobody uses it")
    (path / "later").write_bytes(b"too")
    mover.unmount("data", "container")
    assert mover.outcome(reference)["phase"] == "kept"
    assert (mover.mount("data") / "later").read_bytes() == b"too"
    mover.unmount("data")
    assert_moved(mover, content)


def test_a_full_target_is_said_and_left(tmp_path: Path, make_filesystem: MakeFilesystem) -> None:
    folder = tmp_path / "volumed"
    folder.mkdir()
    small = make_filesystem("ext4", size=24 * MIB)
    volumed = Volumed(folder, backends=f'[backends.small]\ndriver = "image"\npath = "{small}/images"\n')
    try:
        volumed.start()
        mover = Mover(volumed)
        mover.create("data", "sized", size="64m")
        content = os.urandom(30 * MIB)
        (mover.mount("data") / "data").write_bytes(content)
        mover.unmount("data")
        failed = mover.move("data", "small")
        assert failed["phase"] == "failed"
        assert "full" in failed["error"]
        assert list((small / "images").glob("v*")) == []
        assert_moved(mover, content, backend="sized")
    finally:
        volumed.clean_up()


def test_what_would_be_lost_is_refused_until_it_is_accepted(mover: Mover, data: bytes) -> None:
    api = mover.volumed.api
    api.post("volumes", "data", "snapshots", body={"name": "before"})
    with pytest.raises(ApiError, match="its snapshots stay behind and go with the source: before") as refused:
        mover.begin("data", "images")
    assert "--accept-loss snapshots" in refused.value.hint
    assert api.get("migrations") == []
    assert mover.move("data", "images", accept_loss=["snapshot"])["phase"] == "kept"
    assert api.get("volumes", "data", "snapshots") == []
    assert_moved(mover, data)
    api.post("migrations", "data", "rollback", body={"discard": True})
    assert mover.outcome("data")["phase"] == "rolled-back"
    assert [each["name"] for each in api.get("volumes", "data", "snapshots")] == ["before"]
    assert_moved(mover, data, backend="sized")


def test_an_undo_says_what_it_would_lose(mover: Mover, data: bytes) -> None:
    api = mover.volumed.api
    assert mover.move("data", "images")["phase"] == "kept"
    path = mover.mount("data")
    (path / "since").write_bytes(b"new")
    mover.unmount("data")
    with pytest.raises(ApiError, match="was used since the move, and what was written would be lost: docker"):
        api.post("migrations", "data", "rollback", body={})
    back = api.post("migrations", "data", "rollback", body={"carry": True})
    assert mover.outcome(back["id"])["phase"] == "kept"
    assert (mover.mount("data") / "since").read_bytes() == b"new"
    mover.unmount("data")
    assert_moved(mover, data, backend="sized")
    api.post("migrations", back["id"], "finish")
    assert len(mover.volumed.stored()) == 1
    assert not list((mover.volumed.folder / "images-2").glob("v*"))


def test_a_larger_place_is_used(mover: Mover) -> None:
    mover.create("data", "sized", size="300m", filesystem="xfs")
    (mover.mount("data") / "data").write_bytes(b"x" * MIB)
    mover.unmount("data")
    moved = mover.move("data", "images", size="400m")
    assert (moved["phase"], moved["path"]) == ("kept", "block"), moved
    assert mover.volume("data")["size"] == 400 * MIB
    room = os.statvfs(mover.mount("data"))
    mover.unmount("data")
    assert room.f_blocks * room.f_frsize > 320 * MIB
    assert_moved(mover, b"x" * MIB)


def test_a_smaller_place_goes_by_tree_when_the_data_fits(mover: Mover, data: bytes) -> None:
    with pytest.raises(ApiError, match=r"holds 2\d\.?\d? MiB, which do not fit into 25 MiB"):
        mover.begin("data", "images", size="25m")
    moved = mover.move("data", "images", size="48m")
    assert (moved["phase"], moved["path"]) == ("kept", "tree"), moved
    assert_moved(mover, data)


def test_a_process_of_the_machine_that_holds_the_old_place_is_waited_for_and_named(mover: Mover) -> None:
    """Before the commit point: after it the new place could not be shown."""
    mover.create("data", "local")
    path = mover.mount("data")
    (path / "data").write_bytes(b"x")
    reference = mover.begin("data", "tree", accept_loss=["size"])
    wait_until(lambda: (state(mover, reference)["progress"] or {}).get("step") == "waiting until nobody uses it")
    child = subprocess.Popen(["sleep", "1000"], cwd=path)
    try:
        mover.unmount("data")
        wait_until(lambda: f"sleep (pid {child.pid})" in state(mover, reference)["error"])
        assert mover.volume("data")["backend"] == "local"
    finally:
        child.kill()
        child.wait()
    assert mover.outcome(reference)["phase"] == "kept"
    assert_moved(mover, b"x", backend="tree")
