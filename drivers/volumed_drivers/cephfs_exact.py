"""A child that makes a tree which Ceph's manager copied from a snapshot equal to it. It runs where a server that does
not answer would hold it, and can be killed and run again.

    cephfs_exact.py SNAPSHOT TREE

SNAPSHOT holds one folder with a UUID for its name, the tree as it was. Names go by descriptors of their folders: paths
may be of any length.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_TREE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # the manager names it by a random UUID
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MADE_HERE = (stat.S_ISFIFO, stat.S_ISSOCK, stat.S_ISCHR, stat.S_ISBLK, stat.S_ISLNK)


class Unequal(Exception):
    """What the manager should have copied is not there."""


class _Linked(NamedTuple):
    """The path of the first name of a file with many, and how many are to come."""

    path: tuple[str, ...]
    names: int


class Copy:
    """The tree at descriptor `root`."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._linked: dict[int, _Linked] = {}

    def even_folder(self, snapshot: int, tree: int, path: tuple[str, ...] = ()) -> None:
        """All below; not the folder itself."""
        for name in os.listdir(snapshot):
            there = os.lstat(name, dir_fd=snapshot)
            here = _status(name, tree)
            if stat.S_ISDIR(there.st_mode):
                with _both(name, _FOLDER, snapshot, tree) as (inner, own):
                    self.even_folder(inner, own, (*path, name))
            elif there.st_nlink > 1 and self._link(name, there, here, tree):
                continue
            else:
                _even_file(name, snapshot, there, here, tree)
                if there.st_nlink > 1:
                    self._linked[there.st_ino] = _Linked((*path, name), there.st_nlink - 1)
            with _both(name, _ITSELF, snapshot, tree) as (original, own):
                even(original, own)

    def _link(self, name: str, there: os.stat_result, here: os.stat_result | None, tree: int) -> bool:
        """Whether it is another name of a file that was met before; it is then."""
        first = self._linked.pop(there.st_ino, None)
        if first is None:
            return False
        with self._opened(first.path) as descriptor:
            if here is None or here.st_ino != os.fstat(descriptor).st_ino:
                if here is not None:
                    os.unlink(name, dir_fd=tree)
                os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=tree, follow_symlinks=True)
        if first.names > 1:
            self._linked[there.st_ino] = first._replace(names=first.names - 1)
        return True

    @contextlib.contextmanager
    def _opened(self, path: tuple[str, ...]) -> Iterator[int]:
        """Not kept open from its first name on: there may be more such files than descriptors."""
        descriptor = os.dup(self._root)
        try:
            for name in path:
                inner = os.open(name, _ITSELF, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _both(name: str, flags: int, snapshot: int, tree: int) -> Iterator[tuple[int, int]]:
    """The name opened on either side."""
    original = os.open(name, flags, dir_fd=snapshot)
    try:
        own = os.open(name, flags, dir_fd=tree)
        try:
            yield original, own
        finally:
            os.close(own)
    finally:
        os.close(original)


def _even_file(name: str, snapshot: int, there: os.stat_result, here: os.stat_result | None, tree: int) -> None:
    if here is None:
        if not any(is_kind(there.st_mode) for is_kind in _MADE_HERE):
            raise Unequal(f"{name!r} is missing")
        if stat.S_ISLNK(there.st_mode):
            os.symlink(os.readlink(name, dir_fd=snapshot), name, dir_fd=tree)
        else:
            os.mknod(name, stat.S_IFMT(there.st_mode) | 0o600, there.st_rdev, dir_fd=tree)
    elif stat.S_IFMT(here.st_mode) != stat.S_IFMT(there.st_mode):
        raise Unequal(f"{name!r} is of another kind")
    elif stat.S_ISREG(there.st_mode) and here.st_size != there.st_size:
        raise Unequal(f"{name!r} has {here.st_size} bytes, and had {there.st_size}")


def even(original: int, own: int) -> None:
    """Owner, attributes, mode, times, in this order: the first takes from the others, and each touches the last."""
    there, here, path = os.fstat(original), os.fstat(own), f"/proc/self/fd/{own}"
    if (there.st_uid, there.st_gid) != (here.st_uid, here.st_gid):
        os.chown(path, there.st_uid, there.st_gid)
    wanted, found = _attributes(original), _attributes(own)
    for key in found.keys() - wanted.keys():
        os.removexattr(path, key)
    for key, value in wanted.items():
        if found.get(key) != value:
            os.setxattr(path, key, value)
    here = os.fstat(own)
    if not stat.S_ISLNK(there.st_mode) and there.st_mode != here.st_mode:
        Path(path).chmod(stat.S_IMODE(there.st_mode))
    if there.st_mtime_ns != here.st_mtime_ns:
        os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))


def _attributes(descriptor: int) -> dict[str, bytes]:
    """Without Ceph's own, which tell of quotas, layouts and sizes."""
    path = f"/proc/self/fd/{descriptor}"
    return {key: os.getxattr(path, key) for key in os.listxattr(path) if not key.startswith("ceph.")}


def main(snapshot: str, tree: str) -> None:
    ctypes.CDLL(None).prctl(
        _PR_SET_PDEATHSIG, signal.SIGKILL
    )  # it holds the mount, which whoever comes next takes away
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sys.setrecursionlimit(100_000)
    # Beside it the manager may keep a folder for what it removes (`.trash`).
    folders = [entry.path for entry in os.scandir(snapshot) if _TREE.fullmatch(entry.name)]
    if len(folders) != 1:
        raise Unequal(f"the snapshot holds {len(folders)} trees")
    original, own = os.open(folders[0], _FOLDER), os.open(tree, _FOLDER)
    Copy(own).even_folder(original, own)
    even(original, own)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Unequal, OSError) as error:
        sys.exit(str(error))
