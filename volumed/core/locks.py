"""Locks by key: one volume's change never waits for another's.

Held in core only, per volume name on create (there is no id yet) and per volume id otherwise, and never across a
call to a container engine, whose answer may itself wait for us (dockerd's inspect does, from inside Mount).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from volumed import context
from volumed.errors import OperationPending


class KeyedLocks:
    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}  # with the number of threads that want it

    @contextlib.contextmanager
    def hold(self, key: str, *, subject: str = "", wait: float = 3600.0) -> Iterator[None]:
        """Wait for the key at most `wait` seconds and the request's deadline. Raises OperationPending."""
        lock = self._enter(key)
        try:
            if not lock.acquire(timeout=context.remaining(wait)):
                raise OperationPending("another change is still running", subject=subject, hint="try again later")
            try:
                yield
            finally:
                lock.release()
        finally:
            self._leave(key)

    def _enter(self, key: str) -> threading.Lock:
        with self._guard:
            lock, wanted = self._locks.get(key) or (threading.Lock(), 0)
            self._locks[key] = (lock, wanted + 1)
            return lock

    def _leave(self, key: str) -> None:
        with self._guard:
            lock, wanted = self._locks[key]
            if wanted == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, wanted - 1)
