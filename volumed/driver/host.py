"""What a driver may do to the machine it runs on. The real one is `volumed.host.linux.LinuxHost`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Called with the bytes that were copied since the last call, at least every few seconds. It may wait, for a limit of
# the rate, and what it raises ends the work.
Tell = Callable[[int], None]
TreeCall = Literal["there", "owner", "make_folder", "write", "rename", "rmdir", "remove_empty"]


class Completed(NamedTuple):
    """A child process that ended. Output is text, undecodable bytes escaped."""

    returncode: int
    stdout: str
    stderr: str


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo (proc(5)), octal escapes decoded."""

    mount_id: int
    parent_id: int
    device: str  # major:minor
    root: str  # path within the file system that forms the root of this mount
    target: Path
    options: tuple[str, ...]  # of the mount
    fstype: str
    source: str
    super_options: tuple[str, ...]


class Loop(NamedTuple):
    """A loop device in use."""

    device: Path  # /dev/loopN
    backing_file: Path
    backing_inode: tuple[int, int]  # st_dev, st_ino: the truth, where the path may have been renamed
    readonly: bool


class FileExtent(NamedTuple):
    """A run of a file's bytes, and where on its disk it lies: None where the file system cannot say exactly."""

    offset: int
    length: int
    place: int | None
    written: bool  # False: reserved, and reads as zeros


class TreeStatus(NamedTuple):
    """Of a mounted file system, as statvfs(3) tells it: bytes and inodes; no inodes where they are made as needed."""

    total: int
    used: int
    available: int
    inodes: int
    inodes_used: int
    inodes_available: int


class Revived(NamedTuple):
    """A dead mount, as a process sees it at `path`. `error`: why a live one could not be put in its place."""

    pid: int
    path: Path
    error: str


class Helper(NamedTuple):
    """A process that holds a mount or a device and outlives the daemon: a FUSE client, a block exporter."""

    name: str
    pid: int
    argv: tuple[str, ...]
    running: bool


class Worker(ABC):
    """A child process that answers questions, one at a time, for as long as the daemon runs: for a library whose calls
    may never return."""

    @abstractmethod
    def ask(self, question: str, *, timeout: float) -> str:
        """One line, and the line it answers with. Raises DeadlineExceeded at the timeout, after which it is killed,
        and HostError with what it printed when it has ended."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can be asked again."""

    @abstractmethod
    def close(self) -> None:
        """End it, whatever it is doing. Ended already is success."""


class Host(ABC):
    """Linux, as far as drivers need it.

    Every method is bounded by the request's deadline (`volumed.context`). Errors: HostError and its kinds.
    """

    # This daemon's own folder, for what a driver keeps or mounts beside its volumes; empty after a boot.
    runtime_dir: Path = Path("/run/volumed")
    # Whether the kernel has device-mapper, and dmsetup is installed.
    device_mapper: bool = False

    @abstractmethod
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
        """Run one command: fixed locale, minimal environment, its whole process group killed at the deadline.

        `secrets` are blanked in every text that leaves this call. Raises CommandFailed (unless `check` is
        false) for an exit status other than 0 or a command that is not installed, DeadlineExceeded at the timeout.
        """

    @abstractmethod
    def pipe(self, source: Sequence[str | Path], sink: Sequence[str | Path], *, tell: Tell) -> None:
        """Run two commands, the second reading what the first writes, for as long as something moves. When
        `tell` raises, both are killed. Raises CommandFailed with what the one that failed said, DeadlineExceeded when
        they hang."""

    @abstractmethod
    def mount(
        self, source: str | Path, target: Path, *, fstype: str, options: Sequence[str] = (), readonly: bool = False
    ) -> None:
        """mount(2) of a local file system; `options` as in mount(8). Raises MountFailed."""

    @abstractmethod
    def bind(self, source: Path, target: Path, *, readonly: bool = False, options: Sequence[str] = ()) -> None:
        """A bind mount of `source`, a directory or a device node, at `target`, which exists.

        `options`: the per-mount ones alone (nosuid, nodev, noexec, noatime, nodiratime, relatime).
        """

    @abstractmethod
    def unmount(self, target: Path) -> None:
        """Take away the mount at `target`; nothing happens when there is none. Raises InUse naming who holds it."""

    # Storage across a network: whatever may wait for a server happens in a child that is killed at the deadline
    @abstractmethod
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
        """As `mount`, by mount(8) and its helper for the type. Raises MountFailed with what that said,
        DeadlineExceeded. After either nothing of it is mounted."""

    @abstractmethod
    def bind_network(
        self,
        source: Path,
        target: Path,
        *,
        readonly: bool = False,
        options: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> None:
        """As `bind`, of a tree whose server may not answer. Raises MountFailed, DeadlineExceeded, after which nothing
        of it is mounted, nor will be."""

    @abstractmethod
    def unmount_network(self, target: Path, *, timeout: float = 30.0, force: bool = False) -> None:
        """As `unmount`, never waiting for the server. `force`: what is on its way there is given up (MNT_FORCE).
        Raises InUse naming who holds it, DeadlineExceeded."""

    @abstractmethod
    def tree_status(self, path: Path, *, timeout: float = 5.0) -> TreeStatus:
        """statvfs(3). Raises DeadlineExceeded when the server does not answer, MountFailed with its errno: ESTALE for
        what the server has forgotten, ENOTCONN when the process behind a FUSE mount is dead."""

    @abstractmethod
    def tree_call(self, name: TreeCall, *arguments: Path | str | int, timeout: float = 15.0) -> Any:
        """A small change of, or look at, a tree whose server may not answer; cheaper than a command by `run`.

        `there` PATH...: whether each is there, as a list. `owner` PATH: its user's number. `make_folder` PATH MODE:
        with those above it; there already is success. `write` PATH TEXT: a file, made or written over. `rename` PATH
        NEW. `rmdir` PATH. `remove_empty` PATH TREE FILE...: a folder that holds these files, the empty folder TREE and
        no more; whether it is gone. Raises OSError as the call itself does, and DeadlineExceeded, also at once while
        calls still hang there that no signal ends.
        """

    @abstractmethod
    def start_worker(self, module: str) -> Worker:
        """A Python that runs the module: it reads its questions from standard input, prints one line for each, and
        ends when the input does, as it does when the daemon dies. Raises CommandFailed."""

    @abstractmethod
    def revive(self, target: Path) -> Sequence[Revived]:
        """The tree mounted anew at `target` put in the place of each dead mount of it, in every mount namespace: the
        same source, whose server has forgotten it or whose process is dead. Live ones are left alone and not told."""

    # Helpers
    @abstractmethod
    def start_helper(self, name: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Helper:
        """Start a process that outlives the daemon: in a systemd scope of its own where systemd runs, else in a
        session of its own. One that runs already under this name is returned. `name`: letters, digits and dashes.
        What it prints goes to a log that `helper_log` reads. Raises CommandFailed when it cannot be started."""

    @abstractmethod
    def helper(self, name: str) -> Helper | None:
        """The helper of this name, running or dead but not yet forgotten; found again after a restart."""

    @abstractmethod
    def helpers(self, prefix: str) -> Sequence[Helper]:
        """All whose names begin so."""

    @abstractmethod
    def helper_log(self, name: str, *, limit: int = 2000) -> str:
        """The end of what it printed."""

    @abstractmethod
    def stop_helper(self, name: str, *, timeout: float = 10.0) -> None:
        """End it (SIGTERM, then SIGKILL) and forget it. None there is success."""

    @abstractmethod
    def private_folder(self, name: str) -> Path:
        """A folder that root alone can look into, gone after a boot; made if it is missing. For what a helper must be
        given in a file (its key), or as a place. Whoever puts something into it takes it out again. `name`: as a
        helper's."""

    # Devices
    @abstractmethod
    def find_device(self, *choices: Mapping[str, str]) -> Path | None:
        """The disk, never a partition, whose udev properties have the values of one of the choices
        ({"ID_SERIAL": "vol0123"}), or None."""

    @abstractmethod
    def wait_for_device(self, *choices: Mapping[str, str], timeout: float) -> Path:
        """As `find_device`, waiting for the kernel's event. Raises DeadlineExceeded."""

    @abstractmethod
    def wait_for_device_size(self, device: Path, size: int, *, timeout: float) -> None:
        """Wait for the kernel's event that the device has at least `size` bytes. Raises DeadlineExceeded."""

    @abstractmethod
    def check_unheld(self, device: Path, *, server: int = 0) -> None:
        """Raises InUse naming who has the device open, mounted or part of another one. Gone is success. `server`: the
        process that the device is served by, and that does not count."""

    @abstractmethod
    def is_mountpoint(self, path: Path) -> bool:
        """Whether `path` is the root of a mount, bind mounts included; False when it does not exist."""

    @abstractmethod
    def is_same(self, one: Path, other: Path) -> bool:
        """Whether both are one file or folder; False when either does not exist. No server is asked: either may be
        mounted from one that does not answer."""

    @abstractmethod
    def mounts(self) -> Sequence[MountEntry]:
        """The mount table of this process's namespace; read again only after it changed."""

    @abstractmethod
    def replay_log(self, device: Path, *, fstype: str, options: Sequence[str] = ()) -> None:
        """Mount the device for a moment, out of sight, so that its journal is played back."""

    @abstractmethod
    def wait_for_mount_change(self, timeout: float) -> bool:
        """Wait until the mount table changes, at most `timeout` seconds. Whether it did. For one thread."""

    @abstractmethod
    def attach_loop(self, backing_file: Path, *, direct_io: bool = True, readonly: bool = False) -> Path:
        """A loop device over the whole of `backing_file`; the one it already has, when it has one."""

    @abstractmethod
    def find_loop(self, backing_file: Path) -> Path | None:
        """The loop device of this file (by inode, never by number or name), or None."""

    @abstractmethod
    def detach_loop(self, device: Path) -> None:
        """Free the device; nothing happens when it is free. Raises InUse while it is open or mounted."""

    @abstractmethod
    def refresh_loop(self, device: Path) -> None:
        """Let the device take the size that its backing file has now."""

    @abstractmethod
    def set_device_readonly(self, device: Path, readonly: bool) -> None:
        """Whether the device can be opened for writing (BLKROSET); a read-only mount of its node does not say that."""

    @abstractmethod
    def loops(self) -> Sequence[Loop]:
        """All loop devices in use on the machine."""

    @abstractmethod
    def project_quota_supported(self, path: Path) -> bool:
        """Whether the file system at `path` enforces project quotas, for root as well (XFS does, ext4 does not)."""

    @abstractmethod
    def set_project_quota(self, path: Path, *, project: int, limit: int) -> None:
        """Bound the tree at `path`, all of it and whatever is made in it, to `limit` bytes."""

    @abstractmethod
    def project_usage(self, path: Path, *, project: int) -> int:
        """Bytes that the project occupies."""

    @abstractmethod
    def project_limit(self, path: Path, *, project: int) -> int:
        """Bytes that it may occupy; 0 when there is no limit."""

    @abstractmethod
    def clear_project_quota(self, path: Path, *, project: int) -> None:
        """Forget the limit. `path`: anything on that file system."""

    @abstractmethod
    def extents(self, path: Path) -> Sequence[FileExtent]:
        """Where the file's data lies, in order; holes are left out. Raises NotSupported where that cannot be told."""

    @abstractmethod
    def reflink(self, source: Path, target: Path) -> None:
        """Make `target`, a new file, share the data of `source` (FICLONE). Raises NotSupported where it cannot,
        and OSError: the disk may be full."""
