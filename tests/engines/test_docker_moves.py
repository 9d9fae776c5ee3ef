"""A volume is moved while containers use it: Docker's names stay, nothing acknowledged is lost, all run afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.harness.docker import Docker
from tests.harness.volumed import Volumed

pytestmark = [pytest.mark.root, pytest.mark.engine]

# Appends a line, syncs, and only then tells that it did: what it told must be there after any move.
WRITER = """
n=$(tail -n 1 /data/log 2>/dev/null || echo 0)
trap 'exit 0' TERM
exec 3>>/data/log
while true; do n=$((n+1)); echo $n >&3; sync /data/log; echo $n; done
"""


@pytest.fixture(autouse=True)
def _nothing_left(docker: Docker, volumed: Volumed) -> Iterator[None]:
    yield
    docker.remove_containers()
    wait_until(lambda: volumed.bindings() == [])
    for volume in docker("volume", "ls", "-q").split():
        docker("volume", "rm", volume)
    for migration in volumed.api.get("migrations"):
        if migration["phase"] == "kept":
            volumed.api.post("migrations", migration["id"], "finish")
    wait_until(lambda: volumed.mounted() == {} and volumed.loops() == [])


def move(volumed: Volumed, name: str, to: str, **body: Any) -> dict[str, Any]:
    begun = volumed.api.post("volumes", name, "migrate", body={"backend": to, **body})
    *_, last = volumed.api.lines("migrations", begun["id"], "follow")
    return dict(last)


def grown(docker: Docker, before: str) -> bool:
    return docker("exec", "idle", "wc", "-l", "/data/log") != before


def known(volumed: Volumed, count: int) -> None:
    """Which containers use the volumes."""
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == count)


def test_a_busy_container_is_restarted_and_nothing_it_acknowledged_is_lost(
    docker: Docker, plugin: str, volumed: Volumed
) -> None:
    docker("volume", "create", "-d", plugin, "-o", "backend=local", "data")
    docker("run", "-d", "--name", "writer", "--stop-timeout", "2", "-v", "data:/data", "busybox", "sh", "-c", WRITER)
    docker(
        "run", "--rm", "-v", "data:/data", "busybox", "sh", "-c", "for i in $(seq 500); do echo $i > /data/f$i; done"
    )
    known(volumed, 1)
    ended = move(volumed, "data", "sized", size=256 << 20)
    assert ended["phase"] in ("kept", "done"), ended["error"]
    assert docker.inspect("data")["Status"]["backend"] == "sized"
    wait_until(lambda: docker("inspect", "-f", "{{.State.Status}}", "writer") == "running")
    told = len(docker("logs", "writer").splitlines())
    wait_until(lambda: len(docker("logs", "writer").splitlines()) > told)
    docker("stop", "writer")
    acknowledged = [int(line) for line in docker("logs", "writer").splitlines()]
    there = docker("run", "--rm", "-v", "data:/data", "busybox", "cat", "/data/log").split()
    assert there == [str(number) for number in range(1, len(there) + 1)]
    assert len(acknowledged) > 10
    assert max(acknowledged) <= len(there)
    assert ended["pause"] > 0


def test_an_idle_container_sees_the_new_place_without_a_restart(docker: Docker, plugin: str, volumed: Volumed) -> None:
    docker("volume", "create", "-d", plugin, "-o", "backend=local", "data")
    docker(
        *("run", "-d", "--name", "idle", "-v", "data:/data", "busybox", "sh", "-c"),
        "while true; do date +%s%N >> /data/log; sleep 0.2; done",
    )
    known(volumed, 1)
    pid = docker("inspect", "-f", "{{.State.Pid}}", "idle")
    for there, more in (("sized", {"size": 64 << 20}), ("local", {"accept_loss": ["size"]})):
        ended = move(volumed, "data", there, **more)
        assert ended["phase"] in ("kept", "done"), ended["error"]
        assert docker.inspect("data")["Status"]["backend"] == there
        before = docker("exec", "idle", "wc", "-l", "/data/log")
        wait_until(partial(grown, docker, before))
        assert docker("inspect", "-f", "{{.State.Pid}}", "idle") == pid
        assert len(volumed.mounted()) == 1
    assert docker("run", "--rm", "-v", "data:/data", "busybox", "sort", "-c", "/data/log") == ""


@pytest.mark.parametrize(
    "point",
    [
        *("migrate.planned-hold", "migrate.held", "migrate.copied", "migrate.closed"),
        *("migrate.committed", "migrate.hidden", "migrate.shown"),
    ],
)
def test_killed_while_containers_are_held_all_come_back(
    point: str, docker: Docker, plugin: str, volumed: Volumed
) -> None:
    """At either place, with all they acknowledged; the move goes on by itself."""
    docker("volume", "create", "-d", plugin, "-o", "backend=local", "data")
    docker("run", "-d", "--name", "idle", "-v", "data:/data", "busybox", "sleep", "1000")
    docker("run", "-d", "--name", "writer", "--stop-timeout", "2", "-v", "data:/data", "busybox", "sh", "-c", WRITER)
    known(volumed, 2)
    volumed.stop()
    volumed.start(env={"VOLUMED_CRASH_AT": point})
    known(volumed, 2)
    begun = volumed.api.post("volumes", "data", "migrate", body={"backend": "sized", "size": 128 << 20})
    assert volumed.wait_end() == -9, volumed.log()[-3000:]
    volumed.start()
    *_, ended = volumed.api.lines("migrations", begun["id"], "follow")
    assert ended["phase"] in ("kept", "done"), ended["error"]
    wait_until(lambda: running(docker) == {"idle", "writer"})
    told = len(docker("logs", "writer").splitlines())
    wait_until(lambda: len(docker("logs", "writer").splitlines()) > told)
    docker("stop", "writer")
    acknowledged = [int(line) for line in docker("logs", "writer").splitlines()]
    there = docker("exec", "idle", "cat", "/data/log").split()
    assert there == [str(number) for number in range(1, len(there) + 1)]
    assert max(acknowledged) <= len(there)


def running(docker: Docker) -> set[str]:
    return set(docker("ps", "--filter", "status=running", "--format", "{{.Names}}").split())
