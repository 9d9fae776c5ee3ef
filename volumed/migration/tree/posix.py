"""System calls on trees that Python's `os` lacks, all relative to directory descriptors.

A tree in use belongs to its containers, which may put a symbolic link where a directory was a moment ago. So a path
is opened by openat2(2), which refuses links, mounts inside and whatever leads out.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_OPENAT2, _IOPRIO_SET = 437, 251  # the same number on every architecture for the first; x86-64 for the second
_RESOLVE_NO_XDEV, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x04, 0x08
_HOW = struct.pack(
    "=QQQ",
    os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW,
    0,
    _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH,
)
_STEP = 4000  # bytes of a path in one call: PATH_MAX is 4096

# linux/fs.h
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_FSXATTR = struct.Struct("=5I8x")  # xflags, extsize, nextents, projid, cowextsize
XFLAG_IMMUTABLE, XFLAG_APPEND = 0x8, 0x10
_XFLAG_SYNC, _XFLAG_NOATIME, _XFLAG_NODUMP = 0x20, 0x40, 0x80
KEPT_XFLAGS = XFLAG_IMMUTABLE | XFLAG_APPEND | _XFLAG_SYNC | _XFLAG_NOATIME | _XFLAG_NODUMP
_NO_FLAGS = (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_AT_SYMLINK_NOFOLLOW, _STATX_BTIME, _BTIME = 0x100, 0x800, 80  # statx(2), and where it puts the time

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_IOPRIO_WHO_PROCESS, _IOPRIO_BEST_EFFORT, _IOPRIO_IDLE = 1, 2 << 13, 3 << 13


def open_folder(root: int, path: str) -> int:
    """A directory below `root`, however long its path; the caller closes it. Raises OSError: EXDEV for a mount inside,
    ELOOP for a symbolic link on the way."""
    if not path:
        return _openat2(root, b".")
    here, rest = root, os.fsencode(path)
    while rest:
        cut = len(rest) if len(rest) <= _STEP else rest.rindex(b"/", 0, _STEP)
        try:
            opened = _openat2(here, rest[:cut])
        finally:
            if here != root:
                os.close(here)
        here, rest = opened, rest[cut + 1 :]
    return here


def _openat2(folder: int, path: bytes) -> int:
    opened = _libc.syscall(_OPENAT2, folder, path, _HOW, len(_HOW))
    if opened < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return int(opened)


def get_flags(descriptor: int) -> tuple[int, int] | None:
    """Flags (chattr(1)) as XFLAG bits, and project id; None where the file system has none."""
    buffer = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, buffer)
    except OSError as error:
        if error.errno in _NO_FLAGS:
            return None
        raise
    flags, _, _, project, _ = _FSXATTR.unpack(buffer)
    return flags & KEPT_XFLAGS, project


def set_flags(descriptor: int, flags: int, project: int | None) -> None:
    """Leaves what else the ioctl carries as it is; so the project, where None."""
    buffer = bytearray(_FSXATTR.size)
    fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, buffer)
    old, extsize, extents, old_project, cow = _FSXATTR.unpack(buffer)
    new = _FSXATTR.pack(old & ~KEPT_XFLAGS | flags, extsize, extents, old_project if project is None else project, cow)
    if bytes(buffer) != new:
        fcntl.ioctl(descriptor, _FS_IOC_FSSETXATTR, new)


def born(folder: int, name: str) -> int | None:
    """When the entry was made, in ns since 1970; None where the file system does not know."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(folder, os.fsencode(name), _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    if not struct.unpack_from("=I", buffer)[0] & _STATX_BTIME:
        return None
    seconds, rest = struct.unpack_from("=qI", buffer, _BTIME)
    return int(seconds * 10**9 + rest)


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Zeros that occupy nothing. Raises OSError (EOPNOTSUPP where there are no holes)."""
    if _libc.fallocate(
        descriptor, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(length)
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_filesystem(descriptor: int) -> None:
    """syncfs(2). Raises OSError for a write that failed since the descriptor was opened."""
    if _libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def lower_priority(*, low: bool) -> None:
    """Of this process: below everybody's I/O and CPU, or as everybody."""
    _libc.syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE if low else _IOPRIO_BEST_EFFORT | 4)
    os.setpriority(os.PRIO_PROCESS, 0, 10 if low else 0)


def remove_tree(parent: int, name: str) -> None:
    """Whatever is there, with what is below it, by descriptors; absent is well. A stack and no recursion, and at most
    one descriptor for each level."""
    try:
        os.unlink(name, dir_fd=parent)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        pass  # EISDIR or EPERM: a directory, or something immutable
    _unlock(parent, name)
    try:
        os.unlink(name, dir_fd=parent)
        return
    except (IsADirectoryError, PermissionError):
        pass
    stack = [(parent, name, os.open(name, _FOLDER, dir_fd=parent))]
    try:
        while stack:
            above, called, here = stack[-1]
            deeper = _empty(here)
            if deeper is None:
                os.close(here)
                stack.pop()
                os.rmdir(called, dir_fd=above)
            else:
                stack.append((here, deeper, os.open(deeper, _FOLDER, dir_fd=here)))
    finally:
        for _, _, here in stack:
            os.close(here)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _empty(folder: int) -> str | None:
    """Remove what is no directory; the name of the first directory, if any."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _unlock(folder, entry.name)
                return entry.name
            try:
                os.unlink(entry.name, dir_fd=folder)
            except PermissionError:
                _unlock(folder, entry.name)
                os.unlink(entry.name, dir_fd=folder)
    return None


def _unlock(parent: int, name: str) -> None:
    """Take immutable and append-only away from a file or directory, and from nothing else: opening a device acts."""
    kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if kind & 0o170000 not in (0o100000, 0o040000):
        return
    opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=parent)
    try:
        found = get_flags(opened)
        if found is not None and found[0] & (XFLAG_IMMUTABLE | XFLAG_APPEND):
            set_flags(opened, found[0] & ~(XFLAG_IMMUTABLE | XFLAG_APPEND), None)
    finally:
        os.close(opened)


def unlock_each(parent: int, names: Iterable[str]) -> None:
    for name in names:
        _unlock(parent, name)
