"""Processes that hold a mount or a device, and so outlive the daemon: FUSE clients, block exporters.

Each has a folder of its own below the runtime folder: what was started, its pid and when that was born (a pid is used
again, both together are not), and its log. Where systemd runs, the process lives in a scope of its own, so that
stopping or upgrading volumed does not touch it; elsewhere in a session of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from volumed import context, redact
from volumed.driver import Helper
from volumed.errors import CommandFailed, HostError
from volumed.host.boot import boot_id
from volumed.host.run import ENVIRONMENT

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,199}")
_SYSTEMD = Path("/run/systemd/system")
# Bytes. The folder lies in memory, and whatever a helper prints for months must not fill it.
LOG_LIMIT, LOG_KEPT = 1 << 20, 1 << 16
# Waits for the word that its record is written: a helper that nobody knows of could never be found again. Killed
# before, the daemon gives no word, and nothing is started.
_GATE = ("sh", "-c", 'read -r go && exec "$@" </dev/null', "helper")


class _Record(msgspec.Struct, frozen=True):
    pid: int
    born: int  # clock ticks after the boot, /proc/PID/stat
    boot: str
    argv: tuple[str, ...]


class Helpers:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._boot = boot_id()
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # ours to reap, until we are restarted
        self._starting = threading.Lock()  # two that ask for one name at once get one process

    def start(self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None) -> Helper:
        words = [os.fspath(word) for word in argv]
        environment = {**ENVIRONMENT, **(env or {})}
        if shutil.which(words[0], path=environment["PATH"]) is None:
            raise CommandFailed(
                f"{words[0]} is not installed", returncode=127, hint=f"install the package that brings {words[0]}"
            )
        with self._starting:
            there = self.find(name)
            if there is not None and there.running:
                return there
            place = self._place(name)
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (place / "log").open("ab") as log:
                child = subprocess.Popen(
                    [*_scope(name), *_GATE, *words],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                    cwd="/",
                )
            self._children[child.pid] = child
            record = _Record(child.pid, born(child.pid) or 0, self._boot, tuple(words))
            new = place / "process.new"
            new.write_bytes(msgspec.json.encode(record))
            new.rename(place / "process")
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin:  # broken: it ended already, and its log says why
                child.stdin.write(b"go\n")
        return Helper(name, child.pid, record.argv, running=child.poll() is None)

    def find(self, name: str) -> Helper | None:
        try:
            record = msgspec.json.decode((self._place(name) / "process").read_bytes(), type=_Record)
        except (FileNotFoundError, msgspec.DecodeError):  # never written, or the power went while it was
            return None
        child = self._children.get(record.pid)
        if child is not None and child.poll() is not None:
            self._children.pop(record.pid, None)
        running = record.boot == self._boot and born(record.pid) == record.born
        return Helper(name, record.pid, record.argv, running=running)

    def find_all(self, prefix: str) -> Iterator[Helper]:
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._folder)):  # noqa: PTH208 (names are enough)
                if not name.startswith(prefix) or not _NAME.fullmatch(name):
                    continue
                if (found := self.find(name)) is not None:
                    _trim(self._place(name) / "log")
                    yield found

    def log(self, name: str, limit: int) -> str:
        """Secrets that this process knows are blanked: what a client prints ends in errors and on screens."""
        try:
            tail = _tail(self._place(name) / "log", LOG_KEPT)
        except FileNotFoundError:
            return ""
        return redact.blank(tail.decode("utf-8", "backslashreplace"))[-limit:].strip()

    def stop(self, name: str, *, timeout: float) -> None:
        found = self.find(name)
        if found is not None and not found.running:
            _log.warning("helper %s (pid %d) had ended: %s", name, found.pid, self.log(name, 300) or "it said nothing")
        for number, patience in ((signal.SIGTERM, context.remaining(timeout)), (signal.SIGKILL, 2.0)):
            found = self.find(name)
            if found is None or not found.running:
                break
            _end(found.pid, number, patience)
        else:
            found = self.find(name)
            if found is not None and found.running:
                raise HostError("does not end: the kernel holds it", subject=f"helper {name} (pid {found.pid})")
        shutil.rmtree(self._place(name), ignore_errors=True)

    def private_folder(self, name: str) -> Path:
        """Not within the helper's own, which goes with all that is in it: this one may have a tree mounted inside."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a helper")
        place = self._folder.with_name("private") / name
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place

    def _place(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a helper")
        return self._folder / name


def _scope(name: str) -> list[str]:
    """systemd-run(1) puts itself into the scope and then becomes the command: one pid throughout. A fresh name, as the
    scope of one before may still be going. Its mount must outlive it at the machine's shutdown, too: the scope is not
    among what is stopped then, and ends with what systemd kills last (systemd.special(7), shutdown.target)."""
    if not _SYSTEMD.is_dir():
        return []
    unit = f"volumed-{name}-{secrets.token_hex(4)}"
    return [
        *("systemd-run", "--scope", "--quiet", "--collect", f"--unit={unit}", "--property=DefaultDependencies=no"),
        "--",
    ]


def _end(pid: int, number: signal.Signals, patience: float) -> None:
    """Signal its process group and wait for its leader."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(patience * 1000)
    finally:
        os.close(descriptor)


def born(pid: int) -> int | None:
    """proc(5): the 22nd field of stat; None for what does not run (a zombie does not)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _tail(path: Path, limit: int) -> bytes:
    with path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - limit))
        return log.read()


def _trim(path: Path) -> None:
    """The helper appends, so a shortened log goes on at its new end."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            tail = _tail(path, LOG_KEPT)
            os.truncate(path, 0)
            with path.open("ab") as log:
                log.write(tail)
