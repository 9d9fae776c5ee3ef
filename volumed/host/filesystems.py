"""File systems that core puts on block devices: made, checked, grown, and given another identity after a copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

from volumed.driver import Host
from volumed.errors import CommandFailed, HostError, IntegrityError, InvalidRequest, NotSupported
from volumed.host.holders import is_claimed
from volumed.units import MIB

MKFS_TIMEOUT = 300.0
CHECK_TIMEOUT = 540.0
CAP_SYS_RESOURCE = 24  # capabilities(7)


class Filesystem(ABC):
    name: ClassVar[str]
    minimum_size: ClassVar[int]  # bytes; below it mkfs refuses
    mount_options: ClassVar[tuple[str, ...]]
    magic: ClassVar[tuple[int, bytes]]  # what lies at which offset of each that was made

    def is_on(self, device: Path) -> bool:
        offset, magic = self.magic
        return _read(device, offset=offset, size=len(magic)) == magic

    @abstractmethod
    def mkfs(self, host: Host, device: Path, *, options: Sequence[str]) -> None:
        """Make it on a device that holds nothing anybody needs. Raises InvalidRequest for options mkfs refuses."""

    @abstractmethod
    def check(self, host: Host, device: Path) -> None:
        """Before a mount: repair what an unclean end left, if anything. Costs one read when it was clean.

        Raises IntegrityError when the device holds another file system, or one that only a person may repair.
        """

    def require_growth(self) -> None:  # noqa: B027 (most need nothing)
        """Raises NotSupported when this process could not grow it: asked before its storage is touched."""

    @abstractmethod
    def grow(self, host: Host, device: Path, mountpoint: Path) -> None:
        """Take all of the device, while mounted. As large already is success."""

    @abstractmethod
    def renew(self, host: Host, device: Path) -> None:
        """Another UUID, so that a copy can be mounted beside its original. Not mounted, and checked before."""


class Ext4(Filesystem):
    name = "ext4"
    minimum_size = 2 * MIB
    mount_options = ("discard",)
    magic = (1024 + 0x38, b"\x53\xef")

    def mkfs(self, host: Host, device: Path, *, options: Sequence[str]) -> None:
        # Lazy initialisation keeps a sparse file sparse and mkfs short; a volume has no use for root's 5 percent.
        words = ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1"]
        _mkfs(host, [*words, *options, device])

    def check(self, host: Host, device: Path) -> None:
        if not self.is_on(device):
            raise _not_here(self, device)
        superblock = _read(device, offset=1024, size=1024)
        state = int.from_bytes(superblock[0x3A:0x3C], "little")
        needs_recovery = int.from_bytes(superblock[0x60:0x64], "little") & 0x4
        if state & 1 and not state & 2 and not needs_recovery:
            return
        if _claimed(device):
            return
        told = host.run(["e2fsck", "-p", device], timeout=CHECK_TIMEOUT, check=False)
        if told.returncode >= 4:  # e2fsck(8): 1 and 2 are corrected errors
            raise IntegrityError(
                f"e2fsck cannot repair it by itself: {(told.stdout + told.stderr).strip()[-500:]}",
                subject=str(device),
                hint=f"take a copy of the device, then run `e2fsck -f {device}` by hand",
            )

    def require_growth(self) -> None:
        # EXT4_IOC_RESIZE_FS wants the capability (fs/ext4/resize.c), and some containers and machines have it not.
        if not has_capability(CAP_SYS_RESOURCE):
            raise NotSupported(
                "ext4 grows only with CAP_SYS_RESOURCE, which volumed does not have here",
                hint="run volumed with that capability, as its systemd unit does, or use xfs",
            )

    def grow(self, host: Host, device: Path, mountpoint: Path) -> None:
        host.run(["resize2fs", device], timeout=MKFS_TIMEOUT)

    def renew(self, host: Host, device: Path) -> None:
        # tune2fs changes the UUID only of what e2fsck has looked at since it was last mounted.
        host.run(["e2fsck", "-fp", device], timeout=CHECK_TIMEOUT, check=False)
        host.run(["tune2fs", "-U", str(uuid4()), device])
        host.run(["resize2fs", device], timeout=MKFS_TIMEOUT)  # free to do here, unmounted and checked


class Xfs(Filesystem):
    name = "xfs"
    minimum_size = 300 * MIB  # mkfs.xfs 5.19 and newer
    mount_options = ("discard",)
    magic = (0, b"XFSB")

    def mkfs(self, host: Host, device: Path, *, options: Sequence[str]) -> None:
        _mkfs(host, ["mkfs.xfs", "-q", "-f", *options, device])

    def check(self, host: Host, device: Path) -> None:
        # mount(2) replays the log; xfs_repair must not be run before that (xfs_repair(8)).
        if not self.is_on(device):
            raise _not_here(self, device)

    def grow(self, host: Host, device: Path, mountpoint: Path) -> None:
        host.run(["xfs_growfs", mountpoint], timeout=MKFS_TIMEOUT)

    def renew(self, host: Host, device: Path) -> None:
        # xfs_admin wants a clean log, and only a mount can replay it; `nouuid` because the original may be mounted.
        host.replay_log(device, fstype=self.name, options=("nouuid",))
        host.run(["xfs_admin", "-U", "generate", device], timeout=MKFS_TIMEOUT)


class Btrfs(Filesystem):
    name = "btrfs"
    minimum_size = 256 * MIB  # mkfs takes less, but below it the kernel refuses to grow (btrfs_ioctl_resize)
    mount_options = ("discard=async",)
    magic = (0x10040, b"_BHRfS_M")

    def mkfs(self, host: Host, device: Path, *, options: Sequence[str]) -> None:
        _mkfs(host, ["mkfs.btrfs", "-q", "-f", *options, device])

    def check(self, host: Host, device: Path) -> None:
        # Copy on write needs no check after a crash; `btrfs check` would read all of it.
        if not self.is_on(device):
            raise _not_here(self, device)

    def grow(self, host: Host, device: Path, mountpoint: Path) -> None:
        host.run(["btrfs", "filesystem", "resize", "max", mountpoint], timeout=MKFS_TIMEOUT)

    def renew(self, host: Host, device: Path) -> None:
        # -u rewrites the id everywhere: two file systems with one metadata id confuse the kernel's list of devices.
        host.run(["btrfstune", "-f", "-u", device], timeout=MKFS_TIMEOUT)


_ALL: dict[str, Filesystem] = {kind.name: kind for kind in (Ext4(), Xfs(), Btrfs())}
NAMES = tuple(_ALL)


def get(name: str) -> Filesystem:
    """Raises InvalidRequest for one that is not known."""
    try:
        return _ALL[name]
    except KeyError:
        raise InvalidRequest(f"there is no file system {name!r} here", hint=f"choose {', '.join(NAMES)}") from None


def detect(device: Path) -> str | None:
    """The name of the file system on a device, of those known here."""
    return next((kind.name for kind in _ALL.values() if kind.is_on(device)), None)


def _mkfs(host: Host, argv: Sequence[str | Path]) -> None:
    try:
        host.run(argv, timeout=MKFS_TIMEOUT)
    except CommandFailed as error:
        if error.returncode == 127:
            raise
        raise InvalidRequest(f"{argv[0]} refused: {error.stderr.strip()[-500:]}", hint="see mkfs-options") from None


def _read(device: Path, *, offset: int, size: int) -> bytes:
    try:
        with device.open("rb", buffering=0) as opened:
            opened.seek(offset)
            return opened.read(size)
    except OSError as error:
        raise HostError(f"cannot be read: {error.strerror}", subject=str(device)) from None


def has_capability(number: int) -> bool:
    """Of this process, effective (proc(5))."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def _claimed(device: Path) -> bool:
    """Whether it is mounted already, perhaps in a container's namespace alone: then it looks unclean because it is in
    use, and mounting it again joins the same file system."""
    try:
        return is_claimed(device)
    except OSError as error:
        raise HostError(f"cannot be opened: {error.strerror}", subject=str(device)) from None


def _not_here(kind: Filesystem, device: Path) -> IntegrityError:
    return IntegrityError(
        f"does not hold the {kind.name} that was made on it",
        subject=str(device),
        hint="the data may have been overwritten: nothing was changed, look at it with blkid",
    )
