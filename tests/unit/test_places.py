"""A volume that was moved: its storage knows it by another id, and nothing else changed."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.conftest import Lab
from volumed.errors import InUse
from volumed.model import Migration, MigrationPhase, MovePath, Place, Volume, new_migration_id, new_volume_id, now


def moved(lab: Lab) -> Volume:
    """By hand: its data, and the ledger, as a move leaves them."""
    volume = lab.create()
    driver = lab.driver("two")
    made = lab.create("other", backend="two")  # gives us something of a fresh id on the other storage
    assert made.handle
    with lab.core.repository.transaction() as transaction:
        transaction.delete(made)
    place = msgspec.structs.replace(volume, backend="two", handle=made.handle, moved_to=made.id)
    with lab.core.repository.transaction() as transaction:
        transaction.put(place, previous=volume)
    assert volume.handle
    lab.driver("one").delete(volume.handle)
    assert driver.inspect(made.handle)
    return place


def test_it_is_found_and_mounted_and_removed(lab: Lab) -> None:
    volume = moved(lab)
    assert lab.core.volumes.get("data").id == volume.id
    assert lab.core.repository.volume_stored_as(volume.stored_as) == volume
    assert lab.core.repository.volume_stored_as(volume.id) is None
    assert lab.core.doctor.examine() == []
    path = lab.mount(volume)
    assert path.name == volume.id
    assert lab.host.source_of(path) == lab.tree(volume)
    lab.unmount(volume)
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()
    assert lab.store.count("stored/") == 0


def test_what_a_move_holds_is_no_orphan_and_its_volume_cannot_change(lab: Lab) -> None:
    volume = lab.create()
    target = lab.create("other", backend="two")
    migration = Migration(
        id=new_migration_id(),
        volume_id=volume.id,
        volume_name="data",
        node="node-1",
        phase=MigrationPhase.SEEDING,
        path=MovePath.TREE,
        source=Place(backend="one", stored_as=volume.id, handle=volume.handle),
        target=Place(backend="two", stored_as=target.id, handle=target.handle),
        created=now(),
    )
    with lab.core.repository.transaction() as transaction:
        transaction.delete(target)
        transaction.put(migration)
    assert lab.core.doctor.examine() == []
    for change in (
        lambda: lab.core.snapshots.create("data", "one"),
        lambda: lab.core.volumes.remove("data"),
        lambda: lab.core.volumes.modify("data", options={"color": "red"}),
    ):
        with pytest.raises(InUse, match="is being moved to backend two.*volumectl migration abort m"):
            change()
    ended = msgspec.structs.replace(migration, phase=MigrationPhase.FAILED)
    with lab.core.repository.transaction() as transaction:
        transaction.put(ended, previous=migration)
    assert [finding.kind for finding in lab.core.doctor.examine()] == ["orphan-volume"]
    lab.core.volumes.remove("data")


def test_one_move_at_a_time(lab: Lab) -> None:
    volume = lab.create()
    place = Place(backend="one", stored_as=volume.id)

    def begin() -> None:
        with lab.core.repository.transaction() as transaction:
            transaction.put(
                Migration(
                    id=new_migration_id(),
                    volume_id=volume.id,
                    volume_name="data",
                    node="node-1",
                    phase=MigrationPhase.PLANNED,
                    path=MovePath.TREE,
                    source=place,
                    target=Place(backend="two", stored_as=new_volume_id()),
                    created=now(),
                )
            )

    begin()
    with pytest.raises(Exception, match="migrating/"):
        begin()
