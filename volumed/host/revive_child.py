"""revive_child.py TREE PID TARGET FLAG...: puts the mount at TREE over the one at TARGET in PID's namespace, if that is
dead. Runs by itself, in a child of `volumed.host.revive`, and imports nothing of ours."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import time

OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # the same on every architecture
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
CLONE_NEWNS = 0x20000
UMOUNT_NOFOLLOW = 8
PATIENCE = 40  # times 0.05 s
# mount_setattr(2): MOUNT_ATTR_*, by the words of mountinfo
FLAGS = {"ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "noatime": 0x10, "nodiratime": 0x80}
DEAD = (errno.ENOTCONN, errno.ESTALE)

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise SystemExit(f"{what}: {os.strerror(number)}")
    return result


def main(tree: str, pid: str, target: str, *options: str) -> str:
    at = ctypes.c_int(AT_FDCWD)
    new = call(
        "open_tree", libc.syscall(OPEN_TREE, at, os.fsencode(tree), ctypes.c_uint(OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC))
    )
    wanted = sum(FLAGS.get(option, 0) for option in options)
    attributes = struct.pack("QQQQ", wanted, 0x70 if wanted & 0x10 else 0, 0, 0)  # 0x70: the field that noatime is in
    call("mount_setattr", libc.syscall(MOUNT_SETATTR, new, b"", AT_EMPTY_PATH, attributes, len(attributes)))
    with open(f"/proc/{pid}/ns/mnt", "rb") as namespace:  # noqa: PTH123
        call("setns", libc.setns(namespace.fileno(), CLONE_NEWNS))
    try:
        os.statvfs(target)
    except OSError as error:
        if error.errno not in DEAD:
            raise SystemExit(f"cannot be looked at: {error.strerror}") from None
    else:
        return "alive"
    path = os.fsencode(target)
    # One that a process still holds stays below: what it has open is dead, what it opens from now on is not. But most
    # hold it for a moment only, to learn that it is dead; and on a directory that its server forgot nothing can be
    # mounted (ENOENT).
    for _ in range(PATIENCE):
        if libc.umount2(path, UMOUNT_NOFOLLOW) == 0:
            break
        time.sleep(0.05)
    call("move_mount", libc.syscall(MOVE_MOUNT, new, b"", at, path, ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)))
    return "replaced"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))  # noqa: T201
