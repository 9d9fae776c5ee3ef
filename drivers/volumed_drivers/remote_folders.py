"""A folder per volume on a tree behind a server: what `nfs` and `gluster` have in common.

    <id>/data                   what containers see
    <id>/mark                   what core wants to read again, as JSON
    .new-<id>, .trash-<id>      one in the making, one on its way out

No client can bound a folder on such a server: a size is enforced where an operator's command can tell the server to
(`quota-command`), elsewhere it is refused, or kept as advice.

The backend has a mount of its own of the whole tree, which no container sees. Whatever touches it is a child that is
killed at its deadline: a server that is gone keeps no thread of the daemon, and nothing of another backend.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

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
    TreeCall,
    VolumeSpec,
)
from volumed.errors import (
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    CommandFailed,
    DeadlineExceeded,
    InUse,
    MountFailed,
    NotFound,
    NotSupported,
    PermissionDenied,
    VolumedError,
)
from volumed.model import Handle, VolumeId
from volumed.testing import crash
from volumed.units import format_size

_VOLUME_ID = re.compile(r"v[0-9a-f]{32}")
_NEW, _TRASH = ".new-", ".trash-"
REMOVE_TIMEOUT, QUOTA_TIMEOUT = 580.0, 30.0
_GONE = (os.strerror(errno.ENOENT),)
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_DENIED = (os.strerror(errno.EACCES), os.strerror(errno.EPERM))
_DEAD = (os.strerror(errno.ESTALE), os.strerror(errno.ENOTCONN))


class RemoteFolderOptions(Options):
    path: str = Field(
        default="", description="Folder below it that holds the volumes; made if it is missing", pattern=r"^[^\x00\n]*$"
    )
    advisory_size: bool = Field(
        default=False,
        description="Take a size where none can be enforced: it is kept and shown, and bounds nothing",
    )
    quota_command: Path | None = Field(
        default=None,
        description="Program that bounds a folder on the server: called as PROGRAM set FOLDER BYTES, and PROGRAM clear "
        "FOLDER, where FOLDER is the path as the server knows it",
    )
    timeout: float = Field(
        default=15.0, gt=0, le=90, description="Seconds after which a server that does not answer is given up"
    )


class RemoteFolders(FilesystemDriver, SupportsExpand, SupportsCapacity):
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.SIZE, Capability.MULTI_NODE})
    remote: ClassVar[bool] = True

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, RemoteFolderOptions)
        self._advisory = options.advisory_size
        self._quota_command = options.quota_command
        self._timeout = options.timeout
        self._below = options.path.strip("/")
        self._place = host.runtime_dir / "backends" / backend
        self._attaching, self._limiting = threading.Lock(), threading.Lock()

    # What each kind has of its own
    @abstractmethod
    def _attach(self, top: Path) -> None:
        """Mount the whole tree at `top`."""

    @abstractmethod
    def _attached(self, top: Path) -> bool:
        """Whether what is mounted at `top` is that tree, by the mount table."""

    @abstractmethod
    def _detach(self, top: Path) -> None:
        """Undo `_attach`, be the server there or not."""

    @abstractmethod
    def _identity(self) -> str:
        """What makes the mount of the whole tree another one."""

    @abstractmethod
    def _server(self) -> str:
        """Which server and what of it, for errors."""

    @abstractmethod
    def _on_server(self, handle: Handle) -> str:
        """The path of a volume's tree as the server knows it."""

    # The backend's own mount
    @functools.cached_property
    def _top(self) -> Path:
        """Another server is another place: the mount table does not always tell one name of a server from another."""
        return self._place / sha256(self._identity().encode()).hexdigest()[:12]

    @property
    def _root(self) -> Path:
        return self._top / self._below if self._below else self._top

    def _ready(self) -> Path:
        """The folder of volumes, mounted. Raises BackendUnavailable, and what mounting raises."""
        with self._attaching:
            if self.host.is_mountpoint(self._top):
                if self._attached(self._top):
                    return self._root
                self._detach(self._top)  # of other settings, or dead
            self._top.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._attach(self._top)
        if self._below:
            self._call("make_folder", self._root, 0o711)
        return self._root

    def _renew(self) -> None:
        with self._attaching:
            self._detach(self._top)
        self._ready()

    def leave(self) -> None:
        for top in self._place.iterdir() if self._place.is_dir() else ():
            self._detach(top)

    def probe(self) -> Probe:
        self._measure(self._ready())
        reason = self._can_limit()
        lacking: dict[Capability, str] = {}
        if reason and not self._advisory:
            reason += "; leave the size out, use a backend of another driver, or set advisory-size"
            lacking = {Capability.SIZE: reason, Capability.EXPAND: reason}
        sizes = "refused" if lacking else "advisory" if reason else "enforced"
        return Probe(lacking=lacking, facts={"server": self._server(), "sizes": sizes, "root": self._root_fate()})

    def _root_fate(self) -> str:
        """What the server makes of root: a folder tells by its owner."""
        trial = self._root / f".trial-{os.urandom(4).hex()}"
        self._call("make_folder", trial, 0o755)
        owner = self._call("owner", trial)
        self._call("rmdir", trial)
        return "kept" if owner == 0 else f"squashed to uid {owner}: owners of files cannot be set"

    # Children that touch the tree
    def _call(self, name: TreeCall, *arguments: Path | str | int) -> Any:
        """See `Host.tree_call`. A handle that the server has forgotten is renewed, once."""
        for last in (False, True):
            try:
                return self.host.tree_call(name, *arguments, timeout=self._timeout)
            except DeadlineExceeded:
                raise self._silent() from None
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                if reason in _DEAD and not last:
                    self._renew()
                    continue
                raise self._error(reason, f"{error.filename}: {reason}") from None
        raise AssertionError

    def _silent(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self._server()} does not answer",
            subject=f"backend {self.backend}",
            hint="is the server up, and the network to it?",
        )

    def _error(self, reason: str, said: str) -> VolumedError:
        subject = f"backend {self.backend}"
        if reason in _GONE:
            return NotFound(f"{self._server()}: {said}", subject=subject)
        if reason in _FULL:
            return CapacityExhausted(f"{self._server()} is full: {reason}", subject=subject, hint="free some space")
        if reason in _DENIED:
            return PermissionDenied(
                f"{self._server()} does not let root write there: {reason}",
                subject=subject,
                hint="the server maps root to nobody (root_squash): export it with no_root_squash, "
                "or give the folder to the user that root is mapped to",
            )
        if reason == os.strerror(errno.EROFS):
            return PermissionDenied(f"{self._server()} is read-only", subject=subject, hint="export it with rw")
        if reason in _DEAD:
            return BackendUnavailable(f"{self._server()}: {reason}", subject=subject)
        return BackendError(f"{self._server()}: {said}", subject=subject)

    def _measure(self, path: Path) -> tuple[int, int, int]:
        """Bytes of the file system, or of the quota: total, used, available."""
        subject = f"backend {self.backend}"
        for last in (False, True):
            try:
                found = self.host.tree_status(path, timeout=self._timeout)
                return found.total, found.used, found.available
            except DeadlineExceeded:
                raise self._silent() from None
            except MountFailed as error:
                if error.errno == errno.ENOENT:
                    raise NotFound(
                        f"{path.relative_to(self._top)} is gone", subject=f"backend {self.backend}"
                    ) from None
                if error.errno not in (errno.ESTALE, errno.ENOTCONN) or last:
                    raise BackendUnavailable(f"{self._server()}: {error.text}", subject=subject) from None
                self._renew()
        raise AssertionError

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        reason = self._can_limit()
        if spec.size is not None and reason and not self._advisory:
            raise NotSupported(
                f"a size cannot be enforced here: {reason}",
                subject=f"backend {self.backend}",
                hint="leave the size out, or set advisory-size",
            )
        root = self._ready()
        handle = Handle(spec.id)
        if not self._there(root / spec.id):
            new = root / f"{_NEW}{spec.id}"
            self._call("make_folder", new, 0o700)
            crash.point("folder.create.folder")
            self._call("make_folder", new / "data", 0o755)
            self._call("write", new / "mark", json.dumps(dict(spec.mark)))
            crash.point("folder.create.data")
            self._call("rename", new, root / spec.id)
            crash.point("folder.create.named")
        if spec.size is not None and not reason:
            self._bound(handle, spec.size)
        return CreatedVolume(handle, spec.size)

    def _can_limit(self) -> str:
        """Why no size can be enforced; empty: it can."""
        if self._quota_command is not None:
            return ""
        return "no client can bound a folder there, and no quota-command is set that tells the server to"

    def _limit(self, handle: Handle, size: int | None) -> None:
        """Bound the folder of a volume; None: no more, as it goes."""
        assert self._quota_command is not None
        words = ["clear", self._on_server(handle)] if size is None else ["set", self._on_server(handle), str(size)]
        try:
            with self._limiting:  # many a server refuses a second change of its quotas while it makes one
                self.host.run([self._quota_command, *words], timeout=QUOTA_TIMEOUT)
        except CommandFailed as error:
            raise BackendUnavailable(
                f"the quota cannot be set: {error.stderr.strip() or error.text}", subject=f"backend {self.backend}"
            ) from None

    def _bound(self, handle: Handle, size: int) -> None:
        """What was asked for is believed when it shows: a command that did nothing would be a broken promise."""
        self._limit(handle, size)
        total, _, _ = self._measure(self._root / handle / "data")
        if total > size + size // 64 + (1 << 20):
            raise NotSupported(
                f"the server does not enforce {format_size(size)}: the folder shows {format_size(total)}",
                subject=f"backend {self.backend}",
                hint="look at its quota, or leave the size out",
            )

    def _there(self, *paths: Path) -> set[Path]:
        """Those of them that are."""
        return set(compress(paths, self._call("there", *paths)))

    def delete(self, handle: Handle) -> None:
        root = self._ready()
        folder, new, trash = (root / f"{prefix}{handle}" for prefix in ("", _NEW, _TRASH))
        there = self._there(folder, new, trash)
        trashed = trash in there
        for each in (folder, new):
            if each not in there:
                continue
            if trashed:
                self._remove_tree(trash)  # of an earlier try
            self._call("rename", each, trash)
            trashed = True
            crash.point("folder.delete.trashed")
        if trashed:
            if not self._can_limit():
                self._limit(handle, None)
            self._remove_tree(trash)

    def _remove_tree(self, trash: Path) -> None:
        if self._call("remove_empty", trash, "data", "mark"):
            return
        try:
            self._look("rm", "-rf", "--one-file-system", "--", trash, timeout=REMOVE_TIMEOUT)
        except BackendError as error:
            if os.strerror(errno.ENOTEMPTY) not in error.text and os.strerror(errno.EBUSY) not in error.text:
                raise
            raise InUse("some of its files are open on another machine", subject=f"backend {self.backend}") from None

    def inspect(self, handle: Handle) -> Facts:
        total, used, _ = self._measure(self._ready() / handle / "data")
        if self._can_limit() or total >= self._measure(self._root)[0]:
            return Facts(size=None, used=None)
        return Facts(size=total, used=used)

    def list(self) -> Iterable[Found]:
        root = self._ready()
        names = self._look("find", root, "-mindepth", "1", "-maxdepth", "1", "-printf", "%f\\n").splitlines()
        marks = self._marks(root)
        for name in names:
            volume_id = name.removeprefix(_TRASH).removeprefix(_NEW)
            if _VOLUME_ID.fullmatch(volume_id):
                yield Found(Handle(volume_id), VolumeId(volume_id), marks.get(name, {}))

    def _marks(self, root: Path) -> Mapping[str, Mapping[str, str]]:
        """By the name of the folder; what was cut short while it was written is none."""
        found: dict[str, Mapping[str, str]] = {}
        words = ("-mindepth", "2", "-maxdepth", "2", "-name", "mark", "-exec", "grep", "-HZ", "", "{}", "+")
        for line in self._look("find", root, *words).splitlines():
            path, _, text = line.partition("\0")
            try:
                mark = json.loads(text)
            except ValueError:
                continue
            if isinstance(mark, dict):
                found[Path(path).parent.name] = {str(key): str(value) for key, value in mark.items()}
        return found

    def _look(self, *argv: str | Path, timeout: float | None = None) -> str:
        """What a command printed that goes through a tree. What vanishes meanwhile is nothing wrong."""
        for last in (False, True):
            try:
                told = self.host.run(argv, timeout=timeout or self._timeout, check=False)
            except DeadlineExceeded:
                raise self._silent() from None
            wrong = [line for line in told.stderr.splitlines() if not line.endswith(_GONE)]
            if not wrong:
                return told.stdout
            reason = wrong[0].rpartition(": ")[2]
            if reason not in _DEAD or last:
                raise self._error(reason, wrong[0])
            self._renew()
        raise AssertionError

    def find(self, volume_id: VolumeId) -> Handle | None:
        root = self._ready()
        there = self._there(*(root / f"{prefix}{volume_id}" for prefix in ("", _NEW, _TRASH)))
        return Handle(volume_id) if there else None

    def expand(self, handle: Handle, size: int) -> int:
        if self._can_limit():
            if self._advisory:
                return size
            raise NotSupported(self._can_limit(), subject=f"backend {self.backend}")
        there = self.inspect(handle).size
        if there is None:
            raise NotSupported("was made without a size", subject=f"backend {self.backend}")
        if there < size:
            self._bound(handle, size)
            return size
        return there

    def capacity(self) -> Capacity:
        total, _, available = self._measure(self._ready())
        return Capacity(total=total, available=available)
