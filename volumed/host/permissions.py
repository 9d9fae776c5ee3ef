"""Who owns a tree: its root, as a volume was asked for; and all of it made writable for a group, that of a workload
which an orchestrator runs on it.

The meaning is Kubernetes' of `fsGroup`: the group owns everything, may read and write it, may enter folders and run
what is executable, and new files belong to it, too.

    permissions.py own TREE UID GID MODE        -1: as it is
    permissions.py group TREE GID

in a child (`CHILD`), for a tree behind a server: imports nothing of ours.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

CHILD = (sys.executable, "-I", "-S", __file__)

_FOLDER = stat.S_ISGID | stat.S_IRGRP | stat.S_IWGRP | stat.S_IXGRP
_FILE = stat.S_IRGRP | stat.S_IWGRP


def own(tree: Path, uid: int, gid: int, mode: int) -> None:
    """-1 stays as it is."""
    if (uid, gid) != (-1, -1):
        os.chown(tree, uid, gid)
    if mode != -1:
        tree.chmod(mode)


def grant_group(tree: Path, gid: int) -> None:
    """Nothing is done when the root has it already: it is set last, so then everything below has it.

    Never follows a symbolic link: a workload could have put one there.
    """
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(root)
        if status.st_gid == gid and status.st_mode & _FOLDER == _FOLDER:
            return
        for _, folders, files, at in os.fwalk(".", topdown=False, follow_symlinks=False, dir_fd=root):
            for name in (*files, *folders):
                _grant(name, at, gid)
        os.chown(root, -1, gid)
        os.fchmod(root, stat.S_IMODE(os.fstat(root).st_mode) | _FOLDER)
    finally:
        os.close(root)


def _grant(name: str, at: int, gid: int) -> None:
    try:
        status = os.lstat(name, dir_fd=at)
        if status.st_gid != gid:
            os.chown(name, -1, gid, dir_fd=at, follow_symlinks=False)  # clears set-user-id: so it is set again
        if stat.S_ISLNK(status.st_mode):
            return
        mode = stat.S_IMODE(status.st_mode)
        wanted = mode | (_FOLDER if stat.S_ISDIR(status.st_mode) else _FILE | (mode & stat.S_IXUSR) >> 3)
        if status.st_gid != gid or wanted != mode:
            os.chmod(name, wanted, dir_fd=at)
    except FileNotFoundError:
        return  # removed while we looked


def _main(what: str, tree: str, *numbers: str) -> str:
    """The error, or nothing."""
    try:
        if what == "own":
            own(Path(tree), *map(int, numbers))
        else:
            grant_group(Path(tree), *map(int, numbers))
    except OSError as error:
        return str(error.strerror)
    return ""


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]) or 0)  # of a text, even an empty one, it makes a failure
