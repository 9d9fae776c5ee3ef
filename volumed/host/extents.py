"""Where a file's data lies on its disk, asked of the file system (FIEMAP, linux/fiemap.h)."""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator
from pathlib import Path

from volumed.driver import FileExtent
from volumed.errors import HostError, NotSupported

_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQIIII")  # start, length, flags, mapped, count, reserved
_EXTENT = struct.Struct("=QQQQQIIII")  # logical, physical, length, reserved 2, flags, reserved 3
_SYNC = 1  # what is not on the disk yet has no place there
_LAST = 0x1
_VAGUE = 0x2 | 0x4 | 0x8  # unknown place, delayed allocation, compressed or encrypted
_UNWRITTEN = 0x800
_AT_ONCE = 512
_END = 2**63 - 1


def extents(path: Path) -> Iterator[FileExtent]:
    """In order. Raises NotSupported where the file system does not tell."""
    start = 0
    with path.open("rb") as opened:
        while True:
            buffer = bytearray(_HEADER.size + _AT_ONCE * _EXTENT.size)
            _HEADER.pack_into(buffer, 0, start, _END - start, _SYNC, 0, _AT_ONCE, 0)
            try:
                fcntl.ioctl(opened, _FS_IOC_FIEMAP, buffer)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                    raise NotSupported("this file system does not tell where data lies", subject=str(path)) from None
                raise HostError(f"cannot be mapped: {error.strerror}", subject=str(path)) from None
            mapped = _HEADER.unpack_from(buffer)[3]
            for number in range(mapped):
                found = _EXTENT.unpack_from(buffer, _HEADER.size + number * _EXTENT.size)
                logical, physical, length, flags = found[0], found[1], found[2], found[5]
                yield FileExtent(
                    offset=logical,
                    length=length,
                    place=None if flags & _VAGUE else physical,
                    written=not flags & _UNWRITTEN,
                )
                start = logical + length
                if flags & _LAST:
                    return
            if mapped == 0:
                return
