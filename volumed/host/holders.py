"""Who holds a mount or a device: for the error that says so. Looks through /proc, and never at a server."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from volumed.driver import MountEntry
from volumed.errors import HostError, InUse

PROC = Path("/proc")
MAX_NAMED = 5
PATIENCE = 0.5  # seconds; an error that comes late helps less than one that names fewer
_MOMENT = 0.5  # seconds in which whoever only looks at a device has closed it again
_UDEV_PATIENCE = 15.0  # its rules run blkid and more
_CONTAINER = re.compile(r"[0-9a-f]{64}")


def holders_of_mount(target: Path) -> list[str]:
    """Each process with its working directory, root or an open file below `target`: `nginx (pid 4121)`."""
    prefix = f"{target}/"
    ends = time.monotonic() + PATIENCE
    found: list[str] = []
    for pid in _pids():
        if len(found) == MAX_NAMED or time.monotonic() > ends:
            found.append("and perhaps others")
            break
        if any(path == str(target) or path.startswith(prefix) for path in _paths(pid)):
            found.append(_named(pid))
    return found


def check_device(device: Path, mounts: Sequence[MountEntry], *, server: int = 0) -> None:
    """See `volumed.driver.Host.check_unheld`."""
    begun = time.monotonic()
    while found := _holders_of_device(device, mounts, server):
        # udev looks at a device that has just come or changed, and lets go by itself.
        patience = _UDEV_PATIENCE if all("udev" in holder for holder in found) else _MOMENT
        if time.monotonic() > begun + patience:
            raise InUse("is held by", holders=found, subject=f"device {device}")
        time.sleep(0.02)


def is_claimed(device: Path) -> bool:
    """Whether a mount, swap or a device made of it has it, in any namespace (open(2), O_EXCL on a block device). Raises
    OSError when it cannot be opened at all."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def _holders_of_device(device: Path, mounts: Sequence[MountEntry], server: int) -> list[str]:
    """A claim tells of mounts, swap and devices made of it; /proc of the rest."""
    try:
        number = device.stat().st_rdev
        exclusively = is_claimed(device)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return []
        raise HostError(f"cannot be opened: {error.strerror}", subject=f"device {device}") from None
    code, node = f"{os.major(number)}:{os.minor(number)}", str(device.resolve())
    found = [f"the mount at {entry.target}" for entry in mounts if code == entry.device or node == entry.source]
    folder = Path("/sys/dev/block", code, "holders")
    found += [f"device {name}" for name in sorted(os.listdir(folder))]  # noqa: PTH208
    pids = [pid for pid in _pids(own=True) if pid != server]
    found += [_named(pid) for pid in pids if any(_leads_to(path, number) for path in _paths(pid))]
    return found[:MAX_NAMED] or (["a mount of another namespace, or swap"] if exclusively else [])


def _leads_to(path: str, number: int) -> bool:
    """By number, as a device has several names; nothing but what lies in /dev is looked at."""
    if not path.startswith("/dev/"):
        return False
    try:
        return os.stat(path).st_rdev == number  # noqa: PTH116
    except OSError:
        return False


def _pids(*, own: bool = False) -> Iterator[int]:
    me = os.getpid()
    for name in os.listdir(PROC):  # noqa: PTH208 (names are enough, and /proc is large)
        if name.isdecimal() and (own or int(name) != me):
            yield int(name)


def _paths(pid: int) -> Iterator[str]:
    base = PROC / str(pid)
    links = [base / "cwd", base / "root"]
    try:
        links += [base / "fd" / name for name in os.listdir(base / "fd")]  # noqa: PTH208
    except OSError:  # it ended meanwhile
        return
    for link in links:
        try:
            yield os.readlink(link)  # noqa: PTH115 (the text, not a Path: deleted files have a suffix)
        except OSError:
            continue


def _named(pid: int) -> str:
    try:
        name = (PROC / str(pid) / "comm").read_text().strip()
        cgroup = (PROC / str(pid) / "cgroup").read_text()
    except OSError:
        return f"pid {pid}"
    container = _CONTAINER.search(cgroup)
    return f"{name} (pid {pid}{f', container {container[0][:12]}' if container else ''})"
