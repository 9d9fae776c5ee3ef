"""What a new volume will be: where its data comes from, which backend it goes to, and everything in it checked."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from volumed.core.backends import Backend, Backends
from volumed.core.classes import Classes, PlacementClass
from volumed.core.encryption import Encryption
from volumed.core.names import check_words
from volumed.core.options import nearest, read_options
from volumed.core.placement import DEFAULT_FILESYSTEM, DEFAULT_SIZE, Needs, Topology, choose_backend
from volumed.core.provision import Origin
from volumed.driver import BlockDriver, Capability
from volumed.errors import InvalidRequest, NotFound, NotSupported, OutOfRange
from volumed.host import filesystems
from volumed.model import (
    Claim,
    CopyId,
    Ownership,
    SnapshotState,
    Volume,
    VolumeMode,
    VolumeState,
    new_volume_id,
    now,
)
from volumed.store.repository import Repository


class CreateVolume(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. Left out is left to the backend."""

    name: str
    backend: str = ""
    size: int | None = None
    mode: VolumeMode = VolumeMode.FILESYSTEM
    filesystem: str = ""
    mkfs_options: tuple[str, ...] = ()
    mount_options: tuple[str, ...] = ()
    ownership: Ownership = Ownership()
    source: str = ""  # `volume` to clone it, `volume@snapshot` for a snapshot's data
    labels: dict[str, str] = {}
    options: dict[str, str] = {}  # the driver's own
    claim: Claim | None = None  # of an orchestrator: then `source` is left out and read from it
    ephemeral: bool = False
    multi_node: bool = False  # several nodes will use it at once
    class_name: str = ""
    encryption: str = ""  # the name of a key
    hidden: CopyId | None = None  # the copy that it is made for
    places: tuple[dict[str, str], ...] = ()  # segments of topology, from one of which it must be reachable


class Planner:
    def __init__(
        self,
        *,
        repository: Repository,
        backends: Backends,
        classes: Classes,
        encryption: Encryption,
        here: Callable[[], Topology],
    ) -> None:
        """`here`: where this node is."""
        self._repository = repository
        self._backends = backends
        self._classes = classes
        self._encryption = encryption
        self._here = here

    def _volume(self, reference: str, request: CreateVolume) -> Volume:
        volume = self._repository.volume_by_name(reference) or self._repository.volume(reference)
        if volume is None or (volume.hidden and not request.hidden):
            raise NotFound("there is no such volume", subject=f"volume {reference[:100]}")
        return volume

    def origin(self, request: CreateVolume) -> Origin | None:
        if request.claim is not None:
            return self._claimed_origin(request.claim)
        if not request.source:
            return None
        name, at, snapshot_name = request.source.rpartition("@")
        if not at:
            return Origin(volume=self._volume(request.source, request))
        volume = self._volume(name, request)
        snapshot = self._repository.snapshot_by_name(volume.id, snapshot_name)
        if snapshot is None or snapshot.state is not SnapshotState.READY:
            known = [found.name for found in self._repository.snapshots(volume.id)]
            raise NotFound(
                f"there is no snapshot {snapshot_name!r}",
                subject=f"volume {volume.name}",
                hint=nearest(snapshot_name, known),
            )
        return Origin(volume=volume, snapshot=snapshot)

    def _claimed_origin(self, claim: Claim) -> Origin | None:
        kind, _, identifier = claim.source.partition(":")
        if not kind:
            return None
        if kind == "volume":
            volume = self._repository.volume(identifier)
            if volume is None:
                raise NotFound("there is no such volume to clone", subject=f"volume {identifier[:100]}")
            return Origin(volume=volume)
        snapshot = self._repository.snapshot_by_id(identifier)
        volume = self._repository.volume(snapshot.volume_id) if snapshot else None
        if snapshot is None or volume is None or snapshot.state is not SnapshotState.READY:
            raise NotFound("there is no such snapshot", subject=f"snapshot {identifier[:100]}")
        return Origin(volume=volume, snapshot=snapshot)

    def place(self, request: CreateVolume, origin: Origin | None) -> Backend:
        name = request.backend
        if origin is not None:
            if name and name != origin.volume.backend:
                raise NotSupported(
                    f"lies on backend {origin.volume.backend} and cannot be cloned to {name}",
                    subject=f"volume {origin.volume.name}",
                    hint="leave the backend out",
                )
            name = origin.volume.backend
        if request.encryption:
            self._encryption.check_name(request.encryption)
        chosen = self._class(request)
        if chosen is not None and name and name not in chosen.backends:
            raise InvalidRequest(
                f"class {chosen.name} has no backend {name}",
                subject=f"volume {request.name}",
                hint=f"its backends are: {', '.join(chosen.backends)}",
            )
        backend = choose_backend(
            self._backends,
            Needs(
                mode=request.mode,
                size=request.size or (chosen.size if chosen and origin is None else None),
                filesystem=request.filesystem,
                multi_node=request.multi_node,
                capabilities=chosen.requires if chosen else frozenset(),
                places=request.places,
                region=chosen.topology if chosen else {},
                encrypted=origin is None and bool(request.encryption or (chosen.encryption if chosen else "")),
            ),
            here=self._here(),
            name=name,
            among=chosen.backends if chosen else (),
        )
        if origin is not None:
            backend.require(Capability.SNAPSHOT if origin.snapshot else Capability.CLONE)
        return backend

    def _class(self, request: CreateVolume) -> PlacementClass | None:
        return self._classes.get(request.class_name) if request.class_name else None

    def in_class(self, request: CreateVolume, backend: Backend, origin: Origin | None) -> CreateVolume:
        """The request with what its class says and it does not, or its backend. Of a copy most is as its original."""
        chosen = self._class(request)
        request = _with(request, encryption=self._key(request, chosen, backend, origin))
        if chosen is None:
            return request if origin is None else _with(request, class_name=origin.volume.class_name)
        request = _with(request, options=chosen.options_for(backend) | request.options)
        if request.mode is VolumeMode.FILESYSTEM:
            request = _with(request, mount_options=request.mount_options or chosen.mount_options)
        if origin is not None:
            return request
        size = request.size or (_within(chosen.size, request.claim) if chosen.size else None)
        usual = chosen.filesystem_for(backend) if request.mode is VolumeMode.FILESYSTEM else ""
        request = _with(request, size=size, filesystem=request.filesystem or usual)
        if usual and request.filesystem == usual:
            request = _with(request, mkfs_options=request.mkfs_options or chosen.mkfs_options)
        return request

    def _key(
        self, request: CreateVolume, chosen: PlacementClass | None, backend: Backend, origin: Origin | None
    ) -> str:
        """A copy is encrypted where its original is, with another key if one is named."""
        if origin is None:
            return request.encryption or (chosen.encryption if chosen else "") or backend.encrypt
        if request.encryption and not origin.volume.encryption:
            raise InvalidRequest(
                "is not encrypted, and neither can its copy be",
                subject=f"volume {origin.volume.name}",
                hint="create an encrypted volume and copy the data",
            )
        return request.encryption or origin.volume.encryption

    def plan(self, request: CreateVolume, backend: Backend, origin: Origin | None) -> Volume:
        """The record of the volume to be made, everything in it checked."""
        read_options(backend.driver.VolumeOptions, request.options, subject=f"backend {backend.name}")
        check_words(request.mkfs_options, what="mkfs-options")
        check_words(request.mount_options, what="mount-options")
        block = isinstance(backend.driver, BlockDriver)
        size, filesystem = request.size, request.filesystem
        if origin is not None:
            size, filesystem = origin.fit(size=size, mode=request.mode, filesystem=filesystem)
        elif block:
            size = size or _within(DEFAULT_SIZE, request.claim)
            filesystem = filesystem or (DEFAULT_FILESYSTEM if request.mode is VolumeMode.FILESYSTEM else "")
        if request.mode is VolumeMode.BLOCK and (request.filesystem or request.mkfs_options or request.mount_options):
            raise InvalidRequest("a raw block volume has no file system", subject=f"volume {request.name}")
        if request.mkfs_options and (not block or origin is not None):
            raise InvalidRequest(
                "mkfs-options need a new file system, and none is made here", subject=f"volume {request.name}"
            )
        if filesystem:
            least = filesystems.get(filesystem).minimum_size
            if size is not None and size < least:
                raise OutOfRange(
                    f"{size} bytes are too small for {filesystem}, which needs {least}",
                    subject=f"volume {request.name}",
                )
        return Volume(
            id=new_volume_id(),
            name=request.name,
            backend=backend.name,
            state=VolumeState.CREATING,
            created=now(),
            size=size,
            mode=request.mode,
            filesystem=filesystem or None,
            mkfs_options=request.mkfs_options,
            mount_options=request.mount_options,
            ownership=request.ownership,
            options=request.options,
            labels=request.labels,
            source=request.source,
            claim=request.claim,
            ephemeral=request.ephemeral,
            class_name=request.class_name,
            encryption=request.encryption,
            hidden=request.hidden,
        )


def _within(size: int, claim: Claim | None) -> int:
    return min(size, claim.limit) if claim is not None and claim.limit else size


def _with(request: CreateVolume, **fields: object) -> CreateVolume:
    return msgspec.structs.replace(request, **fields)
