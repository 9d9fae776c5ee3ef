"""What an engine's user does to the containers of a volume in the middle of its move: what it acknowledged is there
afterwards, everybody sees the new place, and each container is what its user made it.

The move is kept waiting at a crash point, so that all of it happens there and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.harness.docker import Docker, running_docker
from tests.harness.volumed import Volumed, running_volumed
from volumed.host import swap
from volumed.units import MIB

pytestmark = [pytest.mark.root, pytest.mark.engine]

# Each appends to a file of its own, syncs, and only then tells that it did. This one has its file open all the time,
# and so has to be stopped.
BUSY = """
trap 'exit 0' TERM
exec 3>>/data/$NAME
while true; do n=$((n+1)); echo $n >&3; sync /data/$NAME; echo $n; usleep 5000; done
"""
# And this one, as a Redis does, when it is told to, and when it ends: it can be frozen.
IDLE = """
exec 2>/dev/null
note() { echo $1 >> /data/$NAME && sync /data/$NAME && echo $1; }
trap 'note ended; exit 0' TERM
note begun
while true; do usleep 20000; if [ -e /go ]; then rm /go; note went-on; fi; done
"""
VOLUME = ("-v", "data:/data")
PATHS = {"tree": ("local", "sized"), "block": ("sized", "other")}


@contextlib.contextmanager
def running_with(docker: Docker, factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    folder = factory.mktemp("disturbed")
    with running_volumed(
        folder,
        plugin_socket=plugin_socket("disturbed"),
        docker_socket=docker.socket,
        backends=f'[backends.other]\ndriver = "image"\npath = "{folder}/other"',
    ) as running:
        yield running
        docker.remove_containers()


@pytest.fixture
def volumed(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    with running_with(docker, tmp_path_factory) as running:
        yield running
        docker.remove_containers()
        docker("volume", "rm", "data")


class Scene:
    """Containers on the volume `data`, and a move of it that waits at a point."""

    def __init__(self, docker: Docker, volumed: Volumed, path: str) -> None:
        self.docker, self.volumed, self.path = docker, volumed, path
        self.there, self.to = PATHS[path]
        self._told: dict[str, list[str]] = {}
        self._gate = volumed.folder / "gate"
        self._users = ThreadPoolExecutor(16)

    def begin(self, point: str, *names: str) -> str:
        """A move that is at the point: its id. The containers came while the most of it was copied, as blocks of a
        volume in use are not."""
        volumed, docker = self.volumed, self.docker
        volumed.stop()
        volumed.start(env={"VOLUMED_WAIT_AT": f"migrate.{point}:{self._gate}"})
        size = ("-o", "size=64m") if self.path == "block" else ()
        docker("volume", "create", "-d", volumed.plugin_socket.stem, "-o", f"backend={self.there}", *size, "data")
        docker("run", "--rm", *VOLUME, "busybox", "dd", "if=/dev/urandom", "of=/data/old", "bs=1M", "count=24")
        body = {"backend": self.to, "path": self.path, "size": 64 * MIB, "bandwidth": MIB // 4}
        migration = str(volumed.api.post("volumes", "data", "migrate", body=body)["id"])
        wait_until(lambda: volumed.api.get("migrations", migration)["phase"] == "seeding")
        for name in names:
            script = BUSY if name.startswith("busy") else IDLE
            words = ("--name", name, "-e", f"NAME={name}", "--stop-timeout", "5", "--restart", "always")
            docker("run", "-d", *words, *VOLUME, "busybox", "sh", "-c", script)
        wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == len(names))
        wait_until(lambda: all(docker("logs", name) for name in names))
        volumed.api.post("migrations", migration, "throttle", body={"bandwidth": None})
        wait_until(self._gate.exists)
        return migration

    def user(self, *words: str) -> Future[str]:
        """Does something to a container, which may have to wait for the move."""
        return self._users.submit(lambda: self.docker(*words, check=False))

    def go_on(self, migration: str) -> dict[str, object]:
        self._gate.unlink()
        *_, ended = self.volumed.api.lines("migrations", migration, "follow")
        return dict(ended)

    def status(self, name: str) -> str:
        """Empty when there is none."""
        return self.docker("ps", "-a", "--filter", f"name=^{name}$", "--format", "{{.State}}")

    def pid(self, name: str) -> int:
        return int(self.docker("inspect", "-f", "{{.State.Pid}}", name))

    def remember_told(self, name: str) -> None:
        """Of one that goes."""
        self._told[name] = self.docker("logs", name).split()

    def assert_nothing_lost(self) -> None:
        for name in self.docker("ps", "-a", "--format", "{{.Names}}").split():
            self.remember_told(name)
        self.docker("run", "--name", "reader", *VOLUME, "-d", "busybox", "sleep", "1000")
        for name, told in self._told.items():
            there = self.docker("exec", "reader", "cat", f"/data/{name}").split()
            assert [line for line in told if line not in there] == [], name

    def assert_moved(self, backend: str) -> None:
        """Whoever runs sees the volume where it is now, and may write."""
        assert self.docker.inspect("data")["Status"]["backend"] == backend
        (volume,) = self.volumed.mounted()
        own = swap.mount_in(os.getpid(), str(self.volumed.state / "mounts" / volume))
        assert own is not None
        for name in self.docker("ps", "--format", "{{.Names}}").split():
            seen = swap.mount_in(self.pid(name), "/data")
            assert seen is not None, name
            assert (seen.device, seen.root, "rw" in seen.options) == (own.device, own.root, True), name
        doctored: Callable[[], object] = lambda: self.volumed.api.get("doctor") == []  # noqa: E731
        wait_until(doctored)


# Before anybody is held, between the plan to do so and doing it, while all are, and past the commit point.
BUSY_ONES = ("busy-restart", "busy-rm", "busy")
ENDED_ONES = ("restart", "stop", "kill", "rm")
ONLY_FROZEN = ("go", "pause", "idle")  # the others are stopped where these are


@pytest.mark.parametrize(
    ("path", "point"),
    [
        *(("tree", point) for point in ("seeded", "planned-hold", "held", "copied", "committed")),
        *(("block", point) for point in ("planned-hold", "hidden")),
    ],
)
def test_containers_are_what_their_user_made_them(docker: Docker, volumed: Volumed, path: str, point: str) -> None:
    scene = Scene(docker, volumed, path)
    idle = (*ENDED_ONES, *(ONLY_FROZEN if path == "tree" else ()))
    migration = scene.begin(point, *BUSY_ONES, *idle)
    held = point not in ("seeded", "planned-hold")
    stopped = held and path == "block"  # all of them
    assert {scene.status(name) for name in BUSY_ONES} == {"exited" if held else "running"}
    assert {scene.status(name) for name in idle} == {"exited" if stopped else "paused" if held else "running"}
    for name in ("busy-rm", "rm"):
        scene.remember_told(name)
    before = {name: Path(f"/proc/{scene.pid(name)}") for name in idle}
    doing = [scene.user("restart", name) for name in ("busy-restart", "restart")]
    doing += [scene.user(what, what) for what in ("stop", "kill", *(("pause",) if path == "tree" else ()))]
    doing += [scene.user("rm", "-f", name) for name in ("busy-rm", "rm")]
    doing.append(scene.user("run", "-d", "--name", "new", "-e", "NAME=new", *VOLUME, "busybox", "sh", "-c", IDLE))
    if not stopped:  # what is to start may have to wait, and what is to end ends
        wait_until(lambda: not any(before[name].exists() for name in ENDED_ONES))
    if path == "tree":
        scene.user("unpause", "go").result()
        (before["go"] / "root/go").touch()
        wait_until(lambda: not (before["go"] / "root/go").exists())
    ended = scene.go_on(migration)
    assert ended["phase"] in ("kept", "done"), ended["error"]
    for each in doing:
        each.result()
    expected = dict.fromkeys((*BUSY_ONES, *idle, "new"), "running")
    expected |= dict.fromkeys(("kill", "stop"), "running" if stopped else "exited")
    expected |= dict.fromkeys(("busy-rm", "rm"), "")
    if path == "tree" and not held:  # of one that is held docker says that it is already
        expected["pause"] = "paused"
    found: dict[str, str] = {}
    with contextlib.suppress(AssertionError):
        wait_until(lambda: found.update((name, scene.status(name)) for name in expected) or found == expected)
    assert found == expected
    docker("unpause", "pause", check=False)
    scene.assert_moved(scene.to)
    scene.assert_nothing_lost()


@pytest.mark.parametrize("point", ["planned-hold", "copied"])
def test_dockerd_is_killed_and_started_while_they_are_held(
    tmp_path_factory: pytest.TempPathFactory, point: str
) -> None:
    """It ends whom it finds alive, and starts them again, as their policy says so."""
    with running_docker() as docker, running_with(docker, tmp_path_factory) as volumed:
        scene = Scene(docker, volumed, "tree")
        migration = scene.begin(point, "busy", "idle")
        docker.kill()
        with ThreadPoolExecutor() as other:
            started = other.submit(docker.start)
            ended = scene.go_on(migration)
            started.result()
        assert ended["phase"] in ("kept", "done"), ended["error"]
        wait_until(lambda: {scene.status(name) for name in ("busy", "idle")} == {"running"})
        scene.assert_moved(scene.to)
        scene.assert_nothing_lost()
