"""A volume taken from a node that is gone: never without proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.conftest import Lab
from tests.unit.test_reach import ONE_NODE, add_node, driver_of, machines
from volumed.driver import Holder
from volumed.errors import BackendError, InUse, InvalidRequest, PreconditionFailed
from volumed.model import Binding, Engine, Operation, OperationKind, Volume, now
from volumed.testing.memory import AttachedMemoryDriver, FencedMemoryDriver, MemoryDriver

Make = Callable[..., Lab]


def used_on_node_2(lab: Lab) -> Volume:
    """As a node that died left it: bound and attached by the ledger, attached by the storage."""
    volume = lab.create()
    add_node(lab, "node-2")
    binding = Binding(volume_id=volume.id, node="node-2", engine=Engine.DOCKER, mount_id="id-9", since=now())
    with lab.core.repository.transaction() as transaction:
        transaction.put(binding)
    if isinstance(lab.driver(), AttachedMemoryDriver):
        assert volume.handle is not None
        driver_of(lab).attach(volume.handle, "machine-of-node-2")
    return volume


def unchanged(lab: Lab) -> None:
    assert lab.bound() == ["id-9"]
    assert lab.core.bindings.history() == []


def test_the_old_holder_is_cut_off_and_its_uses_are_history(make_lab: Make) -> None:
    lab = make_lab(driver=FencedMemoryDriver, backends=ONE_NODE)
    volume = used_on_node_2(lab)
    with pytest.raises(InUse, match="on node node-2"):
        lab.mount(volume)
    would = lab.core.takeovers.run("data", dry_run=True)
    assert (would.done, would.proof, would.action) == (False, "", "cut off machine machine-of-node-2")
    assert [(holder.node, holder.ours) for holder in would.holders or ()] == [("node-2", False)]
    unchanged(lab)
    assert machines(lab, volume) == ["machine-of-node-2"]
    done = lab.core.takeovers.run("data", node="node-2")
    assert (done.done, done.proof) == (True, "its storage has cut off machine machine-of-node-2")
    assert machines(lab, volume) == []
    (history,) = lab.core.bindings.history(volume.id)
    assert history.reason == "taken over by node node-1: its storage has cut off machine machine-of-node-2"
    assert "volume.taken-over" in lab.events()
    lab.mount(volume)
    assert machines(lab, volume) == ["machine-1"]
    again = lab.core.takeovers.run("data")  # this node's own use is not taken from it
    assert (again.done, again.action) == (True, "nothing: nobody else has it")
    assert lab.bound() == ["id-1"]


def test_nobody_holds_it_is_proof(make_lab: Make) -> None:
    lab = make_lab(driver=AttachedMemoryDriver, backends=ONE_NODE)
    volume = used_on_node_2(lab)
    driver_of(lab).detach(volume.handle, "machine-of-node-2")  # type: ignore[arg-type]
    assert lab.core.takeovers.run("data").proof == "the storage says that nobody else holds it"
    lab.mount(volume)


def test_what_may_still_write_is_not_taken_over(make_lab: Make) -> None:
    lab = make_lab(driver=AttachedMemoryDriver, backends=ONE_NODE)
    volume = used_on_node_2(lab)
    with pytest.raises(PreconditionFailed, match="may still be written to by docker by mount id id-9.*operator-word"):
        lab.core.takeovers.run("data")
    unchanged(lab)
    assert machines(lab, volume) == ["machine-of-node-2"]
    told = lab.core.takeovers.run("data", operator_word=True)
    assert told.proof == "an operator's word"
    assert machines(lab, volume) == []
    lab.mount(volume)


def test_storage_that_tells_nothing_needs_an_operators_word(make_lab: Make) -> None:
    lab = make_lab(driver=MemoryDriver, backends=ONE_NODE)
    used_on_node_2(lab)
    assert lab.core.takeovers.run("data", dry_run=True).holders is None
    with pytest.raises(PreconditionFailed, match="neither cut them off nor tell"):
        lab.core.takeovers.run("data")
    unchanged(lab)
    assert lab.core.takeovers.run("data", operator_word=True).done


class _Deaf(FencedMemoryDriver):
    def fence(self, handle: object, holder: Holder) -> None:
        """Says yes and does nothing."""


def test_a_fence_that_does_not_hold_is_no_proof(make_lab: Make) -> None:
    lab = make_lab(driver=_Deaf, backends=ONE_NODE)
    used_on_node_2(lab)
    with pytest.raises(BackendError, match="they still hold it"):
        lab.core.takeovers.run("data", operator_word=True)
    unchanged(lab)


def test_somebody_unknown_is_not_cut_off_by_the_way(make_lab: Make) -> None:
    lab = make_lab(driver=FencedMemoryDriver, backends=ONE_NODE)
    volume = used_on_node_2(lab)
    driver = driver_of(lab)
    driver.detach(volume.handle, "machine-of-node-2")  # type: ignore[arg-type]
    driver.attach(volume.handle, "somebodys")  # type: ignore[arg-type]
    with pytest.raises(InUse, match="no node is known for: machine somebodys"):
        lab.core.takeovers.run("data", node="node-2")
    unchanged(lab)
    assert lab.core.takeovers.run("data").done


def test_not_from_this_node(make_lab: Make) -> None:
    lab = make_lab(driver=FencedMemoryDriver, backends=ONE_NODE)
    lab.mount(lab.create())
    with pytest.raises(InvalidRequest, match="is this node"):
        lab.core.takeovers.run("data", node="node-1", operator_word=True)
    assert lab.bound() == ["id-1"]


def test_what_the_old_node_had_begun_is_finished_here(make_lab: Make) -> None:
    lab = make_lab(driver=FencedMemoryDriver, backends=ONE_NODE)
    volume = used_on_node_2(lab)
    begun = Operation(
        kind=OperationKind.MODIFY, volume_id=volume.id, node="node-2", request_id="x", started=now(), options={}
    )
    with lab.core.repository.transaction() as transaction:
        transaction.put(begun)
    lab.core.journal.recover()
    assert len(lab.core.repository.operations()) == 1
    lab.core.takeovers.run("data")
    lab.core.journal.recover()
    assert lab.core.repository.operations() == []
