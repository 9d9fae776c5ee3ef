"""mount(2), umount(2) and the mount table, called directly: no fork, tens of microseconds.

Never MNT_DETACH: whoever holds a file of a detached mount goes on writing to it, unseen.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from volumed.driver import MountEntry
from volumed.errors import InUse, MountFailed
from volumed.host.holders import holders_of_mount

_libc = ctypes.CDLL(None, use_errno=True)

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_DIRSYNC = 16, 32, 128
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = (
    1024,
    2048,
    4096,
    1 << 21,
    1 << 24,
    1 << 25,
)
UMOUNT_NOFOLLOW = 8

_PER_MOUNT = {
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
}
_FLAGS = _PER_MOUNT | {
    "ro": MS_RDONLY,
    "sync": MS_SYNCHRONOUS,
    "dirsync": MS_DIRSYNC,
    "strictatime": MS_STRICTATIME,
    "lazytime": MS_LAZYTIME,
}
_DEFAULTS = frozenset({"rw", "suid", "dev", "exec", "async", "atime", "diratime", "defaults"})

# statx(2): whether a path is the root of a mount, asked of the kernel, not of the server (linux 5.8 and newer)
MOMENT = 1.0  # seconds in which whoever only looked at a mount has left it again
OWN_TABLE = Path("/proc/self/mountinfo")
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_STATX_DONT_SYNC = -100, 0x100, 0x4000
_AT_NO_AUTOMOUNT = 0x800
_STATX_ATTR_MOUNT_ROOT = 0x2000
_STATX_SIZE, _ATTRIBUTES, _MODE, _INODE, _DEVICE_MAJOR = 256, 8, 28, 32, 136
# Behind a server, or a process: whoever unmounts the last of these may have to wait for it.
_SERVED = re.compile(r"nfs4?|cifs|smb3|ceph|9p|afs|fuse(\..*)?|fuseblk")


def split_options(options: Iterable[str]) -> tuple[int, str]:
    """mount(8)'s words as mount(2)'s flags and the data string that the file system reads."""
    flags, data = 0, []
    for word in (part for option in options for part in option.split(",")):
        if word in _FLAGS:
            flags |= _FLAGS[word]
        elif word and word not in _DEFAULTS:
            data.append(word)
    return flags, ",".join(data)


def mount(source: str | Path, target: Path, *, fstype: str, options: Sequence[str], readonly: bool) -> None:
    """Raises MountFailed."""
    flags, data = split_options(options)
    _mount(os.fspath(source), target, fstype=fstype, flags=flags | (MS_RDONLY if readonly else 0), data=data)


def bind(source: Path, target: Path, *, readonly: bool, options: Sequence[str]) -> None:
    """Two calls where flags are wanted: the first makes the mount, the second gives it its own flags."""
    flags = bind_flags(target, readonly=readonly, options=options)
    _mount(os.fspath(source), target, fstype="none", flags=MS_BIND, data="")
    if flags:
        try:
            _mount("none", target, fstype="none", flags=MS_BIND | MS_REMOUNT | flags, data="")
        except MountFailed:
            unmount(target)
            raise


def bind_flags(target: Path, *, readonly: bool, options: Sequence[str]) -> int:
    """What a bind mount can have of its own. Raises MountFailed."""
    unknown = [option for option in options if option not in _PER_MOUNT and option not in _DEFAULTS | {"ro"}]
    if unknown:
        raise MountFailed(
            f"a bind mount cannot take the option {unknown[0]!r}",
            errno=errno.EINVAL,
            subject=str(target),
            hint=f"it takes {', '.join(sorted(_PER_MOUNT))} and ro",
        )
    return split_options(options)[0] | (MS_RDONLY if readonly else 0)


def _mount(source: str, target: Path, *, fstype: str, flags: int, data: str) -> None:
    if _libc.mount(
        os.fsencode(source), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), data.encode() or None
    ):
        number = ctypes.get_errno()
        with_options = f" with the options {data!r}" if data else ""
        raise MountFailed(
            f"mounting {source} ({fstype}){with_options} failed: {os.strerror(number)}",
            errno=number,
            subject=str(target),
            hint="the kernel's log says more" if number in (errno.EINVAL, errno.EUCLEAN) else "",
        )


def unmount(target: Path) -> None:
    """All that is mounted at `target` on top of one another. Raises InUse naming who holds it, MountFailed."""
    ends = time.monotonic() + MOMENT
    while True:
        while _libc.umount2(os.fsencode(target), UMOUNT_NOFOLLOW) == 0:
            pass
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOENT):  # not, or no longer, a mount point
            return
        if number != errno.EBUSY:
            raise MountFailed(f"unmounting failed: {os.strerror(number)}", errno=number, subject=str(target))
        check_held(target, ends)


def check_held(target: Path, ends: float) -> None:
    """Of a mount that is busy: raises InUse naming who holds it. Until `ends`, by time.monotonic, whom nobody can name
    may be one that only looked, or is just ending: then it waits for a moment."""
    holders = holders_of_mount(target)
    if holders or time.monotonic() > ends:
        raise InUse("is held by", holders=holders or ["a process"], subject=f"mount {target}")
    time.sleep(0.05)


def is_mountpoint(path: Path) -> bool:
    """Bind mounts included; never asks a server."""
    status = _statx(path)
    if status is None:
        return False
    return bool(int.from_bytes(status[_ATTRIBUTES : _ATTRIBUTES + 8], "little") & _STATX_ATTR_MOUNT_ROOT)


def is_same(one: Path, other: Path) -> bool:
    """Whether both are there and one file or folder. Never asks a server: what it is told of one that lies behind a
    server is what the kernel knows."""
    first, second = _statx(one), _statx(other)
    return first is not None and second is not None and _identity(first) == _identity(second)


def _identity(status: bytes) -> tuple[bytes, bytes]:
    return status[_DEVICE_MAJOR : _DEVICE_MAJOR + 8], status[_INODE : _INODE + 8]


def file_type(path: Path) -> int:
    """S_IFMT of what is there, no symbolic link followed, as far as the kernel knows it without asking a server; 0 when
    nothing is."""
    status = _statx(path)
    return 0 if status is None else stat.S_IFMT(int.from_bytes(status[_MODE : _MODE + 2], "little"))


def is_served(path: Path, table: Callable[[], Sequence[MountEntry]]) -> bool:
    """Whether a server or a process stands behind what is mounted at `path`. Disks are told by their number."""
    status = _statx(path)
    if status is None or int.from_bytes(status[_DEVICE_MAJOR : _DEVICE_MAJOR + 4], "little") != 0:
        return False
    entry = next((entry for entry in reversed(table()) if entry.target == path), None)
    return entry is not None and _SERVED.fullmatch(entry.fstype) is not None


def _statx(path: Path) -> bytes | None:
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT
    if _libc.statx(_AT_FDCWD, os.fsencode(path), flags, 0, buffer):
        number = ctypes.get_errno()
        if number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise MountFailed(f"cannot be looked at: {os.strerror(number)}", errno=number, subject=str(path))
    return buffer.raw


def read_table(path: Path = OWN_TABLE) -> list[MountEntry]:
    """A mount table as it is now. Undecodable bytes of paths survive as surrogates, as everywhere in Python's paths."""
    return parse_mountinfo(path.read_bytes().decode("utf-8", "surrogateescape"))


def parse_mountinfo(text: str) -> list[MountEntry]:
    """proc(5): `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`."""
    entries = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        mount_id, parent_id, device, root, target, options, *_ = before.split(" ")
        fstype, source, *super_options = after.split(" ")
        entries.append(
            MountEntry(
                mount_id=int(mount_id),
                parent_id=int(parent_id),
                device=device,
                root=_decoded(root),
                target=Path(_decoded(target)),
                options=tuple(options.split(",")),
                fstype=fstype,
                source=_decoded(source),
                super_options=tuple(super_options[0].split(",")) if super_options else (),
            )
        )
    return entries


def _decoded(text: str) -> str:
    """Space, tab, newline, backslash and # are written as an octal escape."""
    if "\\" not in text:
        return text
    head, *parts = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts)


class MountTable:
    """/proc/self/mountinfo, read again only after the kernel said that it changed."""

    def __init__(self, path: Path = OWN_TABLE) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: list[MountEntry] | None = None
        self._reader = self._open()
        self._watcher = self._open()  # each descriptor is told of each change once

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def entries(self) -> Sequence[MountEntry]:
        with self._lock:
            if self._entries is None or _changed(self._reader, 0):
                self._entries = read_table(self._path)
            return self._entries

    def wait_for_change(self, timeout: float) -> bool:
        return _changed(self._watcher, timeout)


def _changed(descriptor: int, timeout: float) -> bool:
    """poll(2) reports POLLPRI and POLLERR once after each change (proc(5))."""
    poll = select.poll()
    poll.register(descriptor, select.POLLPRI)
    return bool(poll.poll(timeout * 1000))
