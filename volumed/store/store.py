"""The ledger's store: a small ordered key-value store with the model of etcd.

Keys are text in byte order of their UTF-8, values are bytes. Every commit has a revision, one higher than the last;
a key's revision is that of the commit that last put it. SQLite is the embedded implementation; one behaviour suite
(`tests/unit/store_behaviour.py`) holds every implementation to the same.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from volumed.errors import VolumedError


class Entry(NamedTuple):
    key: str
    value: bytes
    revision: int


class Change(NamedTuple):
    """What a watcher sees. `value` is None when the key was deleted."""

    key: str
    value: bytes | None
    revision: int


class Conflict(VolumedError):
    """A compared revision was another: somebody else changed `key` first. Read again, then decide."""

    code = "operation_pending"
    retry_after = 0.0

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} was changed by somebody else at the same moment", hint="try again")
        self.key = key


class Watch(ABC):
    """Changes in order, from a revision on. Iterate in a thread of your own; `close` from any thread ends it."""

    @abstractmethod
    def __iter__(self) -> Iterator[Change]: ...

    @abstractmethod
    def close(self) -> None: ...


class Store(ABC):
    """All methods may be called from any thread. An answered commit survives kill -9 and power loss."""

    @abstractmethod
    def get(self, key: str) -> Entry | None: ...

    @abstractmethod
    def scan(self, prefix: str, *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        """Entries whose key starts with `prefix` and comes after the key `after`, in order."""

    @abstractmethod
    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> Sequence[str]:
        """As `scan`, the keys alone."""

    @abstractmethod
    def count(self, prefix: str) -> int: ...

    @abstractmethod
    def commit(
        self,
        *,
        expect: Mapping[str, int] | None = None,
        put: Mapping[str, bytes] | None = None,
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int:
        """All or nothing; returns the revision. `expect`: key -> revision it must have, 0 for none at all.

        With `lease`, what is put goes when the lease ends. Raises Conflict and changes nothing when an expectation
        fails, CapacityExhausted when the disk is full, NotFound for an unknown lease.
        """

    @abstractmethod
    def watch(self, prefix: str, *, after: int) -> Watch:
        """Changes below `prefix` with a revision above `after` (the current one: `revision()`).

        Raises OutOfRange when they are not kept that far back: scan, then watch from there.
        """

    @abstractmethod
    def revision(self) -> int: ...

    @abstractmethod
    def grant_lease(self, ttl: float) -> int:
        """A lease of `ttl` seconds, and its id."""

    @abstractmethod
    def keep_alive(self, lease: int) -> None:
        """Start its ttl anew. Raises NotFound when it has ended."""

    @abstractmethod
    def revoke_lease(self, lease: int) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @contextlib.contextmanager
    def closing(self) -> Iterator[Store]:
        try:
            yield self
        finally:
            self.close()
