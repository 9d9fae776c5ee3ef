"""CSI on every local backend: what the official suite has no words for."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conftest import filesystems, sh, wait_until
from tests.frontends.csi_cluster import Cluster
from tests.harness.csi import MODES, Caller, calling, capability
from tests.harness.csi_backends import BACKENDS, MIB, CsiBackend
from tests.harness.volumed import Volumed, running_volumed
from volumed.frontends.csi.proto import csi_pb2 as csi

pytestmark = pytest.mark.root

Code = grpc.StatusCode
SNAPPING = [backend for backend in BACKENDS if backend.snapshots]
DIFFING = [backend for backend in BACKENDS if backend.changed_blocks]
TREES = [backend for backend in BACKENDS if not backend.block]
BY_NAME = {backend.name: backend for backend in BACKENDS}


@pytest.fixture(scope="module")
def volumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    folder = tmp_path_factory.mktemp("csi")
    with filesystems(folder) as make:
        storage = {kind: make(kind, size=8 << 30) for kind in ("xfs", "btrfs")} | {"": folder / "plain"}
        tables = [f"[backends.{backend.name}]\n{backend.table(storage[backend.filesystem])}" for backend in BACKENDS]
        shared = (
            f'[backends.shared]\ndriver = "directory"\npath = "{folder}/shared"\nshared = true\nadvisory-size = true\n'
        )
        copying = f'[backends.copying]\ndriver = "image"\npath = "{folder}/copying"\n'
        with running_volumed(
            folder / "v",
            only=True,
            backends="\n".join([*tables, shared, copying, '[topology]\nzone = "a"']),
            default_backends=("directory",),
            csi="",
        ) as running:
            running.targets.mkdir()
            yield running


@pytest.fixture(scope="module")
def caller(volumed: Volumed) -> Iterator[Caller]:
    with calling(volumed.csi_socket) as made:
        yield made


@pytest.fixture
def cluster(volumed: Volumed, caller: Caller, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """On the backend that the test names, else on images; nothing is left of the test's volumes at its end."""
    marker = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    made = Cluster(volumed, caller, marker or BY_NAME["image"])
    yield made
    assert_clean(volumed, caller)


def assert_clean(volumed: Volumed, caller: Caller) -> None:
    found = volumed.api.get("doctor")
    groups = {entry.snapshot.group_snapshot_id for entry in caller.ListSnapshots().entries}
    for group in groups - {""}:
        caller.DeleteVolumeGroupSnapshot(group_snapshot_id=group)
    for entry in caller.ListSnapshots().entries:
        caller.DeleteSnapshot(snapshot_id=entry.snapshot.snapshot_id)
    for binding in volumed.bindings():
        call = caller.NodeUnstageVolume if binding["staging"] else caller.NodeUnpublishVolume
        field = "staging_target_path" if binding["staging"] else "target_path"
        call(volume_id=binding["volume_id"], **{field: binding["path"]})
    for entry in caller.ListVolumes().entries:
        caller.ControllerUnpublishVolume(volume_id=entry.volume.volume_id)
        caller.DeleteVolume(volume_id=entry.volume.volume_id)
    assert found == []
    assert volumed.targets_mounted() == []
    assert volumed.mounted() == {}
    assert volumed.api.get("doctor") == []
    assert "Traceback" not in volumed.log()


def refused(code: Code, call: Any, *words: Any, match: str = "", **fields: Any) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        result = call(*words, **fields)
        if hasattr(result, "__next__"):
            list(result)
    assert raised.value.code() is code, raised.value.details()
    assert match in (raised.value.details() or "")


every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=[backend.name for backend in BACKENDS])
every_tree = pytest.mark.parametrize("backend", TREES, ids=[backend.name for backend in TREES])
every_snapping = pytest.mark.parametrize("backend", SNAPPING, ids=[backend.name for backend in SNAPPING])
every_diffing = pytest.mark.parametrize("backend", DIFFING, ids=[backend.name for backend in DIFFING])


# A life
@every_backend
def test_data_outlives_its_pods(cluster: Cluster, backend: CsiBackend) -> None:
    volume = cluster.create("pvc-1")
    assert volume.capacity_bytes == backend.size
    assert [dict(place.segments) for place in volume.accessible_topology] == [
        {"volumed.csi/node": "node-1", "zone": "a"}
    ]
    cluster.write(cluster.use(volume.volume_id), b"kept")
    cluster.leave(volume.volume_id)
    assert not cluster.target(volume.volume_id).exists()
    assert cluster.read(cluster.use(volume.volume_id, "other"), 4) == b"kept"
    cluster.leave(volume.volume_id, "other")
    cluster.delete(volume.volume_id)
    cluster.delete(volume.volume_id)


@every_backend
def test_two_pods_of_a_node_see_the_same(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    one, two = cluster.use(volume_id, "one"), cluster.publish(volume_id, "two")
    cluster.write(one, b"said")
    assert cluster.read(two, 4) == b"said"
    cluster.unpublish(volume_id, "one")
    assert cluster.read(two, 4) == b"said"


@every_backend
def test_read_only_publications_cannot_write(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    cluster.write(cluster.use(volume_id), b"x")
    cluster.unpublish(volume_id)
    target = cluster.publish(volume_id, "reader", readonly=True)
    assert cluster.read(target, 1) == b"x"
    with pytest.raises(OSError):
        cluster.write(target, b"y")
    cluster.unpublish(volume_id, "reader")
    cluster.write(cluster.publish(volume_id), b"z")  # and writable again afterwards


def test_a_device_is_read_only_for_all_or_none(caller: Caller, volumed: Volumed) -> None:
    cluster = Cluster(volumed, caller, BY_NAME["block"])
    volume_id = cluster.create("pvc-1").volume_id
    cluster.use(volume_id, "writer")
    refused(Code.FAILED_PRECONDITION, cluster.publish, volume_id, "reader", readonly=True, match="for all of its users")
    assert_clean(volumed, caller)


@every_backend
def test_growing_while_in_use(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    target = cluster.use(volume_id)
    cluster.write(target, b"kept")
    grown = cluster.csi.ControllerExpandVolume(volume_id=volume_id, capacity_range={"required_bytes": backend.larger})
    assert (grown.capacity_bytes, grown.node_expansion_required) == (backend.larger, False)
    node = cluster.csi.NodeExpandVolume(
        volume_id=volume_id, volume_path=str(target), capacity_range={"required_bytes": backend.larger + MIB}
    )
    assert node.capacity_bytes == backend.larger + MIB
    assert cluster.read(target, 4) == b"kept"
    if backend.block:
        assert int(sh("blockdev", "--getsize64", target)) == backend.larger + MIB
    if backend.name == "image":
        assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize > 0.8 * backend.larger


@every_backend
def test_statistics(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    target = cluster.use(volume_id)
    for path in (str(target), cluster.staging(volume_id)):
        found = cluster.csi.NodeGetVolumeStats(volume_id=volume_id, volume_path=path)
        by_unit = {usage.unit: usage for usage in found.usage}
        assert by_unit[csi.VolumeUsage.BYTES].total > 0
        if not backend.block:
            space = os.statvfs(target)
            assert by_unit[csi.VolumeUsage.BYTES].total == space.f_blocks * space.f_frsize
            assert (csi.VolumeUsage.INODES in by_unit) is bool(space.f_files)
        assert not found.volume_condition.abnormal
    refused(Code.NOT_FOUND, cluster.csi.NodeGetVolumeStats, volume_id=volume_id, volume_path=f"{target}x")


# Copies
@every_snapping
def test_snapshots_and_clones_across_sizes(cluster: Cluster, backend: CsiBackend) -> None:
    origin = cluster.create("pvc-1").volume_id
    target = cluster.use(origin)
    cluster.write(target, b"then")
    snapshot = cluster.csi.CreateSnapshot(source_volume_id=origin, name="nightly").snapshot
    assert snapshot.ready_to_use
    assert snapshot.size_bytes == backend.size
    cluster.write(target, b"now!")
    source = {"snapshot": {"snapshot_id": snapshot.snapshot_id}}
    older = cluster.create("older", volume_content_source=source, capacity_range={"required_bytes": backend.larger})
    assert older.capacity_bytes == backend.larger
    assert older.content_source.snapshot.snapshot_id == snapshot.snapshot_id
    clone = cluster.create("clone", volume_content_source={"volume": {"volume_id": origin}})
    assert cluster.read(cluster.use(older.volume_id), 4) == b"then"
    assert cluster.read(cluster.use(clone.volume_id), 4) == b"now!"
    refused(
        Code.OUT_OF_RANGE,
        cluster.create,
        "smaller",
        volume_content_source=source,
        capacity_range={"required_bytes": backend.size // 2},
    )
    refused(Code.FAILED_PRECONDITION, cluster.delete, origin)
    cluster.leave(origin)
    refused(Code.FAILED_PRECONDITION, cluster.delete, origin, match="snapshots")


@every_snapping
def test_a_group_is_one_instant(cluster: Cluster, backend: CsiBackend) -> None:
    ids = [cluster.create(f"pvc-{number}").volume_id for number in range(3)]
    taken = cluster.csi.CreateVolumeGroupSnapshot(name="all", source_volume_ids=ids).group_snapshot
    again = cluster.csi.CreateVolumeGroupSnapshot(name="all", source_volume_ids=ids[::-1]).group_snapshot
    assert again == taken
    assert {member.source_volume_id for member in taken.snapshots} == set(ids)
    assert {member.group_snapshot_id for member in taken.snapshots} == {taken.group_snapshot_id}
    members = [member.snapshot_id for member in taken.snapshots]
    found = cluster.csi.GetVolumeGroupSnapshot(group_snapshot_id=taken.group_snapshot_id, snapshot_ids=members)
    assert found.group_snapshot == taken
    refused(Code.INVALID_ARGUMENT, cluster.csi.DeleteSnapshot, snapshot_id=members[0], match="goes with them")
    for call in (cluster.csi.GetVolumeGroupSnapshot, cluster.csi.DeleteVolumeGroupSnapshot):
        refused(
            Code.INVALID_ARGUMENT, call, group_snapshot_id=taken.group_snapshot_id, snapshot_ids=[*members[1:], "s0"]
        )
    refused(Code.ALREADY_EXISTS, cluster.csi.CreateVolumeGroupSnapshot, name="all", source_volume_ids=ids[:2])
    cluster.csi.DeleteVolumeGroupSnapshot(group_snapshot_id=taken.group_snapshot_id, snapshot_ids=members)
    refused(Code.NOT_FOUND, cluster.csi.GetVolumeGroupSnapshot, group_snapshot_id=taken.group_snapshot_id)
    assert not cluster.csi.ListSnapshots().entries


# Snapshot metadata
def runs(stream: Any) -> list[tuple[int, int]]:
    return [(block.byte_offset, block.size_bytes) for message in stream for block in message.block_metadata]


def covers(found: list[tuple[int, int]], offset: int, length: int) -> bool:
    return any(start <= offset and offset + length <= start + size for start, size in found)


@pytest.mark.parametrize("shared", [True, False], ids=["reflinks", "copies"])
def test_changed_blocks(caller: Caller, volumed: Volumed, shared: bool) -> None:
    """What is told is enough to rebuild the newer snapshot from the older one, and is not everything."""
    backend = BY_NAME["block"]._replace(name="block" if shared else "copying")
    cluster = Cluster(volumed, caller, backend)
    volume_id = cluster.create("pvc-1").volume_id

    def snap(name: str) -> str:
        """Copies are only made of what nobody uses."""
        cluster.leave(volume_id)
        return str(cluster.csi.CreateSnapshot(source_volume_id=volume_id, name=name).snapshot.snapshot_id)

    target = cluster.use(volume_id)
    cluster.write(target, b"a" * MIB, 0)
    cluster.write(target, b"b" * MIB, 10 * MIB)
    base = snap("base")
    target = cluster.use(volume_id)
    cluster.write(target, b"c" * 4096, 10 * MIB)
    cluster.write(target, b"d" * MIB, 30 * MIB)
    newer = snap("newer")

    (message, *_) = list(caller.GetMetadataAllocated(snapshot_id=base))
    assert message.volume_capacity_bytes == backend.size
    assert message.block_metadata_type == csi.VARIABLE_LENGTH
    allocated = runs(caller.GetMetadataAllocated(snapshot_id=base))
    assert covers(allocated, 0, MIB)
    assert covers(allocated, 10 * MIB, MIB)
    assert sum(size for _, size in allocated) < 4 * MIB
    changed = runs(caller.GetMetadataDelta(base_snapshot_id=base, target_snapshot_id=newer))
    assert covers(changed, 10 * MIB, 4096)
    assert covers(changed, 30 * MIB, MIB)
    assert not covers(changed, 0, 4096)
    assert sum(size for _, size in changed) < 3 * MIB
    assert runs(caller.GetMetadataDelta(base_snapshot_id=base, target_snapshot_id=base)) == []
    assert_rebuilds(cluster, base, newer, changed)
    assert_clean(volumed, caller)


def assert_rebuilds(cluster: Cluster, base: str, newer: str, changed: list[tuple[int, int]]) -> None:
    paths = []
    for name, snapshot in (("old", base), ("new", newer)):
        source = {"snapshot": {"snapshot_id": snapshot}}
        volume_id = cluster.create(name, volume_content_source=source).volume_id
        paths.append(cluster.use(volume_id))
    old, new = bytearray(paths[0].open("rb").read()), paths[1].open("rb").read()
    for offset, size in changed:
        old[offset : offset + size] = new[offset : offset + size]
    assert old == new


@every_diffing
def test_windows_of_metadata(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    if backend.block:
        target = cluster.use(volume_id)
        for number in range(4):
            cluster.write(target, b"x" * 65536, number * 8 * MIB)
        cluster.leave(volume_id)
    snapshot = cluster.csi.CreateSnapshot(source_volume_id=volume_id, name="s").snapshot.snapshot_id
    every = runs(cluster.csi.GetMetadataAllocated(snapshot_id=snapshot))
    assert len(every) > 1
    single = list(cluster.csi.GetMetadataAllocated(snapshot_id=snapshot, max_results=1))
    assert [len(message.block_metadata) for message in single] == [1] * len(every)
    middle = every[1][0] + 4096
    later = runs(cluster.csi.GetMetadataAllocated(snapshot_id=snapshot, starting_offset=middle))
    assert later[0] == (middle, every[1][0] + every[1][1] - middle)
    assert later[1:] == every[2:]
    for offset in (-1, backend.size + 1):
        refused(Code.OUT_OF_RANGE, cluster.csi.GetMetadataAllocated, snapshot_id=snapshot, starting_offset=offset)
    refused(Code.INVALID_ARGUMENT, cluster.csi.GetMetadataAllocated, snapshot_id=snapshot, max_results=-1)
    refused(Code.INVALID_ARGUMENT, cluster.csi.GetMetadataAllocated)
    refused(Code.NOT_FOUND, cluster.csi.GetMetadataAllocated, snapshot_id="s0")
    refused(Code.NOT_FOUND, cluster.csi.GetMetadataDelta, base_snapshot_id=snapshot, target_snapshot_id="s0")


def test_metadata_that_cannot_be_had(caller: Caller, volumed: Volumed) -> None:
    trees, images = Cluster(volumed, caller, BY_NAME["btrfs"]), Cluster(volumed, caller, BY_NAME["block"])
    tree = caller.CreateSnapshot(source_volume_id=trees.create("tree").volume_id, name="t").snapshot.snapshot_id
    refused(Code.FAILED_PRECONDITION, caller.GetMetadataAllocated, snapshot_id=tree, match="full backup")
    two = [
        caller.CreateSnapshot(source_volume_id=images.create(name).volume_id, name=name).snapshot.snapshot_id
        for name in ("one", "two")
    ]
    refused(Code.INVALID_ARGUMENT, caller.GetMetadataDelta, base_snapshot_id=two[0], target_snapshot_id=two[1])
    assert_clean(volumed, caller)


# Looking
@every_backend
def test_one_volume_and_its_health(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    cluster.csi.ControllerPublishVolume(volume_id=volume_id, node_id="node-1", volume_capability=cluster.capability())
    cluster.use(volume_id)
    found = cluster.csi.ControllerGetVolume(volume_id=volume_id)
    assert found.volume.volume_id == volume_id
    assert list(found.status.published_node_ids) == ["node-1"]
    assert not found.status.volume_condition.abnormal
    for health in (
        cluster.csi.ControllerGetVolumeHealth(volume_id=volume_id),
        cluster.csi.NodeGetVolumeHealth(volume_id=volume_id),
        cluster.csi.NodeGetVolumeHealth(volume_id=volume_id, volume_publish_path=str(cluster.target(volume_id))),
    ):
        assert health.volume_health.volume_id == volume_id
        assert not health.volume_health.health_statuses
    listed = cluster.csi.ControllerListVolumeHealth().entries
    assert [entry.volume_id for entry in listed] == [volume_id]
    assert not cluster.csi.NodeGetStorageHealth().backend_health
    for call in (
        cluster.csi.ControllerGetVolume,
        cluster.csi.ControllerGetVolumeHealth,
        cluster.csi.NodeGetVolumeHealth,
    ):
        refused(Code.NOT_FOUND, call, volume_id="v0")
        refused(Code.INVALID_ARGUMENT, call)


def test_the_health_of_a_volume_whose_storage_is_gone(caller: Caller, volumed: Volumed) -> None:
    cluster = Cluster(volumed, caller, BY_NAME["block"])
    volume_id = cluster.create("pvc-1").volume_id
    (image,) = (volumed.folder.parent).rglob(f"{volume_id}.img")
    moved = image.with_suffix(".away")
    image.rename(moved)
    (sick,) = caller.ControllerGetVolumeHealth(volume_id=volume_id).volume_health.health_statuses
    assert (sick.status, sick.reason) == (csi.DATA_LOSS, "StorageGone")
    assert caller.ControllerGetVolume(volume_id=volume_id).status.volume_condition.abnormal
    moved.rename(image)
    assert_clean(volumed, caller)


def test_the_health_of_a_volume_that_was_unmounted_behind_our_back(cluster: Cluster) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    cluster.use(volume_id)
    cluster.volumed.kill()
    for path in (*cluster.volumed.targets_mounted(), cluster.volumed.state / "mounts" / volume_id):
        sh("umount", path)
    cluster.volumed.start()
    assert not cluster.csi.NodeGetVolumeHealth(volume_id=volume_id).volume_health.health_statuses  # repaired at start
    assert cluster.target(volume_id).is_mount()


def test_paging_survives_what_is_deleted_in_between(cluster: Cluster) -> None:
    cluster.backend = BY_NAME["directory"]
    ids = [cluster.create(f"pvc-{number}").volume_id for number in range(7)]
    first = cluster.csi.ListVolumes(max_entries=3)
    assert [entry.volume.volume_id for entry in first.entries] == ids[:3]
    cluster.delete(ids[2])
    cluster.delete(ids[3])
    ids.append(cluster.create("pvc-late").volume_id)
    second = cluster.csi.ListVolumes(max_entries=3, starting_token=first.next_token)
    third = cluster.csi.ListVolumes(starting_token=second.next_token)
    seen = [entry.volume.volume_id for page in (second, third) for entry in page.entries]
    assert seen == ids[4:]
    assert not third.next_token
    for token in ("x", "snapshots.v" + "0" * 32, "volumes.", "volumes.../.."):
        refused(Code.ABORTED, cluster.csi.ListVolumes, starting_token=token)
        refused(Code.ABORTED, cluster.csi.ControllerListVolumeHealth, starting_token=token)
    refused(Code.INVALID_ARGUMENT, cluster.csi.ListVolumes, max_entries=-1)


def test_snapshots_by_volume_and_by_id(cluster: Cluster) -> None:
    cluster.backend = BY_NAME["btrfs"]
    ids = [cluster.create(f"pvc-{number}").volume_id for number in range(2)]
    taken = [
        cluster.csi.CreateSnapshot(source_volume_id=ids[number % 2], name=f"s{number}").snapshot.snapshot_id
        for number in range(4)
    ]

    def found(**asked: Any) -> list[str]:
        return [entry.snapshot.snapshot_id for entry in cluster.csi.ListSnapshots(**asked).entries]

    assert found() == taken
    assert found(source_volume_id=ids[0]) == [taken[0], taken[2]]
    assert found(snapshot_id=taken[1]) == [taken[1]]
    assert found(snapshot_id=taken[1], source_volume_id=ids[0]) == []
    assert found(snapshot_id="../x") == found(source_volume_id="v0") == []
    page = cluster.csi.ListSnapshots(max_entries=3)
    assert found(starting_token=page.next_token) == taken[3:]
    refused(Code.ABORTED, cluster.csi.ListSnapshots, starting_token="volumes.v" + "0" * 32)


def test_capacity(caller: Caller) -> None:
    def room(**asked: Any) -> int:
        return int(caller.GetCapacity(**asked).available_capacity)

    assert room() > 0
    images = {"backend": "image", "fs": "xfs"}
    assert room(parameters=images) > 0
    assert caller.GetCapacity(parameters=images).minimum_volume_size.value == 300 * MIB
    assert room(parameters={"backend": "nothing"}) == 0
    assert room(parameters={"backend": "directory"}, volume_capabilities=[capability(block=True)]) == 0
    assert room(accessible_topology={"segments": {"zone": "a"}}) > 0
    assert room(accessible_topology={"segments": {"zone": "b"}}) == 0
    elsewhere = {"segments": {"zone": "b"}}
    assert room(parameters={"backend": "shared"}, accessible_topology=elsewhere) > 0


# Topology and access
def test_topology(cluster: Cluster) -> None:
    cluster.backend = BY_NAME["directory"]
    here, there = {"segments": {"volumed.csi/node": "node-1"}}, {"segments": {"volumed.csi/node": "node-2"}}
    cluster.create("either", accessibility_requirements={"requisite": [there, here], "preferred": [there]})
    refused(Code.RESOURCE_EXHAUSTED, cluster.create, "there", accessibility_requirements={"requisite": [there]})
    volume = cluster.create(
        "anywhere", accessibility_requirements={"requisite": [there]}, parameters={"backend": "shared"}
    )
    assert not volume.accessible_topology
    info = cluster.csi.NodeGetInfo()
    assert info.node_id == "node-1"
    assert dict(info.accessible_topology.segments) == {"volumed.csi/node": "node-1", "zone": "a"}


@pytest.mark.parametrize("mode", MODES.Mode.values()[1:], ids=MODES.Mode.keys()[1:])
def test_access_modes(caller: Caller, volumed: Volumed, mode: int) -> None:
    """All seven where storage is shared; those of one node where it is not."""
    name = MODES.Mode.Name(mode)
    everywhere = Cluster(volumed, caller, BY_NAME["directory"]._replace(name="shared"))
    volume_id = everywhere.create("shared", volume_capabilities=[everywhere.capability(mode)]).volume_id
    used = everywhere.capability(mode)
    target = everywhere.use(volume_id, used=used)
    if "READER_ONLY" in name:
        with pytest.raises(OSError):
            everywhere.write(target, b"x")
    else:
        everywhere.write(target, b"x")
    if name == "SINGLE_NODE_SINGLE_WRITER":
        refused(Code.FAILED_PRECONDITION, everywhere.publish, volume_id, "second", used, match="single-writer")
    else:
        everywhere.publish(volume_id, "second", used)
    local = Cluster(volumed, caller, BY_NAME["directory"])
    if name.startswith("MULTI"):
        refused(
            Code.INVALID_ARGUMENT, local.create, "local", volume_capabilities=[local.capability(mode)], match="shared"
        )
    else:
        local.create("local", volume_capabilities=[local.capability(mode)])
    assert_clean(volumed, caller)


def test_docker_and_csi_obey_the_same_access_mode(cluster: Cluster) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    alone = cluster.capability(MODES.SINGLE_NODE_SINGLE_WRITER)
    cluster.use(volume_id, used=alone)
    answer = cluster.volumed.plugin("Mount", Name="pvc-1", ID="docker-1")
    assert "single-node-single-writer" in answer.error
    cluster.leave(volume_id)
    assert cluster.volumed.plugin("Mount", Name="pvc-1", ID="docker-1").error == ""
    cluster.stage(volume_id, alone)
    refused(Code.FAILED_PRECONDITION, cluster.publish, volume_id, used=alone, match="docker")
    cluster.unstage(volume_id)
    cluster.use(volume_id)  # with a mode that bears others
    assert cluster.volumed.plugin("Unmount", Name="pvc-1", ID="docker-1").error == ""


@every_tree
def test_a_group_can_write_everything(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1").volume_id
    target = cluster.use(volume_id)
    (target / "folder").mkdir(mode=0o700)
    (target / "folder" / "file").write_text("x")
    (target / "script").write_text("x")
    (target / "script").chmod(0o700)
    (target / "link").symlink_to("/etc/passwd")
    before = Path("/etc/passwd").stat()
    cluster.unpublish(volume_id)
    used = cluster.capability(volume_mount_group="4242")
    cluster.unstage(volume_id)
    target = cluster.use(volume_id, used=used)
    told = {str(path.relative_to(target)): path.lstat() for path in (target, *target.rglob("*"))}
    assert {status.st_gid for status in told.values()} == {4242}
    assert stat.S_IMODE(told["folder"].st_mode) == 0o2770
    assert stat.S_IMODE(told["folder/file"].st_mode) & 0o060 == 0o060
    assert stat.S_IMODE(told["script"].st_mode) == 0o770
    assert (before.st_gid, before.st_mode) == (Path("/etc/passwd").stat().st_gid, Path("/etc/passwd").stat().st_mode)
    subprocess.run(
        ["setpriv", "--reuid=4000", "--regid=4242", "--clear-groups", "touch", "new"], cwd=target, check=True
    )
    assert (target / "new").stat().st_gid == 4242


@every_tree
def test_mount_flags(cluster: Cluster, backend: CsiBackend) -> None:
    used = cluster.capability(mount_flags=["noexec", "noatime"])
    volume_id = cluster.create("pvc-1").volume_id
    target = cluster.use(volume_id, used=used)
    options = sh("findmnt", "-n", "-o", "OPTIONS", "--mountpoint", target).strip().split(",")
    assert {"noexec", "noatime"} <= set(options)
    refused(Code.ALREADY_EXISTS, cluster.publish, volume_id)
    refused(
        Code.INVALID_ARGUMENT,
        cluster.stage,
        cluster.create("pvc-2").volume_id,
        cluster.capability(mount_flags=["x=/dev/sda"]),
    )


# Changing
@every_backend
def test_modification(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = cluster.create("pvc-1", mutable_parameters={"label.tier": "silver"}).volume_id
    cluster.csi.ControllerModifyVolume(volume_id=volume_id, mutable_parameters=dict(backend.mutable))
    found = cluster.volumed.api.get("volumes", volume_id)
    assert found["labels"]["tier"] == "gold"
    if backend.name == "btrfs":
        assert found["options"] == {"compression": "zstd"}
        (subvolume,) = cluster.volumed.folder.parent.rglob(f"subvolumes/{volume_id}")
        assert "zstd" in sh("btrfs", "property", "get", subvolume, "compression")
    again = cluster.create("pvc-1")  # the claim that made it is still the same
    assert again.volume_id == volume_id
    for wrong in ({"size": "1g"}, {"backend": "btrfs"}, {"nothing": "x"}, {"uid": "1"}):
        refused(
            Code.INVALID_ARGUMENT, cluster.csi.ControllerModifyVolume, volume_id=volume_id, mutable_parameters=wrong
        )


# Inline volumes
INLINE = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "p"}


@every_backend
def test_inline_volumes_live_inside_the_pods_life(cluster: Cluster, backend: CsiBackend) -> None:
    volume_id = "csi-" + "a" * 64
    context = INLINE | {"backend": backend.name, "size": str(backend.size), "label.app": "cache"}
    for _ in range(2):
        target = cluster.publish(volume_id, volume_context=context, staging_target_path="")
    cluster.write(target, b"x")
    (made,) = cluster.csi.ListVolumes().entries
    assert made.volume.capacity_bytes == backend.size
    for _ in range(2):
        cluster.unpublish(volume_id)
    assert not cluster.csi.ListVolumes().entries


def test_inline_volumes_that_nobody_unpublished_go_after_a_crash(cluster: Cluster) -> None:
    cluster.backend = BY_NAME["directory"]
    volume_id = "csi-" + "b" * 64
    target = cluster.publish(volume_id, volume_context=INLINE | {"backend": "directory"}, staging_target_path="")
    cluster.volumed.kill()
    sh("umount", target)  # the machine went down with it
    target.rmdir()
    cluster.volumed.start()
    wait_until(lambda: not cluster.csi.ListVolumes().entries)


# Who
def test_who_names_the_pod_and_the_claim(cluster: Cluster) -> None:
    volume_id = cluster.create(
        "pvc-1",
        parameters={
            "backend": "image",
            "csi.storage.k8s.io/pvc/name": "data-db-0",
            "csi.storage.k8s.io/pvc/namespace": "shop",
            "csi.storage.k8s.io/pv/name": "pvc-1",
        },
    ).volume_id
    pod = {
        "csi.storage.k8s.io/pod.name": "db-0",
        "csi.storage.k8s.io/pod.namespace": "shop",
        "csi.storage.k8s.io/pod.uid": "1234",
        "csi.storage.k8s.io/serviceAccount.name": "postgres",
    }
    cluster.use(volume_id, volume_context=pod)
    told = cluster.volumed.ctl("who", "pvc-1").stdout
    assert "kubernetes" in told
    assert "pod shop/db-0" in told
    assert "pvc-1 (shop/data-db-0)" in told
    assert "shop/data-db-0" in cluster.volumed.ctl("ls").stdout
    assert "pvc-1" in cluster.volumed.ctl("what", "shop/db-0").stdout
    (binding,) = [found for found in cluster.volumed.bindings() if not found["staging"]]
    assert binding["consumers"][0]["details"] == {"service-account": "postgres"}
    refusal = cluster.volumed.ctl("rm", "-y", "pvc-1", check=False)
    assert "kubernetes pod shop/db-0" in refusal.stderr
