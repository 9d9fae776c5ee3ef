"""Named crash points: where a test kills the daemon to prove that nothing is lost or leaked there, or keeps it waiting
to do something else meanwhile.

`VOLUMED_CRASH_AT=create.reserved` (or `create.reserved:2`, the second time it is passed) ends the process there as
kill -9 would: no handler runs, nothing is flushed. `VOLUMED_WAIT_AT=create.reserved:/some/file` makes the file when it
is passed first, and goes on when somebody has removed that. Without the variables a point costs two comparisons.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_name, _, _count = os.environ.get("VOLUMED_CRASH_AT", "").partition(":")
_left = int(_count or 1)
_waiting, _, _file = os.environ.get("VOLUMED_WAIT_AT", "").partition(":")


def point(name: str) -> None:
    global _left, _waiting  # noqa: PLW0603 (what is still to come belongs to the process)
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    if name == _waiting:
        _waiting = ""
        there = Path(_file)
        there.touch()
        while there.exists():
            time.sleep(0.01)
