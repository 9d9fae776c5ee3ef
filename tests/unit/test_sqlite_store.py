"""The embedded store: the behaviour of all stores, and what befalls a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from tests.unit.store_behaviour import StoreBehaviour
from volumed.errors import CapacityExhausted, ConfigError, IntegrityError
from volumed.store import schema
from volumed.store.sqlite import SqliteStore
from volumed.store.store import Store


class TestSqliteStore(StoreBehaviour):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        self._path = tmp_path / "ledger.db"
        self._open: list[Store] = [SqliteStore(self._path)]
        yield self._open[0]
        for store in self._open:
            store.close()

    def reopened(self, store: Store) -> Store:
        store.close()
        self._open.append(SqliteStore(self._path))
        return self._open[-1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def make(path: Path, **entries: bytes) -> None:
    with SqliteStore(path).closing() as store:
        store.commit(put=entries or {"a": b"1"})


WRITER = """
import sys
from pathlib import Path
from volumed.store.sqlite import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
number = int(store.get("n").value) if store.get("n") else 0
while True:
    number += 1
    store.commit(put={"n": str(number).encode(), f"key/{number:06}": b"x" * 200})
    print(number, flush=True)
"""


def test_no_answered_commit_is_lost_by_kill_9(path: Path) -> None:
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        last = 0
        for line in child.stdout:
            last = int(line)
            if last % 50 == 0:
                break
        child.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in child.stdout.read().split())])
        child.wait()
        with SqliteStore(path).closing() as store:
            entry = store.get("n")
            assert entry is not None
            assert int(entry.value) >= last
            assert store.count("key/") == int(entry.value)  # both keys of a commit, or none


def test_one_daemon_per_ledger(path: Path) -> None:
    with (
        SqliteStore(path).closing(),
        pytest.raises(ConfigError, match=f"another volumed uses this ledger .pid {os.getpid()}"),
    ):
        SqliteStore(path)
    SqliteStore(path).close()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "overwritten", "zeroes", "another database"])
def test_a_damaged_ledger_is_refused_and_left_alone(path: Path, damage: str) -> None:
    make(path, **{f"key{number}": b"x" * 500 for number in range(200)})
    data = bytearray(path.read_bytes())
    match damage:
        case "empty":
            data = bytearray()
        case "text":
            data = bytearray(b"not a database at all\n" * 500)
        case "cut":
            del data[len(data) // 2 :]
        case "overwritten":
            data[4096 : 4096 * 6] = os.urandom(4096 * 5)
        case "zeroes":
            data[4096 : 4096 * 6] = bytes(4096 * 5)
        case "another database":
            path.unlink()
            apsw.Connection(str(path)).execute("CREATE TABLE songs (title)").fetchall()
            data = bytearray(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="the ledger cannot be read") as refused:
        SqliteStore(path)
    assert "backup" in str(refused.value)
    assert path.read_bytes() == data


def test_a_ledger_of_a_newer_version_is_refused(path: Path) -> None:
    make(path)
    connection = schema.connect(path)
    connection.pragma("user_version", schema.VERSION + 1)
    connection.close()
    with pytest.raises(IntegrityError, match=f"has version {schema.VERSION + 1}.*knows only {schema.VERSION}"):
        SqliteStore(path)


def test_a_migration_keeps_a_copy_of_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    monkeypatch.setattr(schema, "VERSION", 2)
    monkeypatch.setitem(schema._MIGRATIONS, 2, "CREATE TABLE more (x)")
    with SqliteStore(path).closing() as store:
        assert store.get("a") is not None
    backup = path.with_name("ledger.db.backup-1")
    assert backup.stat().st_mode & 0o777 == 0o600
    assert apsw.Connection(str(backup)).execute("SELECT value FROM entries").get == b"1"


def test_a_migration_that_fails_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    with monkeypatch.context() as patched:
        patched.setattr(schema, "VERSION", 2)
        patched.setitem(schema._MIGRATIONS, 2, "CREATE TABLE more (x); CREATE TABLE entries (twice)")
        with pytest.raises(apsw.SQLError):
            SqliteStore(path)
    with SqliteStore(path).closing() as store:
        assert store.get("a") is not None


def test_the_ledger_is_private(path: Path) -> None:
    make(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.root
def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    from volumed.host import mounts  # noqa: PLC0415

    target = tmp_path / "small"
    target.mkdir()
    mounts.mount("tmpfs", target, fstype="tmpfs", options=("size=32m",), readonly=False)
    try:
        with SqliteStore(target / "ledger.db").closing() as store:
            store.commit(put={"first": b"kept"})
            with (target / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
                while True:
                    filler.write(bytes(65536))
            revision = store.revision()
            with pytest.raises(CapacityExhausted, match="disk of the ledger is full; nothing was changed"):
                store.commit(put={"second": b"x" * 6_000_000})
            assert store.revision() == revision
            assert store.commit(put={"small": b"fits"}, delete=["none"]) == revision + 1  # its room is reserved
            store.commit(delete=["small"])
            (target / "filler").unlink()
            assert store.commit(put={"second": b"x" * 6_000_000}) == revision + 3
        with SqliteStore(target / "ledger.db").closing() as store:
            assert [entry.key for entry in store.scan("")] == ["first", "second"]
    finally:
        mounts.unmount(target)
