"""Who watches the store, and the changes kept for those who begin a little late."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from volumed.errors import OutOfRange
from volumed.store.store import Change, Watch

KEPT = 10_000


class _Watch(Watch):
    def __init__(self, log: ChangeLog, prefix: str) -> None:
        self.prefix = prefix
        self._log = log
        self._changes: queue.SimpleQueue[Change | None] = queue.SimpleQueue()

    def offer(self, change: Change) -> None:
        if change.key.startswith(self.prefix):
            self._changes.put(change)

    def __iter__(self) -> Iterator[Change]:
        while (change := self._changes.get()) is not None:
            yield change

    def close(self) -> None:
        self._log.forget(self)
        self._changes.put(None)


class ChangeLog:
    def __init__(self, *, revision: int) -> None:
        """`revision`: the last commit before this log begins; nothing up to it is kept."""
        self._lock = threading.Lock()
        self._kept: deque[Change] = deque(maxlen=KEPT)
        self._complete_after = revision
        self._watches: set[_Watch] = set()

    def record(self, changes: Sequence[Change]) -> None:
        with self._lock:
            for change in changes:
                if len(self._kept) == KEPT:
                    self._complete_after = self._kept[0].revision
                self._kept.append(change)
                for watch in self._watches:
                    watch.offer(change)

    def watch(self, prefix: str, *, after: int) -> Watch:
        with self._lock:
            if after < self._complete_after:
                raise OutOfRange(
                    f"changes are kept from revision {self._complete_after} on, not from {after}",
                    hint="scan, then watch from the current revision",
                )
            watch = _Watch(self, prefix)
            for change in self._kept:
                if change.revision > after:
                    watch.offer(change)
            self._watches.add(watch)
            return watch

    def forget(self, watch: _Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def close(self) -> None:
        for watch in list(self._watches):
            watch.close()
