"""One move, phase by phase: each is written down before it acts, and bears being begun again after a crash in it.

Up to the commit point the source is the volume and was never written to: any failure takes the target away. The commit
point is one transaction of the ledger. After it everything goes on to the end, however often it takes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

from volumed import context
from volumed.core.core import Core
from volumed.driver import Driver
from volumed.errors import (
    IntegrityError,
    InUse,
    PreconditionFailed,
    VolumedError,
)
from volumed.migration import losses
from volumed.migration.explaining import explained
from volumed.migration.movers.device import DeviceMover
from volumed.migration.movers.mover import Busy, Control, EngineSilent, Mover, Round, Writers
from volumed.migration.movers.tree import TreeMover
from volumed.migration.places import at, source_and_target
from volumed.migration.records import Records
from volumed.migration.site import Known, Sides, Site
from volumed.model import Binding, Engine, Migration, MigrationPhase, MovePath, Volume, VolumeState, now
from volumed.store.repository import Transaction
from volumed.testing import crash

_log = logging.getLogger(__name__)
# Of a volume that is in use and whose users are not to be stopped: how often it is looked whether they are gone.
WAITING = 1.0
# Seconds for which an engine that refuses to let containers go on is asked again.
LETTING_GO = 30.0
# Rounds after which what is left will not become less.
MOST_ROUNDS = 30


class StopWriters(Protocol):
    """`freeze`: whether it will do that a consumer is frozen. What it wrote is then seen in the tree, but need not have
    reached the device, and its file system stays mounted."""

    def __call__(self, volume: Volume, bindings: list[Binding], *, freeze: bool) -> Writers | None: ...


class Step(NamedTuple):
    """What it is at, for a progress bar: `total` bytes from `base` of the control's counter on."""

    name: str
    total: int
    base: int
    begun: float  # time.monotonic


class Move:
    def __init__(
        self, core: Core, records: Records, migration: Migration, control: Control, stop_writers: StopWriters
    ) -> None:
        self._core = core
        self._records = records
        self.control = control
        self._stop_writers = stop_writers
        self._site = Site(core, migration)
        self.step = Step("preparing", 0, 0, time.monotonic())
        self._mover: Mover | None = None
        self._steps: dict[MigrationPhase, Callable[[], None]] = {
            MigrationPhase.PLANNED: self._prepare,
            MigrationPhase.PREPARED: self._take,
            MigrationPhase.SEEDING: self._seed,
            MigrationPhase.CONVERGING: self._converge,
            MigrationPhase.QUIESCED: self._begin_last_round_again,
            MigrationPhase.VERIFIED: self._begin_last_round_again,
            MigrationPhase.CUTOVER: self._go_over,
            MigrationPhase.ABORTING: self._take_back,
        }

    @property
    def migration(self) -> Migration:
        """As it was last written down."""
        return self._site.migration

    @migration.setter
    def migration(self, changed: Migration) -> None:
        self._site.migration = changed

    # Going through the phases
    def run(self) -> None:
        """Until it ends, is kept, or is stopped. Raises what went wrong; the phase is then where it happened."""
        try:
            while self.migration.phase in self._steps:
                if not self.migration.phase.committed and self.migration.phase is not MigrationPhase.ABORTING:
                    self.control.check()
                self._steps[self.migration.phase]()
        finally:
            self._close()

    def _advance(self, phase: MigrationPhase, *also: Callable[[Transaction], None], **fields: object) -> None:
        self.migration = self._records.advance(self.migration, phase, *also, **fields)
        crash.point("migrate.advanced")

    # Up to the copy
    def _prepare(self) -> None:
        with self._site.locked() as volume:
            if volume.state is not VolumeState.READY or self._core.journal.settle(volume) is None:
                raise Busy(f"is {volume.state}", subject=f"volume {volume.name}")
        made = self.migration.target
        if self.migration.path is not MovePath.NATIVE:  # which is born with its data: see `_seed`
            made = self._site.other().make(at(volume, made), blank=self.migration.carried_by is MovePath.BLOCK)
        crash.point("migrate.made")
        self._advance(MigrationPhase.PREPARED, target=made)

    def _take(self) -> None:
        self._site.take()
        self._advance(MigrationPhase.SEEDING)

    def _open(self) -> Mover:
        """Both places present, and what carries the data between them."""
        if self._mover is None:
            sides = self._site.sides()
            self._mover = self._mover_between(sides)
        return self._mover

    def _mover_between(self, sides: Sides) -> Mover:
        workdir, filled = self._site.other().workdir, self.migration.path is MovePath.NATIVE
        if self.migration.carried_by is MovePath.BLOCK:
            return DeviceMover(sides.source, sides.target, workdir, filled=filled)
        lost = losses.forgone(self._target_driver, self.migration.accepted)
        return TreeMover(sides.source, sides.target, workdir, losses=lost, filled=filled)

    @property
    def _target_driver(self) -> Driver:
        return self._core.backends.get(self.migration.target.backend).driver

    def _seed(self) -> None:
        if self.migration.target.handle is None:
            self.step = Step("copying", self.migration.expected, self.control.bytes, time.monotonic())
            self.migration = self._records.change(self.migration.id, **self._site.copy_natively(self.control))
        mover = self._open()
        if self.migration.carried_by is MovePath.TREE:
            subject = f"volume {self.migration.volume_name}"
            losses.check_tree(mover.source, self._target_driver, self.migration.accepted, subject=subject)
            mover.watch()
        estimate = mover.estimate(self.control)
        self.migration = self._records.change(self.migration.id, expected=estimate.bytes)
        self._copy(mover)
        crash.point("migrate.seeded")
        self._prove()
        self._advance(MigrationPhase.CONVERGING)

    def _copy(self, mover: Mover, *, last: bool = False) -> Round:
        self.step = Step("copying", self.migration.expected, self.control.bytes, time.monotonic())
        done = mover.round(self.control, last=last)
        self.migration = self._records.change(
            self.migration.id, copied=self.migration.copied + done.changed, files=self.migration.files + done.files
        )
        return done

    # Holding still
    def _converge(self) -> None:
        """Rounds while it is in use, each proven at once; then whoever writes is held still, or waited for."""
        self.let_go()  # a crash between holding still and the last round
        mover, rounds = self._open(), 0
        while self._site.others(self._site.volume()):
            spent = 0.0
            if self.migration.carried_by is MovePath.TREE:
                spent, rounds = self._copy(mover).seconds, rounds + 1
                self._prove()
            reason = self._hold_and_finish(mover, rounds)
            if not reason:
                return
            self.step = Step(f"waiting until nobody uses it{reason}".strip(), 0, 0, time.monotonic())
            self._wait(WAITING + 2 * spent)
        self._last_round(None, None)

    def _hold_and_finish(self, mover: Mover, rounds: int) -> str:
        """Why its users cannot be held still now; empty when they were, and all is done. Raises PreconditionFailed when
        the pause would be longer than it may be, however often the rounds go on."""
        seen = self._core.repository.disturbance(self.migration.volume_id)  # read first: who comes later shows
        others = self._site.others(self._site.volume())
        writers = None if self.migration.wait else self._writers(others)
        if writers is None:
            return " "
        predicted, limit = self._predicted(mover), self.migration.max_pause
        if limit is not None and predicted > limit:
            if rounds >= MOST_ROUNDS:
                raise PreconditionFailed(
                    f"so much changes that its users would wait about {predicted:.1f} s, and {limit:g} s are the limit",
                    subject=f"volume {self.migration.volume_name}",
                    hint="allow a longer --max-pause, or move it when less is written",
                )
            return f": the pause would be {predicted:.1f} s"
        try:
            self._with_writers_held(writers, Known(frozenset(held.mount_id for held in others), seen))
        except InUse as error:
            if self.migration.phase is not MigrationPhase.CONVERGING:
                raise
            return f": {error}"
        return ""

    def _writers(self, bindings: list[Binding]) -> Writers | None:
        return self._stop_writers(self._site.volume(), bindings, freeze=self.migration.carried_by is MovePath.TREE)

    @staticmethod
    def _predicted(mover: Mover) -> float:
        """Seconds of a last round, as far as can be told: what is left is read, written, and read back."""
        left = mover.pending()
        return 0.0 if left is None else 0.2 + left.bytes / (50 << 20) + left.files / 2000

    def _wait(self, seconds: float) -> None:
        """Or until nobody uses it any more."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self._site.others(self._site.volume()):
            self.control.check()
            time.sleep(0.2)

    def _with_writers_held(self, writers: Writers, known: Known) -> None:
        self._note_held(writers.plan())
        crash.point("migrate.planned-hold")
        begun, shown = time.monotonic(), False
        try:
            writers.hold(self.migration.held, self._note_held)
            crash.point("migrate.held")
            self._last_round(known, writers)
            shown = True
        finally:
            # Past the commit point nobody goes on while the path shows the old place: `_go_over` lets them go.
            if shown or not self._records.get(self.migration.id).phase.committed:
                left = b"" if self._let_go(writers, moved=shown) else self.migration.held
                if shown:
                    self._say_stranded(writers.left_behind(self.migration.held))
                pause = round(time.monotonic() - begun, 3)
                self.migration = self._records.change(self.migration.id, held=left, pause=pause)

    def _note_held(self, plan: bytes) -> None:
        self.migration = self._records.change(self.migration.id, held=plan)

    def _let_go(self, writers: Writers, *, moved: bool) -> bool:
        """Whether all could be. One that its engine refuses to let go is tried again for a while; for an engine that
        does not answer, and may be starting anew, it is waited."""
        ends, said = time.monotonic() + LETTING_GO, False
        while True:
            try:
                stranded, silent = writers.release(self.migration.held, self._note_held, moved=moved), False
            except EngineSilent as error:
                stranded, silent = [f"its containers are held until the engine answers: {error}"], True
            if not stranded:
                return True
            late = time.monotonic() > ends
            if late and not said:
                said = True
                self._say_stranded(stranded)
            if (late and not silent) or self.control.stopped:
                return False
            time.sleep(WAITING)

    def _say_stranded(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._core.events.publish("migration.stranded", self.migration.volume_name, line, level=logging.ERROR)

    def _last_round(self, known: Known | None, writers: Writers | None) -> None:
        """Nobody writes from here to the commit point. Who wants to mount the volume meanwhile waits for the lock, and
        then gets the new place. `known`: None when nobody is held still, as nobody uses it."""
        begun = time.monotonic()
        mover = self._open()
        with self._site.locked() as volume:
            self._site.check_known(volume, known)
            if self.migration.carried_by is MovePath.BLOCK and self._site.settle_device(volume, mover.source):
                mover.watch()
            self._advance(MigrationPhase.QUIESCED)
            told = mover.changed() is not None
            if writers is not None and not told:
                writers.seal(self.migration.held)
            self._copy(mover, last=True)
            crash.point("migrate.copied")
            digest = self._prove()
            if writers is not None and told:  # only now: whom a user lets go writes as ever, and it is all done again
                writers.seal(self.migration.held)
            if mover.changed():
                raise Busy("was written to while its users were held", subject=f"volume {volume.name}")
            self._advance(MigrationPhase.VERIFIED, digest=digest)
            self._close_target(volume)
            crash.point("migrate.closed")
            self._site.check_path_unheld(volume)
            if writers is not None:
                writers.check_alone(self.migration.held)
            self._commit(volume, pause=time.monotonic() - begun)
            self._show_new_place()

    def _prove(self) -> str:
        """The digest. Raises IntegrityError naming what differs."""
        self.step = Step("verifying", self.migration.expected, self.control.bytes, time.monotonic())
        found = self._open().verify(self.control)
        if found.differences:
            raise IntegrityError(
                f"the copy is not what was read: {'; '.join(found.differences[:10])}",
                subject=f"volume {self.migration.volume_name}",
                hint=f"look at backend {self.migration.target.backend}; the source was not touched",
            )
        return found.digest

    def _close_target(self, volume: Volume) -> None:
        """It is whole, on stable storage, and may be mounted as the volume from now on."""
        target = at(volume, self.migration.target)
        source_size, place = self.migration.source.size, self._site.other()
        block = self.migration.carried_by is MovePath.BLOCK
        grows = block and target.size and source_size and target.size > source_size
        mover, self._mover = self._open(), None
        if grows:
            mover.forget()
        mover.close()
        if grows:
            place.grow(target)
        place.close(target)

    def _commit(self, volume: Volume, *, pause: float) -> None:
        core = self._core
        source, target = source_and_target(self.migration, volume)
        left = tuple(core.repository.snapshots(volume.id))
        held = core.repository.binding(volume.id, node=core.node, engine=Engine.VOLUMED, mount_id=self.migration.id)

        def switch(transaction: Transaction) -> None:
            transaction.put(target, previous=source)
            for snapshot in left:
                transaction.delete(snapshot)
            if held is not None:
                transaction.delete(held)
            transaction.calm(volume.id)

        kept_until = now() + timedelta(seconds=self.migration.keep_source)
        self._advance(
            MigrationPhase.CUTOVER,
            switch,
            snapshots=left,
            kept_until=kept_until,
            pause=round(pause, 3),
            error="",
            untouched=self.migration.path is not MovePath.LIVE,  # whose users never stopped
        )
        crash.point("migrate.committed")

    # Past the commit point
    def _show_new_place(self) -> None:
        """Up to the mark nobody can see it, and there is a way back (`Undo.fall_back`). Who is held still goes on at
        a place that works."""
        if self.migration.untouched:
            if self.migration.held:
                with context.request(context.request_id.get(), timeout=self._core.settings.operation_timeout):
                    self._site.prove_new_place()
            crash.point("migrate.proven")
            self.migration = self._records.change(self.migration.id, untouched=False)
        self._site.show_new_place()

    def _go_over(self) -> None:
        self._show_new_place()
        if self.migration.held:
            self._release_held(moved=True)
        self._site.take_source_away()
        self._core.repository.calm(self.migration.volume_id)
        crash.point("migrate.shown")
        self._advance(MigrationPhase.KEPT)

    def _release_held(self, *, moved: bool) -> None:
        """After a crash: whoever was stopped goes on."""
        writers = self._writers([])
        if writers is not None and not self._let_go(writers, moved=moved):
            self.control.check()  # when it is stopped it goes on with this when it is begun again
        self._note_held(b"")

    def let_go(self) -> None:
        """Of a move that does not go on now: nobody waits for it."""
        if self.migration.held:
            self._release_held(moved=False)

    def _begin_last_round_again(self) -> None:
        """A crash, or an error, between holding still and the commit point."""
        self.let_go()
        if self.migration.carried_by is MovePath.TREE:
            self._open().watch()
        self._advance(MigrationPhase.CONVERGING)

    # Back
    def _take_back(self) -> None:
        """The target goes; the source was never written to."""
        self._close()
        core = self._core
        if self.migration.fell_back:
            self._site.keep_old_place()
        self.let_go()
        volume = core.repository.volume(self.migration.volume_id)
        if volume is not None:
            with core.locks.hold(volume.id):
                self._site.give_back(volume)
        place = self._site.other()
        gone = volume or Volume(
            id=self.migration.volume_id,
            name=self.migration.volume_name,
            backend=self.migration.target.backend,
            state=VolumeState.DELETING,
            created=self.migration.created,
        )
        place.destroy(at(gone, self.migration.target))
        crash.point("migrate.destroyed")
        self._advance(self._end_of_the_way_back(), error="" if self.migration.aborted else self.migration.error)
        place.forget()

    def _end_of_the_way_back(self) -> MigrationPhase:
        if any(phase is MigrationPhase.KEPT for phase, _ in self.migration.phases):
            return MigrationPhase.ROLLED_BACK
        return MigrationPhase.ABORTED if self.migration.aborted else MigrationPhase.FAILED

    def _close(self) -> None:
        if self._mover is not None:
            with contextlib.suppress(VolumedError, OSError):
                self._mover.close()
            self._mover = None

    def explained(self, error: VolumedError) -> VolumedError:
        target = self._core.backends.get(self.migration.target.backend)
        return explained(error, target, volume_name=self.migration.volume_name)
