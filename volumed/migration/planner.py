"""Which way the data goes, what the volume will be at its new place, and what that costs. Touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from volumed.core.backends import Backend
from volumed.core.options import read_options
from volumed.core.placement import DEFAULT_FILESYSTEM, DEFAULT_SIZE
from volumed.driver import BlockDriver, Capability, FilesystemDriver, SupportsAttach, SupportsNativeCopy
from volumed.errors import BackendUnavailable, InvalidRequest, NotSupported, OutOfRange
from volumed.host import filesystems
from volumed.migration.losses import Census, Loss, of_tree
from volumed.model import MigrationPhase, MovePath, Place, Snapshot, Volume, VolumeMode, new_volume_id
from volumed.units import format_size

# Until a move of the same kind was seen here: bytes a second, files a second. Of one ordinary local disk.
BYTE_RATE = {MovePath.NATIVE: 1 << 30, MovePath.LIVE: 300 << 20, MovePath.BLOCK: 400 << 20, MovePath.TREE: 150 << 20}
FILE_RATE = 8_000
# A target's file system needs room for itself beside the data.
OVERHEAD = 1.15
# What any mount takes, whatever file system is below it.
PER_MOUNT = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime"})
PHASES = (
    *(MigrationPhase.PREPARED, MigrationPhase.SEEDING, MigrationPhase.CONVERGING, MigrationPhase.QUIESCED),
    *(MigrationPhase.VERIFIED, MigrationPhase.CUTOVER, MigrationPhase.KEPT, MigrationPhase.DONE),
)


def phases_of(path: MovePath) -> tuple[MigrationPhase, ...]:
    """Those that a move by this path goes through: under a live one nobody holds still."""
    return tuple(phase for phase in PHASES if path is not MovePath.LIVE or phase is not MigrationPhase.QUIESCED)


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asks for. Left out is left to the planner, or stays as it is."""

    backend: str
    path: str = ""
    size: int | None = None
    filesystem: str = ""
    options: dict[str, str] = {}  # the target driver's
    accept: tuple[str, ...] = ()
    bandwidth: int = 0
    max_pause: float | None = None
    keep_source: float = 86400.0
    wait: bool = False  # until nobody uses it: no container is stopped
    by: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    path: MovePath
    carrier: MovePath  # BLOCK or TREE: of a native copy what proves it and brings it up to date
    way: str  # of the native path: how the storage copies, for people
    rejected: Mapping[str, str]  # better paths, and why each cannot be taken
    target: Place
    phases: tuple[str, ...]
    bytes: int
    files: int
    seconds: float
    pause: float  # predicted; 0: nobody waits
    touched: tuple[str, ...]  # consumers, for people
    losses: tuple[Loss, ...]


class Chosen(NamedTuple):
    path: MovePath
    carrier: MovePath
    way: str = ""  # how the storage copies, for people
    rejected: Mapping[str, str] = {}


def choose_path(volume: Volume, source: Backend, target: Backend, *, in_use: bool, wish: Wish, no_live: str) -> Chosen:
    """The best that can be taken, or the one that was named; and why no better one. Raises NotSupported. `no_live`:
    what keeps this machine from moving it under its users, if anything does."""
    rejected: dict[str, str] = {}
    by_device = isinstance(source.driver, BlockDriver), isinstance(target.driver, BlockDriver)
    for path in [_named_path(wish.path)] if wish.path else MovePath:
        try:
            way = _WAYS[path](volume, source, target, in_use=in_use, wish=wish)
            _allow(no_live if path is MovePath.LIVE else "")
            carried = path not in (MovePath.NATIVE, MovePath.LIVE)
            carrier = path if carried else MovePath.BLOCK if by_device[1] else MovePath.TREE
            return Chosen(path, carrier, way, rejected)
        except NotSupported as error:
            if wish.path:
                raise NotSupported(f"cannot go by {path}: {error.text}", subject=f"volume {volume.name}") from None
            if path is not MovePath.LIVE or (in_use and all(by_device)):
                rejected[str(path)] = error.text
    raise NotSupported(
        "cannot be moved there: " + "; ".join(f"{path}: {reason}" for path, reason in rejected.items()),
        subject=f"volume {volume.name}",
    )


def _allow(reason: str) -> None:
    if reason:
        raise NotSupported(reason)


def _named_path(text: str) -> MovePath:
    try:
        return MovePath(text)
    except ValueError:
        raise InvalidRequest(f"there is no path {text[:40]!r}", hint=f"choose {', '.join(MovePath)}") from None


def _native(volume: Volume, source: Backend, target: Backend, *, in_use: bool, wish: Wish) -> str:
    """How the storage would copy. Raises NotSupported with the reason why it cannot."""
    target.require(Capability.NATIVE_COPY)
    if volume.encryption:
        raise NotSupported("it would share its key with what is left behind")
    driver = target.driver
    assert isinstance(driver, SupportsNativeCopy)
    way = target.call(lambda: driver.way_from(source.driver))
    if isinstance(driver, BlockDriver):
        if in_use and not wish.path:
            raise NotSupported("it is in use, and would be read again while everybody waits (unless told to)")
        _blocks(volume, source, target, in_use=False, wish=wish)
    return way


def _live(volume: Volume, source: Backend, target: Backend, *, in_use: bool, wish: Wish) -> str:
    """Raises NotSupported with the reason why the kernel cannot take it there under its users."""
    if not in_use:
        raise NotSupported("nobody uses it")
    _blocks(volume, source, target, in_use=False, wish=wish)
    for backend in (source, target):
        if isinstance(backend.driver, SupportsAttach):
            raise NotSupported(f"what backend {backend.name} attaches to machines is not exchanged in use yet")
    if wish.bandwidth:
        raise NotSupported("the kernel keeps to no --bandwidth")
    if wish.wait:
        raise NotSupported("it is to wait until nobody uses it")
    return ""


def _blocks(volume: Volume, source: Backend, target: Backend, *, in_use: bool, wish: Wish) -> str:
    """Raises NotSupported with the reason why the blocks cannot be copied as they are."""
    for backend in (source, target):
        if not isinstance(backend.driver, BlockDriver):
            raise NotSupported(f"backend {backend.name} holds trees and has no devices")
    if wish.size is not None and volume.size is not None and wish.size < volume.size:
        raise NotSupported("a device cannot shrink")
    if volume.mode is VolumeMode.FILESYSTEM:
        _blocks_of_filesystem(volume, in_use=in_use, wish=wish)
    return ""


def _blocks_of_filesystem(volume: Volume, *, in_use: bool, wish: Wish) -> None:
    if wish.filesystem and wish.filesystem != volume.filesystem:
        raise NotSupported(f"its file system is {volume.filesystem}, and {wish.filesystem} is asked for")
    if volume.filesystem == "btrfs":
        raise NotSupported("two devices with one btrfs on them must never be seen by one kernel")
    if wish.size is not None and wish.size > (volume.size or 0):
        try:
            filesystems.get(volume.filesystem or "").require_growth()
        except NotSupported as error:
            raise NotSupported(f"its file system could not grow there: {error.text}") from None
    if in_use:
        raise NotSupported("it is in use, and its blocks would have to be read again while everybody waits")


def _tree(volume: Volume, source: Backend, target: Backend, *, in_use: bool, wish: Wish) -> str:
    if volume.mode is VolumeMode.BLOCK:
        raise NotSupported("it is a raw device and has no tree")
    return ""


_WAYS = {MovePath.NATIVE: _native, MovePath.LIVE: _live, MovePath.BLOCK: _blocks, MovePath.TREE: _tree}


def shape_of(volume: Volume, target: Backend, wish: Wish, census: Census | None) -> Place:
    """What the volume will be there. Raises what its backend cannot do."""
    subject = f"volume {volume.name}"
    if not target.health.ok:
        raise BackendUnavailable(f"cannot be used now: {target.health.error}", subject=f"backend {target.name}")
    target.require(Capability.BLOCK if volume.mode is VolumeMode.BLOCK else Capability.FILESYSTEM)
    options = wish.options or (volume.options if target.name == volume.backend else {})
    read_options(target.driver.VolumeOptions, options, subject=f"backend {target.name}")
    size, filesystem = wish.size or volume.size, ""
    if isinstance(target.driver, BlockDriver):
        size = size or max(DEFAULT_SIZE, 2 * (census.apparent if census else 0))
        if volume.mode is VolumeMode.FILESYSTEM:
            filesystem = wish.filesystem or volume.filesystem or DEFAULT_FILESYSTEM
            least = filesystems.get(filesystem).minimum_size
            size = max(size, least) if wish.size is None else size
            if size < least:
                raise OutOfRange(f"{size} bytes are too small for {filesystem}, which needs {least}", subject=subject)
    elif volume.encryption:
        raise NotSupported(
            "holds folders, which cannot be encrypted as the volume is", subject=f"backend {target.name}"
        )
    elif wish.filesystem:
        raise NotSupported("volumes there are trees of the backend's own", subject=f"backend {target.name}")
    elif Capability.SIZE not in target.capabilities:
        size = None
    if volume.mode is VolumeMode.BLOCK and volume.size and size and size < volume.size:
        raise OutOfRange(f"has {volume.size} bytes, and a device cannot shrink to {size}", subject=subject)
    if census is not None and size is not None and census.bytes * OVERHEAD > size:
        raise OutOfRange(
            f"holds {format_size(census.bytes)}, which do not fit into {format_size(size)}",
            subject=subject,
            hint="ask for a larger --size",
        )
    same = (filesystem or None) == volume.filesystem
    return Place(
        backend=target.name,
        stored_as=new_volume_id(),
        size=size,
        filesystem=filesystem or None,
        mkfs_options=volume.mkfs_options if same else (),
        mount_options=volume.mount_options if same else tuple(set(volume.mount_options) & PER_MOUNT),
        options=options,
    )


def losses_of(
    volume: Volume,
    target: Backend,
    place: Place,
    *,
    census: Census | None,
    snapshots: Sequence[Snapshot],
    shared: bool,
) -> list[Loss]:
    """`shared`: it is used, or meant, for several nodes."""
    found: list[Loss] = []
    if census is not None and isinstance(target.driver, FilesystemDriver):
        found += of_tree(census.used, target.driver.cannot_hold)
    if volume.size is not None and place.size is None:
        reason = target.lacking.get(Capability.SIZE, "the target enforces no sizes")
        found.append(
            Loss(kind="size", text=f"its size of {format_size(volume.size)} is not enforced any more: {reason}")
        )
    if snapshots:
        names = ", ".join(snapshot.name for snapshot in snapshots)
        found.append(Loss(kind="snapshots", text=f"its snapshots stay behind and go with the source: {names}"))
    if shared and Capability.MULTI_NODE not in target.capabilities:
        found.append(Loss(kind="multi-node", text="it is used from several nodes, and could be from one alone"))
    return found


def estimated_seconds(path: MovePath, *, amount: int, files: int, bandwidth: int) -> float:
    """Copying and reading back."""
    rate = min(bandwidth, BYTE_RATE[path]) if bandwidth else BYTE_RATE[path]
    copying = amount / rate + (files / FILE_RATE if path is MovePath.TREE else 0.0)
    return round(copying * 1.5, 1)


def estimated_pause(path: MovePath, *, amount: int, in_use: bool) -> float:
    """Seconds for which its users wait: a tree's last round is short; a device in use is read again as a whole; a live
    move has them wait for the milliseconds in which the kernel swaps a table."""
    if not in_use or path is MovePath.LIVE:
        return 0.0
    return 1.0 if path is MovePath.TREE else max(0.1, round(amount * 1.5 / BYTE_RATE[path], 1))
