"""Storage that attaches volumes to machines: attached before it is used, detached after, known after a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.conftest import Lab
from volumed.config import BackendSettings
from volumed.core.doctor import Finding
from volumed.driver import Capability, Probe
from volumed.errors import BackendUnavailable, InUse, MountFailed, PreconditionFailed
from volumed.model import AccessMode, Attachment, Binding, Engine, Node, Volume, now
from volumed.testing.memory import AttachedMemoryDriver, MemoryDriver

M = AccessMode
ONE_NODE = {"one": BackendSettings(driver="memory", disabled_capabilities=("multi-node",))}


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab(driver=AttachedMemoryDriver, backends=ONE_NODE)


def driver_of(lab: Lab) -> AttachedMemoryDriver:
    driver = lab.driver()
    assert isinstance(driver, AttachedMemoryDriver)
    return driver


def machines(lab: Lab, volume: Volume) -> list[str]:
    assert volume.handle is not None
    return list(driver_of(lab).machines(volume.handle))


def recorded(lab: Lab, volume: Volume) -> list[Attachment]:
    return lab.core.repository.attachments(volume.id)


def add_node(lab: Lab, name: str) -> None:
    with lab.core.repository.transaction() as transaction:
        transaction.put(Node(name=name, topology={"volumed.csi/node": name}, machines={"one": f"machine-of-{name}"}))


def test_attached_while_it_is_mounted(lab: Lab) -> None:
    volume = lab.create()
    assert (machines(lab, volume), recorded(lab, volume)) == ([], [])
    lab.mount(volume)
    lab.mount(volume, "id-2")
    (attachment,) = recorded(lab, volume)
    assert (attachment.machine, attachment.attached, attachment.ordered) == ("machine-1", True, False)
    lab.unmount(volume)
    assert machines(lab, volume) == ["machine-1"]
    lab.unmount(volume, "id-2")
    assert (machines(lab, volume), recorded(lab, volume)) == ([], [])
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()


def test_the_node_tells_what_its_machine_is_called(lab: Lab) -> None:
    node = lab.core.repository.node("node-1")
    assert node is not None
    assert node.machines == {"one": "machine-1"}


def test_an_orchestrator_attaches_to_the_node_it_names(lab: Lab) -> None:
    volume = lab.create()
    add_node(lab, "node-2")
    for _ in range(2):
        lab.core.attachments.attach(volume, "node-2", access=M.SINGLE_NODE_WRITER)
    assert machines(lab, volume) == ["machine-of-node-2"]
    with pytest.raises(InUse, match=r"node node-2"):
        lab.mount(volume)
    assert lab.bound() == []
    with pytest.raises(InUse, match=r"node-2 \(single-node-writer\)"):
        lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    for _ in range(2):
        lab.core.attachments.detach(volume.id, "node-2")
    assert machines(lab, volume) == []
    lab.mount(volume)


def test_what_an_engine_still_uses_stays_attached_when_the_orchestrator_lets_go(lab: Lab) -> None:
    volume = lab.create()
    lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    lab.mount(volume)
    lab.core.attachments.detach(volume.id, "node-1")
    assert machines(lab, volume) == ["machine-1"]
    lab.unmount(volume)
    assert (machines(lab, volume), recorded(lab, volume)) == ([], [])


def test_what_an_orchestrator_ordered_stays_when_the_engine_lets_go(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    lab.unmount(volume)
    assert machines(lab, volume) == ["machine-1"]
    with pytest.raises(InUse, match="is attached to node: node-1"):
        lab.core.volumes.remove("data")
    lab.core.attachments.detach(volume.id)
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()


def test_an_engine_of_another_node_keeps_an_orchestrator_away(lab: Lab) -> None:
    volume = lab.create()
    add_node(lab, "node-2")
    binding = Binding(volume_id=volume.id, node="node-2", engine=Engine.DOCKER, mount_id="id-9", since=now())
    with lab.core.repository.transaction() as transaction:
        transaction.put(binding)
    with pytest.raises(InUse, match="docker by mount id id-9 on node node-2"):
        lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    with pytest.raises(InUse, match="docker by mount id id-9 on node node-2"):
        lab.mount(volume)
    assert machines(lab, volume) == []


def test_a_refused_attachment_leaves_nothing(lab: Lab) -> None:
    volume = lab.create()
    assert volume.handle is not None
    driver_of(lab).attach(volume.handle, "somebodys")  # by hand
    with pytest.raises(InUse, match="is attached to: somebodys"):
        lab.mount(volume)
    assert (recorded(lab, volume), lab.bound()) == ([], [])
    with pytest.raises(InUse):
        lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    assert recorded(lab, volume) == []


def test_an_attachment_of_unknown_outcome_is_kept_until_it_is_undone(lab: Lab) -> None:
    volume = lab.create()
    driver = driver_of(lab)
    assert volume.handle is not None
    driver.fail("attach", BackendUnavailable("no answer"))
    driver.detach(volume.handle, "machine-1")
    with pytest.raises(BackendUnavailable):
        lab.core.attachments.attach(volume, "node-1", access=M.SINGLE_NODE_WRITER)
    (left,) = recorded(lab, volume)
    assert not left.ordered
    driver.heal()
    driver.attach(volume.handle, "machine-1")  # it came through after all
    lab.core.reconciler.run()
    assert (machines(lab, volume), recorded(lab, volume)) == ([], [])


def test_a_mount_that_fails_is_detached_again(lab: Lab) -> None:
    volume = lab.create()
    lab.driver().fail("mount", MountFailed("bad superblock"))
    with pytest.raises(MountFailed):
        lab.mount(volume)
    assert (machines(lab, volume), recorded(lab, volume)) == ([], [])


def test_a_detachment_that_failed_is_made_on_the_timer(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.driver().fail("detach", BackendUnavailable("throttled"))
    lab.unmount(volume)
    assert machines(lab, volume) == ["machine-1"]
    lab.driver().heal()
    lab.core.reconciler.run(thorough=False)
    assert machines(lab, volume) == ["machine-1"]
    lab.core.reconciler.run()
    assert (machines(lab, volume), recorded(lab, volume)) == ([], [])


def test_mounted_again_after_a_reboot(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    for entry in lab.host.mounts():
        lab.host.unmount(entry.target)
    assert volume.handle is not None
    driver_of(lab).detach(volume.handle, "machine-1")
    lab.restart()
    assert machines(lab, volume) == ["machine-1"]
    assert lab.mounted() == {volume.id}


def test_a_node_that_never_told_its_name_cannot_be_attached_to(lab: Lab) -> None:
    volume = lab.create()
    with lab.core.repository.transaction() as transaction:
        transaction.put(Node(name="node-3", topology={"volumed.csi/node": "node-3"}))
    with pytest.raises(PreconditionFailed, match="node node-3 has not told"):
        lab.core.attachments.attach(volume, "node-3", access=M.SINGLE_NODE_WRITER)
    assert recorded(lab, volume) == []


def test_the_doctor_sees_who_has_what(lab: Lab) -> None:
    volume = lab.create()
    other = lab.create("other")
    lab.mount(volume)
    assert lab.core.doctor.examine() == []
    driver_of(lab).detach(volume.handle, "machine-1")  # type: ignore[arg-type]
    driver_of(lab).attach(other.handle, "somebodys")  # type: ignore[arg-type]
    found: dict[str, Finding] = {finding.subject: finding for finding in lab.core.doctor.examine()}
    assert found["volume data"].kind == "not-attached"
    assert found["volume other"].kind == "attached-elsewhere"
    assert "somebodys" in found["volume other"].text


# Topology
class _Zoned(AttachedMemoryDriver):
    def probe(self) -> Probe:
        return super().probe()._replace(topology={"zone": "a"})


def test_a_backends_zone_bounds_its_volumes_and_is_the_nodes(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(driver=_Zoned, backends=ONE_NODE)
    volume = lab.create()
    assert lab.core.attachments.topology == {"volumed.csi/node": "node-1", "zone": "a"}
    assert lab.core.attachments.reachable_from(volume, {"zone": "a", "volumed.csi/node": "node-7"})
    assert not lab.core.attachments.reachable_from(volume, {"zone": "b"})


def test_a_volume_of_one_node_is_nowhere_else(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(driver=MemoryDriver, backends=ONE_NODE)
    volume = lab.create()
    assert lab.core.attachments.reachable_from(volume, {"volumed.csi/node": "node-1"})
    assert not lab.core.attachments.reachable_from(volume, {"volumed.csi/node": "node-2"})
    assert not lab.core.attachments.reachable_from(volume, {"rack": "7"})


def test_it_is_a_capability_of_the_class() -> None:
    assert Capability.ATTACH in AttachedMemoryDriver.all_capabilities()
