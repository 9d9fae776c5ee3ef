"""A driver whose storage is this process's memory (and a scratch folder for what is mounted).

A real driver under the same suite as all others, and what core's tests run on; not for anybody's data.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from volumed.driver import (
    Capability,
    Capacity,
    CreatedVolume,
    Facts,
    FilesystemDriver,
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
    SupportsModify,
    VolumeSpec,
)
from volumed.errors import NotFound, VolumedError
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing.attached import AttachedToMachines, FencedMachines

TOTAL = 1 << 50


class MemoryOptions(Options):
    color: str = "blue"


@dataclass
class _Held:
    tree: Path
    size: int | None
    color: str = "blue"
    mark: Mapping[str, str] = field(default_factory=dict)


@dataclass
class MemoryStorage:
    """What outlives a driver instance, as a disk would."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="volumed-memory-")))
    volumes: dict[Handle, _Held] = field(default_factory=dict)
    snapshots: dict[Handle, _Held] = field(default_factory=dict)
    strangers: dict[str, Path] = field(default_factory=dict)  # trees that somebody else made

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class MemoryDriver(
    FilesystemDriver,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsModify,
    SupportsClone,
    SupportsCapacity,
    SupportsImport,
):
    """`before(method)` is called first in every method: a test makes it wait, count or raise."""

    VolumeOptions = MemoryOptions
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE, Capability.MULTI_NODE}
    )
    mutable: ClassVar[frozenset[str]] = frozenset({"color"})

    def __init__(self, backend: str, options: Options, host: Host, storage: MemoryStorage | None = None) -> None:
        super().__init__(backend, options, host)
        self.storage = storage or MemoryStorage()
        self.before: Callable[[str], None] = lambda method: None
        self._lock = threading.Lock()

    def fail(self, method: str, error: VolumedError) -> None:
        """Every call of `method` raises from now on."""

        def before(called: str) -> None:
            if called == method:
                raise error

        self.before = before

    def heal(self) -> None:
        self.before = lambda method: None

    def probe(self) -> Probe:
        self.before("probe")
        return Probe(lacking={}, facts={"kind": "memory"})

    def create(self, spec: VolumeSpec) -> CreatedVolume:
        self.before("create")
        return self._made(spec, None)

    def _made(self, spec: VolumeSpec, source: Path | None) -> CreatedVolume:
        handle = Handle(f"memory:{spec.id}")
        with self._lock:
            if handle not in self.storage.volumes:
                self.storage.volumes[handle] = _Held(self._tree(spec.id, source), spec.size, mark=dict(spec.mark))
            return CreatedVolume(handle, self.storage.volumes[handle].size)

    def _tree(self, name: str, source: Path | None) -> Path:
        tree = self.storage.folder / name
        if source is None:
            tree.mkdir(exist_ok=True)
        else:
            shutil.copytree(source, tree, symlinks=True)
        return tree

    def delete(self, handle: Handle) -> None:
        self.before("delete")
        with self._lock:
            held = self.storage.volumes.pop(handle, None)
        if held is not None:
            shutil.rmtree(held.tree)

    def inspect(self, handle: Handle) -> Facts:
        self.before("inspect")
        held = self._volume(handle)
        used = sum(path.stat().st_size for path in held.tree.rglob("*") if path.is_file())
        return Facts(size=held.size, used=used)

    def _volume(self, handle: Handle) -> _Held:
        try:
            return self.storage.volumes[handle]
        except KeyError:
            raise NotFound("is gone", subject=f"memory {handle}") from None

    def list(self) -> Iterable[Found]:
        self.before("list")
        return [
            Found(handle, VolumeId(handle.removeprefix("memory:")), held.mark)
            for handle, held in list(self.storage.volumes.items())
        ]

    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        self.before("mount")
        self.host.bind(self._volume(handle).tree, target, readonly=readonly)

    def unmount(self, handle: Handle, target: Path) -> None:
        self.before("unmount")
        self.host.unmount(target)

    def expand(self, handle: Handle, size: int) -> int:
        self.before("expand")
        held = self._volume(handle)
        held.size = max(size, held.size or 0)
        return held.size

    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        self.before("snapshot")
        name = Handle(f"memory:{snapshot_id}")
        with self._lock:
            if name not in self.storage.snapshots:
                held = self._volume(handle)
                self.storage.snapshots[name] = _Held(self._tree(snapshot_id, held.tree), held.size)
        return name

    def delete_snapshot(self, snapshot: Handle) -> None:
        self.before("delete_snapshot")
        with self._lock:
            held = self.storage.snapshots.pop(snapshot, None)
        if held is not None:
            shutil.rmtree(held.tree)

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        self.before("list_snapshots")
        return [FoundSnapshot(name, SnapshotId(name.removeprefix("memory:"))) for name in list(self.storage.snapshots)]

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        self.before("restore")
        tree, source = self._volume(handle).tree, self._snapshot(snapshot).tree
        for path in list(tree.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(source, tree, symlinks=True, dirs_exist_ok=True)

    def _snapshot(self, snapshot: Handle) -> _Held:
        try:
            return self.storage.snapshots[snapshot]
        except KeyError:
            raise NotFound("is gone", subject=f"memory {snapshot}") from None

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        self.before("create_from_snapshot")
        return self._made(spec, self._snapshot(snapshot).tree)

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        self.before("clone")
        return self._made(spec, self._volume(source).tree)

    def importable(self) -> Iterable[str]:
        self.before("importable")
        return list(self.storage.strangers)

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        self.before("adopt")
        handle = Handle(f"memory:{spec.id}")
        with self._lock:
            if handle not in self.storage.volumes:
                tree = self.storage.strangers.pop(reference, None)
                if tree is None:
                    raise NotFound(f"there is nothing to import of the name {reference!r}", subject=self.backend)
                self.storage.volumes[handle] = _Held(tree, spec.size, mark=dict(spec.mark))
        return CreatedVolume(handle, None)

    def modify(self, handle: Handle, options: Options) -> None:
        self.before("modify")
        assert isinstance(options, MemoryOptions)
        self._volume(handle).color = options.color

    def capacity(self) -> Capacity:
        self.before("capacity")
        return Capacity(total=TOTAL, available=TOTAL)


class AttachedMemoryDriver(AttachedToMachines, MemoryDriver):
    """Memory that a machine must have attached before it can mount it."""

    def attachments_folder(self) -> Path:
        return self.storage.folder / "attached"

    def attach(self, handle: Handle, machine: str) -> None:
        self.before("attach")
        super().attach(handle, machine)

    def detach(self, handle: Handle, machine: str, *, force: bool = False) -> None:
        self.before("detach")
        super().detach(handle, machine, force=force)


class FencedMemoryDriver(FencedMachines, AttachedMemoryDriver):
    """... and from which a machine can be cut off."""
