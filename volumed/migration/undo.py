"""Back to where a volume was, while its old place is kept."""

from __future__ import annotations

import logging
from datetime import datetime

import msgspec

from volumed import context
from volumed.core.core import Core
from volumed.core.mounts import describe_each
from volumed.core.presence import handle_of
from volumed.errors import InUse, PreconditionFailed, VolumedError
from volumed.migration.places import at, place_of
from volumed.migration.records import Records
from volumed.model import Migration, MigrationPhase, MovePath, Volume, VolumeMode, VolumeState, new_migration_id, now
from volumed.store.repository import Repository, Transaction
from volumed.testing import crash

_log = logging.getLogger(__name__)
# Seconds for the old place to show that it works.
ANSWERING = 10.0


class Undo:
    def __init__(self, core: Core, records: Records) -> None:
        self._core = core
        self._records = records

    def _volume(self, migration: Migration) -> Volume:
        volume = self._core.volumes.get(migration.volume_id)
        if volume.stored_as != migration.target.stored_as:
            raise PreconditionFailed(
                "was moved on since", subject=f"volume {volume.name}", hint="undo the later move first"
            )
        return volume

    def switch_back(self, migration: Migration, *, discard: bool) -> Migration:
        """The commit point of an undo: from here on the target is what goes."""
        core = self._core
        with core.locks.hold(migration.volume_id):
            volume = self._volume(migration)
            users = users_since(core.repository, volume, moved_at(migration))
            if users and not discard:
                raise PreconditionFailed(
                    f"was used since the move, and what was written would be lost: {', '.join(users)}",
                    subject=f"volume {migration.volume_name}",
                    hint="carry it back with --carry, or lose it with --discard",
                )
            backend = core.backends.get(volume.backend)
            snapshots = [snapshot.name for snapshot in core.repository.snapshots(volume.id)]
            if snapshots:
                raise InUse(
                    "has snapshots taken since the move",
                    holders=snapshots,
                    subject=f"volume {volume.name}",
                    hint="remove them first",
                )
            with core.mounts.unmounted(volume, backend):
                crash.point("migrate.unmounted-for-rollback")
                undone = self._go_back(migration, volume, error="")
                crash.point("migrate.rolled-back")
        return undone

    def _go_back(self, migration: Migration, volume: Volume, *, error: str) -> Migration:
        def switch(transaction: Transaction) -> None:
            transaction.put(at(volume, migration.source), previous=volume)
            if migration.untouched:
                transaction.expect_calm(volume.id)
            for snapshot in migration.snapshots:
                transaction.put(msgspec.structs.replace(snapshot, revision=0))

        return self._records.advance(
            migration,
            MigrationPhase.ABORTING,
            switch,
            snapshots=(),
            kept_until=None,
            error=error,
            untouched=False,
        )

    def fall_back(self, migration: Migration, error: VolumedError) -> bool:
        """Past the commit point, of a move whose new place does not come up: as an abort before it, if nobody can have
        written there and the old place works. Whether it was done."""
        core, to, back = self._core, migration.target, migration.source
        with core.locks.hold(migration.volume_id, wait=ANSWERING):
            migration = self._records.get(migration.id)
            volume = core.repository.volume(migration.volume_id)
            if not migration.untouched or volume is None or volume.stored_as != to.stored_as:
                return False
            attachments = core.repository.attachments(volume.id)
            attached = any(there.ordered or there.node != core.node for there in attachments)
            if attached or core.repository.disturbed(volume.id):
                return False
            if not self._works(at(volume, back)):
                return False
            text = f"backend {to.backend} failed after the switch to it and before anybody used it there: {error}"
            self._go_back(migration, volume, error=text)
        crash.point("migrate.fell-back")
        core.events.publish(
            "migration.fell-back",
            migration.volume_name,
            f"is on backend {back.backend} again: {text}",
            level=logging.ERROR,
            migration=migration.id,
        )
        return True

    def _works(self, volume: Volume) -> bool:
        backend = self._core.backends.get(volume.backend)
        try:
            with context.request(context.request_id.get(), timeout=ANSWERING):
                backend.call_holding(lambda: backend.driver.inspect(handle_of(volume)))
        except Exception as error:  # (whatever it is, it does not work)
            _log.warning("volume %s cannot go back to backend %s: %s", volume.name, backend.name, error)
            return False
        return True

    def carry_back(self, migration: Migration) -> Migration:
        """A move into what is the source still, which is not an undo any more once it began to be written."""
        volume = self._volume(migration)
        refuse_second(self._core.repository, volume)
        back = Migration(
            id=new_migration_id(),
            volume_id=volume.id,
            volume_name=volume.name,
            node=self._core.node,
            phase=MigrationPhase.PREPARED,
            path=_way_back(migration, volume),
            source=place_of(volume),
            target=migration.source,
            created=now(),
            by=migration.by,
            bandwidth=migration.bandwidth,
            keep_source=migration.keep_source,
            accepted=migration.accepted,
            returns=migration.id,
        )
        if migration.snapshots:
            raise PreconditionFailed(
                "its old place has snapshots, which a move into it would make false",
                subject=f"volume {volume.name}",
                hint="discard what was written since with --discard, or move it as a new move",
            )

        def supersede(transaction: Transaction) -> None:
            self._records.hand_over(transaction, migration)

        with self._core.locks.hold(volume.id):
            begun = self._records.begin(back, supersede)
        crash.point("migrate.planned-back")
        return begun


def moved_at(migration: Migration) -> datetime:
    """When it passed its commit point."""
    return next(when for phase, when in migration.phases if phase is MigrationPhase.CUTOVER)


def users_since(repository: Repository, volume: Volume, moment: datetime) -> list[str]:
    """Who holds it, or did at some time after the moment, for people."""
    there = [line for held in repository.bindings(volume.id) for line in describe_each(held)]
    ended = [held for held in repository.history(volume.id) if held.until > moment]
    gone = [consumer.name or consumer.id[:12] for held in ended for consumer in held.consumers]
    return list(dict.fromkeys([*there, *gone])) or [f"{held.engine}" for held in ended]


def _way_back(migration: Migration, volume: Volume) -> MovePath:
    """What went under its users may have come to a larger device or smaller blocks, and goes back as files do."""
    if migration.path is not MovePath.LIVE:
        return migration.carried_by
    return MovePath.BLOCK if volume.mode is VolumeMode.BLOCK else MovePath.TREE


def refuse_second(repository: Repository, volume: Volume) -> None:
    """Raises InUse for a volume that is being moved, or changed otherwise."""
    there = repository.migration_of(volume.id)
    if there is not None:
        raise InUse(
            f"is being moved to backend {there.target.backend} already",
            subject=f"volume {volume.name}",
            hint=f"see `volumectl migration show {there.id}`",
        )
    if volume.state is not VolumeState.READY:
        raise InUse(f"is {volume.state}", subject=f"volume {volume.name}")
