"""A tree read from its storage, past the cache, and written down as a copy of it would be; and two such compared."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from volumed.migration.tree import content, entries, posix
from volumed.migration.tree.entries import Entry, Spot
from volumed.migration.tree.manifest import Manifest
from volumed.migration.tree.worker import Failure, Worker, joined

BATCH = 128  # names in a job


def walk(root: int) -> Iterator[list[tuple[str, list[str]]]]:
    """Every name below the root, and the root itself as ".", in jobs. Raises Failure."""
    job: list[tuple[str, list[str]]] = [("", ["."])]
    stack, size = [""], 1
    while stack:
        path = stack.pop()
        try:
            opened = posix.open_folder(root, path)
            try:
                names = list[str]()
                with os.scandir(opened) as listed:
                    for entry in listed:
                        names.append(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            stack.append(joined(path, entry.name))
                        if len(names) == BATCH:
                            yield [(path, names)]
                            names = []
            finally:
                os.close(opened)
        except OSError as error:
            raise Failure(path, error.errno or 0, error.strerror or str(error)) from None
        job.append((path, names))
        size += len(names)
        if size >= BATCH:
            yield job
            job, size = [], 0
    yield job


class Reader(Worker):
    """A worker that reads, too."""

    def read(self, folders: Sequence[tuple[str, list[str]]]) -> list[Entry]:
        found = []
        for path, names in folders:
            for name in names:
                full = "" if name == "." and not path else joined(path, name)
                try:
                    found.append(self._read_one(path, name, full))
                except OSError as error:
                    raise Failure(full, error.errno or 0, error.strerror or str(error)) from error
                except content.Torn:
                    raise Failure(full, 0, "was cut off while it was read") from None
        return found

    def _read_one(self, path: str, name: str, full: str) -> Entry:
        folder = self._folder(self._source, path)
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            opened = self._folder(self._source, full)
            about = entries.read_about(self._source, Spot(opened, ".", opened), found.st_mode)
            if not full:
                about = about._replace(project=None)
            return entries.describe(full, os.fstat(opened), about.packed(), looked=0)
        if not stat.S_ISREG(found.st_mode):
            about = entries.read_about(self._source, Spot(folder, name, None), found.st_mode)
            return entries.describe(full, found, about.packed(), looked=0)
        opened = content.open_cold(folder, name, remote=self._source.remote)
        try:
            found = os.fstat(opened)
            about = entries.read_about(self._source, Spot(folder, name, opened), found.st_mode)
            content.drop_cache(opened, found.st_size)
            chunks = content.digests(opened, found, self._gate)
        finally:
            os.close(opened)
        digest = content.digest_of(chunks)
        return entries.describe(full, found, about.packed(), looked=0, digest=digest, chunks=chunks)


def differences(before: Path, after: Path, *, losses: frozenset[str], most: int) -> list[tuple[str, str]]:
    """Path and difference of what `after` holds otherwise than `before`, two manifests; but for what was to be lost."""
    kept, fresh = Manifest(before), Manifest(after)
    try:
        found = []
        for old, new in _side_by_side(kept.in_order(), fresh.in_order()):
            told = _difference(old, new, losses)
            if told:
                found.append(((old or new).path, told))  # type: ignore[union-attr]  # one of them is there
            if len(found) == most:
                break
        return found
    finally:
        kept.close()
        fresh.close()


def digest(manifest: Path) -> str:
    opened = Manifest(manifest)
    try:
        return opened.digest()
    finally:
        opened.close()


def _side_by_side(olds: Iterator[Entry], news: Iterator[Entry]) -> Iterator[tuple[Entry | None, Entry | None]]:
    old, new = next(olds, None), next(news, None)
    while old is not None or new is not None:
        left = None if old is None else os.fsencode(old.path)
        right = None if new is None else os.fsencode(new.path)
        if right is None or (left is not None and left < right):
            yield old, None
            old = next(olds, None)
        elif left is None or right < left:
            yield None, new
            new = next(news, None)
        else:
            yield old, new
            old, new = next(olds, None), next(news, None)


def _difference(old: Entry | None, new: Entry | None, losses: frozenset[str]) -> str:
    if new is None:
        return "is missing"
    if old is None:
        return "was not there"
    if stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode):
        return "is of another type"
    for text, lost, differs in _ASPECTS:
        if differs(old, new) and lost not in losses:
            return text(old, new)
    return ""


_Texts = Callable[[Entry, Entry], str]
_Aspect = tuple[_Texts, str, Callable[[Entry, Entry], bool]]
_ASPECTS: tuple[_Aspect, ...] = (
    (
        lambda old, new: f"has mode {stat.S_IMODE(new.mode):o}, not {stat.S_IMODE(old.mode):o}",
        "modes",
        lambda old, new: old.mode != new.mode and not stat.S_ISLNK(old.mode),
    ),
    (
        lambda old, new: f"belongs to {new.uid}:{new.gid}, not {old.uid}:{old.gid}",
        "owners",
        lambda old, new: (old.uid, old.gid) != (new.uid, new.gid),
    ),
    (lambda old, new: f"has {new.size} bytes, not {old.size}", "", lambda old, new: old.size != new.size),
    (lambda old, new: "is another device", "devices", lambda old, new: old.rdev != new.rdev),
    (
        lambda old, new: f"has other data at byte {_first(old.chunks, new.chunks)}",
        "",
        lambda old, new: old.chunks != new.chunks,
    ),
    (
        lambda old, new: "has other attributes, ACLs, flags or another target of the link",
        "xattrs",
        lambda old, new: old.about != new.about,
    ),
    (lambda old, new: "has another modification time", "times", lambda old, new: old.mtime != new.mtime),
)


def _first(old: bytes, new: bytes) -> int:
    """Offset of the first chunk that differs."""
    size = content.DIGEST
    same = (old[at : at + size] == new[at : at + size] for at in range(0, max(len(old), len(new)), size))
    return next((number for number, equal in enumerate(same) if not equal), 0) * content.CHUNK
