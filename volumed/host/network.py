"""File systems behind a server that may be gone: everything that could wait for it waits in a child.

A child in uninterruptible sleep cannot be killed, but it can be left behind (`volumed.host.run`); a thread of the
daemon could not.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from volumed.driver import TreeStatus
from volumed.errors import CommandFailed, DeadlineExceeded, HostError, InUse, MountFailed
from volumed.host import mounts
from volumed.host.holders import holders_of_mount
from volumed.host.run import run

# umount2(2) and statvfs(3) by a Python that imports nothing: the one program that is certainly here.
_CHILD = (sys.executable, "-I", "-S", "-c")
_UNMOUNT = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
done = libc.umount2(sys.argv[1].encode("utf-8", "surrogateescape"), int(sys.argv[2]))
print(ctypes.get_errno() if done else 0)
"""
_STATUS = """
import os, sys
try:
    s = os.statvfs(sys.argv[1])
    print(0, s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_favail)
except OSError as error:
    print(error.errno)
"""
MNT_FORCE, UMOUNT_NOFOLLOW = 1, 8


def mount(
    source: str,
    target: Path,
    *,
    fstype: str,
    options: Sequence[str],
    readonly: bool,
    timeout: float,
    secrets: Sequence[str],
) -> None:
    """See `volumed.driver.Host.mount_network`."""
    words = [*options, "ro" if readonly else "rw"]
    try:
        run(["mount", "-t", fstype, "-o", ",".join(words), "--", source, target], timeout=timeout, secrets=secrets)
    except CommandFailed as error:
        said = error.stderr.strip().replace("\n", "; ")
        raise MountFailed(f"mounting {source} ({fstype}) failed: {said or error.text}", subject=str(target)) from None
    except DeadlineExceeded:
        # The kernel may finish what its caller no longer waits for.
        if mounts.is_mountpoint(target):
            unmount(target, timeout=5.0, force=True)
        raise


def unmount(target: Path, *, timeout: float, force: bool) -> None:
    """See `volumed.driver.Host.unmount_network`."""
    flags = UMOUNT_NOFOLLOW | (MNT_FORCE if force else 0)
    while mounts.is_mountpoint(target):
        told = run([*_CHILD, _UNMOUNT, target, str(flags)], timeout=timeout)
        number = int(told.stdout)
        if number in (0, errno.EINVAL, errno.ENOENT):
            continue
        if number == errno.EBUSY:
            raise InUse("is held by", holders=holders_of_mount(target) or ["a process"], subject=f"mount {target}")
        raise MountFailed(f"unmounting failed: {_name(number)}", errno=number, subject=str(target))


def status(path: Path, *, timeout: float) -> TreeStatus:
    """See `volumed.driver.Host.tree_status`."""
    told = [int(word) for word in run([*_CHILD, _STATUS, path], timeout=timeout).stdout.split()]
    if told[0] != 0:
        hint = "its server has forgotten it: it is mounted anew soon" if told[0] == errno.ESTALE else ""
        raise HostError(f"cannot be measured: {_name(told[0])}", subject=str(path), hint=hint)
    unit, blocks, free, available, files, files_free, files_available = told[1:]
    return TreeStatus(
        total=blocks * unit,
        used=(blocks - free) * unit,
        available=available * unit,
        inodes=files,
        inodes_used=files - files_free,
        inodes_available=files_available,
    )


def _name(number: int) -> str:
    return f"{errno.errorcode.get(number, str(number))}"
