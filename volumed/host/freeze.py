"""A file system held still for the instant of a snapshot, and let go whatever happens to us.

A frozen file system outlives whoever froze it: after kill -9 its containers would hang for ever. So a small guard
process, of its own session, thaws it when our end of a pipe closes, for whatever reason, or when time is up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from volumed.errors import HostError

_libc = ctypes.CDLL(None, use_errno=True)

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878

# `read` returns when the pipe is closed or a line comes; either way the file system is thawed, if it is frozen still.
_GUARD = 'read -t "$2" line; exec fsfreeze --unfreeze "$1"'


@contextlib.contextmanager
def frozen(mountpoint: Path, *, timeout: float) -> Iterator[None]:
    """Nothing is written to the file system inside the block. After `timeout` seconds it is thawed even so.

    Raises HostError when it cannot be frozen, and when it was thawed before the block ended: then what was done
    inside is not one point in time.
    """
    descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _libc.syncfs(descriptor)  # most is written before anybody has to wait
        with _guard(mountpoint, timeout) as guard:
            _freeze(descriptor, mountpoint)
            try:
                try:
                    yield
                finally:
                    still = _thaw(descriptor, mountpoint)
            except BaseException:
                guard.communicate()  # it thaws, in case that is what went wrong
                raise
            if not still:
                raise HostError(
                    f"could not be held still for long enough ({timeout:g} s)", subject=f"mount {mountpoint}"
                )
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _guard(mountpoint: Path, timeout: float) -> Iterator[subprocess.Popen[bytes]]:
    guard = subprocess.Popen(
        ["bash", "-c", _GUARD, "volumed-thaw", str(mountpoint), str(int(timeout) + 1)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        start_new_session=True,
    )
    try:
        yield guard
    finally:
        guard.kill()  # there is nothing left to guard
        guard.communicate()


def _thaw(descriptor: int, mountpoint: Path) -> bool:
    try:
        fcntl.ioctl(descriptor, FITHAW, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:  # it is not frozen
            return False
        raise HostError(f"cannot be thawed: {error.strerror}", subject=f"mount {mountpoint}") from None
    return True


def _freeze(descriptor: int, mountpoint: Path) -> None:
    try:
        fcntl.ioctl(descriptor, FIFREEZE, 0)
    except OSError as error:
        raise HostError(f"cannot be frozen: {error.strerror}", subject=f"mount {mountpoint}") from None
