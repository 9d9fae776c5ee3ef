"""The one way to change a migration's record: read, checked and written under its own lock, so that what an operator
says and what the move itself writes down never overwrite one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.errors import NotFound
from volumed.migration.movers.mover import Stopped
from volumed.model import Migration, MigrationPhase, now
from volumed.store.repository import Repository, Transaction


class Records:
    def __init__(self, repository: Repository, locks: KeyedLocks, events: Events) -> None:
        self._repository = repository
        self._locks = locks
        self._events = events

    def get(self, reference: str) -> Migration:
        """By its id, the beginning of it, or its volume's name or id: then the latest. Raises NotFound."""
        exact = self._repository.migration(reference)
        if exact is not None:
            return exact
        for migration in reversed(self._repository.migrations()):
            named = reference in (migration.volume_name, migration.volume_id)
            if named or (len(reference) >= 8 and migration.id.startswith(reference)):
                return migration
        raise NotFound("there is no such migration", subject=f"migration {reference[:100]}", hint="see `migration ls`")

    def all(self) -> list[Migration]:
        """In the order they were begun."""
        return self._repository.migrations()

    def begin(self, migration: Migration, *also: Callable[[Transaction], None]) -> Migration:
        entered = msgspec.structs.replace(migration, phases=((migration.phase, now()),))
        with self._repository.transaction() as transaction:
            transaction.put(entered)
            for each in also:
                each(transaction)
        self._tell(entered)
        return entered

    def change(self, migration_id: str, **fields: Any) -> Migration:
        with self._locks.hold(f"migration:{migration_id}"):
            current = self.get(migration_id)
            changed = msgspec.structs.replace(current, **fields)
            with self._repository.transaction() as transaction:
                transaction.put(changed, previous=current)
            return changed

    def advance(
        self,
        migration: Migration,
        phase: MigrationPhase,
        *also: Callable[[Transaction], None],
        **fields: Any,
    ) -> Migration:
        """From the phase that `migration` was read in to the next. `also`: what goes into the same transaction. Raises
        Stopped when somebody took it to another phase meanwhile: it was aborted."""
        with self._locks.hold(f"migration:{migration.id}"):
            current = self.get(migration.id)
            if current.phase is not migration.phase:
                raise Stopped(f"is {current.phase} meanwhile", subject=f"migration {migration.id}")
            changed = msgspec.structs.replace(current, phase=phase, phases=(*current.phases, (phase, now())), **fields)
            with self._repository.transaction() as transaction:
                transaction.put(changed, previous=current)
                for each in also:
                    each(transaction)
        self._tell(changed)
        return changed

    def hand_over(self, transaction: Transaction, migration: Migration) -> None:
        """Its kept source becomes the target of another move: nothing is left of it to be undone."""
        current = self.get(migration.id)
        over = msgspec.structs.replace(
            current, phase=MigrationPhase.ROLLED_BACK, phases=(*current.phases, (MigrationPhase.ROLLED_BACK, now()))
        )
        transaction.put(over)
        transaction.expect.pop(f"places/{migration.source.stored_as}", None)  # it goes from the one to the other

    def _tell(self, migration: Migration) -> None:
        words = {MigrationPhase.FAILED: f"failed: {migration.error}", MigrationPhase.KEPT: "done; the source is kept"}
        text = words.get(migration.phase, str(migration.phase))
        self._events.publish(
            f"migration.{migration.phase}",
            migration.volume_name,
            f"move from {migration.source.backend} to {migration.target.backend}: {text}",
            migration=migration.id,
        )
