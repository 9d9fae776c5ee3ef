"""A device is copied, and containers mount its file system meanwhile: what they write need not have reached it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.harness.docker import Docker
from tests.harness.volumed import Volumed, running_volumed
from volumed.units import MIB

pytestmark = [pytest.mark.root, pytest.mark.engine]

# Holds no file but while it appends a line, and counts by what is in the file: one that is lost is counted again.
UNSYNCED = """
touch /data/log
while true; do n=$(wc -l < /data/log); echo $((n+1)) >> /data/log; echo $((n+1)); usleep 100000; done
"""


@pytest.fixture
def volumed(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    folder = tmp_path_factory.mktemp("block-moves")
    with running_volumed(
        folder,
        plugin_socket=plugin_socket("block-moves"),
        docker_socket=docker.socket,
        backends=f'[backends.other]\ndriver = "image"\npath = "{folder}/other"',
    ) as running:
        yield running
        docker.remove_containers()
        for volume in docker("volume", "ls", "-q").split():
            docker("volume", "rm", volume)


def slowly_begun(docker: Docker, plugin: str, volumed: Volumed) -> str:
    """A move that nobody disturbs yet, and that takes its time: its id."""
    docker("volume", "create", "-d", plugin, "-o", "backend=sized", "-o", "size=128m", "data")
    docker("run", "--rm", "-v", "data:/data", "busybox", "dd", "if=/dev/urandom", "of=/data/old", "bs=1M", "count=24")
    begun = volumed.api.post(
        "volumes", "data", "migrate", body={"backend": "other", "path": "block", "bandwidth": MIB // 4}
    )
    wait_until(lambda: volumed.api.get("migrations", begun["id"])["phase"] == "seeding")
    return str(begun["id"])


def followed(volumed: Volumed, migration: str) -> dict[str, object]:
    *_, last = volumed.api.lines("migrations", migration, "follow")
    return dict(last)


def test_what_was_only_in_memory_is_there_at_the_new_place(docker: Docker, plugin: str, volumed: Volumed) -> None:
    migration = slowly_begun(docker, plugin, volumed)
    docker("run", "-d", "--name", "counter", "-v", "data:/data", "busybox", "sh", "-c", UNSYNCED)
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 1)
    volumed.api.post("migrations", migration, "throttle", body={"bandwidth": None})
    ended = followed(volumed, migration)
    assert ended["phase"] in ("kept", "done"), ended["error"]
    assert docker.inspect("data")["Status"]["backend"] == "other"
    wait_until(lambda: docker("inspect", "-f", "{{.State.Status}}", "counter") == "running")
    told = len(docker("logs", "counter").split())
    wait_until(lambda: len(docker("logs", "counter").split()) > told)
    docker("stop", "-t", "0", "counter")
    counted = [int(word) for word in docker("logs", "counter").split()]
    assert counted == list(range(1, len(counted) + 1))


def test_a_device_that_is_mounted_elsewhere_is_not_copied(docker: Docker, plugin: str, volumed: Volumed) -> None:
    """By somebody of whom volumed knows nothing: the move waits, and goes on when they have let go."""
    migration = slowly_begun(docker, plugin, volumed)
    docker("run", "-d", "--name", "known", "-v", "data:/data", "busybox", "sleep", "1000")
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 1)
    (path,) = volumed.mounted()
    docker("run", "-d", "--name", "stranger", "-v", f"{volumed.state}/mounts/{path}:/data", "busybox", "sleep", "1000")
    volumed.api.post("migrations", migration, "throttle", body={"bandwidth": None})
    wait_until(lambda: "still held" in volumed.api.get("migrations", migration)["error"])
    assert docker.inspect("data")["Status"]["backend"] == "sized"
    docker("rm", "-f", "stranger")
    ended = followed(volumed, migration)
    assert ended["phase"] in ("kept", "done"), ended["error"]
    wait_until(lambda: docker("inspect", "-f", "{{.State.Status}}", "known") == "running")
