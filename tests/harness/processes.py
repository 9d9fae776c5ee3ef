"""Processes that end with the test that started them, and the command lines of all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def command_lines() -> dict[int, bytes]:
    """The arguments of each process by its pid, with a blank after each; without those that end while we look."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ")
    return found


def pids_with(words: str) -> list[int]:
    """Of the processes whose arguments hold these words."""
    return [pid for pid, line in command_lines().items() if words.encode() in line]


class Process:
    """Started in a session of its own; its output goes to a file that a failing test shows."""

    def __init__(self, argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def running(self) -> bool:
        return self._child.poll() is None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, number: signal.Signals = signal.SIGTERM, *, timeout: float = 30.0) -> int:
        """Send the signal and wait; the exit status."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10)
            raise AssertionError(f"it did not end after {number.name}: {self.said()[-3000:]}") from None

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def wait(self, timeout: float = 30.0) -> int:
        return self._child.wait(timeout)
