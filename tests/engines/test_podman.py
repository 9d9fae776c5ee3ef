"""Podman as a client of the same plugin: no daemon, one mount id for everybody, and counting of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.harness.podman import Podman, podman_with
from tests.harness.processes import pids_with
from tests.harness.volumed import Volumed, running_volumed
from volumed.core.consumers.podman import PodmanSource
from volumed.host.linux import LinuxHost
from volumed.host.run import ENVIRONMENT

pytestmark = [pytest.mark.root, pytest.mark.engine]

LOOP = "trap exit TERM; while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Podman, Volumed]]:
    """Each must know of the other: volumed which podman to ask, Podman which socket to call."""
    socket = plugin_socket("podman")
    folder = tmp_path_factory.mktemp("volumed")
    with (
        podman_with(driver=socket.stem, plugin_socket=socket) as podman,
        running_volumed(folder, plugin_socket=socket, podman=podman.arguments) as volumed,
    ):
        yield podman, volumed
        podman.remove_containers()


@pytest.fixture
def podman(both: tuple[Podman, Volumed]) -> Podman:
    return both[0]


@pytest.fixture
def volumed(both: tuple[Podman, Volumed]) -> Iterator[Volumed]:
    podman, volumed = both
    yield volumed
    podman.remove_containers()
    wait_until(lambda: volumed.bindings() == [])
    wait_until(lambda: volumed.mounted() == {} and volumed.loops() == [])
    for volume in podman("volume", "ls", "-q").split():
        podman("volume", "rm", volume)
    volumed.assert_nothing_left()


def start(podman: Podman, name: str) -> str:
    return podman("run", "-d", "--net=none", "--name", name, "-v", "data:/data", "busybox", "sh", "-c", LOOP)


def create(podman: Podman, volumed: Volumed, *options: str) -> None:
    words = [word for option in options for word in ("-o", option)]
    podman("volume", "create", "--driver", volumed.plugin_socket.stem, *words, "data")


@pytest.mark.parametrize("options", [(), ("size=64m",)])
def test_data_outlives_its_container(podman: Podman, volumed: Volumed, options: tuple[str, ...]) -> None:
    create(podman, volumed, *options)
    for script, said in (("echo kept > /data/file", ""), ("cat /data/file", "kept")):
        assert podman("run", "--rm", "--net=none", "-v", "data:/data", "busybox", "sh", "-c", script) == said
    assert volumed.mounted() == {}


def test_who_uses_it(podman: Podman, volumed: Volumed) -> None:
    """Several containers behind Podman's one mount id are all named."""
    create(podman, volumed)
    ids = {start(podman, "one"), start(podman, "two")}
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 2)
    (binding,) = volumed.bindings()
    assert binding["engine"] == "podman"
    assert {consumer["id"] for consumer in binding["consumers"]} == ids
    assert {consumer["name"] for consumer in binding["consumers"]} == {"one", "two"}
    assert all(consumer["target"] == "/data" and consumer["pid"] for consumer in binding["consumers"])
    podman("rm", "-f", "--time", "0", "one")
    wait_until(lambda: [consumer["name"] for consumer in volumed.bindings()[0]["consumers"]] == ["two"])
    assert len(volumed.mounted()) == 1


def test_volumed_killed_and_back(podman: Podman, volumed: Volumed) -> None:
    create(podman, volumed, "size=64m")
    start(podman, "one")
    podman("exec", "one", "sh", "-c", "echo kept > /data/file")
    volumed.kill()
    assert podman("exec", "one", "cat", "/data/file") == "kept"
    volumed.start()
    assert len(volumed.bindings()) == 1
    assert podman("exec", "one", "cat", "/data/file") == "kept"


def watchers(podman: Podman) -> list[int]:
    return pids_with(" ".join([*podman.arguments, "events"]))


def test_what_watches_podman_ends_with_a_daemon_that_is_killed(podman: Podman, volumed: Volumed) -> None:
    wait_until(lambda: len(watchers(podman)) == 1, timeout=60)
    volumed.kill()
    try:
        wait_until(lambda: watchers(podman) == [], timeout=60)
    finally:
        volumed.start()
    wait_until(lambda: len(watchers(podman)) == 1, timeout=60)


def test_it_is_watched_with_no_other_program_beside_it(
    podman: Podman, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = shutil.which("podman")
    assert found is not None
    (tmp_path / "podman").symlink_to(found)
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(tmp_path))
    heard, stop = threading.Event(), threading.Event()
    source = PodmanSource(LinuxHost(), "podman", arguments=podman.arguments, driver_names=frozenset())
    watching = threading.Thread(target=source.watch, args=(heard.set, stop))

    def is_heard() -> bool:
        podman("run", "--rm", "--net=none", "busybox", "true")
        return heard.wait(1)

    watching.start()
    try:
        wait_until(is_heard, timeout=60)
    finally:
        stop.set()
        watching.join()


def test_a_container_that_crashed(podman: Podman, volumed: Volumed) -> None:
    """Its process is killed; Podman's clean-up sends the Unmount, or the binding is dropped: either way it ends."""
    create(podman, volumed)
    start(podman, "one")
    podman("kill", "--signal", "KILL", "one")
    wait_until(lambda: volumed.bindings() == [])
    wait_until(lambda: volumed.mounted() == {})


def test_podmans_view(podman: Podman, volumed: Volumed) -> None:
    create(podman, volumed, "label.team=web")
    found = podman.inspect("data")
    assert found["Driver"] == volumed.plugin_socket.stem
    assert found["Status"]["labels"] == {"team": "web"}


def test_an_error_is_shown(podman: Podman, volumed: Volumed) -> None:
    said = podman("volume", "create", "--driver", volumed.plugin_socket.stem, "-o", "sise=1g", "wrong", check=False)
    assert "did you mean 'size'" in said


def test_a_mount_that_failed_is_not_held(podman: Podman, volumed: Volumed) -> None:
    """Podman sends an Unmount after it; that must do no harm."""
    create(podman, volumed)
    (volume,) = volumed.api.get("volumes")["volumes"]
    data = volumed.folder / "volumes" / volume["id"]
    data.rename(volumed.folder / "aside")
    said = podman("run", "--rm", "--net=none", "-v", "data:/data", "busybox", "true", check=False)
    assert "is gone" in said
    assert volumed.bindings() == []
    (volumed.folder / "aside").rename(data)


# Appends, syncs, and only then tells that it did.
WRITER = """
trap 'exit 0' TERM
exec 2>/dev/null
while true; do n=$((n+1)); echo $n >> /data/$NAME && sync /data/$NAME && echo $n; sleep 0.05; done
"""


@pytest.mark.parametrize("point", ["planned-hold", "copied"])
def test_containers_that_come_and_go_while_it_is_moved(podman: Podman, volumed: Volumed, point: str) -> None:
    """Podman asks for a mount only for the first container of a volume."""
    gate = volumed.folder / "gate"
    volumed.stop()
    volumed.start(env={"VOLUMED_WAIT_AT": f"migrate.{point}:{gate}"})
    create(podman, volumed, "backend=local")

    def run(name: str) -> None:
        options = ("--net=none", "--stop-timeout", "5", "--name", name, "-e", f"NAME={name}", "-v", "data:/data")
        podman("run", "-d", *options, "busybox", "sh", "-c", WRITER)

    for name in ("other", "restarted", "removed"):
        run(name)
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 3)
    begun = volumed.api.post("volumes", "data", "migrate", body={"backend": "sized", "size": 64 << 20})
    wait_until(gate.exists)
    told = {"removed": podman("logs", "removed").split()}
    podman("restart", "restarted", check=False)  # one that is frozen it does not
    podman("rm", "-f", "--time", "0", "removed")
    run("new")
    gate.unlink()
    *_, ended = volumed.api.lines("migrations", begun["id"], "follow")
    assert ended["phase"] in ("kept", "done"), ended["error"]
    assert podman.inspect("data")["Status"]["backend"] == "sized"
    running = {"other", "restarted", "new"}
    wait_until(lambda: set(podman("ps", "--format", "{{.Names}}").split()) == running)
    podman("stop", "--all")
    told |= {name: podman("logs", name).split() for name in running}
    for name, lines in told.items():
        there = podman("run", "--rm", "--net=none", "-v", "data:/data", "busybox", "cat", f"/data/{name}").split()
        assert set(lines) <= set(there), name
    volumed.api.post("migrations", begun["id"], "finish")
