"""The two places of a move: as the ledger names them, and present on this node beside one another."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from volumed.core.backends import Backend
from volumed.core.core import Core
from volumed.core.layer import NoLayer
from volumed.core.presence import Presence, handle_of
from volumed.core.provision import Provision
from volumed.core.reach import Reach, attacher
from volumed.driver import BlockDriver, SupportsSnapshots, Tell
from volumed.errors import NotSupported
from volumed.model import Migration, MovePath, Ownership, Place, Snapshot, Volume


def place_of(volume: Volume) -> Place:
    return Place(
        backend=volume.backend,
        stored_as=volume.stored_as,
        handle=volume.handle,
        size=volume.size,
        filesystem=volume.filesystem,
        mkfs_options=volume.mkfs_options,
        mount_options=volume.mount_options,
        options=volume.options,
    )


def at(volume: Volume, place: Place) -> Volume:
    """The same volume, lying there."""
    return msgspec.structs.replace(
        volume,
        backend=place.backend,
        moved_to=place.stored_as if place.stored_as != volume.id else None,
        handle=place.handle,
        size=place.size,
        filesystem=place.filesystem,
        mkfs_options=place.mkfs_options,
        mount_options=place.mount_options,
        options=place.options,
    )


class OtherReach(Reach):
    """Attaches the other place of a move to this machine. The ledger's attachments are of volumes; of this one the
    migration's record tells, whose every end closes it."""

    def attach_here(self, volume: Volume) -> None:
        backend = self._backends.get(volume.backend)
        driver = attacher(backend)
        if driver is not None:
            driver.attach(handle_of(volume), self.machine(backend, self._node))

    def detach_here(self, volume: Volume) -> None:
        backend = self._backends.get(volume.backend)
        driver = attacher(backend)
        if driver is not None and volume.handle is not None:
            driver.detach(volume.handle, self.machine(backend, self._node))


class OtherPlace:
    """The place of a move that is not the volume's own: its target before the commit point, its source after it.
    Present, if at all, in a folder of the move, never at the volume's path."""

    def __init__(self, core: Core, migration: Migration) -> None:
        """Makes the folder of the move."""
        self.workdir = core.settings.state_dir / "migrations" / migration.id
        mounts_dir = self.workdir / "mounts"
        mounts_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._backends = core.backends
        reach = OtherReach(node=core.node, repository=core.repository, backends=core.backends)
        self._presence = Presence(core.host, mounts_dir, reach, core.encryption, NoLayer(core.host))
        self._provision = Provision(presence=self._presence, mounts=core.mounts, locks=core.locks)

    def make(self, volume: Volume, *, blank: bool) -> Place:
        """What `volume`, which says the other place, needs on its storage; made again it is the same."""
        backend = self._backends.get(volume.backend)
        plain = msgspec.structs.replace(volume, ownership=Ownership())  # the data brings its owner along
        return place_of(backend.call_holding(lambda: self._provision.make(plain, backend, None, blank=blank)))

    def take(self, volume: Volume, source: Volume, tell: Tell) -> Place:
        """As `make`, with the data that the source has now, brought by the storage itself."""
        backend, origin = self._backends.get(volume.backend), self._backends.get(source.backend)
        return place_of(self._provision.take(volume, backend, origin.driver, handle_of(source), tell))

    def open(self, volume: Volume, carrier: MovePath) -> Path:
        """Its mounted tree, or its device."""
        backend = self._backends.get(volume.backend)
        if carrier is MovePath.TREE:
            return backend.call_holding(lambda: self._presence.establish(volume, backend.driver))
        return backend.call_holding(lambda: device_of(volume, backend, self._presence))

    def close(self, volume: Volume) -> None:
        """Neither mounted nor mapped any more. Raises InUse."""
        backend = self._backends.get(volume.backend)
        backend.call_holding(lambda: self._presence.remove(volume, backend.driver))

    def grow(self, volume: Volume) -> None:
        """The file system that came with the data, as large as the device is here."""
        backend = self._backends.get(volume.backend)
        driver = backend.driver
        if isinstance(driver, BlockDriver) and volume.filesystem:
            backend.call_holding(lambda: self._provision.fit(volume, driver))

    def destroy(self, volume: Volume, snapshots: tuple[Snapshot, ...] = ()) -> None:
        """With its data and the snapshots that were left there. Made again it is success."""
        backend = self._backends.get(volume.backend)
        backend.call_holding(lambda: self._destroy(volume, backend, snapshots))

    def _destroy(self, volume: Volume, backend: Backend, snapshots: tuple[Snapshot, ...]) -> None:
        driver = backend.driver
        for snapshot in snapshots:
            if snapshot.handle is not None and isinstance(driver, SupportsSnapshots):
                driver.delete_snapshot(snapshot.handle)
        self._provision.destroy(volume, backend)

    def forget(self) -> None:
        """The folder of the move. Nothing may be mounted there any more."""
        mounts_dir = self._presence.mounts_dir
        if not any(entry.target.is_relative_to(mounts_dir) for entry in self._presence.host.mounts()):
            shutil.rmtree(self.workdir, ignore_errors=True)


def device_of(volume: Volume, backend: Backend, presence: Presence) -> Path:
    """The volume's device on this node. Raises NotSupported for storage that has none."""
    driver = backend.driver
    if not isinstance(driver, BlockDriver):
        raise NotSupported("has no devices", subject=f"backend {backend.name}")
    return presence.device(volume, driver)


def source_and_target(migration: Migration, volume: Volume) -> tuple[Volume, Volume]:
    return at(volume, migration.source), at(volume, migration.target)
