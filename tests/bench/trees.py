"""Copying trees: ours beside rsync, in one run, each with cold caches and the target on storage at the end."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.measure import show
from volumed.migration.movers.mover import Control
from volumed.migration.movers.tree import TreeMover

FILES = 50_000
CHANGED = 500
RSYNC = ("rsync", "-aHAXS")


def make_small_files(root: Path, count: int) -> None:
    """0.2 to 22 KB, a hundred to a folder, a thousand to a folder above: 555 MB of 50,000."""
    dice = random.Random(1)
    for number in range(count):
        folder = root / f"{number // 1000:03}" / str(number // 100 % 10)
        if number % 100 == 0:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number}").write_bytes(dice.randbytes(int(dice.uniform(200, 22_000))))


def trees() -> None:
    """Best of two, in turns: the machine is shared."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        make_small_files(source, FILES)
        best: dict[str, float] = {}
        for _ in range(2):
            for shown, job in (("rsync -aHAXS", _rsync), ("four rsyncs", _four_rsyncs)):
                target = _target(folder)
                best[shown] = min(best.get(shown, 1e9), _timed(partial(job, source, target), target))
            target = _target(folder)
            with _mover(folder, source, target) as mover:
                taken = _timed(partial(mover.round, Control(), last=True), target)
                proof = _timed(partial(mover.verify, Control()), target, cold=False)
                if taken + proof < best.get("volumed", 1e9) + best.get("proof", 0):
                    best |= {"volumed": taken, "proof": proof}
        ours = best["volumed"]
        show(
            f"A tree of {FILES:,} files, 555 MB, cold",
            [
                ("volumed", f"{ours:.1f} s"),
                ("rsync -aHAXS", f"{best['rsync -aHAXS']:.1f} s, {best['rsync -aHAXS'] / ours:.2f} x ours"),
                ("four rsyncs side by side", f"{best['four rsyncs']:.1f} s, {best['four rsyncs'] / ours:.2f} x ours"),
                ("volumed, reading all back", f"{best['proof']:.1f} s, {best['proof'] / ours:.0%} of the copy"),
            ],
            goal="rsync 1.5 x, four 1 x; reading back under 25 %",
        )
        last_rounds(folder, source)


def last_rounds(folder: Path, source: Path) -> None:
    """What a container waits for: the round of what changed, and its proof."""
    target = _target(folder)
    with _mover(folder, source, target) as mover:
        mover.watch()
        mover.round(Control())
        mover.verify(Control())
        dice = random.Random(2)
        paths = sorted(source.glob("*/*/*"))
        _change(dice, paths)
        tracked = _clock(lambda: mover.round(Control(), last=True))
        proof = _clock(lambda: mover.verify(Control()))
        _change(dice, paths)
        bare = _clock(lambda: _rsync(source, target))
    with _mover(folder, source, _target(folder)) as mover:
        mover.round(Control())
        mover.verify(Control())
        _change(dice, paths)
        walked = _clock(lambda: mover.round(Control(), last=True))
    show(
        f"The last round: {CHANGED} of {FILES:,} files changed",
        [
            ("volumed, tracked", f"{tracked:.2f} s, and {proof:.2f} s of reading back"),
            ("volumed, looking at all", f"{walked:.2f} s"),
            ("rsync -aHAXS, not synced", f"{bare:.2f} s"),
        ],
        goal="under 1 s",
    )


def million() -> None:
    """Memory of the copying process and its workers, at their most."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        source = folder / "source"
        (source / "one folder").mkdir(parents=True)
        for number in range(1_000_000):
            (source / "one folder" / f"file{number}").touch()
        with _mover(folder, source, _target(folder)) as mover:
            mover.watch()
            taken = _clock(lambda: mover.round(Control()))
            copied = _memory(mover)
            proof = _clock(lambda: mover.verify(Control()))
            again = _clock(lambda: mover.round(Control(), last=True))
            rows = [
                ("copy", f"{taken:.0f} s, {copied:.0f} MiB"),
                ("reading back", f"{proof:.0f} s, {_memory(mover):.0f} MiB"),
                ("a round when nothing changed", f"{again:.2f} s"),
            ]
        show("A million empty files in one folder", rows, goal="under 200 MiB")


def _memory(mover: TreeMover) -> float:
    """MiB of all processes together, what they share counted once (proc(5), smaps_rollup)."""
    assert mover._session is not None
    leader = mover._session._process.pid
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader:
                rollup = (status.parent / "smaps_rollup").read_text()
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        except OSError:
            continue
    return total / 1024


def _change(dice: random.Random, paths: list[Path]) -> None:
    for path in dice.sample(paths, CHANGED):
        path.write_bytes(dice.randbytes(int(dice.uniform(200, 22_000))))


def _rsync(source: Path, target: Path) -> None:
    subprocess.run([*RSYNC, f"{source}/", f"{target}/"], check=True)


def _four_rsyncs(source: Path, target: Path) -> None:
    folders = sorted(source.iterdir())

    def some(number: int) -> None:
        subprocess.run([*RSYNC, *folders[number::4], f"{target}/"], check=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))


def _timed(job: Callable[[], object], target: Path, *, cold: bool = True) -> float:
    subprocess.run(["sync"], check=True)
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def synced() -> None:
        job()
        subprocess.run(["sync", "-f", target], check=True)

    return _clock(synced)


def _clock(job: Callable[[], object]) -> float:
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


def _target(folder: Path) -> Path:
    """Another each time, removed when all is done: ext4 makes files slowly where some were deleted a moment ago."""
    return Path(tempfile.mkdtemp(prefix="target-", dir=folder))


@contextmanager
def _mover(folder: Path, source: Path, target: Path) -> Iterator[TreeMover]:
    """Started: what the process needs for that is part of no copy."""
    workdir = folder / "work"
    shutil.rmtree(workdir, ignore_errors=True)
    target.mkdir(exist_ok=True)
    mover = TreeMover(source, target, workdir)
    mover.pending()
    try:
        yield mover
    finally:
        mover.close()
