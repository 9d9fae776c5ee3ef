"""A look at a volume's data before it is moved, from which the plan is made."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from volumed.core.backends import Backend
from volumed.core.core import Core
from volumed.core.mounts import describe_each
from volumed.core.presence import handle_of
from volumed.driver import BlockDriver, Capability
from volumed.errors import NotSupported
from volumed.host import mapper
from volumed.host.allocation import data_extents
from volumed.migration import planner
from volumed.migration.losses import take_census
from volumed.migration.movers.block import size_of
from volumed.migration.places import device_of
from volumed.migration.planner import Plan, Wish
from volumed.model import Binding, Engine, MovePath, Volume, now


class Inspection:
    def __init__(self, core: Core) -> None:
        self._core = core

    def plan(self, volume: Volume, wish: Wish, *, anywhere: bool = False) -> Plan:
        """`anywhere`: on its own backend, too."""
        core = self._core
        handle_of(volume)
        source, target = core.backends.get(volume.backend), core.backends.get(wish.backend)
        if source is target and not anywhere and not (wish.size or wish.filesystem or wish.options):
            raise NotSupported(
                f"lies on backend {source.name} already", subject=f"volume {volume.name}", hint="name another backend"
            )
        others = [held for held in core.repository.bindings(volume.id) if held.engine is not Engine.VOLUMED]
        no_live = self._no_live(volume, target, others)
        chosen = planner.choose_path(volume, source, target, in_use=bool(others), wish=wish, no_live=no_live)
        path, census = chosen.path, None
        if chosen.carrier is MovePath.TREE:
            with self.tree_of(volume) as root:
                census = take_census(root)
        place = planner.shape_of(volume, target, wish, census)
        amount = census.bytes if census else self._allocated(volume)
        if path is MovePath.LIVE:
            amount = volume.size or amount  # the kernel copies all of it
        seconds = planner.estimated_seconds(
            path, amount=amount, files=census.files if census else 0, bandwidth=wish.bandwidth
        )
        attachments = core.repository.attachments(volume.id)
        shared = (
            Capability.MULTI_NODE in source.capabilities
            and len({held.node for held in others} | {meant.node for meant in attachments}) > 1
        )
        return Plan(
            path=path,
            carrier=chosen.carrier,
            way=chosen.way,
            rejected=chosen.rejected,
            target=place,
            phases=tuple(map(str, planner.phases_of(path))),
            bytes=amount,
            files=census.files if census else 0,
            seconds=seconds,
            pause=planner.estimated_pause(
                path if path is MovePath.LIVE else chosen.carrier, amount=amount, in_use=bool(others)
            ),
            touched=tuple(line for held in others for line in describe_each(held)),
            losses=tuple(
                planner.losses_of(
                    volume,
                    target,
                    place,
                    census=census,
                    snapshots=core.repository.snapshots(volume.id),
                    shared=shared,
                )
            ),
        )

    def _no_live(self, volume: Volume, target: Backend, others: Sequence[Binding]) -> str:
        """What keeps this machine from moving it under its users; empty when nothing does."""
        core = self._core
        elsewhere = sorted({held.node for held in others} - {core.node})
        if elsewhere:
            return f"node {', '.join(elsewhere)} uses it as well"
        node = core.mounts.presence.layer.node(volume.id)
        if node is not None and isinstance(target.driver, BlockDriver):
            least = mapper.logical_block_size(node)
            larger = target.driver.block_size > least
            return f"it is used in blocks of {least} bytes, and they are larger there" if larger else ""
        if not core.mounts.presence.layer.wanted:
            return "device-mapper is not there, or live-moves = false"
        return "it was mounted without device-mapper"

    @contextlib.contextmanager
    def tree_of(self, volume: Volume) -> Iterator[Path]:
        """Mounted, without the lock being held: whoever wants to use the volume meanwhile does. Our own hold keeps it
        mounted for as long as we look, and is cleared away after a crash as that of no move."""
        core, backend = self._core, self._core.backends.get(volume.backend)
        look = Binding(
            volume_id=volume.id,
            node=core.node,
            engine=Engine.VOLUMED,
            mount_id=f"look-{secrets.token_hex(8)}",
            since=now(),
            staging=True,
        )

        def take() -> Path:
            with core.locks.hold(volume.id):
                with core.repository.transaction() as transaction:
                    transaction.touch(volume.id)
                return core.mounts.take(volume, backend, look)

        path = backend.call(take)
        try:
            yield path
        finally:
            core.mounts.drop(look, reason="looked")

    def _allocated(self, volume: Volume) -> int:
        """Bytes of its device that hold anything."""
        backend = self._core.backends.get(volume.backend)

        def look() -> int:
            with self._core.locks.hold(volume.id):
                device = device_of(volume, backend, self._core.mounts.presence)
                found = data_extents(device)
                amount = size_of(device) if found is None else sum(extent.length for extent in found)
                self._core.mounts.settle(volume, backend)
                return amount

        return backend.call(look)
