"""A container and a publication on Gluster; then the client that serves both is killed, and both go on."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.harness.csi import calling, capability
from tests.harness.docker import Docker
from tests.harness.gluster import Gluster, running_gluster
from tests.harness.volumed import Volumed, running_volumed
from volumed.host.linux import LinuxHost

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def gluster(folder: Path) -> Iterator[Gluster]:
    with running_gluster(folder / "server") as running:
        running.make_volume("files")
        yield running


@pytest.fixture(scope="module")
def volumed(docker: Docker, folder: Path, gluster: Gluster) -> Iterator[Volumed]:
    table = f'[backends.shared]\ndriver = "gluster"\nservers = ["{gluster.address}"]\nvolume = "files"\n'
    with running_volumed(
        folder / "v",
        plugin_socket=plugin_socket("gluster"),
        docker_socket=docker.socket,
        only=True,
        backends=table,
        default_backends=("shared",),
        csi="",
    ) as running:
        running.targets.mkdir()
        yield running
        docker.remove_containers()
        host = LinuxHost(running.folder / "run")
        for entry in host.mounts():
            if entry.target.is_relative_to(running.folder):
                host.unmount_network(entry.target, force=True)
        for helper in host.helpers(""):
            host.stop_helper(helper.name)


def client(volumed: Volumed) -> int:
    (helper,) = [helper for helper in LinuxHost(volumed.folder / "run").helpers("gluster-") if helper.running]
    return helper.pid


def test_both_outlive_the_daemon_and_the_client(docker: Docker, volumed: Volumed, plugin: str) -> None:
    docker("volume", "create", "-d", plugin, "data")
    docker(
        *("run", "-d", "--name", "web-1", "-v", "data:/data", "busybox"),
        *("sh", "-c", "trap exit TERM; while :; do sleep 0.1; done"),
    )
    docker("exec", "web-1", "sh", "-c", "echo kept > /data/file")
    target = volumed.targets / "target"
    with calling(volumed.csi_socket) as csi:
        used = {"volume_capability": capability()}
        volume = csi.CreateVolume(name="pvc-1", volume_capabilities=[capability()]).volume
        staging = volumed.targets / "staging"
        staging.mkdir()
        csi.NodeStageVolume(volume_id=volume.volume_id, staging_target_path=str(staging), **used)
        csi.NodePublishVolume(
            volume_id=volume.volume_id, staging_target_path=str(staging), target_path=str(target), **used
        )
        (target / "file").write_text("published")

        before = client(volumed)
        volumed.kill()
        assert (target / "file").read_text() == "published"
        assert docker("exec", "web-1", "cat", "/data/file") == "kept"
        volumed.start()
        assert client(volumed) == before

        os.kill(before, signal.SIGKILL)
        wait_until(lambda: {"helper.died", "helper.restarted"} & {event["kind"] for event in volumed.events()})
        wait_until(lambda: docker("exec", "web-1", "cat", "/data/file", check=False) == "kept", timeout=60)
        wait_until(lambda: read(target / "file") == "published", timeout=60)
        assert client(volumed) != before
        docker("exec", "web-1", "sh", "-c", "echo more >> /data/file")

        csi.NodeUnpublishVolume(volume_id=volume.volume_id, target_path=str(target))
        csi.NodeUnstageVolume(volume_id=volume.volume_id, staging_target_path=str(staging))
        csi.DeleteVolume(volume_id=volume.volume_id)
    docker("rm", "-f", "web-1")
    wait_until(lambda: volumed.bindings() == [])
    docker("volume", "rm", "data")
    assert volumed.mounted() == {}
    assert volumed.targets_mounted() == []
    assert volumed.api.get("doctor") == []


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
