"""The entries that the store remembers are never behind those it has."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from volumed.store import recent
from volumed.store.recent import Recent
from volumed.store.sqlite import SqliteStore
from volumed.store.store import Change, Entry

OLD, NEW = Entry("key", b"old", 1), Entry("key", b"new", 2)
CHANGE = Change("key", b"new", 2)


def never(key: str) -> Entry | None:
    raise AssertionError(f"{key} was read again")


@pytest.mark.parametrize("entry", [OLD, None])
def test_what_was_read_is_not_read_again(entry: Entry | None) -> None:
    kept = Recent()
    assert kept.get("key", lambda _: entry) == entry
    assert kept.get("key", never) == entry


@pytest.mark.parametrize(("change", "shown"), [(CHANGE, NEW), (Change("key", None, 2), None)])
def test_a_commit_replaces_what_was_read(change: Change, shown: Entry | None) -> None:
    kept = Recent()
    kept.get("key", lambda _: OLD)
    with kept.replacing([change]):
        pass
    assert kept.get("key", never) == shown


def test_a_commit_that_fails_changes_nothing() -> None:
    kept = Recent()
    with pytest.raises(OSError, match="disk"), kept.replacing([CHANGE]):
        raise OSError("disk")
    assert kept.get("key", lambda _: OLD) == OLD


def test_while_a_commit_is_on_its_way_the_database_is_asked_each_time() -> None:
    """The database may show the new entry to a scan already: what is remembered must not be behind it."""
    kept = Recent()
    kept.get("key", lambda _: OLD)
    with kept.replacing([CHANGE]):
        assert kept.get("key", lambda _: OLD) == OLD
        assert kept.get("key", lambda _: NEW) == NEW
    assert kept.get("key", never) == NEW


@pytest.mark.parametrize("changes", [[CHANGE], []])
def test_what_was_read_across_a_commit_is_not_kept(changes: list[Change]) -> None:
    kept = Recent()

    def slow(_: str) -> Entry:
        with kept.replacing(changes):
            pass
        return OLD

    kept.get("key", slow)
    assert kept.get("key", lambda _: NEW) == NEW


def test_it_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "KEPT", 10)
    kept = Recent()
    for number in range(100):
        kept.get(str(number), lambda key: Entry(key, b"", 1))
    assert len(kept._entries) <= 10


def test_no_reader_sees_less_than_it_saw_before(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "ledger.db").closing() as store:
        done, behind = threading.Event(), list[tuple[int, int]]()

        def watch() -> None:
            while not done.is_set():
                scanned = sum(entry.revision for entry in store.scan("key"))
                entry = store.get("key")
                if entry is None or entry.revision < scanned:
                    behind.append((scanned, entry.revision if entry else 0))

        store.commit(put={"key": b""})
        readers = [threading.Thread(target=watch) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(300):
                revision = store.commit(put={"key": b"x"})
                found = store.get("key")
                assert found is not None
                assert found.revision == revision
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert behind == []
