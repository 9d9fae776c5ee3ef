"""Who holds a mount: for the error that says so. Looks through /proc, bounded in time, and never at a server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
MAX_NAMED = 5
PATIENCE = 0.5  # seconds; an error that comes late helps less than one that names fewer
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


def _pids() -> Iterator[int]:
    own = os.getpid()
    for name in os.listdir(PROC):  # noqa: PTH208 (names are enough, and /proc is large)
        if name.isdecimal() and int(name) != own:
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
