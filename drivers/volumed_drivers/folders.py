"""What drivers that keep their volumes in a folder have in common."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from volumed.driver import Capacity
from volumed.errors import BackendUnavailable, InvalidRequest, NotFound


def make_folder(path: Path, *, mode: int, backend: str) -> None:
    """The backend's folder, with its parents. Raises BackendUnavailable."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be made: {error.strerror}", subject=f"backend {backend}") from None


def sync_folder(path: Path) -> None:
    """What was made, renamed or removed in the folder stays so through a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def strangers(path: Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """What somebody else put into the backend's folder, in the order of the names."""
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if not entry.is_symlink())
    for name in names:
        if not name.startswith(".") and ours.fullmatch(name) is None:
            yield path / name


def stranger(path: Path, reference: str, ours: re.Pattern[str], *, backend: str) -> Path:
    """The one of this name. Raises NotFound, and InvalidRequest for what is no plain name."""
    found = path / reference
    if found.parent != path or "/" in reference:
        raise InvalidRequest(
            f"{reference[:200]!r} is not a name in {path}", subject=f"backend {backend}", hint="move it there first"
        )
    if found not in set(strangers(path, ours)):
        raise NotFound(f"there is nothing to import of the name {reference[:200]!r}", subject=f"backend {backend}")
    return found


_MARK = "trusted.volumed.mark"  # shown to nobody without CAP_SYS_ADMIN (xattr(7)): no container can forge it


def write_mark(path: Path | int, mark: Mapping[str, str]) -> None:
    """Core's mark of a volume, beside its data; left out where the file system cannot keep it."""
    if mark:
        with contextlib.suppress(OSError):
            os.setxattr(path, _MARK, json.dumps(dict(mark)).encode())


def read_mark(path: Path) -> dict[str, str]:
    """Empty when there is none."""
    try:
        return _parsed(os.getxattr(path, _MARK).decode())
    except (OSError, UnicodeDecodeError):
        return {}


def _parsed(text: str) -> dict[str, str]:
    """Empty when it is none: half written, or somebody else's."""
    try:
        read = json.loads(text)
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in read.items()} if isinstance(read, dict) else {}


def capacity_of(path: Path) -> Capacity:
    room = os.statvfs(path)
    return Capacity(total=room.f_blocks * room.f_frsize, available=room.f_bavail * room.f_frsize)
