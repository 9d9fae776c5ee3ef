"""What drivers that keep their volumes in a folder have in common."""

from __future__ import annotations

import os
from pathlib import Path

from volumed.driver import Capacity
from volumed.errors import BackendUnavailable


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


def capacity_of(path: Path) -> Capacity:
    room = os.statvfs(path)
    return Capacity(total=room.f_blocks * room.f_frsize, available=room.f_bavail * room.f_frsize)
