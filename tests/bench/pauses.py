"""What a container waits for while its volume moves, measured in the container: the longest time between two beats."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path

from tests.bench.measure import show
from tests.harness.docker import PLUGINS, running_docker
from tests.harness.volumed import Volumed, running_volumed

CHANGED = 500
# Touches the same files again and again, which every round then copies whole; it opens none, and so can be frozen. Each
# beat tells the machine's uptime, to a hundredth of a second.
SCRIPT = """
cd /
names=$(find /data -name 'file*0' | head -n {changed})
(while true; do touch $names; sleep 0.1; done) &
while true; do cat /proc/uptime; sleep 0.01; done
"""


def pauses() -> None:
    for count, goal in ((50_000, "under 1 s"), (500_000, "under 1.5 s")):
        with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
            rows = _measured(Path(folder), count)
        show(
            f"A container whose volume of {count:,} files moves, {CHANGED} of them changing all the time",
            rows,
            goal=goal,
        )


def _measured(folder: Path, count: int) -> list[tuple[str, str]]:
    socket = PLUGINS / f"volumed-pauses-{os.getpid()}.sock"
    other = f'[backends.other]\ndriver = "directory"\npath = "{folder}/other"\n'
    with (
        running_docker() as docker,
        running_volumed(
            folder, quiet=True, plugin_socket=socket, docker_socket=docker.socket, backends=other
        ) as volumed,
    ):
        docker("volume", "create", "-d", socket.stem, "-o", "backend=local", "data")
        (data,) = (folder / "volumes").glob("*/data")
        _fill(data, count)
        script = SCRIPT.format(changed=CHANGED)
        docker("run", "-d", "--name", "beating", "-v", "data:/data", "busybox", "sh", "-c", script)
        while not any(binding["consumers"] for binding in volumed.bindings()):
            time.sleep(0.2)
        moved = _move(volumed)
        time.sleep(1)  # a few beats more
        beats = [float(line.split()[0]) for line in docker("logs", "beating").splitlines()]
        docker.remove_containers()
    longest = max(after - before for before, after in itertools.pairwise(beats))
    return [
        ("between two beats, at most", f"{longest:.2f} s"),
        ("as volumed tells it", f"{moved:.2f} s"),
    ]


def _fill(root: Path, count: int) -> None:
    """Small: it is their number that counts."""
    for number in range(count):
        folder = root / f"{number // 1000:03}" / str(number // 100 % 10)
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"file{number}").write_bytes(b"%d" % number * 200)


def _move(volumed: Volumed) -> float:
    """Seconds of the pause."""
    begun = volumed.api.post("volumes", "data", "migrate", body={"backend": "other"})
    *_, last = volumed.api.lines("migrations", begun["id"], "follow")
    assert last["phase"] in ("kept", "done"), last
    assert last["path"] == "tree", last
    return float(last["pause"])
