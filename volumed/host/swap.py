"""Another mount in the place of one inside a running container, when nothing there holds the old one.

open_tree(2), setns(2), move_mount(2) beneath the old mount and umount2(2) of it: whoever looks sees the one or the
other, and never neither. Never MNT_DETACH: an open file would go on being written at the old place, unseen. The
kernel can do it since 6.5.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator, Set
from pathlib import Path

from volumed.driver import MountEntry
from volumed.errors import CommandFailed, InUse, MountFailed
from volumed.host.mounts import read_table
from volumed.host.run import run

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _STATX_MNT_ID, _STATX_SIZE, _MNT_ID = -100, 0x1000, 256, 0x90
MAX_NAMED = 5

# A mount namespace is entered by a process of one thread.
_SWAP = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
EMPTY, CLONE, BENEATH, NEWNS, NOFOLLOW = 0x1000, 1, 0x204, 0x20000, 8
def call(what, *words):
    done = libc.syscall(*[ctypes.c_long(w) if isinstance(w, int) else ctypes.c_char_p(w) for w in words])
    if done < 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")
    return done
source, pid, target, flags = map(os.fsencode, sys.argv[1:])
tree = call("open_tree", 428, -100, source, CLONE | os.O_CLOEXEC)
if int(flags):
    call("mount_setattr", 442, tree, b"", EMPTY, struct.pack("QQQQ", int(flags), 0, 0, 0), 32)
space = os.open(b"/proc/%b/ns/mnt" % pid, os.O_RDONLY)
if libc.setns(space, NEWNS):
    sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")
call("move_mount", 429, tree, b"", -100, target, BENEATH)
if libc.umount2(target, NOFOLLOW):
    sys.exit(f"umount: {os.strerror(ctypes.get_errno())}")
"""
_REMOUNT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid, target, flags = map(os.fsencode, sys.argv[1:])
space = os.open(b"/proc/%b/ns/mnt" % pid, os.O_RDONLY)
if libc.setns(space, 0x20000):
    sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")
if libc.mount(None, target, None, ctypes.c_ulong(int(flags)), None):
    sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
"""
_ATTRIBUTES = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}  # of mount_setattr(2), and the same of mount(2)
_REMOUNT_BIND = 32 | 4096


def mount_in(pid: int, target: str) -> MountEntry | None:
    """What the process sees mounted there, on top; None when nothing is, or the process is gone."""
    return next((entry for entry in reversed(_mounts_of(pid)) if str(entry.target) == target), None)


def _mounts_of(pid: int) -> list[MountEntry]:
    try:
        return list(read_table(Path(f"/proc/{pid}/mountinfo")))
    except OSError:  # gone, or ending and without mounts already
        return []


def is_same(one: MountEntry | None, other: MountEntry | None) -> bool:
    """Whether both are there and show the same tree."""
    return one is not None and other is not None and (one.device, one.root) == (other.device, other.root)


def users(pid: int, entry: MountEntry) -> list[str]:
    """Who holds the mount, of all processes that share the mount namespace of `pid`: by an open file, a mapping, its
    working directory, root or program. Those that cannot be looked into count as well."""
    found: list[str] = []
    for other in processes_in(mount_namespace(pid)):
        for what in _holds(other, entry.mount_id):
            found.append(f"{_name(other)} (pid {other}): {what}")
            break
        if len(found) == MAX_NAMED:
            break
    return found


def swap(pid: int, target: str, source: Path, *, readonly: bool) -> None:
    """Show what is mounted at `source`, a path of ours, to the container of `pid` at its path `target`, with the other
    flags of what is there now. Raises InUse, MountFailed; in both cases the old one may have another beneath it."""
    entry = mount_in(pid, target)
    if entry is None:
        raise MountFailed("nothing is mounted there", subject=f"{target} in the container of pid {pid}")
    held = users(pid, entry)
    if held:
        raise InUse("is held by", holders=held, subject=f"mount {target}")
    _change(_SWAP, source, pid, target, _flags(entry, readonly=readonly))


def set_readonly(pid: int, target: str, *, readonly: bool) -> None:
    """The mount that the container of `pid` has at its path `target`: from now on nobody can write by it, or they can
    again. Raises MountFailed, also while a file is open for writing there."""
    entry = mount_in(pid, target)
    if entry is None:
        raise MountFailed("nothing is mounted there", subject=f"{target} in the container of pid {pid}")
    if ("ro" in entry.options) is not readonly:
        _change(_REMOUNT, pid, target, _REMOUNT_BIND | _flags(entry, readonly=readonly))


def _flags(entry: MountEntry, *, readonly: bool) -> int:
    return sum(_ATTRIBUTES.get(option, 0) for option in {*entry.options, "ro"} if option != "ro" or readonly)


def _change(script: str, *words: Path | str | int) -> None:
    """The last words are the pid, the target and flags."""
    try:
        run([sys.executable, "-I", "-S", "-c", script, *map(str, words)], timeout=20.0)
    except CommandFailed as error:
        raise MountFailed(
            f"the mount cannot be changed: {error.stderr.strip()}",
            subject=f"{words[-2]} in the container of pid {words[-3]}",
        ) from None


def mount_namespace(pid: int) -> str | None:
    """Its name; None when the process is gone."""
    return _namespace(pid, "mnt")


def processes_in(space: str | None) -> Iterator[int]:
    """Of the mount namespace."""
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdecimal() and space is not None and _namespace(int(name), "mnt") == space:
            yield int(name)


def elsewhere(entry: MountEntry, known: Set[str | None]) -> list[str]:
    """A process of each mount namespace, but for ours and the known, that has the same tree, or a part of it, mounted
    at another path than `entry` is: a namespace that was made from ours has a copy at that one."""
    seen, found = {*known, mount_namespace(os.getpid())}, []
    inside = f"{entry.root.rstrip('/')}/"
    for name in os.listdir("/proc"):  # noqa: PTH208
        space = mount_namespace(int(name)) if name.isdecimal() else None
        if space is None or space in seen:
            continue
        seen.add(space)
        if any(
            other.device == entry.device
            and (other.root == entry.root or other.root.startswith(inside))
            and other.target != entry.target
            for other in _mounts_of(int(name))
        ):
            found.append(f"{_name(int(name))} (pid {name})")
    return found


def has_namespaces_within(pid: int) -> bool:
    """Whether a process of the container has a mount namespace of its own: a copy of the mount that cannot be reached
    from the container's."""
    processes, space = _namespace(pid, "pid"), _namespace(pid, "mnt")
    return any(
        _namespace(int(name), "pid") == processes and _namespace(int(name), "mnt") not in (space, None)
        for name in os.listdir("/proc")  # noqa: PTH208
        if name.isdecimal()
    )


def _namespace(pid: int, kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")  # noqa: PTH115
    except OSError:
        return None


def _holds(pid: int, mount_id: int) -> Iterator[str]:
    base = f"/proc/{pid}"
    for link in ("cwd", "root", "exe"):
        if _mount_id(f"{base}/{link}") == mount_id:
            yield link
    for descriptor in _listed(f"{base}/fdinfo"):
        try:
            lines = Path(base, "fdinfo", descriptor).read_text().splitlines()
        except OSError:
            continue
        if f"mnt_id:\t{mount_id}" in lines:
            yield _target(f"{base}/fd/{descriptor}")
    for area in _listed(f"{base}/map_files"):
        if _mount_id(f"{base}/map_files/{area}") == mount_id:
            yield f"{_target(f'{base}/map_files/{area}')}, mapped"


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []


def _target(link: str) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115
    except OSError:
        return link


def _mount_id(path: str) -> int | None:
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_MNT_ID, buffer):
        return None
    return int(struct.unpack_from("=Q", buffer, _MNT_ID)[0])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process"
