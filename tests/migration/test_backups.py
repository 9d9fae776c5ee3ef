"""Backups and restores, and clones of volumes in use; killed at every step, too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeFilesystem, wait_until
from tests.crash.killing import crash_points
from tests.harness.volumed import ApiError, Volumed
from tests.migration import trees
from tests.migration.conftest import Mover
from tests.migration.test_crash import survive
from volumed.host import loop

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture
def volumed(tmp_path: Path, make_filesystem: MakeFilesystem) -> Iterator[Volumed]:
    """`shared` and `tree` take snapshots of volumes in use; the others do not."""
    folder = tmp_path / "volumed"
    folder.mkdir()
    more = f"""
[backends.images]
driver = "image"
path = "{folder}/images-2"
[backends.shared]
driver = "image"
path = "{make_filesystem("xfs", size=2 << 30)}/images"
[backends.tree]
driver = "btrfs"
path = "{make_filesystem("btrfs", size=2 << 30)}/volumes"
"""
    made = Volumed(folder, backends=more)
    try:
        yield made
    finally:
        made.clean_up()
        for found in list(loop.attached()):
            if found.backing_file.is_relative_to(tmp_path) and found.backing_file.parent.name == "images":
                loop.detach(found.device)


def fill(path: Path, count: int = 20) -> None:
    (path / "folder").mkdir(mode=0o750)
    for number in range(count):
        (path / "folder" / str(number)).write_bytes(os.urandom(20_000 + number))
    (path / "large").write_bytes(os.urandom(3 * MIB))
    os.link(path / "folder" / "7", path / "linked")
    os.setxattr(path / "linked", "user.note", b"x")


def ended(mover: Mover, copy: dict[str, Any]) -> dict[str, Any]:
    *_, last = mover.volumed.api.lines("copies", copy["id"], "follow")
    if last["state"] == "copying":
        raise ConnectionError("the daemon ended")
    return dict(last)


def back_up(mover: Mover, name: str = "data", to: str = "images", **body: Any) -> dict[str, Any]:
    made = ended(mover, mover.volumed.api.post("volumes", name, "backup", body={"backend": to, **body}))
    assert made["state"] == "ready", made["error"]
    return made


def restore(mover: Mover, reference: str, **body: Any) -> dict[str, Any]:
    return ended(mover, mover.volumed.api.post("copies", reference, "restore", body=body))


def names(mover: Mover) -> list[str]:
    return sorted(each["name"] for each in mover.volumed.api.get("volumes")["volumes"])


def picture_of(mover: Mover, name: str) -> Any:
    found = trees.picture(mover.mount(name, "look"))
    mover.unmount(name, "look")
    return found


def assert_settled(mover: Mover) -> None:
    """Nothing but volumes and backups is anywhere; what ended takes itself away a moment later."""
    wait_until(lambda: mover.volumed.loops() == [] and mover.volumed.mounted() == {}, timeout=60)
    wait_until(lambda: mover.volumed.api.get("doctor") == [], timeout=60)
    kept = {each["id"] for each in mover.volumed.api.get("copies") if each["kind"] == "backup"}
    folder = mover.volumed.state / "copies"
    wait_until(lambda: {path.name for path in folder.glob("*")} <= kept, timeout=60)


# Clones
@pytest.mark.parametrize("backend", ["tree", "shared"])
def test_a_volume_in_use_is_cloned_as_of_one_moment(mover: Mover, backend: str) -> None:
    mover.create("data", backend, size="96m")
    path = mover.mount("data")
    fill(path)
    before = trees.picture(path)
    assert mover.volumed.ctl("clone", "data", "copy", "--to", "images").stdout == "copy\n"
    (path / "large").unlink()
    assert picture_of(mover, "copy") == before
    assert mover.volumed.api.get("volumes", "data")["snapshots"] == []
    mover.unmount("data")
    assert names(mover) == ["copy", "data"]
    assert_settled(mover)


def test_a_snapshot_is_cloned_to_other_storage(mover: Mover) -> None:
    mover.create("data", "tree")
    path = mover.mount("data")
    fill(path)
    before = trees.picture(path)
    mover.volumed.ctl("snapshot", "create", "data", "then")
    (path / "large").write_bytes(b"now")
    mover.volumed.ctl("clone", "data@then", "copy", "--to", "sized")
    assert picture_of(mover, "copy") == before
    refused = mover.volumed.ctl("clone", "data@never", "other", "--to", "sized", check=False)
    assert refused.returncode == 3
    assert "there is no snapshot 'never'" in refused.stderr
    assert mover.volumed.ctl("clone", "data", "copy", "--to", "sized", check=False).returncode == 4
    mover.unmount("data")
    assert [each["name"] for each in mover.volumed.api.get("volumes", "data")["snapshots"]] == ["then"]
    assert_settled(mover)


# Backups
@pytest.mark.parametrize(("source", "target"), [("tree", "images"), ("sized", "local")])
def test_each_backup_is_whole_and_the_second_copies_what_changed(mover: Mover, source: str, target: str) -> None:
    """`sized` cannot be backed up in use, and `local` cannot clone: there every backup is a full one."""
    mover.create("data", source, size="96m")
    path = mover.mount("data")
    fill(path)
    pictures = []
    backups = []
    for number in range(3):
        (path / "folder" / "7").write_bytes(os.urandom(1000 + number))
        if number == 1:
            (path / "folder" / "3").unlink()
        pictures.append(trees.picture(path))
        if source == "sized":
            mover.unmount("data")
        backups.append(back_up(mover, to=target, accept_loss=["size"]))
        path = mover.mount("data") if source == "sized" else path
    incremental = target != "local"
    assert [each["base"] is not None for each in backups] == [False, incremental, incremental]
    assert backups[0]["copied"] > 3 * MIB
    assert all((each["copied"] < 100_000) is incremental for each in backups[1:])
    assert names(mover) == ["data"]
    target = "sized" if target == "local" else target  # where its size is enforced
    for backup, picture in zip(backups, pictures, strict=True):
        assert restore(mover, backup["id"], name="again", backend=target)["state"] == "ready"
        assert picture_of(mover, "again") == picture
        mover.volumed.ctl("rm", "-y", "again")
    # A base goes, and what was made on it stays whole.
    mover.volumed.ctl("backup", "rm", "-y", backups[1]["id"])
    mover.volumed.ctl("backup", "rm", "-y", backups[0]["id"])
    assert mover.volumed.ctl("backup", "verify", "data").returncode == 0
    assert restore(mover, "data", name="again", backend=target)["state"] == "ready"
    assert picture_of(mover, "again") == pictures[2]
    mover.unmount("data")
    mover.volumed.ctl("backup", "rm", "-y", backups[2]["id"])
    mover.volumed.ctl("rm", "-y", "data", "again")
    assert_settled(mover)
    assert mover.volumed.stored() == []
    assert list((mover.volumed.folder / "images-2").glob("*.img")) == []


def test_backups_of_a_raw_device(mover: Mover) -> None:
    made = mover.create("raw", "sized", size="16m", mode="block")
    image = mover.volumed.folder / "images" / f"{made['id']}.img"

    def write(offset: int, data: bytes) -> None:
        with image.open("r+b") as opened:
            opened.seek(offset)
            opened.write(data)

    write(MIB, os.urandom(5 * MIB))
    first = back_up(mover, "raw")
    assert first["path"] == "block"
    assert first["copied"] == 5 * MIB
    write(3 * MIB, os.urandom(MIB))
    second = back_up(mover, "raw")
    assert (second["base"], second["copied"]) == (first["id"], MIB)
    then = image.read_bytes()
    write(3 * MIB, bytes(MIB))
    found = mover.volumed.ctl("verify", "raw", check=False)
    assert found.returncode == 14  # nobody is known to have written that
    assert f"  bytes {3 * MIB} to {4 * MIB - 1}" in found.stdout
    mover.volumed.ctl("restore", second["id"], "again", "--to", "sized")
    again = mover.volume("again")["id"]
    assert (mover.volumed.folder / "images" / f"{again}.img").read_bytes() == then
    mover.volumed.ctl("restore", "raw", "--in-place", "-y")
    assert "equal to the record of backup" in mover.volumed.ctl("verify", "raw").stdout
    assert_settled(mover)


def test_a_backup_is_nobodys_volume(mover: Mover) -> None:
    mover.create("data", "tree")
    fill(mover.mount("data"))
    mover.unmount("data")
    backup = back_up(mover)
    (hidden,) = (path.stem for path in (mover.volumed.folder / "images-2").glob("v*.img"))
    plugin, ctl = mover.volumed.plugin, mover.volumed.ctl
    assert [each["Name"] for each in plugin("List").body["Volumes"]] == ["data"]
    for call in ("Get", "Path", "Remove"):
        assert "no such volume" in plugin(call, Name=hidden).error
    assert "no such volume" in plugin("Mount", Name=hidden, ID="x").error
    assert plugin("Create", Name="other", Opts={"from": hidden}).error
    for words in ("inspect {}", "rm -y {}", "expand {} 200m", "migrate {} --to sized", "clone {} other"):
        assert ctl(*words.format(hidden).split(), check=False).returncode == 3
    assert names(mover) == ["data"]
    assert ctl("backup", "verify", backup["id"]).returncode == 0
    assert 'volumed_copies{kind="backup",state="ready"} 1.0' in mover.volumed.metrics()
    assert_settled(mover)


# Restores
@pytest.mark.parametrize("backend", ["sized", "local"])
def test_a_volume_is_put_back_in_place(mover: Mover, backend: str) -> None:
    made = mover.create("data", backend, **({} if backend == "local" else {"size": "96m"}))
    path = mover.mount("data")
    fill(path)
    then = trees.picture(path)
    mover.unmount("data")
    backup = back_up(mover, accept_loss=["size"])
    path = mover.mount("data")
    (path / "large").unlink()
    (path / "new").touch()
    refused = mover.volumed.ctl("restore", "data", "--in-place", "-y", check=False)
    assert refused.returncode == 5
    assert "is in use by" in refused.stderr
    mover.unmount("data")
    told = mover.volumed.ctl("restore", "data", "--in-place", "-y").stdout
    assert told.startswith(f"data is on {backend} as data was (")
    after = mover.volume("data")
    assert (after["id"], after["backend"], after["size"]) == (made["id"], backend, made["size"])
    assert picture_of(mover, "data") == then
    assert_settled(mover)
    # And again: its place is another by now.
    (mover.mount("data") / "more").touch()
    mover.unmount("data")
    assert restore(mover, backup["id"], in_place=True)["state"] == "ready"
    assert picture_of(mover, "data") == then
    mover.volumed.ctl("rm", "-y", "data")
    assert names(mover) == []
    mover.volumed.ctl("restore", "data", "--to", backend)  # of a volume that is gone, under its name
    assert picture_of(mover, "data") == then
    mover.volumed.ctl("rm", "-y", "data")
    assert_settled(mover)
    assert mover.volumed.stored() == []


def test_what_a_backup_has_lost_is_not_restored(mover: Mover) -> None:
    mover.create("data", "tree")
    path = mover.mount("data")
    fill(path)
    mover.unmount("data")
    backup = back_up(mover, to="local")
    (stored,) = (mover.volumed.folder / "volumes").glob("v*/data")
    status = (stored / "large").stat()
    with (stored / "large").open("r+b") as opened:
        opened.seek(MIB)
        opened.write(b"x")
    os.utime(stored / "large", ns=(status.st_atime_ns, status.st_mtime_ns))
    then = picture_of(mover, "data")
    found = mover.volumed.ctl("backup", "verify", backup["id"], check=False)
    assert found.returncode == 14
    assert f"  large has other data at byte {MIB}" in found.stdout
    for words in (("again",), ("--in-place", "-y")):
        told = mover.volumed.ctl("restore", "data", *words, check=False)
        assert told.returncode == 1
        assert f"is not what it was when it was made: large has other data at byte {MIB}" in told.stdout
    assert names(mover) == ["data"]
    assert picture_of(mover, "data") == then
    assert_settled(mover)


def test_bad_requests_are_refused_and_change_nothing(mover: Mover) -> None:
    ctl = mover.volumed.ctl
    mover.create("data", "sized", size="64m")
    mover.mount("data")
    refused = ctl("backup", "data", "--to", "images", check=False)
    assert refused.returncode == 5
    assert "cannot be copied as of one moment while it is in use by" in refused.stderr
    assert "stop them first" in refused.stderr
    mover.unmount("data")
    assert ctl("backup", "data", check=False).returncode == 2
    assert ctl("backup", "nothing", "--to", "images", check=False).returncode == 3
    assert "did you mean 'images'" in ctl("backup", "data", "--to", "imags", check=False).stderr
    assert ctl("backup", "data", "--to", "sized", check=False).returncode == 7
    refused = ctl("backup", "data", "--to", "local", check=False)
    assert (refused.returncode, "--accept-loss size" in refused.stderr) == (18, True)
    assert ctl("backup", "data", "--to", "images", "--bandwidth", "fast", check=False).returncode == 2
    assert ctl("backup", "data@then", "--to", "images", check=False).returncode == 3
    assert ctl("restore", "data", check=False).returncode == 3  # it has none
    assert ctl("backup", "rm", "-y", "c123", check=False).returncode == 3
    assert ctl("backup", "verify", "x" * 300, check=False).returncode == 3
    assert mover.volumed.api.get("copies") == []
    backup = back_up(mover)
    assert ctl("restore", "data", check=False).returncode == 4  # its name is taken
    assert ctl("restore", "data", "../x", check=False).returncode == 2
    assert ctl("restore", "data", "other", "--in-place", "-y", check=False).returncode == 2
    assert ctl("backup", "rm", "-y", "data", check=False).returncode == 2  # which of them must be said
    assert ctl("backup", "stop", backup["id"], check=False).returncode == 2
    assert ctl("backup", "rm", backup["id"], check=False).returncode == 130  # nobody confirmed it
    assert [each["id"] for each in json.loads(ctl("-o", "json", "backup", "ls").stdout)] == [backup["id"]]
    assert names(mover) == ["data"]
    assert_settled(mover)


def test_one_that_is_stopped_leaves_nothing(mover: Mover) -> None:
    mover.create("data", "tree")
    fill(mover.mount("data"))
    begun = json.loads(
        mover.volumed.ctl("-o", "json", "backup", "data", "--to", "images", "--bandwidth", "64k", "--detach").stdout
    )
    wait_until(lambda: mover.volumed.api.get("copies", begun["id"])["progress"]["step"] == "copying", timeout=60)
    with pytest.raises(ApiError, match="it is being made"):
        mover.volumed.api.delete("copies", begun["id"])
    mover.volumed.ctl("backup", "stop", begun["id"])
    assert mover.volumed.api.get("copies", begun["id"])["state"] == "failed"
    assert mover.volumed.ctl("backup", "ls").stdout == ""
    assert "failed" in mover.volumed.ctl("backup", "ls", "-a", "data").stdout
    mover.unmount("data")
    assert_settled(mover)
    assert list((mover.volumed.folder / "images-2").glob("*.img")) == []
    mover.volumed.ctl("backup", "rm", "-y", begun["id"])
    assert mover.volumed.api.get("copies") == []


# Killed
POINTS = [point for point in crash_points() if point.startswith("copy.")]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_in_a_backup(mover: Mover, point: str) -> None:
    """There is none, or a whole one; and the next one is whole."""
    mover.create("data", "tree")
    path = mover.mount("data")
    fill(path, 10)
    first = back_up(mover)
    (path / "folder" / "7").write_bytes(b"changed")
    then = trees.picture(path)

    def job() -> None:
        back_up(mover, full=False)
        mover.volumed.api.delete("copies", first["id"])

    survive(mover.volumed, point, job)
    wait_until(lambda: not any(each["state"] in ("copying", "removing") for each in copies(mover)), timeout=60)
    for each in copies(mover):
        if each["state"] == "ready":
            assert mover.volumed.ctl("backup", "verify", each["id"]).returncode == 0
    ready = {each["id"] for each in copies(mover) if each["state"] == "ready"}
    assert (first["id"] in ready) is (point != "copy.removing")
    assert (len(ready - {first["id"]}) == 1) is (point in ("copy.committed", "copy.removing", "copy.cleared"))
    back_up(mover)
    assert restore(mover, "data", name="again", backend="sized")["state"] == "ready"
    assert picture_of(mover, "again") == then
    mover.unmount("data")
    assert_settled(mover)
    held = [each for each in copies(mover) if each["kind"] == "backup" and each["state"] == "ready"]
    wait_until(lambda: len(list((mover.volumed.folder / "images-2").glob("v*.img"))) == len(held), timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["copy.made", "copy.proven", "copy.committed", "copy.cleared"])
def test_killed_in_a_restore(mover: Mover, point: str) -> None:
    """In place: it is all of the one, or all of the other."""
    mover.create("data", "sized", size="64m")
    path = mover.mount("data")
    fill(path, 10)
    then = trees.picture(path)
    mover.unmount("data")
    backup = back_up(mover)
    (mover.mount("data") / "large").write_bytes(b"now")
    mover.unmount("data")
    now = picture_of(mover, "data")
    survive(mover.volumed, point, lambda: restore(mover, backup["id"], in_place=True))
    assert picture_of(mover, "data") == (then if point in ("copy.committed", "copy.cleared") else now)
    assert_settled(mover)
    wait_until(lambda: len(mover.volumed.stored()) == 1, timeout=60)
    assert restore(mover, backup["id"], in_place=True)["state"] == "ready"
    assert picture_of(mover, "data") == then
    assert_settled(mover)
    wait_until(lambda: len(mover.volumed.stored()) == 1, timeout=60)


def copies(mover: Mover) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = mover.volumed.api.get("copies")
    return found
