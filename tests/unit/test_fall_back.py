"""A place that fails right after the commit point: the volume goes back by itself, if nobody can have written there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec
import pytest

from tests.unit.conftest import Lab
from volumed.core import mounts
from volumed.driver import Facts
from volumed.errors import BackendUnavailable, DeadlineExceeded, HostError, InUse, OperationPending
from volumed.migration.migrations import Migrations
from volumed.migration.move import Move
from volumed.migration.movers.mover import Control
from volumed.migration.places import OtherPlace, at, place_of
from volumed.migration.records import Records
from volumed.migration.undo import Undo
from volumed.model import (
    AccessMode,
    Attachment,
    Binding,
    Engine,
    Handle,
    Migration,
    MigrationPhase,
    MovePath,
    Place,
    Volume,
    new_migration_id,
    new_volume_id,
    now,
)
from volumed.testing import crash

DEAD = HostError("the server is gone")


class Moved(NamedTuple):
    """Just past its commit point, from backend `one` to `two`."""

    lab: Lab
    records: Records
    move: Move

    @property
    def volume(self) -> Volume:
        return self.lab.core.volumes.get("data")

    def fall_back(self) -> bool:
        return Undo(self.lab.core, self.records).fall_back(self.move.migration, DEAD)


@pytest.fixture
def moved(lab: Lab) -> Moved:
    core, volume = lab.core, lab.create()
    migration = Migration(
        id=new_migration_id(),
        volume_id=volume.id,
        volume_name="data",
        node=core.node,
        phase=MigrationPhase.VERIFIED,
        path=MovePath.TREE,
        source=place_of(volume),
        target=Place(backend="two", stored_as=new_volume_id()),
        created=now(),
        keep_source=3600.0,
    )
    records = Records(core.repository, core.locks, core.events)
    made = OtherPlace(core, migration).make(at(volume, migration.target), blank=False)
    records.begin(migration)
    migration = records.change(migration.id, target=made)
    move = Move(core, records, migration, Control(), lambda *_, **__: None)
    move._commit(volume, pause=0.0)
    return Moved(lab, records, move)


def test_it_is_where_it_was(moved: Moved) -> None:
    lab = moved.lab
    assert moved.volume.backend == "two"
    assert moved.fall_back()
    assert moved.volume.backend == "one"
    assert "migration.fell-back" in lab.events()
    move = Move(lab.core, moved.records, moved.records.get("data"), Control(), lambda *_, **__: None)
    move.run()
    ended = moved.records.get("data")
    assert ended.phase is MigrationPhase.FAILED
    assert "backend two" in ended.error
    assert "server is gone" in ended.error
    assert lab.storages["two"].volumes == {}
    lab.mount(moved.volume)
    lab.unmount(moved.volume)
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()


def used(moved: Moved) -> None:
    with moved.lab.core.repository.transaction() as transaction:
        transaction.disturb(moved.volume.id)


def shown(moved: Moved) -> None:
    moved.records.change(moved.move.migration.id, untouched=False)


def attached(moved: Moved) -> None:
    with moved.lab.core.repository.transaction() as transaction:
        transaction.put(
            Attachment(volume_id=moved.volume.id, node="node-2", access=AccessMode.MULTI_NODE_MULTI_WRITER, since=now())
        )


def old_place_dead(moved: Moved) -> None:
    moved.lab.driver("one").fail("inspect", BackendUnavailable("is gone as well"))


def old_disk_dead(moved: Moved) -> None:
    def inspect(handle: Handle) -> Facts:
        raise OSError(errno.EIO, handle)

    moved.lab.driver("one").inspect = inspect  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", [used, shown, attached, old_place_dead, old_disk_dead])
def test_it_stays_when_somebody_may_have_written_there(moved: Moved, spoil: Callable[[Moved], None]) -> None:
    spoil(moved)
    assert not moved.fall_back()
    assert moved.volume.backend == "two"
    assert moved.records.get("data").phase is MigrationPhase.CUTOVER


def test_until_it_is_shown_nobody_gets_the_volume(moved: Moved) -> None:
    lab, core = moved.lab, moved.lab.core
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(mounts, "SWITCH_TIMEOUT", 0.0)
        with pytest.raises(OperationPending, match="switched to backend two"):
            lab.mount(moved.volume)
    with pytest.raises(InUse, match="being moved to backend two"):
        core.volumes.remove("data")
    assert lab.bound() == []
    assert not core.repository.disturbed(moved.volume.id)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.mount, moved.volume)
        moved.move.run()
        waiting.result(30)
    assert moved.records.get("data").phase is MigrationPhase.KEPT
    assert lab.host.source_of(core.mounts.presence.path(moved.volume.id)).is_relative_to(lab.storages["two"].folder)


def test_the_old_server_is_not_asked_any_more(moved: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, core, old = moved.lab, moved.lab.core, moved.lab.driver("one")
    core.mounts.presence.establish(at(moved.volume, moved.move.migration.source), old)
    monkeypatch.setattr(type(old), "owns_mount", lambda self, *_: self is old)
    old.remote = True  # type: ignore[misc]
    lab.host.fail("tree_status", DeadlineExceeded("its server does not answer"))
    moved.move.run()
    assert moved.records.get("data").phase is MigrationPhase.KEPT
    assert lab.mounted() == set()


def test_one_that_rests_and_holds_somebody_still_is_looked_at_again(moved: Moved) -> None:
    migrations = Migrations(moved.lab.core)
    resting = msgspec.structs.replace(moved.move.migration, phase=MigrationPhase.CONVERGING, paused=True)
    assert not migrations._is_to_go_on(resting)
    assert migrations._is_to_go_on(msgspec.structs.replace(resting, held=b"[]"))


def test_until_it_is_shown_it_is_not_at_the_volumes_path(moved: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the move, which looks at it elsewhere, nor by the reconciler: whoever is bound sees the old place."""
    lab, core = moved.lab, moved.lab.core
    with core.repository.transaction() as transaction:
        transaction.put(
            Binding(volume_id=moved.volume.id, node=core.node, engine=Engine.DOCKER, mount_id="frozen", since=now())
        )
    core.reconciler.run()
    assert lab.mounted() == set()
    moved.move.migration = moved.records.change(moved.move.migration.id, held=b"[]")
    lab.driver("two").fail("mount", BackendUnavailable("is gone"))
    with pytest.raises(BackendUnavailable):
        moved.move.run()
    assert moved.records.get("data").untouched
    assert lab.mounted() == set()
    lab.driver("two").heal()
    seen: dict[str, set[str]] = {}
    monkeypatch.setattr(crash, "point", lambda name: seen.update({name: lab.mounted()}))
    moved.move.run()
    assert seen["migrate.proven"] == set()
    assert lab.mounted() == {moved.volume.id}
