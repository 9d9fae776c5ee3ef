"""Both places of a move on this node: the volume held at its own, the other beside it, one shown after the other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from volumed import context
from volumed.core.backends import Backend
from volumed.core.core import Core
from volumed.core.mounts import describe_each
from volumed.core.presence import Observed, handle_of
from volumed.core.reach import attacher
from volumed.driver import BlockDriver, Driver, FilesystemDriver
from volumed.errors import InUse, NotFound, NotSupported
from volumed.host.holders import holders_of_mount, is_claimed
from volumed.migration.movers.mover import Busy, Control
from volumed.migration.places import OtherPlace, at, device_of, source_and_target
from volumed.model import Binding, Engine, Migration, MovePath, Volume, VolumeMode, now
from volumed.testing import crash

_log = logging.getLogger(__name__)
# Seconds for a server to answer that may still be writing what it was given.
SLOW = 60.0


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
        self._holding = False

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
        """By the one thread that has this site, once or several times within one another."""
        if self._holding:
            yield self.volume()
            return
        with self._core.locks.hold(self.migration.volume_id, subject=f"volume {self.migration.volume_name}"):
            self._holding = True
            try:
                yield self.volume()
            finally:
                self._holding = False

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
                backend.call_holding(lambda: core.mounts.presence.remove(volume, backend.driver))
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
                there = backend.call_holding(lambda: presence.establish(source, backend.driver))
            else:
                there = backend.call_holding(lambda: device_of(source, backend, presence))
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
            backend.call_holding(lambda: self._core.host.unmount(path))
        self._check_let_go(volume, device)
        if backend.call_holding(lambda: device_of(volume, backend, presence)) != device:
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

    def prove_new_place(self) -> None:
        """That it comes up and answers, beside the volume's path: there nobody sees it. Not of storage that attaches to
        machines, which would have to detach in between."""
        with self.locked() as volume:
            target = at(volume, self.migration.target)
        backend, place = self.backend(target), self.other()
        if attacher(backend) is not None:
            return
        block = target.mode is VolumeMode.BLOCK
        opened = place.open(target, MovePath.BLOCK if block else MovePath.TREE)
        if isinstance(backend.driver, FilesystemDriver) and backend.driver.remote:
            self._core.host.tree_status(opened, timeout=context.remaining(SLOW))  # a mount says little of its server
        place.close(target)

    def show_new_place(self) -> None:
        """At the volume's path on this node: what its record says now, and only if anybody holds it."""
        core, presence = self._core, self._core.mounts.presence
        with self.locked() as volume:
            source, target = source_and_target(self.migration, volume)
            old, new = self.backend(source), self.backend(target)
            if self.migration.path is MovePath.LIVE:
                self.lead(target)
            if new.call_holding(lambda: presence.observe(target, new.driver)) is not Observed.MOUNTED:
                try:
                    old.call_holding(lambda: self._hide(source, old.driver))
                except InUse:
                    if core.host.is_mountpoint(presence.path(volume.id)):
                        raise
                    # Its device alone is held, by frozen containers: it goes when they were let go.
            crash.point("migrate.hidden")
            if core.repository.bindings(volume.id, node=core.node):
                new.call_holding(lambda: presence.establish(target, new.driver))
            else:
                new.call_holding(lambda: presence.remove(target, new.driver))

    def _hide(self, place: Volume, driver: Driver) -> None:
        """Unless somebody else's lies at the path. No server is asked: that of the old place may be dead by now."""
        presence = self._core.mounts.presence
        path = presence.path(place.id)
        if isinstance(driver, FilesystemDriver):
            foreign = self._core.host.is_mountpoint(path) and not driver.owns_mount(handle_of(place), path)
        else:
            foreign = presence.observe(place, driver) is Observed.FOREIGN
        if not foreign:
            presence.remove(place, driver)

    def keep_old_place(self) -> None:
        """At the volume's path, where it still is unless the machine was started anew; for those that are held."""
        with self.locked() as volume:
            backend, presence = self.backend(volume), self._core.mounts.presence
            if self.migration.held or self._core.repository.bindings(volume.id, node=self._core.node):
                backend.call_holding(lambda: presence.establish(volume, backend.driver))

    def lead(self, place: Volume) -> float:
        """The volume's node to this place alone, if it is there at all; see `Layer.lead`. The caller holds the volume's
        lock."""
        backend, presence = self.backend(place), self._core.mounts.presence
        device = self.bare(place)
        return 0.0 if device is None else backend.call_holding(lambda: presence.layer.lead(place.id, device))

    def bare(self, place: Volume) -> Path | None:
        """Its device on this node, below the volume's node."""
        backend = self.backend(place)
        driver = backend.driver
        if not isinstance(driver, BlockDriver) or place.handle is None:
            return None
        return backend.call_holding(lambda: self._core.mounts.presence.bare(place, driver))

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
                backend.call_holding(lambda: self._core.mounts.presence.unmap(source, driver))

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
