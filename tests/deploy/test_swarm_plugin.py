"""volumed as a managed plugin of a real dockerd, spoken to as Swarm's agent does; and as a container image."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.harness.csi import calling, capability
from tests.harness.docker import PLUGINS, Docker, running_docker
from volumed.host.filesystems import has_capability

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    with running_docker() as running:
        yield running


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare system in it is made once for each version of the script."""
    script = ROOT / "deploy" / "image" / "build-rootfs"
    base = ROOT / ".cache" / "image" / f"{hashlib.sha256(script.read_bytes()).hexdigest()[:16]}.tar"
    base.parent.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("image") / "rootfs"
    sh("env", f"BASE={base}", script, folder)
    return folder


@pytest.fixture
def state() -> Iterator[Path]:
    """On the machine, as the plugin sees it."""
    folder = Path(f"/var/lib/volumed-test-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    yield folder
    for path in (folder / "mounts").glob("*"):
        subprocess.run(["umount", path], check=False, capture_output=True)
    shutil.rmtree(folder)


def test_the_image_runs(docker: Docker, rootfs: Path) -> None:
    archive = subprocess.Popen(["tar", "-C", rootfs, "-c", "."], stdout=subprocess.PIPE)
    subprocess.run(
        ["docker", "-H", f"unix://{docker.socket}", "import", "-c", 'ENTRYPOINT ["volumed"]', "-", "volumed:test"],
        stdin=archive.stdout,
        check=True,
        capture_output=True,
    )
    assert archive.wait() == 0
    assert docker("run", "--rm", "--net=none", "volumed:test", "--version").startswith("volumed ")
    assert docker("run", "--rm", "--net=none", "--entrypoint", "volumectl", "volumed:test", "--help")


def shipped(tmp_path: Path) -> Path:
    """As it is shipped; where this machine's own root lacks an ability (CAP_SYS_RESOURCE, in most build containers), no
    plugin can be given it: then without."""
    folder = tmp_path / "swarm"
    shutil.copytree(ROOT / "deploy" / "swarm", folder)
    config = json.loads((folder / "config.json").read_text())
    wanted = config["linux"]["capabilities"]
    assert "CAP_SYS_ADMIN" in wanted
    config["linux"]["capabilities"] = [name for name in wanted if name != "CAP_SYS_RESOURCE" or has_capability(24)]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_swarms_plugin(docker: Docker, rootfs: Path, state: Path, tmp_path: Path) -> None:
    name = "volumed:test"
    subprocess.run(
        [shipped(tmp_path) / "create-plugin", name],
        env={**os.environ, "DOCKER_HOST": f"unix://{docker.socket}", "ROOTFS": str(rootfs)},
        check=True,
    )
    docker("plugin", "set", name, f"state.source={state}")
    docker("plugin", "enable", name)
    try:
        plugin = docker("plugin", "inspect", "-f", "{{.Id}}", name)
        # Docker 20 has one place for all engines of a machine.
        places = [folder / plugin / "volumed.sock" for folder in (PLUGINS, docker.folder / "exec" / "plugins")]
        wait_until(lambda: any(place.exists() for place in places))
        socket = next(place for place in places if place.exists())
        published = docker.folder / "data" / "plugins" / plugin / "propagated-mount"
        with calling(socket) as caller:
            info = caller.NodeGetInfo(timeout=60)
            used = capability()
            volume_id = caller.CreateVolume(
                name="web-data", volume_capabilities=[used], capacity_range={"required_bytes": 64 << 20}
            ).volume.volume_id
            asked = {"volume_id": volume_id, "volume_capability": used}
            caller.ControllerPublishVolume(**asked, node_id=info.node_id)
            staging, target = f"/data/staged/{volume_id}", f"/data/published/{volume_id}"
            caller.NodeStageVolume(**asked, staging_target_path=staging)
            caller.NodePublishVolume(**asked, staging_target_path=staging, target_path=target)
            # What Swarm gives a container is what arrived on the machine.
            arrived = published / "published" / volume_id
            assert arrived.is_mount()
            (arrived / "file").write_text("kept")
            caller.NodeUnpublishVolume(volume_id=volume_id, target_path=target)
            assert not arrived.is_mount()
            caller.NodeUnstageVolume(volume_id=volume_id, staging_target_path=staging)
            caller.ControllerUnpublishVolume(volume_id=volume_id, node_id=info.node_id)
            caller.DeleteVolume(volume_id=volume_id)
            assert list((state / "images").iterdir()) == []
    finally:
        docker("plugin", "disable", "-f", name)
        docker("plugin", "rm", "-f", name)
