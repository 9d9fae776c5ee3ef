"""What happened, for `volumectl events` and for the log: the last thousand in memory, and a queue per listener."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from datetime import datetime

import msgspec

from volumed.model import now
from volumed.redact import blank

_log = logging.getLogger(__name__)

KEPT = 1000
# A listener that does not read loses the newest events, never the daemon its memory.
LISTENER_BACKLOG = 10_000


class Event(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    at: datetime
    kind: str  # volume.created, binding.vanished, mount.missing, ...
    subject: str  # the volume's name, the backend's, ...
    text: str
    fields: dict[str, str]


class Events:
    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._guard = threading.Lock()
        self._recent: deque[Event] = deque(maxlen=KEPT)
        self._listeners: set[queue.Queue[Event | None]] = set()

    def publish(
        self, kind: str, subject: str, text: str, *, level: int = logging.INFO, **fields: str | int | None
    ) -> None:
        shown = {key: blank(str(value)) for key, value in fields.items() if value is not None}
        text = blank(text)
        with self._guard:
            event = Event(id=next(self._ids), at=now(), kind=kind, subject=subject, text=text, fields=shown)
            self._recent.append(event)
            for listener in self._listeners:
                with contextlib.suppress(queue.Full):
                    listener.put_nowait(event)
        _log.log(level, "%s: %s", subject, text, extra={"event": kind, "volume": subject, **shown})

    def recent(self, limit: int = KEPT) -> list[Event]:
        """Oldest first."""
        with self._guard:
            return list(self._recent)[-limit:] if limit > 0 else []

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[queue.Queue[Event | None]]:
        """A queue of what happens from now on; None ends it."""
        listener: queue.Queue[Event | None] = queue.Queue(LISTENER_BACKLOG)
        with self._guard:
            self._listeners.add(listener)
        try:
            yield listener
        finally:
            with self._guard:
                self._listeners.discard(listener)

    def close(self) -> None:
        """Tell every listener that nothing more comes."""
        with self._guard:
            for listener in self._listeners:
                with contextlib.suppress(queue.Full):
                    listener.put_nowait(None)
