"""How far a running move or copy is."""

from __future__ import annotations

import time

import msgspec

from volumed.migration.move import Step
from volumed.migration.movers.mover import Control


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """`rate`: bytes a second since the step began; `left`: seconds, None when it is not known."""

    step: str
    done: int = 0
    total: int = 0
    rate: float = 0.0
    left: float | None = None


def progress_of(step: Step, control: Control) -> Progress:
    done = control.bytes - step.base
    rate = done / max(time.monotonic() - step.begun, 0.001)
    left = max(0.0, (step.total - done) / rate) if step.total and rate else None
    return Progress(step=step.name, done=done, total=step.total, rate=rate, left=left)
