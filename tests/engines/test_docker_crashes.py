"""dockerd and volumed killed under running containers: what Docker does then was measured, and each way is borne."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.harness.docker import Docker, running_docker
from tests.harness.volumed import Volumed, running_volumed

pytestmark = [pytest.mark.root, pytest.mark.engine]

LOOP = "trap exit TERM; while :; do echo x >> /data/log; sleep 0.05; done"


@pytest.fixture(params=[False, True], ids=["no-live-restore", "live-restore"])
def live_restore(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def docker(live_restore: bool) -> Iterator[Docker]:
    with running_docker(live_restore=live_restore) as running:
        yield running


@pytest.fixture
def volumed(docker: Docker, tmp_path: Path) -> Iterator[Volumed]:
    with running_volumed(
        tmp_path / "volumed", plugin_socket=plugin_socket("crash"), docker_socket=docker.socket
    ) as running:
        yield running
        docker.remove_containers()


def start(docker: Docker, volumed: Volumed, *options: str) -> None:
    docker("volume", "create", "-d", volumed.plugin_socket.stem, "-o", "size=64m", "data")
    docker("run", "-d", "--name", "web-1", "-v", "data:/data", *options, "busybox", "sh", "-c", LOOP)


def finish(docker: Docker, volumed: Volumed) -> None:
    """The container goes, its binding and mount follow, the volume can be removed, nothing is left."""
    docker("rm", "-f", "web-1")
    wait_until(lambda: volumed.bindings() == [])
    wait_until(lambda: volumed.mounted() == {} and volumed.loops() == [])
    docker("volume", "rm", "data")
    volumed.assert_nothing_left()


def lines(docker: Docker) -> int:
    return int(docker("exec", "web-1", "wc", "-l", "/data/log").split()[0])


@pytest.mark.parametrize("restart", ["no", "always"])
def test_dockerd_killed(docker: Docker, volumed: Volumed, restart: str) -> None:
    """Without a restart policy no Unmount ever comes; with one the old id comes again; with live-restore nothing."""
    start(docker, volumed, "--restart", restart)
    before = lines(docker)
    docker.kill()
    docker.start()
    if restart == "always" or docker("ps", "-q"):
        wait_until(lambda: docker("ps", "-q") != "")
        assert lines(docker) >= before
        assert len(volumed.mounted()) == 1
    finish(docker, volumed)


def test_volumed_killed_under_a_running_container(docker: Docker, volumed: Volumed) -> None:
    start(docker, volumed)
    wait_until(lambda: volumed.bindings()[0]["consumers"])
    bindings, mounted = volumed.bindings(), volumed.mounted()
    before = lines(docker)
    volumed.kill()
    assert lines(docker) >= before  # its container does not notice
    volumed.start()
    assert volumed.bindings() == bindings
    assert volumed.mounted() == mounted
    assert lines(docker) > before
    docker("restart", "-t", "0", "web-1")
    assert lines(docker) > before
    finish(docker, volumed)


def test_volumed_stopped_and_started_disturbs_nobody(docker: Docker, volumed: Volumed) -> None:
    start(docker, volumed)
    assert volumed.stop() == 0
    assert len(volumed.mounted()) == 1
    volumed.start()
    assert docker("exec", "web-1", "sh", "-c", "tail -1 /data/log") == "x"
    finish(docker, volumed)


def test_a_container_that_went_while_volumed_was_away(docker: Docker, volumed: Volumed) -> None:
    """Docker gives up its Unmount; the binding is dropped when volumed is back."""
    start(docker, volumed)
    volumed.kill()
    docker("rm", "-f", "web-1", check=False)
    volumed.start()
    docker("rm", "-f", "web-1", check=False)
    wait_until(lambda: volumed.bindings() == [])
    wait_until(lambda: volumed.mounted() == {})
    docker("volume", "rm", "data")
    volumed.assert_nothing_left()


def test_bindings_stand_while_docker_cannot_be_asked(docker: Docker, volumed: Volumed) -> None:
    start(docker, volumed)
    wait_until(lambda: volumed.bindings()[0]["consumers"])
    docker.kill()
    bindings = volumed.bindings()
    volumed.kill()
    volumed.start()
    import time  # noqa: PLC0415

    time.sleep(3)  # three times the grace of these tests
    assert volumed.bindings() == bindings
    docker.start()
    finish(docker, volumed)


def test_both_killed_at_once(docker: Docker, volumed: Volumed) -> None:
    start(docker, volumed, "--restart", "always")
    before = lines(docker)
    volumed.kill()
    docker.kill()
    volumed.start()
    docker.start()
    wait_until(lambda: docker("ps", "-q") != "")
    assert lines(docker) >= before
    finish(docker, volumed)
