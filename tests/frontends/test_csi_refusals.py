"""CSI given what it must refuse: the specification's code, a text that says why, and nothing changed."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import sh
from tests.frontends.csi_cluster import Cluster
from tests.harness.csi import MODES, Caller, calling, capability
from tests.harness.csi_backends import MIB, CsiBackend
from tests.harness.volumed import Volumed, running_volumed
from volumed.frontends.csi.proto import csi_pb2 as csi

pytestmark = pytest.mark.root

Code = grpc.StatusCode
TREE = CsiBackend("one", lambda folder: "", filesystem="", size=MIB, larger=2 * MIB)
METHODS = {method.name: method for service in csi.DESCRIPTOR.services_by_name.values() for method in service.methods}


@pytest.fixture(scope="module")
def volumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    folder = tmp_path_factory.mktemp("csi")
    tables = (
        f'[backends.one]\ndriver = "directory"\npath = "{folder}/folders"\nadvisory-size = true\n'
        f'[backends.images]\ndriver = "image"\npath = "{folder}/images"\n'
    )
    with running_volumed(folder / "v", only=True, backends=tables, default_backends=("one",), csi="") as running:
        running.targets.mkdir()
        yield running


@pytest.fixture(scope="module")
def caller(volumed: Volumed) -> Iterator[Caller]:
    with calling(volumed.csi_socket) as made:
        yield made


@pytest.fixture(scope="module")
def used(volumed: Volumed, caller: Caller) -> Cluster:
    """A volume `pvc-1`, staged and published; and nothing that these tests do may change that."""
    cluster = Cluster(volumed, caller, TREE)
    cluster.use(cluster.create("pvc-1").volume_id)
    return cluster


def world(cluster: Cluster) -> Any:
    """Everything that a refused call could have changed."""
    return (
        cluster.volumed.api.get("volumes"),
        cluster.volumed.bindings(),
        cluster.volumed.targets_mounted(),
        sorted(str(path) for path in cluster.volumed.targets.rglob("*")),
        cluster.csi.ListSnapshots(),
        cluster.volumed.api.get("doctor"),
    )


@contextlib.contextmanager
def refusal(cluster: Cluster, code: Code, match: str = "") -> Iterator[None]:
    before = world(cluster)
    with pytest.raises(grpc.RpcError) as raised:
        yield
    assert raised.value.code() is code, raised.value.details()
    assert match in (raised.value.details() or "")
    assert world(cluster) == before


def the_volume(cluster: Cluster) -> str:
    return str(next(entry.volume.volume_id for entry in cluster.csi.ListVolumes().entries))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_empty_request(used: Cluster, name: str) -> None:
    """Answered, or refused for what is missing; never INTERNAL."""
    before = world(used)
    try:
        answer = getattr(used.csi, name)()
        if METHODS[name].server_streaming:
            list(answer)
    except grpc.RpcError as error:
        assert error.code() in (Code.INVALID_ARGUMENT, Code.NOT_FOUND), error.details()
        assert error.details()
    assert world(used) == before


WRONG_CREATIONS: list[tuple[dict[str, Any], Code, str]] = [
    ({"name": ""}, Code.INVALID_ARGUMENT, "no name"),
    ({"name": "x" * 129}, Code.INVALID_ARGUMENT, "128 bytes"),
    ({"name": "a\x01b"}, Code.INVALID_ARGUMENT, "control"),
    ({"volume_capabilities": []}, Code.INVALID_ARGUMENT, "no volume capabilities"),
    ({"volume_capabilities": [csi.VolumeCapability()]}, Code.INVALID_ARGUMENT, "neither block nor mount"),
    ({"volume_capabilities": [capability(), capability(block=True)]}, Code.INVALID_ARGUMENT, "a device and a tree"),
    ({"volume_capabilities": [capability(MODES.UNKNOWN)]}, Code.INVALID_ARGUMENT, "access mode"),
    ({"volume_capabilities": [capability(fs_type="ext4")]}, Code.INVALID_ARGUMENT, "cannot be had"),
    ({"volume_capabilities": [capability(block=True)]}, Code.INVALID_ARGUMENT, "no block"),
    ({"volume_capabilities": [capability(mount_flags=["x=/dev/sda"])]}, Code.INVALID_ARGUMENT, "cannot be used"),
    ({"volume_capabilities": [capability(volume_mount_group="wheel")]}, Code.INVALID_ARGUMENT, "is no group"),
    ({"volume_capabilities": [capability(MODES.MULTI_NODE_MULTI_WRITER)]}, Code.INVALID_ARGUMENT, "this node alone"),
    ({"capacity_range": {"required_bytes": -1}}, Code.OUT_OF_RANGE, "negative"),
    ({"capacity_range": {"required_bytes": 20, "limit_bytes": 10}}, Code.INVALID_ARGUMENT, "below"),
    ({"parameters": {"backend": "ten"}}, Code.INVALID_ARGUMENT, "there is no backend"),
    ({"parameters": {"bakend": "one"}}, Code.INVALID_ARGUMENT, "did you mean 'backend'"),
    ({"parameters": {"size": "1g"}}, Code.INVALID_ARGUMENT, "capacity_range"),
    ({"parameters": {"from": "x"}}, Code.INVALID_ARGUMENT, "volume_content_source"),
    ({"parameters": {"label.x": "y" * 5000}}, Code.INVALID_ARGUMENT, "4096"),
    ({"volume_content_source": {}}, Code.INVALID_ARGUMENT, "neither"),
    ({"volume_content_source": {"volume": {}}}, Code.INVALID_ARGUMENT, "no source volume id"),
    ({"volume_content_source": {"volume": {"volume_id": "v0"}}}, Code.NOT_FOUND, "no such volume"),
    ({"volume_content_source": {"snapshot": {"snapshot_id": "v0"}}}, Code.NOT_FOUND, "no such snapshot"),
    ({"mutable_parameters": {"color": "red"}}, Code.INVALID_ARGUMENT, "no option"),
    (
        {"parameters": {"backend": "images"}, "capacity_range": {"required_bytes": 5000, "limit_bytes": 5000}},
        Code.OUT_OF_RANGE,
        "too small",
    ),
]


@pytest.mark.parametrize(("fields", "code", "match"), WRONG_CREATIONS, ids=[row[2] for row in WRONG_CREATIONS])
def test_creations(used: Cluster, fields: dict[str, Any], code: Code, match: str) -> None:
    with refusal(used, code, match):
        used.create(**{"name": "pvc-new", **fields})


def test_the_same_name_for_something_else(used: Cluster) -> None:
    used.volumed.api.post("volumes", body={"name": "by-hand"})
    for fields in (
        {"capacity_range": {"required_bytes": 2 * MIB}},
        {"capacity_range": {"required_bytes": 1, "limit_bytes": MIB - 1}},
        {"parameters": {"backend": "one", "label.a": "b"}},
        {"volume_content_source": {"volume": {"volume_id": the_volume(used)}}},
    ):
        with refusal(used, Code.ALREADY_EXISTS, "with another"):
            used.create("pvc-1", **fields)
    with refusal(used, Code.ALREADY_EXISTS, "was not made by this orchestrator"):
        used.create("by-hand")
    used.volumed.api.delete("volumes", "by-hand")


STRANGE_IDS = ["v0", "../../etc", "x" * 128, "pvc-1", "\u2603", "a/b", "%2e%2e", " "]


@pytest.mark.parametrize("volume_id", STRANGE_IDS)
def test_ids_of_any_text(used: Cluster, volume_id: str) -> None:
    """A volume's name is not its id."""
    target = str(used.volumed.targets / "new")
    for code, call, fields in (
        (Code.NOT_FOUND, "NodePublishVolume", {"target_path": target, "volume_capability": capability()}),
        (Code.NOT_FOUND, "NodeStageVolume", {"staging_target_path": target, "volume_capability": capability()}),
        (Code.NOT_FOUND, "NodeUnpublishVolume", {"target_path": target}),
        (Code.NOT_FOUND, "NodeUnstageVolume", {"staging_target_path": target}),
        (Code.NOT_FOUND, "NodeGetVolumeStats", {"volume_path": target}),
        (Code.NOT_FOUND, "ControllerExpandVolume", {"capacity_range": {"required_bytes": 1}}),
        (Code.NOT_FOUND, "ControllerModifyVolume", {}),
        (Code.NOT_FOUND, "ValidateVolumeCapabilities", {"volume_capabilities": [capability()]}),
        (Code.NOT_FOUND, "ControllerPublishVolume", {"node_id": "node-1", "volume_capability": capability()}),
    ):
        with refusal(used, code):
            getattr(used.csi, call)(volume_id=volume_id, **fields)
    used.csi.DeleteVolume(volume_id=volume_id)
    used.csi.ControllerUnpublishVolume(volume_id=volume_id, node_id="node-1")
    used.csi.DeleteSnapshot(snapshot_id=volume_id)
    used.csi.DeleteVolumeGroupSnapshot(group_snapshot_id=volume_id)
    with refusal(used, Code.NOT_FOUND):
        used.csi.GetSnapshot(snapshot_id=volume_id)
    assert the_volume(used)


def test_target_paths(used: Cluster, tmp_path: Path) -> None:
    volume_id, targets = the_volume(used), used.volumed.targets
    (targets / "file").write_text("x")
    (targets / "away").symlink_to(tmp_path)
    (targets / "link").symlink_to(targets / "elsewhere")
    (targets / "mounted").mkdir()
    (targets / "readonly").mkdir()
    sh("mount", "-t", "tmpfs", "none", targets / "mounted")
    sh("mount", "-t", "tmpfs", "-o", "ro", "none", targets / "readonly")
    try:
        for path, code, match in (
            ("relative", Code.INVALID_ARGUMENT, "no absolute path"),
            ("/etc/volume", Code.INVALID_ARGUMENT, "set target-roots"),
            (f"{targets}/../x", Code.INVALID_ARGUMENT, "leads upwards"),
            (f"{targets}/file", Code.INVALID_ARGUMENT, "is no directory"),
            (f"{targets}/file/below", Code.INVALID_ARGUMENT, "Not a directory"),
            (f"{targets}/away/x", Code.INVALID_ARGUMENT, "does not lie below"),
            (f"{targets}/link", Code.INVALID_ARGUMENT, "symbolic link"),
            (f"{targets}/mounted", Code.FAILED_PRECONDITION, "something else is mounted"),
            (f"{targets}/readonly/x", Code.INVALID_ARGUMENT, "Read-only file system"),
            (f"{targets}/{'x' * 300}", Code.INVALID_ARGUMENT, "more than 255 bytes"),
        ):
            with refusal(used, code, match):
                used.publish(volume_id, target_path=path)
    finally:
        for name in ("mounted", "readonly"):
            sh("umount", targets / name)
            (targets / name).rmdir()
        for name in ("file", "away", "link"):
            (targets / name).unlink()


def test_staged_otherwise(used: Cluster) -> None:
    volume_id = the_volume(used)
    with refusal(used, Code.FAILED_PRECONDITION, "no staging path"):
        used.publish(volume_id, "second", staging_target_path="")
    with refusal(used, Code.FAILED_PRECONDITION, "is not staged at"):
        used.publish(volume_id, "second", staging_target_path=str(used.volumed.targets / "nowhere"))
    with refusal(used, Code.FAILED_PRECONDITION, "cannot be used as a device"):
        used.publish(volume_id, "second", capability(block=True))
    with refusal(used, Code.FAILED_PRECONDITION, "cannot be used as a device"):
        used.stage(volume_id, capability(block=True))
    with refusal(used, Code.ALREADY_EXISTS, "another access"):
        used.stage(volume_id, capability(MODES.SINGLE_NODE_SINGLE_WRITER))
    with refusal(used, Code.ALREADY_EXISTS, "another readonly"):
        used.publish(volume_id, readonly=True)
    with refusal(used, Code.INVALID_ARGUMENT, "no volume capability"):
        used.csi.NodePublishVolume(
            volume_id=volume_id,
            target_path=str(used.target(volume_id, "second")),
            staging_target_path=used.staging(volume_id),
        )


def test_a_staging_path_that_vanished(used: Cluster) -> None:
    other = used.create("pvc-2").volume_id
    used.stage(other)
    os.rmdir(used.staging(other))  # noqa: PTH106
    with pytest.raises(grpc.RpcError) as raised:
        used.publish(other)
    assert raised.value.code() is Code.FAILED_PRECONDITION
    assert "stage it first" in (raised.value.details() or "")
    used.use(other)  # staged again, it goes on
    used.leave(other)
    used.delete(other)


def test_what_never_was(used: Cluster) -> None:
    volume_id = the_volume(used)
    before = world(used)
    used.csi.NodeUnpublishVolume(volume_id=volume_id, target_path=str(used.volumed.targets / "never"))
    used.csi.NodeUnstageVolume(volume_id=volume_id, staging_target_path=str(used.volumed.targets / "never"))
    used.csi.ControllerUnpublishVolume(volume_id=volume_id, node_id="nowhere")
    assert world(used) == before


def test_growing_the_wrong_way(used: Cluster) -> None:
    volume_id = the_volume(used)
    grow = used.csi.ControllerExpandVolume
    assert grow(volume_id=volume_id, capacity_range={"required_bytes": 10}).capacity_bytes == MIB
    for wanted, code in (
        ({"required_bytes": 10, "limit_bytes": 100}, Code.OUT_OF_RANGE),
        ({"required_bytes": 100, "limit_bytes": 10}, Code.INVALID_ARGUMENT),
        ({"required_bytes": -5}, Code.OUT_OF_RANGE),
        ({}, Code.INVALID_ARGUMENT),
    ):
        with refusal(used, code):
            grow(volume_id=volume_id, capacity_range=wanted)
    with refusal(used, Code.INVALID_ARGUMENT, "is a filesystem volume"):
        grow(volume_id=volume_id, capacity_range={"required_bytes": 2 * MIB}, volume_capability=capability(block=True))
    with refusal(used, Code.NOT_FOUND, "neither staged nor published"):
        used.csi.NodeExpandVolume(volume_id=volume_id, volume_path="/nowhere")


def test_snapshots_of_what_is_none(used: Cluster) -> None:
    volume_id = the_volume(used)
    with refusal(used, Code.NOT_FOUND):
        used.csi.CreateSnapshot(source_volume_id="s0", name="n")
    with refusal(used, Code.INVALID_ARGUMENT, "no snapshot"):
        used.csi.CreateSnapshot(source_volume_id=volume_id, name="n")
    with refusal(used, Code.INVALID_ARGUMENT, "no parameter"):
        used.csi.CreateSnapshot(source_volume_id=volume_id, name="n", parameters={"x": "y"})
    with refusal(used, Code.NOT_FOUND):
        used.csi.CreateVolumeGroupSnapshot(name="n", source_volume_ids=[volume_id, "v0"])


def test_what_no_backend_can_do_is_not_implemented(tmp_path: Path) -> None:
    tables = f'[backends.one]\ndriver = "directory"\npath = "{tmp_path}/folders"\n'
    with (
        running_volumed(tmp_path / "v", only=True, backends=tables, default_backends=("one",), csi="") as running,
        calling(running.csi_socket) as caller,
    ):
        volume_id = caller.CreateVolume(name="x", volume_capabilities=[capability()]).volume.volume_id
        for call, fields in (
            ("CreateSnapshot", {"source_volume_id": volume_id, "name": "n"}),
            ("CreateVolumeGroupSnapshot", {"source_volume_ids": [volume_id], "name": "n"}),
            ("GetMetadataAllocated", {"snapshot_id": "s0"}),
            ("ControllerExpandVolume", {"volume_id": volume_id, "capacity_range": {"required_bytes": 10}}),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                list(getattr(caller, call)(**fields)) if call.startswith("GetM") else getattr(caller, call)(**fields)
            assert raised.value.code() is Code.UNIMPLEMENTED, raised.value.details()
        offered = {one.rpc.type for one in caller.ControllerGetCapabilities().capabilities}
        assert csi.ControllerServiceCapability.RPC.CREATE_DELETE_SNAPSHOT not in offered
        assert csi.ControllerServiceCapability.RPC.EXPAND_VOLUME not in offered
        assert not caller.GroupControllerGetCapabilities().capabilities


def test_secrets_are_nowhere(used: Cluster) -> None:
    """Not in a log, an error, the ledger or an answer; whichever call they came with, and whether it succeeded."""
    secret = "hunter2-hunter2"
    for name, method in METHODS.items():
        if "secrets" not in method.input_type.fields_by_name:
            continue
        with contextlib.suppress(grpc.RpcError):
            answer = getattr(used.csi, name)(secrets={"key": secret, secret: "x"})
            assert secret not in str(list(answer) if method.server_streaming else answer)
    used.create("pvc-secret", secrets={"key": secret})
    assert secret not in used.volumed.log()
    for path in used.volumed.state.rglob("*"):
        if path.is_file() and not path.is_relative_to(used.volumed.state / "mounts"):
            assert secret.encode() not in path.read_bytes(), path
    used.delete(used.create("pvc-secret").volume_id)


# Anything at all
TEXTS = ["", "v0", "pvc-1", "node-1", "/", "..", "\u2603", "x" * 200, "a\x00b", "1g", "ext4", "backend", "one", "true"]
NUMBERS = [0, 1, -1, 4096, 2**31 - 1, 2**63 - 1, -(2**63), MIB]


def random_message(described: Any, dice: random.Random, volumed: Volumed, depth: int = 0) -> Message:
    message: Message = message_factory.GetMessageClass(described)()
    for field in described.fields:
        if dice.random() < 0.35 or depth > 4:
            continue
        _fill(message, field, dice, volumed, depth)
    return message


def _fill(message: Any, field: Any, dice: random.Random, volumed: Volumed, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(dice.randrange(3)):
            getattr(message, field.name)[dice.choice(TEXTS)] = dice.choice(TEXTS)
    elif field.is_repeated:
        for _ in range(dice.randrange(3)):
            if field.message_type is not None:
                getattr(message, field.name).append(random_message(field.message_type, dice, volumed, depth + 1))
            else:
                getattr(message, field.name).append(_scalar(field, dice, volumed))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(random_message(field.message_type, dice, volumed, depth + 1))
    else:
        setattr(message, field.name, _scalar(field, dice, volumed))


def _scalar(field: Any, dice: random.Random, volumed: Volumed) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        if field.name.endswith("path") and dice.random() < 0.7:
            return f"{volumed.targets}/fuzz/{dice.choice(['a', 'b', '..', 'c/d'])}"
        if field.name.endswith("volume_id") and dice.random() < 0.6:
            known = volumed.api.get("volumes")["volumes"]
            return dice.choice(known)["id"] if known else "v0"
        return dice.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return dice.random() < 0.5
    if field.type == FieldDescriptor.TYPE_ENUM:
        return dice.randrange(9)
    number = dice.choice(NUMBERS)
    return (
        number
        if field.type == FieldDescriptor.TYPE_INT64
        else number % 2**31 - 2**30
        if number > 2**31
        else number % 2**31
    )


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(METHODS)))
def test_any_request_has_an_answer(volumed: Volumed, caller: Caller, seed: int, name: str) -> None:
    method = METHODS[name]
    request = random_message(method.input_type, random.Random(seed), volumed)
    try:
        answer = getattr(caller, name)(request, timeout=30.0)
        if method.server_streaming:
            list(answer)
    except grpc.RpcError as error:
        assert error.code() not in (Code.INTERNAL, Code.UNKNOWN, Code.DEADLINE_EXCEEDED), error.details()
        assert error.details()
    assert "Traceback" not in volumed.log()


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=200), name=st.sampled_from(sorted(METHODS)))
def test_any_bytes_have_an_answer(volumed: Volumed, caller: Caller, body: bytes, name: str) -> None:
    """What is no message at all is gRPC's to refuse (INTERNAL, by its own rule), and volumed goes on."""
    method = METHODS[name]
    path = f"/{method.containing_service.full_name}/{name}"
    make = caller.channel.unary_stream if method.server_streaming else caller.channel.unary_unary
    with contextlib.suppress(grpc.RpcError):
        answer = make(path, lambda raw: raw, lambda raw: raw)(body, timeout=30.0)
        if method.server_streaming:
            list(answer)
    assert caller.Probe().ready.value
    assert "a bug of volumed" not in volumed.log()
