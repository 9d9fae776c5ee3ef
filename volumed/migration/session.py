"""The daemon's end of a copying child process: starts it, hands it orders, passes on what it tells, ends it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volumed.errors import BackendUnavailable, CapacityExhausted, HostError, OutOfRange
from volumed.host.run import ENVIRONMENT
from volumed.migration.movers.mover import Control, Stopped

POLL = 0.1
# A child that was told to stop and does not answer has storage under it that hangs.
PATIENCE = 30.0
# A killed process that waits for storage ends when the kernel lets it: longer is not waited.
LINGER = 5.0
_LINE = 1 << 16
# Of a server that is not there now. A mount that it has forgotten is made anew by whoever opens the place again.
_AWAY = (errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN, errno.ESTALE)
_ERRORS = {kind.code: kind for kind in (BackendUnavailable, CapacityExhausted, HostError, OutOfRange)}


class Session:
    def __init__(self, module: str, settings: Mapping[str, Any], log: Path) -> None:
        """`settings`: the first line it is told. `log`: where its errors go, in a folder that is made."""
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._errors = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=ENVIRONMENT,
            start_new_session=True,
            cwd="/",
        )
        self._buffer = b""
        self._rate = 0
        self._send(settings)
        self._counted = {"bytes": 0, "files": 0}

    def close(self) -> None:
        """Whatever it is at. Its workers hold the trees for as long as they hold its output."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        ends = time.monotonic() + LINGER
        with contextlib.suppress(HostError):
            while time.monotonic() < ends:
                self._lines()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.returncode = -signal.SIGKILL  # the kernel holds it: nobody waits for it

    def order(self, what: str, control: Control, **arguments: object) -> Any:
        """What the child answers. Raises Stopped, CapacityExhausted, BackendUnavailable, HostError, naming the path."""
        control.check()
        self._send({"do": what, "with": arguments})
        stopped = 0.0
        while True:
            if control.rate != self._rate:
                self._rate = control.rate
                self._send({"do": "rate", "rate": self._rate})
            if control.stopped and not stopped:
                stopped = time.monotonic()
                self._send({"do": "stop"})
            if stopped and time.monotonic() - stopped > PATIENCE:
                raise Stopped("the copy was told to stop; what it waits for does not answer")
            for line in self._lines():
                answer = json.loads(line)
                if "bytes" in answer:
                    self._count(answer, control)
                elif "ready" not in answer:
                    return self._answered(answer)

    def _count(self, answer: dict[str, int], control: Control) -> None:
        before, self._counted = self._counted, answer
        control.done(bytes=answer["bytes"] - before["bytes"], files=answer["files"] - before["files"])

    def _answered(self, answer: dict[str, Any]) -> Any:
        if "done" in answer:
            return answer["done"]
        if "stopped" in answer:
            raise Stopped("the copy was told to stop")
        if "error" in answer:
            kind = _ERRORS.get(answer["error"], HostError)
            raise kind(answer["text"], subject=answer["subject"], hint=answer["hint"])
        path, number = answer["path"], answer["errno"]
        where = f" at {ascii(path)[1:-1]!r}" if path else ""
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityExhausted(f"is full{where}", hint="free some space there, and begin it again")
        text = f"the tree cannot be copied{where}: {answer['failed']}"
        raise BackendUnavailable(text) if number in _AWAY else HostError(text)

    def _send(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _lines(self) -> list[bytes]:
        assert self._process.stdout is not None
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(POLL * 1000):
            return []
        read = os.read(self._process.stdout.fileno(), _LINE)
        if not read:
            raise self._died()
        *lines, self._buffer = (self._buffer + read).split(b"\n")
        return lines

    def _died(self) -> HostError:
        self._errors.flush()
        said = Path(self._errors.name).read_text(encoding="utf-8", errors="backslashreplace")[-1000:].strip()
        return HostError(f"the process that copies it died: {said or 'it said nothing'}")
