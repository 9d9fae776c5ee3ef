"""Volumes compared with what is kept of their moves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness.volumed import ApiError
from tests.migration import trees
from tests.migration.conftest import Mover
from volumed.migration.movers import tree
from volumed.migration.tree.entries import Entry
from volumed.migration.tree.manifest import Manifest
from volumed.migration.verification import Comparison, Found, Kept, Outcome, compare
from volumed.model import MovePath

pytestmark = pytest.mark.root
MIB = 1 << 20


def verified(mover: Mover, name: str = "data") -> dict[str, Any]:
    *_, last = mover.volumed.api.lines("volumes", name, "verify")
    assert last["error"] is None, last
    found: dict[str, Any] = last["verification"]
    return found


def outcomes(found: dict[str, Any]) -> list[str]:
    return [each["outcome"] for each in found["comparisons"]]


def filled(mover: Mover, backend: str, **fields: Any) -> None:
    mover.create("data", backend, **fields)
    path = mover.mount("data")
    if backend == "sized":
        trees.make_everything(path)
    else:
        (path / "folder").mkdir()
        (path / "folder" / "file").write_bytes(os.urandom(3 * MIB))
        (path / "empty").touch()
    mover.unmount("data")


def image(mover: Mover, folder: str) -> Path:
    (found,) = (mover.volumed.folder / folder).glob("v*.img")
    return found


def flip(path: Path, needle: bytes) -> None:
    """One bit of the first place that holds the needle."""
    with path.open("r+b") as opened:
        at = opened.read().index(needle)
        opened.seek(at)
        opened.write(bytes([needle[0] ^ 1]))
        opened.flush()
        os.fsync(opened.fileno())


def test_a_volume_that_was_never_moved_is_read(mover: Mover) -> None:
    filled(mover, "local")
    found = verified(mover)
    assert found["path"] == "tree"
    assert found["bytes"] == 3 * MIB
    assert found["comparisons"] == []
    assert verified(mover)["digest"] == found["digest"]
    told = mover.volumed.ctl("verify", "data").stdout
    assert "blake3 " + found["digest"][:16] in told
    assert "nothing is kept to compare it with" in told
    mover.assert_clean()


@pytest.mark.parametrize("target", ["tree", "images"])
def test_a_moved_tree_is_equal_to_its_record_and_its_source(mover: Mover, target: str) -> None:
    filled(mover, "sized", size="96m")
    assert mover.move("data", target, path="tree")["phase"] == "kept"
    for _ in range(2):  # reading it changes nothing
        found = verified(mover)
        assert outcomes(found) == ["equal", "equal"], found
        assert found["digest"] == mover.volumed.api.get("migrations", "data")["digest"]
    mover.volumed.ctl("migration", "finish", "data", "-y")
    assert outcomes(verified(mover)) == ["equal"]  # with the digest alone
    mover.assert_clean()


def test_moved_blocks_are_equal_until_they_are_mounted(mover: Mover) -> None:
    filled(mover, "sized", size="96m")
    assert mover.move("data", "images")["path"] == "block"
    for _ in range(2):
        assert outcomes(verified(mover)) == ["equal", "equal"]
    mover.volumed.api.post("volumes", "data", "migration-plan", body={"backend": "tree"})  # looks through its tree
    found = verified(mover)
    assert outcomes(found) == ["changed", "equal"]
    assert "was mounted or grown since" in found["comparisons"][0]["text"]
    mover.assert_clean()


def test_a_file_that_changed_on_its_storage_is_named(mover: Mover) -> None:
    filled(mover, "sized", size="96m")
    assert mover.move("data", "tree", path="tree")["phase"] == "kept"
    (stored,) = mover.volumed.folder.parent.glob("btrfs-0/volumes/v*")
    status = (stored / "large").stat()
    with (stored / "large").open("r+b") as opened:
        opened.seek(2 * MIB + 5)
        opened.write(b"x")
    os.utime(stored / "large", ns=(status.st_atime_ns, status.st_mtime_ns))
    (stored / "empty").unlink()
    (stored / "more").touch()
    (stored / "owned").chmod(0o600)
    found = verified(mover)
    assert outcomes(found) == ["different", "equal"]
    (differences,) = [each["differences"] for each in found["comparisons"] if each["differences"]]
    assert {
        f"large has other data at byte {2 * MIB}",
        "empty is missing",
        "more was not there",
        "owned has mode 600, not 640",
    } <= set(differences)
    told = mover.volumed.ctl("verify", "data", check=False)
    assert told.returncode == 14
    assert "DIFFERENT from the record of move" in told.stdout
    assert f"  large has other data at byte {2 * MIB}" in told.stdout
    mover.volumed.ctl("migration", "finish", "data", "-y")
    assert outcomes(verified(mover)) == ["different"]  # which file, nobody knows any more


def test_a_flipped_bit_of_a_device_is_found_on_either_side(mover: Mover) -> None:
    made = mover.create("raw", "sized", size="16m", mode="block")
    needle = os.urandom(64)
    source = mover.volumed.folder / "images" / f"{made['id']}.img"
    with source.open("r+b") as opened:
        opened.seek(5 * MIB)
        opened.write(needle)
    assert mover.move("raw", "images")["phase"] == "kept"
    assert outcomes(verified(mover, "raw")) == ["equal", "equal"]
    flip(image(mover, "images-2"), needle)
    found = verified(mover, "raw")
    assert outcomes(found) == ["different", "equal"]
    assert found["comparisons"][0]["differences"] == [f"bytes {5 * MIB} to {6 * MIB - 1}"]
    flip(source, needle)
    assert outcomes(verified(mover, "raw")) == ["different", "different"]
    mover.assert_clean()


def test_what_was_used_since_is_not_called_different(mover: Mover) -> None:
    filled(mover, "local")
    assert mover.move("data", "tree")["phase"] == "kept"
    (mover.mount("data") / "new").write_bytes(b"new")
    with pytest.raises(ApiError, match="is in use by"):
        mover.volumed.api.get("volumes", "data", "verify")
    mover.unmount("data")
    found = verified(mover)
    assert outcomes(found) == ["changed", "equal"]
    assert "was used since by docker" in found["comparisons"][0]["text"]
    assert "new was not there" in found["comparisons"][0]["differences"]
    assert mover.volumed.ctl("verify", "data").returncode == 0
    mover.assert_clean()


def test_what_was_lost_by_consent_is_no_difference(tmp_path: Path) -> None:
    """Of two records of one tree, the second without owners and times; and a file that has other data besides."""
    entries = [Entry(name, 1, 0o100644, 7, 7, 1, 9, 9, 0, 1, b"", b"d" * 32, b"d" * 32) for name in ("one", "two")]
    for folder, found in (("kept", entries), ("fresh", [entry._replace(uid=0, gid=0, mtime=1) for entry in entries])):
        (tmp_path / folder).mkdir()
        record = Manifest(tmp_path / folder / "tree.db")
        record.put_new(found)
        record.commit()
        record.close()
    kept, fresh = tmp_path / "kept", tmp_path / "fresh"
    was, is_now = tree.digest(kept), tree.digest(fresh)
    read = Found(MovePath.TREE, is_now, 2, 2, fresh)

    def outcome(*losses: str) -> Comparison:
        return compare(read, Kept(MovePath.TREE, was, kept, frozenset(losses)), against="it")

    assert outcome("owners", "times").outcome is Outcome.EQUAL
    assert outcome("owners").differences == tuple(f"{name} has another modification time" for name in ("one", "two"))
    shutil.rmtree(kept)
    assert outcome("owners", "times").outcome is Outcome.UNKNOWN
    assert outcome().outcome is Outcome.DIFFERENT


def test_bad_requests_are_refused_and_change_nothing(mover: Mover) -> None:
    ctl = mover.volumed.ctl
    filled(mover, "local")
    assert ctl("verify", check=False).returncode == 2
    assert ctl("verify", "nothing", check=False).returncode == 3
    assert ctl("verify", "data", "more", check=False).returncode == 2
    assert ctl("verify", "../data", check=False).returncode == 3
    reference = mover.begin("data", "tree", bandwidth="64k")
    refused = ctl("verify", "data", check=False)
    assert refused.returncode == 5
    assert "is being moved" in refused.stderr
    mover.volumed.api.post("migrations", reference, "abort")
    mover.outcome(reference)
    assert json.loads(ctl("-o", "json", "verify", "data").stdout)["comparisons"] == []
    assert list((mover.volumed.state / "migrations").glob("read-*")) == []
    mover.assert_clean()
