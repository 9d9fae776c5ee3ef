"""The real Host: this machine's kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
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
from volumed.errors import HostError, NotSupported
from volumed.host import devices, extents, holders, loop, mapper, mounts, network, quota, revive, served
from volumed.host.helpers import Helpers
from volumed.host.pipe import pipe
from volumed.host.run import run
from volumed.host.worker import start as start_worker

FICLONE = 0x40049409
BLKROSET = 0x125D
UNMOUNT_TIMEOUT = 30.0


class LinuxHost(Host):
    def __init__(self, runtime_dir: Path = Host.runtime_dir) -> None:
        self.runtime_dir = runtime_dir
        self.device_mapper = mapper.available()
        self._table = mounts.MountTable()
        self._helpers = Helpers(runtime_dir / "helpers")

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
        return run(argv, timeout=timeout, stdin=stdin, env=env, secrets=secrets, check=check)

    def pipe(self, source: Sequence[str | Path], sink: Sequence[str | Path], *, tell: Tell) -> None:
        pipe(source, sink, tell=tell)

    # Mounts
    def mount(
        self, source: str | Path, target: Path, *, fstype: str, options: Sequence[str] = (), readonly: bool = False
    ) -> None:
        mounts.mount(source, target, fstype=fstype, options=options, readonly=readonly)

    def bind(self, source: Path, target: Path, *, readonly: bool = False, options: Sequence[str] = ()) -> None:
        mounts.bind(source, target, readonly=readonly, options=options)

    def unmount(self, target: Path) -> None:
        if mounts.is_served(target, self.mounts):
            network.unmount(target, timeout=UNMOUNT_TIMEOUT, force=False)
        else:
            mounts.unmount(target)

    def is_mountpoint(self, path: Path) -> bool:
        return mounts.is_mountpoint(path)

    def is_same(self, one: Path, other: Path) -> bool:
        return mounts.is_same(one, other)

    def mounts(self) -> Sequence[MountEntry]:
        return self._table.entries()

    def wait_for_mount_change(self, timeout: float) -> bool:
        return self._table.wait_for_change(timeout)

    def replay_log(self, device: Path, *, fstype: str, options: Sequence[str] = ()) -> None:
        with tempfile.TemporaryDirectory(prefix="volumed-replay-") as folder:
            target = Path(folder)
            self.mount(device, target, fstype=fstype, options=options)
            self.unmount(target)

    # Storage across a network
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
        network.mount(
            source, target, fstype=fstype, options=options, readonly=readonly, timeout=timeout, secrets=secrets
        )

    def bind_network(
        self,
        source: Path,
        target: Path,
        *,
        readonly: bool = False,
        options: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> None:
        network.bind(source, target, readonly=readonly, options=options, timeout=timeout)

    def unmount_network(self, target: Path, *, timeout: float = 30.0, force: bool = False) -> None:
        network.unmount(target, timeout=timeout, force=force)

    def tree_status(self, path: Path, *, timeout: float = 5.0) -> TreeStatus:
        return network.status(path, timeout=timeout)

    def tree_call(self, name: TreeCall, *arguments: Path | str | int, timeout: float = 15.0) -> Any:
        return served.call(name, *arguments, timeout=timeout)

    def start_worker(self, module: str) -> Worker:
        return start_worker(module)

    def revive(self, target: Path) -> Sequence[Revived]:
        return revive.revive(target, self.mounts())

    # Helpers
    def start_helper(self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Helper:
        return self._helpers.start(name, argv, env=env)

    def helper(self, name: str) -> Helper | None:
        return self._helpers.find(name)

    def helpers(self, prefix: str) -> Sequence[Helper]:
        return list(self._helpers.find_all(prefix))

    def helper_log(self, name: str, *, limit: int = 2000) -> str:
        return self._helpers.log(name, limit)

    def stop_helper(self, name: str, *, timeout: float = 10.0) -> None:
        self._helpers.stop(name, timeout=timeout)

    def private_folder(self, name: str) -> Path:
        return self._helpers.private_folder(name)

    # Devices
    def find_device(self, *choices: Mapping[str, str]) -> Path | None:
        return devices.find(choices)

    def wait_for_device(self, *choices: Mapping[str, str], timeout: float) -> Path:
        return devices.wait(choices, timeout=timeout)

    def wait_for_device_size(self, device: Path, size: int, *, timeout: float) -> None:
        devices.wait_for_size(device, size, timeout=timeout)

    def check_unheld(self, device: Path, *, server: int = 0) -> None:
        holders.check_device(device, self.mounts(), server=server)

    # Loop devices
    def attach_loop(self, backing_file: Path, *, direct_io: bool = True, readonly: bool = False) -> Path:
        return loop.attach(backing_file, direct_io=direct_io, readonly=readonly)

    def find_loop(self, backing_file: Path) -> Path | None:
        return loop.find(backing_file)

    def detach_loop(self, device: Path) -> None:
        loop.detach(device)

    def refresh_loop(self, device: Path) -> None:
        loop.refresh(device)

    def set_device_readonly(self, device: Path, readonly: bool) -> None:
        with device.open("rb") as opened:
            try:
                fcntl.ioctl(opened, BLKROSET, int(readonly).to_bytes(4, sys.byteorder))
            except OSError as error:
                raise HostError(f"cannot be made read-only: {error.strerror}", subject=str(device)) from None

    def loops(self) -> Sequence[Loop]:
        return list(loop.attached())

    # Quotas
    def project_quota_supported(self, path: Path) -> bool:
        return quota.supported(self._entry_of(path))

    def set_project_quota(self, path: Path, *, project: int, limit: int) -> None:
        quota.set_limit(self._entry_of(path).source, project=project, limit=limit)
        quota.assign(path, project)

    def project_usage(self, path: Path, *, project: int) -> int:
        return quota.usage(self._entry_of(path).source, project=project)[0]

    def project_limit(self, path: Path, *, project: int) -> int:
        return quota.usage(self._entry_of(path).source, project=project)[1]

    def clear_project_quota(self, path: Path, *, project: int) -> None:
        quota.set_limit(self._entry_of(path).source, project=project, limit=0)

    def _entry_of(self, path: Path) -> MountEntry:
        """The mount that holds `path`: by device number, as mount points may hide one another."""
        number = path.stat().st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
        for entry in self.mounts():
            if entry.device == device:
                return entry
        raise HostError("lies on no mount of this namespace", subject=str(path))

    # Files
    def extents(self, path: Path) -> Sequence[FileExtent]:
        return list(extents.extents(path))

    def reflink(self, source: Path, target: Path) -> None:
        with source.open("rb") as origin, target.open("xb") as copy:
            try:
                fcntl.ioctl(copy, FICLONE, origin.fileno())
            except OSError as error:
                target.unlink()
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL):
                    raise
                raise NotSupported(
                    "this file system cannot share data between files",
                    subject=str(source.parent),
                    hint="XFS and btrfs can",
                ) from None
