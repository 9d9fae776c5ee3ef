"""Project quotas of XFS: a tree bounded in bytes, for root as well (quotactl(2), linux/dqblk_xfs.h, linux/fs.h).

ext4 has project quotas too, but they do not bind a process with CAP_SYS_RESOURCE, and containers often have it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from volumed.driver import MountEntry
from volumed.errors import HostError

_libc = ctypes.CDLL(None, use_errno=True)

FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FS_XFLAG_PROJINHERIT = 0x200
_FSXATTR = struct.Struct("=5I8x")  # xflags, extsize, nextents, projid, cowextsize

_PRJQUOTA = 2
_Q_XGETQUOTA, _Q_XSETQLIM, _Q_XGETQSTATV = 0x5803, 0x5804, 0x5808
FS_QUOTA_PDQ_ACCT, FS_QUOTA_PDQ_ENFD = 16, 32
_FS_DQ_BHARD = 1 << 3
_BASIC_BLOCK = 512

# struct fs_disk_quota: version, flags (s8), fieldmask (u16), id (u32), six u64 of limits and counts of blocks and
# inodes, two s32 timers, two u16 warnings, and the rest, 112 bytes in all
_DQUOT = struct.Struct("=bbHI6Q56x")
_FS_DQUOT_VERSION = 1
_FS_PROJ_QUOTA = 2
# struct fs_quota_statv: version (s8), pad, flags (u16) ...
_STATV_SIZE, _STATV_VERSION = 256, 1


def _command(command: int) -> int:
    return (command << 8) | _PRJQUOTA


def supported(entry: MountEntry) -> bool:
    """Whether the mount is an XFS that counts and enforces project quotas."""
    if entry.fstype != "xfs":
        return False
    buffer = ctypes.create_string_buffer(bytes([_STATV_VERSION]), _STATV_SIZE)
    if _libc.quotactl(_command(_Q_XGETQSTATV), os.fsencode(entry.source), 0, buffer):
        return False
    flags = int.from_bytes(buffer.raw[2:4], "little")
    return bool(flags & FS_QUOTA_PDQ_ACCT and flags & FS_QUOTA_PDQ_ENFD)


def assign(path: Path, project: int) -> None:
    """Put a new, empty directory, and so all that will be made in it, into the project."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        buffer = bytearray(_FSXATTR.size)
        fcntl.ioctl(descriptor, FS_IOC_FSGETXATTR, buffer)
        flags, extsize, extents, _, cow = _FSXATTR.unpack(buffer)
        new = _FSXATTR.pack(flags | FS_XFLAG_PROJINHERIT, extsize, extents, project, cow)
        fcntl.ioctl(descriptor, FS_IOC_FSSETXATTR, new)
    except OSError as error:
        raise HostError(f"cannot be put into project {project}: {error.strerror}", subject=str(path)) from None
    finally:
        os.close(descriptor)


def set_limit(device: str, *, project: int, limit: int) -> None:
    """Hard limit in bytes, rounded up to 512; 0 takes it away."""
    blocks = -(-limit // _BASIC_BLOCK)
    request = _DQUOT.pack(_FS_DQUOT_VERSION, _FS_PROJ_QUOTA, _FS_DQ_BHARD, project, blocks, 0, 0, 0, 0, 0)
    if _libc.quotactl(_command(_Q_XSETQLIM), os.fsencode(device), project, request):
        number = ctypes.get_errno()
        raise HostError(f"the quota of project {project} cannot be set: {os.strerror(number)}", subject=device)


def usage(device: str, *, project: int) -> tuple[int, int]:
    """Bytes occupied, and the hard limit in bytes (0: none)."""
    buffer = ctypes.create_string_buffer(_DQUOT.size)
    if _libc.quotactl(_command(_Q_XGETQUOTA), os.fsencode(device), project, buffer):
        number = ctypes.get_errno()
        if number == errno.ENOENT:
            return 0, 0
        raise HostError(f"the quota of project {project} cannot be read: {os.strerror(number)}", subject=device)
    fields = _DQUOT.unpack(buffer.raw)
    return fields[8] * _BASIC_BLOCK, fields[4] * _BASIC_BLOCK
