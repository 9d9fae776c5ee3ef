"""A Python beside the daemon that does what may never return: its calls can be given up, a thread's could not."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time

from volumed import context
from volumed.driver import Worker
from volumed.errors import CommandFailed, DeadlineExceeded, HostError
from volumed.host import left
from volumed.host.run import ENVIRONMENT

SHOWN = 2000


class _Child(Worker):
    def __init__(self, module: str) -> None:
        self._module = module
        self._question = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        # It imports what we import, however that is installed.
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**ENVIRONMENT, "PYTHONPATH": paths},
                start_new_session=True,
                cwd="/",
                bufsize=0,
            )
        except OSError as error:
            raise CommandFailed(f"{sys.executable} cannot be run: {error.strerror}", returncode=126) from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: str, *, timeout: float) -> str:
        if not self.alive:
            raise self._ended()
        ends = time.monotonic() + context.remaining(timeout)
        self._question = question
        try:
            rest = memoryview(question.encode() + b"\n")
            while rest:
                rest = rest[os.write(self._questions.fileno(), rest) :]
            return self._read(ends).decode()
        except BrokenPipeError:
            raise self._ended() from None
        except BaseException:
            self.close()  # whatever it answers now belongs to no question
            raise

    def _read(self, ends: float) -> bytes:
        answer = bytearray()
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while not answer.endswith(b"\n"):
            if not poll.poll(max(0.0, ends - time.monotonic()) * 1000):
                raise DeadlineExceeded("did not answer in time and was given up")
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                raise self._ended()
            answer += part
        return bytes(answer)

    def _ended(self) -> HostError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(left.REAP_TIMEOUT)
        self._log.seek(0)
        said = self._log.read().decode(errors="backslashreplace").strip()[-SHOWN:]
        return HostError(f"{self._module} ended with status {self._process.returncode}: {said or 'it said nothing'}")

    def close(self) -> None:
        for pipe in (self._questions, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()
        if self.alive:
            left.kill(self._process, (self._module, self._question))


def start(module: str) -> Worker:
    """See `volumed.driver.Host.start_worker`."""
    return _Child(module)
