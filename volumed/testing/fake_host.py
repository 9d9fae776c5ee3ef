"""A Host that touches nothing: a mount table in memory over real folders. For tests that need no root."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volumed.driver import (
    Completed,
    FileExtent,
    Helper,
    Host,
    Loop,
    MountEntry,
    Revived,
    Tell,
    TreeCall,
    TreeStatus,
    Worker,
)
from volumed.errors import CommandFailed, DeadlineExceeded, HostError, MountFailed, NotSupported, VolumedError


class FakeHost(Host):
    """`fail("bind", error)` makes the next such call raise. `calls` holds what was done, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.answers: dict[str, Completed] = {}  # of `run`, by the command's name
        self._failures: dict[str, list[VolumedError]] = {}
        self._table: dict[Path, MountEntry] = {}
        self._helpers: dict[str, Helper] = {}
        self.devices: dict[tuple[tuple[str, str], ...], Path] = {}  # by their udev properties, sorted
        self._changed = threading.Event()

    def fail(self, method: str, error: VolumedError) -> None:
        self._failures.setdefault(method, []).append(error)

    def _called(self, method: str, *details: object) -> None:
        self.calls.append((method, *map(str, details)))
        if self._failures.get(method):
            raise self._failures[method].pop(0)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout: float = 60.0,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
        check: bool = True,
    ) -> Completed:
        self._called("run", *argv)
        try:
            return self.answers[str(argv[0])]
        except KeyError:
            raise CommandFailed(f"{argv[0]} is not here", returncode=127) from None

    def pipe(self, source: Sequence[str | Path], sink: Sequence[str | Path], *, tell: Tell) -> None:
        self._called("pipe", *source, *sink)

    def mount(
        self, source: str | Path, target: Path, *, fstype: str, options: Sequence[str] = (), readonly: bool = False
    ) -> None:
        self._called("mount", source, target, fstype, *options)
        self._enter(Path(source), target, fstype, readonly=readonly)

    def bind(self, source: Path, target: Path, *, readonly: bool = False, options: Sequence[str] = ()) -> None:
        self._called("bind", source, target, *options)
        if not source.exists():
            raise MountFailed("no such file or directory", subject=str(target))
        self._enter(source, target, "none", readonly=readonly)

    def _enter(self, source: Path, target: Path, fstype: str, *, readonly: bool) -> None:
        if target.is_dir() is not source.is_dir() and not fstype != "none":
            raise MountFailed("not a directory", subject=str(target))
        if not target.exists():
            raise MountFailed("no such file or directory", subject=str(target))
        flag = "ro" if readonly else "rw"
        below = self._table.get(source)
        root = below.root if below else str(source)  # a bind mount of a mount shows what that shows
        self._table[target] = MountEntry(len(self._table), 0, "0:1", root, target, (flag,), fstype, str(source), ())
        self._changed.set()

    def unmount(self, target: Path) -> None:
        self._called("unmount", target)
        if self._table.pop(target, None) is not None:
            self._changed.set()

    def mount_network(
        self,
        source: str,
        target: Path,
        *,
        fstype: str,
        options: Sequence[str] = (),
        readonly: bool = False,
        timeout: float = 60.0,
        secrets: Sequence[str] = (),
    ) -> None:
        self._called("mount_network", source, target, fstype, *options)
        self._enter(Path(source), target, fstype, readonly=readonly)

    def bind_network(
        self,
        source: Path,
        target: Path,
        *,
        readonly: bool = False,
        options: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> None:
        self.bind(source, target, readonly=readonly, options=options)

    def unmount_network(self, target: Path, *, timeout: float = 30.0, force: bool = False) -> None:
        self._called("unmount_network", target)
        self._table.pop(target, None)

    def tree_status(self, path: Path, *, timeout: float = 5.0) -> TreeStatus:
        self._called("tree_status", path)
        return TreeStatus(1 << 30, 0, 1 << 30, 1000, 0, 1000)

    def tree_call(self, name: TreeCall, *arguments: Path | str | int, timeout: float = 15.0) -> Any:
        self._called("tree_call", name, *arguments)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(arguments[0]))

    def start_worker(self, module: str) -> Worker:
        self._called("start_worker", module)
        raise CommandFailed(f"{module} is not here", returncode=127)

    def revive(self, target: Path) -> Sequence[Revived]:
        self._called("revive", target)
        return []

    def start_helper(self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Helper:
        self._called("start_helper", name, *argv)
        return self._helpers.setdefault(name, Helper(name, len(self._helpers) + 1, tuple(map(str, argv)), True))

    def helper(self, name: str) -> Helper | None:
        return self._helpers.get(name)

    def helpers(self, prefix: str) -> Sequence[Helper]:
        return [found for name, found in sorted(self._helpers.items()) if name.startswith(prefix)]

    def helper_log(self, name: str, *, limit: int = 2000) -> str:
        return ""

    def stop_helper(self, name: str, *, timeout: float = 10.0) -> None:
        self._called("stop_helper", name)
        self._helpers.pop(name, None)

    def private_folder(self, name: str) -> Path:
        raise HostError("has no folder of its own", subject="the fake host")

    def find_device(self, *choices: Mapping[str, str]) -> Path | None:
        found = (self.devices.get(tuple(sorted(properties.items()))) for properties in choices)
        return next((device for device in found if device is not None), None)

    def wait_for_device(self, *choices: Mapping[str, str], timeout: float) -> Path:
        found = self.find_device(*choices)
        if found is None:
            raise DeadlineExceeded(f"no such device appeared: {[dict(properties) for properties in choices]}")
        return found

    def wait_for_device_size(self, device: Path, size: int, *, timeout: float) -> None:
        self._called("wait_for_device_size", device, size)

    def check_unheld(self, device: Path, *, server: int = 0) -> None:
        self._called("check_unheld", device)

    def is_mountpoint(self, path: Path) -> bool:
        return path in self._table

    def is_same(self, one: Path, other: Path) -> bool:
        return self._seen_at(one) == self._seen_at(other)

    def _seen_at(self, path: Path) -> Path:
        return self.source_of(path) if path in self._table else path

    def mounts(self) -> Sequence[MountEntry]:
        return list(self._table.values())

    def source_of(self, target: Path) -> Path:
        """What is mounted there: a bind mount's content is seen through it."""
        return Path(self._table[target].source)

    def wait_for_mount_change(self, timeout: float) -> bool:
        changed = self._changed.wait(timeout)
        self._changed.clear()
        return changed

    def replay_log(self, device: Path, *, fstype: str, options: Sequence[str] = ()) -> None:
        self._called("replay_log", device, fstype, *options)

    def attach_loop(self, backing_file: Path, *, direct_io: bool = True, readonly: bool = False) -> Path:
        raise HostError("has no loop devices", subject="the fake host")

    def find_loop(self, backing_file: Path) -> Path | None:
        return None

    def detach_loop(self, device: Path) -> None:
        self._called("detach_loop", device)

    def refresh_loop(self, device: Path) -> None:
        self._called("refresh_loop", device)

    def set_device_readonly(self, device: Path, readonly: bool) -> None:
        self._called("set_device_readonly", device, readonly)

    def loops(self) -> Sequence[Loop]:
        return []

    def project_quota_supported(self, path: Path) -> bool:
        return False

    def set_project_quota(self, path: Path, *, project: int, limit: int) -> None:
        raise NotSupported("has no quotas", subject="the fake host")

    def project_usage(self, path: Path, *, project: int) -> int:
        return 0

    def project_limit(self, path: Path, *, project: int) -> int:
        return 0

    def clear_project_quota(self, path: Path, *, project: int) -> None:
        self._called("clear_project_quota", path, project)

    def extents(self, path: Path) -> Sequence[FileExtent]:
        raise NotSupported("does not tell where data lies", subject="the fake host")

    def reflink(self, source: Path, target: Path) -> None:
        raise NotSupported("cannot share data between files", subject="the fake host")
