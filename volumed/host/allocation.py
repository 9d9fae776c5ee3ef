"""Which parts of a file or a loop device hold data, and making a part read as zeros again (lseek(2), fallocate(2))."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from volumed.driver import Extent
from volumed.errors import BackendUnavailable, HostError
from volumed.host import mapper

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_BACKING_FILE = "/sys/dev/block/{}:{}/loop/backing_file"
_OFFSET = "/sys/dev/block/{}:{}/loop/offset"


def data_extents(path: Path) -> list[Extent] | None:
    """What is not a hole, in order; all else reads as zeros. None for a device that does not tell."""
    path = mapper.below(path)
    status = path.stat()
    if stat.S_ISREG(status.st_mode):
        return list(_data(path))
    numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
    try:
        backing = Path(Path(_BACKING_FILE.format(*numbers)).read_text().rstrip("\n"))
        if int(Path(_OFFSET.format(*numbers)).read_text()) == 0:
            return list(_data(backing))
    except OSError:  # no loop device, or its file cannot be reached from here
        pass
    return None


def _data(path: Path) -> Iterator[Extent]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end, offset = os.fstat(descriptor).st_size, 0
        while offset < end:
            try:
                start = os.lseek(descriptor, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                raise
            offset = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield Extent(start, offset - start)
    finally:
        os.close(descriptor)


def punch(descriptor: int, offset: int, length: int) -> bool:
    """Make it read as zeros without writing them. False where the storage cannot. Raises HostError."""
    if _libc.fallocate64(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
        return False
    raise HostError(f"bytes {offset} to {offset + length - 1} cannot be freed: {os.strerror(number)}")


@contextlib.contextmanager
def direct(path: Path, flags: int) -> Iterator[int]:
    """A descriptor that bypasses the page cache, where the storage lets it. Raises HostError, and BackendUnavailable
    for a device that is to be opened by nobody else (O_EXCL) and is."""
    try:
        descriptor = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BackendUnavailable(
                "a process that waits for its storage still writes to it", subject=str(path)
            ) from None
        if error.errno != errno.EINVAL:
            raise HostError(f"cannot be opened: {error.strerror}", subject=str(path)) from None
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
