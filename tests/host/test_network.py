"""Trees whose server hangs or is dead: every look at them ends, with a reason, and no thread of ours is held."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.harness.stalled import Server, stalled_tree
from volumed import context
from volumed.driver import Revived, TreeStatus
from volumed.errors import DeadlineExceeded, InUse, MountFailed
from volumed.host import left, mounts
from volumed.host.linux import LinuxHost

pytestmark = pytest.mark.root


def test_a_tree_is_measured(server: Server, tree: Path, host: LinuxHost) -> None:
    unit = 4096
    wanted = TreeStatus(1000 * unit, 400 * unit, 500 * unit, inodes=100, inodes_used=10, inodes_available=90)
    assert host.tree_status(tree) == wanted


def test_measuring_is_what_statvfs_tells(tmp_path: Path, host: LinuxHost) -> None:
    room = os.statvfs(tmp_path)
    found = host.tree_status(tmp_path)
    assert (found.total, found.inodes) == (room.f_blocks * room.f_frsize, room.f_files)


def test_what_is_mounted_is_told_without_its_server(
    server: Server, tree: Path, tmp_path: Path, host: LinuxHost
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    server.stop()
    assert not host.is_same(folder, tree)
    assert host.is_same(tree, tree)
    host.bind(folder, other)
    try:
        assert host.is_same(folder, other)
        assert not host.is_same(folder, tmp_path / "none")
    finally:
        host.unmount(other)


def test_force_spares_the_others_of_one_file_system(
    server: Server, tree: Path, tmp_path: Path, host: LinuxHost
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for each in (one, other):
        each.mkdir()
        host.bind(tree, each)
    try:
        host.unmount_network(one, force=True)
        assert not host.is_mountpoint(one)
        assert host.tree_status(other).total
    finally:
        host.unmount_network(other)


def test_a_server_that_does_not_answer(server: Server, tree: Path, host: LinuxHost) -> None:
    server.stop()
    with pytest.raises(DeadlineExceeded, match=f"{tree}: its server does not answer"):
        host.tree_status(tree, timeout=0.2)
    with context.request(timeout=0.1), pytest.raises(DeadlineExceeded):
        host.tree_status(tree)
    server.go_on()
    assert host.tree_status(tree).total


def test_a_look_that_still_hangs_is_not_joined_by_another(server: Server, tree: Path, host: LinuxHost) -> None:
    server.swallow()
    for _ in range(3):
        with pytest.raises(DeadlineExceeded, match="its server does not answer"):
            host.tree_status(tree, timeout=1.0)
    assert len(left.hanging()) == 1
    server.go_on()
    wait_until(lambda: not left.hanging())
    assert host.tree_status(tree).total


def test_what_does_not_need_the_server_does_not_ask_it(server: Server, tree: Path, host: LinuxHost) -> None:
    """Held up, a thread in the kernel could not be ended: so this runs in one that may be left behind."""
    server.stop()
    told: list[object] = []
    looker = threading.Thread(
        target=lambda: told.extend(
            [
                host.is_mountpoint(tree),
                mounts.file_type(tree),
                mounts.is_served(tree, host.mounts),
                mounts.is_served(tree.parent, host.mounts),
            ]
        ),
        daemon=True,
    )
    looker.start()
    looker.join(10)
    server.go_on()
    assert told == [True, stat.S_IFDIR, True, False]


def test_a_dead_server_is_told_from_a_slow_one(server: Server, tree: Path, host: LinuxHost) -> None:
    server.kill()
    with pytest.raises(MountFailed, match="the process that served it is dead") as failed:
        host.tree_status(tree)
    assert failed.value.errno == errno.ENOTCONN
    assert host.is_mountpoint(tree)


@pytest.mark.parametrize("state", ["answers", "hangs", "dead"])
def test_unmounting_needs_no_answer(server: Server, tree: Path, host: LinuxHost, state: str) -> None:
    {"answers": lambda: None, "hangs": server.stop, "dead": server.kill}[state]()
    host.unmount_network(tree, timeout=5, force=True)
    assert not host.is_mountpoint(tree)
    host.unmount_network(tree)
    server.go_on()


def test_unmount_takes_the_careful_way_by_itself(
    server: Server, tree: Path, host: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "unmount", lambda target: pytest.fail("a daemon's thread waits for a server"))
    host.unmount(tree)
    assert not host.is_mountpoint(tree)


def test_whoever_lets_go_at_once_holds_nothing_up(
    server: Server, tree: Path, host: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the kernel, and gone when its name is looked for."""
    held = os.open(tree, os.O_RDONLY)
    monkeypatch.setattr(mounts, "holders_of_mount", lambda target: [])
    letting_go = threading.Timer(0.2, os.close, [held])
    letting_go.start()
    host.unmount_network(tree)
    assert not host.is_mountpoint(tree)
    letting_go.join()


def test_what_nobody_can_be_named_for_is_said_too(
    server: Server, tree: Path, host: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "holders_of_mount", lambda target: [])
    held = os.open(tree, os.O_RDONLY)
    try:
        with pytest.raises(InUse, match="a process"):
            host.unmount_network(tree)
    finally:
        os.close(held)


def test_who_holds_a_tree_is_named_though_its_server_hangs(server: Server, tree: Path, host: LinuxHost) -> None:
    holder = subprocess.Popen(["sleep", "60"], cwd=tree)
    server.stop()
    try:
        with pytest.raises(InUse, match=rf"sleep \(pid {holder.pid}\)"):
            host.unmount_network(tree, timeout=5)
    finally:
        server.go_on()
        holder.kill()
        holder.wait()


@pytest.fixture
def helper_of_mount() -> Iterator[Path]:
    """mount(8) looks for `mount.TYPE` in /sbin and nowhere else."""
    path = Path(f"/sbin/mount.stalled-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


MOUNT = 'mount -t tmpfs none "$2"'


@pytest.mark.parametrize("script", ["sleep 600", f"{MOUNT}; sleep 600"])
def test_a_mount_that_gets_no_answer_is_given_up(
    tree: Path, host: LinuxHost, helper_of_mount: Path, script: str
) -> None:
    helper_of_mount.write_text(f"#!/bin/sh\n{script}\n")
    helper_of_mount.chmod(0o755)
    kind = helper_of_mount.suffix[1:]
    with pytest.raises(DeadlineExceeded, match=rf"mounting server:/export \({kind}\) got no answer in time"):
        host.mount_network("server:/export", tree, fstype=kind, timeout=0.5)
    assert not host.is_mountpoint(tree)
    assert str(tree) not in sh("ps", "-ww", "-eo", "args")


def test_a_mount_that_fails_after_it_mounted_is_taken_back(tree: Path, host: LinuxHost, helper_of_mount: Path) -> None:
    helper_of_mount.write_text(f"#!/bin/sh\n{MOUNT}; echo options=$4 >&2; exit 1\n")
    helper_of_mount.chmod(0o755)
    with pytest.raises(MountFailed, match="options=ro,soft|options=soft,ro"):
        host.mount_network("server:/x", tree, fstype=helper_of_mount.suffix[1:], options=["soft"], readonly=True)
    assert not host.is_mountpoint(tree)


def test_what_mount_says_is_told(tree: Path, host: LinuxHost) -> None:
    with pytest.raises(MountFailed, match="mounting none:/x .nosuchfs. failed: mount: .*does not exist"):
        host.mount_network("none:/x", tree, fstype="nosuchfs")


@pytest.mark.parametrize("word", ["bind", "remount", "loop=/dev/sda", "helper=sh", "x-mount.mkdir", "ro,move"])
def test_words_that_mount_takes_for_itself_are_refused(tree: Path, host: LinuxHost, word: str) -> None:
    with pytest.raises(MountFailed, match="cannot take the option"):
        host.mount_network(str(tree.parent), tree, fstype="nfs", options=["soft", word])
    assert not host.is_mountpoint(tree)


# Dead mounts that containers have
CONTAINER = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", sys.argv[1], sys.argv[2]], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro,nosuid", sys.argv[2]], check=True)
subprocess.run(["umount", sys.argv[1]], check=True)
held = os.open(sys.argv[2], os.O_RDONLY) if sys.argv[3] == "held" else None
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(os.statvfs(sys.argv[2]).f_blocks, int(os.statvfs(sys.argv[2]).f_flag), flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


@pytest.mark.parametrize("held", ["held", "idle"])
def test_a_container_on_a_dead_mount_gets_the_new_one(tree: Path, host: LinuxHost, tmp_path: Path, held: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with stalled_tree(tree) as first:
        words: list[str | Path] = [sys.executable, "-c", CONTAINER, tree, inside, held]
        container = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert container.stdin is not None
        assert container.stdout is not None

        def look() -> list[int]:
            assert container.stdin is not None
            assert container.stdout is not None
            container.stdin.write("\n")
            return [int(word) for word in container.stdout.readline().split()]

        try:
            assert container.stdout.readline() == "ready\n"
            alive = look()
            assert alive[0] == 1000
            assert host.revive(tree) == []
            first.kill()
            assert look() == [errno.ENOTCONN]
            host.unmount_network(tree)
            with stalled_tree(tree):
                assert host.revive(tree) == [Revived(container.pid, inside, "")]
                assert look() == alive  # read-only and nosuid as before
                assert host.revive(tree) == []
        finally:
            container.stdin.close()
            container.wait(10)
            container.stdout.close()
