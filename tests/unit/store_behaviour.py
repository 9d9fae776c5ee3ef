"""What every store must do, whatever holds its keys. A store's tests subclass this and say how it is opened."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volumed.errors import NotFound, OutOfRange
from volumed.store.store import Change, Conflict, Entry, Store

# What SQLite, etcd and Python agree on as text.
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


class StoreBehaviour:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    def reopened(self, store: Store) -> Store:
        """The same data after a restart."""
        raise NotImplementedError

    # Reading and writing
    def test_what_is_put_is_there(self, store: Store) -> None:
        revision = store.commit(put={"a/1": b"one", "a/2": b"\x00\xff"})
        assert store.get("a/1") == Entry("a/1", b"one", revision)
        assert store.get("a/2") == Entry("a/2", b"\x00\xff", revision)
        assert store.get("a/3") is None
        assert store.revision() == revision

    def test_each_commit_is_one_higher(self, store: Store) -> None:
        before = store.revision()
        assert [store.commit(put={"key": b"x"}) for _ in range(3)] == [before + 1, before + 2, before + 3]
        entry = store.get("key")
        assert entry is not None
        assert entry.revision == before + 3

    def test_delete(self, store: Store) -> None:
        store.commit(put={"a": b"", "b": b""})
        store.commit(delete=["a", "never there"])
        assert store.get("a") is None
        assert store.get("b") is not None

    def test_put_wins_over_delete_of_the_same_key(self, store: Store) -> None:
        store.commit(put={"a": b"old"})
        store.commit(put={"a": b"new"}, delete=["a"])
        entry = store.get("a")
        assert entry is not None
        assert entry.value == b"new"

    def test_scan_is_in_the_order_of_bytes_and_pages(self, store: Store) -> None:
        store.commit(put={f"v/{name}": b"" for name in ("b", "a", "aa", "é", "Z", "\U0001f600", "\uffee")})
        store.commit(put={"v": b"", "w/a": b"", "v0": b""})
        keys = [entry.key for entry in store.scan("v/")]
        assert keys == sorted(keys, key=str.encode)
        assert len(keys) == 7
        assert store.count("v/") == 7
        assert list(store.keys("v/")) == keys
        assert [entry.key for entry in store.scan("v/", after=keys[2], limit=2)] == keys[3:5]
        assert list(store.keys("v/", after=keys[-1])) == []
        assert len(store.scan("")) == 10

    @given(
        data=st.dictionaries(KEYS, st.binary(max_size=4), max_size=20),
        prefix=st.text(max_size=2).filter(str.isprintable),
    )
    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_scan_finds_what_begins_so(self, store: Store, data: dict[str, bytes], prefix: str) -> None:
        store.commit(delete=[entry.key for entry in store.scan("")])
        store.commit(put=data)
        wanted = sorted((key for key in data if key.startswith(prefix)), key=str.encode)
        assert [entry.key for entry in store.scan(prefix)] == wanted
        assert store.count(prefix) == len(wanted)

    # Expectations
    def test_a_failed_expectation_changes_nothing(self, store: Store) -> None:
        revision = store.commit(put={"a": b"1"})
        for expect in ({"a": 0}, {"a": revision - 1}, {"b": 5}, {"a": revision, "b": 1}):
            with pytest.raises(Conflict):
                store.commit(expect=expect, put={"a": b"2", "c": b"3"}, delete=["a"])
        assert store.get("a") == Entry("a", b"1", revision)
        assert store.get("c") is None
        assert store.revision() == revision

    def test_a_met_expectation(self, store: Store) -> None:
        revision = store.commit(expect={"a": 0}, put={"a": b"1"})
        store.commit(expect={"a": revision, "b": 0}, put={"a": b"2"})

    def test_of_many_writers_each_round_has_one_winner(self, store: Store) -> None:
        store.commit(put={"counter": b"0"})

        def add(_: int) -> int:
            lost = 0
            while True:
                entry = store.get("counter")
                assert entry is not None
                try:
                    store.commit(
                        expect={"counter": entry.revision}, put={"counter": str(int(entry.value) + 1).encode()}
                    )
                    return lost
                except Conflict:
                    lost += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(100)))
        entry = store.get("counter")
        assert entry is not None
        assert entry.value == b"100"

    def test_a_reader_sees_all_of_a_commit_or_nothing(self, store: Store) -> None:
        store.commit(put={"x/1": b"0", "x/2": b"0"})
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                store.commit(put={"x/1": str(number).encode(), "x/2": str(number).encode()})

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(300):
                one, two = store.scan("x/")
                assert one.value == two.value
        finally:
            stop.set()
            writer.join()

    def test_what_was_answered_outlives_a_restart(self, store: Store) -> None:
        revision = store.commit(put={"a": b"1"})
        again = self.reopened(store)
        assert again.get("a") == Entry("a", b"1", revision)
        assert again.commit(put={"b": b""}) == revision + 1

    # Watching
    def test_a_watch_sees_changes_in_order(self, store: Store) -> None:
        with _watching(store, "a/", after=store.revision()) as watch:
            first = store.commit(put={"a/1": b"one", "b/1": b"not ours"})
            second = store.commit(put={"a/2": b"two"}, delete=["a/1", "a/never"])
            seen = list(islice(watch, 3))
        assert seen[0] == Change("a/1", b"one", first)
        assert set(seen[1:]) == {Change("a/1", None, second), Change("a/2", b"two", second)}

    def test_a_watch_begins_where_it_is_told(self, store: Store) -> None:
        before = store.revision()
        for number in range(5):
            store.commit(put={f"a/{number}": b""})
        with _watching(store, "a/", after=before + 2) as watch:
            assert [change.key for change in islice(watch, 3)] == ["a/2", "a/3", "a/4"]

    def test_changes_of_before_the_restart_are_not_kept(self, store: Store) -> None:
        store.commit(put={"a": b""})
        store.commit(put={"a": b""})
        again = self.reopened(store)
        with pytest.raises(OutOfRange, match="scan, then watch"):
            again.watch("", after=again.revision() - 2)

    def test_a_closed_watch_ends(self, store: Store) -> None:
        watch = store.watch("", after=store.revision())
        reader = threading.Thread(target=lambda: list(watch))
        reader.start()
        watch.close()
        reader.join(10)
        assert not reader.is_alive()

    # Leases
    def test_what_a_lease_holds_goes_with_it(self, store: Store) -> None:
        lease = store.grant_lease(60)
        store.commit(put={"node/1": b""}, lease=lease)
        store.commit(put={"other": b""})
        with _watching(store, "node/", after=store.revision()) as watch:
            store.revoke_lease(lease)
            (gone,) = islice(watch, 1)
        assert (gone.key, gone.value) == ("node/1", None)
        assert store.get("other") is not None
        with pytest.raises(NotFound):
            store.keep_alive(lease)

    def test_a_lease_ends_by_itself_unless_it_is_kept(self, store: Store) -> None:
        kept, left = store.grant_lease(1.5), store.grant_lease(0.1)
        store.commit(put={"kept": b""}, lease=kept)
        store.commit(put={"left": b""}, lease=left)
        ends = time.monotonic() + 30
        while store.get("left") is not None:
            assert time.monotonic() < ends
            store.keep_alive(kept)
            time.sleep(0.05)
        assert store.get("kept") is not None

    def test_an_unknown_lease_is_refused(self, store: Store) -> None:
        with pytest.raises(NotFound):
            store.commit(put={"a": b""}, lease=12345)
        assert store.get("a") is None


class _watching:
    def __init__(self, store: Store, prefix: str, *, after: int) -> None:
        self._watch = store.watch(prefix, after=after)

    def __enter__(self) -> Iterator[Change]:
        return iter(self._watch)

    def __exit__(self, *_: object) -> None:
        self._watch.close()
