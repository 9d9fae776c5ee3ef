"""A random life of many volumes through a real dockerd, with kill -9 of volumed and of dockerd in between.

The model knows what every volume must hold. Seeded: a failure names its seed, `VOLUMED_SOAK_SEED` repeats it, and
`VOLUMED_SOAK_STEPS` makes it longer.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, wait_until
from tests.engines.conftest import plugin_socket
from tests.harness.docker import Docker, running_docker
from tests.harness.volumed import ApiError, Volumed, running_volumed

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = int(os.environ.get("VOLUMED_SOAK_STEPS", "120"))
SEED = int(os.environ.get("VOLUMED_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
LOOP = "trap exit TERM; while :; do sleep 0.1; done"


class Soak:
    def __init__(self, docker: Docker, volumed: Volumed, rng: random.Random) -> None:
        self.docker, self.volumed, self.rng = docker, volumed, rng
        self.data: dict[str, str] = {}  # volume -> what its file holds
        self.sized: set[str] = set()
        self.snapshots: dict[str, dict[str, str]] = {}
        self.containers: dict[str, str] = {}  # container -> volume
        self.number = 0

    def name(self, kind: str) -> str:
        self.number += 1
        return f"{kind}{self.number}"

    def step(self) -> None:
        steps = {
            self.create: 6,
            self.write: 8,
            self.run: 6,
            self.stop: 4,
            self.remove: 4,
            self.snapshot: 3,
            self.clone: 2,
            self.restore: 2,
            self.expand: 2,
            self.restart_container: 2,
            self.kill_volumed: 2,
            self.kill_docker: 1,
        }
        (chosen,) = self.rng.choices(list(steps), list(steps.values()))
        print(chosen.__name__, flush=True)
        chosen()

    def pick(self, names: object) -> str | None:
        choices = sorted(names)  # type: ignore[call-overload]
        return self.rng.choice(choices) if choices else None

    def idle(self) -> list[str]:
        return [name for name in self.data if name not in self.containers.values()]

    def create(self) -> None:
        name = self.name("v")
        options = self.rng.choice(
            ["", "size=16m fs=ext4", "size=256m fs=btrfs", "backend=tree size=32m", "backend=shared size=300m fs=xfs"]
        )
        words = [word for option in options.split() for word in ("-o", option)]
        self.docker("volume", "create", "-d", self.volumed.plugin_socket.stem, *words, name)
        self.data[name] = ""
        self.snapshots[name] = {}
        if "tree" in options or "shared" in options:
            self.sized.add(name)

    def write(self) -> None:
        name = self.pick(self.data)
        if name is None:
            return
        text = f"{name}-{self.rng.randrange(10**9)}"
        users = [container for container, volume in self.containers.items() if volume == name]
        script = f"printf %s {text} > /data/file.new && sync && mv /data/file.new /data/file"
        if users:
            self.docker("exec", users[0], "sh", "-c", script)
        else:
            self.docker("run", "--rm", "-v", f"{name}:/data", "busybox", "sh", "-c", script)
        self.data[name] = text

    def run(self) -> None:
        name = self.pick(self.data)
        if name is not None and len(self.containers) < 6:
            container = self.name("c")
            self.docker("run", "-d", "--name", container, "-v", f"{name}:/data", "busybox", "sh", "-c", LOOP)
            self.containers[container] = name

    def stop(self) -> None:
        container = self.pick(self.containers)
        if container is not None:
            self.docker("rm", "-f", container)
            del self.containers[container]

    def restart_container(self) -> None:
        container = self.pick(self.containers)
        if container is not None:
            self.docker("restart", "-t", "0", container)

    def remove(self) -> None:
        name = self.pick(self.data)
        if name is None:
            return
        if name in self.containers.values():
            assert "in use" in self.docker("volume", "rm", name, check=False)
            return
        for snapshot in list(self.snapshots[name]):
            self.volumed.api.delete("volumes", name, "snapshots", snapshot)
        self.docker("volume", "rm", name)
        del self.data[name], self.snapshots[name]
        self.sized.discard(name)

    def snapshot(self) -> None:
        name = self.pick(self.sized)
        if name is not None:
            snapshot = self.name("s")
            self.volumed.api.post("volumes", name, "snapshots", body={"name": snapshot})
            self.snapshots[name][snapshot] = self.data[name]

    def clone(self) -> None:
        name = self.pick(self.sized)
        if name is None:
            return
        snapshot = self.pick(self.snapshots[name])
        source = f"{name}@{snapshot}" if snapshot and self.rng.random() < 0.5 else name
        copy = self.name("v")
        self.docker("volume", "create", "-d", self.volumed.plugin_socket.stem, "-o", f"from={source}", copy)
        self.data[copy] = self.snapshots[name][snapshot] if "@" in source and snapshot else self.data[name]
        self.snapshots[copy] = {}
        self.sized.add(copy)

    def restore(self) -> None:
        name = self.pick(name for name in self.idle() if self.snapshots[name])
        if name is None:
            return
        snapshot = self.pick(self.snapshots[name])
        assert snapshot is not None
        wait_until(lambda: not self.volumed.api.get("volumes", name, "bindings"))
        self.volumed.api.post("volumes", name, "snapshots", snapshot, "restore")
        self.data[name] = self.snapshots[name][snapshot]

    def expand(self) -> None:
        name = self.pick(self.sized)
        if name is not None:
            size = self.volumed.api.get("volumes", name)["size"]
            self.volumed.api.post("volumes", name, "expand", body={"size": size + (16 << 20)})

    def kill_volumed(self) -> None:
        self.volumed.kill()
        self.volumed.start()
        assert [finding for finding in self.volumed.api.get("doctor") if finding["kind"] != "mount-missing"] == []

    def kill_docker(self) -> None:
        """Its containers, without a restart policy, end with it."""
        self.docker.kill()
        self.docker.start()
        self.docker.remove_containers()
        self.containers.clear()
        wait_until(lambda: self.volumed.bindings() == [])

    def check(self) -> None:
        for name, text in self.data.items():
            told = self.docker(
                "run", "--rm", "-v", f"{name}:/data:ro", "busybox", "sh", "-c", "cat /data/file 2>/dev/null; true"
            )
            assert told == text, name
        bound = {binding["volume"] for binding in self.volumed.bindings()}
        assert bound == set(self.containers.values())


@pytest.fixture
def soak(tmp_path: Path, make_filesystem: MakeFilesystem) -> Iterator[Soak]:
    backends = f"""
[backends.tree]
driver = "btrfs"
path = "{make_filesystem("btrfs", size=2 << 30)}/volumes"
[backends.shared]
driver = "image"
path = "{make_filesystem("xfs", size=4 << 30)}/images"
"""
    with (
        running_docker() as docker,
        running_volumed(
            tmp_path / "v", plugin_socket=plugin_socket("soak"), docker_socket=docker.socket, backends=backends
        ) as volumed,
    ):
        yield Soak(docker, volumed, random.Random(SEED))
        docker.remove_containers()


def test_soak(soak: Soak) -> None:
    print(f"VOLUMED_SOAK_SEED={SEED} VOLUMED_SOAK_STEPS={STEPS}")
    for number in range(STEPS):
        try:
            soak.step()
        except ApiError as error:
            raise AssertionError(f"step {number}: {error.subject}: {error.message}") from error
        if number % 40 == 39:
            soak.check()
    soak.check()
    soak.docker.remove_containers()
    wait_until(lambda: soak.volumed.bindings() == [] and soak.volumed.mounted() == {})
    for name, snapshots in soak.snapshots.items():
        for snapshot in snapshots:
            soak.volumed.api.delete("volumes", name, "snapshots", snapshot)
        soak.docker("volume", "rm", name)
    soak.volumed.assert_nothing_left()
