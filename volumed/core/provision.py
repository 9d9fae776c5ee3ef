"""The storage's part of a volume's life: made from nothing or from another's data, grown, destroyed.

Nothing here knows the ledger. Each step bears being made again after a crash (`volumed.core.journal`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from volumed.core import marks
from volumed.core.backends import Backend
from volumed.core.encryption import overhead
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts
from volumed.core.options import nearest, read_options
from volumed.core.presence import Presence, handle_of
from volumed.driver import (
    BlockDriver,
    Capability,
    CreatedVolume,
    Driver,
    SupportsCapacity,
    SupportsClone,
    SupportsExpand,
    SupportsImport,
    SupportsModify,
    SupportsNativeCopy,
    SupportsSnapshots,
    Tell,
    VolumeSpec,
)
from volumed.errors import CapacityExhausted, IntegrityError, InvalidRequest, NotFound, NotSupported, OutOfRange
from volumed.host import filesystems
from volumed.model import Handle, Ownership, Snapshot, Volume, VolumeMode, VolumeState
from volumed.testing import crash

# Bytes: less than any file system needs.
NEARLY_NOTHING = 1 << 20


class Origin(NamedTuple):
    """Where a new volume's data comes from: a volume as it is now, or a snapshot of it."""

    volume: Volume
    snapshot: Snapshot | None = None

    def __str__(self) -> str:
        return f"{self.volume.name}@{self.snapshot.name}" if self.snapshot else self.volume.name

    def fit(self, *, size: int | None, mode: VolumeMode, filesystem: str) -> tuple[int | None, str]:
        """Size and file system of the new volume. Raises when what was asked for cannot come out of this data."""
        subject = f"volume {self.volume.name}"
        least = self.snapshot.size if self.snapshot else self.volume.size
        if size is not None and least is not None and size < least:
            raise OutOfRange(
                f"holds {least} bytes, which do not fit into {size}", subject=subject, hint="ask for a larger size"
            )
        own = self.volume.filesystem or ""
        if filesystem and filesystem != own:
            raise InvalidRequest(f"is {own or 'a folder'} and its copy cannot be {filesystem}", subject=subject)
        if mode is not self.volume.mode:
            raise InvalidRequest(f"is a {self.volume.mode} volume and its copy cannot be {mode}", subject=subject)
        return (size if size is not None else least), own


class Provision:
    def __init__(self, *, presence: Presence, mounts: Mounts, locks: KeyedLocks) -> None:
        self._presence = presence
        self._mounts = mounts
        self._locks = locks

    def make(self, volume: Volume, backend: Backend, origin: Origin | None, *, blank: bool = False) -> Volume:
        """The volume on its storage, ready to be mounted; the record returned has its handle and its real size.
        `blank`: a bare device, whose file system will come with the data."""
        driver, spec = backend.driver, self._spec(volume, backend)
        made = self._copy(spec, backend, origin) if origin else driver.create(spec)
        crash.point("create.stored")
        usable = None if made.size is None else made.size - overhead(volume)
        ready = msgspec.structs.replace(volume, handle=made.handle, size=usable, state=VolumeState.READY)
        if volume.encryption:
            self._encrypt(ready, backend, origin)
        if volume.mode is VolumeMode.FILESYSTEM and not blank:
            self._prepare(ready, backend, copied=origin is not None)
        return ready

    def take(self, volume: Volume, backend: Backend, source: Driver, handle: Handle, tell: Tell) -> Volume:
        """As `make`, with the data that `handle` of another backend's driver has now, brought by the storage itself."""
        driver = backend.driver
        if not isinstance(driver, SupportsNativeCopy):
            raise NotSupported("takes nothing from other backends", subject=f"backend {backend.name}")
        made = driver.take_from(source, handle, self._spec(volume, backend), tell)
        return msgspec.structs.replace(volume, handle=made.handle, size=made.size, state=VolumeState.READY)

    @staticmethod
    def _spec(volume: Volume, backend: Backend) -> VolumeSpec:
        options = read_options(backend.driver.VolumeOptions, volume.options, subject=f"backend {backend.name}")
        size = None if volume.size is None else volume.size + overhead(volume)
        return VolumeSpec(id=volume.stored_as, size=size, mode=volume.mode, options=options, mark=marks.write(volume))

    def _encrypt(self, volume: Volume, backend: Backend, origin: Origin | None) -> None:
        """A copy has its original's header, and so its keys: it is given its own."""
        driver = backend.driver
        if not isinstance(driver, BlockDriver):
            raise NotSupported("holds folders, which cannot be encrypted", subject=f"backend {backend.name}")
        if origin is not None:
            self._presence.rekey(volume, driver, origin=origin.volume)
            return
        try:
            self._presence.encrypt(volume, driver)
        finally:
            self._presence.remove(volume, driver)

    def rekey(self, volume: Volume, backend: Backend) -> None:
        """The newest key alone opens it."""
        if isinstance(backend.driver, BlockDriver):
            self._presence.rekey(volume, backend.driver)

    def _prepare(self, volume: Volume, backend: Backend, *, copied: bool) -> None:
        driver = backend.driver
        try:
            if isinstance(driver, BlockDriver):
                if copied:
                    self._presence.renew(volume, driver)
                else:
                    self._format(volume, backend, driver)
                    self._presence.initialise_root(volume, driver)
            if volume.ownership != Ownership():
                self._presence.initialise_root(volume, driver)
            crash.point("create.initialised")
        finally:
            if isinstance(driver, BlockDriver) or volume.ownership != Ownership():
                self._presence.remove(volume, driver)

    def _format(self, volume: Volume, backend: Backend, driver: BlockDriver) -> None:
        """On storage that is full a sparse device fails with an I/O error, and mkfs knows nothing better to say."""
        try:
            self._presence.format(volume, driver)
        except InvalidRequest:
            if isinstance(driver, SupportsCapacity) and driver.capacity().available < NEARLY_NOTHING:
                raise CapacityExhausted(
                    "is full: there is no room for a file system",
                    subject=f"backend {backend.name}",
                    hint="free some space",
                ) from None
            raise

    def _copy(self, spec: VolumeSpec, backend: Backend, origin: Origin) -> CreatedVolume:
        driver = backend.driver
        if origin.snapshot is not None:
            if not isinstance(driver, SupportsSnapshots) or origin.snapshot.handle is None:
                raise NotSupported("cannot restore snapshots", subject=f"backend {backend.name}")
            return driver.create_from_snapshot(origin.snapshot.handle, spec)
        if not isinstance(driver, SupportsClone):
            raise NotSupported("cannot clone", subject=f"backend {backend.name}")
        source = origin.volume
        with (
            self._locks.hold(source.id, subject=f"volume {source.name}"),
            self._mounts.quiescent(source, backend, live=Capability.CLONE_LIVE),
        ):
            return driver.clone(handle_of(source), spec)

    def adopt(self, volume: Volume, backend: Backend, reference: str) -> Volume:
        """What is on the storage already, as this volume; the record returned says what it turned out to be."""
        driver = backend.driver
        spec = VolumeSpec(
            id=volume.id,
            size=None,
            mode=volume.mode,
            options=read_options(driver.VolumeOptions, volume.options, subject=f"backend {backend.name}"),
            mark=marks.write(volume),
        )
        made = import_driver(backend).adopt(reference, spec)
        crash.point("import.stored")
        ready = msgspec.structs.replace(volume, handle=made.handle, size=made.size, state=VolumeState.READY)
        if not isinstance(driver, BlockDriver) or volume.mode is VolumeMode.BLOCK:
            return ready
        with self._presence.looked_at(ready, driver) as device:
            found = filesystems.detect(device)
        return msgspec.structs.replace(
            ready, filesystem=found, mode=VolumeMode.FILESYSTEM if found else VolumeMode.BLOCK
        )

    def destroy(self, volume: Volume, backend: Backend) -> None:
        """Remove the data, or whatever a cut-short `make` left of it. Nothing may hold the volume."""
        handle = volume.handle or backend.driver.find(volume.stored_as)
        if handle is not None:
            self._presence.remove(msgspec.structs.replace(volume, handle=handle), backend.driver)
        self._presence.forget(volume.id)
        crash.point("delete.absent")
        if handle is not None:
            backend.driver.delete(handle)

    def withdraw(self, volume: Volume, backend: Backend) -> None:
        """Take the volume from this node. Raises InUse."""
        self._presence.remove(volume, backend.driver)

    def expand(self, volume: Volume, backend: Backend, size: int) -> Volume:
        """Storage, device and file system as large as `size`, mounted or not."""
        driver = backend.driver
        if not isinstance(driver, SupportsExpand):
            raise NotSupported("cannot expand", subject=f"backend {backend.name}")
        actual = driver.expand(handle_of(volume), size + overhead(volume)) - overhead(volume)
        crash.point("expand.stored")
        if isinstance(driver, BlockDriver):
            self._presence.resize(volume, driver)
        if isinstance(driver, BlockDriver) and volume.filesystem:
            self.fit(volume, driver)
        return msgspec.structs.replace(volume, size=actual)

    def fit(self, volume: Volume, driver: BlockDriver) -> None:
        """The file system as large as its device."""
        used_now = self._presence.is_mounted(volume, driver)
        path = self._presence.establish(volume, driver)
        try:
            device = self._presence.device(volume, driver)
            filesystems.get(volume.filesystem or "").grow(self._presence.host, device, path)
        finally:
            if not used_now:
                self._presence.remove(volume, driver)

    @staticmethod
    def check_modification(backend: Backend, volume: Volume, options: Mapping[str, str]) -> None:
        """Raises InvalidRequest for an option that cannot be changed, naming those that can."""
        backend.require(Capability.MODIFY)
        mutable = backend.driver.mutable if isinstance(backend.driver, SupportsModify) else frozenset()
        subject = f"volume {volume.name}"
        for key in options:
            if key not in mutable:
                raise InvalidRequest(
                    f"option {key[:60]!r} cannot be changed", subject=subject, hint=nearest(key, mutable)
                )
        read_options(backend.driver.VolumeOptions, {**volume.options, **options}, subject=subject)

    def modify(self, volume: Volume, backend: Backend) -> None:
        """The storage as the volume's options say."""
        driver = backend.driver
        if not isinstance(driver, SupportsModify):
            raise NotSupported("cannot modify volumes", subject=f"backend {backend.name}")
        driver.modify(
            handle_of(volume), read_options(driver.VolumeOptions, volume.options, subject=f"volume {volume.name}")
        )

    def restore(self, volume: Volume, backend: Backend, snapshot: Snapshot) -> None:
        """Put the storage back to the snapshot. A volume that has grown since keeps its size, and so must its file
        system, which in the snapshot is smaller."""
        if snapshot.handle is None:
            raise IntegrityError("the ledger knows no storage of this snapshot", subject=f"snapshot {snapshot.name}")
        snapshot_driver(backend).restore(handle_of(volume), snapshot.handle)
        crash.point("snapshot-restore.restored")
        driver = backend.driver
        if not isinstance(driver, BlockDriver):
            return
        if volume.encryption:
            self._presence.rekey(volume, driver)  # the header is the snapshot's again, with the key of its time
        if volume.filesystem and snapshot.size != volume.size:
            self.fit(volume, driver)

    def used(self, volume: Volume, backend: Backend) -> int | None:
        """Bytes on storage. Raises IntegrityError when the storage has lost the volume."""
        try:
            return backend.call(lambda: backend.driver.inspect(handle_of(volume))).used
        except NotFound as error:
            raise IntegrityError(
                f"its storage is gone: {error.text}", subject=f"volume {volume.name}", hint="run `volumectl doctor`"
            ) from None


def import_driver(backend: Backend) -> SupportsImport:
    """Raises NotSupported when the backend's driver adopts nothing."""
    if not isinstance(backend.driver, SupportsImport):
        raise NotSupported(f"driver {backend.driver_name} cannot import", subject=f"backend {backend.name}")
    return backend.driver


def snapshot_driver(backend: Backend) -> SupportsSnapshots:
    """Raises NotSupported when the backend's driver has no snapshots at all."""
    if not isinstance(backend.driver, SupportsSnapshots):
        raise NotSupported(f"driver {backend.driver_name} has no snapshots", subject=f"backend {backend.name}")
    return backend.driver
