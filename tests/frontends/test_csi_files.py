"""CSI on CephFS and on S3 (RADOS Gateway): what Kubernetes does with a volume that many nodes may have."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontends.csi_cluster import Cluster
from tests.harness.ceph import Ceph
from tests.harness.csi import MODES, calling
from tests.harness.csi_backends import MIB, CsiBackend
from tests.harness.files import backend_tables
from tests.harness.volumed import running_volumed

pytestmark = pytest.mark.root

FILES = CsiBackend("files", lambda _: "", filesystem="", size=32 * MIB, larger=64 * MIB)
OBJECTS = FILES._replace(name="objects", snapshots=False)


@pytest.fixture(params=[FILES, OBJECTS], ids=["cephfs", "s3"])
def cluster(request: pytest.FixtureRequest, ceph: Ceph) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))
    tables = backend_tables(ceph, folder, group=f"c{secrets.token_hex(4)}")
    backend: CsiBackend = request.param
    with (
        running_volumed(folder, only=True, backends=tables, default_backends=(backend.name,), csi="") as volumed,
        calling(volumed.csi_socket) as caller,
    ):
        volumed.targets.mkdir()
        yield Cluster(volumed, caller, backend)
        assert volumed.api.get("doctor") == []
        assert volumed.mounted() == {}
        assert list((folder / "run" / "helpers").iterdir()) == []
        assert "Traceback" not in volumed.log()
    shutil.rmtree(folder)


def test_a_life(cluster: Cluster) -> None:
    shared = cluster.capability(MODES.MULTI_NODE_MULTI_WRITER)
    volume = cluster.create("pvc-1", volume_capabilities=[shared])
    assert volume.capacity_bytes == cluster.backend.size
    assert list(volume.accessible_topology) == []  # every node reaches it
    cluster.stage(volume.volume_id, shared)
    one = cluster.publish(volume.volume_id, "one", used=shared)
    other = cluster.publish(volume.volume_id, "other", used=shared)
    cluster.write(one, b"kept")
    assert cluster.read(other, 4) == b"kept"
    larger = {"required_bytes": cluster.backend.larger}
    assert cluster.csi.ControllerExpandVolume(volume_id=volume.volume_id, capacity_range=larger).capacity_bytes == (
        cluster.backend.larger
    )
    cluster.volumed.kill()  # its client lives on
    cluster.volumed.start()
    assert cluster.read(other, 4) == b"kept"
    cluster.leave(volume.volume_id, "one", "other")
    cluster.delete(volume.volume_id)
    cluster.delete(volume.volume_id)
