"""A volume read again from its storage, whenever it is asked for, and compared with what is kept of it.

Kept are: the digest that its last move was proven by, while its source is kept also what was written down of each file
or extent, and that source itself. What somebody wrote since differs rightly: then a difference says nothing, and is
not called one.
"""

from __future__ import annotations

import contextlib
import enum
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec

from volumed import context
from volumed.core.core import Core
from volumed.errors import IntegrityError, InUse, VolumedError
from volumed.migration.copying import workdir_of
from volumed.migration.inspection import Inspection
from volumed.migration.losses import forgone
from volumed.migration.movers import kept as movers_kept
from volumed.migration.movers.device import DeviceMover
from volumed.migration.movers.mover import Control
from volumed.migration.movers.tree import TreeMover
from volumed.migration.places import OtherPlace, at, device_of
from volumed.migration.records import Records
from volumed.migration.undo import moved_at, refuse_second, users_since
from volumed.model import Copy, Migration, MigrationPhase, MovePath, Volume, VolumeMode, now

_PREFIX = "read-"


class Outcome(enum.StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    CHANGED = "changed"  # it was used since, so that it may rightly differ
    UNKNOWN = "unknown"  # what is kept cannot be compared


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`differences`: files or extents, at most a hundred."""

    against: str
    outcome: Outcome
    text: str = ""
    differences: tuple[str, ...] = ()


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """`digest`: of all that was read, by tree or by blocks as `path` says."""

    volume: str
    path: MovePath
    digest: str
    bytes: int
    files: int
    seconds: float
    comparisons: tuple[Comparison, ...]

    @property
    def different(self) -> bool:
        return any(found.outcome is Outcome.DIFFERENT for found in self.comparisons)


class Found(NamedTuple):
    """What was read, and the folder in which all of it is written down."""

    path: MovePath
    digest: str
    bytes: int
    files: int
    workdir: Path


class Kept(NamedTuple):
    """What a copy was proven by. `workdir` may be gone, or not hold what it should any more. `beginning`: what it is
    compared with may be a larger device."""

    path: MovePath
    digest: str
    workdir: Path
    losses: frozenset[str] = frozenset()
    beginning: bool = False


class Verifications:
    def __init__(self, core: Core, records: Records) -> None:
        self._core = core
        self._records = records
        self._workdirs = core.settings.state_dir / "migrations"

    def run(self, reference: str, control: Control, tell: Callable[[str], None] = lambda step: None) -> Verification:
        """`tell` is told what it is at. Raises InUse for a volume that somebody uses, HostError naming what of it
        cannot be read, Stopped."""
        begun = time.monotonic()
        volume = self.check(reference)
        moved = self._last_move(volume)
        with context.request(context.request_id.get()), self._folder() as folder:
            tell(f"reading {volume.backend}")
            changed = self._changed_since_move(volume, moved) if moved else ""
            by_blocks = volume.mode is VolumeMode.BLOCK or bool(
                moved and moved.carried_by is MovePath.BLOCK and not changed
            )
            found = (self._read_blocks if by_blocks else self._read_tree)(volume, folder / "volume", control)
            comparisons = []
            held = self._last_backup(volume)
            if held is not None and held.path is found.path:
                comparisons.append(self._with_backup(found, volume, held))
            if moved is not None:
                comparisons.append(self._with_record(found, moved, changed))
                if moved.phase is MigrationPhase.KEPT:
                    tell(f"reading {moved.source.backend}")
                    comparisons.append(self._of_source(volume, moved, folder / "source", control))
        return _verification(volume.name, found, begun, comparisons)

    def check(self, reference: str) -> Volume:
        """Raises NotFound, and InUse for one that cannot be read now."""
        volume = self._core.volumes.get(reference)
        refuse_second(self._core.repository, volume)
        self._check_idle(volume)
        return volume

    def forget(self) -> None:
        """What a crash left of readings."""
        for folder in self._workdirs.glob(f"{_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        self._workdirs.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self._workdirs) as folder:
            yield Path(folder)

    # Whether it is still what was moved
    def _check_idle(self, volume: Volume) -> None:
        holders = self._core.mounts.holders(volume)
        if holders:
            raise InUse(
                "would be read while it is written to: is in use by", holders=holders, subject=f"volume {volume.name}"
            )

    def _last_move(self, volume: Volume) -> Migration | None:
        """The one that brought it where it is."""
        committed = (MigrationPhase.KEPT, MigrationPhase.DONE)
        return next(
            (
                move
                for move in reversed(self._records.all())
                if move.volume_id == volume.id
                and move.phase in committed
                and move.target.stored_as == volume.stored_as
                and move.node == self._core.node
            ),
            None,
        )

    def _changed_since_move(self, volume: Volume, moved: Migration) -> str:
        if moved.carried_by is MovePath.BLOCK and moved.target.size != moved.source.size:
            return "was given another size by its move, which its blocks show"
        return self._changed_since(volume, moved_at(moved), moved.carried_by)

    def _changed_since(self, volume: Volume, moment: datetime, path: MovePath) -> str:
        """Why it may rightly be otherwise than it was then; empty when it may not."""
        repository = self._core.repository
        users = users_since(repository, volume, moment)
        if users:
            return f"was used since by {', '.join(users)}"
        rewritten = repository.touched(volume.id, rewritten=True)
        if rewritten and rewritten > moment:
            return f"was put back to another state at {rewritten:%Y-%m-%d %H:%M:%S}Z"
        touched = repository.touched(volume.id)
        if path is MovePath.BLOCK and volume.mode is VolumeMode.FILESYSTEM and touched and touched > moment:
            return f"was mounted or grown since, at {touched:%Y-%m-%d %H:%M:%S}Z, which its blocks show"
        if moment < now() - timedelta(seconds=self._core.settings.history):
            return "it is longer ago than the history of its users reaches"
        return ""

    def _last_backup(self, volume: Volume) -> Copy | None:
        """Of the volume as it was then, and of none of its snapshots."""
        found = [
            copy
            for copy in self._core.repository.copies()
            if copy.is_backup and copy.volume_id == volume.id and not copy.snapshot
        ]
        return found[-1] if found else None

    def _with_backup(self, found: Found, volume: Volume, held: Copy) -> Comparison:
        changed = self._changed_since(volume, held.created, held.path)
        return compare(found, self._kept(held), against=f"the record of backup {held.id}", changed=changed)

    def _kept(self, held: Copy) -> Kept:
        losses = self._missing(held.target.backend, held.accepted)
        return Kept(held.path, held.digest, workdir_of(self._core, held), losses, beginning=True)

    def run_backup(self, held: Copy, control: Control, tell: Callable[[str], None]) -> Verification:
        """A backup against its record."""
        begun = time.monotonic()
        volume = self._core.repository.volume(held.made) if held.made else None
        if volume is None:
            raise IntegrityError("its data is gone", subject=f"backup {held.id}", hint="run `volumectl doctor`")
        with context.request(context.request_id.get()), self._folder() as folder:
            tell(f"reading {volume.backend}")
            by_blocks = held.path is MovePath.BLOCK
            found = (self._read_blocks if by_blocks else self._read_tree)(volume, folder / "volume", control)
            comparison = compare(found, self._kept(held), against=f"the record of backup {held.id}")
        return _verification(f"backup {held.id}", found, begun, [comparison])

    # Reading
    def _read_tree(self, volume: Volume, folder: Path, control: Control) -> Found:
        """Whoever wants to use it meanwhile may, and then nothing is told."""
        begun = now()
        with Inspection(self._core).tree_of(volume) as root:
            found = _read(TreeMover(root, root, folder), MovePath.TREE, control)
        if users_since(self._core.repository, volume, begun):
            raise InUse("came into use while it was read", subject=f"volume {volume.name}", hint="try again later")
        return found

    def _read_blocks(self, volume: Volume, folder: Path, control: Control) -> Found:
        """Whoever wants to use it meanwhile waits."""
        core, backend = self._core, self._core.backends.get(volume.backend)
        presence = core.mounts.presence
        with core.locks.hold(volume.id, subject=f"volume {volume.name}"):
            self._check_idle(volume)
            backend.call_holding(lambda: presence.remove(volume, backend.driver))
            device = backend.call_holding(lambda: device_of(volume, backend, presence))
            try:
                return _read(DeviceMover(device, device, folder), MovePath.BLOCK, control)
            finally:
                backend.call_holding(lambda: presence.remove(volume, backend.driver))

    def _of_source(self, volume: Volume, moved: Migration, folder: Path, control: Control) -> Comparison:
        """The source of a move, which is to be what it was for as long as it is kept."""
        against = f"the source kept on {moved.source.backend}, with the record of move {moved.id}"
        if moved.path is MovePath.LIVE:
            text = "it was written to until the moment it was left, and proven while it was"
            return Comparison(against=against, outcome=Outcome.UNKNOWN, text=text)
        place = OtherPlace(self._core, moved)
        source = at(volume, moved.source)
        with self._core.locks.hold(f"reclaim:{moved.id}", subject=f"migration {moved.id}"):
            if self._records.get(moved.id).phase is not MigrationPhase.KEPT:
                return Comparison(against=against, outcome=Outcome.UNKNOWN, text="it went while the volume was read")
            try:
                path = place.open(source, moved.carried_by)
                mover = (DeviceMover if moved.carried_by is MovePath.BLOCK else TreeMover)(path, path, folder)
                found = _read(mover, moved.carried_by, control)
            except VolumedError as error:
                control.check()
                return Comparison(against=against, outcome=Outcome.DIFFERENT, text=f"cannot be read: {error}")
            finally:
                place.close(source)
        return compare(found, Kept(moved.carried_by, moved.digest, place.workdir), against=against)

    def _with_record(self, found: Found, moved: Migration, changed: str) -> Comparison:
        against = f"the record of move {moved.id} from {moved.source.backend}"
        losses = self._missing(moved.target.backend, moved.accepted)
        kept = Kept(moved.carried_by, moved.digest, self._workdirs / moved.id, losses)
        return compare(found, kept, against=against, changed=changed)

    def _missing(self, backend: str, accepted: tuple[str, ...]) -> frozenset[str]:
        return forgone(self._core.backends.get(backend).driver, accepted)


def _verification(name: str, found: Found, begun: float, comparisons: list[Comparison]) -> Verification:
    return Verification(
        volume=name,
        path=found.path,
        digest=found.digest,
        bytes=found.bytes,
        files=found.files,
        seconds=round(time.monotonic() - begun, 3),
        comparisons=tuple(comparisons),
    )


def _read(mover: DeviceMover | TreeMover, path: MovePath, control: Control) -> Found:
    mover.workdir.mkdir(mode=0o700)
    with contextlib.closing(mover):
        told = mover.read(control)
    return Found(path, told.digest, told.bytes, told.files, mover.workdir)


def compare(found: Found, kept: Kept, *, against: str, changed: str = "") -> Comparison:
    """`changed`: why it may rightly be otherwise."""
    if found.path is not kept.path:
        text = changed or f"it was proven by {kept.path}, and read by {found.path}"
        return Comparison(
            against=against, outcome=Outcome.CHANGED if changed else Outcome.UNKNOWN, text=text or "no digest is kept"
        )
    if found.digest == kept.digest:
        return Comparison(against=against, outcome=Outcome.EQUAL)
    details = _details(found, kept)
    if changed:
        return Comparison(against=against, outcome=Outcome.CHANGED, text=changed, differences=tuple(details or ()))
    if details == []:  # all that differs is what was to be lost
        text = f"but for {', '.join(sorted(kept.losses))}" if kept.losses else ""
        return Comparison(against=against, outcome=Outcome.EQUAL, text=text)
    if details is None and kept.losses:
        text = f"it does without {', '.join(sorted(kept.losses))}, and no more than one digest is kept"
        return Comparison(against=against, outcome=Outcome.UNKNOWN, text=text)
    text = f"the digest is {found.digest[:16]}, and was {kept.digest[:16]}"
    return Comparison(against=against, outcome=Outcome.DIFFERENT, text=text, differences=tuple(details or ()))


def _details(found: Found, kept: Kept) -> list[str] | None:
    """File by file, or extent by extent; None where it is not known any more what was there."""
    known = movers_kept.digest(kept.workdir, kept.path)
    if not known or known != kept.digest:
        return None
    return movers_kept.differences(kept.workdir, found.workdir, kept.path, losses=kept.losses, beginning=kept.beginning)
