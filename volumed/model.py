"""The records of the ledger and the words of the house. Plain data: nothing here does anything.

Sizes are bytes, times are UTC. A record that the ledger keeps carries the revision it was read at, which is how
two writers of one record notice each other (`volumed.store.repository`).
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import NewType
from uuid import uuid4

import msgspec

VolumeId = NewType("VolumeId", str)
SnapshotId = NewType("SnapshotId", str)
# How a driver finds a volume or a snapshot on its storage: made by the driver, parsed by nobody else.
Handle = NewType("Handle", str)


def new_volume_id() -> VolumeId:
    return VolumeId(f"v{uuid4().hex}")


def new_snapshot_id() -> SnapshotId:
    return SnapshotId(f"s{uuid4().hex}")


def now() -> datetime:
    return datetime.now(UTC)


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`revision` is the ledger's: 0 for a record that was never stored. It is not part of the stored value."""

    revision: int = 0


class VolumeMode(enum.StrEnum):
    FILESYSTEM = "filesystem"
    BLOCK = "block"


class VolumeState(enum.StrEnum):
    CREATING = "creating"
    READY = "ready"
    RESTORING = "restoring"  # being put back to a snapshot: neither state can be trusted until it is done
    DELETING = "deleting"


class Ownership(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of the root of a volume's tree; what is None stays as the file system made it (root, 0755)."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


class Volume(Record, frozen=True, kw_only=True, omit_defaults=True):
    id: VolumeId
    name: str
    backend: str
    state: VolumeState
    created: datetime
    handle: Handle | None = None  # None until the storage answered
    size: int | None = None  # None: bounded by the backend alone
    mode: VolumeMode = VolumeMode.FILESYSTEM
    filesystem: str | None = None  # of a block driver's volume: ext4, xfs, btrfs
    mkfs_options: tuple[str, ...] = ()
    mount_options: tuple[str, ...] = ()
    ownership: Ownership = Ownership()
    options: dict[str, str] = {}  # the driver's own, as they were given
    labels: dict[str, str] = {}
    source: str = ""  # what it was cloned or restored from, as it was asked for


class SnapshotState(enum.StrEnum):
    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class Snapshot(Record, frozen=True, kw_only=True, omit_defaults=True):
    id: SnapshotId
    name: str  # unique within its volume
    volume_id: VolumeId
    state: SnapshotState
    created: datetime
    handle: Handle | None = None
    size: int | None = None  # of a volume made from it


class Engine(enum.StrEnum):
    DOCKER = "docker"
    PODMAN = "podman"


class Consumer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A container that uses a volume, and where in it."""

    id: str
    name: str = ""
    image: str = ""
    pid: int = 0
    target: str = ""  # path inside the container
    readonly: bool = False


class Binding(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One consumer's hold on a volume's mount on a node.

    `mount_id` is the engine's own name of the hold; `count` says how often it was taken (docker cp takes a running
    container's again). An engine with one id for everybody (Podman) has several consumers behind one binding.
    """

    volume_id: VolumeId
    node: str
    engine: Engine
    mount_id: str
    since: datetime
    count: int = 1
    consumers: tuple[Consumer, ...] = ()


class HistoricBinding(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A binding that ended. `reason`: released (the engine said so), vanished (its container is gone), ..."""

    volume_id: VolumeId
    volume_name: str
    node: str
    engine: Engine
    mount_id: str
    since: datetime
    until: datetime
    reason: str
    consumers: tuple[Consumer, ...] = ()


class OperationKind(enum.StrEnum):
    CREATE = "create"
    DELETE = "delete"
    EXPAND = "expand"
    SNAPSHOT_CREATE = "snapshot-create"
    SNAPSHOT_DELETE = "snapshot-delete"
    SNAPSHOT_RESTORE = "snapshot-restore"


class Operation(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A journal row: something begun on storage that must be finished or undone. At most one per volume."""

    kind: OperationKind
    volume_id: VolumeId
    node: str
    request_id: str
    started: datetime
    snapshot_id: SnapshotId | None = None
    size: int | None = None  # target of an expand
    error: str = ""  # why recovery set it aside; it is tried again on the timer
