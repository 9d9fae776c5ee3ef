"""Moves as an operator sees them: planned, begun, watched, paused, aborted, undone. Each has a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from volumed import context
from volumed.core.core import Core
from volumed.errors import InvalidRequest, PreconditionFailed, VolumedError
from volumed.migration import losses
from volumed.migration.copies import Copies
from volumed.migration.inspection import Inspection
from volumed.migration.live import LiveMove
from volumed.migration.move import Move, StopWriters
from volumed.migration.movers.mover import Control, Stopped
from volumed.migration.places import OtherPlace, at, place_of
from volumed.migration.planner import Plan, Wish
from volumed.migration.progress import Progress, progress_of
from volumed.migration.records import Records
from volumed.migration.site import Site
from volumed.migration.undo import Undo, moved_at, refuse_second
from volumed.migration.verification import Verifications
from volumed.model import Engine, Migration, MigrationPhase, MovePath, Volume, VolumeState, new_migration_id, now
from volumed.testing import crash

_log = logging.getLogger(__name__)

# At once: more would only take each other's bandwidth.
PER_BACKEND, PER_NODE = 4, 8
# Storage that does not answer for this long (about eight minutes of growing pauses) ends a move; past its commit point
# nothing does.
MOST_ATTEMPTS = 20
LONGEST_PAUSE = 30.0
SWEEP = 5.0


class Migrations:
    def __init__(self, core: Core, *, stop_writers: StopWriters = lambda volume, bindings, *, freeze: None) -> None:
        """`stop_writers`: how the users of a volume are held still, or None when that is not to be done."""
        self._core = core
        self._records = Records(core.repository, core.locks, core.events)
        self._inspection = Inspection(core)
        self._undo = Undo(core, self._records)
        self.copies = Copies(core)
        self.verifications = Verifications(core, self._records)
        self._stop_writers = stop_writers
        self._guard = threading.Lock()
        self._running: dict[str, tuple[threading.Thread, Control]] = {}
        self._moves: dict[str, Move] = {}
        self._closing = threading.Event()
        self._begun = now()
        self._node_room = threading.BoundedSemaphore(PER_NODE)
        self._backend_room = {backend.name: threading.BoundedSemaphore(PER_BACKEND) for backend in core.backends.all()}

    # Asking
    def get(self, reference: str) -> Migration:
        return self._records.get(reference)

    def all(self) -> list[Migration]:
        return self._records.all()

    def progress(self, migration: Migration) -> Progress | None:
        """None when it does not run now."""
        move = self._moves.get(migration.id)
        if move is None:
            return None
        return progress_of(move.step, move.control)

    def plan(self, reference: str, wish: Wish) -> Plan:
        """What a move would do. Changes nothing; looks through the volume's data."""
        return self._inspection.plan(self._core.volumes.get(reference), wish)

    # Beginning
    def begin(self, reference: str, wish: Wish) -> Migration:
        """Raises PreconditionFailed with the list of what would be lost, and what the planner raises."""
        volume = self._core.volumes.get(reference)
        refuse_second(self._core.repository, volume)
        plan = self._inspection.plan(volume, wish)
        losses.check(plan.losses, wish.accept, subject=f"volume {volume.name}")
        migration = Migration(
            id=new_migration_id(),
            volume_id=volume.id,
            volume_name=volume.name,
            node=self._core.node,
            phase=MigrationPhase.PLANNED,
            path=plan.path,
            carrier=plan.carrier if plan.carrier is not plan.path else None,
            source=place_of(volume),
            target=plan.target,
            created=now(),
            by=wish.by,
            bandwidth=wish.bandwidth,
            max_pause=wish.max_pause,
            keep_source=wish.keep_source,
            wait=wish.wait,
            accepted=wish.accept,
            expected=plan.bytes,
        )
        with self._core.locks.hold(volume.id):
            refuse_second(self._core.repository, volume)
            migration = self._records.begin(migration)
        crash.point("migrate.planned")
        self._spawn(migration.id)
        return migration

    # Steering
    def throttle(self, reference: str, bandwidth: int) -> Migration:
        """Bytes a second; 0: as fast as it goes."""
        migration = self._records.change(self.get(reference).id, bandwidth=bandwidth)
        with self._guard:
            if migration.id in self._running:
                self._running[migration.id][1].rate = bandwidth
        return migration

    def pause(self, reference: str) -> Migration:
        """What was copied stays. Past the commit point there is nothing to pause."""
        migration = self._before_commit(reference, "paused")
        migration = self._records.change(migration.id, paused=True)
        self._halt(migration.id)
        return migration

    def resume(self, reference: str) -> Migration:
        migration = self._records.change(self._before_commit(reference, "resumed").id, paused=False)
        self._spawn(migration.id)
        return migration

    def abort(self, reference: str) -> Migration:
        """The target goes; the source was never touched."""
        while True:
            migration = self._before_commit(reference, "aborted")
            try:
                if migration.phase is not MigrationPhase.ABORTING:
                    migration = self._records.advance(
                        migration, MigrationPhase.ABORTING, aborted=True, paused=False, error=""
                    )
            except Stopped:
                continue  # it went on in this very moment: look again
            self._halt(migration.id)
            self._spawn(migration.id)
            return migration

    def _before_commit(self, reference: str, what: str) -> Migration:
        migration = self.get(reference)
        if migration.phase.ended or migration.phase.committed:
            raise PreconditionFailed(
                f"is {migration.phase} and cannot be {what}",
                subject=f"migration {migration.id}",
                hint="undo it with `volumectl migration rollback`" if migration.phase.committed else "",
            )
        return migration

    def finish(self, reference: str) -> Migration:
        """Give the undo up: the source goes now."""
        migration = self._kept(reference, "finished")
        self._records.change(migration.id, kept_until=now())
        self._reclaim(self.get(migration.id))
        return self.get(migration.id)

    def _kept(self, reference: str, what: str) -> Migration:
        migration = self.get(reference)
        if migration.phase is not MigrationPhase.KEPT:
            raise PreconditionFailed(
                f"is {migration.phase}: only a move whose source is kept can be {what}",
                subject=f"migration {migration.id}",
            )
        return migration

    def rollback(self, reference: str, *, discard: bool = False, carry: bool = False) -> Migration:
        """Back to the source. What was written since is carried back, by a move the other way into the kept source, or
        discarded, as it is told; when nobody used the volume since, there is nothing to tell.

        Raises PreconditionFailed saying what would be lost, InUse naming who holds it.
        """
        migration = self._kept(reference, "rolled back")
        with self._core.locks.hold(f"reclaim:{migration.id}", subject=f"migration {migration.id}"):
            migration = self._kept(migration.id, "rolled back")
            if migration.reclaiming:
                raise PreconditionFailed(
                    "its source is being taken away already",
                    subject=f"migration {migration.id}",
                    hint=f"move the volume to {migration.source.backend} anew",
                )
            undone = self._undo.carry_back(migration) if carry else self._undo.switch_back(migration, discard=discard)
        self._spawn(undone.id)
        return undone

    # Running
    def recover(self) -> None:
        """Before the machine is brought to what the ledger says: holds of moves that are over go, and a volume whose
        move had passed its commit point is shown at its new place."""
        self.copies.recover()
        self.verifications.forget()
        workdirs = self._core.settings.state_dir / "migrations"
        every = self.all()
        for migration in every:
            # A crash came before it was removed, or a power cut took back that it was.
            if migration.phase.ended and (workdirs / migration.id).exists():
                OtherPlace(self._core, migration).forget()
        known = {migration.id: migration for migration in every if not migration.phase.ended}
        for held in self._core.repository.bindings(node=self._core.node):
            move = known.get(held.mount_id)  # type: ignore[call-overload]
            if held.engine is Engine.VOLUMED and (move is None or move.phase.committed):
                with self._core.repository.transaction() as transaction:
                    transaction.delete(held)
        for migration in known.values():
            if migration.node != self._core.node:
                continue
            try:
                if migration.phase is MigrationPhase.CUTOVER and not migration.untouched:
                    with context.request(timeout=10.0):
                        Site(self._core, migration).show_new_place()
            except VolumedError as error:
                _log.warning("volume %s is shown at its new place later: %s", migration.volume_name, error)
            except Exception:
                _log.exception("volume %s is shown at its new place later", migration.volume_name)

    def start(self) -> None:
        """Go on with what was cut short."""
        for migration in self.all():
            if self._is_to_go_on(migration):
                self._spawn(migration.id)
        threading.Thread(target=self._sweep, name="migrations", daemon=True).start()
        self.copies.start()

    def _is_to_go_on(self, migration: Migration) -> bool:
        """Also when it rests, and holds somebody still whom its engine did not let go."""
        over = migration.phase.ended or migration.phase is MigrationPhase.KEPT
        rests = _rests(migration) and not migration.held
        return migration.node == self._core.node and not over and not rests

    def stop(self) -> None:
        """What was copied stays, and goes on at the next start."""
        self._closing.set()
        self.copies.stop()
        with self._guard:
            running = list(self._running.values())
        for _, control in running:
            control.stop()
        for thread, _ in running:
            thread.join(timeout=5.0)

    def wait(self, reference: str, *, timeout: float) -> Migration:
        """Until its thread ends."""
        with self._guard:
            running = self._running.get(self.get(reference).id)
        if running is not None:
            running[0].join(timeout)
        return self.get(reference)

    def _spawn(self, migration_id: str) -> None:
        with self._guard:
            if migration_id in self._running or self._closing.is_set():
                return
            control = Control()
            thread = threading.Thread(
                target=self._run, args=(migration_id, control), name=f"move-{migration_id[-6:]}", daemon=True
            )
            self._running[migration_id] = (thread, control)
        thread.start()

    def _halt(self, migration_id: str) -> None:
        """Its thread ends soon, and goes on by itself when it is to take the target away."""
        with self._guard:
            running = self._running.get(migration_id)
        if running is not None:
            running[1].stop()

    def _run(self, migration_id: str, control: Control) -> None:
        try:
            with context.request(migration_id[-12:]):
                while self._attempt(migration_id, control) and not self._closing.is_set():
                    control = Control()
                    with self._guard:
                        self._running[migration_id] = (threading.current_thread(), control)
        except Exception:
            _log.exception("move %s ended by a bug; it is begun again", migration_id)
        finally:
            with self._guard:
                del self._running[migration_id]
                self._moves.pop(migration_id, None)
        if not self._closing.is_set():
            self._look_again(migration_id)

    def _look_again(self, migration_id: str) -> None:
        """It was resumed or aborted just when its thread ended; or its source is not to be kept at all."""
        migration = self.get(migration_id)
        if migration.phase is MigrationPhase.KEPT:
            with contextlib.suppress(VolumedError):
                self._reclaim_due(migration)
        elif migration.phase is MigrationPhase.ABORTING:
            self._spawn(migration_id)

    def _attempt(self, migration_id: str, control: Control) -> bool:
        """Whether it is to be tried again."""
        migration = self.get(migration_id)
        control.rate = migration.bandwidth
        kind = LiveMove if migration.path is MovePath.LIVE else Move
        move = kind(self._core, self._records, migration, control, self._stop_writers)
        if _rests(migration):
            with contextlib.suppress(Stopped):
                move.let_go()
            return False
        try:
            with self._room(migration, control):
                self._moves[migration_id] = move
                move.run()
        except Stopped:
            return self.get(migration_id).phase is MigrationPhase.ABORTING
        except VolumedError as error:
            return self._failed(migration_id, move.explained(error), control)
        except Exception as error:
            _log.exception("move %s failed", migration_id)
            return self._failed(migration_id, VolumedError(f"a bug: {error!r}"), control)
        return False

    def _failed(self, migration_id: str, error: VolumedError, control: Control) -> bool:
        migration = self.get(migration_id)
        if migration.phase.ended:
            return False
        attempt = migration.attempt + 1
        with contextlib.suppress(VolumedError):  # somebody is at it: looked at again
            if self._overdue(migration) and self._undo.fall_back(migration, error):
                return True
        to_the_end = migration.phase.committed or migration.phase is MigrationPhase.ABORTING
        _log.warning("move of %s: %s", migration.volume_name, error, extra={"volume": migration.volume_name})
        if to_the_end or (error.retry_after is not None and attempt <= MOST_ATTEMPTS):
            kept = migration.error if migration.phase is MigrationPhase.ABORTING and migration.error else str(error)
            if (migration.phase.committed or migration.fell_back) and migration.held:
                there = (migration.source if migration.fell_back else migration.target).backend
                limit = self._core.settings.operation_timeout
                else_back = f", and go back after {limit:g} s" if migration.untouched else ""
                kept = f"its containers are held until backend {there}, where it lies now, works{else_back}: {error}"
                if migration.error != kept:
                    self._core.events.publish("migration.stranded", migration.volume_name, kept, level=logging.ERROR)
            self._records.change(migration_id, attempt=attempt, error=kept)
            ends = time.monotonic() + min(LONGEST_PAUSE, 0.5 * 2 ** min(attempt, 10))
            while time.monotonic() < ends and not control.stopped:
                time.sleep(0.1)
            return True
        with contextlib.suppress(Stopped):
            self._records.advance(migration, MigrationPhase.ABORTING, error=str(error))
        return True

    def _overdue(self, migration: Migration) -> bool:
        """Whether the new place had its time to come up, while this daemon was there to see it."""
        if migration.phase is not MigrationPhase.CUTOVER:
            return False
        since = max(moved_at(migration), self._begun)
        return (now() - since).total_seconds() > self._core.settings.operation_timeout

    @contextlib.contextmanager
    def _room(self, migration: Migration, control: Control) -> Iterator[None]:
        """A turn on this node and on both backends, always taken in one order."""
        names = sorted({migration.source.backend, migration.target.backend} & self._backend_room.keys())
        with contextlib.ExitStack() as taken:
            for room in (self._node_room, *(self._backend_room[name] for name in names)):
                while not room.acquire(timeout=0.2):
                    control.check()
                taken.callback(room.release)
            yield

    # Taking the source away
    def _sweep(self) -> None:
        while not self._closing.wait(SWEEP):
            try:
                self._sweep_once()
            except Exception:
                _log.exception("moves are looked at again later")

    def _sweep_once(self) -> None:
        """Sources whose time is over go; and a move whose thread a bug, or a full ledger, ended goes on."""
        for migration in self.all():
            if migration.phase is MigrationPhase.KEPT and migration.node == self._core.node:
                try:
                    self._reclaim_due(migration)
                except VolumedError as error:
                    _log.warning("the source of %s goes later: %s", migration.volume_name, error)
            elif self._is_to_go_on(migration):
                self._spawn(migration.id)

    def _reclaim_due(self, migration: Migration) -> None:
        """When its time is over, or the volume was removed, or it was begun."""
        gone = migration.reclaiming or self._core.repository.volume(migration.volume_id) is None
        if gone or (migration.kept_until is not None and migration.kept_until <= now()):
            self._reclaim(migration)

    def _reclaim(self, migration: Migration) -> None:
        core = self._core
        with core.locks.hold(f"reclaim:{migration.id}"), context.request():
            if self.get(migration.id).phase is not MigrationPhase.KEPT:
                return
            if core.repository.volume_stored_as(migration.source.stored_as) is not None:
                raise InvalidRequest("is the volume itself", subject=f"volume {migration.volume_name}")
            migration = self._records.change(migration.id, reclaiming=True)
            crash.point("migrate.reclaiming")
            place = OtherPlace(core, migration)
            place.destroy(_shell(migration), migration.snapshots)
            crash.point("migrate.reclaimed")
            self._records.advance(migration, MigrationPhase.DONE)
            place.forget()


def _rests(migration: Migration) -> bool:
    """Paused before its commit point. Who was held still then must not wait for its being resumed."""
    return migration.paused and not migration.phase.committed and migration.phase is not MigrationPhase.ABORTING


def _shell(migration: Migration) -> Volume:
    """As much of a volume as its storage needs, to take away a place of one that may be gone itself."""
    empty = Volume(
        id=migration.volume_id,
        name=migration.volume_name,
        backend=migration.source.backend,
        state=VolumeState.DELETING,
        created=migration.created,
    )
    return at(empty, migration.source)
