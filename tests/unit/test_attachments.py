"""Volumes meant for nodes; and options changed while a volume lives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.conftest import Lab
from volumed.config import BackendSettings, CsiSettings
from volumed.errors import (
    AlreadyExists,
    BackendError,
    CapacityExhausted,
    InUse,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
)
from volumed.model import AccessMode, Node

M = AccessMode


def add_node(lab: Lab, name: str) -> None:
    with lab.core.repository.transaction() as transaction:
        transaction.put(Node(name=name, topology={"volumed.csi/node": name}))


def test_attached_and_detached(lab: Lab) -> None:
    volume = lab.create()
    for _ in range(2):
        lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    assert lab.core.attachments.nodes() == {volume.id: {"node-1"}}
    with pytest.raises(InUse, match="is attached to node: node-1"):
        lab.core.volumes.remove("data")
    with pytest.raises(AlreadyExists, match="for another usage"):
        lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER, readonly=True)
    for _ in range(2):
        lab.core.attachments.detach(volume.id, "node-1")
    lab.core.volumes.remove("data")


def test_a_single_writer_is_on_one_node(lab: Lab) -> None:
    volume = lab.create()
    add_node(lab, "node-2")
    lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    with pytest.raises(InUse, match=r"node-1 \(single-node-writer\)"):
        lab.core.attachments.attach(volume, "node-2", access=M.SINGLE_NODE_WRITER)
    lab.core.attachments.detach(volume.id)
    for node in ("node-1", "node-2"):
        lab.core.attachments.attach(volume, node, access=M.MULTI_NODE_MULTI_WRITER)
    assert lab.core.attachments.nodes() == {volume.id: {"node-1", "node-2"}}


def test_unknown_and_unreachable_nodes(make_lab: Callable[..., Lab]) -> None:
    local = {"one": BackendSettings(driver="memory", disabled_capabilities=("multi-node",))}
    lab = make_lab(backends=local)
    volume = lab.create()
    with pytest.raises(NotFound, match="there is no such node"):
        lab.core.attachments.attach(volume, "nowhere", access=M.SINGLE_NODE_WRITER)
    add_node(lab, "node-2")
    with pytest.raises(PreconditionFailed, match="node node-2 cannot reach"):
        lab.core.attachments.attach(volume, "node-2", access=M.SINGLE_NODE_WRITER)


def test_a_node_bears_so_many(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(csi=CsiSettings(max_volumes=1))
    one, two = lab.create("one"), lab.create("two")
    lab.core.attachments.attach(one, "node-1", access=M.SINGLE_NODE_WRITER)
    lab.core.attachments.attach(one, "node-1", access=M.SINGLE_NODE_WRITER)
    with pytest.raises(CapacityExhausted, match="1 are its limit"):
        lab.core.attachments.attach(two, "node-1", access=M.SINGLE_NODE_WRITER)


def test_the_node_is_in_the_ledger(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(topology={"zone": "a"})
    node = lab.core.repository.node("node-1")
    assert node is not None
    assert node.topology == {"volumed.csi/node": "node-1", "zone": "a"}


# Modification
def test_labels_and_mount_options(lab: Lab) -> None:
    lab.create(labels={"tier": "silver", "kept": "yes"})
    changed = lab.core.volumes.modify("data", labels={"tier": "gold"}, mount_options=("noatime",))
    assert changed.labels == {"tier": "gold", "kept": "yes"}
    assert lab.core.volumes.get("data").mount_options == ("noatime",)
    assert lab.core.volumes.modify("data").labels == changed.labels  # nothing said: nothing changed


def test_the_drivers_own(lab: Lab) -> None:
    volume = lab.create()
    assert volume.handle is not None
    lab.core.volumes.modify("data", options={"color": "red"})
    assert lab.storages["one"].volumes[volume.handle].color == "red"
    assert lab.core.volumes.get("data").options == {"color": "red"}


@pytest.mark.parametrize("options", [{"colour": "red"}, {"size": "1"}])
def test_what_cannot_be_changed_is_refused(lab: Lab, options: dict[str, str]) -> None:
    lab.create()
    with pytest.raises(InvalidRequest, match="cannot be changed"):
        lab.core.volumes.modify("data", options=options)


def test_a_change_that_failed_is_taken_back(lab: Lab) -> None:
    volume = lab.create(options={"color": "green"})
    driver = lab.driver()
    modify = driver.modify

    def half(*words: object) -> None:
        driver.modify = modify  # type: ignore[method-assign]
        modify(*words)  # type: ignore[arg-type]
        raise BackendError("the answer was lost")

    driver.modify = half  # type: ignore[method-assign, assignment]
    with pytest.raises(BackendError):
        lab.core.volumes.modify("data", options={"color": "red"})
    assert volume.handle is not None
    assert lab.core.volumes.get("data").options == {"color": "green"}
    assert lab.storages["one"].volumes[volume.handle].color == "green"
    assert lab.core.repository.operations() == []
