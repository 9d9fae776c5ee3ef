from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volumed.model import Binding, Consumer, Engine, Volume, VolumeId, VolumeState, new_volume_id, now
from volumed.store.repository import Repository
from volumed.store.sqlite import SqliteStore
from volumed.store.store import Conflict


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with SqliteStore(tmp_path / "ledger.db").closing() as store:
        yield Repository(store)


def volume(name: str = "data") -> Volume:
    return Volume(id=new_volume_id(), name=name, backend="local", state=VolumeState.READY, created=now())


def binding(volume_id: VolumeId, *consumers: str) -> Binding:
    return Binding(
        volume_id=volume_id,
        node="node/1",
        engine=Engine.DOCKER,
        mount_id="mount/1",
        since=now(),
        consumers=tuple(Consumer(id=consumer) for consumer in consumers),
    )


def put(repository: Repository, *records: Volume | Binding) -> None:
    with repository.transaction() as transaction:
        for record in records:
            transaction.put(record)


def test_a_record_is_read_as_it_was_put(repository: Repository) -> None:
    made = msgspec.structs.replace(volume("a/b c"), labels={"ü": "é"}, size=1)
    put(repository, made)
    assert repository.volume(made.id) == made
    assert repository.volume_by_name("a/b c") == made
    assert repository.volumes() == [made]
    assert repository.volume_names() == [("a/b c", made.id)]
    assert repository.volume_count() == 1


def test_a_name_belongs_to_one(repository: Repository) -> None:
    put(repository, volume())
    with pytest.raises(Conflict):
        put(repository, volume())
    assert repository.volume_count() == 1


def test_a_stale_record_is_refused(repository: Repository) -> None:
    made = volume()
    put(repository, made)
    mine, theirs = repository.volume(made.id), repository.volume(made.id)
    assert mine
    assert theirs
    put(repository, msgspec.structs.replace(theirs, size=1))
    with pytest.raises(Conflict):
        put(repository, msgspec.structs.replace(mine, size=2))
    with pytest.raises(Conflict), repository.transaction() as transaction:
        transaction.delete(mine)


def test_a_record_that_was_put_can_be_put_again(repository: Repository) -> None:
    made = volume()
    put(repository, made)
    put(repository, made)
    with repository.transaction() as transaction:
        transaction.delete(made)
    assert repository.volume_by_name(made.name) is None


def test_an_exception_inside_commits_nothing(repository: Repository) -> None:
    with pytest.raises(RuntimeError), repository.transaction() as transaction:
        transaction.put(volume())
        raise RuntimeError
    assert repository.volume_count() == 0


def test_bindings_are_found_by_their_consumers(repository: Repository) -> None:
    bound = binding(new_volume_id(), "c1", "c2")
    put(repository, bound)
    assert repository.bindings_of_consumer("c1") == [bound]
    fewer = msgspec.structs.replace(bound, consumers=(Consumer(id="c2"), Consumer(id="c3")))
    with repository.transaction() as transaction:
        transaction.put(fewer, previous=bound)
    assert repository.bindings_of_consumer("c1") == []
    assert [found.volume_id for found in repository.bindings_of_consumer("c3")] == [bound.volume_id]
    with repository.transaction() as transaction:
        transaction.delete(fewer)
    assert repository.store.count("consumers/") == 0
    assert repository.bindings() == []


@given(
    names=st.lists(st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable()), unique=True, max_size=5)
)
@settings(max_examples=50)
def test_names_never_meet(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Whatever is in a name, two of them are two keys, and none is another's prefix."""
    with SqliteStore(tmp_path_factory.mktemp("ledger") / "ledger.db").closing() as store:
        repository = Repository(store)
        made = {name: volume(name) for name in names}
        put(repository, *made.values())
        assert {name: repository.volume_by_name(name) for name in names} == made
        assert dict(repository.volume_names()) == {name: each.id for name, each in made.items()}
