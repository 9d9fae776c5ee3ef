"""Volumes of a backend beside the bare tools that do the same: create, attach, mount; and all the way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tests.bench.measure import milliseconds, percentile, show, spread

Steps = tuple[Callable[[], None], Callable[[], None]]  # forth and back
Ask = Callable[..., object]  # ask(endpoint, **fields) as dockerd does; raises for an error
WARM = 2


def beside(what: str, peer: str, ours: Callable[[int], Steps], bare: Callable[[int], Steps], *, count: int) -> None:
    """`ours`, `bare`: the steps of the volume of that number. Taken by turns: what else the machine does meets both."""
    measured = [(timed(ours(number)), timed(bare(number))) for number in range(count + WARM)][WARM:]
    report(what, peer, [each[0] for each in measured], [each[1] for each in measured])


def report(what: str, peer: str, ours: Sequence[tuple[float, float]], bare: Sequence[tuple[float, float]]) -> None:
    for title, step in (("Create, attach, mount", 0), ("and back: unmount, detach, remove", 1)):
        mine, theirs = sorted(each[step] for each in ours), sorted(each[step] for each in bare)
        more = percentile(mine, 50) - percentile(theirs, 50)
        show(
            f"{title}: {what}",
            [
                ("volumed, durable", spread(mine)),
                (peer, spread(theirs)),
                ("difference of p50", f"{milliseconds(more)}, {100 * more / percentile(theirs, 50):+.0f} %"),
            ],
            goal="under 5 ms or 10 %",
        )


def timed(steps: Steps) -> tuple[float, float]:
    measured = []
    for step in steps:
        begun = time.perf_counter()
        step()
        measured.append(time.perf_counter() - begun)
    return measured[0], measured[1]


def with_volumed(ask: Ask, number: int, **options: str) -> Steps:
    name = f"bench{number}"

    def forth() -> None:
        ask("Create", Name=name, Opts=options)
        ask("Mount", Name=name, ID="bench")

    def back() -> None:
        ask("Unmount", Name=name, ID="bench")
        ask("Remove", Name=name)

    return forth, back
