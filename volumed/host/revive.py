"""A tree mounted anew, put in the place of the dead mount wherever somebody still sees that one.

A container has a mount of its own of the volume's tree. When the process behind a FUSE mount dies, or a server forgets
its handles, mounting the volume anew at our path does nothing for it. So the new tree is moved over each dead one, in
the mount namespace it is seen from: open_tree(2), setns(2), move_mount(2), in a child that may be left behind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from volumed.driver import MountEntry, Revived
from volumed.errors import CommandFailed, DeadlineExceeded
from volumed.host.mounts import parse_mountinfo
from volumed.host.run import run

_CHILD = (sys.executable, "-I", "-S", str(Path(__file__).with_name("revive_child.py")))
_TIMEOUT = 30.0
_PROC = Path("/proc")


class _Seen(NamedTuple):
    """A mount of the tree, in the namespace of this process."""

    pid: int
    entry: MountEntry


def revive(target: Path, table: Sequence[MountEntry]) -> list[Revived]:
    """See `volumed.driver.Host.revive`."""
    ours = next((entry for entry in reversed(table) if entry.target == target), None)
    if ours is None:
        return []
    done = []
    for seen in _users(ours):
        outcome = _replace(target, seen)
        if outcome != "alive":
            done.append(Revived(seen.pid, seen.entry.target, "" if outcome == "replaced" else outcome))
    return done


def _users(ours: MountEntry) -> Iterator[_Seen]:
    """By what was mounted, as the number of a device is new after each mount."""
    for pid in _one_of_each_namespace():
        try:
            text = (_PROC / str(pid) / "mountinfo").read_bytes().decode("utf-8", "surrogateescape")
        except OSError:
            continue  # it ended meanwhile
        if ours.source not in text:
            continue
        for entry in parse_mountinfo(text):
            same = (entry.fstype, entry.source, entry.root) == (ours.fstype, ours.source, ours.root)
            if same and entry.mount_id != ours.mount_id:
                yield _Seen(pid, entry)


def _one_of_each_namespace() -> Iterator[int]:
    known: set[str] = set()
    for name in sorted((name for name in os.listdir(_PROC) if name.isdecimal()), key=int):  # noqa: PTH208
        try:
            namespace = os.readlink(_PROC / name / "ns/mnt")  # noqa: PTH115 (text, not a path)
        except OSError:
            continue
        if namespace not in known:
            known.add(namespace)
            yield int(name)


def _replace(target: Path, seen: _Seen) -> str:
    """`alive`, `replaced`, or why it was not."""
    try:
        told = run([*_CHILD, target, str(seen.pid), seen.entry.target, *seen.entry.options], timeout=_TIMEOUT)
    except DeadlineExceeded:
        return "its server does not answer"
    except CommandFailed as error:
        return error.stderr.strip().rpartition("\n")[2] or error.text
    return told.stdout.strip()
