"""What changed in a tree since it was last asked: fanotify(7) on the whole file system, directories by their handles.

It sees what every mount namespace and container does, but of stores through a mapping only the end (munmap, close):
who wants all of it must look at files that are mapped writable besides (`mapped_files`). A queue that overflowed, and
a list that grew too long, mean that everything may have changed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from volumed.errors import MountFailed
from volumed.host import mounts

_libc = ctypes.CDLL(None, use_errno=True)

# linux/fanotify.h
_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE, _FAN_REPORT_DFID_NAME = 0x1, 0x2, 0x10, 0xC00
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_MODIFY, _FAN_ATTRIB, _FAN_CLOSE_WRITE = 0x2, 0x4, 0x8
_FAN_MOVED, _FAN_CREATE, _FAN_DELETE, _FAN_ONDIR, _FAN_Q_OVERFLOW = 0xC0, 0x100, 0x200, 0x40000000, 0x4000
_MASK = _FAN_MODIFY | _FAN_ATTRIB | _FAN_CLOSE_WRITE | _FAN_MOVED | _FAN_CREATE | _FAN_DELETE | _FAN_ONDIR
_EVENT = struct.Struct("=IBBHQii")  # length, version, reserved, metadata length, mask, fd, pid
_INFO = struct.Struct("=BBH8sIi")  # type, pad, length, fsid, bytes of the handle, its type
_DFID_NAMES = (2, 10, 12)  # with the name; of a rename: the old and the new one
_DFID = 3

_AT_SYMLINK_FOLLOW = 0x400

# Those whose every change is made through this kernel.
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "bcachefs"})
LONGEST = 500_000  # names; then a walk over the tree is no dearer
_KNOWN = 10_000  # directories of which is remembered whose they are
_BUFFER = 1 << 18


class Untrackable(Exception):
    """The kernel cannot tell what changes there."""


class Tracker:
    """Listens from its making on. A thread of its own empties the kernel's queue, which is not bounded: memory of a
    burst is the kernel's for a moment."""

    def __init__(self, root: str, *, ours: str) -> None:
        """`ours`: where we write, perhaps on the same file system: of that nothing is noted. Raises Untrackable."""
        self._root, self._ours = os.path.realpath(root), os.path.realpath(ours)
        self._is_ours: dict[tuple[int, bytes], bool] = {}
        entry = _mount_of(self._root)
        if entry is None or entry[0] not in LOCAL:
            raise Untrackable
        self._descriptor = _open_group()
        try:
            _mark(self._descriptor, self._root, *entry)
        except (OSError, MountFailed) as error:
            os.close(self._descriptor)
            raise Untrackable from error
        self._mount = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._found: set[tuple[int, bytes, bytes]] = set()  # handle's type, handle of the directory, name
        self._lost = True  # what was before, nobody told
        self._wake, self._end = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._drain, name="fanotify", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.close(self._end)
        self._thread.join()
        for descriptor in (self._descriptor, self._mount, self._wake):
            os.close(descriptor)

    def lose(self) -> None:
        """Let the next look be at everything."""
        with self._lock:
            self._lost = True

    def pending(self) -> int | None:
        """How many names changed; None when all may have."""
        self._read_all()
        with self._lock:
            return None if self._lost else len(self._found)

    def take(self) -> list[str] | None:
        """Paths below the root that changed since the last call; None when all may have."""
        self._read_all()
        with self._lock:
            found, self._found = self._found, set()
            lost, self._lost = self._lost, False
        return self._paths(found, lost=lost)

    def paths(self) -> list[str] | None:
        """What `take` would give."""
        self._read_all()
        with self._lock:
            found, lost = set(self._found), self._lost
        return self._paths(found, lost=lost)

    def _paths(self, found: set[tuple[int, bytes, bytes]], *, lost: bool) -> list[str] | None:
        if lost:
            return None
        try:
            return list(self._resolve(found))
        except OSError:  # a path that the kernel cannot write down
            return None

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLHUP)
        while True:
            ready = dict(poll.poll())
            if self._wake in ready:
                return
            self._read_all()

    def _read_all(self) -> None:
        """Whoever comes first reads; the order of events does not matter."""
        while True:
            try:
                data = os.read(self._descriptor, _BUFFER)
            except BlockingIOError:
                return
            found, lost = parse(data)
            found = {each for each in found if not self._made_by_us(*each[:2])}
            with self._lock:
                self._found |= found
                if lost or len(self._found) > LONGEST:
                    self._found.clear()
                    self._lost = True

    def _made_by_us(self, kind: int, handle: bytes) -> bool:
        """Copies are as many as what is copied. Nobody moves a directory between there and the root, so it does not
        matter when this is asked."""
        key = (kind, handle)
        known = self._is_ours.get(key)
        if known is None:
            try:
                path = self._path(kind, handle)
            except OSError:
                return False
            if path is None:
                return False
            if len(self._is_ours) >= _KNOWN:
                self._is_ours.clear()
            known = self._is_ours[key] = path == self._ours or path.startswith(f"{self._ours}/")
        return known

    def _resolve(self, found: set[tuple[int, bytes, bytes]]) -> Iterator[str]:
        folders: dict[tuple[int, bytes], str | None] = {}
        for kind, handle, name in found:
            key = (kind, handle)
            if key not in folders:
                folders[key] = self._folder(kind, handle)
            folder = folders[key]
            if folder is not None:
                shown = os.fsdecode(name)
                yield folder if shown == "." else f"{folder}/{shown}" if folder else shown

    def _folder(self, kind: int, handle: bytes) -> str | None:
        """Relative to the root; None when it lies elsewhere or is gone (which its own parent's event tells)."""
        path = self._path(kind, handle)
        if path == self._root:
            return ""
        prefix = "/" if self._root == "/" else f"{self._root}/"
        if path is None or not path.startswith(prefix) or path.endswith(" (deleted)"):
            return None
        return path[len(prefix) :]

    def _path(self, kind: int, handle: bytes) -> str | None:
        """As the kernel writes it down; None when it is gone."""
        packed = struct.pack("=Ii", len(handle), kind) + handle
        opened = _libc.open_by_handle_at(self._mount, packed, os.O_PATH | os.O_CLOEXEC)
        if opened < 0:
            number = ctypes.get_errno()
            if number in (errno.ESTALE, errno.ENOENT):
                return None
            raise OSError(number, os.strerror(number))
        try:
            return os.readlink(f"/proc/self/fd/{opened}")  # noqa: PTH115 (any bytes)
        finally:
            os.close(opened)


def is_local(root: str) -> bool:
    entry = _mount_of(os.path.realpath(root))
    return entry is not None and entry[0] in LOCAL


def parse(data: bytes) -> tuple[set[tuple[int, bytes, bytes]], bool]:
    """Of one read(2): (handle's type, handle, name) of each event, and whether the queue overflowed."""
    found: set[tuple[int, bytes, bytes]] = set()
    lost, at = False, 0
    while at + _EVENT.size <= len(data):
        length, _, _, header, mask, _, _ = _EVENT.unpack_from(data, at)
        lost = lost or bool(mask & _FAN_Q_OVERFLOW)
        info, end = at + header, at + length
        while info + _INFO.size <= end:
            kind, _, size, _, count, handle_type = _INFO.unpack_from(data, info)
            begin = info + _INFO.size
            if kind in _DFID_NAMES:
                name = data[begin + count : info + size].split(b"\0", 1)[0]
                found.add((handle_type, data[begin : begin + count], name or b"."))
            elif kind == _DFID:
                found.add((handle_type, data[begin : begin + count], b"."))
            info += size
        at += length
    return found, lost


def mapped_files(root: str) -> Iterator[str]:
    """Files below the root that some process has mapped to store into: of such stores the kernel tells only when the
    mapping ends. Asked by handle, as each process sees paths of its own mount namespace."""
    mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for pid in os.listdir("/proc"):  # noqa: PTH208
            if not pid.isdecimal():
                continue
            try:
                areas = Path("/proc", pid, "maps").read_bytes().splitlines()
            except OSError:  # it ended
                continue
            for area in areas:
                fields = area.split(None, 5)
                if len(fields) == 6 and fields[1][1:2] == b"w" and fields[1][3:4] == b"s":
                    yield from _mapped_at(pid, fields[0].decode(), mount, root)
    finally:
        os.close(mount)


def _mapped_at(pid: str, area: str, mount: int, root: str) -> Iterator[str]:
    first, _, last = area.partition("-")
    link = f"/proc/{pid}/map_files/{int(first, 16):x}-{int(last, 16):x}"
    try:
        if Path(link).stat().st_dev != os.fstat(mount).st_dev:
            return
    except OSError:
        return
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 8 + 128)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(-100, os.fsencode(link), handle, ctypes.byref(mount_id), _AT_SYMLINK_FOLLOW):
        return
    opened = _libc.open_by_handle_at(mount, handle, os.O_PATH | os.O_CLOEXEC)
    if opened < 0:
        return
    try:
        path = os.readlink(f"/proc/self/fd/{opened}")  # noqa: PTH115
    finally:
        os.close(opened)
    if path.startswith(f"{root}/") and not path.endswith(" (deleted)"):
        yield path[len(root) + 1 :]


def _open_group() -> int:
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE | _FAN_REPORT_DFID_NAME
    opened = _libc.fanotify_init(flags, os.O_RDONLY)
    if opened < 0:
        raise Untrackable
    return int(opened)


def _mark(group: int, path: str, fstype: str, device: str) -> None:
    """A btrfs can be marked only where its top level is mounted, which is done for that moment."""
    try:
        _mark_path(group, path)
    except OSError as error:
        if fstype != "btrfs" or error.errno != errno.EXDEV:
            raise
    else:
        return
    with tempfile.TemporaryDirectory(prefix="volumed-") as place:
        mounts.mount(device, Path(place), fstype="btrfs", options=("subvolid=5",), readonly=False)
        try:
            _mark_path(group, place)
        finally:
            mounts.unmount(Path(place))


def _mark_path(group: int, path: str) -> None:
    flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
    if _libc.fanotify_mark(group, flags, ctypes.c_uint64(_MASK), -100, os.fsencode(path)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount_of(path: str) -> tuple[str, str] | None:
    """Type and device of the file system that holds the directory."""
    found = None
    for entry in mounts.read_table():
        target = str(entry.target)
        if path == target or path.startswith(target if target == "/" else f"{target}/"):
            found = entry if found is None or len(target) >= len(str(found.target)) else found
    return None if found is None else (found.fstype, found.source)
