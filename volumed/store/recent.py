"""The entries that were read or written last, so that what is asked for again and again costs no query.

It shows what the database shows: never an entry that a finished commit replaced, and never one older than what the
same thread saw in the database before. For that, the keys of a commit are out of it from before the database can show
them until after, and nothing that was read in between, or across it, is kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from volumed.store.store import Change, Entry

KEPT = 2048  # entries of a few hundred bytes each; when there are more, all go and the hot ones come back


class Recent:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry | None] = {}
        self._commits = 0
        self._committing = False

    def get(self, key: str, read: Callable[[str], Entry | None]) -> Entry | None:
        """The entry, from the database by `read` when it is not here."""
        try:
            return self._entries[key]
        except KeyError:
            pass
        commits = self._commits
        found = read(key)
        with self._lock:
            if commits == self._commits and not self._committing:
                self._keep(key, found)
        return found

    @contextlib.contextmanager
    def replacing(self, changes: Sequence[Change]) -> Iterator[None]:
        """Around the commit of these changes; they are kept when it succeeds."""
        with self._lock:
            self._committing = True
            for change in changes:
                self._entries.pop(change.key, None)
        committed: Sequence[Change] = ()
        try:
            yield
            committed = changes
        finally:
            with self._lock:
                self._committing = False
                self._commits += 1
                for key, value, revision in committed:
                    self._keep(key, None if value is None else Entry(key, value, revision))

    def _keep(self, key: str, entry: Entry | None) -> None:
        if len(self._entries) >= KEPT:
            self._entries.clear()
        self._entries[key] = entry
