"""A folder per volume on a file system that is there already.

    PATH/<volume id>/data       what containers see
    PATH/<volume id>/project    number of its XFS project, where a size is enforced
    PATH/.new-..., .trash-...   one in the making, one on its way out

A size is enforced by the project quota of XFS; elsewhere it is refused, never ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar
from zlib import crc32

from pydantic import Field

from volumed.driver import (
    Capability,
    Capacity,
    CreatedVolume,
    Facts,
    FilesystemDriver,
    Found,
    Host,
    Options,
    Probe,
    SupportsCapacity,
    SupportsExpand,
    SupportsImport,
    VolumeSpec,
)
from volumed.errors import InvalidRequest, MountFailed, NotFound, NotSupported
from volumed.model import Handle, VolumeId
from volumed.testing import crash
from volumed_drivers.folders import capacity_of, make_folder, read_mark, stranger, strangers, sync_folder, write_mark

_VOLUME_ID = re.compile(r"v[0-9a-f]{32}")
_NEW, _TRASH = ".new-", ".trash-"
REMOVE_TIMEOUT = 580.0


class DirectoryOptions(Options):
    path: Path = Field(description="Folder that holds the volumes; made if it is missing")
    advisory_size: bool = Field(
        default=False,
        description="Take a size where none can be enforced: it is kept and shown, and bounds nothing",
    )
    shared: bool = Field(
        default=False, description="Every node mounts this storage at the same path, so volumes are not bound to one"
    )


class DirectoryDriver(FilesystemDriver, SupportsExpand, SupportsCapacity, SupportsImport):
    BackendOptions = DirectoryOptions
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.SIZE, Capability.MULTI_NODE})

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, DirectoryOptions)
        self._path = options.path
        self._advisory = options.advisory_size
        self._shared = options.shared
        self._quota = False
        self._projects = threading.Lock()  # a number must not be taken twice between looking and taking

    def probe(self) -> Probe:
        make_folder(self._path, mode=0o711, backend=self.backend)
        self._quota = self.host.project_quota_supported(self._path)
        lacking: dict[Capability, str] = {}
        if not self._shared:
            lacking[Capability.MULTI_NODE] = f"{self._path} belongs to this node alone (shared = true says otherwise)"
        if not self._quota and not self._advisory:
            reason = (
                f"no size can be enforced on {self._path}: it needs XFS mounted with prjquota; "
                "leave the size out, use a backend of driver image or btrfs, or set advisory-size"
            )
            lacking |= {Capability.SIZE: reason, Capability.EXPAND: reason}
        sizes = "enforced" if self._quota else "advisory" if self._advisory else "refused"
        return Probe(lacking=lacking, facts={"path": str(self._path), "sizes": sizes})

    def create(self, spec: VolumeSpec) -> CreatedVolume:
        if spec.size is not None and not self._quota and not self._advisory:
            raise NotSupported(
                "a size cannot be enforced here",
                subject=f"backend {self.backend}",
                hint="leave the size out, or use a backend of driver image or btrfs",
            )
        folder = self._path / spec.id
        if not folder.exists():
            new = self._path / f"{_NEW}{spec.id}"
            new.mkdir(mode=0o700, exist_ok=True)
            crash.point("directory.create.folder")
            data = new / "data"
            data.mkdir(exist_ok=True)
            data.chmod(0o755)  # whatever the umask says: users of a container must get in
            if spec.size is not None and self._quota:
                self._bound(new, spec.size)
            crash.point("directory.create.data")
            self._publish(new, folder, spec)
        return CreatedVolume(Handle(spec.id), spec.size)

    def _publish(self, new: Path, folder: Path, spec: VolumeSpec) -> None:
        """Whole from one instant on; and as the last change is the parent's, one sync of it covers all before."""
        write_mark(new, spec.mark)
        new.rename(folder)
        sync_folder(self._path)

    def importable(self) -> Iterable[str]:
        return [found.name for found in strangers(self._path, _VOLUME_ID) if found.is_dir()]

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        folder, new = self._path / spec.id, self._path / f"{_NEW}{spec.id}"
        if not folder.exists():
            if not (new / "data").exists():
                found = stranger(self._path, reference, _VOLUME_ID, backend=self.backend)
                if not found.is_dir():
                    raise InvalidRequest(f"{found} is not a folder", subject=f"backend {self.backend}")
                new.mkdir(mode=0o700, exist_ok=True)
                crash.point("directory.adopt.folder")
                found.rename(new / "data")
                crash.point("directory.adopt.moved")
            self._publish(new, folder, spec)
        return CreatedVolume(Handle(spec.id), None)

    def _bound(self, folder: Path, size: int) -> None:
        with self._projects:
            project = self._project(folder)
            if project is None:
                project = crc32(folder.name.encode()) or 1
                while self.host.project_limit(self._path, project=project):
                    project = project % 0xFFFFFFFE + 1
                (folder / "project").write_text(f"{project}\n")
            self.host.set_project_quota(folder / "data", project=project, limit=size)

    @staticmethod
    def _project(folder: Path) -> int | None:
        try:
            return int((folder / "project").read_text())
        except (FileNotFoundError, ValueError):  # half written: another number is as good
            return None

    def delete(self, handle: Handle) -> None:
        trash = self._path / f"{_TRASH}{handle}"
        for folder in (self._path / handle, self._path / f"{_NEW}{handle}"):
            with contextlib.suppress(FileNotFoundError):
                folder.rename(trash)
                crash.point("directory.delete.trashed")
        if not trash.exists():
            return
        project = self._project(trash)
        self._remove_tree(trash)
        if project is not None and self._quota:
            self.host.clear_project_quota(self._path, project=project)
        sync_folder(self._path)

    def _remove_tree(self, trash: Path) -> None:
        """An empty volume costs two system calls; a full one is left to rm(1), which knows deep and large trees,
        other file systems mounted inside, and what else the years have taught it."""
        try:
            (trash / "data").rmdir()
            trash.rmdir()
        except OSError:
            remove: list[str | Path] = ["rm", "-rf", "--one-file-system", "--", trash]
            if self.host.run(remove, timeout=REMOVE_TIMEOUT, check=False).returncode:
                # Something immutable may be in it. chattr(1) says failure for all that can have no flags, too.
                self.host.run(["chattr", "-R", "-f", "-ia", trash], timeout=REMOVE_TIMEOUT, check=False)
                self.host.run(remove, timeout=REMOVE_TIMEOUT)

    def inspect(self, handle: Handle) -> Facts:
        folder = self._path / handle
        if not (folder / "data").is_dir():
            raise NotFound(f"{folder} is gone", subject=f"backend {self.backend}")
        project = self._project(folder)
        if project is None or not self._quota:
            return Facts(size=None, used=None)
        return Facts(
            size=self.host.project_limit(folder, project=project) or None,
            used=self.host.project_usage(folder, project=project),
        )

    def list(self) -> Iterable[Found]:
        for name in os.listdir(self._path):  # noqa: PTH208 (names are enough)
            volume_id = name.removeprefix(_TRASH).removeprefix(_NEW)
            if _VOLUME_ID.fullmatch(volume_id):
                yield Found(
                    Handle(volume_id), VolumeId(volume_id), read_mark(self._path / name), whole=name == volume_id
                )

    def find(self, volume_id: VolumeId) -> Handle | None:
        there = any((self._path / f"{prefix}{volume_id}").exists() for prefix in ("", _NEW, _TRASH))
        return Handle(volume_id) if there else None

    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        data = self._path / handle / "data"
        try:
            self.host.bind(data, target, readonly=readonly, options=options)
        except MountFailed:
            if data.is_dir():
                raise
            raise NotFound(
                f"its folder {data} is gone", subject=f"backend {self.backend}", hint="put it back from a backup"
            ) from None

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        data = (self._path / handle / "data").resolve()  # an operator may have put a link there
        return self.host.is_same(data, target)

    def expand(self, handle: Handle, size: int) -> int:
        folder = self._path / handle
        project = self._project(folder)
        if project is None and self._advisory:
            return size
        if project is None:
            raise NotSupported("was made without a size", subject=f"backend {self.backend}")
        there = self.host.project_limit(folder, project=project)
        if there < size:
            self.host.set_project_quota(folder / "data", project=project, limit=size)
        return max(there, size)

    def capacity(self) -> Capacity:
        return capacity_of(self._path)
