"""System calls that may wait for a server, made by children that are kept for the next one.

Starting a child costs ten times what the call itself does. One that does not answer in time is killed, or left behind
where the kernel holds it, and never asked again. A server that hangs costs a bounded number of them: none makes the
very call that another one still hangs in, and no more than `MOST` hang in one file system.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from volumed.driver import Worker
from volumed.errors import DeadlineExceeded
from volumed.host import left, worker
from volumed.host.mounts import read_table

START_TIMEOUT = 60.0  # seconds, for Python itself: no server is asked
# Hanging in one file system; kept for the next call, each of some 10 MiB, and for how many seconds.
MOST, KEPT, KEPT_FOR = 4, 4, 60.0
_idle: list[tuple[float, Worker]] = []  # since when; the one used last is taken first
_lock = threading.Lock()
_MODULE = "volumed.host.served_child"


def call(name: str, *arguments: str | int | Path, timeout: float) -> Any:
    """A call of `volumed.host.served_child`, whose first argument is a path; its answer. Raises OSError as the call
    does, DeadlineExceeded."""
    words = [argument if isinstance(argument, int) else str(argument) for argument in arguments]
    question, path = json.dumps([name, *words]), str(words[0])
    hanging = [asked for module, asked, *_ in left.hanging() if module == _MODULE]
    if question in hanging or (name != "unmount" and _is_crowded(path, hanging)):
        raise DeadlineExceeded("its server does not answer: calls still hang there", subject=path)
    child = _take()
    try:
        told = json.loads(child.ask(question, timeout=timeout))
    except DeadlineExceeded:
        raise DeadlineExceeded("its server does not answer", subject=path) from None
    finally:
        _give_back(child)
    if "errno" in told:
        raise OSError(told["errno"], os.strerror(told["errno"]), path)
    return told["answer"]


def _is_crowded(path: str, hanging: Sequence[str]) -> bool:
    if len(hanging) < MOST:
        return False
    devices = {str(entry.target): entry.device for entry in read_table()}

    def device(of: str) -> str | None:
        folders = (of, *map(str, Path(of).parents))
        return next((devices[folder] for folder in folders if folder in devices), None)

    return sum(device(json.loads(question)[1]) == device(path) for question in hanging) >= MOST


def _take() -> Worker:
    with _lock:
        while _idle:
            _, child = _idle.pop()
            if child.alive:
                return child
            child.close()
    child = worker.start(_MODULE)
    try:
        child.ask('["ready"]', timeout=START_TIMEOUT)
    except BaseException:
        child.close()
        raise
    return child


def _give_back(child: Worker) -> None:
    now, old = time.monotonic(), []
    with _lock:
        if child.alive:
            _idle.append((now, child))
        while _idle and (len(_idle) > KEPT or now - _idle[0][0] > KEPT_FOR):
            old.append(_idle.pop(0)[1])
    for each in old:
        each.close()
