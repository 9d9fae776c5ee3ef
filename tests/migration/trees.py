"""A tree that has everything, and a comparison written apart from the code it judges: by find(1)-like walks, getfattr
and whole reads, knowing nothing of chunks, manifests or rounds."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from tests.conftest import sh

_libc = ctypes.CDLL(None, use_errno=True)


def make_everything(root: Path, *, without: Set[str] = frozenset()) -> None:
    """Needs ext4 or XFS, or to be told what else has not: words of `FilesystemDriver.cannot_hold`, and `flags`."""
    plain(root)
    parts: dict[str, Callable[[Path], None]] = {
        "sparse": sparse,
        "symlinks": symlinks,
        "fifos": fifos,
        "devices": devices,
        "sockets": sockets,
        "xattrs": attributes,
        "trusted-xattrs": trusted_attributes,
        "capabilities": capable,
        "acls": acls,
        "hardlinks": hard_links,
        "flags": flags,
        "long-paths": lambda root: deep(root / "deep", levels=6),
        "longest-paths": lambda root: deep(root / "deeper", levels=30),
        "control-characters": lambda root: write(root / "names" / "new\nline\x01", b"odd"),
    }
    for word, make in parts.items():
        if word not in without:
            make(root)
    for number, folder in enumerate((root / "names", root / "linked" / "deep", root)):
        folder.chmod(0o1777 - number)
        os.utime(folder, ns=(5, 10**18 + number))


def plain(root: Path) -> None:
    """What every storage holds."""
    write(root / "plain", b"plain")
    write(root / "empty", b"")
    write(root / "owned", b"x" * 5000, mode=0o640, owner=(1234, 4321))
    write(root / "suid", b"x", mode=0o6755, owner=(1, 2))
    write(root / "none", b"x", mode=0)
    write(root / "large", random.Random(1).randbytes(5 << 20) + b"tail")
    write(root / "zeros", bytes(3 << 20))  # stored, and no hole
    names = root / "names"
    names.mkdir()
    for name in (b"n" * 255, b"\xff\xfe not UTF-8", b" blanks ", b"-rf", b"\\ * ? $HOME", "ü€".encode()):
        write(Path(os.fsdecode(bytes(names) + b"/" + name)), name)
    (root / "linked" / "deep" / "er").mkdir(parents=True)
    write(root / "linked" / "first", b"three names")


def sparse(root: Path) -> None:
    with (root / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 20 << 20, (40 << 20) + 4096):
            file.seek(offset)
            file.write(b"data at an offset" * 300)
    (root / "hole").touch()
    os.truncate(root / "hole", 1 << 38)


def symlinks(root: Path) -> None:
    (root / "link").symlink_to("plain")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("x" * 1000)
    os.lchown(root / "link", 77, 88)
    os.utime(root / "link", ns=(1, 1_999_999_999), follow_symlinks=False)
    (root / "link-to-folder").symlink_to("names")


def fifos(root: Path) -> None:
    os.mkfifo(root / "fifo", 0o620)


def devices(root: Path) -> None:
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 200))


def sockets(root: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    opened = os.open(root, os.O_RDONLY)
    server.bind(f"/proc/self/fd/{opened}/socket")
    os.close(opened)
    server.close()


def hard_links(root: Path) -> None:
    """Of what there is otherwise, too."""
    linked = root / "linked"
    os.link(linked / "first", linked / "deep" / "second")
    os.link(linked / "first", linked / "deep" / "er" / "third")
    for name in ("fifo", "link"):
        if os.path.lexists(root / name):
            os.link(root / name, linked / name, follow_symlinks=False)


def acls(root: Path) -> None:
    write(root / "listed", b"x")
    sh("setfacl", "-m", "u:1000:rw,g:1001:r", root / "listed")
    shared = root / "shared"
    shared.mkdir()
    sh("setfacl", "-d", "-m", "u:1000:rwx", shared)
    write(shared / "inherited", b"x")
    write(shared / "bare", b"x")
    sh("setfacl", "-b", shared / "bare")
    (shared / "below").mkdir()


def attributes(root: Path) -> None:
    write(root / "attributes", b"x")
    os.setxattr(root / "attributes", "user.note", b"\0binary\xff")
    os.setxattr(root / "names", "user.folder", b"of a folder")


def trusted_attributes(root: Path) -> None:
    os.setxattr(root / "attributes", "trusted.note", b"y" * 1000)
    for name in ("null", "absolute"):
        if os.path.lexists(root / name):
            os.setxattr(root / name, "trusted.note", b"of no file", follow_symlinks=False)


def capable(root: Path) -> None:
    write(root / "capable", b"x", mode=0o755, owner=(5, 5))
    os.setxattr(root / "capable", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0))


def flags(root: Path) -> None:
    write(root / "immutable", b"x", owner=(3, 3))
    write(root / "append", b"x")
    write(root / "nodump", b"x")
    frozen = root / "frozen"
    frozen.mkdir()
    write(frozen / "inside", b"x")
    sh("chattr", "+i", root / "immutable", frozen)
    sh("chattr", "+a", root / "append")
    sh("chattr", "+d", root / "nodump")


def deep(top: Path, *, levels: int) -> None:
    """Its paths are longer than PATH_MAX."""
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for level in range(levels):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        made = os.open(f"file{level}", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here)
        os.write(made, b"deep down %d" % level)
        os.close(made)
    os.close(here)


def write(path: Path, data: bytes, *, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
    path.write_bytes(data)
    os.chown(path, *owner)
    path.chmod(mode)
    os.utime(path, ns=(123_456_789, 1_600_000_000_123_456_789 + len(data)))


def unlock(root: Path) -> None:
    """So that it can be removed. It complains of all that has no flags."""
    subprocess.run(["chattr", "-R", "-f", "-ia", root], check=False, capture_output=True)


# XFS shows an ACL twice; a driver's mark; NFS version 4 shows each mode as an ACL.
_NOT_OF_THE_TREE = ("trusted.SGI_ACL_", "trusted.volumed.", "system.nfs4_acl")


def picture(root: Path) -> dict[str, Any]:
    """All that two trees must have in common, by path; hard links as the list of names."""
    found: dict[str, Any] = {}
    names: dict[int, list[str]] = {}
    for where, folders, files, opened in os.fwalk(root, follow_symlinks=False):
        below = os.fsencode(where)[len(os.fsencode(root)) :].lstrip(b"/")
        for name in [*folders, *files, *([] if below else ["."])]:
            path = ascii(below) + "/" + ascii(os.fsencode(name))
            status = os.stat(name, dir_fd=opened, follow_symlinks=False)
            found[path] = _look(opened, name, status)
            if not stat.S_ISDIR(status.st_mode):
                names.setdefault(status.st_ino, []).append(path)
    for paths in names.values():
        if len(paths) > 1:
            for path in paths:
                found[path] = (*found[path], sorted(paths))
    return found


def _look(folder: int, name: str, status: os.stat_result) -> tuple[Any, ...]:
    kind = stat.S_IFMT(status.st_mode)
    place = f"/proc/self/fd/{folder}/{name}"
    extended = {
        each: os.getxattr(place, each, follow_symlinks=False)
        for each in _names_of_xattrs(place)
        if not each.startswith(_NOT_OF_THE_TREE)
    }
    data, special = "", (0, 0)
    if kind == stat.S_IFREG:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        data = _digest(opened, status.st_size)
        special = _flags(opened)
        os.close(opened)
    elif kind == stat.S_IFDIR:
        opened = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        special = _flags(opened)
        os.close(opened)
    elif kind == stat.S_IFLNK:
        data = os.readlink(name, dir_fd=folder)
    size = status.st_size if kind == stat.S_IFREG else 0
    device = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    return (status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, device, extended, special, data)


def _names_of_xattrs(place: str) -> list[str]:
    try:
        return os.listxattr(place, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # there are none there
            raise
        return []


def _digest(opened: int, size: int) -> str:
    """Of the bytes; where much of it is holes, of their places and the data between them."""
    whole = hashlib.sha256()
    at = 0
    while at < size:
        try:
            start = os.lseek(opened, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(opened, start, os.SEEK_HOLE)
        while start < end:
            data = os.pread(opened, min(1 << 16, end - start), start)
            if data.strip(b"\0"):
                for block in range(0, len(data), 4096):
                    if data[block : block + 4096].strip(b"\0"):
                        whole.update(b"%d:" % (start + block) + data[block : block + 4096])
            start += len(data)
        at = end
    return whole.hexdigest()


def _flags(opened: int) -> tuple[int, int]:
    buffer = bytearray(28)
    try:
        fcntl.ioctl(opened, 0x801C581F, buffer)
    except OSError:
        return 0, 0
    flags, _, _, project, _ = struct.unpack_from("=5I", buffer)
    return flags & 0xF8, project
