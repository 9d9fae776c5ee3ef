"""The monitor of a QEMU process: JSON lines over a unix socket (QEMU Machine Protocol)."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from volumed.errors import DeadlineExceeded, HostError

_PAUSE = 0.005


class Monitor:
    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._lines = opened.makefile("rb")
        self._read()  # its greeting: it has done all that its command line says
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        question = {"execute": command, "arguments": {key.replace("_", "-"): arguments[key] for key in arguments}}
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        while True:
            told = self._read()
            if "error" in told:
                raise HostError(f"{command} failed: {told['error']['desc']}")
            if "return" in told:
                return told["return"]

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError
        told: dict[str, Any] = json.loads(line)
        return told


@contextlib.contextmanager
def monitor(path: Path, *, timeout: float, running: Callable[[], bool]) -> Iterator[Monitor]:
    """Connect, and wait until the process has started. Raises DeadlineExceeded, HostError when it ended."""
    ends = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX) as opened:
        try:
            _connect(opened, path, ends, running)
            opened.settimeout(max(_PAUSE, ends - time.monotonic()))
            yield Monitor(opened)
        except TimeoutError:
            raise DeadlineExceeded("did not get ready in time", subject=str(path)) from None
        except (ConnectionError, BrokenPipeError):
            raise HostError("has ended", subject=str(path)) from None


def _connect(opened: socket.socket, path: Path, ends: float, running: Callable[[], bool]) -> None:
    """The process makes its socket first of all."""
    while True:
        try:
            opened.connect(str(path))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            if not running():
                raise ConnectionResetError from None
            if time.monotonic() > ends:
                raise TimeoutError from None
            time.sleep(_PAUSE)
        except OSError as error:  # a path that is too long, for one
            raise HostError(f"cannot be reached: {error}", subject=str(path)) from None
