"""Named crash points: where a test kills the daemon to prove that nothing is lost or leaked there.

`VOLUMED_CRASH_AT=create.reserved` (or `create.reserved:2`, the second time it is passed) ends the process there as
kill -9 would: no handler runs, nothing is flushed. Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os
import signal

_name, _, _count = os.environ.get("VOLUMED_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def point(name: str) -> None:
    global _left  # noqa: PLW0603 (the countdown belongs to the process)
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
