"""CSI on storage that is slow, sick, or being written to; and what it costs when it is none of these."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conftest import filesystems, sh, wait_until
from tests.frontends.csi_cluster import Cluster
from tests.harness.csi import Caller, calling, capability
from tests.harness.csi_backends import BACKENDS
from tests.harness.volumed import Volumed, running_volumed
from volumed.frontends.csi.proto import csi_pb2 as csi

pytestmark = pytest.mark.root

Code = grpc.StatusCode
IMAGES = next(backend for backend in BACKENDS if backend.name == "image")
TREES = next(backend for backend in BACKENDS if backend.name == "directory")


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    with filesystems(tmp_path) as make:
        yield make("xfs", size=4 << 30)


@pytest.fixture
def volumed(tmp_path: Path, storage: Path) -> Iterator[Volumed]:
    tables = f"[backends.image]\n{IMAGES.table(storage)}[backends.directory]\n{TREES.table(storage)}"
    with running_volumed(
        tmp_path / "v", only=True, backends=tables, default_backends=("directory",), csi=""
    ) as running:
        running.targets.mkdir()
        yield running


@pytest.fixture
def caller(volumed: Volumed) -> Iterator[Caller]:
    with calling(volumed.csi_socket) as made:
        yield made


def test_a_retry_joins_what_is_running(volumed: Volumed, caller: Caller, storage: Path) -> None:
    """While the storage hangs the caller is told ABORTED in time, another caller too; and there is one volume."""
    asked: dict[str, Any] = {"name": "pvc-1", "volume_capabilities": [capability()]}
    sh("fsfreeze", "--freeze", storage)
    try:
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as raised:
                caller.CreateVolume(**asked, timeout=1.0)
            assert raised.value.code() is Code.ABORTED, raised.value.details()
        answers: list[str] = []
        joined = threading.Thread(target=lambda: answers.append(caller.CreateVolume(**asked).volume.volume_id))
        joined.start()
        assert caller.Probe().ready.value
    finally:
        sh("fsfreeze", "--unfreeze", storage)
    joined.join()
    (volume,) = volumed.api.get("volumes")["volumes"]
    assert answers == [volume["id"]] == [caller.CreateVolume(**asked).volume.volume_id]
    caller.DeleteVolume(volume_id=volume["id"])
    assert volumed.api.get("doctor") == []


WRITER = """
import os, sys
ledgers = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in sys.argv[1:]]
while True:
    for ledger in ledgers:  # the second never knows more than the first
        os.write(ledger, b"x")
        os.fsync(ledger)
"""


def test_a_group_of_volumes_in_use_is_one_instant(volumed: Volumed, caller: Caller) -> None:
    """A writer says everything in the first volume before it says it in the second, and so do the snapshots."""
    cluster = Cluster(volumed, caller, IMAGES)
    ids = [cluster.create(f"pvc-{number}").volume_id for number in range(2)]
    files = [cluster.use(volume_id) / "said" for volume_id in ids]
    writer = subprocess.Popen(["python3", "-c", WRITER, *files])
    try:
        wait_until(lambda: files[1].exists() and files[1].stat().st_size > 20)
        taken = [
            caller.CreateVolumeGroupSnapshot(name=f"group-{number}", source_volume_ids=ids).group_snapshot
            for number in range(5)
        ]
        before = files[1].stat().st_size
        wait_until(lambda: files[1].stat().st_size > before)  # thawed, all of them
    finally:
        writer.kill()
        writer.wait()
    for volume_id in ids:
        cluster.leave(volume_id)
    for number, group in enumerate(taken):
        sizes = []
        for member in sorted(group.snapshots, key=lambda member: ids.index(member.source_volume_id)):
            source = {"snapshot": {"snapshot_id": member.snapshot_id}}
            copy = cluster.create(f"copy-{number}-{member.source_volume_id}", volume_content_source=source).volume_id
            sizes.append((cluster.use(copy) / "said").stat().st_size)
            cluster.leave(copy)
            cluster.delete(copy)
        assert sizes[0] - sizes[1] in (0, 1), sizes


def test_the_health_of_storage_that_is_gone(volumed: Volumed, caller: Caller, storage: Path) -> None:
    images, away = storage / "images", storage / "away"
    images.rename(away)
    images.write_text("somebody's file")
    try:
        wait_until(lambda: caller.NodeGetStorageHealth().backend_health)
        (sick,) = caller.NodeGetStorageHealth().backend_health
        assert sick.status == csi.STORAGE_UNREACHABLE
        assert "backend image" in sick.message
        caller.CreateVolume(name="elsewhere", volume_capabilities=[capability()])  # the others are well
    finally:
        images.unlink()
        away.rename(images)
    wait_until(lambda: not caller.NodeGetStorageHealth().backend_health)


def test_nothing_forks_for_a_folder(volumed: Volumed, caller: Caller) -> None:
    """The one door to child processes says in the debug log whom it lets through."""
    cluster = Cluster(volumed, caller, TREES)
    volume_id = cluster.create("pvc-1").volume_id
    target = cluster.use(volume_id)
    caller.NodeGetVolumeStats(volume_id=volume_id, volume_path=str(target))
    cluster.leave(volume_id)
    cluster.delete(volume_id)
    assert " run: " not in volumed.log()
    images = Cluster(volumed, caller, IMAGES)
    images.delete(images.create("pvc-2").volume_id)
    assert " run: mkfs" in volumed.log()


def test_attached_for_reading_alone(volumed: Volumed, caller: Caller) -> None:
    """PUBLISH_READONLY binds whatever the node is asked: a PersistentVolume can be read-only and its pod not say so."""
    cluster = Cluster(volumed, caller, TREES)
    volume_id = cluster.create("pvc-1").volume_id
    attach = {"volume_id": volume_id, "node_id": "node-1", "volume_capability": cluster.capability()}
    caller.ControllerPublishVolume(**attach, readonly=True)
    with pytest.raises(grpc.RpcError) as raised:
        caller.ControllerPublishVolume(**attach)
    assert raised.value.code() is Code.ALREADY_EXISTS
    target = cluster.use(volume_id)
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").touch()
    assert os.statvfs(target).f_flag & os.ST_RDONLY
    assert [binding["readonly"] for binding in volumed.bindings() if not binding["staging"]] == [True]
