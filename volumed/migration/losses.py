"""What the data of a volume makes use of, and what of it another storage cannot hold.

Words are those of `FilesystemDriver.cannot_hold`, and besides: size (is not enforced there), snapshots (stay behind),
multi-node (it is used on several nodes, and could not be there).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from volumed.driver import Driver, FilesystemDriver
from volumed.errors import HostError, PreconditionFailed
from volumed.migration.tree import posix
from volumed.migration.tree.entries import SKIPPED

LONG_PATH, LONGEST_PATH = 1000, 4000
_OF_THE_POLICY = "security.selinux"  # which gives it anew
_ACL = ("system.posix_acl_access", "system.posix_acl_default")
_KINDS = {stat.S_IFLNK: "symlinks", stat.S_IFCHR: "devices", stat.S_IFBLK: "devices", stat.S_IFIFO: "fifos"}
_KINDS[stat.S_IFSOCK] = "sockets"


class Census(msgspec.Struct, frozen=True, kw_only=True):
    """Of a tree: how much there is, and the first place where each thing is used that not every storage holds."""

    bytes: int  # allocated
    apparent: int  # sizes of the files, each inode once
    files: int
    used: dict[str, str]  # word -> path, for people


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    text: str


def take_census(root: Path) -> Census:
    """One walk, by folders' descriptors: paths may be longer than the kernel takes. Raises HostError."""
    used: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()  # of what has several names
    allocated = apparent = files = 0
    try:
        for where, name, folder, status in _walk(root):
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                key = (status.st_dev, status.st_ino)
                used.setdefault("hardlinks", _shown(where, name))
                if key in seen:
                    continue
                seen.add(key)
            files += 1
            used.setdefault("times", _shown(where, name))
            allocated += status.st_blocks * 512
            apparent += status.st_size if stat.S_ISREG(status.st_mode) else 0
            for word in _uses(folder, name, where, status):
                used.setdefault(word, _shown(where, name))
    except OSError as error:
        raise HostError(f"cannot be looked through: {error.strerror}", subject=str(root)) from None
    return Census(bytes=allocated, apparent=apparent, files=files, used=used)


def _walk(root: Path) -> Iterator[tuple[str, str, int, os.stat_result]]:
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        device = os.fstat(top).st_dev
        for where, folders, names, folder in os.fwalk(".", follow_symlinks=False, dir_fd=top):
            for name in (*folders, *names):
                try:
                    status = os.lstat(name, dir_fd=folder)
                except FileNotFoundError:  # removed while we looked
                    continue
                if status.st_dev == device:
                    yield where, name, folder, status
            folders[:] = [name for name in folders if _same_device(name, folder, device)]
    finally:
        os.close(top)


def _same_device(name: str, folder: int, device: int) -> bool:
    try:
        return os.lstat(name, dir_fd=folder).st_dev == device
    except FileNotFoundError:
        return False


def _uses(folder: int, name: str, where: str, status: os.stat_result) -> Iterator[str]:
    kind = stat.S_IFMT(status.st_mode)
    if kind in _KINDS:
        yield _KINDS[kind]
    if kind == stat.S_IFREG and status.st_blocks * 512 < status.st_size:
        yield "sparse"
    if (status.st_uid, status.st_gid) != (0, 0):
        yield "owners"
    if kind != stat.S_IFLNK and stat.S_IMODE(status.st_mode) not in (0o644, 0o755):
        yield "modes"
    length = len(os.fsencode(where)) + len(os.fsencode(name))
    if length > LONG_PATH:
        yield "long-paths"
    if length > LONGEST_PATH:
        yield "longest-paths"
    if any(ord(character) < 32 for character in name):
        yield "control-characters"
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        yield from _attributes(folder, name)


def _attributes(folder: int, name: str) -> Iterator[str]:
    try:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return
    try:
        found = posix.get_flags(opened)
        flags = found is not None and found[0]
        names = os.listxattr(opened)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        names = []
    finally:
        os.close(opened)
    yield from {_word_of(each) for each in names if not each.startswith((*SKIPPED, _OF_THE_POLICY))}
    if flags:
        yield "flags"


def _word_of(attribute: str) -> str:
    if attribute in _ACL:
        return "acls"
    if attribute == "security.capability":
        return "capabilities"
    return "trusted-xattrs" if attribute.startswith("trusted.") else "xattrs"


def _shown(where: str, name: str) -> str:
    path = os.path.join(where, name).removeprefix("./")  # noqa: PTH118 (any bytes)
    return ascii(path)[1:-1]


def of_tree(used: dict[str, str], cannot_hold: Iterable[str]) -> list[Loss]:
    """What of it would not arrive."""
    missing = frozenset(cannot_hold)
    return [
        Loss(kind=word, text=f"the target cannot hold {word}: {used[word]}, for one")
        for word in sorted(used.keys() & missing)
    ]


def named(words: Iterable[str], accepted: Iterable[str]) -> frozenset[str]:
    """Those that were accepted: `acl` is `acls`."""
    said = {word.strip().rstrip("s") for word in accepted}
    return frozenset(word for word in words if word.rstrip("s") in said)


def check(losses: Iterable[Loss], accepted: Iterable[str], *, subject: str) -> None:
    """Raises PreconditionFailed with the list of those that were not accepted by name."""
    every = list(losses)
    fine = named((loss.kind for loss in every), accepted)
    refused = [loss for loss in every if loss.kind not in fine]
    if refused:
        raise PreconditionFailed(
            "the move would lose something: " + "; ".join(loss.text for loss in refused),
            subject=subject,
            hint=f"accept it by name: --accept-loss {','.join(loss.kind for loss in refused)}",
        )


def forgone(driver: Driver, accepted: Iterable[str]) -> frozenset[str]:
    """What of a tree is neither copied to this storage nor compared: it cannot hold it, and that was accepted."""
    return named(driver.cannot_hold, accepted) if isinstance(driver, FilesystemDriver) else frozenset()


def check_tree(root: Path, driver: Driver, accepted: Iterable[str], *, subject: str) -> None:
    """As the data is now: it may be hours since the plan. Raises PreconditionFailed."""
    if isinstance(driver, FilesystemDriver) and driver.cannot_hold:
        check(of_tree(take_census(root).used, driver.cannot_hold), accepted, subject=subject)
