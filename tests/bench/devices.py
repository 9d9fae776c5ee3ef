"""Copies of devices beside qemu-img, on the same files in one run."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.measure import show
from volumed.migration.movers.block import BlockMover
from volumed.migration.movers.mover import Control

GIB, MIB = 1 << 30, 1 << 20


def devices() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        blocks("a device of 2 GiB, full", Path(folder), size=2 * GIB, filled=2 * GIB)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        blocks("a device of 10 GiB with 1 GiB allocated", Path(folder), size=10 * GIB, filled=GIB)


def blocks(title: str, folder: Path, *, size: int, filled: int) -> None:
    source = folder / "source"
    with source.open("wb") as made:
        made.truncate(size)
        for at in range(0, filled, MIB):  # spread over all of it
            made.seek(at * (size // filled))
            made.write(random.Random(at).randbytes(MIB))
    direct = ["-m", "8", "-W", "-n", "-t", "none", "-T", "none", "-f", "raw", "-O", "raw"]
    theirs, ours, proof, bare = [], [], [], []
    for number in range(3):  # by turns: the machine is shared
        target = _sparse(folder / f"qemu-{number}", size)
        theirs.append(_timed(partial(_run, "qemu-img", "convert", *direct, source, target)))
        target.unlink()
        target = _sparse(folder / f"ours-{number}", size)
        (folder / f"work-{number}").mkdir()
        mover = BlockMover(source, target, folder / f"work-{number}")
        ours.append(_timed(partial(mover.round, Control(), last=True)))
        proof.append(_timed(partial(_prove, mover)))
        mover.close()
        reading = ["-c", filled // MIB, "-d", 8, "-s", MIB, "-S", MIB * (size // filled), "-t", "none", "-f", "raw"]
        bare.append(_timed(partial(_run, "qemu-img", "bench", *reading, target)))
        target.unlink()
    show(
        f"copying {title}",
        [
            ("qemu-img convert, 8 in flight, direct", _seconds(min(theirs))),
            ("volumed", f"{_seconds(min(ours))}, {min(theirs) / min(ours):.2f} of its speed"),
            ("its proof", f"{_seconds(min(proof))}, {min(proof) / min(ours):.0%} of the copy"),
            ("qemu-img bench, only reading that", f"{_seconds(min(bare))}, {min(bare) / min(ours):.0%} of the copy"),
        ],
        goal="0.9 of its speed; proof under 25%",
    )


def _timed(job: Callable[[], object]) -> float:
    os.sync()
    begun = time.perf_counter()
    job()
    os.sync()  # of all alike: what is not on the disk is not copied
    return time.perf_counter() - begun


def _prove(mover: BlockMover) -> None:
    assert not mover.verify(Control()).differences


def _sparse(path: Path, size: int) -> Path:
    with path.open("wb") as made:
        made.truncate(size)
    return path


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


def _seconds(value: float) -> str:
    return f"{value:.2f} s"
