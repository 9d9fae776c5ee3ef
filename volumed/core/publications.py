"""Volumes handed to an orchestrator at the paths it names: staged once per node, published once per consumer.

A path is in the ledger before anything is mounted there, and leaves it after it is gone from the machine: so whatever
a crash cuts short is known, and the orchestrator's retry, or `reconcile`, finishes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.bindings import Sightings
from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts, describe_each, wanted_options
from volumed.core.names import check_words
from volumed.core.planning import CreateVolume
from volumed.core.targets import Targets
from volumed.core.volumes import Volumes
from volumed.driver import BlockDriver, Capability
from volumed.errors import AlreadyExists, InvalidRequest, NotFound, PreconditionFailed, VolumedError
from volumed.model import AccessMode, Binding, Consumer, Engine, Volume, VolumeId, VolumeMode, now
from volumed.store.repository import Repository
from volumed.testing import crash

_log = logging.getLogger(__name__)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """How a consumer wants a volume."""

    access: AccessMode
    block: bool = False
    readonly: bool = False
    filesystem: str = ""
    mount_options: tuple[str, ...] = ()
    group: int | None = None


class Publications:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        backends: Backends,
        volumes: Volumes,
        mounts: Mounts,
        targets: Targets,
        locks: KeyedLocks,
        events: Events,
        grace: float,
    ) -> None:
        """`grace`: seconds for which a path must have been gone before its consumer counts as gone."""
        self._node = node
        self._repository = repository
        self._backends = backends
        self._volumes = volumes
        self._mounts = mounts
        self._targets = targets
        self._locks = locks
        self._events = events
        self._sightings = Sightings(grace)

    # What an orchestrator asks for
    def stage(self, volume: Volume, path: str, usage: Usage, *, engine: Engine) -> None:
        """Mount the volume on this node, to be published from there. The same again is success.

        Raises AlreadyExists when it is staged there for another usage, PreconditionFailed when it cannot be used so.
        """
        where = self._targets.check(path, what="staging path")
        self.check_usage(volume, usage)
        wanted = self._binding(volume, where, usage, engine=engine, staging=True)
        backend = self._backends.get(volume.backend)
        backend.call(lambda: self._stage(wanted, backend))

    def _stage(self, wanted: Binding, backend: Backend) -> None:
        with self._locks.hold(wanted.volume_id):
            volume = self._mounts.usable(wanted.volume_id)
            backend = self._backends.get(volume.backend)
            held = self._held(wanted.volume_id, wanted.path)
            if held is not None:
                _check_same(held, wanted, volume)
            self._targets.prepare(Path(wanted.path))
            if held is None:
                self._mounts.take(volume, backend, wanted)
            else:
                self._mounts.presence.establish(volume, backend.driver, options=wanted_options([held]))
            crash.point("stage.staged")

    def unstage(self, volume_id: VolumeId, path: str) -> None:
        """Staged there no more; never was is success."""
        where = self._targets.check(path, what="staging path")
        self._leave(volume_id, where, staging=True)

    def publish(
        self, volume: Volume, path: str, usage: Usage, *, engine: Engine, consumer: Consumer, staged_at: str = ""
    ) -> None:
        """The volume at a consumer's path. The same again is success.

        Raises PreconditionFailed when it is not staged at `staged_at`, or for another usage; InUse when an access
        mode forbids it; AlreadyExists when it is published there for another usage.
        """
        where = self._targets.check(path, what="target path")
        self.check_usage(volume, usage)
        if not volume.ephemeral:
            self._check_staged(volume, staged_at, usage)
        wanted = msgspec.structs.replace(
            self._binding(volume, where, usage, engine=engine, staging=False), consumers=(consumer,)
        )
        backend = self._backends.get(volume.backend)
        backend.call(lambda: self._publish(wanted, backend))

    def publish_ephemeral(
        self, request: CreateVolume, path: str, usage: Usage, *, engine: Engine, consumer: Consumer
    ) -> None:
        """A new volume that lives as long as this publication. The same again is success."""
        self._targets.check(path, what="target path")
        volume = self._volumes.create(request)
        self.publish(volume, path, usage, engine=engine, consumer=consumer)

    def _publish(self, wanted: Binding, backend: Backend) -> None:
        path = Path(wanted.path)
        with self._locks.hold(wanted.volume_id):
            volume = self._mounts.usable(wanted.volume_id)
            backend = self._backends.get(volume.backend)
            held = self._held(wanted.volume_id, wanted.path)
            if held is not None:
                _check_same(held, wanted, volume)
                source = self._mounts.presence.establish(volume, backend.driver, options=wanted_options([held]))
                self._attach(volume, held, source, path)
                return
            self._check_device_mode(volume, wanted)
            source = self._mounts.take(volume, backend, wanted)
            try:
                if wanted.group is not None and not wanted.readonly and not wanted.block:
                    self._mounts.presence.grant_group(volume, backend.driver, wanted.group)
                self._attach(volume, wanted, source, path)
            except BaseException:
                self._forget(wanted, volume, backend)
                raise
            crash.point("publish.published")

    def _attach(self, volume: Volume, binding: Binding, source: Path, path: Path) -> None:
        if binding.block:
            self._set_device_mode(volume, binding)
        self._targets.attach(
            source, path, block=binding.block, readonly=binding.readonly, options=binding.mount_options
        )

    def _forget(self, binding: Binding, volume: Volume, backend: Backend) -> None:
        """A publication that failed never was: no history of it."""
        with self._repository.transaction() as transaction:
            transaction.delete(binding)
        self._mounts.settle(volume, backend)

    def unpublish(self, volume_id: VolumeId, path: str) -> None:
        """Published there no more; never was is success. An ephemeral volume goes with its publication."""
        where = self._targets.check(path, what="target path")
        self._leave(volume_id, where, staging=False)
        volume = self._repository.volume(volume_id)
        if volume is not None and volume.ephemeral:
            crash.point("unpublish.ephemeral")
            self._volumes.remove(volume.id)

    def _leave(self, volume_id: VolumeId, path: Path, *, staging: bool) -> None:
        volume = self._repository.volume(volume_id)
        if volume is None:
            raise NotFound("there is no such volume", subject=f"volume {volume_id[:100]}")
        backend = self._backends.get(volume.backend)
        backend.call(lambda: self._end(volume, path, backend, staging=staging, reason="released"))

    def _end(self, volume: Volume, path: Path, backend: Backend, *, staging: bool, reason: str) -> None:
        with self._locks.hold(volume.id):
            held = self._held(volume.id, str(path))
            if held is not None and held.staging is not staging:
                wrong = "staged" if held.staging else "published"
                raise InvalidRequest(f"is {wrong} at {path}", subject=f"volume {volume.name}")
            if not staging and (held is not None or self._shows(volume, path)):
                self._targets.detach(path)
            if held is None:
                return
            crash.point("unpublish.detached")
            self._mounts.end(held, reason=reason)

    def _shows(self, volume: Volume, path: Path) -> bool:
        """Whether this volume is at a path that the ledger does not know: an older ledger was put back."""
        source = self._mounts.path(volume.id)
        return source is not None and self._targets.shows(source, path)

    # Asking
    def find(self, volume_id: VolumeId, path: str) -> Binding | None:
        """What is staged or published there."""
        return self._held(volume_id, path)

    def is_mounted(self, path: str) -> bool:
        """Whether anything is."""
        return self._mounts.presence.host.is_mountpoint(self._targets.check(path, what="target path"))

    def check_usage(self, volume: Volume, usage: Usage) -> None:
        """Whether the volume can be used so at all. Raises PreconditionFailed, NotSupported, InvalidRequest."""
        subject = f"volume {volume.name}"
        if usage.block is not (volume.mode is VolumeMode.BLOCK):
            wanted = "a device" if usage.block else "a tree"
            raise PreconditionFailed(f"is a {volume.mode} volume and cannot be used as {wanted}", subject=subject)
        if usage.filesystem and usage.filesystem != (volume.filesystem or usage.filesystem):
            raise PreconditionFailed(f"holds {volume.filesystem}, not {usage.filesystem}", subject=subject)
        check_words(usage.mount_options, what="mount-options")
        if not usage.access.single_node:
            backend = self._backends.get(volume.backend)
            backend.require(Capability.MULTI_NODE)
            if isinstance(backend.driver, BlockDriver) and not usage.block:
                raise PreconditionFailed(
                    f"holds {volume.filesystem}, which knows of one node alone, so {usage.access} cannot be had",
                    subject=subject,
                    hint="use it as a raw device, or a backend whose volumes are trees, as nfs and cephfs",
                )

    def _check_staged(self, volume: Volume, staged_at: str, usage: Usage) -> None:
        subject = f"volume {volume.name}"
        if not staged_at:
            raise PreconditionFailed("no staging path is given", subject=subject)
        staged = self._held(volume.id, os.path.normpath(staged_at))
        if staged is None or not staged.staging or not self._targets.exists(Path(staged.path)):
            raise PreconditionFailed(f"is not staged at {staged_at}", subject=subject, hint="stage it first")
        if staged.block is not usage.block:
            raise PreconditionFailed(
                f"is staged at {staged_at} as a {'device' if staged.block else 'tree'}", subject=subject
            )
        if (staged.access.reader_only if staged.access else False) and not usage.readonly:
            raise PreconditionFailed(f"is staged for {staged.access}, so for reading alone", subject=subject)

    def _check_device_mode(self, volume: Volume, wanted: Binding) -> None:
        """A device is read-only or not as a whole, whoever opens it."""
        if not wanted.block:
            return
        others = [other for other in self._repository.bindings(volume.id, node=self._node) if not other.staging]
        differing = [other for other in others if other.path != wanted.path and other.readonly is not wanted.readonly]
        if differing:
            raise PreconditionFailed(
                f"is in use the other way than {'read-only' if wanted.readonly else 'for writing'} by "
                + ", ".join(line for other in differing for line in describe_each(other)),
                subject=f"volume {volume.name}",
                hint="a raw device is read-only for all of its users on a node or for none",
            )

    def _set_device_mode(self, volume: Volume, binding: Binding) -> None:
        driver = self._backends.get(volume.backend).driver
        device = self._mounts.presence.mapped(volume, driver) if isinstance(driver, BlockDriver) else None
        if device is not None:
            self._mounts.presence.host.set_device_readonly(device, binding.readonly)

    def _held(self, volume_id: VolumeId, path: str) -> Binding | None:
        bound = self._repository.bindings(volume_id, node=self._node)
        return next((binding for binding in bound if binding.path == path), None)

    def _binding(self, volume: Volume, path: Path, usage: Usage, *, engine: Engine, staging: bool) -> Binding:
        return Binding(
            volume_id=volume.id,
            node=self._node,
            engine=engine,
            mount_id=f"{'staging' if staging else 'target'}:{path}",
            since=now(),
            path=str(path),
            staging=staging,
            access=usage.access,
            readonly=usage.readonly or usage.access.reader_only,
            block=usage.block,
            mount_options=usage.mount_options,
            group=usage.group,
        )

    # Keeping true
    def reconcile(self) -> None:
        """Put back what is missing at a path that is there; end the publications whose path is gone, and the ephemeral
        volumes that nobody has. Errors of one volume stop no other."""
        for binding in self._repository.bindings(node=self._node):
            if binding.path:
                self._guarded(binding.volume_id, partial(self._converge, binding))
        for volume in self._repository.ephemeral_volumes():
            bound = self._repository.bindings(volume.id)
            if not bound and self._sightings.lasts("ephemeral", volume.id):
                self._guarded(volume.id, partial(self._volumes.remove, volume.id))
        self._sightings.end_look()

    def _converge(self, binding: Binding) -> None:
        volume = self._repository.volume(binding.volume_id)
        if volume is None:
            return
        path = Path(binding.path)
        backend = self._backends.get(volume.backend)
        if not self._targets.exists(path):
            if self._sightings.lasts("gone", binding.volume_id, binding.path):
                self._end_vanished(volume, binding, backend)
            return
        source = self._mounts.path(volume.id)
        if binding.staging or source is None or self._targets.shows(source, path):
            return
        backend.call(lambda: self._repair(volume.id, path, backend))

    def _repair(self, volume_id: VolumeId, path: Path, backend: Backend) -> None:
        with self._locks.hold(volume_id, wait=0.0):
            volume, held = self._repository.volume(volume_id), self._held(volume_id, str(path))
            if volume is None or held is None or not self._targets.exists(path):
                return
            backend = self._backends.get(volume.backend)
            source = self._mounts.presence.establish(volume, backend.driver, options=wanted_options([held]))
            self._attach(volume, held, source, path)
        self._events.publish("publication.repaired", volume.name, f"was not mounted at {path}: mounted it again")

    def _end_vanished(self, volume: Volume, binding: Binding, backend: Backend) -> None:
        backend.call(lambda: self._end(volume, Path(binding.path), backend, staging=binding.staging, reason="vanished"))
        who = ", ".join(consumer.name for consumer in binding.consumers) or str(binding.engine)
        self._events.publish("binding.vanished", volume.name, f"{binding.path} of {who} is gone", who=who)

    @staticmethod
    def _guarded(volume_id: VolumeId, job: Callable[[], object]) -> None:
        try:
            job()
        except VolumedError as error:
            _log.warning("volume %s: its publications are looked at again later: %s", volume_id, error)
        except Exception:
            _log.exception("volume %s: its publications cannot be reconciled", volume_id)


def _check_same(held: Binding, wanted: Binding, volume: Volume) -> None:
    """Raises AlreadyExists, naming what differs."""
    keys: Sequence[str] = ("staging", "access", "block", "readonly", "mount_options", "group")
    differing = [key.replace("_", " ") for key in keys if getattr(held, key) != getattr(wanted, key)]
    if differing:
        raise AlreadyExists(
            f"is at {wanted.path} already, with another {', '.join(differing)}",
            subject=f"volume {volume.name}",
            hint="take it away from there first",
        )
