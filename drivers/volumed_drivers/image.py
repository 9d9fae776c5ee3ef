"""A file per volume, on a loop device.

    PATH/<volume id>.img      a volume
    PATH/<snapshot id>.snap   a snapshot, a file like it
    PATH/<either>.new         one in the making

Where the file system can share data between files (XFS, btrfs), snapshots and clones take no time and no space; else
they are copies, and only of volumes that nobody uses.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

from pydantic import Field

from volumed.driver import (
    BlockDriver,
    Capability,
    Capacity,
    CreatedVolume,
    Driver,
    Extent,
    Facts,
    FileExtent,
    Found,
    FoundSnapshot,
    Host,
    Options,
    Probe,
    SupportsCapacity,
    SupportsChangedBlocks,
    SupportsClone,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsImport,
    SupportsNativeCopy,
    Tell,
    VolumeSpec,
)
from volumed.errors import (
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    InUse,
    InvalidRequest,
    NotFound,
    NotSupported,
    OutOfRange,
)
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing import crash
from volumed_drivers.folders import (
    capacity_of,
    make_folder,
    read_mark,
    stranger,
    strangers,
    sync_folder,
    write_mark,
)

_VOLUME = re.compile(r"(v[0-9a-f]{32})\.img(\.new)?")
_SNAPSHOT = re.compile(r"(s[0-9a-f]{32})\.snap(\.new)?")
_OURS = re.compile(rf"{_VOLUME.pattern}|{_SNAPSHOT.pattern}")
ALIGNMENT = 4096  # loop devices with direct I/O count in the sectors below them
MAX_SIZE = 2**63 - ALIGNMENT  # loff_t; the file system may draw the line earlier, and says so
COPY_TIMEOUT = 580.0
COMPARED = 1 << 16  # bytes told as changed at once where files are compared by reading them
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_LARGE = (errno.EFBIG, errno.EINVAL, errno.EOVERFLOW)


class ImageOptions(Options):
    path: Path = Field(description="Folder that holds the image files; made if it is missing")
    direct_io: bool = Field(default=True, description="Bypass the host's page cache below the volume's own")
    preallocate: bool = Field(default=False, description="Reserve the space of each volume when it is made")


class ImageVolumeOptions(Options):
    preallocate: bool | None = Field(default=None, description="Reserve the space now; default: the backend's")


class ImageDriver(
    BlockDriver,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsChangedBlocks,
    SupportsClone,
    SupportsCapacity,
    SupportsImport,
    SupportsNativeCopy,
):
    BackendOptions = ImageOptions
    VolumeOptions = ImageVolumeOptions
    block_size = ALIGNMENT
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SIZE, Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE}
    )

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, ImageOptions)
        self._options = options
        self._path = options.path
        self._reflink: bool | None = None  # None: its disk has been too full to tell

    def probe(self) -> Probe:
        make_folder(self._path, mode=0o700, backend=self.backend)
        with contextlib.suppress(CapacityExhausted):  # what a full disk could do before it could do now
            self._reflink = self._can_reflink(self._path)
        reason = f"{self._path} cannot share data between files (XFS and btrfs can)"
        if self._reflink is None:
            reason = f"{self._path} is full: whether it can share data between files will be tried when it has room"
        live = (Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE, Capability.NATIVE_COPY)
        reflink = {True: "yes", False: "no", None: "not known: the disk is full"}[self._reflink]
        return Probe(
            lacking={} if self._reflink else dict.fromkeys(live, reason),
            facts={"path": str(self._path), "reflink": reflink},
        )

    def _can_reflink(self, origin: Path) -> bool:
        """From that folder into ours. Tried, not guessed from the file system's name; with files that hold nothing, as
        the disk may be full. Names of this very look: two may be made at once. Raises CapacityExhausted where not even
        such files can be made, NotSupported where the other folder takes none: its data can go by other ways."""
        source, target = origin / f".probe-{uuid4().hex}", self._path / f".probe-{uuid4().hex}"
        folder = origin
        try:
            source.touch()
            folder = self._path
            self.host.reflink(source, target)
        except NotSupported:
            return False
        except OSError as error:
            if folder != self._path:
                raise NotSupported(
                    f"whether it shares data with {self._path} cannot be tried: {error.strerror}", subject=str(folder)
                ) from None
            if error.errno in _FULL:
                raise self._full() from None
            raise BackendUnavailable(
                f"{self._path} cannot be written: {error.strerror}", subject=f"backend {self.backend}"
            ) from None
        finally:
            source.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
        return True

    def _full(self) -> CapacityExhausted:
        return CapacityExhausted(f"{self._path} is full", subject=f"backend {self.backend}", hint="free some space")

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        size = self._aligned(spec.size)
        image = self._image(Handle(spec.id))
        if not image.exists():
            new = _new(image)
            with self._explained(size):
                if self.capacity().available < ALIGNMENT:  # the file takes no space, but nothing could be written to it
                    raise self._full()
                with new.open("wb") as made:
                    os.fchmod(made.fileno(), 0o600)
                    write_mark(made.fileno(), spec.mark)
                    if self._preallocates(spec):
                        os.posix_fallocate(made.fileno(), 0, size)
                    made.truncate(size)
                    crash.point("image.create.new")
                    os.fsync(made.fileno())
            self._publish(new, image)
        return CreatedVolume(Handle(spec.id), image.stat().st_size)

    def _aligned(self, size: int | None) -> int:
        if size is None or size < ALIGNMENT or size > MAX_SIZE:
            raise OutOfRange(
                f"a size of {size} bytes cannot be made",
                subject=f"backend {self.backend}",
                hint=f"ask for {ALIGNMENT} to {MAX_SIZE} bytes",
            )
        return -(-size // ALIGNMENT) * ALIGNMENT

    def _preallocates(self, spec: VolumeSpec) -> bool:
        asked = spec.options.preallocate if isinstance(spec.options, ImageVolumeOptions) else None
        return self._options.preallocate if asked is None else asked

    @contextlib.contextmanager
    def _explained(self, size: int) -> Iterator[None]:
        """What the file system says, for people."""
        try:
            yield
        except OSError as error:
            subject = f"backend {self.backend}"
            if error.errno in _FULL:
                raise CapacityExhausted(
                    f"there is no room for {size} bytes in {self._path}", subject=subject, hint="free some space"
                ) from None
            if error.errno in _TOO_LARGE:
                raise OutOfRange(f"the file system cannot hold a file of {size} bytes", subject=subject) from None
            raise BackendError(f"{self._path}: {error.strerror}", subject=subject) from None

    def _publish(self, new: Path, image: Path) -> None:
        """From one instant on the file is whole, also after a power cut."""
        new.rename(image)
        sync_folder(self._path)

    def delete(self, handle: Handle) -> None:
        self.unmap(handle)
        self._remove(self._image(handle))

    def _remove(self, image: Path) -> None:
        """Gone for good, also after a power cut: else the ledger would have forgotten what comes back."""
        for path in (image, _new(image)):
            path.unlink(missing_ok=True)
        sync_folder(self._path)

    def inspect(self, handle: Handle) -> Facts:
        try:
            status = self._image(handle).stat()
        except FileNotFoundError:
            raise NotFound(f"{self._image(handle)} is gone", subject=f"backend {self.backend}") from None
        return Facts(size=status.st_size, used=status.st_blocks * 512)

    def list(self) -> Iterable[Found]:
        for volume_id in sorted(self._ids(_VOLUME)):
            image = self._image(Handle(volume_id))
            yield Found(Handle(volume_id), VolumeId(volume_id), read_mark(image), whole=image.exists())

    def find(self, volume_id: VolumeId) -> Handle | None:
        image = self._image(Handle(volume_id))
        return Handle(volume_id) if image.exists() or _new(image).exists() else None

    def _ids(self, pattern: re.Pattern[str]) -> set[str]:
        names = os.listdir(self._path)  # noqa: PTH208 (names are enough)
        return {match[1] for name in names if (match := pattern.fullmatch(name))}

    def importable(self) -> Iterable[str]:
        return [found.name for found in strangers(self._path, _OURS) if found.is_file()]

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        """A raw image; one that ends within a block is filled up to its end."""
        image = self._image(Handle(spec.id))
        if not image.exists():
            found = stranger(self._path, reference, _OURS, backend=self.backend)
            size = found.stat().st_size if found.is_file() else 0
            if size == 0 or found.open("rb").read(4) == b"QFI\xfb":
                raise InvalidRequest(
                    f"{found} is no raw image",
                    subject=f"backend {self.backend}",
                    hint="make one of it: qemu-img convert -O raw",
                )
            if self.host.find_loop(found) is not None:
                raise InUse("has a loop device", subject=str(found), hint=f"see losetup --associated {found}")
            with self._explained(size), found.open("r+b") as opened:
                os.fchmod(opened.fileno(), 0o600)
                opened.truncate(self._aligned(size))
                write_mark(opened.fileno(), spec.mark)
                os.fsync(opened.fileno())
            crash.point("image.adopt.marked")
            self._publish(found, image)
        return CreatedVolume(Handle(spec.id), image.stat().st_size)

    # Devices
    def map(self, handle: Handle) -> Path:
        image = self._image(handle)
        if not image.exists():
            raise NotFound(f"{image} is gone", subject=f"backend {self.backend}", hint="put it back from a backup")
        return self.host.attach_loop(image, direct_io=self._options.direct_io)

    def unmap(self, handle: Handle) -> None:
        device = self.mapped(handle)
        if device is not None:
            self.host.detach_loop(device)

    def mapped(self, handle: Handle) -> Path | None:
        return self.host.find_loop(self._image(handle))

    def mappings(self) -> Mapping[VolumeId, Path]:
        found: dict[VolumeId, Path] = {}
        for loop in self.host.loops():
            match = _VOLUME.fullmatch(loop.backing_file.name)
            if match and loop.backing_file.parent == self._path:
                found[VolumeId(match[1])] = loop.device
        return found

    def expand(self, handle: Handle, size: int) -> int:
        size = self._aligned(size)
        image = self._image(handle)
        there = self.inspect(handle).size or 0
        if there < size:
            with self._explained(size), image.open("r+b") as opened:
                if self._options.preallocate:
                    os.posix_fallocate(opened.fileno(), there, size - there)
                opened.truncate(size)
                os.fsync(opened.fileno())
            crash.point("image.expand.grown")
        device = self.mapped(handle)
        if device is not None:
            self.host.refresh_loop(device)
        return max(there, size)

    # Copies
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        self._copy(self._image(handle), self._snapshot(Handle(snapshot_id)))
        return Handle(snapshot_id)

    def delete_snapshot(self, snapshot: Handle) -> None:
        self._remove(self._snapshot(snapshot))

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        for snapshot_id in sorted(self._ids(_SNAPSHOT)):
            yield FoundSnapshot(Handle(snapshot_id), SnapshotId(snapshot_id))

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """The copy takes the volume's name in one step: before it the old state is there, after it the new."""
        image = self._image(handle)
        size = image.stat().st_size
        self._copy(self._snapshot(snapshot), image, over=True, size=size, mark=read_mark(image))

    def allocated(self, snapshot: Handle) -> Iterable[Extent]:
        image = self._present(self._snapshot(snapshot))
        with image.open("rb") as opened:
            yield from _data(opened.fileno())

    def changed(self, base: Handle, target: Handle) -> Iterable[Extent]:
        """By where their data lies: what two files share is the same. Copies share nothing, and are read."""
        before, after = self._present(self._snapshot(base)), self._present(self._snapshot(target))
        if self._reflink:
            return merged(differing_extents(self.host.extents(before), self.host.extents(after)))
        return merged(_differing_bytes(before, after))

    def _present(self, image: Path) -> Path:
        if not image.exists():
            raise NotFound(f"{image} is gone", subject=f"backend {self.backend}")
        return image

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._create_copy(self._snapshot(snapshot), spec)

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._create_copy(self._image(source), spec)

    # Moves
    def way_from(self, source: Driver) -> str:
        if not isinstance(source, ImageDriver):
            raise NotSupported("images share data with images alone", subject=f"backend {self.backend}")
        if not self._can_reflink(source._path):
            raise NotSupported(
                f"{self._path} and {source._path} lie on no one file system that can share data between files",
                subject=f"backend {self.backend}",
            )
        return "both files share their data (reflink) until one of them is written"

    def take_from(self, source: Driver, handle: Handle, spec: VolumeSpec, tell: Tell) -> CreatedVolume:
        self.way_from(source)
        assert isinstance(source, ImageDriver)
        tell(0)
        return self._create_copy(source._image(handle), spec)

    def _create_copy(self, source: Path, spec: VolumeSpec) -> CreatedVolume:
        least = source.stat().st_size if source.exists() else 0
        size = self._aligned(spec.size)
        if size < least:
            raise OutOfRange(f"{least} bytes do not fit into {size}", subject=f"backend {self.backend}")
        image = self._image(Handle(spec.id))
        self._copy(source, image, size=size, mark=spec.mark)
        return CreatedVolume(Handle(spec.id), image.stat().st_size)

    def _copy(
        self, source: Path, target: Path, *, over: bool = False, size: int = 0, mark: Mapping[str, str] | None = None
    ) -> None:
        """Shared where the file system can, else copied hole for hole; grown to `size`."""
        if target.exists() and not over:
            return
        if not source.exists():
            raise NotFound(f"{source} is gone", subject=f"backend {self.backend}")
        new = _new(target)
        new.unlink(missing_ok=True)
        with self._explained(source.stat().st_size):
            if self._reflink:
                self.host.reflink(source, new)
            else:
                self._check_room(source)
                self.host.run(["cp", "--sparse=always", "--", source, new], timeout=COPY_TIMEOUT)
            crash.point("image.copy.new")
            with new.open("r+b") as copied:
                os.fchmod(copied.fileno(), 0o600)
                write_mark(copied.fileno(), mark or {})
                if copied.seek(0, os.SEEK_END) < size:
                    copied.truncate(size)
                os.fsync(copied.fileno())
            self._publish(new, target)

    def _check_room(self, source: Path) -> None:
        needed, free = source.stat().st_blocks * 512, self.capacity().available
        if needed > free:
            raise CapacityExhausted(
                f"a copy needs {needed} bytes and {self._path} has {free} left",
                subject=f"backend {self.backend}",
                hint="free some space",
            )

    def capacity(self) -> Capacity:
        return capacity_of(self._path)

    def _image(self, handle: Handle) -> Path:
        return self._path / f"{handle}.img"

    def _snapshot(self, handle: Handle) -> Path:
        return self._path / f"{handle}.snap"


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _data(descriptor: int) -> Iterator[Extent]:
    """What is not a hole (lseek(2))."""
    end, offset = os.fstat(descriptor).st_size, 0
    while offset < end:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield Extent(start, offset - start)


def differing_extents(before: Sequence[FileExtent], after: Sequence[FileExtent]) -> Iterator[Extent]:
    """Runs that do not lie at the same place on disk in both files."""
    bounds = sorted({edge for extent in (*before, *after) for edge in (extent.offset, extent.offset + extent.length)})
    old, new = _Cursor(before), _Cursor(after)
    for start, end in itertools.pairwise(bounds):
        if old.at(start) != new.at(start):
            yield Extent(start, end - start)


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Those that touch as one."""
    run: Extent | None = None
    for extent in extents:
        if run is not None and run.offset + run.length == extent.offset:
            run = Extent(run.offset, run.length + extent.length)
            continue
        if run is not None:
            yield run
        run = extent
    if run is not None:
        yield run


class _Cursor:
    """Looks a file's extents up by ever higher offsets."""

    def __init__(self, extents: Sequence[FileExtent]) -> None:
        self._extents = extents
        self._next = 0

    def at(self, offset: int) -> object:
        """Equal for two files only where they surely hold the same: a hole, or the same place."""
        while self._next < len(self._extents) and _end(self._extents[self._next]) <= offset:
            self._next += 1
        extent = self._extents[self._next] if self._next < len(self._extents) else None
        if extent is None or extent.offset > offset:
            return None
        if extent.place is None:
            return object()
        return extent.place - extent.offset, extent.written


def _end(extent: FileExtent) -> int:
    return extent.offset + extent.length


def _differing_bytes(before: Path, after: Path) -> Iterator[Extent]:
    """By what they hold, where either holds anything."""
    with before.open("rb") as old, after.open("rb") as new:
        blocks = {
            block
            for opened in (old, new)
            for extent in _data(opened.fileno())
            for block in range(extent.offset // COMPARED, -(-(extent.offset + extent.length) // COMPARED))
        }
        for block in sorted(blocks):
            was = os.pread(old.fileno(), COMPARED, block * COMPARED)
            now = os.pread(new.fileno(), COMPARED, block * COMPARED)
            if was.ljust(len(now), b"\0") != now:
                yield Extent(block * COMPARED, len(now))
