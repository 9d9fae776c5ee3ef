"""File systems behind a server that may be gone: everything that could wait for it waits in a child.

A child in uninterruptible sleep cannot be killed, but it can be left behind (`volumed.host.left`); a thread of the
daemon could not.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

from volumed.driver import TreeStatus
from volumed.errors import CommandFailed, DeadlineExceeded, MountFailed
from volumed.host import mounts, served
from volumed.host.run import run

MNT_FORCE = 1
# What mount(8) takes for itself and never hands to the file system: with these it would do something else than mount.
_OF_MOUNT = frozenset(
    {"bind", "rbind", "move", "rmove", "remount", "loop", "private", "rprivate", "shared", "rshared", "slave", "rslave"}
    | {"unbindable", "runbindable", "user", "users", "owner", "group", "auto", "noauto"}
)
_OF_MOUNT_WITH_VALUE = ("x-", "X-", "loop=", "helper=", "uhelper=", "offset=", "sizelimit=", "verity.", "comment=")
_MEANINGS = {
    errno.ESTALE: "its server has forgotten it (stale file handle)",
    errno.ENOTCONN: "the process that served it is dead",
}


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
    words = [*options, *(["ro"] if readonly else [])]
    for word in (part for option in words for part in option.split(",")):
        if word in _OF_MOUNT or word.startswith(_OF_MOUNT_WITH_VALUE):
            raise MountFailed(f"{fstype} cannot take the option {word!r}", errno=errno.EINVAL, subject=str(target))
    argv: list[str | Path] = ["mount", "-t", fstype, *(["-o", ",".join(words)] if words else []), "--", source, target]
    try:
        run(argv, timeout=timeout, secrets=secrets)
    except CommandFailed as error:
        _clear(target)  # mount(8) may fail after it has mounted
        said = error.stderr.strip().replace("\n", "; ")
        raise MountFailed(f"mounting {source} ({fstype}) failed: {said or error.text}", subject=str(target)) from None
    except DeadlineExceeded:
        _clear(target)
        raise DeadlineExceeded(
            f"mounting {source} ({fstype}) got no answer in time", subject=str(target), hint="is its server up?"
        ) from None


def _clear(target: Path) -> None:
    """The kernel may have finished what its caller no longer waited for; what it finishes later, reconciling sees."""
    if mounts.is_mountpoint(target):
        unmount(target, timeout=5.0, force=True)


def unmount(target: Path, *, timeout: float, force: bool) -> None:
    """See `volumed.driver.Host.unmount_network`."""
    ends = time.monotonic() + mounts.MOMENT
    while mounts.is_mountpoint(target):
        flags = mounts.UMOUNT_NOFOLLOW | (MNT_FORCE if force and _is_alone(target) else 0)
        try:
            # Not by umount(8), which looks at the mount first, and so asks the server.
            served.call("unmount", target, flags, timeout=timeout)
        except DeadlineExceeded:
            raise DeadlineExceeded(
                "unmounting got no answer from its server in time", subject=f"mount {target}"
            ) from None
        except OSError as error:
            if error.errno == errno.EBUSY:
                mounts.check_held(target, ends)
            elif mounts.is_mountpoint(target):
                raise _failed("unmounting", target, error) from None


def _is_alone(target: Path) -> bool:
    """MNT_FORCE ends what is on its way to the server for every mount of the file system, bind mounts of it as well:
    those of other volumes. The last mount alone waits for the server."""
    table = mounts.read_table()
    entry = next((entry for entry in reversed(table) if entry.target == target), None)
    return entry is None or sum(other.device == entry.device for other in table) == 1


def bind(source: Path, target: Path, *, readonly: bool, options: Sequence[str], timeout: float) -> None:
    """See `volumed.driver.Host.bind_network`."""
    flags = mounts.bind_flags(target, readonly=readonly, options=options)
    try:
        served.call("bind", source, target, flags, timeout=timeout)
    except DeadlineExceeded:
        _clear(target)
        raise
    except OSError as error:
        raise _failed(f"mounting {source}", target, error) from None


def _failed(what: str, target: Path, error: OSError) -> MountFailed:
    number = error.errno or 0
    return MountFailed(f"{what} failed: {os.strerror(number)}", errno=number, subject=str(target))


def status(path: Path, *, timeout: float) -> TreeStatus:
    """See `volumed.driver.Host.tree_status`."""
    try:
        unit, blocks, free, available, files, files_free = served.call("statvfs", path, timeout=timeout)
    except OSError as error:
        number = error.errno or 0
        text = _MEANINGS.get(number, os.strerror(number))
        raise MountFailed(f"cannot be measured: {text}", errno=number, subject=str(path)) from None
    return TreeStatus(
        total=blocks * unit,
        used=(blocks - free) * unit,
        available=available * unit,
        inodes=files,
        inodes_used=files - files_free,
        inodes_available=files_free,
    )
