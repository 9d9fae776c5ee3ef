"""What a tree's entry is besides its data: owner, mode, times, attributes, flags; read, applied, compared.

An entry is written down as it was at the source when it was copied. The same signature later (`Entry.signature`)
means that nobody touched it since: every change of data or metadata moves the change time, which nobody can set.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import NamedTuple

from blake3 import blake3

from volumed.migration.tree import posix

# A change within the clock's grain of the last one does not show in a time: such an entry is looked at again.
GRAIN_NS = 100_000_000
_ACLS = frozenset({"system.posix_acl_access", "system.posix_acl_default"})
# What a file system says of itself in the form of attributes.
_OF_THE_FILESYSTEM = ("ceph.", "glusterfs.", "trusted.glusterfs.", "trusted.afr.", "trusted.gfid", "system.nfs4_acl")
_OF_THE_FILESYSTEM_TOO = ("system.cifs_acl", "trusted.SGI_ACL_", "btrfs.", "system.sockprotoname")
_OF_VOLUMED = ("trusted.volumed.",)  # a driver's mark says which volume it is: each side keeps its own
SKIPPED = _OF_THE_FILESYSTEM + _OF_THE_FILESYSTEM_TOO + _OF_VOLUMED
_NO_ATTRIBUTES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA)
_BIRTH_FLAGS = posix.XFLAG_IMMUTABLE | posix.XFLAG_APPEND


class Entry(NamedTuple):
    """`path` is relative to the tree's root, which is "". `about` holds in canonical form what else must agree:
    attributes, flags, a link's target. `chunks`: see `content`. `changed`: the chunks written last, None for all."""

    path: str
    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    ctime: int  # of the source, ns; 0: may have changed within the grain of the clock
    rdev: int
    links: int
    about: bytes
    digest: bytes
    chunks: bytes
    changed: bytes | None = None

    @property
    def signature(self) -> tuple[int, ...]:
        return (self.inode, self.mode, self.uid, self.gid, self.size, self.mtime, self.ctime)


class Tree(NamedTuple):
    """One side. `losses`: what the target cannot hold and the operator does without. `filled`: of a target, which had a
    copy of the source before anything was copied to it. `remote`: a server's, whose client may have a cache of its
    own."""

    root: int
    project: int = 0  # of its root: the volume's own, for its quota
    losses: frozenset[str] = frozenset()
    filled: bool = False
    remote: bool = False


def inode_of(found: os.stat_result) -> int:
    """Its number, as SQLite holds it: a server may make use of the 64th bit."""
    return found.st_ino - (1 << 64) if found.st_ino >> 63 else found.st_ino


def signature_of(found: os.stat_result) -> tuple[int, ...]:
    """As `Entry.signature`, of what is there now."""
    return (
        inode_of(found),
        found.st_mode,
        found.st_uid,
        found.st_gid,
        0 if stat.S_ISDIR(found.st_mode) else found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def describe(
    path: str,
    found: os.stat_result,
    about: bytes,
    *,
    looked: int,
    digest: bytes = b"",
    chunks: bytes = b"",
    changed: bytes | None = None,
) -> Entry:
    """`found` as it was before the entry was read; `looked`: the time (ns) just before that, or earlier. What changed
    in that same instant, while the entry was read, has the same time, however long the reading took."""
    fresh = looked - found.st_ctime_ns < GRAIN_NS
    kind = found.st_mode
    return Entry(
        path=path,
        inode=inode_of(found),
        mode=kind,
        uid=found.st_uid,
        gid=found.st_gid,
        size=0 if stat.S_ISDIR(kind) else found.st_size,
        mtime=found.st_mtime_ns,
        ctime=0 if fresh else found.st_ctime_ns,
        rdev=found.st_rdev if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) else 0,
        links=1 if stat.S_ISDIR(kind) else found.st_nlink,
        about=about,
        digest=digest,
        chunks=chunks,
        changed=changed,
    )


class Spot(NamedTuple):
    """Where an entry lies. `opened`: a descriptor of it where it is a file or directory; what else there is, is never
    opened: that would act."""

    folder: int
    name: str
    opened: int | None

    @property
    def place(self) -> int | str:
        """For calls that know no `dir_fd`."""
        return self.opened if self.opened is not None else f"/proc/self/fd/{self.folder}/{self.name}"


class About(NamedTuple):
    attributes: dict[str, bytes]
    flags: int
    project: int | None  # None: the volume's own
    link: str

    def packed(self) -> bytes:
        """Empty for the many that have nothing; a digest where it would be long."""
        if self == PLAIN:
            return b""
        parts = [struct.pack("=Iq", self.flags, -1 if self.project is None else self.project), os.fsencode(self.link)]
        for name in sorted(self.attributes):
            parts += [os.fsencode(name), self.attributes[name]]
        packed = b"".join(struct.pack("=I", len(part)) + part for part in parts)
        return packed if len(packed) <= 32 else blake3(packed).digest()


PLAIN = About({}, 0, None, "")


def read_about(tree: Tree, spot: Spot, mode: int) -> About:
    opened = spot.opened
    link = os.readlink(spot.name, dir_fd=spot.folder) if stat.S_ISLNK(mode) else ""
    flags, project = 0, None
    if opened is not None:
        found = posix.get_flags(opened)
        if found is not None:
            lost = tree.losses & {"xattrs", "flags"}
            flags = 0 if lost else found[0]
            project = found[1] if found[1] != tree.project and not lost else None
    attributes = _read_attributes(tree, spot.place)
    if not attributes and not flags and project is None and not link:
        return PLAIN
    return About(attributes, flags, project, link)


def _read_attributes(tree: Tree, place: int | str) -> dict[str, bytes]:
    """`place` follows no link: it is a descriptor, or what lies in a folder of ours by descriptor."""
    options = _unfollowed(place)
    try:
        names = os.listxattr(place, **options)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTES:
            return {}
        raise
    found = {}
    for name in names:
        if name.startswith(SKIPPED):
            continue
        if _is_lost(tree, name):
            continue
        try:
            found[name] = os.getxattr(place, name, **options)
        except OSError as error:
            if error.errno != errno.ENODATA:  # taken away a moment ago
                raise
    return found


def _is_lost(tree: Tree, attribute: str) -> bool:
    if attribute in _ACLS:
        return "acls" in tree.losses
    return (
        "xattrs" in tree.losses
        or (attribute == "security.capability" and "capabilities" in tree.losses)
        or (attribute.startswith("trusted.") and "trusted-xattrs" in tree.losses)
    )


def apply(tree: Tree, spot: Spot, wanted: os.stat_result, about: About, *, pristine: bool = False) -> None:
    """Make the target's entry like the source's. Owner first, as it clears set-user-id and capabilities; flags last,
    as an immutable file takes nothing any more. `pristine`: it is new, and inherited neither ACL nor flags."""
    place, opened = spot.place, spot.opened
    there = os.lstat(place) if isinstance(place, str) else os.fstat(place)
    mode = there.st_mode
    if (there.st_uid, there.st_gid) != (wanted.st_uid, wanted.st_gid) and "owners" not in tree.losses:
        os.chown(place, wanted.st_uid, wanted.st_gid, **_unfollowed(place))
        mode = -1
    if mode != wanted.st_mode and not stat.S_ISLNK(wanted.st_mode) and "modes" not in tree.losses:
        os.chmod(place, stat.S_IMODE(wanted.st_mode))  # noqa: PTH101
    if not pristine or about.attributes:
        _apply_attributes(tree, place, about)
    times = (wanted.st_atime_ns, wanted.st_mtime_ns)
    if isinstance(place, int):
        os.utime(place, ns=times)
    else:
        os.utime(place, ns=times, follow_symlinks=False)
    if opened is not None and not (pristine and about is PLAIN):
        _apply_flags(tree, opened, about)


def _unfollowed(place: int | str) -> dict[str, bool]:
    return {} if isinstance(place, int) else {"follow_symlinks": False}


def _apply_attributes(tree: Tree, place: int | str, about: About) -> None:
    there = _read_attributes(tree, place)  # an ACL by inheritance, or what an older round left
    if there == about.attributes:
        return
    options = _unfollowed(place)
    for extra in there.keys() - about.attributes.keys():
        os.removexattr(place, extra, **options)
    for key, value in about.attributes.items():
        if there.get(key) != value:
            os.setxattr(place, key, value, **options)


def passes_nothing_on(tree: Tree, folder: int) -> bool:
    """Whether what is made in the directory inherits neither ACL nor flags, and the project of the volume."""
    found = posix.get_flags(folder)
    if found not in (None, (0, tree.project)):
        return False
    return "system.posix_acl_default" not in _read_attributes(tree, folder)


def _apply_flags(tree: Tree, opened: int, about: About) -> None:
    project = tree.project if about.project is None else about.project
    found = posix.get_flags(opened)
    if found is None:
        if about.flags or about.project is not None:
            raise OSError(errno.EOPNOTSUPP, "the file system has no flags and project ids")
        return
    if found != (about.flags, project):
        posix.set_flags(opened, about.flags, project)


def unlock(opened: int, entry: Entry | None) -> bool:
    """Before something that exists is written again: take immutable and append-only away. Whether it had them."""
    if entry is not None and not entry.about:
        return False
    found = posix.get_flags(opened)
    if found is None or not found[0] & _BIRTH_FLAGS:
        return False
    posix.set_flags(opened, found[0] & ~_BIRTH_FLAGS, None)
    return True


def difference(tree: Tree, spot: Spot, entry: Entry, found: os.stat_result) -> str:  # noqa: PLR0911 (one each)
    """What of the target's entry is not as written down, for people; empty when all is."""
    if stat.S_IFMT(found.st_mode) != stat.S_IFMT(entry.mode):
        return "is of another type"
    link = stat.S_ISLNK(entry.mode)
    if found.st_mode != entry.mode and not link and "modes" not in tree.losses:
        return f"has mode {stat.S_IMODE(found.st_mode):o}, not {stat.S_IMODE(entry.mode):o}"
    if (found.st_uid, found.st_gid) != (entry.uid, entry.gid) and "owners" not in tree.losses:
        return f"belongs to {found.st_uid}:{found.st_gid}, not {entry.uid}:{entry.gid}"
    if found.st_size != entry.size and not stat.S_ISDIR(entry.mode):
        return f"has {found.st_size} bytes, not {entry.size}"
    if not _same_time(tree, found.st_mtime_ns, entry.mtime):
        return "has another modification time"
    if (stat.S_ISBLK(entry.mode) or stat.S_ISCHR(entry.mode)) and found.st_rdev != entry.rdev:
        return "is another device"
    if read_about(tree, spot, entry.mode).packed() != entry.about:
        return "has other attributes, ACLs, flags or another target of the link"
    return ""


def _same_time(tree: Tree, found: int, wanted: int) -> bool:
    return found == wanted or "times" in tree.losses
