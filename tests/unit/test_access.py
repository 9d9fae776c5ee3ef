"""The seven access modes, over nodes, engines and paths."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.conftest import Lab
from volumed.core.access import Use, conflicts
from volumed.core.publications import Usage
from volumed.errors import InUse
from volumed.model import AccessMode, Consumer, Engine

M = AccessMode


def use(mode: AccessMode | None, node: str = "a", path: str = "p", *, readonly: bool = False) -> Use:
    return Use(node=node, path=path, mode=mode, readonly=readonly)


@pytest.mark.parametrize(
    ("mode", "same_node", "other_node"),
    [
        (M.SINGLE_NODE_WRITER, True, False),
        (M.SINGLE_NODE_MULTI_WRITER, True, False),
        (M.SINGLE_NODE_SINGLE_WRITER, False, False),
        (M.SINGLE_NODE_READER_ONLY, True, False),
        (M.MULTI_NODE_READER_ONLY, True, True),
        (M.MULTI_NODE_SINGLE_WRITER, True, False),
        (M.MULTI_NODE_MULTI_WRITER, True, True),
    ],
)
def test_two_uses_in_the_same_mode(mode: AccessMode, same_node: bool, other_node: bool) -> None:
    mine = use(mode)
    assert (conflicts(mine, [use(mode, path="q")]) == []) is same_node
    assert (conflicts(mine, [use(mode, node="b", path="q")]) == []) is other_node


def test_every_mode_is_decided_beside_every_other_and_both_sides_agree() -> None:
    kinds: list[AccessMode | None] = [*M, None]
    for one, two, node in itertools.product(kinds, kinds, "ab"):
        for readonly in (True, False):
            mine, other = use(one, readonly=readonly), use(two, node=node, path="q", readonly=readonly)
            assert bool(conflicts(mine, [other])) is bool(conflicts(other, [mine]))


def test_many_may_read_where_one_writes() -> None:
    writer = use(M.MULTI_NODE_SINGLE_WRITER)
    assert conflicts(use(M.MULTI_NODE_SINGLE_WRITER, "b", "q", readonly=True), [writer]) == []
    assert conflicts(use(M.MULTI_NODE_SINGLE_WRITER, "b", "q"), [writer]) == [writer]


def test_nobody_writes_beside_readers_only() -> None:
    reader = use(M.MULTI_NODE_READER_ONLY)
    assert conflicts(use(None, path="docker"), [reader])
    assert conflicts(use(M.SINGLE_NODE_WRITER, path="q"), [reader])


def test_the_same_path_is_the_same_use() -> None:
    mine = use(M.SINGLE_NODE_SINGLE_WRITER)
    assert conflicts(mine, [mine]) == []


def test_docker_and_an_orchestrator_obey_one_another(lab: Lab) -> None:
    """A volume that one pod has for itself is no container's, and the other way round."""
    volume = lab.create()
    alone = Usage(access=M.SINGLE_NODE_SINGLE_WRITER)
    publish_here(lab, "db", alone)
    with pytest.raises(InUse, match="single-node-single-writer.*kubernetes pod shop/db"):
        lab.mount(volume)
    assert lab.bound() == [f"staging:{lab.root}/staging", f"target:{lab.root}/db"]
    lab.core.publications.unpublish(volume.id, f"{lab.root}/db")
    lab.mount(volume)
    with pytest.raises(InUse, match="docker"):
        publish_here(lab, "db", alone)
    publish_here(lab, "db", Usage(access=M.SINGLE_NODE_WRITER))


def publish_here(lab: Lab, name: str, usage: Usage) -> None:
    volume = lab.core.volumes.get("data")
    staging = f"{lab.root}/staging"
    if lab.core.publications.find(volume.id, staging) is None:
        lab.core.publications.stage(volume, staging, usage, engine=Engine.KUBERNETES)
    consumer = Consumer(id=name, name=f"shop/{name}", kind="pod")
    lab.core.publications.publish(
        volume, f"{lab.root}/{name}", usage, engine=Engine.KUBERNETES, consumer=consumer, staged_at=staging
    )
