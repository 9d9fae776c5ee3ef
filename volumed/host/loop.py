"""Loop devices: found by the inode of their backing file, never by number or name (loop(4), linux/loop.h)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from volumed import context
from volumed.driver import Loop
from volumed.errors import HostError, InUse

LOOP_SET_CAPACITY = 0x4C07
LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_READ_ONLY, LO_FLAGS_DIRECT_IO = 1, 16

# struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit (u64), lo_number, lo_encrypt_type,
# lo_encrypt_key_size, lo_flags (u32), lo_file_name, lo_crypt_name (64 bytes), lo_encrypt_key (32), lo_init (2 u64)
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: fd, block_size (u32), info, 8 reserved u64
_CONFIG_HEAD = struct.Struct("=2I")
_RESERVED = bytes(64)

# The logical block of every device, said and not left to the kernel: that chooses what direct I/O to the backing file
# needs, which for a file on XFS grows from 512 to 4096 with its first reflink (measured, Linux 6.18), and an XFS made
# with sectors of 512 cannot be mounted from then on.
BLOCK_SIZE = 4096

# Where a file's device was last: a machine may have hundreds, and most questions are about one that was just asked for.
_seen: dict[tuple[int, int], Path] = {}

_SYS_BLOCK = Path("/sys/block")
_DELETED = " (deleted)"  # how sysfs shows a file that has no name any more
_CONTROL = Path("/dev/loop-control")


def attach(backing_file: Path, *, direct_io: bool, readonly: bool) -> Path:
    """See `volumed.driver.Host.attach_loop`. Raises HostError."""
    there = find(backing_file)
    if there is not None:
        return there
    descriptor = os.open(backing_file, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    try:
        return _configure(descriptor, backing_file, direct_io=direct_io, readonly=readonly)
    finally:
        os.close(descriptor)


def _configure(descriptor: int, backing_file: Path, *, direct_io: bool, readonly: bool) -> Path:
    flags = (LO_FLAGS_READ_ONLY if readonly else 0) | (LO_FLAGS_DIRECT_IO if direct_io else 0)
    name = os.fsencode(backing_file)[-63:]  # for people who run losetup; the kernel tells the whole path in sysfs
    ends = time.monotonic() + context.remaining(10.0)
    while True:
        device = _free_device()
        info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
        try:
            with _opened(device) as loop:
                fcntl.ioctl(loop, LOOP_CONFIGURE, _CONFIG_HEAD.pack(descriptor, BLOCK_SIZE) + info + _RESERVED)
        except OSError as error:
            if error.errno == errno.EINVAL and flags & LO_FLAGS_DIRECT_IO:
                flags &= ~LO_FLAGS_DIRECT_IO  # this file system has no direct I/O; buffered is right, if slower
                continue
            # Another process took the free device between the two calls.
            if error.errno not in (errno.EBUSY, errno.ENXIO, errno.ENOENT) or time.monotonic() > ends:
                raise HostError(
                    f"no loop device could be set up: {os.strerror(error.errno or 0)}", subject=str(backing_file)
                ) from None
            continue
        status = os.fstat(descriptor)
        _seen[status.st_dev, status.st_ino] = device
        return device


def _free_device() -> Path:
    with _opened(_CONTROL) as control:
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    device = Path(f"/dev/loop{number}")
    if not device.exists():  # a /dev that is not the kernel's own
        with contextlib.suppress(FileExistsError):
            os.mknod(device, 0o60660, os.makedev(7, number))
    return device


def find(backing_file: Path) -> Path | None:
    """By inode: a renamed or replaced file is told apart."""
    try:
        status = backing_file.stat()
    except FileNotFoundError:
        return None
    wanted = (status.st_dev, status.st_ino)
    remembered = _seen.get(wanted)
    if remembered is not None:  # most likely there still; the kernel is asked in any case
        loop = _status(remembered, str(backing_file))
        if loop is not None and loop.backing_inode == wanted:
            return remembered
    for loop in attached(only=str(backing_file)):
        if loop.backing_inode == wanted:
            _seen[wanted] = loop.device
            return loop.device
    _seen.pop(wanted, None)
    return None


def attached(*, only: str | None = None) -> Iterator[Loop]:
    """Every device in use; with `only`, those that sysfs shows with this backing file, opened for the proof alone."""
    for entry in os.scandir(_SYS_BLOCK):
        if not entry.name.startswith("loop"):
            continue
        shown = _backing_file(entry.path)
        if shown is None or (only is not None and shown != only):
            continue
        loop = _status(Path("/dev", entry.name), shown.removesuffix(_DELETED))
        if loop is not None:
            yield loop


def _backing_file(block: str) -> str | None:
    """As sysfs shows it; None for a device that is free. On the way of every mount, so without ceremony."""
    try:
        descriptor = os.open(f"{block}/loop/backing_file", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.fsdecode(os.read(descriptor, 8192).rstrip(b"\n"))
    except OSError:  # freed meanwhile
        return None
    finally:
        os.close(descriptor)


def _status(device: Path, backing_file: str) -> Loop | None:
    buffer = bytearray(_INFO.size)
    try:
        with _opened(device, readonly=True) as loop:
            fcntl.ioctl(loop, LOOP_GET_STATUS64, buffer)
    except OSError:
        return None
    found = _INFO.unpack(buffer)
    return Loop(
        device=device,
        backing_file=Path(backing_file),
        backing_inode=(found[0], found[1]),
        readonly=bool(found[8] & LO_FLAGS_READ_ONLY),
    )


def detach(device: Path) -> None:
    """Raises InUse while somebody has it open. Free, or gone, is success.

    The kernel clears a device that is open elsewhere only when it is closed there, and says that all is well
    (LO_FLAGS_AUTOCLEAR); so it is looked at afterwards. By what it has: somebody else may take a free one at once.
    """
    block = f"{_SYS_BLOCK}/{device.name}"
    had = _backing_file(block)
    try:
        with _opened(device, readonly=True) as loop:
            fcntl.ioctl(loop, LOOP_CLR_FD)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
        if error.errno != errno.EBUSY:
            raise HostError(f"cannot be freed: {os.strerror(error.errno or 0)}", subject=str(device)) from None
    for inode in [inode for inode, known in list(_seen.items()) if known == device]:
        _seen.pop(inode, None)
    ends = time.monotonic() + 0.5  # udev opens a device for a moment when it changes
    while had is not None and (_backing_file(block) or "").removesuffix(_DELETED) == had.removesuffix(_DELETED):
        if time.monotonic() > ends:
            raise InUse("is held by", holders=["a mount or a process that has it open"], subject=f"device {device}")
        time.sleep(0.005)


def refresh(device: Path) -> None:
    """The device takes the size that its backing file has now."""
    with _opened(device) as loop:
        try:
            fcntl.ioctl(loop, LOOP_SET_CAPACITY)
        except OSError as error:
            raise HostError(
                f"did not take its new size: {os.strerror(error.errno or 0)}", subject=str(device)
            ) from None


@contextlib.contextmanager
def _opened(device: Path, *, readonly: bool = False) -> Iterator[int]:
    descriptor = os.open(device, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
