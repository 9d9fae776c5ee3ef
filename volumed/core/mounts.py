"""Who holds a volume's mount on this node: bindings taken and given back, and the mount that follows from them.

A binding is written before the volume is mounted and taken away before it is unmounted. So the ledger alone says
what should be mounted, and after a crash at any instant `volumed.core.reconcile` makes the machine agree with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import msgspec

from volumed import context
from volumed.core.access import Use, attachment_use, conflicts, one_node_only, use_of
from volumed.core.backends import Backend, Backends, Pending
from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.core.presence import Presence
from volumed.driver import BlockDriver, Capability
from volumed.errors import InUse, MountFailed, NotFound, OperationPending, VolumedError
from volumed.host.freeze import frozen
from volumed.model import (
    Binding,
    Consumer,
    Engine,
    HistoricBinding,
    Volume,
    VolumeId,
    VolumeMode,
    VolumeState,
    now,
)
from volumed.store.repository import Repository
from volumed.testing import crash

# Longer than any file system needs to take a snapshot by reflink, shorter than a database's patience.
FREEZE_TIMEOUT = 20.0
SWITCH_TIMEOUT = 100.0  # no engine waits longer


class BeingSwitched(OperationPending):
    """A move of it is past its commit point: in a moment its new place is shown, or it goes back."""


class Mounts:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        backends: Backends,
        presence: Presence,
        locks: KeyedLocks,
        events: Events,
    ) -> None:
        self.node = node
        self.presence = presence
        self._repository = repository
        self._backends = backends
        self._locks = locks
        self._events = events

    def path(self, volume_id: VolumeId) -> Path | None:
        """Where the volume is mounted on this node, or None. From memory: touches no storage."""
        return self.presence.path(volume_id) if volume_id in self.presence.mounted_ids() else None

    def mounted_ids(self) -> Set[VolumeId]:
        return self.presence.mounted_ids()

    def acquire(self, volume: Volume, *, engine: Engine, mount_id: str, consumer: Consumer | None = None) -> Path:
        """`begin_acquire`, waited for."""
        return self.begin_acquire(volume, engine=engine, mount_id=mount_id, consumer=consumer).wait()

    def begin_acquire(
        self, volume: Volume, *, engine: Engine, mount_id: str, consumer: Consumer | None = None
    ) -> Pending[Path]:
        """Bind the consumer to the volume and return the path it is mounted at.

        The same hold taken again is counted. When the caller's deadline passes first, the hold is given back as soon
        as the mount is there: nobody waits for it any more. Raises what mounting raises, and then nothing is held.
        """
        backend = self._backends.get(volume.backend)

        def give_back(_: Path) -> None:
            self._release(volume.id, engine=engine, mount_id=mount_id, reason="abandoned")

        return backend.begin(
            lambda: self._acquire(volume.id, engine=engine, mount_id=mount_id, consumer=consumer),
            late=give_back,
        )

    def _acquire(self, volume_id: VolumeId, *, engine: Engine, mount_id: str, consumer: Consumer | None) -> Path:
        ends = time.monotonic() + context.remaining(SWITCH_TIMEOUT)
        while True:
            try:
                return self._acquire_now(volume_id, engine=engine, mount_id=mount_id, consumer=consumer)
            except BeingSwitched:
                if time.monotonic() > ends:
                    raise
            time.sleep(0.05)

    def _acquire_now(self, volume_id: VolumeId, *, engine: Engine, mount_id: str, consumer: Consumer | None) -> Path:
        with self._locks.hold(volume_id):
            volume = self.usable(volume_id)
            backend = self._backends.get(volume.backend)  # it may have been moved while we waited
            if volume.mode is VolumeMode.BLOCK:
                raise MountFailed(
                    "is a raw block volume and has no tree to mount",
                    subject=f"volume {volume.name}",
                    hint="use it through an engine that takes block volumes",
                )
            held = self._repository.binding(volume_id, node=self.node, engine=engine, mount_id=mount_id)
            if held is None:
                consumers = (consumer,) if consumer else ()
                taken = Binding(
                    volume_id=volume_id,
                    node=self.node,
                    engine=engine,
                    mount_id=mount_id,
                    since=now(),
                    consumers=consumers,
                )
            else:
                taken = msgspec.structs.replace(held, count=held.count + 1)
            return self.take(volume, backend, taken, held)

    def take(self, volume: Volume, backend: Backend, binding: Binding, held: Binding | None = None) -> Path:
        """Write the binding, in the place of `held`, and mount the volume; both or neither. The caller holds the
        volume's lock. Raises InUse when an access mode forbids it, BeingSwitched, and what mounting raises."""
        migration = self._repository.migration_of(volume.id)
        if migration is not None and migration.phase.committed:
            raise BeingSwitched(
                f"is being switched to backend {volume.backend}",
                subject=f"volume {volume.name}",
                hint="try again in a moment",
            )
        bound = self._repository.bindings(volume.id)
        if not binding.staging:
            self._check_access(volume, binding, bound)
        with self._repository.transaction() as transaction:
            transaction.put(binding)
            if migration is not None and binding.engine is not Engine.VOLUMED:
                transaction.disturb(volume.id)
        crash.point("mount.bound")
        try:
            return self.presence.establish(volume, backend.driver, options=wanted_options([*bound, binding]))
        except BaseException:
            with self._repository.transaction() as transaction:
                if held is None:
                    transaction.delete(binding)
                else:
                    transaction.put(msgspec.structs.replace(held, revision=binding.revision))
            raise

    def _check_access(self, volume: Volume, binding: Binding, bound: Iterable[Binding]) -> None:
        backend = self._backends.get(volume.backend)
        one_node = one_node_only(volume, backend.driver, backend.capabilities)
        others: dict[Use, list[str]] = {
            use_of(other, one_node=one_node): describe_each(other) for other in bound if not other.staging
        }
        for attachment in self._repository.attachments(volume.id):
            if attachment.node != self.node:
                others.setdefault(attachment_use(attachment), [f"node {attachment.node}, which has it attached"])
        mine = use_of(binding, one_node=one_node)
        refused = conflicts(mine, others)
        if not refused:
            return
        modes = {str(use.mode) for use in (mine, *refused) if use.mode is not None}
        raise InUse(
            f"cannot be used so ({', '.join(sorted(modes))}) beside",
            holders=[line for use in refused for line in others[use]],
            subject=f"volume {volume.name}",
            hint="stop them first, or use it in a mode that allows both",
        )

    def release(self, volume: Volume, *, engine: Engine, mount_id: str) -> None:
        """`begin_release`, waited for."""
        self.begin_release(volume, engine=engine, mount_id=mount_id).wait()

    def begin_release(self, volume: Volume, *, engine: Engine, mount_id: str) -> Pending[None]:
        """Give one hold back; the last one unmounts. Raises NotFound when there is no such hold."""
        backend = self._backends.get(volume.backend)
        return backend.begin(lambda: self._release(volume.id, engine=engine, mount_id=mount_id, reason="released"))

    def _release(self, volume_id: VolumeId, *, engine: Engine, mount_id: str, reason: str) -> None:
        with self._locks.hold(volume_id):
            held = self._repository.binding(volume_id, node=self.node, engine=engine, mount_id=mount_id)
            if held is None:
                raise NotFound(f"is not mounted for {engine} by the id {mount_id[:80]}", subject=f"volume {volume_id}")
            if held.count > 1:
                with self._repository.transaction() as transaction:
                    transaction.put(msgspec.structs.replace(held, count=held.count - 1))
                return
            self.end(held, reason=reason)

    def drop(self, binding: Binding, *, reason: str) -> None:
        """End a binding whatever its count: its consumer is gone."""
        volume = self._repository.volume(binding.volume_id)
        if volume is None:
            with self._repository.transaction() as transaction:
                transaction.delete(binding)
            return
        backend = self._backends.get(volume.backend)

        def job() -> None:
            with self._locks.hold(volume.id):
                held = self._repository.binding(
                    volume.id, node=binding.node, engine=binding.engine, mount_id=binding.mount_id
                )
                if held is not None:
                    self.end(held, reason=reason)

        backend.call(job)

    def end(self, binding: Binding, *, reason: str) -> None:
        """The binding becomes history, and the last one unmounts. The caller holds the volume's lock."""
        volume = self._repository.volume(binding.volume_id)
        with self._repository.transaction() as transaction:
            transaction.delete(binding)
            if not binding.staging:
                transaction.put(ended(binding, volume, reason=reason))
            elif volume is not None:
                transaction.touch(volume.id)  # no history tells that it was mounted
        crash.point("unmount.unbound")
        if volume is not None:
            self.settle(volume, self._backends.get(volume.backend))

    def settle(self, volume: Volume, backend: Backend) -> None:
        """Unmount the volume when nothing is bound to it. A process that still holds it keeps it mounted: that is
        said, and tried again by the next reconciliation. The caller holds the volume's lock."""
        if self._repository.bindings(volume.id, node=self.node):
            return
        try:
            self.presence.remove(volume, backend.driver)
        except InUse as error:
            self._events.publish("mount.held", volume.name, str(error), level=logging.WARNING)
        except VolumedError as error:
            self._events.publish("unmount.failed", volume.name, str(error), level=logging.ERROR)

    @contextmanager
    def unmounted(self, volume: Volume, backend: Backend) -> Iterator[None]:
        """The volume is used by nobody and not mounted. The caller holds its lock. Raises InUse, saying by whom."""
        holders = self.holders(volume)
        if holders:
            raise InUse("is in use by", holders=holders, subject=f"volume {volume.name}")
        self.presence.remove(volume, backend.driver)
        yield

    @contextmanager
    def quiescent(self, volume: Volume, backend: Backend, *, live: Capability) -> Iterator[None]:
        """No write reaches the volume's storage inside. The caller holds its lock.

        A mounted block volume is frozen, if its backend is quick enough (`live`); a tree driver's snapshots are atomic
        by themselves. Raises InUse when only an unmounted volume could be copied.
        """
        holders = self.holders(volume)
        if not holders:
            self.presence.remove(volume, backend.driver)
            yield
            return
        if live not in backend.capabilities:
            reason = backend.lacking.get(live, f"backend {backend.name} cannot copy a volume that is being written to")
            raise InUse(
                "is in use by", holders=holders, subject=f"volume {volume.name}", hint=f"stop them first: {reason}"
            )
        if self.can_freeze(volume, backend) and self.presence.is_mounted(volume, backend.driver):
            with frozen(self.presence.path(volume.id), timeout=FREEZE_TIMEOUT):
                yield
        else:
            yield

    @staticmethod
    def can_freeze(volume: Volume, backend: Backend) -> bool:
        """Whether the volume has a file system of its own; a copy of anything else is made in one step."""
        return isinstance(backend.driver, BlockDriver) and volume.mode is VolumeMode.FILESYSTEM

    def holders(self, volume: Volume) -> list[str]:
        """Each hold of the volume, on any node, for people."""
        return [line for binding in self._repository.bindings(volume.id) for line in describe_each(binding)]

    def usable(self, volume_id: VolumeId) -> Volume:
        """The volume, if it is ready. Raises NotFound, OperationPending."""
        volume = self._repository.volume(volume_id)
        if volume is None:
            raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
        if volume.state is not VolumeState.READY:
            raise OperationPending(f"is {volume.state}", subject=f"volume {volume.name}", hint="try again later")
        return volume


def wanted_options(bindings: Iterable[Binding]) -> list[str]:
    """The mount options that the holds of a volume ask for, each once."""
    return list(dict.fromkeys(option for binding in bindings for option in binding.mount_options))


def describe_each(binding: Binding) -> list[str]:
    """A line for each consumer of a hold, or one for the hold."""
    return [describe(binding, consumer) for consumer in binding.consumers or (None,)]


def describe(binding: Binding, consumer: Consumer | None) -> str:
    """`docker container web-1 (pid 4121) at /data`, `kubernetes pod shop/db-0`, or what is known of it."""
    where = f" on node {binding.node}" if binding.node else ""
    if binding.engine is Engine.VOLUMED:
        return f"volumed itself, which moves it to other storage (migration {binding.mount_id}){where}"
    if binding.staging:
        return f"{binding.engine}, which has it staged at {binding.path}{where}"
    if consumer is None:
        return f"{binding.engine} by mount id {binding.mount_id[:12]}{where}"
    pid = f" (pid {consumer.pid})" if consumer.pid else ""
    target = f" at {consumer.target}" if consumer.target else ""
    return f"{binding.engine} {consumer.kind} {consumer.name or consumer.id[:12]}{pid}{target}{where}"


def ended(binding: Binding, volume: Volume | None, *, reason: str) -> HistoricBinding:
    """What the ledger keeps of it."""
    return HistoricBinding(
        volume_id=binding.volume_id,
        volume_name=volume.name if volume else "",
        node=binding.node,
        engine=binding.engine,
        mount_id=binding.mount_id,
        since=binding.since,
        until=now(),
        reason=reason,
        consumers=binding.consumers,
    )
