"""Snapshots of several volumes at one instant."""

from __future__ import annotations

import pytest

from tests.unit.conftest import Lab
from volumed.errors import AlreadyExists, BackendError, InUse, InvalidRequest, NotFound
from volumed.model import Volume


@pytest.fixture
def pair(lab: Lab) -> list[Volume]:
    return [lab.create("one", backend="one"), lab.create("two", backend="two")]


def ids(volumes: list[Volume]) -> list[str]:
    return [volume.id for volume in volumes]


def test_a_group_over_two_backends(lab: Lab, pair: list[Volume]) -> None:
    group = lab.core.groups.create("nightly", ids(pair))
    assert lab.core.groups.create("nightly", reversed(ids(pair))).id == group.id
    members = lab.core.groups.members(group)
    assert {snapshot.volume_id for snapshot in members} == set(ids(pair))
    assert {snapshot.created for snapshot in members} == {group.created}
    assert {snapshot.group_id for snapshot in members} == {group.id}
    with pytest.raises(InvalidRequest, match="goes with them"):
        lab.core.snapshots.remove_one(members[0])
    with pytest.raises(InUse, match="has snapshots"):
        lab.core.volumes.remove("one")
    for _ in range(2):
        lab.core.groups.remove(group.id)
    for name in ("one", "two"):
        lab.core.volumes.remove(name)
    lab.assert_nothing_left()


def test_all_or_none(lab: Lab, pair: list[Volume]) -> None:
    lab.driver("two").fail("snapshot", BackendError("no"))
    with pytest.raises(BackendError):
        lab.core.groups.create("nightly", ids(pair))
    assert lab.core.snapshots.list() == []
    assert all(not storage.snapshots for storage in lab.storages.values())
    assert lab.core.repository.operations() == []
    lab.driver("two").heal()
    lab.core.groups.create("nightly", ids(pair))


def test_a_crash_in_between_leaves_none(lab: Lab, pair: list[Volume]) -> None:
    """The journal's rows of each member are undone one by one."""
    lab.driver("two").fail("snapshot", KeyboardInterrupt())  # type: ignore[arg-type]
    lab.driver("one").fail("delete_snapshot", BackendError("away"))
    with pytest.raises(KeyboardInterrupt):
        lab.core.groups.create("nightly", ids(pair))
    lab.restart()
    assert lab.core.snapshots.list() == []
    assert all(not storage.snapshots for storage in lab.storages.values())
    assert lab.core.repository.operations() == []


def test_other_volumes_under_the_same_name(lab: Lab, pair: list[Volume]) -> None:
    lab.core.groups.create("nightly", ids(pair))
    with pytest.raises(AlreadyExists, match="of other volumes"):
        lab.core.groups.create("nightly", ids(pair)[:1])


@pytest.mark.parametrize(("name", "volumes"), [("", ["x"]), ("n", []), ("n\x00", ["x"])])
def test_what_makes_no_group(lab: Lab, name: str, volumes: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        lab.core.groups.create(name, volumes)


def test_an_unknown_volume(lab: Lab, pair: list[Volume]) -> None:
    with pytest.raises(NotFound):
        lab.core.groups.create("n", [pair[0].id, "v0"])
    with pytest.raises(NotFound):
        lab.core.groups.get("g0")


def test_two_trees_in_use_cannot_be_held_still_together(lab: Lab, pair: list[Volume]) -> None:
    lab.mount(pair[0])
    lab.core.groups.create("one of them", ids(pair))
    lab.mount(pair[1], "id-2")
    with pytest.raises(InUse, match="cannot be held still together.*volume one by docker.*volume two by docker"):
        lab.core.groups.create("both", ids(pair))
    assert len(lab.core.snapshots.list()) == 2
