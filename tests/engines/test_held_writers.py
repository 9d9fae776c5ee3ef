"""Containers held still for the end of a move, with a real dockerd: who sees the new place, who was as it was."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.conftest import wait_until
from tests.harness.docker import Docker, running_docker
from tests.harness.podman import podman_with
from volumed.errors import HostError, InUse
from volumed.host import mounts, swap
from volumed.host.linux import LinuxHost
from volumed.migration.movers.mover import Busy
from volumed.migration.writers.containers import ContainerWriters, Held
from volumed.migration.writers.engines import DockerEngine, PodmanEngine
from volumed.model import Binding, Consumer, Engine, VolumeId, now

pytestmark = [pytest.mark.root, pytest.mark.engine]

BUSY = "exec 3>>/data/log; while true; do echo $((n=n+1)) >&3; sleep 0.05; done"


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    with running_docker() as docker:
        yield docker


class Place:
    """A volume's path, showing its old place, and later its new one."""

    def __init__(self, folder: Path) -> None:
        self.path, self.old, self.new = folder / "path", folder / "old", folder / "new"
        for each in (self.path, self.old, self.new):
            each.mkdir()
        mounts.bind(self.old, self.path, readonly=False, options=())
        (self.old / "where").write_text("old")
        (self.new / "where").write_text("new")

    def move(self) -> None:
        mounts.unmount(self.path)
        mounts.bind(self.new, self.path, readonly=False, options=())


@pytest.fixture
def place(tmp_path: Path, docker: Docker) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    docker.remove_containers()
    mounts.unmount(place.path)


def writers(docker: Docker, place: Place, *containers: str) -> ContainerWriters:
    bindings = []
    for each in containers:
        told = docker("inspect", "--format", "{{.Id}} {{range .Mounts}}{{.RW}}{{end}}", each)
        identifier, writable = told.split()
        consumer = Consumer(id=identifier, name=each, image="", pid=0, target="/data", readonly=writable != "true")
        bindings.append(
            Binding(
                volume_id=VolumeId("v"),
                node="node-1",
                engine=Engine.DOCKER,
                mount_id=each,
                since=now(),
                consumers=(consumer,),
            )
        )
    return ContainerWriters([DockerEngine(docker.socket)], place.path, bindings, freeze=True)


def ignore(_: bytes) -> None:
    pass


def hold(held: ContainerWriters) -> bytes:
    """The plan with what was done."""
    noted = [held.plan()]
    held.hold(noted[0], noted.append)
    return noted[-1]


def run(docker: Docker, place: Place, name: str, command: str, *options: str, mode: str = "") -> None:
    docker("run", "-d", "--name", name, *options, "-v", f"{place.path}:/data{mode}", "busybox", "sh", "-c", command)


def status(docker: Docker, name: str) -> str:
    return docker("inspect", "--format", "{{.State.Status}}", name)


def pid(docker: Docker, name: str) -> str:
    return docker("inspect", "--format", "{{.State.Pid}}", name)


def test_an_idle_container_never_notices(docker: Docker, place: Place) -> None:
    run(docker, place, "idle", "while true; do sleep 0.1; done")
    run(docker, place, "reader", "while true; do sleep 0.1; done", mode=":ro")
    run(docker, place, "fleeting", "while true; do sleep 0.1; done", "--rm")
    before = {name: pid(docker, name) for name in ("idle", "reader", "fleeting")}
    held = writers(docker, place, *before)
    assert [line.split()[2] for line in held.describe(held.plan())] == ["idle", "reader", "fleeting"]
    plan = hold(held)
    assert {status(docker, name) for name in before} == {"paused"}
    place.move()
    assert held.release(plan, ignore, moved=True) == []
    assert {status(docker, name) for name in before} == {"running"}
    assert {name: pid(docker, name) for name in before} == before
    for name in before:
        assert docker("exec", name, "cat", "/data/where") == "new"
    docker("exec", "idle", "sh", "-c", "echo written > /data/file")
    assert (place.new / "file").read_text() == "written\n"
    assert not (place.old / "file").exists()
    assert "Read-only" in docker("exec", "reader", "touch", "/data/file", check=False)
    docker("restart", "-t", "0", "idle")
    assert docker("exec", "idle", "cat", "/data/where") == "new"


@pytest.mark.parametrize("moved", [False, True])
def test_sealed_it_cannot_write_to_the_old_place_until_it_is_let_go(docker: Docker, place: Place, moved: bool) -> None:
    """Also when the old place is shown again, as the new one failed."""
    run(docker, place, "idle", "while true; do sleep 0.1; done")
    run(docker, place, "reader", "while true; do sleep 0.1; done", mode=":ro")
    held = writers(docker, place, "idle", "reader")
    plan = hold(held)
    docker("unpause", "idle")
    docker("exec", "-d", "idle", "sh", "-c", "exec 3>>/data/file; while [ ! -e /closed ]; do sleep 0.05; done")
    wait_until((place.old / "file").exists)
    with pytest.raises(Busy, match="idle: was let go, and writes"):
        held.seal(plan)
    docker("exec", "idle", "touch", "/closed")
    idle = int(pid(docker, "idle"))
    wait_until(lambda: not swap.users(idle, mounted) if (mounted := swap.mount_in(idle, "/data")) else False)
    held.seal(plan)
    assert "Read-only" in docker("exec", "idle", "touch", "/data/file", check=False)
    again = writers(docker, place)  # by a daemon that knows the plan alone
    assert again.release(plan, ignore, moved=moved) == []
    docker("exec", "idle", "touch", "/data/file")
    assert "Read-only" in docker("exec", "reader", "touch", "/data/file", check=False)


def test_who_was_stopped_by_its_user_is_not_started(docker: Docker, place: Place) -> None:
    for name in ("stopped", "removed", "paused"):
        run(docker, place, name, "while true; do sleep 0.1; done")
    held = writers(docker, place, "stopped", "removed", "paused")
    docker("pause", "paused")
    plan = hold(held)
    docker("stop", "-t", "0", "stopped")
    docker("rm", "-f", "removed")
    assert held.release(plan, ignore, moved=False) == []
    assert (status(docker, "stopped"), status(docker, "paused")) == ("exited", "paused")
    docker("unpause", "paused")


def test_a_busy_container_is_stopped_and_started_and_loses_nothing(docker: Docker, place: Place) -> None:
    run(docker, place, "busy", BUSY, "--restart", "always", "--stop-timeout", "1")
    log = place.old / "log"
    wait_until(lambda: log.exists() and log.stat().st_size)
    held = writers(docker, place, "busy")
    plan = hold(held)
    assert status(docker, "busy") == "exited"
    size = log.stat().st_size
    time.sleep(0.3)
    assert log.stat().st_size == size
    place.move()
    assert held.release(plan, ignore, moved=True) == []
    assert status(docker, "busy") == "running"
    wait_until((place.new / "log").exists)
    assert log.stat().st_size == size
    assert docker("inspect", "--format", "{{.HostConfig.RestartPolicy.Name}}", "busy") == "always"


def test_a_number_that_is_somebody_elses_by_now_is_left_alone(docker: Docker, place: Place) -> None:
    run(docker, place, "idle", "while true; do sleep 0.1; done")
    held = writers(docker, place, "idle")
    (noted,) = msgspec.json.decode(hold(held), type=list[Held])
    docker("unpause", "idle")
    another = msgspec.structs.replace(noted, born=(noted.born or 0) - 1)
    held.seal(msgspec.json.encode([another]))
    docker("exec", "idle", "touch", "/data/file")


def test_nobody_is_touched_when_one_cannot_be_held(docker: Docker, place: Place) -> None:
    for name in ("busy", "stuck"):
        run(docker, place, name, f"exec 3>/data/{name}; while true; do sleep 0.1; done")
        wait_until((place.path / name).exists)
    docker("pause", "stuck")
    before = pid(docker, "busy")
    with pytest.raises(InUse, match="stuck: is paused with a file open"):
        hold(writers(docker, place, "busy", "stuck"))
    assert pid(docker, "busy") == before
    docker("unpause", "stuck")


def test_one_that_had_to_be_stopped_to_see_the_new_place_is_started_however_often_that_fails(
    docker: Docker, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(docker, place, "idle", "trap exit TERM; while true; do sleep 0.1; done")
    held = writers(docker, place, "idle")
    noted = [hold(held)]
    docker("unpause", "idle")
    docker("exec", "-d", "idle", "sh", "-c", "exec 3</data/where; sleep 1000")
    number = int(pid(docker, "idle"))
    entry = swap.mount_in(number, "/data")
    assert entry is not None
    wait_until(lambda: bool(swap.users(number, entry)))
    place.move()
    with monkeypatch.context() as broken:
        broken.setattr(DockerEngine, "start", refuse)
        assert held.release(noted[-1], noted.append, moved=True)
    assert status(docker, "idle") == "exited"
    assert held.release(noted[-1], noted.append, moved=True) == []
    assert docker("exec", "idle", "cat", "/data/where") == "new"


def refuse(*_: object) -> None:
    raise HostError("the port is taken")


def test_all_is_as_it_was_when_the_move_fails(docker: Docker, place: Place) -> None:
    run(docker, place, "idle", "sleep 1000")
    run(docker, place, "busy", BUSY, "--stop-timeout", "1")
    run(docker, place, "paused", "sleep 1000")
    docker("pause", "paused")
    wait_until((place.old / "log").exists)
    held = writers(docker, place, "idle", "busy", "paused")
    plan = hold(held)
    again = writers(docker, place)  # by a daemon that knows the plan alone
    assert again.release(plan, ignore, moved=False) == []
    assert {name: status(docker, name) for name in ("idle", "busy", "paused")} == {
        "idle": "running",
        "busy": "running",
        "paused": "paused",
    }
    assert again.release(plan, ignore, moved=False) == []
    docker("unpause", "paused")


def test_letting_go_may_be_cut_short_and_begun_again(docker: Docker, place: Place) -> None:
    run(docker, place, "idle", "sleep 1000")
    docker("run", "-d", "--name", "other", "-v", f"{place.path}:/data", "busybox", "sleep", "1000")
    held = writers(docker, place, "idle", "other")
    plan = hold(held)
    place.move()
    swap.swap(int(pid(docker, "idle")), "/data", place.path, readonly=False)
    assert held.release(plan, ignore, moved=True) == []
    for name in ("idle", "other"):
        assert docker("exec", name, "cat", "/data/where") == "new"


def test_a_frozen_one_that_cannot_be_shown_the_new_place_never_writes_to_the_old(docker: Docker, place: Place) -> None:
    run(docker, place, "idle", "while true; do sleep 0.1; echo x >> /data/log; done", "--restart", "always")
    held = writers(docker, place, "idle")
    plan = held.plan()
    engine = DockerEngine(docker.socket)
    engine.pause("idle")
    holder = os.open(f"/proc/{pid(docker, 'idle')}/root/data", os.O_RDONLY)  # umount2 finds it busy
    size = (place.old / "log").stat().st_size if (place.old / "log").exists() else 0
    try:
        place.move()
        assert held.release(plan, ignore, moved=True) == []
    finally:
        os.close(holder)
    assert status(docker, "idle") == "running"
    wait_until((place.new / "log").exists)
    assert ((place.old / "log").stat().st_size if size else 0) == size


def test_who_must_not_be_stopped_is_named(docker: Docker, place: Place) -> None:
    run(docker, place, "fleeting", BUSY, "--rm", "--stop-timeout", "1")
    wait_until((place.old / "log").exists)
    held = writers(docker, place, "fleeting")
    with pytest.raises(InUse, match=r"fleeting.*started with --rm"):
        hold(held)
    plan = held.plan()
    assert held.release(plan, ignore, moved=False) == []
    assert status(docker, "fleeting") == "running"
    unknown = Binding(volume_id=VolumeId("v"), node="n", engine=Engine.DOCKER, mount_id="f" * 64, since=now())
    with pytest.raises(InUse, match="cannot be told"):
        ContainerWriters([], place.path, [unknown], freeze=True).plan()


def test_one_that_is_about_to_start_is_waited_for(docker: Docker, place: Place) -> None:
    """It has the volume mounted, and would write to the old place in the middle of the last round."""
    docker("create", "--name", "starting", "-v", f"{place.path}:/data", "busybox", "sleep", "1000")
    with pytest.raises(InUse, match=r"starting.*is created and holds the volume"):
        writers(docker, place, "starting").plan()


def test_podman_s_containers_are_held_alike(place: Place, tmp_path: Path) -> None:
    with podman_with(driver="none", plugin_socket=tmp_path / "none.sock") as podman:
        volume = f"{place.path}:/data"
        podman("run", "-d", "--name", "idle", "-v", volume, "busybox", "sleep", "1000")
        podman("run", "-d", "--name", "busy", "--stop-timeout", "1", "-v", volume, "busybox", "sh", "-c", BUSY)
        wait_until((place.old / "log").exists)
        bindings = [
            Binding(
                volume_id=VolumeId("v"),
                node="node-1",
                engine=Engine.PODMAN,
                mount_id="one for all",
                since=now(),
                consumers=tuple(
                    Consumer(
                        id=podman("inspect", "--format", "{{.Id}}", name), name=name, image="", pid=0, target="/data"
                    )
                    for name in ("idle", "busy")
                ),
            )
        ]
        engine = PodmanEngine(LinuxHost(), "podman", arguments=podman.arguments)
        held = ContainerWriters([engine], place.path, bindings, freeze=True)
        plan = hold(held)
        seen = {name: podman("inspect", "--format", "{{.State.Status}}", name) for name in ("idle", "busy")}
        assert seen == {"idle": "paused", "busy": "exited"}
        size = (place.old / "log").stat().st_size
        place.move()
        assert held.release(plan, ignore, moved=True) == []
        assert podman("exec", "idle", "cat", "/data/where") == "new"
        wait_until((place.new / "log").exists)
        assert (place.old / "log").stat().st_size == size


def test_users_of_a_mount_are_told(docker: Docker, place: Place) -> None:
    run(docker, place, "busy", "cd /data; sleep 1000")
    entry = swap.mount_in(int(pid(docker, "busy")), "/data")
    assert entry is not None
    assert any("cwd" in line for line in swap.users(int(pid(docker, "busy")), entry))
    with pytest.raises(InUse, match=r"sh \(pid \d+\)|sleep \(pid \d+\)"):
        swap.swap(int(pid(docker, "busy")), "/data", place.new, readonly=False)
