"""The records of the ledger and the words of the house. Plain data: nothing here does anything.

Sizes are bytes, times are UTC. A record that the ledger keeps carries the revision it was read at, which is how
two writers of one record notice each other (`volumed.store.repository`).
"""

from __future__ import annotations

import enum
import secrets
import time
from datetime import UTC, datetime
from typing import NewType

import msgspec

# The label with the PersistentVolumeClaim that a volume was made for, as namespace/name.
PVC = "kubernetes.pvc"

VolumeId = NewType("VolumeId", str)
SnapshotId = NewType("SnapshotId", str)
GroupSnapshotId = NewType("GroupSnapshotId", str)
MigrationId = NewType("MigrationId", str)
CopyId = NewType("CopyId", str)
# How a driver finds a volume or a snapshot on its storage: made by the driver, parsed by nobody else.
Handle = NewType("Handle", str)


def new_volume_id() -> VolumeId:
    return VolumeId(f"v{_new_id()}")


def new_snapshot_id() -> SnapshotId:
    return SnapshotId(f"s{_new_id()}")


def new_group_snapshot_id() -> GroupSnapshotId:
    return GroupSnapshotId(f"g{_new_id()}")


def new_migration_id() -> MigrationId:
    return MigrationId(f"m{_new_id()}")


def new_copy_id() -> CopyId:
    return CopyId(f"c{_new_id()}")


def _new_id() -> str:
    """32 hexadecimal digits, milliseconds first: later ones sort last, so that whoever pages through a list while it
    grows comes to the new ones too."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


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


class AccessMode(enum.StrEnum):
    """By how many a volume may be used at once; CSI's words."""

    SINGLE_NODE_WRITER = "single-node-writer"
    SINGLE_NODE_READER_ONLY = "single-node-reader-only"
    MULTI_NODE_READER_ONLY = "multi-node-reader-only"
    MULTI_NODE_SINGLE_WRITER = "multi-node-single-writer"
    MULTI_NODE_MULTI_WRITER = "multi-node-multi-writer"
    SINGLE_NODE_SINGLE_WRITER = "single-node-single-writer"  # one consumer alone
    SINGLE_NODE_MULTI_WRITER = "single-node-multi-writer"

    @property
    def single_node(self) -> bool:
        return self.value.startswith("single-node")

    @property
    def reader_only(self) -> bool:
        return self.value.endswith("reader-only")


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An orchestrator's request, as it was made: the same one again must find what it made, another one must not."""

    name: str  # of any text; the volume or snapshot is called so too, where that is a name of ours
    parameters: dict[str, str] = {}
    required: int = 0  # bytes
    limit: int = 0
    filesystem: str = ""
    source: str = ""  # id of a volume or a snapshot


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
    claim: Claim | None = None  # of the orchestrator that had it made
    ephemeral: bool = False  # lives as long as the one publication it was made for
    class_name: str = ""  # that its backend was chosen from
    encryption: str = ""  # the name of its key in the settings; empty: it is not encrypted
    moved_to: VolumeId | None = None  # its id on the storage that it was moved to
    hidden: CopyId | None = None  # the copy that it belongs to: it has no name, and nobody else uses it

    @property
    def stored_as(self) -> VolumeId:
        """What the storage calls it: its own id, until it is moved. Both places of a move can then lie on one storage,
        and what lies there tells which of them it is."""
        return self.moved_to or self.id


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
    claim: Claim | None = None
    group_id: GroupSnapshotId | None = None  # taken at one instant with others
    hidden: CopyId | None = None  # the copy that it was taken for, and goes with


class GroupSnapshot(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Snapshots of several volumes, taken at one instant."""

    id: GroupSnapshotId
    name: str
    created: datetime
    members: tuple[tuple[VolumeId, SnapshotId], ...]


class Node(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A host that runs volumed. `topology`: where it is, as `volumed.csi/node`, its backends and the configuration say.
    `machines`: what each backend that attaches volumes calls this machine."""

    name: str
    topology: dict[str, str] = {}
    machines: dict[str, str] = {}


class Attachment(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A volume is meant for a node: by an orchestrator's word, before anything happens there, or because the node uses
    it and its storage attaches volumes to machines.

    On such storage it is written before the storage is asked and deleted after the storage let go: what a crash cut
    short is known by it.
    """

    volume_id: VolumeId
    node: str
    access: AccessMode
    since: datetime
    readonly: bool = False
    block: bool = False
    ordered: bool = True  # an orchestrator takes it back; else it goes when the node has let go of the volume
    machine: str = ""  # of the node, as the storage names it; empty: this storage attaches nothing
    attached: bool = False  # the storage has said so


class Engine(enum.StrEnum):
    DOCKER = "docker"
    PODMAN = "podman"
    KUBERNETES = "kubernetes"
    NOMAD = "nomad"
    SWARM = "swarm"
    MESOS = "mesos"
    CSI = "csi"  # an orchestrator that does not show which it is
    VOLUMED = "volumed"  # we ourselves, moving the volume


class Consumer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A container, pod, allocation or task that uses a volume, and where."""

    id: str
    name: str = ""
    image: str = ""
    pid: int = 0
    target: str = ""  # path inside the container; of a pod, allocation or task: on the host
    readonly: bool = False
    kind: str = "container"
    details: dict[str, str] = {}  # what else its engine said: a pod's service account


class Binding(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One consumer's hold on a volume's mount on a node.

    `mount_id` is the engine's own name of the hold; `count` says how often it was taken (docker cp takes a running
    container's again). An engine with one id for everybody (Podman) has several consumers behind one binding.

    An orchestrator names the path where it wants the volume: that path is the hold's name. It stages a volume on a
    node first, which holds the mount and is nobody's use of it, and then publishes it to each consumer.
    """

    volume_id: VolumeId
    node: str
    engine: Engine
    mount_id: str
    since: datetime
    count: int = 1
    consumers: tuple[Consumer, ...] = ()
    path: str = ""  # where volumed put the volume for the orchestrator; empty: the engine uses the mount itself
    staging: bool = False
    access: AccessMode | None = None  # None: any number of this node's containers
    readonly: bool = False
    block: bool = False
    mount_options: tuple[str, ...] = ()
    group: int | None = None  # that must be able to write everything in the tree


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
    MODIFY = "modify"
    IMPORT = "import"
    ROTATE = "rotate"


class Operation(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A journal row: something begun on storage that must be finished or undone. At most one per volume."""

    kind: OperationKind
    volume_id: VolumeId
    node: str
    request_id: str
    started: datetime
    snapshot_id: SnapshotId | None = None
    size: int | None = None  # target of an expand
    options: dict[str, str] = {}  # target of a modification
    error: str = ""  # why recovery set it aside; it is tried again on the timer


class MigrationPhase(enum.StrEnum):
    """In the order they are gone through. Up to VERIFIED the source is the volume, and was never written to; from
    CUTOVER on the target is. So at any instant exactly one of the two may be thrown away."""

    PLANNED = "planned"
    PREPARED = "prepared"  # the target exists
    SEEDING = "seeding"  # the bulk is copied, while the volume may be in use
    CONVERGING = "converging"  # rounds over what changed since
    QUIESCED = "quiesced"  # nobody writes; the last round
    VERIFIED = "verified"  # digests of source and target agree
    CUTOVER = "cutover"  # the ledger says the new place: the commit point has been passed
    KEPT = "kept"  # the old place is held for an undo
    DONE = "done"
    ABORTING = "aborting"  # the target goes
    FAILED = "failed"
    ABORTED = "aborted"
    ROLLED_BACK = "rolled-back"

    @property
    def ended(self) -> bool:
        return self in (self.DONE, self.FAILED, self.ABORTED, self.ROLLED_BACK)

    @property
    def committed(self) -> bool:
        return self in (self.CUTOVER, self.KEPT, self.DONE)


class MovePath(enum.StrEnum):
    """How the data gets there."""

    NATIVE = "native"  # the storage copies by itself
    LIVE = "live"  # from device to device by the kernel, under whoever uses it
    BLOCK = "block"  # from device to device
    TREE = "tree"  # from mounted tree to mounted tree


class Place(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All of a volume's record that says where and how it lies; the rest goes along with it."""

    backend: str
    stored_as: VolumeId
    handle: Handle | None = None
    size: int | None = None
    filesystem: str | None = None
    mkfs_options: tuple[str, ...] = ()
    mount_options: tuple[str, ...] = ()
    options: dict[str, str] = {}


class Migration(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A move of a volume to other storage, from the plan to its end; kept as history."""

    id: MigrationId
    volume_id: VolumeId
    volume_name: str
    node: str
    phase: MigrationPhase
    path: MovePath
    carrier: MovePath | None = None  # of a native or live move: BLOCK or TREE, whichever the two places are
    source: Place
    target: Place
    created: datetime
    by: str = ""  # who asked
    bandwidth: int = 0  # bytes a second; 0: no limit
    max_pause: float | None = None  # seconds; None: whatever it takes
    keep_source: float = 0.0  # seconds
    wait: bool = False  # until nobody uses it, instead of holding its users still
    accepted: tuple[str, ...] = ()  # what may be lost
    paused: bool = False
    aborted: bool = False  # by an operator
    attempt: int = 0  # how often it failed and was begun again
    error: str = ""
    expected: int = 0  # bytes to copy, as estimated
    copied: int = 0  # bytes
    files: int = 0
    digest: str = ""  # of all of the data, when it was verified
    pause: float | None = None  # seconds for which its writers were held
    held: bytes = b""  # whom `Writers.hold` stopped, to be let go
    snapshots: tuple[Snapshot, ...] = ()  # that stay behind at the source
    phases: tuple[tuple[MigrationPhase, datetime], ...] = ()  # when each was entered
    kept_until: datetime | None = None
    untouched: bool = False  # past the commit point, and nobody can have seen the new place: there is a way back
    reclaiming: bool = False  # the old place may be half gone: there is no way back to it
    returns: MigrationId | None = None  # the move that this one undoes, carrying back what was written since

    @property
    def carried_by(self) -> MovePath:
        """BLOCK or TREE."""
        return self.carrier or self.path

    @property
    def fell_back(self) -> bool:
        """On the way back by itself from past the commit point. An undo, which a person asks for, was kept before."""
        passed = {phase for phase, _ in self.phases}
        back = self.phase is MigrationPhase.ABORTING
        return back and MigrationPhase.CUTOVER in passed and MigrationPhase.KEPT not in passed


class CopyKind(enum.StrEnum):
    CLONE = "clone"  # becomes a volume
    BACKUP = "backup"  # is kept, and used by nobody
    RESTORE = "restore"  # of a backup: becomes a volume, or takes the place of the volume's own data


class CopyState(enum.StrEnum):
    COPYING = "copying"
    READY = "ready"  # proven; of a backup: it is there
    REMOVING = "removing"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (self.READY, self.FAILED)


class Copy(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A volume's data at one point in time, on other storage. What it makes is hidden until the copy is READY, and goes
    when it never becomes so."""

    id: CopyId
    kind: CopyKind
    state: CopyState
    node: str
    volume_id: VolumeId  # whose data it is
    volume_name: str
    target: Place
    path: MovePath
    created: datetime
    name: str = ""  # of the volume that it becomes; empty: of none
    snapshot: str = ""  # of the volume, that it is made from; empty: of the volume as it is
    of: CopyId | None = None  # the backup that is restored
    base: CopyId | None = None  # the backup from which only what changed since was copied
    made: VolumeId | None = None  # holds the data
    size: int | None = None  # that the volume had, whose data it is
    point: str = ""  # how it is of one point in time, for people
    by: str = ""
    bandwidth: int = 0  # bytes a second; 0: no limit
    accepted: tuple[str, ...] = ()  # what may be lost
    expected: int = 0  # bytes to read, as estimated
    copied: int = 0  # bytes written
    bytes: int = 0  # of all data
    files: int = 0
    digest: str = ""
    ended: datetime | None = None
    error: str = ""

    @property
    def is_backup(self) -> bool:
        """One that is there."""
        return self.kind is CopyKind.BACKUP and self.state is CopyState.READY
