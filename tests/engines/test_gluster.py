"""Containers on Gluster: the client that serves them is killed, or their move meets a dead server when it switches."""

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
from tests.engines.test_docker_moves import WRITER
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
    table = f'''
[backends.shared]
driver = "gluster"
servers = ["{gluster.address}"]
volume = "files"
[backends.local]
driver = "directory"
path = "{folder}/local"
'''
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


@pytest.mark.parametrize(("name", "point"), [("writer", "migrate.committed"), ("idle", "migrate.proven")])
def test_its_containers_go_back_when_the_new_place_dies_right_after_the_switch(
    name: str, point: str, docker: Docker, volumed: Volumed, gluster: Gluster, plugin: str
) -> None:
    """An idle one was frozen, a busy one stopped. The daemon dies with the server, and once more on the way back."""
    docker("volume", "create", "-d", plugin, "-o", "backend=local", "data")
    script = WRITER if name == "writer" else "while true; do date +%s%N >> /data/log; sleep 0.1; done"
    docker("run", "-d", "--name", name, "--stop-timeout", "2", "-v", "data:/data", "busybox", "sh", "-c", script)
    wait_until(lambda: any(binding["consumers"] for binding in volumed.bindings()))
    settings = volumed.config.read_text()
    volumed.config.write_text(f'operation-timeout = "2s"\n{settings}')
    volumed.stop()
    volumed.start(env={"VOLUMED_CRASH_AT": point})
    wait_until(lambda: any(binding["consumers"] for binding in volumed.bindings()))
    begun = volumed.api.post("volumes", "data", "migrate", body={"backend": "shared"})
    assert volumed.wait_end() == -9, volumed.log()[-3000:]
    gluster.kill_brick("files")
    try:
        volumed.start(env={"VOLUMED_CRASH_AT": "migrate.fell-back"})
        assert volumed.wait_end(timeout=120) == -9, volumed.log()[-3000:]
        volumed.start()
        wait_until(lambda: docker("ps", "-q", "--filter", "status=running"), timeout=60)
        assert docker.inspect("data")["Status"]["backend"] == "local"
        size = docker("exec", name, "wc", "-l", "/data/log")
        wait_until(lambda: docker("exec", name, "wc", "-l", "/data/log") != size)
        assert volumed.api.get("migrations", begun["id"])["phase"] == "aborting"
    finally:
        volumed.config.write_text(settings)
        gluster.revive_brick("files")
    *_, ended = volumed.api.lines("migrations", begun["id"], "follow")
    assert ended["phase"] == "failed", ended
    assert "backend shared failed after the switch" in ended["error"]
    if name == "writer":
        acknowledged = [int(line) for line in docker("logs", name).splitlines()]
        there = docker("exec", name, "cat", "/data/log").split()
        assert there == [str(number) for number in range(1, len(there) + 1)]
        assert max(acknowledged) <= len(there)
    docker("rm", "-f", name)
    wait_until(lambda: volumed.bindings() == [])
    docker("volume", "rm", "data")
    wait_until(lambda: volumed.mounted() == {})
    assert volumed.api.get("doctor") == []
    assert list((gluster.folder / "bricks" / "files").glob("v*")) == []


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
