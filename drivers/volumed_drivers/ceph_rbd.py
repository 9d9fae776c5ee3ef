"""An RBD image of a Ceph pool per volume, mapped by the kernel, rbd-nbd or qemu-storage-daemon; snapshots and clones.

Images are named by the volume's id, snapshots by theirs, and nothing else in the pool is touched. An image is mapped by
one node at a time: others are refused while its client watches it. A clone reads from its parent until the cluster's
manager has copied what it needs; a parent that is deleted waits for that in the pool's trash.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from volumed.driver import (
    BlockDriver,
    Capability,
    Capacity,
    CreatedVolume,
    Driver,
    Extent,
    Facts,
    Found,
    FoundSnapshot,
    Holder,
    Host,
    Options,
    Probe,
    SupportsCapacity,
    SupportsChangedBlocks,
    SupportsClone,
    SupportsExpand,
    SupportsFencing,
    SupportsGroupSnapshots,
    SupportsImport,
    SupportsNativeCopy,
    Tell,
    VolumeSpec,
)
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    InvalidRequest,
    NotFound,
    NotSupported,
    OutOfRange,
    PermissionDenied,
    VolumedError,
)
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing import crash
from volumed_drivers import rbd_flatten
from volumed_drivers.ceph import CephOptions, Cluster
from volumed_drivers.rbd_mapping import MAPPERS, Mapper

_log = logging.getLogger(__name__)

_VOLUME = re.compile(r"v[0-9a-f]{32}")
_SNAPSHOT = re.compile(r"(v[0-9a-f]{32})@(s[0-9a-f]{32})")
ALIGNMENT = 4096  # sectors of the loop device that qemu-storage-daemon's file is in
MAX_SIZE = 256_000_000 << 22  # what a map of objects of 4 MiB can hold (librbd, cls::rbd::MAX_OBJECT_MAP_OBJECT_COUNT)
LONG = 580.0  # seconds, for what takes as long as an image is large
# A fenced client must not come back, however long its machine hangs.
FENCED = 10 * 365 * 24 * 3600
_FEATURES = {"layering": 1, "striping": 2, "exclusive-lock": 4, "object-map": 8, "fast-diff": 16, "deep-flatten": 32}
_NEEDS = {"object-map": "exclusive-lock", "fast-diff": "object-map"}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class RbdOptions(CephOptions):
    pool: str = Field(pattern=_NAME, description="Pool of the images; it exists, and has the application `rbd`")
    namespace: str = Field(default="", pattern=f"^$|{_NAME}", description="Namespace within the pool; it exists")
    data_pool: str = Field(
        default="", pattern=f"^$|{_NAME}", description="Pool of the images' data, an erasure-coded one for example"
    )
    features: str = Field(
        default="layering,exclusive-lock,object-map,fast-diff,deep-flatten",
        description="Features of new images, with commas between",
    )
    map_with: str = Field(
        default="auto",
        pattern="^(auto|krbd|nbd|qsd)$",
        description="What maps the images: `krbd` (the kernel), `nbd` (rbd-nbd), `qsd` (qemu-storage-daemon); `auto`: "
        "the first of these that this machine has",
    )

    @field_validator("features")
    @classmethod
    def _known(cls, text: str) -> str:
        names = {name.strip() for name in text.split(",") if name.strip()}
        if unknown := names - set(_FEATURES):
            raise ValueError(f"{', '.join(sorted(unknown))}: not among {', '.join(_FEATURES)}")
        if "layering" not in names:
            raise ValueError("layering is needed for clones")
        for name, needed in _NEEDS.items():
            if name in names and needed not in names:
                raise ValueError(f"{name} needs {needed}")
        return text


class RbdVolumeOptions(Options):
    data_pool: str | None = Field(default=None, pattern=_NAME, description="Pool of its data; default: the backend's")


class CephRbdDriver(
    BlockDriver,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsChangedBlocks,
    SupportsClone,
    SupportsCapacity,
    SupportsFencing,
    SupportsImport,
    SupportsNativeCopy,
):
    BackendOptions = RbdOptions
    VolumeOptions = RbdVolumeOptions
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SIZE, Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE, Capability.MULTI_NODE}
    )

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, RbdOptions)
        self._options = options
        self._cluster = Cluster(host, options, backend=backend)
        self._subject = f"backend {backend}"
        self._where = (options.pool, options.namespace)
        self._features = sum(_FEATURES[name.strip()] for name in options.features.split(",") if name.strip())
        self._mappers = {
            name: kind(host, self._cluster, pool=options.pool, namespace=options.namespace)
            for name, kind in MAPPERS.items()
        }
        self._mapper: Mapper | None = None
        self._node = socket.gethostname()

    def _call(self, function: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        return self._cluster.call(f"rbd_images.{function}", timeout=timeout, where=self._where, **arguments)

    def probe(self) -> Probe:
        mapper, reasons = self._choose_mapper()
        try:
            facts: dict[str, str] = self._call("look")
            if self._options.data_pool:
                self._cluster.call("rbd_images.capacity", pool=self._options.data_pool)
        except NotFound as error:
            raise BackendUnavailable(error.text, subject=error.subject, hint=error.hint) from None
        self._empty_trash()
        shown = {
            "pool": "/".join(part for part in self._where if part),
            "user": self._options.user,
            "map-with": mapper.name,
        }
        return Probe(lacking={}, facts={**shown, **facts, **reasons})

    def _choose_mapper(self) -> tuple[Mapper, dict[str, str]]:
        """Raises BackendUnavailable, ConfigError for one that was asked for by name."""
        wanted = list(self._mappers) if self._options.map_with == "auto" else [self._options.map_with]
        reasons: dict[str, str] = {}
        for name in wanted:
            reason = self._mappers[name].lacking()
            if not reason:
                self._mapper = self._mappers[name]
                return self._mapper, {f"not {other}": why for other, why in reasons.items()}
            reasons[name] = reason
        kind = ConfigError if len(wanted) == 1 else BackendUnavailable
        raise kind(
            f"nothing here can map an image: {'; '.join(reasons.values())}",
            subject=self._subject,
            hint="install rbd-nbd, or qemu-utils and qemu-block-extra",
        )

    def _empty_trash(self) -> None:
        """What keeps a parent in the trash is asked to let go of it; again, should the manager have forgotten."""
        try:
            holding, kept = self._call("purge", pattern=_VOLUME.pattern, timeout=LONG)
            if kept:
                _log.warning("backend %s: its trash keeps what could go: %s", self.backend, "; ".join(kept))
            self._cluster.call("rbd_images.flatten", images=holding)
        except VolumedError as error:  # it costs room, and nothing else
            _log.warning("backend %s: its trash keeps what could go: %s", self.backend, error)

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        size = self._checked(spec)
        size = self._call("create", image=spec.id, size=size, features=self._features, data_pool=self._data_pool(spec))
        crash.point("ceph-rbd.create.made")
        self._mark(spec)
        return CreatedVolume(Handle(spec.id), size)

    def _checked(self, spec: VolumeSpec) -> int:
        if spec.size is None or not 0 < spec.size <= MAX_SIZE:
            raise OutOfRange(
                f"a size of {spec.size} bytes cannot be made",
                subject=self._subject,
                hint=f"ask for at most {MAX_SIZE} bytes",
            )
        return -(-spec.size // ALIGNMENT) * ALIGNMENT

    def _data_pool(self, spec: VolumeSpec) -> str:
        assert isinstance(spec.options, RbdVolumeOptions)
        return spec.options.data_pool or self._options.data_pool

    def _mark(self, spec: VolumeSpec) -> None:
        text = json.dumps({"id": spec.id, "mark": dict(spec.mark)})
        self._call("mark", image=spec.id, text=text)

    def delete(self, handle: Handle) -> None:
        children = self._call("remove", image=handle, own=self._own(handle))
        crash.point("ceph-rbd.delete.removed")
        if children:
            self._empty_trash()

    def inspect(self, handle: Handle) -> Facts:
        size, used = self._call("inspect", image=handle)
        return Facts(size=size, used=used)

    def list(self) -> Iterable[Found]:
        images = self._images()
        marks = self._call("marks", images=images, timeout=LONG)
        for image in images:
            if image in marks:
                mark = marks[image]
                yield Found(Handle(image), VolumeId(image), mark or {}, whole=mark is not None)

    def _images(self) -> Sequence[str]:
        return sorted(name for name in self._call("names") if _VOLUME.fullmatch(name))

    def find(self, volume_id: VolumeId) -> Handle | None:
        return Handle(volume_id) if self._call("exists", image=volume_id) else None

    def expand(self, handle: Handle, size: int) -> int:
        if size > MAX_SIZE:
            raise OutOfRange(f"{size} bytes are too many", subject=self._subject)
        size = self._call("resize", image=handle, size=-(-size // ALIGNMENT) * ALIGNMENT)
        for mapper in self._mappers.values():
            mapper.grow(handle, size)
        return size

    def capacity(self) -> Capacity:
        pool = self._options.data_pool or self._options.pool
        total, available = self._cluster.call("rbd_images.capacity", pool=pool)
        return Capacity(total=total, available=available)

    # Devices
    def map(self, handle: Handle) -> Path:
        device = self.mapped(handle)
        if device is not None:
            return device
        mapper = self._mapper or self._choose_mapper()[0]
        asked = {"where": self._where, "image": handle, "node": self._node, "own": self._own(handle)}
        with self._cluster.session() as ask:
            ask("rbd_watchers.begin_mapping", patience=self._options.timeout, **asked)
            try:
                device = mapper.map(handle, ask)
            except BaseException:
                with contextlib.suppress(VolumedError):  # the right to map it ends by itself
                    ask("rbd_watchers.end_mapping", mapped=False, **asked)
                raise
            ask("rbd_watchers.end_mapping", mapped=True, **asked)
        return device

    def _own(self, handle: Handle) -> str:
        """What marks a mapping as this daemon's, and nobody else's in the world. Empty while there is one: those that
        are seen on the cluster beside it are not known to be dead."""
        if self.mapped(handle) is not None:
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/mnt').st_ino} {self.host.private_folder('rbd')}"  # noqa: PTH116

    def unmap(self, handle: Handle) -> None:
        for mapper in self._mappers.values():
            mapper.unmap(handle)

    def mapped(self, handle: Handle) -> Path | None:
        return next((found for mapper in self._mappers.values() if (found := mapper.find(handle))), None)

    def mappings(self) -> Mapping[VolumeId, Path]:
        return {
            VolumeId(image): device
            for mapper in self._mappers.values()
            for image, device in mapper.all().items()
            if _VOLUME.fullmatch(image)
        }

    # Copies
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        self._call("snapshot", image=handle, name=snapshot_id)
        return Handle(f"{handle}@{snapshot_id}")

    def delete_snapshot(self, snapshot: Handle) -> None:
        image, _, name = snapshot.partition("@")
        self._call("remove_snapshot", image=image, name=name, timeout=LONG)

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        for told in self._call("snapshots", images=self._images(), timeout=LONG):
            if found := _SNAPSHOT.fullmatch(told):
                yield FoundSnapshot(Handle(told), SnapshotId(found[2]))

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """The snapshot stays whatever happens, so a half restored image is put back again."""
        name = snapshot.partition("@")[2]
        size = self._call("begin_restore", image=handle, name=name, own=self._own(handle))
        crash.point("ceph-rbd.restore.begun")
        self._call("roll_back", image=handle, name=name, timeout=LONG)
        crash.point("ceph-rbd.restore.rolled-back")
        self._call("end_restore", image=handle, size=size)

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        image, _, name = snapshot.partition("@")
        return self._copy(image, name, spec)

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        """By a snapshot of its own, which the clone keeps in the trash of the source from then on."""
        internal = f"volumed-clone-{spec.id}"
        if self.find(spec.id) is None:
            self._check_fits(source, spec, self)
            self._call("forget_internal", image=source)
            self._call("snapshot", image=source, name=internal)
            crash.point("ceph-rbd.clone.snapshot")
        made = self._copy(source, internal, spec)
        self._call("forget_internal", image=source)
        return made

    def _check_fits(self, image: str, spec: VolumeSpec, origin: CephRbdDriver) -> None:
        size, least = self._checked(spec), origin._call("size", image=image)
        if size < least:
            raise OutOfRange(f"{least} bytes do not fit into {size}", subject=self._subject)

    def _copy(self, image: str, name: str, spec: VolumeSpec, origin: CephRbdDriver | None = None) -> CreatedVolume:
        if self.find(spec.id) is None:
            size = self._checked(spec)
            self._call(
                "clone",
                origin=(origin or self)._where,
                image=image,
                name=name,
                copy=spec.id,
                size=size,
                features=self._features,
                data_pool=self._data_pool(spec),
            )
            crash.point("ceph-rbd.clone.made")
        size = self.expand(Handle(spec.id), self._checked(spec))
        self._mark(spec)
        return CreatedVolume(Handle(spec.id), size)

    # Moves
    def way_from(self, source: Driver) -> str:
        if not isinstance(source, CephRbdDriver):
            raise NotSupported("Ceph clones images of its own alone", subject=self._subject)
        here, there = self._call("look")["cluster"], source._call("look")["cluster"]
        if here != there:
            raise NotSupported(f"the images lie on two clusters, {there} and {here}", subject=self._subject)
        pool = "/".join(part for part in source._where if part)
        try:
            self._cluster.call("rbd_images.look", where=source._where)
        except (PermissionDenied, NotFound) as error:
            raise NotSupported(
                f"client.{self._options.user} cannot read pool {pool}: {error.text}",
                subject=self._subject,
                hint=f"allow it `osd 'profile rbd-read-only pool={source._options.pool}'`",
            ) from None
        return "a clone, which the cluster's manager then makes independent (flatten)"

    def take_from(self, source: Driver, handle: Handle, spec: VolumeSpec, tell: Tell) -> CreatedVolume:
        """The snapshot goes to the trash of the source while the clone reads from it, and with that from there."""
        self.way_from(source)
        assert isinstance(source, CephRbdDriver)
        self._check_fits(handle, spec, source)
        internal = f"volumed-clone-{spec.id}"
        if self.find(spec.id) is None:
            source._call("snapshot", image=handle, name=internal)
            crash.point("native.ceph-rbd.snapshot")
        made = self._copy(handle, internal, spec, source)
        source._call("remove_snapshot", image=handle, name=internal, timeout=LONG)
        crash.point("native.ceph-rbd.cloned")
        ask = functools.partial(self._cluster.call, where=self._where, image=spec.id)
        rbd_flatten.wait(ask, source.inspect(handle).used or 0, tell)
        return made

    def allocated(self, snapshot: Handle) -> Iterable[Extent]:
        return self._extents(snapshot, None)

    def changed(self, base: Handle, target: Handle) -> Iterable[Extent]:
        return self._extents(target, base.partition("@")[2])

    def _extents(self, snapshot: Handle, base: str | None) -> Iterable[Extent]:
        image, _, name = snapshot.partition("@")
        return [Extent(*run) for run in self._call("extents", image=image, name=name, base=base, timeout=LONG)]

    # What others made, and who has it
    def importable(self) -> Iterable[str]:
        return [name for name in self._call("names") if not _VOLUME.fullmatch(name)]

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        self._call("adopt", reference=reference, image=spec.id)
        crash.point("ceph-rbd.adopt.renamed")
        self._mark(spec)
        size = self._call("size", image=spec.id)
        return CreatedVolume(Handle(spec.id), self.expand(Handle(spec.id), max(size, spec.size or 0)))

    def holders(self, handle: Handle) -> Sequence[Holder]:
        here = self.mapped(handle) is not None
        return [
            Holder(told["address"], told["node"], here and told["node"] == self._node, told["text"])
            for told in self._cluster.call("rbd_watchers.holders", where=self._where, image=handle)
        ]

    def fence(self, handle: Handle, holder: Holder) -> None:
        if holder.ours:
            raise InvalidRequest("is this very node", subject=f"holder {holder.text}", hint="unmap it instead")
        self._cluster.call("rbd_watchers.fence", address=holder.id, seconds=FENCED)
