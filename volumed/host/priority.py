"""A thread whose work may wait: its I/O and its CPU come after everybody else's."""

from __future__ import annotations

import ctypes
import os
import platform
import threading

_libc = ctypes.CDLL(None, use_errno=True)

# linux/ioprio.h; the number of ioprio_set(2) per machine, which the C library does not wrap.
_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}.get(platform.machine())
_WHO_PROCESS = 1
_IDLE, _NONE = 3 << 13, 0
_LOWEST, _NORMAL = 19, 0


def lower() -> None:
    """The calling thread from now on. An I/O scheduler without classes (none, mq-deadline in part) heeds only the rate
    of a throttle; so it is asked for, not relied on."""
    _set(_IDLE, _LOWEST)


def restore() -> None:
    _set(_NONE, _NORMAL)


def _set(io: int, nice: int) -> None:
    if _SET is not None:
        _libc.syscall(_SET, _WHO_PROCESS, 0, io)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
