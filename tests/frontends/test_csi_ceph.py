"""CSI on a real Ceph: what Kubernetes does with a volume, whose images qemu-storage-daemon maps here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frontends.csi_cluster import Cluster
from tests.harness.ceph import POOL, Ceph
from tests.harness.csi import calling
from tests.harness.csi_backends import MIB, CsiBackend
from tests.harness.volumed import running_volumed

pytestmark = pytest.mark.root

TREES = CsiBackend("ceph", lambda _: "", filesystem="", fs="xfs", size=300 * MIB, larger=400 * MIB)
DEVICES = TREES._replace(block=True, fs="", size=64 * MIB, larger=128 * MIB)


@pytest.fixture(params=[TREES, DEVICES], ids=["trees", "devices"])
def cluster(request: pytest.FixtureRequest, ceph: Ceph) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    table = (
        f'[backends.ceph]\ndriver = "ceph-rbd"\npool = "{POOL}"\n'
        f'conf = "{ceph.conf}"\nkey = "file:{ceph.make_rbd_user()}"\n'
    )
    with (
        running_volumed(folder, only=True, backends=table, default_backends=("ceph",), csi="") as volumed,
        calling(volumed.csi_socket) as caller,
    ):
        volumed.targets.mkdir()
        yield Cluster(volumed, caller, request.param)
        assert volumed.api.get("doctor") == []
        assert volumed.loops() == []
        assert ceph.rbd("ls", POOL) == ""
        assert "Traceback" not in volumed.log()
    shutil.rmtree(folder)


def grown(cluster: Cluster, volume_id: str, target: Path) -> int:
    cluster.csi.ControllerExpandVolume(volume_id=volume_id, capacity_range={"required_bytes": cluster.backend.larger})
    told: Any = cluster.csi.NodeExpandVolume(volume_id=volume_id, volume_path=str(target))
    return int(told.capacity_bytes)


def test_a_life(cluster: Cluster) -> None:
    volume = cluster.create("pvc-1")
    assert volume.capacity_bytes == cluster.backend.size
    assert list(volume.accessible_topology) == []  # every node reaches it
    target = cluster.use(volume.volume_id)
    cluster.write(target, b"kept")
    assert grown(cluster, volume.volume_id, target) == cluster.backend.larger
    snapshot = cluster.csi.CreateSnapshot(source_volume_id=volume.volume_id, name="before").snapshot
    cluster.write(target, b"lost")
    copy = cluster.create(
        "pvc-2",
        capacity_range={"required_bytes": cluster.backend.larger},
        volume_content_source={"snapshot": {"snapshot_id": snapshot.snapshot_id}},
    )
    assert cluster.read(cluster.use(copy.volume_id), 4) == b"kept"
    cluster.volumed.kill()  # what holds the devices lives on
    cluster.volumed.start()
    assert cluster.read(target, 4) == b"lost"
    assert cluster.read(cluster.target(copy.volume_id), 4) == b"kept"
    cluster.leave(copy.volume_id)
    cluster.leave(volume.volume_id)
    cluster.delete(copy.volume_id)
    cluster.csi.DeleteSnapshot(snapshot_id=snapshot.snapshot_id)
    cluster.delete(volume.volume_id)
    cluster.delete(volume.volume_id)
