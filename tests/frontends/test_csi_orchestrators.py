"""The calls of each orchestrator, in its order and with its paths, against a running volumed."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conftest import sh, wait_until
from tests.harness.csi import MODES, Caller, calling, capability
from tests.harness.volumed import Volumed, running_volumed
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.proto import pluginregistration_pb2 as registration

pytestmark = pytest.mark.root

MIB = 1 << 20
POD = "0f2b6a52-1111-2222-3333-444455556666"
PV = "pvc-5d2c0e8a-7a57-4d8a-9d1f-1e6a5b8f2c11"
ALLOCATION = "8c1f3d1e-4a1b-4a3c-9a51-7f0a3a0b5f6d"


@pytest.fixture(scope="module")
def volumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    folder = tmp_path_factory.mktemp("csi")
    kubelet = f'[kubelet]\nregistration = true\nregistry = "{folder}/v/pods/plugins_registry"\n'
    with running_volumed(folder / "v", csi="", backends=kubelet) as running:
        yield running


@pytest.fixture
def caller(volumed: Volumed) -> Iterator[Caller]:
    with calling(volumed.csi_socket) as made:
        yield made
        assert volumed.api.get("volumes")["volumes"] == []
        assert volumed.targets_mounted() == []
        assert volumed.api.get("doctor") == []


# Kubernetes
def test_kubelet_registers_it(volumed: Volumed) -> None:
    """As kubelet's plugin watcher: a socket appears in its folder, it asks what is there, and then that."""
    registry = volumed.targets / "plugins_registry"
    wait_until(lambda: registry.is_dir() and any(registry.iterdir()))
    (socket,) = registry.glob("*.sock")
    assert socket.name == "volumed.csi-reg.sock"
    with calling(socket, registration.DESCRIPTOR) as watcher:
        info = watcher.GetInfo()
        assert (info.type, info.name, list(info.supported_versions)) == ("CSIPlugin", "volumed.csi", ["1.0.0"])
        watcher.NotifyRegistrationStatus(plugin_registered=True)
        watcher.NotifyRegistrationStatus(plugin_registered=False, error="another node has this name")
    with calling(Path(info.endpoint)) as caller:
        assert caller.GetPluginInfo().name == info.name
        assert caller.NodeGetInfo().node_id == "node-1"
    wait_until(lambda: "kubelet refused the registration: another node" in volumed.log())
    assert "registered with kubelet" in volumed.log()


def provisioner_creates(caller: Caller, *, block: bool = False, size: int = 32 * MIB) -> str:
    """As external-provisioner with --extra-create-metadata and WaitForFirstConsumer."""
    assert caller.Probe().ready.value
    kinds = {one.service.type for one in caller.GetPluginCapabilities().capabilities if one.HasField("service")}
    assert {
        csi.PluginCapability.Service.CONTROLLER_SERVICE,
        csi.PluginCapability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS,
    } <= kinds
    place = caller.NodeGetInfo().accessible_topology
    made = caller.CreateVolume(
        name=PV,
        capacity_range={"required_bytes": size},
        volume_capabilities=[capability(block=True) if block else capability(fs_type="xfs")],
        parameters={
            "backend": "sized",
            "csi.storage.k8s.io/pv/name": PV,
            "csi.storage.k8s.io/pvc/name": "data-db-0",
            "csi.storage.k8s.io/pvc/namespace": "shop",
        },
        accessibility_requirements={"requisite": [place], "preferred": [place]},
    ).volume
    assert made.accessible_topology == [place]
    return str(made.volume_id)


def pod_context(**more: str) -> dict[str, str]:
    """As kubelet adds it for podInfoOnMount."""
    return {
        "csi.storage.k8s.io/pod.name": "db-0",
        "csi.storage.k8s.io/pod.namespace": "shop",
        "csi.storage.k8s.io/pod.uid": POD,
        "csi.storage.k8s.io/serviceAccount.name": "postgres",
        "csi.storage.k8s.io/ephemeral": "false",
        **more,
    }


def test_kubernetes(volumed: Volumed, caller: Caller) -> None:
    volume_id = provisioner_creates(caller, size=300 * MIB)
    used = capability(MODES.SINGLE_NODE_MULTI_WRITER, fs_type="xfs", volume_mount_group="2000")
    staging = f"{volumed.targets}/plugins/kubernetes.io/csi/volumed.csi/0ab1/globalmount"
    target = f"{volumed.targets}/pods/{POD}/volumes/kubernetes.io~csi/{PV}/mount"
    Path(staging).mkdir(parents=True)  # kubelet makes the one, and the other's parent
    Path(target).parent.mkdir(parents=True)
    caller.ControllerPublishVolume(volume_id=volume_id, node_id="node-1", volume_capability=used)
    assert {one.rpc.type for one in caller.NodeGetCapabilities().capabilities} >= {
        csi.NodeServiceCapability.RPC.STAGE_UNSTAGE_VOLUME,
        csi.NodeServiceCapability.RPC.VOLUME_MOUNT_GROUP,
        csi.NodeServiceCapability.RPC.SINGLE_NODE_MULTI_WRITER,
    }
    caller.NodeStageVolume(volume_id=volume_id, staging_target_path=staging, volume_capability=used)
    volumed.kill()  # between stage and publish
    volumed.start()
    asked: dict[str, Any] = {
        "volume_id": volume_id,
        "staging_target_path": staging,
        "target_path": target,
        "volume_capability": used,
        "volume_context": pod_context(),
    }
    for _ in range(2):
        caller.NodePublishVolume(**asked)
    assert "kubernetes pod shop/db-0" in volumed.ctl("rm", "-y", PV, check=False).stderr
    assert stat.S_IMODE(Path(target).stat().st_mode) & 0o2070 == 0o2070
    assert Path(target).stat().st_gid == 2000
    (Path(target) / "file").write_text("kept")
    before = caller.NodeGetVolumeStats(volume_id=volume_id, volume_path=target).usage[0].total
    # external-resizer, and then kubelet, which asks whatever the controller answered
    wanted = {"required_bytes": 400 * MIB}
    caller.ControllerExpandVolume(volume_id=volume_id, capacity_range=wanted, volume_capability=used)
    caller.NodeExpandVolume(
        volume_id=volume_id,
        volume_path=target,
        staging_target_path=staging,
        capacity_range=wanted,
        volume_capability=used,
    )
    assert caller.NodeGetVolumeStats(volume_id=volume_id, volume_path=target).usage[0].total > before + 50 * MIB
    assert (Path(target) / "file").read_text() == "kept"
    # Nothing of ours is mounted at the staging path: kubelet would take the volume's own mount for a foreign one of
    # the same device and never unstage it.
    assert staging not in map(str, volumed.targets_mounted())
    caller.NodeUnpublishVolume(volume_id=volume_id, target_path=target)
    assert not Path(target).exists()
    assert Path(staging).exists()
    caller.NodeUnstageVolume(volume_id=volume_id, staging_target_path=staging)
    caller.ControllerUnpublishVolume(volume_id=volume_id, node_id="node-1")
    assert volumed.mounted() == {}
    caller.DeleteVolume(volume_id=volume_id)


def test_kubernetes_raw_block(volumed: Volumed, caller: Caller) -> None:
    volume_id = provisioner_creates(caller, block=True)
    used = capability(block=True)
    staging = f"{volumed.targets}/plugins/kubernetes.io/csi/volumeDevices/staging/{PV}"
    target = f"{volumed.targets}/plugins/kubernetes.io/csi/volumeDevices/publish/{PV}/{POD}"
    Path(staging).mkdir(parents=True)
    Path(target).parent.mkdir(parents=True)
    caller.NodeStageVolume(volume_id=volume_id, staging_target_path=staging, volume_capability=used)
    caller.NodePublishVolume(
        volume_id=volume_id,
        staging_target_path=staging,
        target_path=target,
        volume_capability=used,
        volume_context=pod_context(),
    )
    assert stat.S_ISBLK(Path(target).stat().st_mode)
    assert int(sh("blockdev", "--getsize64", target)) == 32 * MIB
    grown = caller.NodeExpandVolume(
        volume_id=volume_id, volume_path=target, capacity_range={"required_bytes": 64 * MIB}, volume_capability=used
    )
    assert grown.capacity_bytes == 64 * MIB == int(sh("blockdev", "--getsize64", target))
    caller.NodeUnpublishVolume(volume_id=volume_id, target_path=target)
    caller.NodeUnstageVolume(volume_id=volume_id, staging_target_path=staging)
    assert volumed.loops() == []
    caller.DeleteVolume(volume_id=volume_id)


def test_kubernetes_inline(volumed: Volumed, caller: Caller) -> None:
    volume_id = f"csi-{'0a' * 32}"
    target = f"{volumed.targets}/pods/{POD}/volumes/kubernetes.io~csi/cache/mount"
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        caller.NodePublishVolume(
            volume_id=volume_id,
            target_path=target,
            volume_capability=capability(),
            volume_context=pod_context(**{"csi.storage.k8s.io/ephemeral": "true", "backend": "sized", "size": "32m"}),
        )
    assert "pod shop/db-0" in volumed.ctl("ps").stdout
    for _ in range(2):
        caller.NodeUnpublishVolume(volume_id=volume_id, target_path=target)


# Nomad
def test_nomad(volumed: Volumed, caller: Caller) -> None:
    for _ in range(3):  # it asks again and again, to know that the plugin is well
        assert caller.Probe().ready.value
        caller.GetPluginInfo()
        caller.GetPluginCapabilities()
        caller.ControllerGetCapabilities()
        caller.NodeGetCapabilities()
        node = caller.NodeGetInfo().node_id
    used = capability(mount_flags=["noatime"])
    volume_id = caller.CreateVolume(
        name="postgres",
        capacity_range={"required_bytes": 32 * MIB, "limit_bytes": 64 * MIB},
        volume_capabilities=[used],
        parameters={"backend": "sized"},
    ).volume.volume_id
    assert caller.ValidateVolumeCapabilities(volume_id=volume_id, volume_capabilities=[used]).HasField("confirmed")
    context = caller.ControllerPublishVolume(volume_id=volume_id, node_id=node, volume_capability=used).publish_context
    usage = "rw-file-system-single-node-writer"
    staging = f"{volumed.targets}/local/csi/staging/default/postgres/{usage}"
    targets = [f"{volumed.targets}/local/csi/per-alloc/{one}/postgres/{usage}" for one in (ALLOCATION, "second")]
    for target in targets:
        caller.NodeStageVolume(
            volume_id=volume_id, staging_target_path=staging, volume_capability=used, publish_context=context
        )
        caller.NodePublishVolume(
            volume_id=volume_id,
            staging_target_path=staging,
            target_path=target,
            volume_capability=used,
            publish_context=context,
        )
    told = volumed.ctl("who", "postgres").stdout
    assert "nomad" in told
    assert f"allocation {ALLOCATION[:12]}" in told
    assert "postgres" in volumed.ctl("what", ALLOCATION).stdout
    for target in targets:
        caller.NodeUnpublishVolume(volume_id=volume_id, target_path=target)
    for _ in range(2):
        caller.NodeUnstageVolume(volume_id=volume_id, staging_target_path=staging)
        caller.ControllerUnpublishVolume(volume_id=volume_id, node_id=node)
    caller.DeleteVolume(volume_id=volume_id)


# Swarm
def test_swarm(volumed: Volumed, caller: Caller) -> None:
    """It makes no folder of its own: the plugin's file system is another than its own."""
    used = capability(MODES.SINGLE_NODE_WRITER)
    place = caller.NodeGetInfo()
    made = caller.CreateVolume(
        name="web-data",
        volume_capabilities=[used],
        accessibility_requirements={"requisite": [place.accessible_topology]},
    ).volume
    context = caller.ControllerPublishVolume(
        volume_id=made.volume_id, node_id=place.node_id, volume_capability=used
    ).publish_context
    staging = f"{volumed.targets}/data/staged/{made.volume_id}"
    target = f"{volumed.targets}/data/published/{made.volume_id}"
    asked = {"volume_id": made.volume_id, "volume_capability": used, "publish_context": context}
    caller.NodeStageVolume(**asked, staging_target_path=staging)
    caller.NodePublishVolume(**asked, staging_target_path=staging, target_path=target)
    (Path(target) / "file").write_text("kept")
    assert "swarm" in volumed.ctl("who", "web-data").stdout
    with pytest.raises(grpc.RpcError) as raised:
        caller.DeleteVolume(volume_id=made.volume_id)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    caller.NodeUnpublishVolume(volume_id=made.volume_id, target_path=target)
    caller.NodeUnstageVolume(volume_id=made.volume_id, staging_target_path=staging)
    caller.ControllerUnpublishVolume(volume_id=made.volume_id, node_id=place.node_id)
    caller.DeleteVolume(volume_id=made.volume_id)


# Mesos
def test_mesos(volumed: Volumed, caller: Caller) -> None:
    """Its storage provider on an agent: both services of one plugin, paths below its work folder."""
    assert caller.Probe().ready.value
    caller.ControllerGetCapabilities()
    caller.NodeGetCapabilities()
    node, used = caller.NodeGetInfo().node_id, capability(fs_type="ext4")
    parameters = {"backend": "sized"}
    assert caller.GetCapacity(volume_capabilities=[used], parameters=parameters).available_capacity > 0
    size = {"required_bytes": 32 * MIB, "limit_bytes": 32 * MIB}
    made = {"name": "disk-1", "capacity_range": size, "volume_capabilities": [used], "parameters": parameters}
    volume_id = caller.CreateVolume(**made).volume.volume_id
    validated = caller.ValidateVolumeCapabilities(volume_id=volume_id, volume_capabilities=[used])
    assert validated.HasField("confirmed")
    folder = f"{volumed.targets}/mesos/csi/volumed.csi/local/mounts/{volume_id}"
    context = caller.ControllerPublishVolume(volume_id=volume_id, node_id=node, volume_capability=used).publish_context
    asked: dict[str, Any] = {"volume_id": volume_id, "volume_capability": used, "publish_context": context}
    caller.NodeStageVolume(**asked, staging_target_path=f"{folder}/staging")
    caller.NodePublishVolume(**asked, staging_target_path=f"{folder}/staging", target_path=f"{folder}/target")
    assert "mesos" in volumed.ctl("who", "disk-1").stdout
    caller.NodeUnpublishVolume(volume_id=volume_id, target_path=f"{folder}/target")
    caller.NodeUnstageVolume(volume_id=volume_id, staging_target_path=f"{folder}/staging")
    caller.ControllerUnpublishVolume(volume_id=volume_id, node_id=node)
    caller.DeleteVolume(volume_id=volume_id)


# Roles, and the socket
@pytest.mark.parametrize(
    ("role", "there", "missing"),
    [("controller", "ControllerGetCapabilities", "NodeGetInfo"), ("node", "NodeGetInfo", "ControllerGetCapabilities")],
)
def test_roles(tmp_path: Path, role: str, there: str, missing: str) -> None:
    with running_volumed(tmp_path / "v", csi=f'role = "{role}"') as running, calling(running.csi_socket) as caller:
        assert caller.GetPluginInfo().name == "volumed.csi"
        offered = {one.service.type for one in caller.GetPluginCapabilities().capabilities if one.HasField("service")}
        assert (csi.PluginCapability.Service.CONTROLLER_SERVICE in offered) is (role == "controller")
        getattr(caller, there)()
        with pytest.raises(grpc.RpcError) as raised:
            getattr(caller, missing)()
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_controller_beside_each_node_offers_nothing_that_may_be_asked_of_another(tmp_path: Path) -> None:
    with (
        running_volumed(tmp_path / "v", csi="node-deployment = true") as running,
        calling(running.csi_socket) as caller,
    ):
        controller = {one.rpc.type for one in caller.ControllerGetCapabilities().capabilities}
        node = {one.rpc.type for one in caller.NodeGetCapabilities().capabilities}
        assert csi.ControllerServiceCapability.RPC.EXPAND_VOLUME not in controller
        assert csi.ControllerServiceCapability.RPC.MODIFY_VOLUME not in controller
        assert csi.NodeServiceCapability.RPC.EXPAND_VOLUME in node


def test_the_socket_is_private(volumed: Volumed) -> None:
    assert stat.S_IMODE(volumed.csi_socket.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(volumed.csi_socket.stat().st_mode) == 0o600


def test_a_group_may_be_let_in(tmp_path: Path) -> None:
    with running_volumed(tmp_path / "v", csi='group = "games"') as running:
        assert stat.S_IMODE(running.csi_socket.stat().st_mode) == 0o660
        assert stat.S_IMODE(running.csi_socket.parent.stat().st_mode) == 0o710
        assert running.csi_socket.group() == "games"


def test_a_socket_that_cannot_be(tmp_path: Path) -> None:
    for number, wrong in enumerate(('group = "nobody-such"', f'socket = "/{"x" * 200}/csi.sock"')):
        folder = tmp_path / str(number)
        folder.mkdir()
        broken = Volumed(folder, csi="")
        text = broken.config.read_text().replace(
            f'socket = "{broken.csi_socket}"\n', "" if "socket" in wrong else f'socket = "{broken.csi_socket}"\n'
        )
        broken.config.write_text(text.replace("[csi]\n", f"[csi]\n{wrong}\n"))
        broken.start(wait=False)
        assert broken.wait_end() == 78
        assert "Traceback" not in broken.log()


def test_two_daemons_do_not_share_a_socket(volumed: Volumed, tmp_path: Path) -> None:
    second = Volumed(tmp_path, csi="")
    second.config.write_text(second.config.read_text().replace(str(second.csi_socket), str(volumed.csi_socket)))
    second.start(wait=False)
    assert second.wait_end() == 78
    assert "another daemon answers there" in second.log()
    with calling(volumed.csi_socket) as caller:
        assert caller.Probe().ready.value
