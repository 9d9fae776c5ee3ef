"""The embedded store: SQLite in WAL mode, every commit synced, one writer that groups the commits that wait.

Readers have connections of their own, so that a scan of everything delays nobody. SQLite comes with apsw: the
distribution's may be one that can lose commits when two connections reset the WAL at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import apsw

from volumed.errors import CapacityExhausted, ConfigError, IntegrityError, NotFound
from volumed.store.changes import ChangeLog
from volumed.store.recent import Recent
from volumed.store.schema import connect, open_ledger
from volumed.store.store import Change, Conflict, Entry, Store, Watch

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]"]

GROUP = 64  # jobs that share one sync at most
EXPIRY_INTERVAL = 1.0


class SqliteStore(Store):
    def __init__(self, path: Path) -> None:
        """Opens the ledger, or makes it where there is none.

        Raises IntegrityError when it cannot be read, ConfigError when another process has it.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._lock_file = _lock(path.with_name(path.name + ".lock"))
        try:
            self._writer = open_ledger(path)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._revision = int(self._writer.execute("SELECT revision FROM counter").get)
        self._changes = ChangeLog(revision=self._revision)
        self._pending: list[Change] = []
        self._recent = Recent()
        self._readers: queue.SimpleQueue[apsw.Connection] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._expiry: threading.Thread | None = None
        if self._writer.execute("SELECT count(*) FROM leases").get:
            self._watch_leases()

    # Reading
    def get(self, key: str) -> Entry | None:
        return self._recent.get(key, self._read)

    def _read(self, key: str) -> Entry | None:
        with self._reader() as reader:
            row = reader.execute("SELECT key, value, revision FROM entries WHERE key = ?", (key,)).fetchone()
        return Entry(*row) if row else None

    def scan(self, prefix: str, *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        return [Entry(*row) for row in self._range("key, value, revision", prefix, after=after, limit=limit)]

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> Sequence[str]:
        return [key for (key,) in self._range("key", prefix, after=after, limit=limit)]

    def count(self, prefix: str) -> int:
        return int(self._range("count(*)", prefix)[0][0])

    def revision(self) -> int:
        return self._revision

    def _range(self, columns: str, prefix: str, *, after: str = "", limit: int | None = None) -> list[Any]:
        """Rows in key order. SQLite compares text as its UTF-8 bytes, so a prefix ends where its last character's
        successor begins."""
        sql = f"SELECT {columns} FROM entries WHERE key >= ?"  # noqa: S608 (columns are our own words)
        values: list[str | int] = [prefix]
        end = _successor(prefix)
        if end is not None:
            sql += " AND key < ?"
            values.append(end)
        if after:
            sql += " AND key > ?"
            values.append(after)
        if not columns.startswith("count"):
            sql += " ORDER BY key LIMIT ?"
            values.append(-1 if limit is None else limit)
        with self._reader() as reader:
            return reader.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[apsw.Connection]:
        try:
            connection = self._readers.get_nowait()
        except queue.Empty:
            connection = connect(self._path, readonly=True)
        try:
            yield connection
        except apsw.CorruptError as error:
            raise IntegrityError(f"the ledger is damaged: {error}", subject=str(self._path)) from None
        finally:
            self._readers.put(connection)

    # Writing
    def commit(
        self,
        *,
        expect: Mapping[str, int] | None = None,
        put: Mapping[str, bytes] | None = None,
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int:
        return self._submit(lambda: self._apply(expect or {}, put or {}, delete, lease))

    def _apply(
        self, expect: Mapping[str, int], put: Mapping[str, bytes], delete: Sequence[str], lease: int | None
    ) -> int:
        """Inside the writer's transaction. A refusal comes before the first change."""
        writer = self._writer
        for key, revision in expect.items():
            row = writer.execute("SELECT revision FROM entries WHERE key = ?", (key,)).fetchone()
            if (row[0] if row else 0) != revision:
                raise Conflict(key)
        if lease is not None and writer.execute("SELECT id FROM leases WHERE id = ?", (lease,)).fetchone() is None:
            raise NotFound("there is no such lease, or it has ended", subject=f"lease {lease}")
        revision = self._revision + 1
        for key in delete:
            if key not in put:
                writer.execute("DELETE FROM entries WHERE key = ?", (key,))
                if writer.changes():
                    self._pending.append(Change(key, None, revision))
        for key, value in put.items():
            writer.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (key, value, revision, lease))
            self._pending.append(Change(key, value, revision))
        writer.execute("UPDATE counter SET revision = ?", (revision,))
        self._revision = revision
        return revision

    def _submit(self, job: Callable[[], T]) -> T:
        """Whoever gets to write commits for all that wait, in one transaction and so in one sync of the disk."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        with self._writing:
            while not future.done():
                self._commit_group(self._waiting())
        return future.result()

    def _waiting(self) -> list[_Job]:
        jobs: list[_Job] = []
        with contextlib.suppress(queue.Empty):
            while len(jobs) < GROUP:
                jobs.append(self._jobs.get_nowait())
        return jobs

    def _commit_group(self, jobs: list[_Job]) -> None:
        """A job that is refused has changed nothing, and fails alone. One that fails otherwise fails all of the
        group, whose transaction is rolled back."""
        if self._closed.is_set():
            for _, future in jobs:
                future.set_exception(IntegrityError("the ledger is closed", subject=str(self._path)))
            return
        before = self._revision
        answers: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for job, future in jobs:
                try:
                    answers.append((future, job(), None))
                except (Conflict, NotFound) as refusal:
                    answers.append((future, None, refusal))
            with self._recent.replacing(self._pending):
                self._writer.execute("COMMIT")
        except BaseException as error:
            self._revision = before
            self._pending.clear()
            with contextlib.suppress(apsw.Error):
                self._writer.execute("ROLLBACK")
            failure = self._explained(error)
            for _, future in jobs:
                future.set_exception(failure)
            return
        changes, self._pending = self._pending, []
        self._changes.record(changes)
        for future, result, refused in answers:
            if refused is None:
                future.set_result(result)
            else:
                future.set_exception(refused)

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, apsw.FullError) or (isinstance(error, apsw.IOError) and _disk_is_full(self._path)):
            return CapacityExhausted(
                "the disk of the ledger is full; nothing was changed",
                subject=str(self._path),
                hint="free some space and try again",
            )
        if isinstance(error, apsw.CorruptError | apsw.IOError | apsw.NotADBError):
            return IntegrityError(f"the ledger cannot be written: {error}", subject=str(self._path))
        return error

    # Watching
    def watch(self, prefix: str, *, after: int) -> Watch:
        return self._changes.watch(prefix, after=after)

    # Leases: by the wall clock, as they outlive a restart
    def grant_lease(self, ttl: float) -> int:
        def grant() -> int:
            self._writer.execute("INSERT INTO leases (ttl, expires) VALUES (?, ?)", (ttl, time.time() + ttl))
            self._watch_leases()
            return self._writer.last_insert_rowid()

        return self._submit(grant)

    def _watch_leases(self) -> None:
        if self._expiry is None:
            self._expiry = threading.Thread(target=self._keep_expiring, name="ledger-leases", daemon=True)
            self._expiry.start()

    def _keep_expiring(self) -> None:
        while not self._closed.wait(EXPIRY_INTERVAL):
            with contextlib.suppress(IntegrityError, CapacityExhausted):  # the next second is as good
                self._submit(self._expire)

    def keep_alive(self, lease: int) -> None:
        def renew() -> None:
            self._writer.execute("UPDATE leases SET expires = ? + ttl WHERE id = ?", (time.time(), lease))
            if not self._writer.changes():
                raise NotFound("there is no such lease, or it has ended", subject=f"lease {lease}")

        self._submit(renew)

    def revoke_lease(self, lease: int) -> None:
        self._submit(lambda: self._end_lease(lease))

    def _expire(self) -> None:
        for (lease,) in self._ended_leases():
            self._end_lease(int(lease))

    def _ended_leases(self) -> list[Any]:
        return self._writer.execute("SELECT id FROM leases WHERE expires < ?", (time.time(),)).fetchall()

    def _end_lease(self, lease: int) -> None:
        rows = self._writer.execute("SELECT key FROM entries WHERE lease = ?", (lease,)).fetchall()
        if rows:
            self._apply({}, {}, [str(key) for (key,) in rows], None)
        self._writer.execute("DELETE FROM leases WHERE id = ?", (lease,))

    def close(self) -> None:
        with self._writing:
            if self._closed.is_set():
                return
            self._closed.set()
        if self._expiry is not None:
            self._expiry.join()
        self._changes.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self._readers.get_nowait().close()
        self._writer.close()
        os.close(self._lock_file)


def _successor(prefix: str) -> str | None:
    """The first key after all that begin with `prefix`; None when there is none."""
    for index in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[index]) + 1
        if code == 0xD800:  # surrogates are no characters
            code = 0xE000
        if code <= 0x10FFFF:
            return prefix[:index] + chr(code)
    return None


def _lock(path: Path) -> int:
    """One daemon per ledger: two would each believe their own memory of it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ConfigError(
            f"another volumed uses this ledger (pid {holder})",
            subject=str(path),
            hint="stop that one first, or use another state-dir",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _disk_is_full(path: Path) -> bool:
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < 1024 * 1024
