"""Trees: all they have arrives, later rounds carry what changed, whatever breaks in between is noticed."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.conftest import MakeFilesystem, sh, wait_until
from tests.migration.trees import make_everything, picture, unlock, write
from volumed.errors import CapacityExhausted, HostError
from volumed.migration.movers.mover import Control, Stopped
from volumed.migration.movers.tree import TreeMover
from volumed.migration.tree.child import Child
from volumed.migration.tree.content import Gate
from volumed.migration.tree.entries import Tree
from volumed.migration.tree.pool import Pool, Shared
from volumed.migration.tree.rounds import Rounds
from volumed.migration.tree.tracking import Tracker
from volumed.migration.tree.worker import Failure, Worker
from volumed.units import MIB

pytestmark = pytest.mark.root


@pytest.fixture
def sides(make_filesystem: MakeFilesystem) -> Iterator[tuple[Path, Path]]:
    source, target = make_filesystem("ext4"), make_filesystem("ext4")
    yield source, target
    unlock(source)
    unlock(target)


@contextmanager
def mover_of(source: Path, target: Path, workdir: Path, **more: Any) -> Iterator[TreeMover]:
    mover = TreeMover(source, target, workdir, **more)
    try:
        yield mover
    finally:
        mover.close()


@contextmanager
def worker_of(sides: tuple[Path, Path], gate: Gate) -> Iterator[Worker]:
    """In this process."""
    roots, mask = [os.open(side, os.O_RDONLY) for side in sides], os.umask(0)
    worker = Worker(Tree(roots[0]), Tree(roots[1]), gate)
    try:
        yield worker
    finally:
        worker.forget_folders()
        for root in roots:
            os.close(root)
        os.umask(mask)


def proven(mover: TreeMover) -> str:
    verified = mover.verify(Control())
    assert verified.differences == []
    return verified.digest


def stopping_at(amount: int, *, rate: int) -> Control:
    def tell() -> None:
        if control.bytes > amount:
            control.stop()

    control = Control(rate=rate, tell=tell)
    return control


def test_everything_arrives(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    make_everything(source)
    control = Control()
    with mover_of(source, target, tmp_path / "work") as mover:
        there = mover.estimate(control)
        done = mover.round(control)
        proven(mover)
        assert mover.round(control, last=True).files == 0
    assert picture(target) == picture(source)
    assert min(done.files, there.files) > 60
    assert control.files >= there.files
    assert control.bytes > 5 * MIB
    for name in ("sparse", "hole"):
        assert (target / name).stat().st_blocks * 512 < 2 * MIB
    assert (target / "zeros").stat().st_blocks * 512 >= 3 * MIB


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_another_file_system(kind: str, make_filesystem: MakeFilesystem, tmp_path: Path) -> None:
    source, target = make_filesystem("ext4"), make_filesystem(kind)
    make_everything(source)
    (source / "hole").unlink()
    try:
        with mover_of(source, target, tmp_path / "work") as mover:
            mover.round(Control())
            proven(mover)
        assert picture(target) == picture(source)
    finally:
        unlock(source)
        unlock(target)


def change_everything(root: Path) -> None:
    """Each kind of change there is."""
    write(root / "plain", b"longer than it was")
    with (root / "large").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"in the middle")
    with (root / "sparse").open("r+b") as file:
        file.truncate(50 << 20)
        file.seek(30 << 20)
        file.write(b"new data in a hole")
    sh("fallocate", "--punch-hole", "--offset", "0", "--length", str(1 << 20), root / "sparse")
    os.truncate(root / "owned", 10)
    (root / "empty").unlink()
    (root / "empty").mkdir()
    write(root / "empty" / "now a folder", b"x")
    sh("rm", "-r", root / "shared")
    write(root / "shared", b"now a file")
    (root / "names").rename(root / "renamed")
    (root / "none").rename(root / "renamed" / "none")
    (root / "suid").chmod(0o755)
    os.setxattr(root / "large", "user.new", b"1")
    os.removexattr(root / "attributes", "trusted.note")
    sh("chattr", "-i", root / "immutable", root / "frozen")
    write(root / "immutable", b"changed")
    write(root / "frozen" / "more", b"x")
    sh("chattr", "+i", root / "frozen")
    (root / "link").unlink()
    (root / "link").symlink_to("elsewhere")
    (root / "linked" / "first").unlink()
    write(root / "linked" / "first", b"no link any more")
    os.link(root / "large", root / "linked" / "large")
    with (root / "linked" / "deep" / "second").open("ab") as file:
        file.write(b", changed by one")
    os.utime(root / "capable", ns=(1, 1))
    os.chown(root / "nodump", 9, 9)
    (root / "new").mkdir()
    for number in range(300):
        write(root / "new" / f"file{number}", b"x" * number)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_later_round_carries_what_changed(tracked: bool, sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    make_everything(source)
    for number in range(2000):
        write(source / f"still{number}", b"not touched")
    with mover_of(source, target, tmp_path / "work") as mover:
        if tracked:
            mover.watch()
        mover.round(Control())
        before = proven(mover)
        change_everything(source)
        assert (mover.pending() is not None) == tracked
        control = Control()
        done = mover.round(control, last=True)
        assert proven(mover) != before
        mover.round(Control())  # what changed within the clock's grain is looked at once more
        assert mover.round(Control(), last=True).files == 0
    assert picture(target) == picture(source)
    assert done.files < 400
    assert done.changed < 12 * MIB
    assert (target / "sparse").stat().st_blocks * 512 < 2 * MIB


def test_a_tracked_round_looks_at_nothing_else(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    for number in range(3000):
        write(source / f"still{number}", b"not touched")
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.watch()
        mover.round(Control())
        proven(mover)
        for number in range(0, 3000, 100):
            write(source / f"still{number}", b"touched by now")
        control = Control()
        mover.round(control, last=True)
        proven(mover)
    assert control.files < 100
    assert picture(target) == picture(source)


@pytest.mark.parametrize("tracked", [True, False])
def test_stores_through_a_mapping_are_seen(tracked: bool, sides: tuple[Path, Path], tmp_path: Path) -> None:
    """Into a page that is dirty already, which moves no time; by a mapping that stays, which makes no event."""
    source, target = sides
    write(source / "mapped", bytes(4096))
    with (source / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
        mapping[0:5] = b"first"
        time.sleep(0.2)  # longer than the grain of the clock
        with mover_of(source, target, tmp_path / "work") as mover:
            if tracked:
                mover.watch()
            mover.round(Control())
            for word in (b"second", b"third!"):
                mapping[0:6] = word
                mover.round(Control(), last=True)
                assert (target / "mapped").read_bytes()[:6] == word
            proven(mover)
    assert picture(target) == picture(source)


@pytest.mark.parametrize("name", ["plain", "large", "sparse"])
def test_a_flipped_byte_is_found(name: str, sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    make_everything(source)
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control(), last=True)
        status = (target / name).stat()
        with (target / name).open("r+b") as file:
            file.seek(3)
            file.write(b"\x55")
        os.utime(target / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        verified = mover.verify(Control())
        assert verified.differences == [f"{name} has other data at byte 0"]
        assert verified.digest == ""
        assert mover.verify(Control()).differences == verified.differences


def test_other_metadata_is_found(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    make_everything(source)
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control(), last=True)
        (target / "plain").chmod(0o600)
        (target / "empty").unlink()
        os.setxattr(target / "attributes", "user.note", b"other")
        found = {line.split()[0] for line in mover.verify(Control()).differences}
    assert {"plain", "empty", "attributes"} <= found


def test_a_killed_copy_goes_on(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    make_everything(source)
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control())
        first = proven(mover)
    for number in range(50):
        write(source / f"more{number}", random.randbytes(MIB))
    with mover_of(source, target, tmp_path / "work") as mover:
        control = Control(rate=20 * MIB)
        threading.Timer(0.8, lambda: os.killpg(mover._session._process.pid, signal.SIGKILL)).start()  # type: ignore[union-attr]
        with pytest.raises(HostError, match="died"):
            mover.round(control)
    write(target / "left over", b"by nobody knows whom")
    with mover_of(source, target, tmp_path / "work") as mover:
        done = mover.round(Control(), last=True)
        assert proven(mover) != first
    assert 0 < done.changed <= 50 * MIB  # the 5 MiB of before not again
    assert picture(target) == picture(source)


def test_a_copy_cut_short_inside_a_file_is_not_taken_for_whole(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """The target's chunk is new, what is written down of it old, and the source as it was: all three must not agree."""
    source, target = sides
    old = random.randbytes(40 * MIB)
    write(source / "large", old)
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control())
        proven(mover)
        write(source / "large", random.randbytes(40 * MIB))
        with pytest.raises(Stopped):
            mover.round(stopping_at(5 * MIB, rate=20 * MIB))
        write(source / "large", old)
        mover.round(Control(), last=True)
        proven(mover)
    assert picture(target) == picture(source)


def test_after_another_boot_nothing_is_taken_for_unchanged(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """What a power cut can do, put together: the source has lost what was copied of it, and kept the times."""
    source, target = sides
    write(source / "file", random.randbytes(3 * MIB))
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control())
        proven(mover)
    with (source / "file").open("r+b") as file:
        file.write(b"as it was before")
    os.utime(source / "file", ns=(0, (target / "file").stat().st_mtime_ns))
    time.sleep(0.2)  # beyond the grain of the clock
    manifest = apsw.Connection(str(tmp_path / "work" / "tree.db"))
    manifest.execute("UPDATE entry SET ctime = ? WHERE path = ?", ((source / "file").stat().st_ctime_ns, b"file"))
    with mover_of(source, target, tmp_path / "work") as mover:
        assert mover.round(Control()).changed == 0  # so it looks
    manifest.execute("UPDATE boot SET id = 'another'")
    manifest.close()
    with mover_of(source, target, tmp_path / "work") as mover:
        assert mover.round(Control(), last=True).changed == MIB
        proven(mover)
    assert picture(target) == picture(source)


def test_it_stops_when_told_and_keeps_to_its_rate(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    for number in range(100):
        write(source / f"file{number}", random.randbytes(MIB))
    time.sleep(0.2)  # longer than the grain of the clock
    with mover_of(source, target, tmp_path / "work") as mover:
        stopped = stopping_at(10 * MIB, rate=20 * MIB)
        with pytest.raises(Stopped):
            mover.round(stopped)
        assert 10 * MIB < stopped.bytes < 50 * MIB
        done = mover.round(Control(), last=True)
        assert done.changed < 95 * MIB
        proven(mover)
    assert picture(target) == picture(source)


def test_a_full_target_is_said(make_filesystem: MakeFilesystem, tmp_path: Path) -> None:
    source, target = make_filesystem("ext4"), make_filesystem("ext4", size=32 * MIB)
    for number in range(60):
        write(source / f"file{number}", random.randbytes(MIB))
    with (
        mover_of(source, target, tmp_path / "work") as mover,
        pytest.raises(CapacityExhausted, match="is full at 'file"),
    ):
        mover.round(Control())


def test_what_the_target_cannot_hold_names_the_path(tmp_path: Path, make_filesystem: MakeFilesystem) -> None:
    source, target = make_filesystem("ext4"), tmp_path / "ramfs"
    target.mkdir()
    sh("mount", "-t", "ramfs", "none", target)
    try:
        write(source / "attributes", b"x")
        os.setxattr(source / "attributes", "user.note", b"x")
        with mover_of(source, target, tmp_path / "work") as mover, pytest.raises(HostError, match="at 'attributes'"):
            mover.round(Control())
        with mover_of(source, target, tmp_path / "work", losses=frozenset({"xattrs"})) as mover:
            mover.round(Control(), last=True)
            proven(mover)
        assert (target / "attributes").read_bytes() == b"x"
    finally:
        sh("umount", target)


def test_a_mount_inside_is_refused(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    (source / "inside").mkdir()
    sh("mount", "-t", "tmpfs", "none", source / "inside")
    try:
        with mover_of(source, target, tmp_path / "work") as mover, pytest.raises(HostError, match="is mounted here"):
            mover.round(Control())
    finally:
        sh("umount", source / "inside")


def test_a_tree_in_use_is_copied_again_and_again(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """Files, folders and links come, go and change their type under the rounds; nothing outside is ever read."""
    source, target = sides
    secret = tmp_path / "secret"
    secret.mkdir()
    write(secret / "file", b"of the host")
    ends = threading.Event()
    busy = threading.Thread(target=_churn, args=(source, secret, ends))
    busy.start()
    try:
        with mover_of(source, target, tmp_path / "work") as mover:
            mover.watch()
            for _ in range(8):
                mover.round(Control())
                assert not any(b"of the host" in _read(path) for path in target.rglob("file"))
            ends.set()
            busy.join()
            mover.round(Control(), last=True)
            proven(mover)
    finally:
        ends.set()
        busy.join()
    assert picture(target) == picture(source)


def _read(path: Path) -> bytes:
    return b"" if path.is_symlink() or any(parent.is_symlink() for parent in path.parents) else path.read_bytes()


def _churn(root: Path, outside: Path, ends: threading.Event) -> None:
    dice = random.Random(7)
    while not ends.is_set():
        place = root / f"d{dice.randrange(5)}"
        name = place / dice.choice(["file", "other", "third"])
        try:
            match dice.randrange(9):
                case 0:
                    place.mkdir(exist_ok=True)
                case 1 | 2 | 3:
                    name.write_bytes(dice.randbytes(dice.randrange(3 * MIB) if dice.random() < 0.1 else 2000))
                case 4:
                    name.unlink()
                case 5:
                    place.rename(root / f"d{dice.randrange(5)}")
                case 6:
                    sh("rm", "-rf", place)
                    place.symlink_to(outside)
                case 7:
                    os.link(name, root / f"link{dice.randrange(3)}")
                case 8:
                    (root / f"link{dice.randrange(3)}").unlink()
        except OSError:
            continue


def test_a_directory_that_got_the_number_of_a_removed_one_is_another(sides: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = sides
    (source / "folder").mkdir()
    write(source / "folder" / "of the first", b"x")
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.watch()
        mover.round(Control())
        proven(mover)
        number = (source / "folder").stat().st_ino
        sh("rm", "-r", source / "folder")
        (source / "folder").mkdir()
        assert (source / "folder").stat().st_ino == number
        write(source / "folder" / "of the second", b"y")
        mover.round(Control(), last=True)
        proven(mover)
    assert picture(target) == picture(source)


def test_a_child_that_lost_its_daemon_ends(sides: tuple[Path, Path], tmp_path: Path) -> None:
    with mover_of(*sides, tmp_path / "work") as mover:
        mover.round(Control())
        assert mover._session is not None
        process = mover._session._process
        assert process.stdin is not None
        process.stdin.close()
        wait_until(lambda: process.poll() is not None)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_file_that_got_a_second_name_between_rounds_is_one_file(
    tracked: bool, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    source, target = sides
    write(source / "first", b"of one name")
    (source / "folder").mkdir()
    with mover_of(source, target, tmp_path / "work") as mover:
        if tracked:
            mover.watch()
        mover.round(Control())
        proven(mover)
        os.link(source / "first", source / "folder" / "second")
        mover.round(Control(), last=True)
        proven(mover)
    assert (target / "first").stat().st_ino == (target / "folder" / "second").stat().st_ino
    assert picture(target) == picture(source)


def test_what_an_earlier_round_wrote_unproven_is_proven_later(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """A later round writes one chunk of a file anew, which does not prove the others."""
    source, target = sides
    write(source / "large", random.randbytes(5 * MIB))
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control())
    with (target / "large").open("r+b") as file:
        status = (target / "large").stat()
        file.write(b"by nobody")
        file.flush()
        os.utime(target / "large", ns=(status.st_atime_ns, status.st_mtime_ns))
    with (source / "large").open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"changed")
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control(), last=True)
        assert mover.verify(Control()).differences == ["large has other data at byte 0"]


def test_a_round_cut_short_leaves_no_directory_of_the_target_unlocked(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """Which the source, unchanged, does not tell, and what was written down of it, proven, neither."""
    source, target = sides
    (source / "frozen").mkdir()
    write(source / "frozen" / "file", b"data")
    sh("chattr", "+i", str(source / "frozen"))
    time.sleep(0.3)  # longer than the grain of the clock
    with mover_of(source, target, tmp_path / "work") as mover:
        mover.round(Control())
        proven(mover)
        mover.round(Control())
        proven(mover)
        write(source / "large", random.randbytes(40 * MIB))
        with pytest.raises(Stopped):
            mover.round(stopping_at(5 * MIB, rate=20 * MIB))
        mover.round(Control(), last=True)
        proven(mover)
    assert "i" in sh("lsattr", "-d", str(target / "frozen")).split()[0]
    assert picture(target) == picture(source)


def test_what_we_write_ourselves_is_not_tracked(make_filesystem: MakeFilesystem) -> None:
    """A copy on the same file system made a list so long that everything was taken as changed."""
    root = make_filesystem("ext4")
    for name in ("source", "target", "target too"):
        (root / name / "below").mkdir(parents=True)
    tracker = Tracker(str(root / "source"), ours=str(root / "target"))
    try:
        assert tracker.take() is None
        for name in ("source", "target", "target too"):
            write(root / name / "below" / "file", b"data")
            write(root / name / "file", b"data")
        assert tracker.pending() == 4
        assert sorted(tracker.take() or ()) == ["below/file", "file"]
    finally:
        tracker.close()


def test_time_without_a_copy_is_no_credit_to_a_throttled_one() -> None:
    child, shared = Child.__new__(Child), Shared(1)
    child._pool = Pool.__new__(Pool)
    child._pool.shared = shared
    child._rate = 20 * MIB
    child._told = child._ticked = time.monotonic() - 60
    child._rounds = Rounds.__new__(Rounds)
    child._rounds.looked = child._rounds.compared = 0
    child._tick(child._rounds)
    assert 0 < shared.allowed - shared.done() <= 20 * MIB


def test_a_file_that_changed_when_its_reading_began_is_looked_at_again(sides: tuple[Path, Path]) -> None:
    """However long it was read: what was stored in that instant has the same change time."""
    for name in ("first", "second"):
        write(sides[0] / name, b"just now")
    with worker_of(sides, lambda _: time.sleep(0.2)) as worker:
        copied = worker.copy([("", [("first", None), ("second", None)])])
    assert [entry.ctime for entry in copied.entries] == [0, 0]


def test_an_attribute_that_cannot_be_read_is_not_left_behind(
    sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(sides[0] / "attributes", b"data")
    os.setxattr(sides[0] / "attributes", "user.note", b"value")

    def broken(*_: object, **__: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "getxattr", broken)
    with worker_of(sides, lambda _: None) as worker, pytest.raises(Failure, match="Input/output error"):
        worker.copy([("", [("attributes", None)])])
