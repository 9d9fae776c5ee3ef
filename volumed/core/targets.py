"""Paths that an orchestrator names: checked, given a bind mount of a volume's own mount, and taken away again.

The volume's mount stays at the path that volumed owns, so one place knows, repairs and replaces it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from volumed.core.presence import remove_mount_point
from volumed.driver import Host, MountEntry
from volumed.errors import HostError, InUse, InvalidRequest
from volumed.host import mounts
from volumed.testing import crash

MAX_PATH = 4095  # PATH_MAX without its NUL
MAX_NAME = 255  # NAME_MAX
# What a bind mount can have of its own (mount(8), "bind mount operation"); the rest belongs to the file system.
PER_MOUNT = frozenset(
    {"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "nodiratime", "diratime"}
    | {"relatime", "defaults"}
)


class Targets:
    def __init__(self, host: Host, roots: Sequence[Path]) -> None:
        """`roots`: folders below which orchestrators may ask for a volume, and nowhere else."""
        self._host = host
        self._roots = tuple(roots)
        self._resolved: tuple[str, ...] = ()

    def check(self, text: str, *, what: str) -> Path:
        """The path, if volumed may mount there. Raises InvalidRequest.

        Symbolic links on the way must not lead out of the roots, and the end must not be one.
        """
        if not text:
            raise InvalidRequest(f"no {what} is given")
        if "\0" in text or len(os.fsencode(text)) > MAX_PATH or not text.startswith("/"):
            raise InvalidRequest(f"{what} {text[:100]!r} is no absolute path")
        parts = text.split("/")
        if ".." in parts:
            raise InvalidRequest(f"{what} {text[:100]!r} leads upwards")
        if any(len(os.fsencode(part)) > MAX_NAME for part in parts):
            raise InvalidRequest(f"{what} {text[:100]!r} has a name of more than {MAX_NAME} bytes")
        path = os.path.normpath(text)
        if not self._allowed(os.path.realpath(os.path.dirname(path))):  # noqa: PTH120 (many times a second)
            raise InvalidRequest(
                f"{what} {path} does not lie below {', '.join(map(str, self._roots))}",
                hint="set target-roots in the table [csi] of volumed.toml",
            )
        if mounts.file_type(Path(path)) == stat.S_IFLNK:
            raise InvalidRequest(f"{what} {path} is a symbolic link")
        return Path(path)

    def _allowed(self, folder: str) -> bool:
        """Below a root, which may be a symbolic link itself, and may have become one since we looked."""
        if any(_below(folder, root) for root in self._resolved):
            return True
        self._resolved = tuple(os.path.realpath(root) for root in self._roots)
        return any(_below(folder, root) for root in self._resolved)

    def exists(self, path: Path) -> bool:
        """No server is asked, be something mounted there or not."""
        return mounts.file_type(path) != 0

    def attach(self, source: Path, path: Path, *, block: bool, readonly: bool, options: Sequence[str]) -> None:
        """The volume mounted at `source` seen at `path`, too; there already is success.

        Raises InvalidRequest when the path cannot be made, InUse when something else is mounted there.
        """
        if self._host.is_mountpoint(path):
            if self.shows(source, path):
                return
            raise InUse(f"something else is mounted at {path}", hint="unmount it first")
        made = self._make(path, block=block)
        crash.point("publish.made")
        try:
            own = [option for option in options if option in PER_MOUNT]
            self._host.bind(source, path, readonly=readonly, options=own)
        except BaseException:
            if made:
                with contextlib.suppress(HostError):
                    remove_mount_point(path)
            raise
        crash.point("publish.mounted")

    def prepare(self, path: Path) -> None:
        """A folder to stage at: the orchestrator's, or made for one that cannot reach into our file system (Swarm)."""
        self._make(path, block=False)

    def _make(self, path: Path, *, block: bool) -> bool:
        """Whether it was made now. Raises InvalidRequest for what is there and is something else."""
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be used: {error.strerror}") from None
        else:
            if not (stat.S_ISREG(mode) if block else stat.S_ISDIR(mode)):
                raise InvalidRequest(f"{path} is no {'file' if block else 'directory'}", hint="remove it first")
            return False
        try:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            if block:
                path.touch(mode=0o600)
            else:
                path.mkdir(mode=0o750)
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be made: {error.strerror}") from None
        return True

    def detach(self, path: Path) -> None:
        """Neither mount nor path any more; gone already is success. Raises InUse naming who holds it.

        A path that holds files when nothing is mounted there stays: they are not ours.
        """
        self._host.unmount(path)
        crash.point("unpublish.unmounted")
        if not path.is_symlink():
            with contextlib.suppress(HostError):
                remove_mount_point(path)

    def shows(self, source: Path, path: Path) -> bool:
        """Whether what is mounted at `path` is what is mounted at `source`; by the mount table, no server is asked."""
        table = self._host.mounts()
        there, wanted = _last(table, path), _last(table, source)
        return there is not None and wanted is not None and (there.device, there.root) == (wanted.device, wanted.root)


def _last(table: Sequence[MountEntry], path: Path) -> MountEntry | None:
    """The topmost mount at a path."""
    return next((entry for entry in reversed(table) if entry.target == path), None)


def _below(folder: str, root: str) -> bool:
    return folder == root or folder.startswith(root.rstrip("/") + "/")
