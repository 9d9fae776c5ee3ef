"""How volumectl shows things: tables for people, JSON for programs, a sign of life for work over a second."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from volumed.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 1.0


class Output:
    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def json(self, value: Any) -> None:
        click.echo(json.dumps(value, indent=2))

    def line(self, text: str) -> None:
        click.echo(clean(text))

    def table(self, value: Sequence[dict[str, Any]], columns: dict[str, str], *, empty: str) -> None:
        """`columns`: heading -> key. As JSON: `value` as it is."""
        if self.as_json:
            self.json(value)
            return
        if not value:
            click.echo(empty, err=True)
            return
        cells = [list(columns), *([clean(str(row.get(key, ""))) for key in columns.values()] for row in value)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def fields(self, value: Any, fields: dict[str, Any]) -> None:
        """One thing, a field a line; as JSON: `value`."""
        if self.as_json:
            self.json(value)
            return
        width = max(map(len, fields), default=0)
        for key, shown in fields.items():
            lines = shown if isinstance(shown, list) else [shown]
            for number, line in enumerate(line for line in lines if line not in (None, "")):
                click.echo(f"{(key if number == 0 else ''):{width}}  {clean(str(line))}")

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A moving bar with the time, on standard error of a terminal, when the block takes over a second."""
        if not sys.stderr.isatty():
            yield
            return
        progress = _progress("{task.description}", elapsed=True)
        progress.add_task(clean(text), total=None)
        with _shown_late(progress):
            yield

    @contextlib.contextmanager
    def counting(self, text: str) -> Iterator[Callable[[str, int], None]]:
        """As `waiting`, with what is done and how many bytes it came to."""
        if not sys.stderr.isatty():
            yield lambda step, done: None
            return
        progress = _progress("{task.description}", elapsed=True)
        task = progress.add_task(clean(text), total=None)
        with _shown_late(progress):
            yield lambda step, done: progress.update(task, description=clean(f"{text}: {step}, {format_size(done)}"))

    def each(self, items: Sequence[Any], text: str) -> Iterator[Any]:
        """The items, with a bar of how many are done."""
        if not sys.stderr.isatty():
            yield from items
            return
        progress = _progress("{task.description} {task.completed}/{task.total}", elapsed=False)
        task = progress.add_task(text, total=len(items))
        with _shown_late(progress):
            for item in items:
                yield item
                progress.advance(task)


def _progress(text: str, *, elapsed: bool) -> Progress:
    from rich import console, progress  # noqa: PLC0415 (a tenth of a second, for a terminal alone)

    columns = [progress.TextColumn(text), progress.BarColumn(), *([progress.TimeElapsedColumn()] if elapsed else [])]
    return progress.Progress(*columns, console=console.Console(stderr=True), transient=True)


@contextlib.contextmanager
def _shown_late(progress: Progress) -> Iterator[None]:
    """Only what takes long enough to be wondered about."""
    timer = threading.Timer(QUIET_SECONDS, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def clean(text: str) -> str:
    """No control character of a name or an error reaches the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def ago(text: str | None) -> str:
    """`3 minutes ago`, from a time of the API."""
    if not text:
        return "-"
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()))
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count != 1 else ''} ago"
    return "now"
