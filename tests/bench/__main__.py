"""`make bench`: every figure beside its peer, in one run. Nothing here fails a build: machines are shared and noisy."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.bench.ceph import ceph
from tests.bench.csi import csi
from tests.bench.devices import devices
from tests.bench.ebs import ebs
from tests.bench.measure import milliseconds, percentile, resident, show, spread, times
from tests.bench.pauses import pauses
from tests.bench.remote import remote
from tests.bench.trees import million, trees
from tests.harness.docker import PLUGINS, running_docker
from tests.harness.processes import Process
from tests.harness.volumed import Volumed, running_volumed
from volumed.host import loop, mounts
from volumed.host.filesystems import Ext4
from volumed.host.linux import LinuxHost
from volumed.model import Binding, Engine, Handle, Volume, VolumeState, new_volume_id, now
from volumed.store.repository import Repository
from volumed.store.sqlite import SqliteStore
from volumed.unix_http import UnixConnection


class Plugin:
    """One connection that is kept, as dockerd keeps its; bare, so that what is measured is the daemon's time and not
    that of a client in Python."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._answers = self._socket.makefile("rb")

    def __call__(self, endpoint: str, **fields: object) -> dict[str, object]:
        body = json.dumps(fields).encode()
        head = f"POST /VolumeDriver.{endpoint} HTTP/1.1\r\nHost: volumed\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        answer: dict[str, object] = json.loads(self._body())
        assert not answer.get("Err"), answer
        return answer

    def _body(self) -> bytes:
        length = 0
        while (line := self._answers.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return self._answers.read(length)


@contextlib.contextmanager
def fresh(**options: object) -> Iterator[Volumed]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        running_volumed(Path(folder), quiet=True, **options) as volumed,
    ):
        yield volumed


def mounting() -> None:
    with fresh() as volumed, tempfile.TemporaryDirectory() as folder:
        plugin = Plugin(volumed.plugin_socket)
        for name, options in (("tree", {}), ("disk", {"size": "64m"})):
            plugin("Create", Name=name, Opts=options)

        def pair(name: str) -> Callable[[], None]:
            def job() -> None:
                plugin("Mount", Name=name, ID="bench")
                plugin("Unmount", Name=name, ID="bench")

            return job

        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        target.mkdir()

        def bare_bind() -> None:
            mounts.bind(source, target, readonly=False, options=())
            mounts.unmount(target)

        show(
            "Mount+Unmount, directory",
            [
                ("volumed, durable", spread(times(pair("tree"), count=1000))),
                ("bare mount(2)+umount(2)", spread(times(bare_bind, count=1000))),
            ],
            goal="p50 under 1 ms",
        )
        host = LinuxHost()
        image = next((volumed.folder / "images").glob("*.img"))

        def bare_loop() -> None:
            device = loop.attach(image, direct_io=True, readonly=False)
            Ext4().check(host, device)
            mounts.mount(device, target, fstype="ext4", options=("discard",), readonly=False)
            mounts.unmount(target)
            loop.detach(device)

        ours, bare = times(pair("disk"), count=100, warm=5), times(bare_loop, count=100, warm=5)
        show(
            "Mount+Unmount, image (ext4)",
            [
                ("volumed, durable", spread(ours)),
                ("the same calls by hand", spread(bare)),
                ("difference of p50", milliseconds(percentile(ours, 50) - percentile(bare, 50))),
            ],
            goal="within 2 ms of the calls by hand",
        )


def populate(folder: Path, *, volumes: int, mounted: int) -> None:
    """A ledger as a long life would leave it, and the folders of those that are mounted."""
    made = [
        Volume(
            id=(volume_id := new_volume_id()),
            name=f"volume-{number:06}",
            backend="local",
            state=VolumeState.READY,
            created=now(),
            handle=Handle(volume_id),
            labels={"team": "web"},
        )
        for number in range(volumes)
    ]
    (folder / "state").mkdir(parents=True, exist_ok=True)
    with SqliteStore(folder / "state" / "ledger.db").closing() as store:
        repository = Repository(store)
        for start in range(0, volumes, 5000):
            with repository.transaction() as transaction:
                for volume in made[start : start + 5000]:
                    transaction.put(volume)
        with repository.transaction() as transaction:
            for number, volume in enumerate(made[:mounted]):
                transaction.put(
                    Binding(
                        volume_id=volume.id, node="node-1", engine=Engine.DOCKER, mount_id=f"{number:064}", since=now()
                    )
                )
    for volume in made[:mounted]:
        (folder / "volumes" / volume.id / "data").mkdir(parents=True)


def asking() -> None:
    for volumes in (10_000, 100_000):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            populate(Path(folder), volumes=volumes, mounted=0)
            with running_volumed(Path(folder), quiet=True) as volumed:
                plugin = Plugin(volumed.plugin_socket)
                rows = [
                    ("Get", spread(times(partial(plugin, "Get", Name="volume-005000"), count=2000))),
                    ("Path", spread(times(partial(plugin, "Path", Name="volume-005000"), count=2000))),
                    ("List", spread(times(partial(plugin, "List"), count=20, warm=2))),
                    ("memory", f"{resident(volumed.pid):.0f} MiB resident"),
                ]
                goal = (
                    "Get, Path p99 under 2 ms, List under 50 ms" if volumes == 10_000 else "List under 0.5 s, 150 MiB"
                )
                show(f"Asking, {volumes:,} volumes", rows, goal=goal)


def starting() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        populate(Path(folder), volumes=10_000, mounted=1000)
        volumed = Volumed(Path(folder), quiet=True)
        try:
            rows = []
            for name in ("first start: 1,000 mounts are made", "start: 1,000 mounts are there", "after kill -9"):
                begun = time.perf_counter()
                volumed.start()
                taken = time.perf_counter() - begun
                assert len(volumed.mounted()) == 1000
                rows.append((name, f"{taken:.2f} s until it answers, reconciled"))
                volumed.kill()
            volumed.start()
            rows.append(("python -c pass", f"{_interpreter():.2f} s"))
            show("Start, 10,000 volumes, 1,000 mounts", rows, goal="0.6 s; after kill -9 1.5 s")
        finally:
            volumed.clean_up()
    with fresh() as volumed:
        time.sleep(3)
        show("Memory, idle", [("volumed", f"{resident(volumed.pid):.0f} MiB resident")], goal="under 70 MiB")


def _interpreter() -> float:
    return times(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True), count=5, warm=1)[2]


def engine() -> None:
    """Through dockerd's own API: our driver, one that does nothing, and Docker's built-in."""
    name = f"volumed-bench-{os.getpid()}"
    noop = f"volumed-noop-{os.getpid()}"
    with running_docker() as docker:
        process = Process(
            [sys.executable, "-m", "tests.bench.noop_plugin", PLUGINS / f"{noop}.sock"], log=docker.folder / "noop.log"
        )
        try:
            while not (PLUGINS / f"{noop}.sock").exists():
                time.sleep(0.02)
            with fresh(plugin_socket=PLUGINS / f"{name}.sock", docker_socket=docker.socket):
                connection = UnixConnection(docker.socket, timeout=120)

                def pair(driver: str) -> Callable[[], None]:
                    def job() -> None:
                        _api(connection, "POST", "/volumes/create", {"Name": "bench", "Driver": driver})
                        _api(connection, "DELETE", "/volumes/bench", None)

                    return job

                drivers = {"volumed, directory": name, "a plugin that does nothing": noop, "Docker's local": "local"}
                measured = {shown: times(pair(driver), count=300) for shown, driver in drivers.items()}
                base = percentile(measured["Docker's local"], 50)
                rows = [
                    (shown, f"{spread(found)}, {percentile(found, 50) / base:.1f} x local")
                    for shown, found in measured.items()
                ]
                show("Create+Remove through dockerd", rows, goal="1.5 x local")
        finally:
            process.end()


def _api(connection: http.client.HTTPConnection, method: str, path: str, body: object) -> None:
    data = None if body is None else json.dumps(body)
    connection.request(method, path, body=data, headers={"Content-Type": "application/json"} if data else {})
    answer = connection.getresponse()
    said = answer.read()
    assert answer.status < 300, said


def crowd() -> None:
    with fresh() as volumed:
        names = [f"disk{number}" for number in range(64)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: volumed.plugin("Create", Name=name, Opts={"size": "32m"}), names))

        def mount(name: str) -> str:
            return volumed.plugin("Mount", Name=name, ID="bench").error

        def unmount(name: str) -> str:
            return volumed.plugin("Unmount", Name=name, ID="bench").error

        rows = []
        for shown, workers in (("one after the other", 1), ("all at once", 64)):
            with ThreadPoolExecutor(workers) as pool:
                begun = time.perf_counter()
                errors = [error for error in pool.map(mount, names) if error]
                taken = time.perf_counter() - begun
                errors += [error for error in pool.map(unmount, names) if error]
            rows.append((shown, f"{taken:.2f} s, {len(errors)} failures"))
        show("64 mounts of 64 image volumes", rows, goal="no failure")


def hanging() -> None:
    """A backend whose storage hangs: its file system is frozen, so that every create on it waits for ever."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        image, target = Path(folder, "sick.img"), Path(folder, "sick")
        with image.open("wb") as file:
            file.truncate(1 << 30)
        target.mkdir()
        device = loop.attach(image, direct_io=False, readonly=False)
        subprocess.run(["mkfs.xfs", "-q", device], check=True)
        mounts.mount(device, target, fstype="xfs", options=(), readonly=False)
        backends = f'[backends.sick]\ndriver = "directory"\npath = "{target}/volumes"\n'
        try:
            with running_volumed(Path(folder, "v"), quiet=True, backends=backends) as volumed:
                plugin = Plugin(volumed.plugin_socket)
                plugin("Create", Name="well")

                def pair() -> None:
                    plugin("Mount", Name="well", ID="bench")
                    plugin("Unmount", Name="well", ID="bench")

                before = times(pair, count=500)
                subprocess.run(["fsfreeze", "--freeze", target], check=True)
                with ThreadPoolExecutor(40) as pool:
                    hung = [
                        pool.submit(volumed.plugin, "Create", Name=f"sick{number}", Opts={"backend": "sick"})
                        for number in range(40)
                    ]
                    time.sleep(1)
                    during = times(pair, count=500)
                    waiting = sum(not future.done() for future in hung)
                    subprocess.run(["fsfreeze", "--unfreeze", target], check=True)
                    after = [future.result().error for future in hung]
                rows = [
                    ("all well", spread(before)),
                    (f"with {waiting} requests hanging", spread(during)),
                    ("of those, once it thawed", f"{after.count('')} succeeded"),
                ]
                show("Mount+Unmount, directory, beside a backend that hangs", rows, goal="p99 unchanged")
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", target], check=False, capture_output=True)
            mounts.unmount(target)
            loop.detach(device)


SECTIONS = (mounting, asking, starting, engine, crowd, hanging, csi, devices, ebs, ceph, remote, trees, pauses, million)

if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    for section in SECTIONS:
        if not wanted or section.__name__ in wanted:
            section()
