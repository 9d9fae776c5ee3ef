"""Mounts, loop devices, freezing and child processes: what this machine's kernel does when we ask it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, sh, wait_until
from volumed import context
from volumed.errors import CommandFailed, DeadlineExceeded, HostError, InUse, MountFailed
from volumed.host import freeze, loop, mounts
from volumed.host.linux import LinuxHost
from volumed.host.run import run
from volumed.units import MIB

pytestmark = pytest.mark.root


# Mounts
def test_who_holds_a_mount_is_named(make_filesystem: MakeFilesystem, host: LinuxHost) -> None:
    target = make_filesystem("ext4", size=64 * MIB)
    with (target / "file").open("w"), pytest.raises(InUse, match="is held by"):
        host.unmount(target)
    child = subprocess.Popen(["sleep", "60"], cwd=target)
    try:
        with pytest.raises(InUse, match=rf"sleep \(pid {child.pid}\)"):
            host.unmount(target)
    finally:
        child.kill()
        child.wait()


def test_whoever_lets_go_at_once_holds_no_mount_up(
    make_filesystem: MakeFilesystem, host: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the kernel, and gone when its name is looked for."""
    target = make_filesystem("ext4", size=64 * MIB)
    held = os.open(target, os.O_RDONLY)
    monkeypatch.setattr(mounts, "holders_of_mount", lambda target: [])
    letting_go = threading.Timer(0.2, os.close, [held])
    letting_go.start()
    host.unmount(target)
    assert not host.is_mountpoint(target)
    letting_go.join()


def test_unmount_takes_all_that_is_stacked_and_bears_repeating(tmp_path: Path, host: LinuxHost) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for _ in range(3):
        host.bind(tmp_path, target)
    assert host.is_mountpoint(target)
    host.unmount(target)
    assert not host.is_mountpoint(target)
    host.unmount(target)
    host.unmount(tmp_path / "none")


def test_names_with_blanks_and_newlines(tmp_path: Path, host: LinuxHost) -> None:
    target = tmp_path / "a b\tc\nd\\e#f"
    target.mkdir()
    host.bind(tmp_path, target)
    try:
        assert [entry.target for entry in host.mounts() if entry.target == target] == [target]
    finally:
        host.unmount(target)


def test_flags_of_a_bind_mount(tmp_path: Path, host: LinuxHost) -> None:
    target = tmp_path / "target"
    target.mkdir()
    host.bind(tmp_path, target, readonly=True, options=("nodev", "noexec"))
    try:
        (entry,) = [entry for entry in host.mounts() if entry.target == target]
        assert {"ro", "nodev", "noexec"} <= set(entry.options)
        with pytest.raises(OSError, match="Read-only"):
            (target / "file").write_text("")
    finally:
        host.unmount(target)
    with pytest.raises(MountFailed, match="cannot take the option 'data=journal'"):
        host.bind(tmp_path, target, options=("data=journal",))
    assert not host.is_mountpoint(target)


def test_a_change_of_the_table_is_heard(tmp_path: Path, host: LinuxHost) -> None:
    wait_until(lambda: not host.wait_for_mount_change(0.05))  # others mount on this machine, too
    target = tmp_path / "target"
    target.mkdir()
    host.bind(tmp_path, target)
    assert host.wait_for_mount_change(5)
    host.unmount(target)
    assert host.wait_for_mount_change(5)


# Loop devices
def test_loops_are_one_per_file_however_many_ask(tmp_path: Path) -> None:
    images = []
    for number in range(12):
        images.append(tmp_path / f"image-{number}")
        with images[-1].open("wb") as file:
            file.truncate(MIB)
    with ThreadPoolExecutor(12) as pool:
        devices = list(pool.map(lambda image: loop.attach(image, direct_io=True, readonly=False), images))
    assert len(set(devices)) == 12
    for image, device in zip(images, devices, strict=True):
        assert loop.attach(image, direct_io=True, readonly=False) == loop.find(image) == device
        loop.detach(device)
        loop.detach(device)
        assert loop.find(image) is None


def test_a_loop_device_that_is_held_is_not_freed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    device = loop.attach(image, direct_io=False, readonly=False)
    with device.open("rb"), pytest.raises(InUse):
        loop.detach(device)
    loop.detach(device)
    assert loop.find(image) is None


def test_a_loop_device_that_somebody_else_takes_at_once_was_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(bytes(MIB))
    other.write_bytes(bytes(MIB))
    device = loop.attach(image, direct_io=False, readonly=False)
    opened = loop._opened

    @contextlib.contextmanager
    def opened_and_taken(path: Path, *, readonly: bool = False) -> Iterator[int]:
        with opened(path, readonly=readonly) as descriptor:
            yield descriptor
        monkeypatch.undo()
        sh("losetup", device, other)

    monkeypatch.setattr(loop, "_opened", opened_and_taken)
    loop.detach(device)
    assert loop.find(other) == device
    loop.detach(device)


# Freezing
FROZEN = """
import sys, time
from pathlib import Path
from volumed.host.freeze import frozen
with frozen(Path(sys.argv[1]), timeout=float(sys.argv[2])):
    print("frozen", flush=True)
    time.sleep(60)
"""


def write(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", 'echo x > "$1" && sync "$1"', "sh", path])


def test_a_frozen_file_system_takes_no_write_until_it_is_thawed(make_filesystem: MakeFilesystem) -> None:
    target = make_filesystem("xfs")
    with freeze.frozen(target, timeout=20):
        writer = write(target / "file")
        time.sleep(0.3)
        assert writer.poll() is None
    assert writer.wait(10) == 0


def test_a_block_that_fails_thaws_as_well(make_filesystem: MakeFilesystem) -> None:
    target = make_filesystem("xfs")
    with pytest.raises(ZeroDivisionError), freeze.frozen(target, timeout=20):
        raise ZeroDivisionError
    assert write(target / "file").wait(10) == 0


def test_what_somebody_else_froze_stays_frozen(make_filesystem: MakeFilesystem) -> None:
    target = make_filesystem("xfs")
    sh("fsfreeze", "--freeze", target)
    try:
        with pytest.raises(HostError, match="cannot be frozen"), freeze.frozen(target, timeout=20):
            pass
        writer = write(target / "file")
        time.sleep(0.3)
        assert writer.poll() is None
    finally:
        sh("fsfreeze", "--unfreeze", target)
    assert writer.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_thawed_when_the_daemon_is_killed(make_filesystem: MakeFilesystem, number: signal.Signals) -> None:
    target = make_filesystem("xfs")
    child = subprocess.Popen([sys.executable, "-c", FROZEN, target, "30"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    writer = write(target / "file")
    child.send_signal(number)
    child.wait()
    assert writer.wait(10) == 0


def test_it_is_thawed_when_the_time_is_up_and_that_is_told(make_filesystem: MakeFilesystem) -> None:
    target = make_filesystem("xfs")
    with pytest.raises(HostError, match="could not be held still for long enough"), freeze.frozen(target, timeout=1):
        assert write(target / "file").wait(20) == 0


# Child processes
def test_a_child_and_all_it_started_die_at_the_deadline(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(DeadlineExceeded, match="did not end in time and was killed"):
        run(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"], timeout=0.3)
    wait_until(lambda: not _lives(int(pid.read_text())))
    with context.request(timeout=0.2), pytest.raises(DeadlineExceeded):
        run(["sleep", "60"])


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_what_a_child_says_is_told_without_the_secrets() -> None:
    with pytest.raises(CommandFailed) as failed:
        run(["sh", "-c", "echo password=hunter2 >&2; exit 3"], secrets=["hunter2"])
    assert failed.value.returncode == 3
    assert "hunter2" not in str(failed.value) + failed.value.stderr
    assert "password=***" in failed.value.stderr


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(CommandFailed, match="mkfs.nonsense is not installed"):
        run(["mkfs.nonsense"])


def test_a_childs_world_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    told = run(["env"]).stdout
    assert "SECRET" not in told
    assert "LC_ALL=C.UTF-8" in told


def test_output_that_is_no_text() -> None:
    assert run(["printf", r"\377\n"]).stdout == "\\xff\n"


def test_a_path_on_no_mount_of_ours_is_said(host: LinuxHost) -> None:
    assert host.project_quota_supported(Path("/proc")) is False
    assert mounts.is_mountpoint(Path("/proc"))
