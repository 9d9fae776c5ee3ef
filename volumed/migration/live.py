"""A move of a block volume under whoever uses it: nobody is stopped, and nobody waits but for a swap of a table.

The volume's node (`volumed.core.layer`) becomes a mirror of both places; the kernel copies, and gives every write to
both. When it is in sync and proven the ledger says the new place, and only then the node leads to the target alone.

Where the data is whole, at any instant: until the commit point at the source, which gets every write before it is
answered; from sync on at the target as well, for a write that either did not take is not answered while the mirror is
there. The ledger is changed in between. So after a power cut, which leaves no node, the place that the ledger says has
every answered write. After kill -9 of the daemon the node goes on as it is, and the move with it.

A mirror is never left alone by a daemon that is alive: a target that fails keeps writers waiting until the node leads
to the source again, which is done at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from volumed.core.provision import Provision
from volumed.driver import BlockDriver
from volumed.errors import IntegrityError, PreconditionFailed
from volumed.host import mapper
from volumed.host.mapper import Mirrored
from volumed.migration.move import Move, Step
from volumed.migration.movers.compare import WATCH, compare
from volumed.migration.movers.mover import Busy
from volumed.migration.places import at, source_and_target
from volumed.migration.site import Sides
from volumed.model import MigrationPhase, Volume
from volumed.testing import crash

_REGION = mapper.REGION * 512


class LiveMove(Move):
    def _seed(self) -> None:
        self._carry()

    def _converge(self) -> None:
        self._carry()

    def _begin_last_round_again(self) -> None:
        """A crash between the proof and the commit point."""
        self._advance(MigrationPhase.CONVERGING)

    def _carry(self) -> None:
        """From wherever a crash left it up to the commit point."""
        with self._mirrored() as sides:
            self._wait_for_sync(sides)
            crash.point("live.synced")
            if self.migration.phase is MigrationPhase.SEEDING:
                self._advance(MigrationPhase.CONVERGING)
            digest = self._compare(sides)
            self._advance(MigrationPhase.VERIFIED, digest=digest)
            with self._site.locked() as volume:
                self._check(volume, sides)
                self._commit(volume, pause=0.0)
                crash.point("live.committed")
                waited = self._site.lead(at(volume, self.migration.target))
        crash.point("live.led")
        self.migration = self._records.change(self.migration.id, pause=round(waited, 3))

    @contextlib.contextmanager
    def _mirrored(self) -> Iterator[Sides]:
        """Both places under the volume's node; afterwards, unless the new one counts by then, the source alone."""
        self._site.sides()  # both are there, and the volume's node
        with self._site.locked() as volume:
            sides = self._devices(volume)
        layer, backend = self._core.mounts.presence.layer, self._site.backend(volume)
        try:
            with self._site.locked() as volume:
                self._refuse_others(volume)
                backend.call_holding(lambda: layer.mirror(volume, *sides))
            crash.point("live.mirrored")
            yield sides
        finally:
            if not self._records.get(self.migration.id).phase.committed:
                with self._core.locks.hold(volume.id):
                    self._site.lead(at(volume, self.migration.source))

    def _devices(self, volume: Volume) -> Sides:
        source, target = (self._site.bare(place) for place in source_and_target(self.migration, volume))
        if source is None or target is None:
            raise Busy("its device went away", subject=f"volume {volume.name}")
        return Sides(source, target)

    def _refuse_others(self, volume: Volume) -> None:
        """Whoever writes to the source from elsewhere would not write to the target."""
        elsewhere = {held.node for held in self._core.repository.bindings(volume.id)} - {self._core.node}
        if elsewhere:
            raise PreconditionFailed(
                f"is used on node {', '.join(sorted(elsewhere))} as well",
                subject=f"volume {volume.name}",
                hint="move it when this node alone uses it",
            )

    def _watch(self) -> Mirrored:
        """Raises Stopped, and HostError when a leg has failed."""
        self.control.check()
        return self._core.mounts.presence.layer.mirrored(self._site.volume())

    def _wait_for_sync(self, sides: Sides) -> None:
        size = mapper.size_of(sides.source)
        self.migration = self._records.change(self.migration.id, expected=size)
        self.step = Step("copying", size, self.control.bytes, time.monotonic())
        seen = 0
        while True:
            state = self._watch()
            self.control.done(bytes=max(0, state.done - seen) * _REGION)
            seen = max(seen, state.done)
            if state.whole:
                break
            time.sleep(WATCH)
        self.migration = self._records.change(self.migration.id, copied=size)

    def _compare(self, sides: Sides) -> str:
        size = self._size()
        self.step = Step("verifying", size, self.control.bytes, time.monotonic())
        found = compare(sides.source, sides.target, size, self.control, self._watch)
        if found.differences:
            raise IntegrityError(
                f"the copy is not what is at the source: {'; '.join(found.differences[:10])}",
                subject=f"volume {self.migration.volume_name}",
                hint=f"look at backend {self.migration.target.backend}; the source was not touched",
            )
        return found.digest

    def _size(self) -> int:
        """Of the node: what its users can reach."""
        node = self._core.mounts.presence.layer.node(self.migration.volume_id)
        if node is None:
            raise Busy("its node went away", subject=f"volume {self.migration.volume_name}")
        return mapper.size_of(node)

    def _check(self, volume: Volume, sides: Sides) -> None:
        """All that was proven holds still."""
        self._refuse_others(volume)
        if self._devices(volume) != sides or not self._watch().whole:
            raise Busy("its device changed", subject=f"volume {volume.name}")

    # Past the commit point
    def _go_over(self) -> None:
        with self._site.locked() as volume:
            self._site.lead(volume)
            self._fit(volume)
        super()._go_over()

    def _fit(self, volume: Volume) -> None:
        """Node and file system as large as the device is here."""
        core, backend = self._core, self._site.backend(volume)
        driver = backend.driver
        source, target = self.migration.source.size, self.migration.target.size
        if not isinstance(driver, BlockDriver) or not source or not target or target <= source:
            return
        presence = core.mounts.presence
        backend.call_holding(lambda: presence.resize(volume, driver))
        if volume.filesystem:
            provision = Provision(presence=presence, mounts=core.mounts, locks=core.locks)
            backend.call_holding(lambda: provision.fit(volume, driver))

    # Back
    def _take_back(self) -> None:
        volume = self._core.repository.volume(self.migration.volume_id)
        if volume is not None:
            with self._core.locks.hold(volume.id):
                self._site.lead(at(volume, self.migration.source))
        super()._take_back()
