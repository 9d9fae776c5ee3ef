"""System calls in children that are kept: they do what they are asked, hold nothing, and a hung server costs few."""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.harness.stalled import Server
from volumed.driver import Worker
from volumed.errors import DeadlineExceeded, MountFailed
from volumed.host import left, mounts, served
from volumed.host.linux import LinuxHost

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def idle() -> list[tuple[float, Worker]]:
    """Those that wait for a call; none at first."""
    while served._idle:
        served._idle.pop()[1].close()
    return served._idle


def _children(parent: int | None = None) -> list[Path]:
    """Of this process, or another one, those that make calls."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            of = int(status.read_text().rpartition(") ")[2].split()[1])
            if of == (parent or os.getpid()) and b"served_child" in status.with_name("cmdline").read_bytes():
                found.append(status.parent)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_folders_and_files_are_made_and_renamed(tmp_path: Path, host: LinuxHost) -> None:
    folder, gone = tmp_path / "a/b/caf\udce9", tmp_path / "gone"
    mask = os.umask(0o077)
    for _ in ("made", "there already"):
        host.tree_call("make_folder", folder, 0o711)
    os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o755
    host.tree_call("write", folder / "file", "longer")
    host.tree_call("write", folder / "file", "é")
    assert (folder / "file").read_text() == "é"
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o644
    os.chown(folder, 1234, -1)
    assert host.tree_call("owner", folder) == 1234
    host.tree_call("rename", folder, tmp_path / "a/d")
    assert host.tree_call("there", folder, tmp_path / "a/d", gone) == [False, True, False]
    (tmp_path / "a/d/file").unlink()
    host.tree_call("rmdir", tmp_path / "a/d")
    assert not (tmp_path / "a/d").exists()
    with pytest.raises(FileNotFoundError, match="gone"):
        host.tree_call("rename", gone, folder)
    (tmp_path / "a/file").touch()
    with pytest.raises(FileExistsError):
        host.tree_call("make_folder", tmp_path / "a/file", 0o755)
    with pytest.raises(NotADirectoryError):
        host.tree_call("there", tmp_path / "a/file/b")


def test_a_folder_is_removed_if_its_tree_is_empty(tmp_path: Path, host: LinuxHost) -> None:
    for held, gone in ((["data/file"], False), (["other"], False), ([], True)):
        folder = tmp_path / "folder"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for name in ("mark", *held):
            (folder / name).touch()
        assert host.tree_call("remove_empty", folder, "data", "mark") is gone
        assert all((folder / name).exists() for name in held)
        assert folder.exists() is not gone
        for name in held:
            (folder / name).unlink()


def test_a_tree_is_bound_with_flags_of_its_own(tmp_path: Path, tree: Path, host: LinuxHost) -> None:
    (tree / "file").touch()
    target = tmp_path / "target"
    target.mkdir()
    host.bind_network(tree, target, readonly=True, options=("nosuid", "noexec"))
    (entry,) = [entry for entry in host.mounts() if entry.target == target]
    assert {"ro", "nosuid", "noexec"} <= set(entry.options)
    assert (target / "file").exists()
    host.unmount_network(target)
    with pytest.raises(MountFailed, match="cannot take the option 'soft'"):
        host.bind_network(tree, target, options=("soft",))
    with pytest.raises(MountFailed, match="No such file") as failed:
        host.bind_network(tree / "gone", target)
    assert failed.value.errno == errno.ENOENT
    assert not host.is_mountpoint(target)


def test_one_child_makes_one_call_after_another_and_holds_nothing(
    server: Server, tree: Path, host: LinuxHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    monkeypatch.chdir(tree)
    inherited = os.open(tree, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    host.tree_status(tree)
    os.close(inherited)
    monkeypatch.chdir(tmp_path)
    host.bind_network(tree / "folder", target)
    host.tree_call("owner", target)
    (child,) = _children()
    assert (child / "cwd").readlink() == Path("/")
    assert (child / "ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
    mounts.unmount(target)
    mounts.unmount(tree)


def test_a_tree_that_hangs_holds_up_no_other(server: Server, tree: Path, host: LinuxHost, tmp_path: Path) -> None:
    """Each call has a child to itself. Killed, none is asked again."""
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(host.tree_status, tree, timeout=5.0)
        wait_until(_children)
        for _ in range(3):
            assert host.tree_status(tmp_path).total
        assert not hanging.done()
        with pytest.raises(DeadlineExceeded, match=f"{tree}: its server does not answer"):
            hanging.result()
    server.go_on()
    assert host.tree_status(tree).total == 1000 * 4096
    assert len(_children()) == 1


def test_a_server_that_hangs_costs_few_children_and_no_patience(
    server: Server, tree: Path, host: LinuxHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MOST", 2)
    server.swallow()
    for number in range(served.MOST):
        with pytest.raises(DeadlineExceeded):
            host.tree_call("there", tree / str(number), timeout=1.0)
    for path in (tree / "0", tree / "another"):
        with pytest.raises(DeadlineExceeded, match="calls still hang there"):
            host.tree_call("there", path, timeout=600)
    assert len(left.hanging()) == served.MOST
    assert host.tree_call("there", tmp_path) == [True]
    host.unmount_network(tree, force=True)  # which none of them forbids, and which frees them
    wait_until(lambda: not left.hanging())


def test_a_bind_that_was_given_up_mounts_nothing_later(
    server: Server, tree: Path, host: LinuxHost, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    server.swallow()
    with pytest.raises(DeadlineExceeded):
        host.bind_network(tree / "folder", target, timeout=1.0)
    server.go_on()
    wait_until(lambda: not left.hanging())
    assert not host.is_mountpoint(target)
    host.bind_network(tree / "folder", target)
    assert host.is_mountpoint(target)
    host.unmount_network(target)


def test_those_that_nobody_needs_are_ended(
    host: LinuxHost, tmp_path: Path, idle: list[tuple[float, Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = [served._take() for _ in range(served.KEPT + 2)]
    for child in started:
        served._give_back(child)
    assert len(_children()) == len(idle) == served.KEPT
    monkeypatch.setattr(served, "KEPT_FOR", 0.5)
    time.sleep(0.6)
    host.tree_status(tmp_path)
    assert len(_children()) == 1


def test_one_that_was_killed_is_replaced(host: LinuxHost, tmp_path: Path, idle: list[tuple[float, Worker]]) -> None:
    host.tree_status(tmp_path)
    (child,) = _children()
    os.kill(int(child.name), signal.SIGKILL)
    wait_until(lambda: not idle[0][1].alive)
    assert host.tree_status(tmp_path).total


def test_it_ends_with_the_daemon_though_its_call_hangs(server: Server, tree: Path, host: LinuxHost) -> None:
    server.stop()
    daemon = os.fork()
    if daemon == 0:
        try:
            host.tree_status(tree, timeout=600)
        finally:
            os._exit(1)
    wait_until(lambda: any("fuse" in (child / "stack").read_text() for child in _children(daemon)))
    (child,) = _children(daemon)
    os.kill(daemon, signal.SIGKILL)
    os.waitpid(daemon, 0)
    wait_until(lambda: not (child / "exe").exists())
