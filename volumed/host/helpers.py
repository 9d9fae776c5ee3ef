"""Processes that hold a mount or a device, and so outlive the daemon: FUSE clients, block exporters.

Each has a folder of its own below /run/volumed/helpers: what was started, its pid and when that was born (a pid is
used again, both together are not), and its log. Where systemd runs, the process lives in a scope of its own, so that
stopping or upgrading volumed does not touch it; elsewhere in a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from volumed.driver import Helper
from volumed.errors import CommandFailed, HostError
from volumed.host.run import ENVIRONMENT

FOLDER = Path("/run/volumed/helpers")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,200}")
_SYSTEMD = Path("/run/systemd/system")


class _Record(msgspec.Struct, frozen=True):
    pid: int
    born: int  # clock ticks after boot, /proc/PID/stat
    argv: tuple[str, ...]


class Helpers:
    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # ours to reap, until we are restarted

    def start(self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None) -> Helper:
        there = self.find(name)
        if there is not None and there.running:
            return there
        words = [os.fspath(word) for word in argv]
        place = self._place(name)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (place / "log").open("ab") as log:
            try:
                child = subprocess.Popen(
                    [*_scope(name), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**ENVIRONMENT, **(env or {})},
                    start_new_session=True,
                    cwd="/",
                )
            except OSError as error:
                raise CommandFailed(
                    f"{words[0]} cannot be run: {error.strerror}",
                    returncode=127,
                    hint=f"install the package that brings {words[0]}",
                ) from None
        self._children[child.pid] = child
        record = _Record(child.pid, _born(child.pid) or 0, tuple(words))
        new = place / "process.new"
        new.write_bytes(msgspec.json.encode(record))
        new.rename(place / "process")
        return Helper(name, child.pid, record.argv, running=child.poll() is None)

    def find(self, name: str) -> Helper | None:
        try:
            record = msgspec.json.decode((self._place(name) / "process").read_bytes(), type=_Record)
        except FileNotFoundError:
            return None
        child = self._children.get(record.pid)
        if child is not None and child.poll() is not None:
            del self._children[record.pid]
        return Helper(name, record.pid, record.argv, running=_born(record.pid) == record.born)

    def find_all(self, prefix: str) -> Iterator[Helper]:
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._folder)):  # noqa: PTH208 (names are enough)
                if name.startswith(prefix) and (found := self.find(name)) is not None:
                    yield found

    def log(self, name: str, limit: int) -> str:
        try:
            text = (self._place(name) / "log").read_text(encoding="utf-8", errors="backslashreplace")
        except FileNotFoundError:
            return ""
        return text[-limit:].strip()

    def stop(self, name: str, *, timeout: float) -> None:
        found = self.find(name)
        for number, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, 2.0)):
            if found is None or not found.running:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(found.pid, number)
            ends = time.monotonic() + patience
            while found is not None and found.running and time.monotonic() < ends:
                time.sleep(0.01)
                found = self.find(name)
        if found is not None and found.running:
            raise HostError("does not end: the kernel holds it", subject=f"helper {name} (pid {found.pid})")
        shutil.rmtree(self._place(name), ignore_errors=True)

    def _place(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a helper")
        return self._folder / name


def _scope(name: str) -> list[str]:
    """systemd-run(1) puts itself into the scope and then becomes the command: one pid throughout."""
    if not _SYSTEMD.is_dir():
        return []
    return ["systemd-run", "--scope", "--quiet", "--collect", f"--unit=volumed-{name}", "--"]


def _born(pid: int) -> int | None:
    """proc(5): the 22nd field of stat; None for what does not run (a zombie does not)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
