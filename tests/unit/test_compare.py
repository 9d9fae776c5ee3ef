"""Two places that are written to all the time are told equal when they are, and different when they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from volumed.errors import HostError
from volumed.migration.movers import compare as module
from volumed.migration.movers.compare import BLOCK, compare
from volumed.migration.movers.mover import Control, Stopped, Verified
from volumed.units import MIB

SIZE = 3 * MIB + 8192


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    data = os.urandom(SIZE)
    for name in ("source", "target"):
        (tmp_path / name).write_bytes(data)
    return tmp_path / "source", tmp_path / "target"


def compared(sides: tuple[Path, Path], control: Control | None = None) -> Verified:
    return compare(*sides, SIZE, control or Control(), lambda: None)


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_equal_ones(sides: tuple[Path, Path]) -> None:
    control = Control()
    first = compared(sides, control)
    assert (first.differences, control.bytes) == ([], SIZE)
    for side in sides:
        put(side, MIB, b"other")
    assert compared(sides).digest not in ("", first.digest)


@pytest.mark.parametrize("at", [0, MIB + BLOCK + 7, SIZE - 1])
def test_a_byte_that_differs(sides: tuple[Path, Path], at: int) -> None:
    put(sides[1], at, bytes([sides[1].read_bytes()[at] ^ 1]))
    start = at // BLOCK * BLOCK
    assert compared(sides).differences == [f"bytes {start} to {start + BLOCK - 1}"]


def test_a_write_between_the_two_reads_is_no_difference(
    sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the target later."""
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    put(sides[0], MIB, b"newer")
    late = threading.Timer(0.2, put, (sides[1], MIB, b"newer"))
    late.start()
    found = compared(sides)
    late.join()
    assert (found.differences, found.digest) == ([], compared(sides).digest)


def test_it_ends_when_told_to(sides: tuple[Path, Path]) -> None:
    control = Control()
    control.stop()
    with pytest.raises(Stopped):
        compared(sides, control)


def test_what_watches_ends_it(sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH", 0.0)

    def failed() -> None:
        raise HostError("a leg has failed")

    with pytest.raises(HostError, match="a leg has failed"):
        compare(*sides, SIZE, Control(), failed)
