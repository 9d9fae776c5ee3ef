"""Typed records over the store: which keys exist, how a record becomes a value, and the look-ups that stay O(1).

    volumes/<id>                                   Volume
    volume-names/<name>                            its id
    snapshots/<volume>/<snapshot>                  Snapshot
    snapshot-names/<volume>/<name>                 its id
    snapshot-ids/<snapshot>                        the id of its volume
    claims/snapshot/<name>, claims/group/<name>    what an orchestrator called it -> the id of what it made
    group-snapshots/<id>                           GroupSnapshot
    nodes/<name>                                   Node
    attachments/<volume>/<node>                    Attachment
    ephemeral/<volume>                             index: volumes that end with their publication
    operations/<volume>                            Operation: at most one per volume
    bindings/<volume>/<node>/<engine>/<mount id>   Binding
    consumers/<consumer>/<binding's key>           index: bindings of a container
    history/<volume>/<until>/<mount id>            HistoricBinding
    stored/<id on its storage>                     the id of a volume that was moved there
    migrations/<id>                                Migration
    migrating/<volume>                             the id of its move, until somebody may be at the new place
    places/<id on storage>                         the id of the move that holds it: its target, later its source
    disturbed/<volume>                             somebody mounted it while it was copied as blocks
    copies/<id>                                    Copy
    hidden/<volume or snapshot>                    index: what a copy made for itself -> the id of its volume
    touched/<volume>                               when volumed itself last mounted it for a look, or grew it
    rewritten/<volume>                             when it was last put back to a snapshot or a backup

What people name is quoted in keys, so a name with a slash stays one segment.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import msgspec

from volumed.model import (
    Attachment,
    Binding,
    Copy,
    Engine,
    GroupSnapshot,
    HistoricBinding,
    Migration,
    Node,
    Operation,
    Record,
    Snapshot,
    SnapshotId,
    Volume,
    VolumeId,
)
from volumed.store.store import Entry, Store

R = TypeVar("R", bound=Record)

_encode = msgspec.json.Encoder().encode


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _volume_key(volume_id: str) -> str:
    return f"volumes/{_quoted(volume_id)}"


def _name_key(name: str) -> str:
    return f"volume-names/{_quoted(name)}"


def _claim_key(kind: str, name: str) -> str:
    return f"claims/{kind}/{_quoted(name)}"


def _binding_key(volume_id: str, node: str, engine: str, mount_id: str) -> str:
    return f"bindings/{volume_id}/{_quoted(node)}/{engine}/{_quoted(mount_id)}"


_KEYS: dict[type[Record], Callable[[Any], str]] = {
    Volume: lambda volume: _volume_key(volume.id),
    Snapshot: lambda snapshot: f"snapshots/{snapshot.volume_id}/{snapshot.id}",
    GroupSnapshot: lambda group: f"group-snapshots/{_quoted(group.id)}",
    Operation: lambda operation: f"operations/{operation.volume_id}",
    Binding: lambda held: _binding_key(held.volume_id, held.node, held.engine, held.mount_id),
    HistoricBinding: lambda ended: f"history/{ended.volume_id}/{ended.until.isoformat()}/{_quoted(ended.mount_id)}",
    Node: lambda node: f"nodes/{_quoted(node.name)}",
    Migration: lambda migration: f"migrations/{_quoted(migration.id)}",
    Copy: lambda copy: f"copies/{_quoted(copy.id)}",
    Attachment: lambda attachment: f"attachments/{attachment.volume_id}/{_quoted(attachment.node)}",
}


_decoders: dict[type[Record], msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in _KEYS}


def _key(record: Record) -> str:
    return _KEYS[type(record)](record)


def _index(record: Record) -> dict[str, bytes]:
    """The keys beside the record's own that lead to it."""
    match record:
        case Volume():
            key = f"hidden/{record.id}" if record.hidden else _name_key(record.name)
            index = {key: record.id.encode()}
            if record.ephemeral:
                index[f"ephemeral/{record.id}"] = b""
            if record.moved_to is not None:
                index[f"stored/{record.moved_to}"] = record.id.encode()
            return index
        case Migration():
            return _migration_index(record)
        case Snapshot():
            index = {
                f"snapshot-names/{record.volume_id}/{_quoted(record.name)}": record.id.encode(),
                f"snapshot-ids/{record.id}": record.volume_id.encode(),
            }
            if record.claim is not None:
                index[_claim_key("snapshot", record.claim.name)] = record.id.encode()
            if record.hidden is not None:
                index[f"hidden/{record.id}"] = record.volume_id.encode()
            return index
        case GroupSnapshot():
            return {_claim_key("group", record.name): record.id.encode()}
        case Binding():
            key = _key(record)
            return {f"consumers/{_quoted(consumer.id)}/{key}": b"" for consumer in record.consumers}
    return {}


def _migration_index(migration: Migration) -> dict[str, bytes]:
    """One move per volume at a time, until the new place counts for good; and the place that is not the volume's, while
    it lasts."""
    if migration.phase.ended:
        return {}
    own = migration.id.encode()
    other = migration.source if migration.phase.committed else migration.target
    index = {f"places/{other.stored_as}": own}
    if not migration.phase.committed or migration.untouched:
        index[f"migrating/{migration.volume_id}"] = own
    return index


class Transaction:
    """Collects puts and deletes; each record is expected to stand as it was read (`Record.revision`)."""

    def __init__(self) -> None:
        self.expect: dict[str, int] = {}
        self.puts: dict[str, bytes] = {}
        self.deletes: list[str] = []
        self._records: list[Record] = []

    def put(self, record: Record, *, previous: Record | None = None) -> None:
        """`previous`: the record as it was read, when an index key of it may have changed."""
        key = _key(record)
        self._records.append(record)
        self.expect[key] = record.revision
        self.puts[key] = _encode(msgspec.structs.replace(record, revision=0))
        index = _index(record)
        if record.revision == 0 and not isinstance(record, Binding):
            self.expect.update(dict.fromkeys(index, 0))  # a name belongs to one record
        self.puts.update(index)
        if previous is not None:
            self.deletes.extend(stale for stale in _index(previous) if stale not in index)

    def name(self, volume: Volume, *, previous: Volume) -> None:
        """What was hidden gets its name, if nobody has it."""
        self.put(volume, previous=previous)
        self.expect[_name_key(volume.name)] = 0

    def swap(self, one: tuple[Volume, Volume], other: tuple[Volume, Volume]) -> None:
        """Two volumes, each as it was and as it is, exchange their places: a key that the one leaves is the other's."""
        for before, after in (one, other):
            self.put(after, previous=before)
        self.deletes = [key for key in self.deletes if key not in self.puts]

    def disturb(self, volume_id: VolumeId) -> None:
        """Whatever copies the volume's blocks must look at all of them again."""
        self.puts[f"disturbed/{volume_id}"] = b""

    def calm(self, volume_id: VolumeId) -> None:
        """Who comes from now on shows."""
        self.deletes.append(f"disturbed/{volume_id}")

    def expect_calm(self, volume_id: VolumeId) -> None:
        self.expect[f"disturbed/{volume_id}"] = 0

    def touch(self, volume_id: VolumeId, *, rewritten: bool = False) -> None:
        """Its blocks are not what they were, by volumed's own doing; `rewritten`: nor are its files."""
        self.puts[f"{'rewritten' if rewritten else 'touched'}/{volume_id}"] = datetime.now(UTC).isoformat().encode()

    def delete(self, record: Record) -> None:
        key = _key(record)
        if isinstance(record, Volume):
            self.deletes += [f"touched/{record.id}", f"rewritten/{record.id}"]
        self.expect[key] = record.revision
        self.deletes += [key, *_index(record)]

    def committed(self, revision: int) -> None:
        """The records that were put stand at this revision now, and can be put again without being read again."""
        for record in self._records:
            msgspec.structs.force_setattr(record, "revision", revision)


class Repository:
    """The ledger, typed. Records read carry their revision; commit raises `store.Conflict` when one is stale."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Commits at the end of the block; an exception inside it commits nothing."""
        transaction = Transaction()
        yield transaction
        transaction.committed(
            self.store.commit(expect=transaction.expect, put=transaction.puts, delete=transaction.deletes)
        )

    # Volumes
    def volume(self, volume_id: str) -> Volume | None:
        return _decode(Volume, self.store.get(_volume_key(volume_id)))

    def volume_by_name(self, name: str) -> Volume | None:
        entry = self.store.get(_name_key(name))
        return self.volume(entry.value.decode()) if entry else None

    def volumes(self, *, after: str = "", limit: int | None = None) -> list[Volume]:
        """In the order of their ids; page on with the last one's id."""
        return self._scan(Volume, "volumes/", after=_volume_key(after) if after else "", limit=limit)

    def ephemeral_volumes(self) -> list[Volume]:
        ids = [key.removeprefix("ephemeral/") for key in self.store.keys("ephemeral/")]
        return [volume for volume_id in ids if (volume := self.volume(volume_id))]

    def volume_names(self) -> list[tuple[str, VolumeId]]:
        """Every name with its id, without decoding a single volume."""
        prefix = len("volume-names/")
        return [
            (unquote(entry.key[prefix:]), VolumeId(entry.value.decode())) for entry in self.store.scan("volume-names/")
        ]

    def volume_count(self) -> int:
        return self.store.count("volumes/")

    def volume_stored_as(self, storage_id: str) -> Volume | None:
        """The volume that its storage knows by this id."""
        entry = self.store.get(f"stored/{_quoted(storage_id)}")
        volume = self.volume(entry.value.decode() if entry else storage_id)
        return volume if volume is not None and volume.stored_as == storage_id else None

    # Moves
    def migration(self, migration_id: str) -> Migration | None:
        return _decode(Migration, self.store.get(f"migrations/{_quoted(migration_id)}"))

    def migrations(self) -> list[Migration]:
        """In the order they were begun."""
        return self._scan(Migration, "migrations/")

    def migration_of(self, volume_id: str) -> Migration | None:
        """The one that the volume is in now, until somebody may be at its new place."""
        entry = self.store.get(f"migrating/{volume_id}")
        return self.migration(entry.value.decode()) if entry else None

    def migration_holding(self, storage_id: str) -> Migration | None:
        """The one whose other place it is: what lies there is not a volume's, and no orphan either."""
        entry = self.store.get(f"places/{_quoted(storage_id)}")
        return self.migration(entry.value.decode()) if entry else None

    def disturbed(self, volume_id: VolumeId) -> bool:
        return self.store.get(f"disturbed/{volume_id}") is not None

    def disturbance(self, volume_id: VolumeId) -> int:
        """Another number after each mount of it while it is moved; 0 when there was none."""
        entry = self.store.get(f"disturbed/{volume_id}")
        return entry.revision if entry else 0

    def touched(self, volume_id: VolumeId, *, rewritten: bool = False) -> datetime | None:
        """See `Transaction.touch`."""
        entry = self.store.get(f"{'rewritten' if rewritten else 'touched'}/{volume_id}")
        return datetime.fromisoformat(entry.value.decode()) if entry else None

    def calm(self, volume_id: VolumeId) -> None:
        self.store.commit(delete=[f"disturbed/{volume_id}"])

    # Copies
    def copy(self, copy_id: str) -> Copy | None:
        return _decode(Copy, self.store.get(f"copies/{_quoted(copy_id)}"))

    def copies(self) -> list[Copy]:
        """In the order they were begun."""
        return self._scan(Copy, "copies/")

    def hidden_volumes(self) -> list[Volume]:
        return [volume for key in self._hidden() if (volume := self.volume(key)) is not None]

    def hidden_snapshots(self) -> list[Snapshot]:
        return [snapshot for key in self._hidden() if (snapshot := self.snapshot_by_id(key)) is not None]

    def _hidden(self) -> list[str]:
        return [key.removeprefix("hidden/") for key in self.store.keys("hidden/")]

    # Snapshots
    def snapshot(self, volume_id: VolumeId, snapshot_id: SnapshotId) -> Snapshot | None:
        return _decode(Snapshot, self.store.get(f"snapshots/{volume_id}/{snapshot_id}"))

    def snapshot_by_name(self, volume_id: VolumeId, name: str) -> Snapshot | None:
        entry = self.store.get(f"snapshot-names/{volume_id}/{_quoted(name)}")
        return self.snapshot(volume_id, SnapshotId(entry.value.decode())) if entry else None

    def snapshot_by_id(self, snapshot_id: str) -> Snapshot | None:
        entry = self.store.get(f"snapshot-ids/{_quoted(snapshot_id)}")
        return self.snapshot(VolumeId(entry.value.decode()), SnapshotId(snapshot_id)) if entry else None

    def snapshot_by_claim(self, name: str) -> Snapshot | None:
        entry = self.store.get(_claim_key("snapshot", name))
        return self.snapshot_by_id(entry.value.decode()) if entry else None

    def group_snapshot(self, group_id: str) -> GroupSnapshot | None:
        return _decode(GroupSnapshot, self.store.get(f"group-snapshots/{_quoted(group_id)}"))

    def group_snapshot_by_name(self, name: str) -> GroupSnapshot | None:
        entry = self.store.get(_claim_key("group", name))
        return self.group_snapshot(entry.value.decode()) if entry else None

    def snapshots_in_order(self, *, after: str = "", limit: int | None = None) -> list[Snapshot]:
        """Of all volumes, in the order of their own ids; page on with the last one's id."""
        prefix = "snapshot-ids/"
        entries = self.store.scan(prefix, after=f"{prefix}{_quoted(after)}" if after else "", limit=limit)
        found = [
            self.snapshot(VolumeId(entry.value.decode()), SnapshotId(entry.key.removeprefix(prefix)))
            for entry in entries
        ]
        return [snapshot for snapshot in found if snapshot is not None]

    def snapshots(self, volume_id: VolumeId | None = None) -> list[Snapshot]:
        return self._scan(Snapshot, f"snapshots/{volume_id}/" if volume_id else "snapshots/")

    # Operations
    def operation(self, volume_id: VolumeId) -> Operation | None:
        return _decode(Operation, self.store.get(f"operations/{volume_id}"))

    def operations(self) -> list[Operation]:
        return self._scan(Operation, "operations/")

    # Nodes, and what is meant for them
    def node(self, name: str) -> Node | None:
        return _decode(Node, self.store.get(f"nodes/{_quoted(name)}"))

    def nodes(self) -> list[Node]:
        return self._scan(Node, "nodes/")

    def attachment(self, volume_id: VolumeId, node: str) -> Attachment | None:
        return _decode(Attachment, self.store.get(f"attachments/{volume_id}/{_quoted(node)}"))

    def attachments(self, volume_id: VolumeId | None = None) -> list[Attachment]:
        return self._scan(Attachment, f"attachments/{volume_id}/" if volume_id else "attachments/")

    # Bindings
    def binding(self, volume_id: VolumeId, *, node: str, engine: Engine, mount_id: str) -> Binding | None:
        return _decode(Binding, self.store.get(_binding_key(volume_id, node, engine, mount_id)))

    def bindings(self, volume_id: VolumeId | None = None, *, node: str | None = None) -> list[Binding]:
        prefix = "bindings/"
        if volume_id:
            prefix += f"{volume_id}/" + (f"{_quoted(node)}/" if node else "")
        found = self._scan(Binding, prefix)
        return [binding for binding in found if node is None or binding.node == node]

    def bindings_of_consumer(self, consumer_id: str) -> list[Binding]:
        prefix = f"consumers/{_quoted(consumer_id)}/"
        keys = [key.removeprefix(prefix) for key in self.store.keys(prefix)]
        return [binding for key in keys if (binding := _decode(Binding, self.store.get(key)))]

    def history(self, volume_id: VolumeId | None = None) -> list[HistoricBinding]:
        """Oldest first, per volume."""
        return self._scan(HistoricBinding, f"history/{volume_id}/" if volume_id else "history/")

    def forget_history(self, *, before: datetime, keep: int) -> None:
        """Delete the bindings that ended before then, and of each volume all but the latest `keep`. By the keys alone,
        a page at a time: there may be millions."""
        limit, stale = before.isoformat(), list[str]()
        volume, kept = "", deque[str]()
        after = ""
        while keys := self.store.keys("history/", after=after, limit=1000):
            after = keys[-1]
            for key in keys:
                _, volume_id, until, _ = key.split("/", 3)
                if volume_id != volume:
                    volume, kept = volume_id, deque()
                kept.append(key)
                if until < limit or len(kept) > keep:
                    stale.append(kept.popleft())
            for start in range(0, len(stale), 100):
                self.store.commit(delete=stale[start : start + 100])
            stale.clear()

    def _scan(self, kind: type[R], prefix: str, *, after: str = "", limit: int | None = None) -> list[R]:
        return list(_decoded(kind, self.store.scan(prefix, after=after, limit=limit)))


def _decode(kind: type[R], entry: Entry | None) -> R | None:
    if entry is None:
        return None
    record: R = _decoders[kind].decode(entry.value)
    msgspec.structs.force_setattr(record, "revision", entry.revision)
    return record


def _decoded(kind: type[R], entries: Iterable[Entry]) -> Iterator[R]:
    for entry in entries:
        record = _decode(kind, entry)
        if record is not None:
            yield record
