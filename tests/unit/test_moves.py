"""What a move does at its commit point, whatever goes wrong there: by stand-ins for what is around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from volumed.config import Settings
from volumed.errors import HostError
from volumed.host import priority
from volumed.migration import move as moves
from volumed.migration.move import Move
from volumed.migration.movers.block import BlockMover
from volumed.migration.movers.mover import Busy, Control, EngineSilent, Writers
from volumed.migration.site import Known, Site
from volumed.model import Migration, MigrationId, MigrationPhase, MovePath, Place, Volume, VolumeId, VolumeState, now

VOLUME = Volume(id=VolumeId("v"), name="data", backend="old", state=VolumeState.READY, created=now())
MIGRATION = Migration(
    id=MigrationId("m"),
    volume_id=VOLUME.id,
    volume_name="data",
    node="n",
    phase=MigrationPhase.CONVERGING,
    path=MovePath.TREE,
    source=Place(backend="old", stored_as=VolumeId("v")),
    target=Place(backend="new", stored_as=VolumeId("w")),
    created=now(),
)


class Held(Writers):
    """Remembers how they were let go; their engine refuses that the first few times, or does not answer."""

    def __init__(self, refusals: int = 0, *, silent: bool = False) -> None:
        self.released: list[bool] = []
        self._refusals = refusals
        self._silent = silent

    def plan(self) -> bytes:
        return b"plan"

    def describe(self, plan: bytes) -> Sequence[str]:
        return []

    def hold(self, plan: bytes, note: Callable[[bytes], None]) -> None:
        pass

    def seal(self, plan: bytes) -> None:
        pass

    def check_alone(self, plan: bytes) -> None:
        pass

    def left_behind(self, plan: bytes) -> Sequence[str]:
        return []

    def release(self, plan: bytes, note: Callable[[bytes], None], *, moved: bool) -> Sequence[str]:
        self.released.append(moved)
        self._refusals -= 1
        if self._refusals >= 0 and self._silent:
            raise EngineSilent("it does not answer")
        return ["its port is taken"] if self._refusals >= 0 else []


class Records:
    def __init__(self) -> None:
        self.current = MIGRATION

    def get(self, _: str) -> Migration:
        return self.current

    def change(self, _: str, **fields: object) -> Migration:
        self.current = msgspec.structs.replace(self.current, **fields)
        return self.current


class Around:
    """Site and core at once."""

    settings = Settings()

    def __init__(self) -> None:
        self.migration = MIGRATION
        self.disturbances = 7

    def prove_new_place(self) -> None:
        raise HostError("held by a shell")

    @property
    def repository(self) -> Around:
        return self

    @property
    def events(self) -> Around:
        return self

    def publish(self, *_: object, **__: object) -> None:
        pass

    def disturbance(self, _: str) -> int:
        return self.disturbances

    def bindings(self, _: str) -> list[object]:
        return []


def move_of(around: Around, records: Records, monkeypatch: pytest.MonkeyPatch, *, commits: bool) -> Move:
    def last_round(*_: object) -> None:
        if commits:
            made.migration = records.change("m", phase=MigrationPhase.CUTOVER, untouched=True)
            made._show_new_place()
        else:
            raise HostError("the target is gone")

    monkeypatch.setattr(Move, "_last_round", last_round)
    made = Move(cast("Any", around), cast("Any", records), MIGRATION, Control(), lambda *_, **__: None)
    monkeypatch.setattr(made, "_site", around)
    return made


def hold(move: Move, writers: Writers) -> None:
    move._with_writers_held(writers, Known(frozenset(), 0))


def test_past_the_commit_point_nobody_goes_on_at_the_old_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path shows it still; a frozen container would write there."""
    records, writers = Records(), Held()
    with pytest.raises(HostError, match="shell"):
        hold(move_of(Around(), records, monkeypatch, commits=True), writers)
    assert writers.released == []
    assert records.current.held == b"plan"


def test_before_it_everybody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    records, writers = Records(), Held()
    with pytest.raises(HostError, match="gone"):
        hold(move_of(Around(), records, monkeypatch, commits=False), writers)
    assert writers.released == [False]
    assert records.current.held == b""


@pytest.mark.parametrize(("patience", "silent", "left"), [(30.0, False, b""), (0.0, False, b"plan"), (0.0, True, b"")])
def test_who_cannot_be_let_go_at_once_is_not_forgotten(
    patience: float, silent: bool, left: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an engine that does not answer it is waited as long as it takes."""
    monkeypatch.setattr(moves, "LETTING_GO", patience)
    monkeypatch.setattr(moves, "WAITING", 0.0)
    records = Records()
    with pytest.raises(HostError, match="gone"):
        hold(move_of(Around(), records, monkeypatch, commits=False), Held(refusals=2, silent=silent))
    assert records.current.held == left


def test_who_came_by_an_id_that_is_known_came_all_the_same() -> None:
    """Podman has one id for all its containers."""
    around = Around()
    site = Site(cast("Any", around), MIGRATION)
    site.check_known(VOLUME, Known(frozenset({"podman"}), 7))
    around.disturbances = 8
    with pytest.raises(Busy, match="came into use"):
        site.check_known(VOLUME, Known(frozenset({"podman"}), 7))


@contextlib.contextmanager
def mover_of(folder: Path) -> Iterator[BlockMover]:
    mover = BlockMover(folder / "source", folder / "target", folder)
    try:
        yield mover
    finally:
        mover.close()


def test_what_was_written_to_the_target_by_others_is_copied_again(tmp_path: Path) -> None:
    """Its file system was grown there, and then the commit failed."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"s" * (3 << 20))
    target.write_bytes(bytes(4 << 20))
    with mover_of(tmp_path) as mover:
        mover.round(Control(), last=True)
        mover.verify(Control())
        mover.forget()
    with target.open("r+b") as grown:
        grown.write(b"grown")
    with mover_of(tmp_path) as mover:
        mover.watch()
        mover.round(Control(), last=True)
        assert mover.verify(Control()).differences == []
    assert target.read_bytes()[: 3 << 20] == source.read_bytes()


@pytest.mark.parametrize("last", [False, True])
def test_nobody_who_is_held_still_waits_for_a_proof_of_low_priority(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("source", "target"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    lowered: list[bool] = []
    monkeypatch.setattr(priority, "lower", lambda: lowered.append(True))
    with mover_of(tmp_path) as mover:
        mover.round(Control(), last=last)
        assert bool(lowered) is not last
        lowered.clear()
        mover.verify(Control())
        assert bool(lowered) is not last
