"""A thin logical volume per volume, in a thin pool that is there already; thin snapshots and clones.

Logical volumes are named by the volume's or snapshot's id and carry the tag `volumed`, and one for each word of core's
mark; nothing else in the volume group is ever touched. Thin snapshots know no parent: each can be removed without the
other.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import quote, unquote

from pydantic import Field

from volumed.driver import (
    BlockDriver,
    Capability,
    Capacity,
    CreatedVolume,
    Facts,
    Found,
    FoundSnapshot,
    Host,
    Options,
    Probe,
    SupportsCapacity,
    SupportsClone,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsImport,
    VolumeSpec,
)
from volumed.errors import BackendUnavailable, CapacityExhausted, CommandFailed, InUse, NotFound, OutOfRange
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing import crash

TAG = "volumed"
_MARK = f"{TAG}:"
_VOLUME = re.compile(r"(v[0-9a-f]{32})(_new|_old)?")
_SNAPSHOT = re.compile(r"s[0-9a-f]{32}")
_OURS = re.compile(rf"{_VOLUME.pattern}|{_SNAPSHOT.pattern}")
MAX_SIZE = 16 << 50  # lvm(8): with 4 MiB extents


class LvmOptions(Options):
    vg: str = Field(pattern=r"^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$", description="Volume group")
    thinpool: str = Field(pattern=r"^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$", description="Thin pool in it")
    full_at: float = Field(
        default=95.0, gt=0, le=100, description="Percent of the pool in use at which no more volumes are made"
    )


class _Volume(NamedTuple):
    size: int
    data_percent: float
    active: bool
    tags: tuple[str, ...]
    pool: str


class LvmDriver(BlockDriver, SupportsExpand, SupportsGroupSnapshots, SupportsClone, SupportsCapacity, SupportsImport):
    BackendOptions = LvmOptions
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SIZE, Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE}
    )

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, LvmOptions)
        self._vg, self._pool, self._full_at = options.vg, options.thinpool, options.full_at

    def probe(self) -> Probe:
        try:
            pool = self._look(self._pool)
        except CommandFailed as error:
            raise BackendUnavailable(error.stderr.strip() or error.text, subject=f"backend {self.backend}") from None
        if pool is None:
            raise BackendUnavailable(
                f"there is no thin pool {self._vg}/{self._pool}",
                subject=f"backend {self.backend}",
                hint=f"make one: lvcreate --type thin-pool -L SIZE -n {self._pool} {self._vg}",
            )
        return Probe(
            lacking={},
            facts={"vg": self._vg, "thinpool": self._pool, "pool data in use": f"{pool.data_percent:.1f} %"},
        )

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        size = self._checked(spec)
        there = self._report(self._vg)
        if spec.id not in there:
            self._check_room(there[self._pool])
            self._lvm(
                *("lvcreate", "--yes", "--thin", "--setactivationskip", "n", "--wipesignatures", "n"),
                *("--virtualsize", f"{size}b", "--name", spec.id, *_tagged(spec.mark), f"{self._vg}/{self._pool}"),
            )
            crash.point("lvm.create.made")
            self._deactivate(spec.id)
        return CreatedVolume(Handle(spec.id), self._there(Handle(spec.id)).size)

    def _checked(self, spec: VolumeSpec) -> int:
        if spec.size is None or spec.size > MAX_SIZE or spec.size <= 0:
            raise OutOfRange(
                f"a size of {spec.size} bytes cannot be made",
                subject=f"backend {self.backend}",
                hint=f"ask for at most {MAX_SIZE} bytes",
            )
        return spec.size

    def _check_room(self, pool: _Volume) -> None:
        if pool.data_percent >= self._full_at:
            raise CapacityExhausted(
                f"the thin pool {self._vg}/{self._pool} is full to {pool.data_percent:.1f} %",
                subject=f"backend {self.backend}",
                hint=f"extend it: lvextend -L +SIZE {self._vg}/{self._pool}",
            )

    def delete(self, handle: Handle) -> None:
        there = self._report(self._vg)
        for name in (handle, f"{handle}_new", f"{handle}_old"):
            if name in there:
                self._remove(name)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self._lvm_on(name, "lvremove", "--yes")

    def inspect(self, handle: Handle) -> Facts:
        found = self._there(handle)
        return Facts(size=found.size, used=int(found.size * found.data_percent / 100))

    def list(self) -> Iterable[Found]:
        there = self._report(f"@{TAG}")
        for volume_id in sorted({match[1] for name in there if (match := _VOLUME.fullmatch(name))}):
            volume = there.get(volume_id)
            mark = _marked(volume.tags) if volume else {}
            yield Found(Handle(volume_id), VolumeId(volume_id), mark, whole=volume is not None)

    def importable(self) -> Iterable[str]:
        return [name for name, found in self._report(self._vg).items() if self._is_strange(name, found)]

    def _is_strange(self, name: str, found: _Volume) -> bool:
        return found.pool == self._pool and not _OURS.fullmatch(name)

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        """A thin logical volume of the pool."""
        there = self._report(self._vg)
        if spec.id not in there:
            found = there.get(reference)
            if found is None or not self._is_strange(reference, found):
                raise NotFound(
                    f"there is nothing to import of the name {reference[:200]!r}", subject=f"backend {self.backend}"
                )
            if found.active:
                self.host.check_unheld(self._device(Handle(reference)))
                self._deactivate(reference)
            tags = _tagged(spec.mark)
            # Of an attempt that was cut short. LVM deletes after it adds: one that is named in both is lost.
            stale = [tag for tag in found.tags if tag.startswith(_MARK) and tag not in tags]
            off = [word for tag in stale for word in ("--deltag", tag)]
            self._lvm("lvchange", "--setactivationskip", "n", *off, *tags, f"{self._vg}/{reference}")
            crash.point("lvm.adopt.tagged")
            self._lvm("lvrename", self._vg, reference, spec.id)
        return CreatedVolume(Handle(spec.id), self._there(Handle(spec.id)).size)

    # Devices
    def map(self, handle: Handle) -> Path:
        self._lvm_on(handle, "lvchange", "--activate", "y", "--ignoreactivationskip")
        self.host.run(["udevadm", "settle"], timeout=30.0, check=False)
        return self._device(handle)

    def unmap(self, handle: Handle) -> None:
        with contextlib.suppress(NotFound):
            self._deactivate(handle)

    def _deactivate(self, name: str) -> None:
        self._lvm_on(name, "lvchange", "--activate", "n")

    def mapped(self, handle: Handle) -> Path | None:
        found = self._look(handle)
        return self._device(handle) if found is not None and found.active else None

    def mappings(self) -> Mapping[VolumeId, Path]:
        return {
            VolumeId(name): self._device(Handle(name))
            for name, found in self._report(f"@{TAG}").items()
            if found.active and _VOLUME.fullmatch(name)
        }

    def _device(self, handle: Handle) -> Path:
        return Path("/dev") / self._vg / handle

    def expand(self, handle: Handle, size: int) -> int:
        if self._there(handle).size < size:
            self._lvm("lvextend", "--size", f"{size}b", f"{self._vg}/{handle}")
        return self._there(handle).size

    # Copies
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        self._copy(handle, snapshot_id)
        return Handle(snapshot_id)

    def _copy(self, source: str, target: str, mark: Mapping[str, str] | None = None) -> None:
        there = self._report(self._vg)
        if target in there:
            return
        if source not in there:
            raise self._gone(source)
        self._check_room(there[self._pool])
        self._lvm(
            *("lvcreate", "--yes", "--snapshot", "--setactivationskip", "n", "--name", target),
            *(*_tagged(mark or {}), f"{self._vg}/{source}"),
        )
        crash.point("lvm.copy.made")
        self._deactivate(target)

    def delete_snapshot(self, snapshot: Handle) -> None:
        self._remove(snapshot)

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        for name in sorted(self._report(f"@{TAG}")):
            if _SNAPSHOT.fullmatch(name):
                yield FoundSnapshot(Handle(name), SnapshotId(name))

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """The new state is made beside the old one, takes its name, and only then the old one goes."""
        new, old = f"{handle}_new", f"{handle}_old"
        there = self._report(self._vg)
        if handle in there:
            size = there[handle].size
            for left in (old, new):
                if left in there:
                    self._remove(left)
            self._copy(snapshot, new, _marked(there[handle].tags))
            if self._there(Handle(new)).size < size:
                self._lvm("lvextend", "--size", f"{size}b", f"{self._vg}/{new}")
            crash.point("lvm.restore.new")
            self._deactivate(handle)
            self._lvm("lvrename", self._vg, handle, old)
            crash.point("lvm.restore.old")
        if handle in there or new in there:
            self._lvm("lvrename", self._vg, new, handle)
        crash.point("lvm.restore.renamed")
        self._remove(old)

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._create_copy(snapshot, spec)

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._create_copy(source, spec)

    def _create_copy(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        size = self._checked(spec)
        least = self._there(source).size
        if size < least:
            raise OutOfRange(f"{least} bytes do not fit into {size}", subject=f"backend {self.backend}")
        self._copy(source, spec.id, spec.mark)
        return CreatedVolume(Handle(spec.id), self.expand(Handle(spec.id), size))

    def capacity(self) -> Capacity:
        pool = self._report(f"{self._vg}/{self._pool}")[self._pool]
        return Capacity(total=pool.size, available=int(pool.size * (100 - pool.data_percent) / 100))

    # Reading
    def _there(self, handle: Handle) -> _Volume:
        found = self._look(handle)
        if found is None:
            raise self._gone(handle)
        return found

    def _gone(self, name: str) -> NotFound:
        return NotFound(f"{self._vg}/{name} is gone", subject=f"backend {self.backend}")

    def _look(self, name: str) -> _Volume | None:
        return self._report("--select", f"lv_name={name}", self._vg).get(name)

    def _report(self, *what: str) -> dict[str, _Volume]:
        """Logical volumes of our group, by name."""
        columns = "vg_name,lv_name,lv_size,data_percent,lv_active,lv_tags,pool_lv"
        told = self._lvm("lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", columns, *what)
        rows = json.loads(told)["report"][0]["lv"]
        return {
            row["lv_name"]: _Volume(
                size=int(row["lv_size"]),
                data_percent=float(row["data_percent"] or 0),
                active=row["lv_active"] == "active",
                tags=tuple(row["lv_tags"].split(",")),
                pool=row["pool_lv"],
            )
            for row in rows
            if row["vg_name"] == self._vg
        }

    def _lvm_on(self, name: str, *words: str) -> None:
        """A command on one logical volume. Raises NotFound, InUse."""
        try:
            self._lvm(*words, f"{self._vg}/{name}")
        except CommandFailed as error:
            if "Failed to find logical volume" in error.stderr:
                raise self._gone(name) from None
            if "in use" in error.stderr or "open" in error.stderr:
                raise InUse(
                    "is held by", holders=["a mount or a process that has it open"], subject=f"{self._vg}/{name}"
                ) from None
            raise

    def _lvm(self, *words: str) -> str:
        return self.host.run(list(words), timeout=120.0).stdout


def _tagged(mark: Mapping[str, str]) -> list[str]:
    """The options that tag a new logical volume. A tag takes letters, digits and few signs (lvm(8)): the rest is
    written as %XX with `=` for `%`."""
    words = ["--addtag", TAG]
    for key, value in mark.items():
        quoted = quote(value, safe="").replace("~", "%7E").replace("%", "=")
        words += ["--addtag", f"{_MARK}{key}={quoted}"]
    return words


def _marked(tags: Iterable[str]) -> dict[str, str]:
    pairs = (tag.removeprefix(_MARK).partition("=") for tag in tags if tag.startswith(_MARK))
    return {key: unquote(value.replace("=", "%")) for key, _, value in pairs}
