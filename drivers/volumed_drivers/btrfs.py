"""A subvolume per volume on a btrfs, bounded by a qgroup; snapshots and clones share its data.

PATH/<volume id>            a volume
PATH/<snapshot id>          a snapshot, read-only
PATH/<volume id>.new, .old  on the way back to a snapshot
PATH/<volume id>.sent       read-only, while it is sent to another btrfs
PATH/<volume id>.part       what was received of it there
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from volumed.driver import (
    Capability,
    Capacity,
    CreatedVolume,
    Driver,
    Facts,
    FilesystemDriver,
    Found,
    FoundSnapshot,
    Host,
    Options,
    Probe,
    SupportsCapacity,
    SupportsClone,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsImport,
    SupportsModify,
    SupportsNativeCopy,
    Tell,
    VolumeSpec,
)
from volumed.errors import (
    BackendUnavailable,
    CommandFailed,
    InvalidRequest,
    MountFailed,
    NotFound,
    NotSupported,
    OutOfRange,
)
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing import crash
from volumed_drivers.folders import capacity_of, make_folder, read_mark, stranger, strangers, write_mark

_VOLUME = re.compile(r"(v[0-9a-f]{32})(\.new|\.old|\.sent|\.part)?")
_ENDS = ("", ".new", ".old", ".sent", ".part")
_SNAPSHOT = re.compile(r"s[0-9a-f]{32}")
_OURS = re.compile(rf"{_VOLUME.pattern}|{_SNAPSHOT.pattern}")
_MAGIC = "btrfs"
_ROOT_INODE = 256  # of every subvolume (BTRFS_FIRST_FREE_OBJECTID)
MINIMUM_SIZE = 16 * 4096  # a qgroup counts whole nodes of metadata; below this not even a file fits


class BtrfsOptions(Options):
    path: Path = Field(description="Folder on a btrfs that holds the subvolumes; made if it is missing")


class BtrfsVolumeOptions(Options):
    compression: Literal["zlib", "lzo", "zstd", "none"] | None = Field(
        default=None, description="How new data is compressed; default: as the file system is mounted"
    )


class BtrfsDriver(
    FilesystemDriver,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsModify,
    SupportsClone,
    SupportsCapacity,
    SupportsImport,
    SupportsNativeCopy,
):
    BackendOptions = BtrfsOptions
    VolumeOptions = BtrfsVolumeOptions
    mutable: ClassVar[frozenset[str]] = frozenset({"compression"})
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SIZE, Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE}
    )

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, BtrfsOptions)
        self._path = options.path
        self._sending: set[str] = set()
        self._sweeping = threading.Lock()

    def probe(self) -> Probe:
        make_folder(self._path, mode=0o711, backend=self.backend)
        kind = self.host.run(["stat", "--file-system", "--format=%T", self._path]).stdout.strip()
        if kind != _MAGIC:
            raise BackendUnavailable(f"{self._path} lies on {kind}, not on btrfs", subject=f"backend {self.backend}")
        self._forget_sent()
        facts = {"path": str(self._path)}
        try:
            self._btrfs("quota", "enable", self._path)
        except CommandFailed as error:
            reason = f"quotas cannot be enabled on {self._path}: {error.stderr.strip()}"
            return Probe(lacking={Capability.SIZE: reason, Capability.EXPAND: reason}, facts=facts)
        return Probe(lacking={}, facts=facts)

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        self._check_size(spec)
        subvolume = self._path / spec.id
        if not subvolume.exists():
            self._btrfs("subvolume", "create", subvolume)
            crash.point("btrfs.create.made")
        self._finish(subvolume, spec)
        return CreatedVolume(Handle(spec.id), spec.size)

    def _finish(self, subvolume: Path, spec: VolumeSpec) -> None:
        self._bound(subvolume, spec.size)
        self._compress(subvolume, spec.options)
        write_mark(subvolume, spec.mark)  # in the place of the one that a copy has from its original
        self._sync()

    def _compress(self, subvolume: Path, options: Options) -> None:
        if isinstance(options, BtrfsVolumeOptions) and options.compression is not None:
            self._btrfs("property", "set", subvolume, "compression", options.compression)

    def modify(self, handle: Handle, options: Options) -> None:
        self._compress(self._present(handle), options)
        self._sync()

    def _check_size(self, spec: VolumeSpec) -> None:
        if spec.size is not None and spec.size < MINIMUM_SIZE:
            raise OutOfRange(
                f"a size of {spec.size} bytes is too small",
                subject=f"backend {self.backend}",
                hint=f"ask for {MINIMUM_SIZE} bytes or more",
            )

    def _bound(self, subvolume: Path, size: int | None) -> None:
        if size is not None:
            self._btrfs("qgroup", "limit", str(size), subvolume)

    def delete(self, handle: Handle) -> None:
        for end in reversed(_ENDS):
            self._delete(self._path / f"{handle}{end}")

    def _delete(self, subvolume: Path) -> None:
        if not subvolume.exists():
            return
        number = self._btrfs("inspect-internal", "rootid", subvolume).strip()
        # What containers made inside: subvolumes of their own cannot be left behind, deepest first.
        listed = self._btrfs("subvolume", "list", "-o", subvolume).splitlines()
        nested = [line.split(" path ", 1)[1] for line in listed]
        for inner in sorted(nested, key=lambda path: path.count("/"), reverse=True):
            within = inner.partition(f"{subvolume.name}/")[2]
            if within:
                self._delete(subvolume / within)
        self._btrfs("subvolume", "delete", "--commit-after", subvolume)
        crash.point("btrfs.delete.deleted")
        # Newer kernels take the qgroup away by themselves; older ones keep it, and it counts for ever.
        self.host.run(["btrfs", "qgroup", "destroy", f"0/{number}", self._path], check=False)

    def inspect(self, handle: Handle) -> Facts:
        subvolume = self._present(handle)
        for line in self._btrfs("qgroup", "show", "--raw", "-r", "-F", subvolume).splitlines():
            columns = line.split()
            if columns and columns[0].startswith("0/"):
                limit = columns[3]
                return Facts(size=None if limit == "none" else int(limit), used=int(columns[1]))
        return Facts(size=None, used=None)

    def _present(self, handle: Handle) -> Path:
        subvolume = self._path / handle
        if not subvolume.exists():
            raise NotFound(f"{subvolume} is gone", subject=f"backend {self.backend}", hint="put it back from a backup")
        return subvolume

    def list(self) -> Iterable[Found]:
        names = os.listdir(self._path)  # noqa: PTH208 (names are enough)
        for volume_id in sorted({match[1] for name in names if (match := _VOLUME.fullmatch(name))}):
            subvolume = self._path / volume_id
            yield Found(Handle(volume_id), VolumeId(volume_id), read_mark(subvolume), whole=subvolume.exists())

    def find(self, volume_id: VolumeId) -> Handle | None:
        there = any((self._path / f"{volume_id}{end}").exists() for end in _ENDS)
        return Handle(volume_id) if there else None

    def importable(self) -> Iterable[str]:
        return [found.name for found in strangers(self._path, _OURS) if _is_subvolume(found)]

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        subvolume = self._path / spec.id
        if not subvolume.exists():
            found = stranger(self._path, reference, _OURS, backend=self.backend)
            if not _is_subvolume(found):
                raise InvalidRequest(f"{found} is not a subvolume", subject=f"backend {self.backend}")
            self._btrfs("property", "set", "-f", "-t", "subvol", found, "ro", "false")
            found.rename(subvolume)
            crash.point("btrfs.adopt.renamed")
        self._finish(subvolume, spec)
        return CreatedVolume(Handle(spec.id), self.inspect(Handle(spec.id)).size)

    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        subvolume = self._path / handle
        try:
            self.host.bind(subvolume, target, readonly=readonly, options=options)
        except MountFailed:
            self._present(handle)
            raise

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        return self.host.is_same(self._path / handle, target)

    def expand(self, handle: Handle, size: int) -> int:
        there = self.inspect(handle).size
        if there is not None and there < size:
            self._bound(self._path / handle, size)
            return size
        return there if there is not None else size

    # Snapshots
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        target = self._path / snapshot_id
        if not target.exists():
            self._btrfs("filesystem", "sync", self._path)  # what was written before is in the snapshot
            self._btrfs("subvolume", "snapshot", "-r", self._present(handle), target)
            crash.point("btrfs.snapshot.made")
            self._sync()
        return Handle(snapshot_id)

    def delete_snapshot(self, snapshot: Handle) -> None:
        self._delete(self._path / snapshot)

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        for name in sorted(os.listdir(self._path)):  # noqa: PTH208 (names are enough)
            if _SNAPSHOT.fullmatch(name):
                yield FoundSnapshot(Handle(name), SnapshotId(name))

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """The new state is made beside the old one, takes its name, and only then the old one goes."""
        current, new, old = (self._path / f"{handle}{end}" for end in ("", ".new", ".old"))
        if current.exists():
            source = self._present(snapshot)
            size = self.inspect(handle).size
            self._delete(old)  # of an attempt that had come to its end but for this
            self._delete(new)
            self._btrfs("subvolume", "snapshot", source, new)
            self._bound(new, size)
            write_mark(new, read_mark(current))
            crash.point("btrfs.restore.new")
            current.rename(old)
            crash.point("btrfs.restore.old")
        with contextlib.suppress(FileNotFoundError):
            new.rename(current)
        crash.point("btrfs.restore.renamed")
        self._delete(old)
        self._sync()

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._create_copy(snapshot, spec)

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._create_copy(source, spec)

    def _create_copy(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        self._check_size(spec)
        target = self._path / spec.id
        if not target.exists():
            self._btrfs("filesystem", "sync", self._path)
            self._btrfs("subvolume", "snapshot", self._present(source), target)
            crash.point("btrfs.clone.made")
        self._finish(target, spec)
        return CreatedVolume(Handle(spec.id), spec.size)

    # Moves
    def way_from(self, source: Driver) -> str:
        return "a snapshot" if self._is_beside(self._btrfs_of(source)) else "btrfs send and receive"

    def _btrfs_of(self, source: Driver) -> BtrfsDriver:
        if not isinstance(source, BtrfsDriver):
            raise NotSupported("only a btrfs sends to a btrfs", subject=f"backend {self.backend}")
        return source

    def _is_beside(self, source: BtrfsDriver) -> bool:
        """Whether it is one file system, however it is mounted."""
        devices = [
            self.host.run(["findmnt", "--noheadings", "--output", "MAJ:MIN", "--target", path]).stdout.split()
            for path in (self._path, source._path)
        ]
        return devices[0] == devices[1]

    def take_from(self, source: Driver, handle: Handle, spec: VolumeSpec, tell: Tell) -> CreatedVolume:
        source = self._btrfs_of(source)
        self._check_size(spec)
        target = self._path / spec.id
        if not target.exists():
            if self._is_beside(source):
                self._btrfs("filesystem", "sync", self._path)
                self._btrfs("subvolume", "snapshot", source._present(handle), target)
            else:
                self._receive(source, handle, target, tell)
            crash.point("native.btrfs.made")
        self._delete(_part(target))
        self._finish(target, spec)
        return CreatedVolume(Handle(spec.id), spec.size)

    def _receive(self, source: BtrfsDriver, handle: Handle, target: Path, tell: Tell) -> None:
        """Into a subvolume that is taken away with what is in it; what came whole gets the volume's name as a snapshot
        of it, which can be written to."""
        part = _part(target)
        self._delete(part)
        self._btrfs("subvolume", "create", part)
        with source._sent(handle) as sent:
            crash.point("native.btrfs.sending")
            try:
                self.host.pipe(["btrfs", "send", "--quiet", sent], ["btrfs", "receive", "--quiet", part], tell=tell)
            except CommandFailed as error:
                # A path of it, of which the kernel sends 4,095 bytes; it may fill all that is said.
                if "File name too long" not in error.stderr and len(error.stderr) < 4000:
                    raise
                self._delete(part)
                raise NotSupported("sends no paths of more than 4,095 bytes", subject=f"volume {handle}") from None
            crash.point("native.btrfs.received")
        self._btrfs("subvolume", "snapshot", part / sent.name, target)

    @contextlib.contextmanager
    def _sent(self, handle: Handle) -> Iterator[Path]:
        sent = self._path / f"{handle}.sent"
        with self._sweeping:
            self._sending.add(sent.name)
        try:
            self._delete(sent)
            self._sync()
            self._btrfs("subvolume", "snapshot", "-r", self._present(handle), sent)
            self._sync()  # what is not on the disk is not sent
            yield sent
        finally:
            with contextlib.suppress(CommandFailed):  # the next probe tries again
                self._delete(sent)
            self._sending.discard(sent.name)

    def _forget_sent(self) -> None:
        """What a crash left; it would hold the room of what is deleted."""
        with self._sweeping:
            for sent in self._path.glob("*.sent"):
                if _VOLUME.fullmatch(sent.name) and sent.name not in self._sending:
                    with contextlib.suppress(CommandFailed):  # the kernel keeps one that somebody is still sending
                        self._delete(sent)

    def capacity(self) -> Capacity:
        return capacity_of(self._path)

    def _sync(self) -> None:
        """A subvolume that was made survives a power cut only once its transaction is on the disk."""
        self._btrfs("filesystem", "sync", self._path)

    def _btrfs(self, *words: str | Path) -> str:
        return self.host.run(["btrfs", *words], timeout=300.0).stdout


def _part(subvolume: Path) -> Path:
    return subvolume.with_name(f"{subvolume.name}.part")


def _is_subvolume(path: Path) -> bool:
    return path.is_dir() and path.stat().st_ino == _ROOT_INODE
