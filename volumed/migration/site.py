"""Both places of a move on this node: the volume held at its own, the other beside it, one shown after the other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from volumed.core.backends import Backend
from volumed.core.core import Core
from volumed.core.mounts import describe_each
from volumed.core.presence import Observed, handle_of
from volumed.driver import BlockDriver, FilesystemDriver
from volumed.errors import InUse, NotFound, NotSupported, VolumedError
from volumed.host.holders import holders_of_mount, is_claimed
from volumed.migration.movers.mover import Control
from volumed.migration.places import OtherPlace, at, device_of, source_and_target
from volumed.model import Binding, Engine, Migration, MovePath, Volume, now
from volumed.testing import crash

_log = logging.getLogger(__name__)


class Busy(VolumedError):
    """Somebody took the volume in the moment before it was to be held still."""

    code = "in_use"
    retry_after = 1.0


class Sides(NamedTuple):
    source: Path
    target: Path


class Known(NamedTuple):
    """Whose consumers are held still: the ids of their mounts, and `Repository.disturbance` when they were read. An
    engine may give two containers one id, so that who came since shows in the latter alone."""

    mount_ids: frozenset[str]
    disturbance: int


class Site:
    def __init__(self, core: Core, migration: Migration) -> None:
        self._core = core
        self.migration = migration
        self._opened: OtherPlace | None = None

    def volume(self) -> Volume:
        """Raises NotFound, InUse for a volume that lies elsewhere by now."""
        volume = self._core.repository.volume(self.migration.volume_id)
        if volume is None:
            raise NotFound("was removed", subject=f"volume {self.migration.volume_name}")
        own = self.migration.target if self.migration.phase.committed else self.migration.source
        if volume.stored_as != own.stored_as:
            raise InUse("was moved elsewhere meanwhile", subject=f"volume {volume.name}")
        return volume

    def backend(self, volume: Volume) -> Backend:
        return self._core.backends.get(volume.backend)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Volume]:
        with self._core.locks.hold(self.migration.volume_id, subject=f"volume {self.migration.volume_name}"):
            yield self.volume()

    def other(self) -> OtherPlace:
        if self._opened is None:
            self._opened = OtherPlace(self._core, self.migration)
        return self._opened

    def take(self) -> None:
        """Hold the volume on this node: its tree stays mounted, or its device mapped, whoever comes and goes."""
        core, block = self._core, self.migration.carried_by is MovePath.BLOCK
        with self.locked() as volume:
            others = self.others(volume)
            held = core.repository.binding(volume.id, node=core.node, engine=Engine.VOLUMED, mount_id=self.migration.id)
            if held is None:
                held = Binding(
                    volume_id=volume.id,
                    node=core.node,
                    engine=Engine.VOLUMED,
                    mount_id=self.migration.id,
                    since=now(),
                    staging=True,
                    block=block,
                )
                with core.repository.transaction() as transaction:
                    transaction.put(held)
                    if others:
                        transaction.disturb(volume.id)
            if block and not others:
                backend = self.backend(volume)
                backend.call(lambda: core.mounts.presence.remove(volume, backend.driver))
                core.repository.calm(volume.id)
        crash.point("migrate.taken")

    def others(self, volume: Volume) -> list[Binding]:
        """Holds of anybody but us."""
        return [held for held in self._core.repository.bindings(volume.id) if held.engine is not Engine.VOLUMED]

    def check_known(self, volume: Volume, known: Known | None) -> None:
        """Raises Busy when somebody else uses it, or did since they were held."""
        others = [held for held in self.others(volume) if known is None or held.mount_id not in known.mount_ids]
        came = known is not None and self._core.repository.disturbance(volume.id) != known.disturbance
        if others or came:
            raise Busy(
                "came into use",
                subject=f"volume {volume.name}",
                hint="; ".join(line for each in others for line in describe_each(each)),
            )

    def sides(self) -> Sides:
        with self.locked() as volume:
            source, target = source_and_target(self.migration, volume)
            backend, presence = self.backend(source), self._core.mounts.presence
            if self.migration.carried_by is MovePath.TREE:
                there = backend.call(lambda: presence.establish(source, backend.driver))
            else:
                there = backend.call(lambda: device_of(source, backend, presence))
            return Sides(there, self.other().open(target, self.migration.carried_by))

    def copy_natively(self, control: Control) -> dict[str, object]:
        """What to write down: the target, with what the source has now, by the storage itself. It is proven, and
        brought up to date, as any other copy is. Without the volume's lock: it may take hours. Of data that the storage
        finds it cannot bring, an empty target, and that it goes by another path."""

        def tell(amount: int) -> None:
            control.admit(amount)
            control.done(bytes=amount)

        source, target = source_and_target(self.migration, self.volume())
        try:
            made = self.other().take(target, source, tell)
        except NotSupported as error:
            _log.warning("move of %s: %s", self.migration.volume_name, error)
            path = self.migration.carried_by
            return {"target": self.other().make(target, blank=path is MovePath.BLOCK), "path": path}
        crash.point("native.taken")
        return {"target": made}

    def settle_device(self, volume: Volume, device: Path) -> bool:
        """What was mounted meanwhile is written back by unmounting it; its device must be as it was. Whether it was
        used since it was first looked at."""
        presence, backend = self._core.mounts.presence, self.backend(volume)
        path = presence.path(volume.id)
        if volume.mode is not volume.mode.BLOCK and self._core.host.is_mountpoint(path):
            backend.call(lambda: self._core.host.unmount(path))
        self._check_let_go(volume, device)
        if backend.call(lambda: device_of(volume, backend, presence)) != device:
            raise Busy("its device changed", subject=f"volume {volume.name}")
        return self._core.repository.disturbed(volume.id)

    @staticmethod
    def _check_let_go(volume: Volume, device: Path) -> None:
        """A file system that is mounted anywhere, be it in a container's namespace alone, may have written what has not
        reached the device."""
        try:
            reason = "by a mount" if is_claimed(device) else ""
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            raise Busy(
                f"its device is still held: {reason}",
                subject=f"volume {volume.name}",
                hint="something has its file system mounted outside of volumed's knowledge",
            )

    def show_new_place(self) -> None:
        """At the volume's path on this node: what its record says now, if anybody holds it, or is held still to go on
        there."""
        with self.locked() as volume:
            source, target = source_and_target(self.migration, volume)
            self._show(target, instead_of=source, given_up=False)

    def show_old_place(self) -> None:
        """As `show_new_place`, once the record says the old one again: whatever the new one's storage answers."""
        with self.locked() as volume:
            source, target = source_and_target(self.migration, volume)
            self._show(source, instead_of=target, given_up=True)

    def _show(self, place: Volume, *, instead_of: Volume, given_up: bool) -> None:
        presence, backend = self._core.mounts.presence, self.backend(place)
        if self.migration.path is MovePath.LIVE:
            self.lead(place)
        if backend.call(lambda: presence.observe(place, backend.driver)) is not Observed.MOUNTED:
            try:
                self._hide(instead_of, given_up=given_up)
            except VolumedError as error:
                # A device alone may be held, by frozen containers, until they were let go; and what is given up is
                # destroyed when its storage works.
                mounted = self._core.host.is_mountpoint(presence.path(place.id))
                if mounted or not (given_up or isinstance(error, InUse)):
                    raise
        crash.point("migrate.hidden")
        if self.migration.held or self._core.repository.bindings(place.id, node=self._core.node):
            backend.call(lambda: self._establish(place, backend))
        else:
            backend.call(lambda: presence.remove(place, backend.driver))

    def _hide(self, place: Volume, *, given_up: bool) -> None:
        """Unless it is somebody else's that lies at the volume's path. `given_up`: its server is not waited for."""
        core, backend = self._core, self.backend(place)
        driver, presence = backend.driver, core.mounts.presence
        path = presence.path(place.id)
        if isinstance(driver, FilesystemDriver):
            mounted = core.host.is_mountpoint(path)
            if mounted and not driver.owns_mount(handle_of(place), path):
                return
            if given_up and mounted and driver.remote:
                core.host.unmount_network(path, force=True)
        elif backend.call(lambda: presence.observe(place, driver)) is Observed.FOREIGN:
            return
        backend.call(lambda: presence.remove(place, driver))

    def _establish(self, place: Volume, backend: Backend) -> None:
        """Storage that hangs may do it when nobody waits any more, and the volume lies elsewhere again."""
        presence, driver = self._core.mounts.presence, backend.driver
        path = presence.establish(place, driver)
        if isinstance(driver, FilesystemDriver) and driver.remote:
            self._core.host.tree_status(path)  # that it could be mounted says little of its server
        current = self._core.repository.volume(place.id)
        if current is None or current.stored_as != place.stored_as:
            presence.remove(place, driver)

    def lead(self, place: Volume) -> float:
        """The volume's node to this place alone, if it is there at all; see `Layer.lead`. The caller holds the volume's
        lock."""
        backend, presence = self.backend(place), self._core.mounts.presence
        device = self.bare(place)
        return 0.0 if device is None else backend.call(lambda: presence.layer.lead(place.id, device))

    def bare(self, place: Volume) -> Path | None:
        """Its device on this node, below the volume's node."""
        backend = self.backend(place)
        driver = backend.driver
        if not isinstance(driver, BlockDriver) or place.handle is None:
            return None
        return backend.call(lambda: self._core.mounts.presence.bare(place, driver))

    def check_path_unheld(self, volume: Volume) -> None:
        """By a process of this machine, outside of containers: then the new place could not be shown there after the
        commit point, and whoever is held still would have to wait for that process."""
        path = self._core.mounts.presence.path(volume.id)
        mounted = self._core.host.is_mountpoint(path)
        holders = [line for line in holders_of_mount(path) if "pid" in line] if mounted else []
        if holders:
            raise Busy(f"is held at {path} by {', '.join(holders)}", subject=f"volume {volume.name}")

    def take_source_away(self) -> None:
        """Not mapped any more: only what is in use is present on a node."""
        with self.locked() as volume:
            source = at(volume, self.migration.source)
            backend = self.backend(source)
            driver = backend.driver
            if isinstance(driver, BlockDriver) and source.handle is not None:
                backend.call(lambda: self._core.mounts.presence.unmap(source, driver))

    def give_back(self, volume: Volume) -> None:
        core = self._core
        held = core.repository.binding(volume.id, node=core.node, engine=Engine.VOLUMED, mount_id=self.migration.id)
        if held is not None:
            with core.repository.transaction() as transaction:
                transaction.delete(held)
        core.repository.calm(volume.id)
        current = core.repository.volume(volume.id)
        if current is not None:
            core.mounts.settle(current, self.backend(current))
