"""What a tree may hold, tried on a mounted one: the words of `FilesystemDriver.cannot_hold`, and what all must hold."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from volumed.units import MIB


def not_held(tree: Path) -> set[str]:
    """The words for which the tree refused or lost what was tried."""
    lost = set()
    for word, trial in _trials(tree).items():
        try:
            held = trial()
        except OSError:
            held = False
        if not held:
            lost.add(word)
    return lost


def _trials(tree: Path) -> dict[str, Callable[[], bool]]:
    """Those that one process can try."""
    plain = tree / "plain"
    plain.write_text("x")

    def link() -> bool:
        os.link(plain, tree / "linked")
        return True

    def node(kind: int) -> bool:
        path = tree / f"node{kind}"
        os.mknod(path, kind | 0o600, os.makedev(7, 3))
        seen = path.stat()
        return stat.S_IFMT(seen.st_mode) == kind and (kind != stat.S_IFBLK or seen.st_rdev == os.makedev(7, 3))

    def xattr(name: str, value: bytes) -> bool:
        os.setxattr(plain, name, value)
        return os.getxattr(plain, name) == value

    def immutable() -> bool:
        (tree / "frozen").touch()
        held = not subprocess.run(["chattr", "+i", tree / "frozen"], check=False, capture_output=True).returncode
        subprocess.run(["chattr", "-i", tree / "frozen"], check=False, capture_output=True)
        return held

    def sparse() -> bool:
        with (tree / "hollow").open("wb") as file:
            file.truncate(4 * MIB)
        return (tree / "hollow").stat().st_blocks < 4096

    def deep() -> bool:
        path = tree
        for _ in range(6):
            path = path / ("d" * 200)
            path.mkdir()
        return True

    def named(name: str) -> bool:
        (tree / name).touch()
        return tree / name in set(tree.iterdir())

    def unlinked() -> bool:
        with (tree / "gone").open("w+") as file:
            file.write("still here")
            (tree / "gone").unlink()
            file.seek(0)
            return file.read() == "still here"

    def symlink() -> bool:
        (tree / "symlink").symlink_to("x" * 1000)
        return (tree / "symlink").readlink() == Path("x" * 1000)

    def owner() -> bool:
        os.chown(plain, 12345, 54321)
        return (plain.stat().st_uid, plain.stat().st_gid) == (12345, 54321)

    def mode() -> bool:
        plain.chmod(0o4751)
        return stat.S_IMODE(plain.stat().st_mode) == 0o4751

    def time_of() -> bool:
        os.utime(plain, ns=(1, 1234567890123456789))
        return plain.stat().st_mtime_ns == 1234567890123456789

    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in ((1, 6, 2**32 - 1), (2, 4, 1000), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 4, 2**32 - 1))
    )
    return {
        "hardlinks": link,
        "symlinks": symlink,
        "devices": lambda: node(stat.S_IFBLK),
        "fifos": lambda: node(stat.S_IFIFO),
        "sockets": lambda: node(stat.S_IFSOCK),
        "xattrs": lambda: xattr("user.one", b"1"),
        "trusted-xattrs": lambda: xattr("trusted.one", b"1"),
        "capabilities": lambda: xattr("security.capability", struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)),
        "flags": immutable,
        "acls": lambda: xattr("system.posix_acl_access", acl),
        "owners": owner,
        "modes": mode,
        "times": time_of,
        "sparse": sparse,
        "long-paths": deep,
        "open-unlinked": unlinked,
        "names": lambda: named("a\udcff é <&>\"'\\%+~#?*"),
        "control-characters": lambda: named("a\x01b"),
    }
