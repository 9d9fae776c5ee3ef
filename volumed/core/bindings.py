"""Which container uses which volume: asked, and kept true against what the engines say.

An engine's list of containers is the truth about who runs; the ledger is the truth about what was mounted for whom.
`reconcile` brings the two together. It never runs inside a request of the engine's own, and holds no lock while it
asks: dockerd answers some questions only after our Mount has answered.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta

import msgspec

from volumed.core.consumers.source import ConsumerSource, Hold
from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts
from volumed.errors import VolumedError
from volumed.model import Binding, Engine, HistoricBinding, Volume, VolumeId, VolumeState, now
from volumed.store.repository import Repository

_log = logging.getLogger(__name__)

HISTORY_KEPT = 1000  # ended bindings of one volume


class Sightings:
    """What one engine's looks showed, and since when without a break. Engine and ledger change one after the other, so
    that a look between the two must not be believed: only what lasts is acted on."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._since: dict[tuple[str, ...], float] = {}
        self._now: dict[tuple[str, ...], float] = {}

    def lasts(self, *what: str) -> bool:
        self._now[what] = self._since.get(what, time.monotonic())
        return time.monotonic() - self._now[what] >= self._grace

    def end_look(self) -> None:
        """What this look did not show is forgotten."""
        self._since, self._now = self._now, {}


class Bindings:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        mounts: Mounts,
        locks: KeyedLocks,
        events: Events,
        grace: float,
    ) -> None:
        """`grace`: seconds for which a container must have been gone before its binding is dropped."""
        self._node = node
        self._repository = repository
        self._mounts = mounts
        self._locks = locks
        self._events = events
        self._grace = grace
        self._sightings: dict[Engine, Sightings] = defaultdict(lambda: Sightings(grace))
        self._missing: dict[Engine, set[tuple[str, str]]] = {}

    # Asking
    def of_volume(self, volume_id: VolumeId) -> list[Binding]:
        return self._repository.bindings(volume_id)

    def of_consumer(self, reference: str) -> list[Binding]:
        """Of a container by its id, the beginning of its id (12 characters or more) or its name."""
        exact = self._repository.bindings_of_consumer(reference)
        if exact:
            return exact
        return [
            binding
            for binding in self.all()
            for consumer in binding.consumers
            if consumer.name == reference or (len(reference) >= 12 and consumer.id.startswith(reference))
        ]

    def all(self) -> list[Binding]:
        return self._repository.bindings()

    def history(self, volume_id: VolumeId | None = None, *, limit: int = 100) -> list[HistoricBinding]:
        """Those that ended, the latest first."""
        return sorted(self._repository.history(volume_id), key=lambda ended: ended.until, reverse=True)[:limit]

    def forget_history(self, *, older_than: float) -> None:
        """Delete what ended more than so many seconds ago, and of a volume that is used all the time the oldest."""
        self._repository.forget_history(before=now() - timedelta(seconds=older_than), keep=HISTORY_KEPT)

    # Keeping true
    def reconcile(self, source: ConsumerSource) -> None:
        """Name the consumers of each binding, drop those of containers that are gone, adopt what runs without one.

        Knows nothing and changes nothing while the engine cannot be asked.
        """
        holds = source.look()
        if holds is None:
            return
        by_volume: dict[str, list[Hold]] = defaultdict(list)
        for hold in holds:
            by_volume[hold.volume].append(hold)
        bound: dict[VolumeId, list[Binding]] = defaultdict(list)
        for binding in self._repository.bindings(node=self._node):
            if binding.engine is source.engine:
                bound[binding.volume_id].append(binding)
        seen = self._sightings[source.engine]
        missing: set[tuple[str, str]] = set()
        for volume_id, bindings in bound.items():
            volume = self._repository.volume(volume_id)
            mine = by_volume.pop(volume.name, []) if volume else []
            self._match(bindings, mine, seen)
            if volume:
                self._adopt(volume, source.engine, bindings, mine, seen)
                missing |= self._without_mount(volume, mine, seen)
        for name, rest in by_volume.items():
            volume = self._repository.volume_by_name(name)
            if volume is not None:
                self._adopt(volume, source.engine, [], rest, seen)
                missing |= self._without_mount(volume, rest, seen)
        self._alarm(source.engine, missing)
        seen.end_look()

    def _match(self, bindings: list[Binding], holds: list[Hold], seen: Sightings) -> None:
        for binding in bindings:
            running = [hold for hold in _holders_of(binding, holds) if hold.running]
            if running:
                self._name(binding, running)
            elif seen.lasts("gone", binding.volume_id, binding.mount_id, binding.since.isoformat()):
                self._drop(binding)

    def _name(self, binding: Binding, holds: Iterable[Hold]) -> None:
        consumers = tuple(
            sorted(
                {hold.consumer.id + hold.consumer.target: hold.consumer for hold in holds}.values(),
                key=lambda consumer: (consumer.name, consumer.target),
            )
        )
        if consumers == binding.consumers:
            return
        with self._locks.hold(binding.volume_id):
            current = self._repository.binding(
                binding.volume_id, node=binding.node, engine=binding.engine, mount_id=binding.mount_id
            )
            if current is None:
                return
            with self._repository.transaction() as transaction:
                transaction.put(msgspec.structs.replace(current, consumers=consumers), previous=current)

    def _drop(self, binding: Binding) -> None:
        volume = self._repository.volume(binding.volume_id)
        name = volume.name if volume else binding.volume_id
        who = ", ".join(consumer.name for consumer in binding.consumers) or binding.mount_id[:12]
        try:
            self._mounts.drop(binding, reason="vanished")
        except VolumedError as error:
            _log.warning("volume %s: the binding of %s cannot be dropped: %s", name, who, error)
            return
        self._events.publish("binding.vanished", name, f"{binding.engine} container {who} is gone", who=who)

    def _adopt(
        self, volume: Volume, engine: Engine, bindings: list[Binding], holds: list[Hold], seen: Sightings
    ) -> None:
        """A container runs on the volume and the ledger does not know: an older ledger was put back, most likely."""
        if volume.state is not VolumeState.READY:
            return
        covered = {hold.mount_id for binding in bindings for hold in _holders_of(binding, holds)}
        for hold in holds:
            if not hold.running or hold.mount_id in covered:
                continue
            covered.add(hold.mount_id)
            mount_id = hold.mount_id or hold.consumer.id
            if not seen.lasts("unbound", volume.id, mount_id):
                continue
            try:
                self._mounts.acquire(volume, engine=engine, mount_id=mount_id, consumer=hold.consumer)
            except VolumedError as error:
                _log.warning("volume %s: container %s uses it unbound: %s", volume.name, hold.consumer.name, error)
                continue
            self._events.publish(
                "binding.adopted", volume.name, f"{engine} container {hold.consumer.name} was using it unrecorded"
            )

    def _without_mount(self, volume: Volume, holds: list[Hold], seen: Sightings) -> set[tuple[str, str]]:
        if self._mounts.path(volume.id) is not None:
            return set()
        running = {(volume.name, hold.consumer.name) for hold in holds if hold.running}
        return {pair for pair in running if seen.lasts("unmounted", *pair)}

    def _alarm(self, engine: Engine, missing: set[tuple[str, str]]) -> None:
        """A running container whose volume is not mounted writes to nowhere that lasts: say it once, loudly."""
        for volume, container in missing - self._missing.get(engine, set()):
            self._events.publish(
                "mount.missing",
                volume,
                f"container {container} runs, but the volume is not mounted: restart the container",
                level=logging.CRITICAL,
                container=container,
            )
        self._missing[engine] = missing

    def missing_mounts(self) -> set[tuple[str, str]]:
        """(volume, container), by name, of each running container whose mount is gone."""
        return {pair for missing in self._missing.values() for pair in missing}


def _holders_of(binding: Binding, holds: list[Hold]) -> list[Hold]:
    """The containers behind a binding: those the engine names by its mount id; where it names no id (Podman has one
    for everybody, and Docker's may be unreadable), all that use the volume."""
    exact = [hold for hold in holds if hold.mount_id == binding.mount_id]
    return exact or [hold for hold in holds if hold.mount_id is None]
