"""What is on storage already made into volumes: an object that volumed did not make, or, when the ledger was lost,
volumes of ours by their marks."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from volumed.core import marks
from volumed.core.backends import Backend, Backends
from volumed.core.encryption import overhead
from volumed.core.events import Events
from volumed.core.journal import Journal
from volumed.core.locks import KeyedLocks
from volumed.core.names import check_labels, check_name
from volumed.core.presence import Presence
from volumed.core.provision import Provision, import_driver
from volumed.driver import BlockDriver, Capability, Found, SupportsSnapshots
from volumed.errors import AlreadyExists, IntegrityError, VolumedError
from volumed.host import filesystems
from volumed.model import OperationKind, Volume, VolumeMode, VolumeState, new_volume_id, now
from volumed.store.repository import Repository
from volumed.testing import crash


class Outcome(enum.StrEnum):
    KNOWN = "known"  # in the ledger already
    RECREATED = "recreated"  # or would be
    LEFT = "left"  # to the doctor: half made, or without a mark
    UNREAD = "unread"  # its backend failed


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebuild made of one thing it found."""

    backend: str
    outcome: Outcome
    id: str = ""
    name: str = ""
    text: str = ""


class Imports:
    def __init__(
        self,
        *,
        repository: Repository,
        backends: Backends,
        presence: Presence,
        journal: Journal,
        provision: Provision,
        locks: KeyedLocks,
        events: Events,
    ) -> None:
        self._repository = repository
        self._backends = backends
        self._presence = presence
        self._journal = journal
        self._provision = provision
        self._locks = locks
        self._events = events

    def importable(self, name: str) -> list[str]:
        """References of what a backend could adopt. Raises NotSupported."""
        backend = self._backends.get(name)
        backend.require(Capability.IMPORT)
        return sorted(backend.call(lambda: list(import_driver(backend).importable())))

    def adopt(
        self, backend_name: str, reference: str, *, name: str, block: bool = False, labels: dict[str, str] | None = None
    ) -> Volume:
        """The object as a volume, with its data as it is. On a block driver it has the file system that is found on
        it; it is a raw device with `block`, or when none is found that volumed knows.

        Raises AlreadyExists for a name that is taken, and what the storage raises; then it is left as it was.
        """
        check_name(name)
        check_labels(labels or {})
        backend = self._backends.get(backend_name)
        backend.require(Capability.IMPORT)
        planned = Volume(
            id=new_volume_id(),
            name=name,
            backend=backend.name,
            state=VolumeState.CREATING,
            created=now(),
            mode=VolumeMode.BLOCK if block else VolumeMode.FILESYSTEM,
            labels=labels or {},
        )
        if block:
            backend.require(Capability.BLOCK)
        return backend.call(lambda: self._adopt(planned, backend, reference))

    def _adopt(self, volume: Volume, backend: Backend, reference: str) -> Volume:
        with self._locks.hold(f"name:{volume.name}", subject=f"volume {volume.name}"), self._locks.hold(volume.id):
            if self._repository.volume_by_name(volume.name) is not None:
                raise AlreadyExists("exists already", subject=f"volume {volume.name}", hint="choose another name")
            words = {"reference": reference}
            with self._journal.recorded(OperationKind.IMPORT, volume, options=words) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(volume)
                    transaction.put(operation)
                crash.point("import.recorded")
                adopted = self._provision.adopt(volume, backend, reference)
                crash.point("import.adopted")
                with self._repository.transaction() as transaction:
                    transaction.put(adopted)
                    transaction.delete(operation)
            crash.point("import.committed")
        self._events.publish("volume.imported", volume.name, f"was {reference} on backend {backend.name}")
        return adopted

    # After the ledger was lost
    def rebuild(self, *, dry_run: bool) -> list[Line]:
        """Volumes of all backends that bear a mark and are not in the ledger are put there; nothing that is in it is
        changed. What is half made, or has no mark, is left to the doctor."""
        return [line for backend in self._backends.all() for line in self._rebuild(backend, dry_run=dry_run)]

    def _rebuild(self, backend: Backend, *, dry_run: bool) -> Iterable[Line]:
        try:
            return backend.call(lambda: list(self._lines(backend, dry_run=dry_run)))
        except VolumedError as error:
            return [Line(backend=backend.name, outcome=Outcome.UNREAD, text=str(error))]

    def _lines(self, backend: Backend, *, dry_run: bool) -> Iterator[Line]:
        for found in list(backend.driver.list()):
            known = self._repository.volume_stored_as(found.volume_id)
            if known is not None or self._repository.migration_holding(found.volume_id) is not None:
                name = known.name if known else "the other place of a move"
                yield Line(backend=backend.name, outcome=Outcome.KNOWN, id=found.volume_id, name=name)
                continue
            name = found.mark.get("name", "")
            try:
                with self._locks.hold(found.volume_id, wait=0.0):
                    name, text = self._recreate(backend, found, dry_run=dry_run)
            except VolumedError as error:
                yield Line(backend=backend.name, outcome=Outcome.LEFT, id=found.volume_id, name=name, text=str(error))
            else:
                yield Line(backend=backend.name, outcome=Outcome.RECREATED, id=found.volume_id, name=name, text=text)
        if isinstance(backend.driver, SupportsSnapshots):
            for snapshot in backend.driver.list_snapshots():
                if self._repository.snapshot_by_id(snapshot.snapshot_id) is None:
                    text = "is a snapshot, and storage does not tell of what: it is kept until the doctor is told"
                    yield Line(backend=backend.name, outcome=Outcome.LEFT, id=snapshot.snapshot_id, text=text)

    def _recreate(self, backend: Backend, found: Found, *, dry_run: bool) -> tuple[str, str]:
        """The name it has then, and what is to be said about it. Raises IntegrityError when it is not whole."""
        subject = f"volume {found.volume_id}"
        if not found.whole:
            raise IntegrityError("is half made, or half removed", subject=subject)
        if not found.mark:
            raise IntegrityError("bears no mark, so nothing is known of it", subject=subject)
        size = backend.driver.inspect(found.handle).size
        volume = marks.read(found.mark, volume_id=found.volume_id, handle=found.handle, backend=backend.name, size=size)
        if size is not None:
            volume = msgspec.structs.replace(volume, size=size - overhead(volume))
        if isinstance(backend.driver, BlockDriver) and volume.mode is VolumeMode.FILESYSTEM:
            volume = self._with_filesystem(volume, backend.driver)
        text = f"made {volume.created:%Y-%m-%d}"
        if self._repository.volume(volume.id) is not None:
            text += f"; a move left {volume.id} in two places: see which of them is the newer"
            volume = msgspec.structs.replace(volume, id=new_volume_id(), moved_to=found.volume_id)
        if self._repository.volume_by_name(volume.name) is not None:
            text += f"; the name {volume.name} belongs to another one now"
            volume = msgspec.structs.replace(volume, name=f"{volume.name[:200]}-{volume.id[:13]}")
        if not dry_run:
            with self._repository.transaction() as transaction:
                transaction.put(volume)
            self._events.publish(
                "volume.recreated", volume.name, f"found on backend {backend.name}", level=logging.WARNING
            )
        return volume.name, text

    def _with_filesystem(self, volume: Volume, driver: BlockDriver) -> Volume:
        """A volume whose file system was never made is one that was never finished. The mark of one that was imported
        knows of none: it is what is found."""
        with self._presence.looked_at(volume, driver) as device:
            there = filesystems.detect(device)
        if volume.filesystem is None:
            mode = VolumeMode.FILESYSTEM if there else VolumeMode.BLOCK
            return msgspec.structs.replace(volume, filesystem=there, mode=mode)
        if there != volume.filesystem:
            raise IntegrityError(
                f"should hold {volume.filesystem} and holds {there or 'none'}", subject=f"volume {volume.id}"
            )
        return volume


def summary(lines: Sequence[Line]) -> dict[str, int]:
    """How many of each outcome."""
    return {outcome: sum(line.outcome is outcome for line in lines) for outcome in Outcome}
