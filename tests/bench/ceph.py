"""RBD volumes beside the bare tools that do the same: create, map, make a file system, mount; and all the way back."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.beside import Steps, beside, with_volumed
from tests.bench.measure import show, spread, times
from tests.conftest import sh
from tests.harness.ceph import POOL, Ceph, ceph_cluster
from tests.harness.volumed import Volumed, running_volumed
from volumed.host import loop, mounts

COUNT = 8
HANGING = 20
SIZE = "64M"


def ceph() -> None:
    with (
        ceph_cluster() as cluster,
        tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder,
        running_volumed(Path(folder, "v"), quiet=True, backends=_table(cluster)) as volumed,
    ):
        Path(folder, "bare").mkdir()

        def ask(endpoint: str, **fields: Any) -> None:
            answer = volumed.plugin(endpoint, **fields)
            assert not answer.error, answer

        beside(
            f"an RBD image of {SIZE} with ext4, by qemu-storage-daemon",
            "rbd, qemu-storage-daemon, mkfs, mount",
            lambda number: with_volumed(ask, number, backend="ceph", size=SIZE),
            lambda number: _by_hand(cluster, Path(folder, "bare"), number),
            count=COUNT,
        )
        _beside_one_that_hangs(cluster, volumed)


def _beside_one_that_hangs(cluster: Ceph, volumed: Volumed) -> None:
    def create(name: str, **options: str) -> str:
        return volumed.plugin("Create", Name=name, Opts=options, timeout=120).error

    def pair() -> None:
        volumed.plugin("Mount", Name="well", ID="bench")
        volumed.plugin("Unmount", Name="well", ID="bench")

    create("well")
    before = times(pair, count=500)
    cluster.hang("osd.0")
    with ThreadPoolExecutor(HANGING) as pool:
        hung = [pool.submit(create, f"sick{number}", backend="ceph", size=SIZE) for number in range(HANGING)]
        time.sleep(1)
        during = times(pair, count=500)
        waiting = sum(not future.done() for future in hung)
        cluster.resume("osd.0")
        errors = [error for future in hung if (error := future.result())]
    show(
        "Mount+Unmount, directory, beside a Ceph that hangs",
        [
            ("all well", spread(before)),
            (f"with {waiting} requests hanging", spread(during)),
            ("of those, once it went on", f"{HANGING - len(errors)} succeeded"),
        ],
        goal="p99 unchanged",
    )


def _table(cluster: Ceph) -> str:
    key = cluster.make_rbd_user()
    return f'[backends.ceph]\ndriver = "ceph-rbd"\npool = "{POOL}"\nconf = "{cluster.conf}"\nkey = "file:{key}"\n'


def _by_hand(cluster: Ceph, folder: Path, number: int) -> Steps:
    """With the user's rights and the options that volumed takes."""
    image, file, target = f"bare{number}", folder / f"image{number}", folder / f"mounted{number}"
    rbd = ("rbd", "-c", cluster.conf, "--id", "volumed", "--keyfile", cluster.folder / "volumed.key")
    running: list[tuple[subprocess.Popen[bytes], Path]] = []

    def forth() -> None:
        sh(*rbd, "create", f"{POOL}/{image}", "--size", SIZE)
        file.touch()
        target.mkdir()
        ready = folder / f"ready{number}"
        process = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--pidfile", ready),
                *("--object", f"secret,id=key,format=base64,file={cluster.folder}/volumed.key"),
                "--blockdev",
                f"driver=rbd,node-name=image,pool={POOL},image={image},user=volumed,key-secret=key,conf={cluster.conf},"
                "cache.direct=on,discard=unmap",
                *("--export", f"type=fuse,id=export,node-name=image,mountpoint={file},writable=on,growable=off"),
            ]
        )
        while not ready.exists():
            time.sleep(0.001)
        device = loop.attach(file, direct_io=True, readonly=False)
        sh("mkfs.ext4", "-q", device)
        mounts.mount(device, target, fstype="ext4", options=("discard",), readonly=False)
        running.append((process, device))

    def back() -> None:
        process, device = running.pop()
        mounts.unmount(target)
        loop.detach(device)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(30)
        sh(*rbd, "rm", f"{POOL}/{image}", "--no-progress")

    return forth, back
