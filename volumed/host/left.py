"""Children whose system call no signal ends: they are left behind, and known until the kernel lets go of them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from typing import Any

_log = logging.getLogger(__name__)

# A child in uninterruptible sleep does not die of SIGKILL before its system call returns: it is left behind then.
REAP_TIMEOUT = 1.0
_left: dict[int, tuple[str, ...]] = {}  # what each of them was to do, by pid


def kill(child: subprocess.Popen[Any], words: tuple[str, ...]) -> None:
    """The child and all it started. What does not die is not waited for, nor by Popen. `words`: what it does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(REAP_TIMEOUT)
        return
    _log.error("process %d does not die: the kernel holds it", child.pid)
    _left[child.pid] = words
    child.returncode = -signal.SIGKILL  # or Popen would wait for it for ever


def hanging() -> list[tuple[str, ...]]:
    """What those do that are held still. While one hangs the same is not begun again: it would hang beside it."""
    for pid in list(_left):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _left.pop(pid, None)
    return list(_left.values())
