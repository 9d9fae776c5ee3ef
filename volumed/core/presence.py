"""One volume on this node: its tree mounted, or its device mapped, at the one path that volumed owns for it.

Knows nothing of the ledger or of who asked. Each step bears being made again and being cut short anywhere: what a
step left behind is seen by `observe` and finished by `establish` or taken away by `remove`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import threading
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from volumed.driver import BlockDriver, Driver, FilesystemDriver, Host, Revived
from volumed.errors import CommandFailed, DeadlineExceeded, HostError, IntegrityError, MountFailed, VolumedError
from volumed.host import filesystems, permissions
from volumed.model import Handle, Ownership, Volume, VolumeId, VolumeMode
from volumed.testing import crash

if TYPE_CHECKING:
    from volumed.core.encryption import Encryption
    from volumed.core.layer import Layer
    from volumed.core.reach import Reach


# umount and mount anew are all that helps.
_DEAD = (errno.ESTALE, errno.ENOTCONN)
# Seconds; a tree of a million files behind a slow server.
GRANTING_TIMEOUT = 580.0
READ_TIMEOUT = 5.0


class Observed(enum.StrEnum):
    """What the machine shows of a volume."""

    ABSENT = "absent"
    MAPPED = "mapped"  # the device is there, the mount is not
    MOUNTED = "mounted"
    DEAD = "dead"  # mounted, and its server has forgotten it, or the process that served it has ended
    LOST = "lost"  # mounted, and its device has gone from under it
    FOREIGN = "foreign"  # something else lies at the volume's path


def handle_of(volume: Volume) -> Handle:
    """Raises IntegrityError for a volume that never got one: it was not finished, so nobody may use it."""
    if volume.handle is None:
        raise IntegrityError("the ledger knows no storage of this volume", subject=f"volume {volume.name}")
    return volume.handle


class Presence:
    def __init__(self, host: Host, mounts_dir: Path, reach: Reach, encryption: Encryption, layer: Layer) -> None:
        self.host = host
        self.mounts_dir = mounts_dir
        self._reach = reach
        self._encryption = encryption
        self.layer = layer
        self._mounted: set[VolumeId] = set()  # a memory of the mount table, renewed by every `scan`
        self._remembering = threading.Lock()  # a scan must not forget what was mounted while it read

    def path(self, volume_id: VolumeId) -> Path:
        return self.mounts_dir / volume_id

    def mounted_ids(self) -> Set[VolumeId]:
        return self._mounted

    def scan(self) -> set[VolumeId]:
        """Read the mount table: the volumes that have something mounted at their path, be it theirs or not."""
        with self._remembering:
            entries = self.host.mounts()
            found = {VolumeId(entry.target.name) for entry in entries if entry.target.parent == self.mounts_dir}
            self._mounted = found
        return set(found)

    def _remember(self, volume_id: VolumeId, *, mounted: bool) -> None:
        with self._remembering:
            if mounted:
                self._mounted.add(volume_id)
            else:
                self._mounted.discard(volume_id)

    def observe(self, volume: Volume, driver: Driver) -> Observed:
        handle, target = handle_of(volume), self.path(volume.id)
        if isinstance(driver, FilesystemDriver):
            if not self.host.is_mountpoint(target):
                return Observed.ABSENT
            if not driver.owns_mount(handle, target):
                return Observed.FOREIGN
            return Observed.DEAD if driver.remote and self._is_dead(driver, handle, target) else Observed.MOUNTED
        if not isinstance(driver, BlockDriver):
            raise TypeError(type(driver).__name__)
        below = driver.mapped(handle)
        if not self.host.is_mountpoint(target):
            return Observed.ABSENT if below is None else Observed.MAPPED
        device = self.layer.shown(volume.id, self._encryption.node(volume, below))
        if below is None:
            # A node of device-mapper's over it stays when its disk has gone.
            lost = self._is_lost(volume, target) if device is None else self._is_of(volume, target, device)
            return Observed.LOST if lost else Observed.FOREIGN
        return Observed.MOUNTED if device and self._is_of(volume, target, device) else Observed.FOREIGN

    def _is_lost(self, volume: Volume, target: Path) -> bool:
        """Whether what is mounted lies on a device that the machine no longer has, a disk that was pulled, or on one
        that nothing is behind any more, as its process has died."""
        if volume.mode is VolumeMode.BLOCK:
            number = target.stat().st_rdev
            there = Path("/sys/dev/block", f"{os.major(number)}:{os.minor(number)}").exists()
            return not there or self._is_unreadable(target)
        entry = next((entry for entry in reversed(self.host.mounts()) if entry.target == target), None)
        if entry is None or not entry.source.startswith("/dev/"):
            return False
        return not Path(entry.source).exists() or self._is_unreadable(Path(entry.source))

    def _is_unreadable(self, device: Path) -> bool:
        """By a child, past the caches. One that does not answer is not known to be dead."""
        words = ("dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none")
        try:
            return os.strerror(errno.EIO) in self.host.run(words, timeout=READ_TIMEOUT, check=False).stderr
        except DeadlineExceeded:
            return False

    def _is_dead(self, driver: FilesystemDriver, handle: Handle, target: Path) -> bool:
        """Raises DeadlineExceeded when its server does not answer: that is not dead yet."""
        try:
            self.host.tree_status(target)
        except MountFailed as error:
            return error.errno in _DEAD and driver.needs_remount(handle, target, error.errno)
        return False

    def _is_of(self, volume: Volume, target: Path, device: Path) -> bool:
        if volume.mode is VolumeMode.BLOCK:
            return target.stat().st_rdev == device.stat().st_rdev
        return self._lies_on(target, device)

    def _lies_on(self, target: Path, device: Path) -> bool:
        """By the mount table: stat(2) of a btrfs tells a number of its own and not its device's."""
        number = device.stat().st_rdev
        entry = next((entry for entry in reversed(self.host.mounts()) if entry.target == target), None)
        if entry is None:
            return False
        if entry.device == f"{os.major(number)}:{os.minor(number)}":
            return True
        try:
            return Path(entry.source).stat().st_rdev == number
        except OSError:
            return False

    def is_mounted(self, volume: Volume, driver: Driver) -> bool:
        """Looked at now, and truly this volume."""
        return self.observe(volume, driver) is Observed.MOUNTED

    def establish(self, volume: Volume, driver: Driver, *, options: Sequence[str] = ()) -> Path:
        """The volume's path, with the volume at it: a tree, or the device node of a raw block volume. `options`: for
        mounting it now, beside its own. Raises MountFailed, BackendError and what the driver raises."""
        target, handle = self.path(volume.id), handle_of(volume)
        if self.host.is_mountpoint(target) and self._adopt(volume, driver):
            return target
        if volume.mode is VolumeMode.BLOCK:
            target.touch(mode=0o600)
        else:
            target.mkdir(mode=0o700, exist_ok=True)
        every = (*volume.mount_options, *(option for option in options if option not in volume.mount_options))
        self._reach.attach_here(volume)
        try:
            if isinstance(driver, FilesystemDriver):
                driver.mount(handle, target, options=every, readonly=False)
            elif isinstance(driver, BlockDriver):
                self._mount_device(volume, driver, handle, target, options=every)
        except BaseException:
            with contextlib.suppress(VolumedError):
                self._reach.detach_here(volume)
            raise
        self._remember(volume.id, mounted=True)
        crash.point("mount.mounted")
        return target

    def _adopt(self, volume: Volume, driver: Driver) -> bool:
        """Somebody mounted it before us, most likely we before a crash. Never hand out what is not the volume. Whether
        it can be used; what is dead is taken away."""
        observed = self.observe(volume, driver)
        if observed is Observed.DEAD and isinstance(driver, FilesystemDriver):
            # Nothing can be lost any more by force.
            self.host.unmount_network(self.path(volume.id), force=True)
            driver.unmount(handle_of(volume), self.path(volume.id))
            self._remember(volume.id, mounted=False)
            return False
        if observed is Observed.LOST:
            raise MountFailed(
                "its device has gone from this machine, and is mounted still",
                subject=f"volume {volume.name}",
                hint=f"stop what uses it (volumectl who {volume.name}), then it can be mounted anew",
            )
        if observed is not Observed.MOUNTED:
            raise MountFailed(
                f"something else is mounted at {self.path(volume.id)}",
                subject=f"volume {volume.name}",
                hint="run `volumectl doctor`",
            )
        self._remember(volume.id, mounted=True)
        return True

    def revive(self, volume: Volume) -> Sequence[Revived]:
        """What is mounted at the volume's path, put in the place of each dead mount of it, in containers as well."""
        return self.host.revive(self.path(volume.id))

    def _mount_device(
        self, volume: Volume, driver: BlockDriver, handle: Handle, target: Path, *, options: Sequence[str]
    ) -> None:
        fresh = self._is_fresh(volume, driver)
        below = driver.map(handle)
        crash.point("mount.mapped")
        try:
            device = self.layer.over(volume, self._encryption.opened(volume, below), fresh=fresh)
            if volume.filesystem is None:
                self.host.bind(device, target)
            else:
                kind = filesystems.get(volume.filesystem)
                kind.check(self.host, device)
                self.host.mount(device, target, fstype=volume.filesystem, options=(*kind.mount_options, *options))
        except BaseException:
            with contextlib.suppress(VolumedError):
                self.unmap(volume, driver)
            raise

    def remove(self, volume: Volume, driver: Driver) -> None:
        """Neither mount nor device of the volume on this node any more; its empty mount point stays until `forget`.

        Raises InUse while a process holds it.
        """
        if volume.handle is None:
            return
        target = self.path(volume.id)
        if isinstance(driver, FilesystemDriver):
            driver.unmount(volume.handle, target)
        else:
            self.host.unmount(target)
        self._remember(volume.id, mounted=False)
        crash.point("unmount.unmounted")
        if isinstance(driver, BlockDriver):
            self.unmap(volume, driver)
        self._reach.detach_here(volume)

    def unmap(self, volume: Volume, driver: BlockDriver) -> None:
        """No device of it on this node any more. Raises InUse."""
        if self.layer.node(volume.id) is not None:
            self.layer.remove(volume.id, self.bare(volume, driver))
        self._encryption.close(volume)
        driver.unmap(handle_of(volume))

    def mapped(self, volume: Volume, driver: BlockDriver) -> Path | None:
        """Its device on this node, as it is used, or None. Never maps."""
        return self.layer.shown(volume.id, self.bare(volume, driver))

    def bare(self, volume: Volume, driver: BlockDriver) -> Path | None:
        """As `mapped`, below the node that a live move needs."""
        return self._encryption.node(volume, driver.mapped(handle_of(volume)))

    def _is_fresh(self, volume: Volume, driver: BlockDriver) -> bool:
        """Whether nobody can have its device open, to whom the node over it would come too late. A mounted file
        system's is claimed, which shows; a raw device's user claims nothing."""
        if not self.layer.wanted or volume.mode is VolumeMode.FILESYSTEM:
            return True
        return driver.mapped(handle_of(volume)) is None

    def forget(self, volume_id: VolumeId) -> None:
        """The mount point of a volume that goes for good. Raises HostError when it holds files: somebody wrote them
        while the volume was not mounted, and only a person can say whose they are."""
        remove_mount_point(self.path(volume_id))

    def device(self, volume: Volume, driver: BlockDriver) -> Path:
        """On this node, with nothing mounted; `remove` takes it away."""
        fresh = self._is_fresh(volume, driver)
        return self.layer.over(volume, self._encryption.opened(volume, self._below(volume, driver)), fresh=fresh)

    def _below(self, volume: Volume, driver: BlockDriver) -> Path:
        """The device as its storage has it."""
        self._reach.attach_here(volume)
        return driver.map(handle_of(volume))

    def encrypt(self, volume: Volume, driver: BlockDriver) -> None:
        """A new volume that is to be encrypted; what was on its device is lost."""
        self._encryption.format(volume, self._below(volume, driver))

    def rekey(self, volume: Volume, driver: BlockDriver, *, origin: Volume | None = None) -> None:
        """See `Encryption.rekey`; in use or not, and afterwards as it was."""
        there = driver.mapped(handle_of(volume))
        try:
            self._encryption.rekey(volume, there or self._below(volume, driver), origin=origin)
        finally:
            if there is None:
                self.unmap(volume, driver)
                self._reach.detach_here(volume)

    def resize(self, volume: Volume, driver: BlockDriver) -> None:
        """What is over the device as large as the device has become."""
        below = driver.mapped(handle_of(volume))
        if below is None:
            return
        self._encryption.resize(volume, below)
        opened = self._encryption.node(volume, below)
        if opened is not None:
            self.layer.resize(volume.id, opened)

    @contextlib.contextmanager
    def looked_at(self, volume: Volume, driver: BlockDriver) -> Iterator[Path]:
        """Its device on this node for a moment, and afterwards as it was."""
        there = self.mapped(volume, driver)
        if there is not None:
            yield there
            return
        try:
            yield self.device(volume, driver)
        finally:
            self.unmap(volume, driver)
            self._reach.detach_here(volume)

    def format(self, volume: Volume, driver: BlockDriver) -> None:
        """A new file system on a new volume, and the root of its tree as it was asked for."""
        if volume.filesystem is None:
            return
        device = self.device(volume, driver)
        filesystems.get(volume.filesystem).mkfs(self.host, device, options=volume.mkfs_options)
        crash.point("create.formatted")

    def renew(self, volume: Volume, driver: BlockDriver) -> None:
        """Make the file system of a copy its own: another identity than its original's, as large as its device."""
        if volume.filesystem is None:
            return
        device = self.device(volume, driver)
        kind = filesystems.get(volume.filesystem)
        kind.check(self.host, device)
        kind.renew(self.host, device)
        path = self.establish(volume, driver)
        kind.grow(self.host, device, path)
        before = path.stat()
        with contextlib.suppress(OSError):  # e2fsck makes it; the original need not have it
            (path / "lost+found").rmdir()
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def initialise_root(self, volume: Volume, driver: Driver) -> None:
        """Owner and mode of the tree's root; and empty, or Docker would not fill it from the image."""
        path = self.establish(volume, driver)
        numbers = [-1 if number is None else number for number in _numbers(volume.ownership)]
        if driver.remote:
            self._in_child("own", path, *numbers)
            return
        with contextlib.suppress(FileNotFoundError):
            (path / "lost+found").rmdir()
        permissions.own(path, *numbers)

    def grant_group(self, volume: Volume, driver: Driver, gid: int) -> None:
        """Everything in the mounted tree made writable for a group. Raises HostError."""
        path = self.path(volume.id)
        if driver.remote:
            self._in_child("group", path, gid)
        else:
            permissions.grant_group(path, gid)

    def _in_child(self, what: str, path: Path, *numbers: int) -> None:
        """A server may keep whoever changes an owner waiting."""
        try:
            self.host.run([*permissions.CHILD, what, path, *map(str, numbers)], timeout=GRANTING_TIMEOUT)
        except CommandFailed as error:
            raise HostError(
                f"its owner cannot be set: {error.stderr.strip() or error.text}",
                subject=str(path),
                hint="a server that maps root to nobody (root_squash) refuses that: export it with no_root_squash",
            ) from None


def remove_mount_point(path: Path) -> None:
    """An empty folder, or the empty file under a device node. Raises HostError when it holds anything."""
    try:
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()
        else:
            path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostError(
            f"its empty mount point cannot be removed: {error.strerror}",
            subject=str(path),
            hint="look at what lies in it, move that away, and try again",
        ) from None


def _numbers(ownership: Ownership) -> tuple[int | None, int | None, int | None]:
    return ownership.uid, ownership.gid, ownership.mode
