"""The inside of a worker (`volumed.driver.Worker`): it answers line by line, for as long as the daemon lives.

Imports nothing of ours: what only makes system calls stays small.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def answer_all(respond: Callable[[str], str], *, greeting: str = "") -> NoReturn:
    """`respond`: one line for each, on the main thread. `greeting`: the answer to a line that was read already."""
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    if greeting:
        print(greeting, file=answers, flush=True)
    for line in sys.stdin:
        print(respond(line), file=answers, flush=True)
    os._exit(0)  # no library waits for its server when it is taken down


def _end_with_the_daemon() -> None:
    """Also while a call hangs, and nobody reads."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)  # POLLHUP alone, which needs no asking for
    poll.poll()
    os._exit(0)
