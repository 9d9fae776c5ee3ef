"""Volumes: made, found, grown and removed. Every change is journalled before it touches storage."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.events import Events
from volumed.core.journal import Journal
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts
from volumed.core.names import check_labels, check_name, check_words
from volumed.core.options import option_keys
from volumed.core.planning import CreateVolume, Planner
from volumed.core.provision import Origin, Provision
from volumed.driver import Capability
from volumed.errors import AlreadyExists, InUse, InvalidRequest, NotFound, NotSupported, OutOfRange
from volumed.host import filesystems
from volumed.model import (
    Claim,
    OperationKind,
    Ownership,
    Volume,
    VolumeId,
    VolumeMode,
    VolumeState,
)
from volumed.store.repository import Repository
from volumed.testing import crash


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What a removal destroyed, or would."""

    volume: Volume
    used: int | None  # bytes; None when only counting the tree would tell


class Volumes:
    def __init__(
        self,
        *,
        repository: Repository,
        backends: Backends,
        mounts: Mounts,
        locks: KeyedLocks,
        journal: Journal,
        provision: Provision,
        planner: Planner,
        events: Events,
    ) -> None:
        self._planner = planner
        self._repository = repository
        self._backends = backends
        self._mounts = mounts
        self._locks = locks
        self._journal = journal
        self._provision = provision
        self._events = events

    # Looking
    def get(self, reference: str) -> Volume:
        """By name, else by id. Raises NotFound."""
        volume = self._repository.volume_by_name(reference) or self._repository.volume(reference)
        if volume is None or volume.hidden:
            raise NotFound("there is no such volume", subject=f"volume {reference[:100]}")
        return volume

    def _by_id(self, volume_id: VolumeId) -> Volume:
        """Never by name: a volume may be named like another's id."""
        volume = self._repository.volume(volume_id)
        if volume is None:
            raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
        return volume

    def list(self, *, after: str = "", limit: int | None = None) -> list[Volume]:
        """In the order of their ids; the next page is after the last one's id."""
        found: list[Volume] = []
        while page := self._repository.volumes(after=after, limit=None if limit is None else limit - len(found)):
            found += [volume for volume in page if not volume.hidden]
            if limit is None or len(found) == limit:
                break
            after = page[-1].id
        return found

    def names(self) -> Sequence[tuple[str, VolumeId]]:
        """Every name with its id; cheap, however many there are."""
        return self._repository.volume_names()

    def known_options(self) -> set[str]:
        """The keys of every configured driver's volume options."""
        return {key for backend in self._backends.all() for key in option_keys(backend.driver.VolumeOptions)}

    # Making
    def create(self, request: CreateVolume) -> Volume:
        """The volume asked for; the one that is there when it is what was asked for.

        Raises AlreadyExists when the name belongs to another kind of volume; InvalidRequest, NotSupported,
        CapacityExhausted and what the backend raises, and then nothing is left behind.
        """
        check_name(request.name)
        check_labels(request.labels)
        existing = self._named(request)
        if existing is not None and existing.state is VolumeState.READY:
            return self._same(existing, request)
        origin = self._planner.origin(request)
        if request.claim is not None and origin is not None:
            request = msgspec.structs.replace(request, source=str(origin))
        backend = self._planner.place(request, origin)
        request = self._planner.in_class(request, backend, origin)
        planned = self._planner.plan(request, backend, origin)
        return backend.call(lambda: self._create(request, planned, backend, origin))

    def _create(
        self,
        request: CreateVolume,
        volume: Volume,
        backend: Backend,
        origin: Origin | None,
    ) -> Volume:
        subject = f"volume {request.name}"
        with self._locks.hold(f"name:{request.name}", subject=subject), self._locks.hold(volume.id):
            existing = self._named(request)
            if existing is not None:
                with self._locks.hold(existing.id, subject=subject):
                    existing = self._journal.settle(existing)  # an earlier attempt that was cut short
            if existing is not None:
                return self._same(existing, request)
            with self._journal.recorded(OperationKind.CREATE, volume) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(volume)
                    transaction.put(operation)
                crash.point("create.reserved")
                volume = self._provision.make(volume, backend, origin)
                if request.claim is not None:
                    _check_limit(volume, request.claim)
                crash.point("create.made")
                with self._repository.transaction() as transaction:
                    transaction.put(volume)
                    transaction.delete(operation)
            crash.point("create.committed")
        if not volume.hidden:
            text = f"created on backend {backend.name}"
            self._events.publish("volume.created", volume.name, text, backend=backend.name)
        return volume

    def _named(self, request: CreateVolume) -> Volume | None:
        """What has the name already; one that is hidden takes none."""
        return None if request.hidden else self._repository.volume_by_name(request.name)

    def _same(self, volume: Volume, request: CreateVolume) -> Volume:
        """Raises AlreadyExists, naming what differs between the volume and the request."""
        if request.claim is not None:
            _check_claim(volume, request, request.claim)
            return volume
        wanted: dict[str, tuple[object, object]] = {
            "backend": (request.backend, volume.backend),
            "fs": (request.filesystem, volume.filesystem),
            "mode": (request.mode, volume.mode),
            "from": (request.source, volume.source),
            "mkfs-options": (request.mkfs_options, volume.mkfs_options),
            "mount-options": (request.mount_options, volume.mount_options),
            "labels": (request.labels, volume.labels),
            "options": (request.options, {key: volume.options.get(key) for key in request.options}),
            "class": (request.class_name, volume.class_name),
            "encrypt": (request.encryption, volume.encryption),
        }
        differing = [key for key, (asked, there) in wanted.items() if asked and asked != there]
        if request.ownership != Ownership() and request.ownership != volume.ownership:
            differing.append("uid, gid or mode")
        if request.size is not None and (volume.size is None or volume.size < request.size):
            differing.append("size")
        if differing:
            raise AlreadyExists(
                f"exists already, with another {', '.join(differing)}",
                subject=f"volume {volume.name}",
                hint="choose another name, or leave the options out to use it as it is",
            )
        _check_ready(volume)
        return volume

    # Removing
    def remove(self, reference: str, *, dry_run: bool = False) -> Removal:
        """Remove the volume and its data. Raises InUse naming its holders, or its snapshots."""
        volume = self.get(reference)
        backend = self._backends.get(volume.backend)
        if dry_run:
            self._check_removable(volume)
            return Removal(volume=volume, used=self._provision.used(volume, backend))
        return backend.call(lambda: self._remove(volume.id, backend))

    def discard(self, volume: Volume) -> None:
        """One that is hidden; gone already is success."""
        backend = self._backends.get(volume.backend)
        with contextlib.suppress(NotFound):
            backend.call(lambda: self._remove(volume.id, backend))

    def _remove(self, volume_id: VolumeId, backend: Backend) -> Removal:
        with self._locks.hold(volume_id):
            volume = self._by_id(volume_id)
            settled = self._journal.settle_for_removal(volume)
            if settled is None:
                return Removal(volume=volume, used=None)
            backend = self._backends.get(settled.backend)  # it may have been moved while we waited
            self._check_removable(settled)
            with self._mounts.unmounted(settled, backend):
                doomed = msgspec.structs.replace(settled, state=VolumeState.DELETING)
                with self._journal.recorded(OperationKind.DELETE, doomed) as operation:
                    with self._repository.transaction() as transaction:
                        transaction.put(doomed)
                        transaction.put(operation)
                    crash.point("delete.marked")
                    self._provision.destroy(doomed, backend)
                    crash.point("delete.destroyed")
                    with self._repository.transaction() as transaction:
                        transaction.delete(doomed)
                        transaction.delete(operation)
                crash.point("delete.committed")
        if not volume.hidden:
            self._events.publish("volume.removed", volume.name, "removed with its data", backend=backend.name)
        return Removal(volume=volume, used=None)

    def _check_removable(self, volume: Volume) -> None:
        holders = self._mounts.holders(volume)
        if holders:
            raise InUse("is in use by", holders=holders, subject=f"volume {volume.name}")
        nodes = [
            attachment.node
            for attachment in self._repository.attachments(volume.id)
            if attachment.ordered or attachment.node != self._mounts.node  # its own this node detaches by itself
        ]
        if nodes:
            raise InUse("is attached to node", holders=nodes, subject=f"volume {volume.name}", hint="detach it first")
        snapshots = [snapshot.name for snapshot in self._repository.snapshots(volume.id)]
        if snapshots:
            raise InUse(
                "has snapshots",
                holders=snapshots,
                subject=f"volume {volume.name}",
                hint=f"remove them first: volumectl snapshot rm {volume.name} {snapshots[0]}",
            )

    # Changing
    def modify(
        self,
        reference: str,
        *,
        labels: dict[str, str] | None = None,
        mount_options: tuple[str, ...] | None = None,
        options: dict[str, str] | None = None,
    ) -> Volume:
        """Set labels, the options of the next mount, and those of the driver's that can be changed; what is left out
        stays. Raises InvalidRequest for an option that cannot."""
        volume = self.get(reference)
        backend = self._backends.get(volume.backend)
        check_labels({**volume.labels, **(labels or {})})
        check_words(mount_options or (), what="mount-options")
        if mount_options and volume.mode is VolumeMode.BLOCK:
            raise InvalidRequest("a raw block volume has no file system", subject=f"volume {volume.name}")
        if options:
            self._provision.check_modification(backend, volume, options)
        return backend.call(
            lambda: self._modify(volume.id, labels or {}, mount_options, options or {}, backend),
        )

    def _modify(
        self,
        volume_id: VolumeId,
        labels: dict[str, str],
        mount_options: tuple[str, ...] | None,
        options: dict[str, str],
        backend: Backend,
    ) -> Volume:
        with self._locks.hold(volume_id):
            volume = self._journal.settle(self._by_id(volume_id))
            if volume is None:
                raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
            backend = self._backends.get(volume.backend)
            changed = msgspec.structs.replace(
                volume,
                labels={**volume.labels, **labels},
                mount_options=volume.mount_options if mount_options is None else mount_options,
                options={**volume.options, **options},
            )
            if changed == volume:
                return volume
            if changed.options == volume.options:
                with self._repository.transaction() as transaction:
                    transaction.put(changed)
                return changed
            with self._journal.recorded(OperationKind.MODIFY, volume, options=changed.options) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(operation)
                crash.point("modify.recorded")
                self._provision.modify(changed, backend)
                crash.point("modify.modified")
                with self._repository.transaction() as transaction:
                    transaction.put(changed)
                    transaction.delete(operation)
        self._events.publish("volume.modified", volume.name, "given other options")
        return changed

    # Growing
    def expand(self, reference: str, size: int) -> Volume:
        """Grow the volume, in use or not, to at least `size` bytes; that large already is success.

        Raises OutOfRange for a smaller size than it has, NotSupported when the backend cannot grow it.
        """
        volume = self.get(reference)
        backend = self._backends.get(volume.backend)
        backend.require(Capability.EXPAND)
        if volume.size is None:
            raise NotSupported("has no size that could grow", subject=f"volume {volume.name}")
        if size < volume.size:
            raise OutOfRange(
                f"has {volume.size} bytes and cannot shrink to {size}",
                subject=f"volume {volume.name}",
                hint="create a smaller volume and copy the data",
            )
        if size == volume.size:
            return volume
        if volume.filesystem:
            filesystems.get(volume.filesystem).require_growth()
        return backend.call(lambda: self._expand(volume.id, size, backend))

    def _expand(self, volume_id: VolumeId, size: int, backend: Backend) -> Volume:
        with self._locks.hold(volume_id):
            volume = self._journal.settle(self._by_id(volume_id))
            if volume is None:
                raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
            backend = self._backends.get(volume.backend)
            if volume.size is not None and size <= volume.size:
                return volume
            with self._journal.recorded(OperationKind.EXPAND, volume, size=size) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(operation)
                    transaction.touch(volume.id)
                crash.point("expand.recorded")
                grown = self._provision.expand(volume, backend, size)
                crash.point("expand.grown")
                with self._repository.transaction() as transaction:
                    transaction.put(grown)
                    transaction.delete(operation)
        self._events.publish("volume.expanded", volume.name, f"grown to {grown.size} bytes", size=grown.size)
        return grown

    # Keys
    def rotate(self, reference: str) -> Volume:
        """The newest key of the volume's name alone opens it from now on, in use or not. The same again is success.

        Raises InvalidRequest for a volume that is not encrypted, PermissionDenied when no known key opens it.
        """
        volume = self.get(reference)
        if not volume.encryption:
            raise InvalidRequest("is not encrypted", subject=f"volume {volume.name}")
        backend = self._backends.get(volume.backend)
        return backend.call(lambda: self._rotate(volume.id))

    def _rotate(self, volume_id: VolumeId) -> Volume:
        with self._locks.hold(volume_id):
            volume = self._journal.settle(self._by_id(volume_id))
            if volume is None:
                raise NotFound("was removed a moment ago", subject=f"volume {volume_id}")
            with self._journal.recorded(OperationKind.ROTATE, volume) as operation:
                with self._repository.transaction() as transaction:
                    transaction.put(operation)
                crash.point("rotate.recorded")
                self._provision.rekey(volume, self._backends.get(volume.backend))
                with self._repository.transaction() as transaction:
                    transaction.delete(operation)
        self._events.publish("volume.rekeyed", volume.name, f"has the newest key of the name {volume.encryption} alone")
        return volume


def _check_ready(volume: Volume) -> None:
    if volume.state is not VolumeState.READY:
        raise AlreadyExists(f"exists and is {volume.state}", subject=f"volume {volume.name}", hint="try again later")


def _check_claim(volume: Volume, request: CreateVolume, claim: Claim) -> None:
    """Raises AlreadyExists unless the volume was made for this very claim. One that was made by hand or through Docker
    never is: whoever claims a volume will delete it one day."""
    subject = f"volume {volume.name}"
    made_for = volume.claim
    if made_for is None or made_for.name != claim.name:
        raise AlreadyExists(
            "exists already and was not made by this orchestrator",
            subject=subject,
            hint=f"choose another name, or use the volume by its id {volume.id}",
        )
    differing = [key for key in ("parameters", "filesystem", "source") if getattr(made_for, key) != getattr(claim, key)]
    if request.mode is not volume.mode:
        differing.append("mode")
    size = volume.size or 0
    if volume.size is not None and (size < claim.required or 0 < claim.limit < size):
        differing.append("size")
    if differing:
        raise AlreadyExists(f"exists already, with another {', '.join(differing)}", subject=subject)
    _check_ready(volume)


def _check_limit(volume: Volume, claim: Claim) -> None:
    """Storage that counts in larger steps gives more than was asked for. Raises OutOfRange."""
    if volume.size is not None and 0 < claim.limit < volume.size:
        raise OutOfRange(
            f"can only be made with {volume.size} bytes, and {claim.limit} are the limit",
            subject=f"volume {volume.name}",
            hint="allow a larger size",
        )
