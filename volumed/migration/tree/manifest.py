"""What was copied, written down: an SQLite file in the move's folder. Bounded memory for millions of entries.

What is committed here is on the target's storage: the caller syncs the target first. So a row survives any crash only
together with what it stands for, and what has no row is copied again. The source is not ours to sync: in a power cut it
may lose what was read of it, and keep the times that came with that (ext4 writes those down sooner than the data). So
after another boot nothing is taken for unchanged.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import msgspec
from blake3 import blake3

from volumed.host.boot import boot_id
from volumed.migration.tree import content
from volumed.migration.tree.entries import Entry

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, inode INTEGER, mode INTEGER, uid INTEGER, gid INTEGER,
    size INTEGER, mtime INTEGER, ctime INTEGER, rdev INTEGER, links INTEGER, about BLOB, digest BLOB, chunks BLOB,
    changed BLOB, proven INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS unproven ON entry (id) WHERE proven = 0;
CREATE TABLE IF NOT EXISTS round (begun INTEGER);
CREATE TABLE IF NOT EXISTS boot (id TEXT);
CREATE TEMP TABLE pending_link (inode INTEGER, path BLOB);
CREATE TEMP TABLE pending_folder (path BLOB PRIMARY KEY, ctime INTEGER) WITHOUT ROWID;
"""
_COLUMNS = "path, inode, mode, uid, gid, size, mtime, ctime, rdev, links, about, digest, chunks, changed"
_PUT = f"INSERT INTO entry ({_COLUMNS}, proven) VALUES ({'?, ' * 14}0)"  # noqa: S608
_AT_ONCE = 500
_VERSION = 1


class Manifest:
    def __init__(self, path: Path) -> None:
        self._connection = apsw.Connection(str(path))
        self._connection.set_busy_timeout(10_000)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-49152", "temp_store=FILE"):
            self._connection.execute(f"PRAGMA {pragma}")
        version = self._connection.pragma("user_version")
        if version not in (0, _VERSION):
            self._connection.execute("DROP TABLE entry")  # another release's: all is copied again
        self._connection.execute(_SCHEMA)
        self._connection.pragma("user_version", _VERSION)
        self._connection.execute("BEGIN")

    def close(self) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()

    def commit(self) -> None:
        """Only after the target was synced."""
        self._connection.execute("COMMIT")
        self._connection.execute("BEGIN")

    def begin_round(self) -> bool:
        """Written down at once. Whether the last one was cut short: it may have left directories of the target open to
        be written, and with other times, of which nothing is known."""
        boot = boot_id()
        if self._rows("SELECT id FROM boot") != [(boot,)]:
            self._connection.execute("DELETE FROM boot; UPDATE entry SET ctime = 0")
            self._connection.execute("INSERT INTO boot VALUES (?)", (boot,))
        cut_short = bool(self._rows("SELECT 1 FROM round"))
        if not cut_short:
            self._connection.execute("INSERT INTO round VALUES (1)")
            self.commit()
        return cut_short

    def end_round(self) -> None:
        self._connection.execute("DELETE FROM round")

    def empty(self) -> bool:
        return not self._connection.execute("SELECT EXISTS (SELECT 1 FROM entry)").get

    def _rows(self, query: str, *values: int) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self._connection.execute(query, values).fetchall()
        return rows

    # What is known
    def known(self, paths: Sequence[str]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for start in range(0, len(paths), _AT_ONCE):
            some = [os.fsencode(path) for path in paths[start : start + _AT_ONCE]]
            holes = ",".join("?" * len(some))
            for row in self._connection.execute(f"SELECT {_COLUMNS} FROM entry WHERE path IN ({holes})", some):  # noqa: S608
                entry = _entry(row)
                found[entry.path] = entry
        return found

    def put(self, entries: Iterable[Entry]) -> None:
        rows = [(os.fsencode(entry.path), *self._with_unproven(entry)[1:]) for entry in entries]
        self._connection.executemany("DELETE FROM entry WHERE path = ?", [(row[0],) for row in rows])
        self._connection.executemany(_PUT, rows)

    def put_new(self, entries: Iterable[Entry]) -> None:
        """As `put`, of paths that have no row."""
        self._connection.executemany(_PUT, [(os.fsencode(entry.path), *entry[1:]) for entry in entries])

    def _with_unproven(self, entry: Entry) -> Entry:
        """What an earlier round wrote of it and nobody has read back is to be read back still."""
        if entry.changed is None:
            return entry
        before = self._connection.execute(
            "SELECT changed FROM entry WHERE path = ? AND proven = 0", (os.fsencode(entry.path),)
        ).fetchone()
        if before is None:
            return entry
        if before[0] is None:
            return entry._replace(changed=None)
        numbers = {*content.unpack(before[0]), *content.unpack(entry.changed)}
        return entry._replace(
            changed=content.pack(sorted(number for number in numbers if number * content.CHUNK < entry.size))
        )

    def forget(self, paths: Iterable[str]) -> None:
        self._connection.executemany("DELETE FROM entry WHERE path = ?", [(os.fsencode(path),) for path in paths])

    def forget_tree(self, path: str) -> None:
        """The path and all below it: `0` follows `/`."""
        encoded = os.fsencode(path)
        self._connection.execute(
            "DELETE FROM entry WHERE path = ? OR (path >= ? AND path < ?)", (encoded, encoded + b"/", encoded + b"0")
        )

    # What a round has yet to do
    def add_links(self, links: Iterable[tuple[str, int]]) -> None:
        rows = [(inode, os.fsencode(path)) for path, inode in links]
        self._connection.executemany("INSERT INTO pending_link VALUES (?, ?)", rows)

    def index_inodes(self) -> None:
        """Once all that was there is written down: dear while rows come by the million."""
        self._connection.execute("CREATE INDEX IF NOT EXISTS inodes ON entry (inode)")

    def take_links(self) -> Iterator[list[tuple[str, Entry | None]]]:
        """For each inode that has something new: all of its names, those known first. One that had a single name when
        it was copied, and got another since, as well: of the first name no event tells then."""
        self.index_inodes()
        self._connection.execute("CREATE TEMP TABLE link_now AS SELECT DISTINCT inode, path FROM pending_link")
        self._connection.execute("DELETE FROM pending_link")
        try:
            inodes = [row[0] for row in self._connection.execute("SELECT DISTINCT inode FROM link_now ORDER BY inode")]
            for inode in inodes:
                found = self._connection.execute(
                    "SELECT path FROM entry WHERE inode = ?1 "
                    "UNION SELECT path FROM link_now WHERE inode = ?1 ORDER BY path",
                    (inode,),
                )
                paths = [os.fsdecode(row[0]) for row in found]
                known = self.known(paths)
                same = {path: entry for path, entry in known.items() if entry.inode == inode}
                yield sorted(((path, same.get(path)) for path in paths), key=lambda pair: (pair[1] is None, pair[0]))
        finally:
            self._connection.execute("DROP TABLE link_now")

    def add_folder(self, path: str, ctime: int) -> None:
        self._connection.execute("INSERT OR IGNORE INTO pending_folder VALUES (?, ?)", (os.fsencode(path), ctime))

    def take_folders(self) -> Iterator[tuple[str, int]]:
        while rows := self._rows("SELECT path, ctime FROM pending_folder LIMIT ?", _AT_ONCE):
            self._connection.executemany("DELETE FROM pending_folder WHERE path = ?", [(row[0],) for row in rows])
            yield from ((os.fsdecode(path), ctime) for path, ctime in rows)

    def drop_pending(self) -> None:
        self._connection.execute("DELETE FROM pending_link; DELETE FROM pending_folder")

    # Proof
    def unproven(self) -> Iterator[tuple[int, Entry]]:
        """With their number, in the order in which they were written."""
        last = 0
        query = f"SELECT id, {_COLUMNS} FROM entry WHERE proven = 0 AND id > ? ORDER BY id LIMIT ?"  # noqa: S608
        while rows := self._rows(query, last, _AT_ONCE):
            for number, *row in rows:
                yield number, _entry(row)
                last = number

    def prove(self, numbers: Iterable[int]) -> None:
        self._connection.executemany("UPDATE entry SET proven = 1 WHERE id = ?", [(number,) for number in numbers])

    def totals(self) -> tuple[int, int]:
        """Entries and bytes."""
        ((entries, size),) = self._rows("SELECT count(*), coalesce(sum(size), 0) FROM entry")
        return entries, size

    def in_order(self) -> Iterator[Entry]:
        """All entries by their paths, as bytes."""
        for row in self._connection.execute(f"SELECT {_COLUMNS} FROM entry ORDER BY path"):  # noqa: S608
            yield _entry(row)

    def digest(self) -> str:
        """Of everything that must agree, by path; inodes and change times are a matter of one side."""
        whole, encode = blake3(), msgspec.msgpack.Encoder().encode
        query = "SELECT path, mode, uid, gid, size, mtime, rdev, about, digest FROM entry ORDER BY path"
        rows = self._connection.execute(query)
        while some := list(itertools.islice(rows, _AT_ONCE)):  # containers are held still meanwhile
            whole.update(b"".join(map(encode, some)))
        return whole.hexdigest()


def _entry(row: Sequence[object]) -> Entry:
    return Entry(os.fsdecode(row[0]), *row[1:])  # type: ignore[arg-type]
