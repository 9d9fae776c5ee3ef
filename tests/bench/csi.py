"""CSI's calls on folders, one at a time and 32 at once: ours, the reference driver's, and the bare system calls.

The reference driver is csi-driver-host-path; VOLUMED_BENCH_HOSTPATH names its binary. Without it its column is missing.
All are asked by the same client in Python, whose own share is the call that does nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from tests.bench.measure import percentile, resident, show, spread, times
from tests.harness.csi import Caller, calling, capability
from tests.harness.processes import Process
from tests.harness.volumed import Volumed
from volumed.host import mounts

HOSTPATH = os.environ.get("VOLUMED_BENCH_HOSTPATH", "")
VOLUMES = 256
GOALS = {
    "CreateVolume": "1.5 x host-path's alone, quicker at 32",
    "DeleteVolume": "1.5 x host-path's alone, quicker at 32",
    "NodePublishVolume": "a third of host-path's",
    "NodeUnpublishVolume": "a third of host-path's",
    "NodeGetVolumeStats": "a third of host-path's",
}


class Served(NamedTuple):
    """A driver that listens."""

    name: str
    caller: Caller
    folder: Path
    start: float  # seconds until it answered
    pid: int


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[Served]:
    volumed = Volumed(folder, quiet=True, csi="")
    volumed.targets.mkdir()
    try:
        with calling(volumed.csi_socket) as caller:
            begun = time.perf_counter()
            volumed.start()
            yield Served("volumed", caller, volumed.targets, _ready(caller, begun), volumed.pid)
    finally:
        volumed.clean_up()


@contextlib.contextmanager
def reference(folder: Path) -> Iterator[Served]:
    socket, targets = folder / "csi.sock", folder / "pods"
    targets.mkdir()
    begun = time.perf_counter()
    words = [f"--endpoint=unix://{socket}", "--nodeid=node-1", "--drivername=hostpath", f"--statedir={folder}/state"]
    process = Process([HOSTPATH, *words], log=folder / "log")
    try:
        with calling(socket) as caller:
            yield Served("host-path", caller, targets, _ready(caller, begun), process.pid)
    finally:
        process.end()
        for entry in reversed(mounts.MountTable().entries()):
            if entry.target.is_relative_to(targets):
                mounts.unmount(entry.target)


def _ready(caller: Caller, begun: float) -> float:
    while True:
        with contextlib.suppress(grpc.RpcError):
            caller.Probe()
            return time.perf_counter() - begun
        time.sleep(0.001)


def lives(served: Served, *, at_once: int) -> dict[str, list[float]]:
    """Many volumes through their whole life: every call of them all before the next kind of call; seconds of each."""
    numbers = range(VOLUMES)
    used = capability()
    made: dict[int, str] = {}

    def create(number: int) -> None:
        name = f"bench-{at_once}-{number}"
        fields: dict[str, Any] = {"name": name, "volume_capabilities": [used]}
        made[number] = served.caller.CreateVolume(**fields).volume.volume_id

    def path(kind: str, number: int) -> str:
        return str(served.folder / f"{kind}-{number}")

    def stage(number: int) -> None:
        served.caller.NodeStageVolume(
            volume_id=made[number], staging_target_path=path("staging", number), volume_capability=used
        )

    def publish(number: int) -> None:
        served.caller.NodePublishVolume(
            volume_id=made[number],
            staging_target_path=path("staging", number),
            target_path=path("target", number),
            volume_capability=used,
        )

    def statistics(number: int) -> None:
        served.caller.NodeGetVolumeStats(volume_id=made[number], volume_path=path("target", number))

    def unpublish(number: int) -> None:
        served.caller.NodeUnpublishVolume(volume_id=made[number], target_path=path("target", number))

    def unstage(number: int) -> None:
        served.caller.NodeUnstageVolume(volume_id=made[number], staging_target_path=path("staging", number))

    def delete(number: int) -> None:
        served.caller.DeleteVolume(volume_id=made[number])

    for number in numbers:
        Path(path("staging", number)).mkdir(exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        return {
            name: _each(pool, job, numbers)
            for name, job in (
                ("Probe (nothing)", lambda _: served.caller.Probe()),
                ("CreateVolume", create),
                ("NodeStageVolume", stage),
                ("NodePublishVolume", publish),
                ("NodeGetVolumeStats", statistics),
                ("NodeUnpublishVolume", unpublish),
                ("NodeUnstageVolume", unstage),
                ("DeleteVolume", delete),
            )
        }


def _each(pool: ThreadPoolExecutor, job: Callable[[int], object], numbers: Sequence[int]) -> list[float]:
    def timed(number: int) -> float:
        begun = time.perf_counter()
        job(number)
        return time.perf_counter() - begun

    return sorted(pool.map(timed, numbers))


def listing(served: Served) -> list[float]:
    """ListVolumes of 1,000."""
    names = [f"listed-{number}" for number in range(1000)]
    made = [
        served.caller.CreateVolume(name=name, volume_capabilities=[capability()]).volume.volume_id for name in names
    ]
    found = times(served.caller.ListVolumes, count=50, warm=5)
    for volume_id in made:
        served.caller.DeleteVolume(volume_id=volume_id)
    return found


def bare(folder: Path) -> list[float]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()

    def job() -> None:
        mounts.bind(source, target, readonly=False, options=())
        mounts.unmount(target)

    return times(job, count=VOLUMES)


def csi() -> None:
    drivers = [ours, *([reference] if HOSTPATH else [])]
    figures: dict[str, dict[tuple[str, int], list[float]]] = {}
    whole: list[tuple[str, str]] = []
    for driver in drivers:
        with tempfile.TemporaryDirectory(prefix="bench-") as name, driver(Path(name)) as served:
            memory = f"{resident(served.pid):.0f} MiB resident"
            whole.append((served.name, f"{served.start * 1000:.0f} ms until it answers, {memory} then"))
            for at_once in (1, 32):
                for call, found in lives(served, at_once=at_once).items():
                    figures.setdefault(call, {})[served.name, at_once] = found
            figures.setdefault("ListVolumes of 1,000", {})[served.name, 1] = listing(served)
    for call, columns in figures.items():
        rows = [(f"{name}, {at_once} at once", spread(found)) for (name, at_once), found in columns.items()]
        for at_once in (1, 32):
            if ("host-path", at_once) in columns:
                ratio = percentile(columns["volumed", at_once], 50) / percentile(columns["host-path", at_once], 50)
                rows.append((f"volumed / host-path, {at_once} at once", f"{ratio:.2f}"))
        show(f"CSI {call}, directory", rows, goal=GOALS.get(call, "no slower" if "List" in call else ""))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        show("CSI, the bare system calls", [("mount(2)+umount(2)", spread(bare(Path(name))))])
    show("CSI, start", whole)
