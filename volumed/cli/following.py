"""Watching what runs for long in the daemon: a bar for each step, until it ends."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from volumed.cli.client import ApiError
from volumed.cli.output import clean
from volumed.cli.session import Session

if TYPE_CHECKING:
    from rich.progress import Progress

BEAT = 0.5
FAILED = 1


def who() -> str:
    """Who asks, for the history."""
    return os.environ.get("SUDO_USER") or getpass.getuser()


def time_shown(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if 0 < seconds < 1:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def followed(
    session: Session, kind: str, reference: str, has_ended: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Its last state, each one before it shown."""
    last: dict[str, Any] = {}
    with _bars(session) as show:
        for last in _states(session, kind, reference, has_ended):
            show(last)
    return last


def _states(
    session: Session, kind: str, reference: str, has_ended: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Until it ends; a restart of the daemon in between is waited for."""
    while True:
        with contextlib.suppress(ApiError, ValueError):
            for state in session.client.lines(kind, reference, "follow"):
                yield state
                if has_ended(state):
                    return
        time.sleep(BEAT)
        session.client.get(kind, reference)


@contextlib.contextmanager
def _bars(session: Session) -> Iterator[Any]:
    """A bar for each step on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty() or session.output.as_json:
        yield lambda state: None
        return
    shown = _progress()
    tasks: dict[str, Any] = {}

    def show(state: dict[str, Any]) -> None:
        running = state["progress"]
        if running is None:
            return
        name = running["step"]
        if name not in tasks:
            for task in tasks.values():
                shown.update(task, completed=shown.tasks[task].total)
            tasks[name] = shown.add_task(clean(name), total=running["total"] or None)
        shown.update(tasks[name], completed=running["done"], total=running["total"] or None)

    with shown:
        yield show


def _progress() -> Progress:
    from rich import console, progress  # noqa: PLC0415 (a tenth of a second, for a terminal alone)

    return progress.Progress(
        progress.TextColumn("{task.description:<12}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
    )
