"""Timing, and the table that is printed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def times(job: Callable[[], object], *, count: int, warm: int = 20) -> list[float]:
    """Seconds of each run, sorted."""
    for _ in range(warm):
        job()
    measured = []
    for _ in range(count):
        begun = time.perf_counter()
        job()
        measured.append(time.perf_counter() - begun)
    return sorted(measured)


def percentile(measured: Sequence[float], percent: float) -> float:
    return measured[min(len(measured) - 1, int(len(measured) * percent / 100))]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def spread(measured: Sequence[float]) -> str:
    return f"p50 {milliseconds(percentile(measured, 50))}, p99 {milliseconds(percentile(measured, 99))}"


def show(title: str, rows: Sequence[tuple[str, str]], *, goal: str = "") -> None:
    print(f"\n{title}" + (f"   (goal: {goal})" if goal else ""))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"    {name:{width}}  {value}", flush=True)


def resident(pid: int) -> float:
    """MiB of memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
