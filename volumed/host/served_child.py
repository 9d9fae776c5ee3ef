"""System calls on trees behind servers, for `volumed.host.served`: a line `["rename", "/a", "/b"]` is one call.

Between two of them nothing is open, and the current folder is `/`: no mount is held.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from volumed.answering import answer_all

_libc = ctypes.CDLL(None, use_errno=True)
MS_REMOUNT, MS_BIND = 32, 4096
UMOUNT_NOFOLLOW = 8


def there(*paths: str) -> list[bool]:
    return [_is_there(path) for path in paths]


def _is_there(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def make_folder(path: str, mode: int) -> None:
    """With those above it. There already is success."""
    try:
        Path(path).mkdir(mode)
    except FileNotFoundError:
        make_folder(str(Path(path).parent), 0o755)
        Path(path).mkdir(mode)
    except OSError:
        if not Path(path).is_dir():
            raise


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(text)


def remove_empty(path: str, tree: str, *files: str) -> bool:
    try:
        (Path(path) / tree).rmdir()
        for name in files:
            (Path(path) / name).unlink()
        Path(path).rmdir()
    except OSError:
        return False
    return True


def owner(path: str) -> int:
    return os.lstat(path).st_uid


def statvfs(path: str) -> list[int]:
    told = os.statvfs(path)
    return [told.f_frsize, told.f_blocks, told.f_bfree, told.f_bavail, told.f_files, told.f_ffree]


def bind(source: str, target: str, flags: int) -> None:
    """The server is asked before mount(2) and never by it: what is killed while it waits mounts nothing later."""
    opened = os.open(source, os.O_PATH | os.O_CLOEXEC)
    try:
        _mount(f"/proc/self/fd/{opened}", target, MS_BIND)
    finally:
        os.close(opened)
    if flags:
        try:
            _mount("none", target, MS_BIND | MS_REMOUNT | flags)
        except OSError:
            with contextlib.suppress(OSError):
                unmount(target, UMOUNT_NOFOLLOW)
            raise


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), b"none", ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), "mount(2)")


def unmount(target: str, flags: int) -> None:
    if _libc.umount2(os.fsencode(target), flags):
        raise OSError(ctypes.get_errno(), "umount2(2)")


CALLS: dict[str, Callable[..., Any]] = {
    **{call.__name__: call for call in (there, make_folder, write, remove_empty, owner, statvfs, bind, unmount)},
    "rename": os.rename,
    "rmdir": os.rmdir,
    "ready": lambda: None,
}


def _respond(line: str) -> str:
    name, *arguments = json.loads(line)
    try:
        return json.dumps({"answer": CALLS[name](*arguments)})
    except OSError as error:
        return json.dumps({"errno": error.errno or errno.EIO})


if __name__ == "__main__":
    os.umask(0)
    answer_all(_respond)
