"""Devices that come, change and go: the kernel's own events, on zram disks of this machine's."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, wait_until
from volumed import context
from volumed.errors import DeadlineExceeded, InUse
from volumed.host import devices, loop
from volumed.host.linux import LinuxHost
from volumed.units import MIB

pytestmark = pytest.mark.root
CONTROL = Path("/sys/class/zram-control")


@pytest.fixture
def plug() -> Iterator[Callable[[], Path]]:
    """A new disk, as the kernel announces any other."""
    made: list[str] = []

    def plug() -> Path:
        made.append((CONTROL / "hot_add").read_text().strip())
        return Path(f"/dev/zram{made[-1]}")

    yield plug
    for number in made:
        with contextlib.suppress(OSError):
            (CONTROL / "hot_remove").write_text(number)


def next_names(count: int) -> list[str]:
    """What the kernel will call the next ones."""
    free = (number for number in itertools.count() if not Path(f"/sys/block/zram{number}").exists())
    return [f"/dev/zram{number}" for number in itertools.islice(free, count)]


@pytest.fixture
def backing(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    file = tmp_path / "backing"
    file.touch()
    with file.open("r+b") as opened:
        opened.truncate(16 * MIB)
    device = loop.attach(file, direct_io=False, readonly=False)
    yield file, device
    loop.detach(device)


def test_what_is_there_is_found_and_what_is_not_is_not(host: LinuxHost, plug: Callable[[], Path]) -> None:
    device = plug()
    assert host.find_device({"DEVNAME": str(device)}) == device
    assert host.find_device({"DEVNAME": "/dev/none"}, {"DEVNAME": str(device)}) == device
    assert host.find_device({"DEVNAME": str(device), "ID_SERIAL": "another"}) is None
    assert host.find_device() is None


def test_an_event_ends_the_wait(host: LinuxHost, plug: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []
    look = devices._find

    def counted(udev: object, choices: Sequence[Mapping[str, str]]) -> Path | None:
        looks.append(None)
        return look(udev, choices)

    monkeypatch.setattr(devices, "_find", counted)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(host.wait_for_device, {"DEVNAME": next_names(1)[0]}, timeout=60)
        wait_until(lambda: looks)
        assert plug() == waiting.result(60)
    assert len(looks) == 1  # before it came: the rest was the event's


def test_many_wait_for_one_each(host: LinuxHost, plug: Callable[[], Path]) -> None:
    names = next_names(8)
    started = threading.Barrier(9)

    def wait(name: str) -> Path:
        started.wait()
        return host.wait_for_device({"DEVNAME": name}, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(wait, name) for name in names]
        started.wait()
        for _ in names:
            plug()
        assert [str(each.result(60)) for each in waiting] == names


def test_what_does_not_come_is_said_in_time(host: LinuxHost) -> None:
    with pytest.raises(DeadlineExceeded, match="no block device with ID_SERIAL=vol0123 or A=1, B=2 appeared"):
        host.wait_for_device({"ID_SERIAL": "vol0123"}, {"A": "1", "B": "2"}, timeout=0.1)
    with context.request(timeout=0.1), pytest.raises(DeadlineExceeded):
        host.wait_for_device({"ID_SERIAL": "vol0123"}, timeout=3600)


def test_a_disk_that_grows_is_awaited(host: LinuxHost, backing: tuple[Path, Path]) -> None:
    file, device = backing
    host.wait_for_device_size(device, 16 * MIB, timeout=0)
    with pytest.raises(DeadlineExceeded, match=f"has {16 * MIB} bytes still"):
        host.wait_for_device_size(device, 17 * MIB, timeout=0.1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(host.wait_for_device_size, device, 32 * MIB, timeout=60)
        with file.open("r+b") as opened:
            opened.truncate(32 * MIB)
        host.refresh_loop(device)
        waiting.result(60)


def test_who_holds_a_device_is_named(
    host: LinuxHost, backing: tuple[Path, Path], make_filesystem: MakeFilesystem
) -> None:
    _, device = backing
    host.check_unheld(device)
    with device.open("rb"), pytest.raises(InUse, match=r"device /dev/loop\d+: is held by: .*\(pid \d+\)"):
        host.check_unheld(device)
    host.check_unheld(device)
    target = make_filesystem("ext4", size=64 * MIB)
    mounted = next(Path(entry.source) for entry in host.mounts() if entry.target == target)
    with pytest.raises(InUse, match=f"is held by: the mount at {target}"):
        host.check_unheld(mounted)
    host.check_unheld(Path("/dev/none"))
