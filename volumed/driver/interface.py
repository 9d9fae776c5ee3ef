"""What a driver is: five methods, one of two shapes, and abilities it may add.

Contract of every method, so that none repeats it. Calls block and may come from several threads at once, but never
two for the same volume. Core retries, locks and journals; a driver reports honestly. `kill -9` may strike anywhere:
whatever half-made thing a call can leave behind, `find` must report and `delete` must remove, and the same call made
again must succeed. Objects on storage are named from the volume's id, never from its name, and carry the mark of
`VolumeSpec.id`. Errors: CapacityExhausted, BackendUnavailable, BackendError, PermissionDenied, HostError, and those
named per method.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from volumed.driver.capability import Capability
from volumed.driver.host import Host, Tell
from volumed.driver.options import NoOptions, Options
from volumed.model import Handle, SnapshotId, VolumeId, VolumeMode


class VolumeSpec(NamedTuple):
    """A volume to be made. `options` is an instance of the driver's `VolumeOptions`.

    `mark`: what core wants to read again should the ledger be lost (name, file system, ...): short text, few keys.
    A driver keeps it with the volume where the storage can hold such a thing, and tells it in `Found`.
    """

    id: VolumeId
    size: int | None  # bytes; a block driver always gets one
    mode: VolumeMode
    options: Options
    mark: Mapping[str, str] = MappingProxyType({})


class CreatedVolume(NamedTuple):
    handle: Handle
    size: int | None  # what it really got: at least what was asked for


class Facts(NamedTuple):
    """One volume as its storage knows it."""

    size: int | None  # None: not limited
    used: int | None  # bytes occupied on storage; None: only counting the tree would tell


class Found(NamedTuple):
    """A volume of ours on the storage. `mark`: as `VolumeSpec` had it; empty where none is kept. `whole`: False for one
    that the driver can see is in the making, or on its way out."""

    handle: Handle
    volume_id: VolumeId
    mark: Mapping[str, str] = MappingProxyType({})
    whole: bool = True


class FoundSnapshot(NamedTuple):
    handle: Handle
    snapshot_id: SnapshotId


class Capacity(NamedTuple):
    total: int
    available: int


class Probe(NamedTuple):
    """What a look at the storage told. `lacking`: abilities of the class that this storage does not have, each with
    the reason and the alternative, for people. `facts`: shown by `volumectl backend inspect`. `topology`: where a node
    must be to reach its volumes, as segments of the nodes' own ({"zone": "eu-1a"}); empty: the storage sets no bounds.
    """

    lacking: dict[Capability, str]
    facts: dict[str, str]
    topology: Mapping[str, str] = MappingProxyType({})


class Driver(ABC):
    """Code that speaks to one kind of storage. One instance per backend."""

    BackendOptions: ClassVar[type[Options]] = NoOptions
    VolumeOptions: ClassVar[type[Options]] = NoOptions
    # What the shape and the mix-ins do not say: SIZE, SNAPSHOT_LIVE, CLONE_LIVE.
    capabilities: ClassVar[frozenset[Capability]] = frozenset()
    # A server or a process stands behind the trees: whoever touches one may have to wait. Core then does so in a child.
    remote: ClassVar[bool] = False

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        """Does no I/O. `options` is an instance of `BackendOptions`."""
        self.backend = backend
        self.host = host

    @classmethod
    @functools.cache
    def all_capabilities(cls) -> frozenset[Capability]:
        """What the class can do, wherever its storage is: its own word, its shape and its mix-ins."""
        by_class = {capability for kind, given in _BY_CLASS.items() if issubclass(cls, kind) for capability in given}
        return frozenset(by_class | cls.capabilities)

    @classmethod
    def describe(cls) -> str:
        """One sentence: the first of the module's docstring."""
        return (sys.modules[cls.__module__].__doc__ or "").partition("\n\n")[0].replace("\n", " ")

    @abstractmethod
    def probe(self) -> Probe:
        """Make the backend ready (a missing folder, a loaded module) and tell what it can do.

        Raises BackendUnavailable or ConfigError when it cannot be used at all. Called at start and on a timer.
        """

    def leave(self) -> None:  # noqa: B027 (most have nothing to undo)
        """Undo what `probe` made present on this machine, which goes down: no volume is used on it any more."""

    @abstractmethod
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        """Make the volume, empty. The same id again returns the same volume, finishing what was half made.
        Raises OutOfRange for a size it cannot make, NotSupported for one it cannot enforce."""

    @abstractmethod
    def delete(self, handle: Handle) -> None:
        """Remove the volume and its data for good. Gone already is success."""

    @abstractmethod
    def inspect(self, handle: Handle) -> Facts:
        """Raises NotFound when it is gone."""

    @abstractmethod
    def list(self) -> Iterable[Found]:
        """Every volume of ours on this storage, half-made ones as well; nothing of anybody else's."""

    def find(self, volume_id: VolumeId) -> Handle | None:
        """The handle of the volume with this id, half made or not. Override where storage can look it up."""
        return next((found.handle for found in self.list() if found.volume_id == volume_id), None)


class FilesystemDriver(Driver):
    """Storage that holds trees.

    `cannot_hold`: what a tree may have and this storage loses or refuses, whatever its backend's probe finds; whoever
    copies a tree here (migration) refuses or says what is lost. Words: hardlinks, symlinks, devices, fifos, sockets,
    xattrs, trusted-xattrs (those of the machine's administrator), capabilities (of programs), acls, flags (chattr(1)),
    owners, modes, times, sparse (holes take room), locks (they bind one node only), atomic-rename (a folder moves file
    by file), long-paths (of more than 1,000 bytes), longest-paths (of more than 4,000), control-characters (in names),
    open-unlinked (a removed file that is still open).
    """

    cannot_hold: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        """Make the tree present at `target`, an empty directory. Raises NotFound, MountFailed."""

    def unmount(self, handle: Handle, target: Path) -> None:
        """Undo `mount`; nothing there is success. Raises InUse."""
        self.host.unmount(target)

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        """Whether what is mounted at `target` is this volume. Overridden where a cheap look can tell."""
        return self.host.is_mountpoint(target)

    def needs_remount(self, handle: Handle, target: Path, number: int) -> bool:
        """Whether the errno that a look at the tree at `target` told, ESTALE or ENOTCONN, lasts until it is mounted
        anew. Asked where `remote` is set."""
        return True


class BlockDriver(Driver):
    """Storage that holds devices. Core makes, checks, grows and mounts the file system on them.

    `block_size`: bytes of their logical blocks, at least: what was used with smaller ones is not moved here in use.
    """

    block_size: ClassVar[int] = 512

    @abstractmethod
    def map(self, handle: Handle) -> Path:
        """Make the device present on this node and return it; the one that is there, when there is one."""

    @abstractmethod
    def unmap(self, handle: Handle) -> None:
        """Undo `map`; not mapped, or gone, is success. Raises InUse while the device is held."""

    @abstractmethod
    def mapped(self, handle: Handle) -> Path | None:
        """The device on this node, or None. Never maps."""

    @abstractmethod
    def mappings(self) -> Mapping[VolumeId, Path]:
        """Every volume of ours whose device is on this node now, in one look however many volumes there are."""


class SupportsExpand(ABC):
    @abstractmethod
    def expand(self, handle: Handle, size: int) -> int:
        """Grow to at least `size` bytes, in use or not, and return the size it has now; larger already is success.
        A mapped device shows the new size on return. Raises OutOfRange, CapacityExhausted."""


class SupportsSnapshots(ABC):
    """Core freezes or unmounts the volume before `snapshot`, and unmounts it before `restore`."""

    @abstractmethod
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        """A point in time of the volume, as one atomic step. The same id again returns the same snapshot."""

    @abstractmethod
    def delete_snapshot(self, snapshot: Handle) -> None:
        """Gone already is success."""

    @abstractmethod
    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        """Every snapshot of ours on this storage, half-made ones as well."""

    @abstractmethod
    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """Put the volume back to the snapshot, which stays. At no instant is neither state there, and the call made
        again finishes what was begun."""

    @abstractmethod
    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        """`create`, with the snapshot's data. Raises OutOfRange when `spec.size` is too small."""


class SupportsGroupSnapshots(SupportsSnapshots):
    """`snapshot` is quick enough to be taken of several volumes, one after the other, while all of them are held still.
    Core freezes what can be frozen, and takes at most one volume that cannot while it is in use."""


class Extent(NamedTuple):
    """A run of bytes."""

    offset: int
    length: int


class SupportsChangedBlocks(SupportsSnapshots):
    @abstractmethod
    def allocated(self, snapshot: Handle) -> Iterable[Extent]:
        """What holds data, in order; the rest reads as zeros. Data that is all zeros may be told, too."""

    @abstractmethod
    def changed(self, base: Handle, target: Handle) -> Iterable[Extent]:
        """What may differ in `target` from `base`, two snapshots of one volume, in order; all else is the same."""


class SupportsNativeCopy(ABC):
    """Storage that takes a volume's data from another backend of its own kind without this machine reading it. Core
    compares the two afterwards, and copies by itself what the source was given since."""

    @abstractmethod
    def way_from(self, source: Driver) -> str:
        """How data of `source`'s volumes would come here, in a few words for people. Touches no volume. Raises
        NotSupported with the reason why it cannot."""

    @abstractmethod
    def take_from(self, source: Driver, handle: Handle, spec: VolumeSpec, tell: Tell) -> CreatedVolume:
        """`create`, with the data that the volume `handle` of `source` has at one moment during the call, in use or
        not; it is not written to. Takes as long as it takes, on no worker of the backend. The same id again returns
        the same volume, finishing what was half made, or beginning anew; what a crash left at the source is taken away
        by its next `probe`, or with the volume. Raises OutOfRange when `spec.size` is too small, NotSupported for data
        that the storage cannot bring, and what `tell` raises."""


class SupportsModify(ABC):
    mutable: ClassVar[frozenset[str]]  # keys of VolumeOptions

    @abstractmethod
    def modify(self, handle: Handle, options: Options) -> None:
        """Give the volume these `VolumeOptions`, in use or not. The same again is success."""


class SupportsClone(ABC):
    @abstractmethod
    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        """`create`, with the data that the source has now. Core freezes or unmounts the source before."""


class SupportsCapacity(ABC):
    @abstractmethod
    def capacity(self) -> Capacity:
        """Bytes, as the storage counts them."""


class SupportsAttach(ABC):
    """Storage that must be told which machine will reach a volume before `map` on that machine can find it (a cloud's
    disks). Machines go by the storage's own names for them. Core calls with the volume's lock held, keeps the ledger
    of who is meant to have what, and never attaches a volume to a second machine unless an access mode says so."""

    @abstractmethod
    def identity(self) -> str:
        """This machine as the storage names it; written into the node's record for whoever attaches from elsewhere.
        Raises BackendUnavailable where it cannot be told."""

    @abstractmethod
    def attach(self, handle: Handle, machine: str) -> None:
        """Returns when the machine can see it. The same again is success. Raises InUse naming the machine that has it,
        CapacityExhausted when the machine takes no more, PreconditionFailed when it can never reach it."""

    @abstractmethod
    def detach(self, handle: Handle, machine: str, *, force: bool = False) -> None:
        """Returns when the machine has let go. Not attached, or gone, is success. `force`: the machine is dead, or an
        operator says so; what it had not written is lost."""

    @abstractmethod
    def machines(self, handle: Handle) -> Sequence[str]:
        """Who has it attached now, as the storage knows."""


class Holder(NamedTuple):
    """Somebody who has a volume open, as its storage sees it."""

    id: str  # the storage's own name: a client's address and nonce, an instance
    node: str  # volumed's name of the node where the storage tells it, else empty
    ours: bool  # it is this very node
    text: str  # for people


class SupportsFencing(ABC):
    """Storage that knows who has a volume open, and can cut one of them off."""

    @abstractmethod
    def holders(self, handle: Handle) -> Sequence[Holder]:
        """Everybody who could still write to it, this node included."""

    @abstractmethod
    def fence(self, handle: Handle, holder: Holder) -> None:
        """From its return on nothing that this holder writes reaches the volume any more. Fenced already, or gone, is
        success. Never this node itself."""


class SupportsImport(ABC):
    """Storage whose objects that volumed did not make can become volumes of ours, with their data."""

    @abstractmethod
    def importable(self) -> Iterable[str]:
        """References of what could be adopted: names as the storage's own tools show them."""

    @abstractmethod
    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        """Make it the volume `spec.id`, marked as ours; its data stays as it is. The same again is success. Raises
        NotFound, InUse while somebody has it open, InvalidRequest for what cannot be a volume of this mode.
        `spec.size` None: as large as it is."""


_BY_CLASS: Mapping[type, tuple[Capability, ...]] = {
    FilesystemDriver: (Capability.FILESYSTEM,),
    BlockDriver: (Capability.FILESYSTEM, Capability.BLOCK),  # core puts a file system on its devices
    SupportsExpand: (Capability.EXPAND,),
    SupportsSnapshots: (Capability.SNAPSHOT,),
    SupportsGroupSnapshots: (Capability.GROUP_SNAPSHOT,),
    SupportsChangedBlocks: (Capability.CHANGED_BLOCKS,),
    SupportsNativeCopy: (Capability.NATIVE_COPY,),
    SupportsModify: (Capability.MODIFY,),
    SupportsClone: (Capability.CLONE,),
    SupportsCapacity: (Capability.CAPACITY,),
    SupportsAttach: (Capability.ATTACH,),
    SupportsFencing: (Capability.FENCING,),
    SupportsImport: (Capability.IMPORT,),
}
