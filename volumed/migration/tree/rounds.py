"""Rounds over a tree: which entries to look at, in which order. The work itself is done by the pool.

Order within a round: directories are made and what is gone is removed on the way down; files are copied; files of
several names are linked; directories get their metadata when all is in place; the target is synced, and only then is
anything written down for good.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from volumed.migration.tree import content, entries, posix
from volumed.migration.tree.entries import Entry, Tree
from volumed.migration.tree.manifest import Manifest
from volumed.migration.tree.pool import Pool
from volumed.migration.tree.worker import SHIFTED, Compared, Copied, Failure, joined, split

BATCH = 128  # entries in a job
MAX_DIFFERENCES = 100
# How much may have to be copied again after kill -9.
CHECKPOINT = 30.0


class Outcome(NamedTuple):
    """Of a round. `bytes`, `files`: what it had to write."""

    bytes: int
    files: int
    looked: int
    removed: int
    unsettled: int  # paths that changed under our hands: another round has to look at them


class Amount(NamedTuple):
    bytes: int
    files: int


def count(tree: Tree, tick: Callable[[], None]) -> Amount:
    """What there is: bytes allocated, and entries. What cannot be looked at now, the round will tell."""
    size = files = 0
    stack = [""]
    while stack:
        path = stack.pop()
        tick()
        with suppress(OSError):
            opened = posix.open_folder(tree.root, path)
            try:
                with os.scandir(opened) as listed:
                    for entry in listed:
                        found = entry.stat(follow_symlinks=False)
                        files += 1
                        if stat.S_ISDIR(found.st_mode):
                            stack.append(joined(path, entry.name))
                        elif stat.S_ISREG(found.st_mode):
                            size += min(found.st_size, found.st_blocks * 512)
            finally:
                os.close(opened)
    return Amount(size, files)


class Rounds:
    def __init__(
        self,
        source: Tree,
        target: Tree,
        manifest: Manifest,
        pool: Pool,
        tick: Callable[[Rounds], None],
    ) -> None:
        """`tick`: see `Pool.run`."""
        self._source, self._target, self._manifest, self._pool = source, target, manifest, pool
        self._tick = tick
        self._committed = time.monotonic()
        self._begun = self._begun_before = 0  # ns since 1970, of this round and the last
        self._seeding = False
        self._links = False
        self._after_cut = False
        self._walked = ""
        self.looked = 0  # entries, ever
        self.compared = 0
        self._bytes = self._files = self._removed = self._unsettled = 0

    # Copying
    def copy(self, changed: Iterable[str], *, walk: bool) -> Outcome:
        """Make the target what the source is now: of all of it (`walk`) what looks different, and `changed` however it
        looks: a store through a mapping need not show in a time. Raises Failure, Stopped."""
        self._bytes = self._files = self._removed = self._unsettled = 0
        looked = self.looked
        self._begun, self._begun_before = time.time_ns(), self._begun
        self._seeding = self._manifest.empty()
        self._links = False
        self._manifest.drop_pending()
        self._after_cut = self._manifest.begin_round()
        self._pool.tell_each(("forget_folders", None))
        if walk:
            if self._source.remote:  # a server learns of stores, and gives them a time, when they are sent
                posix.sync_filesystem(self._source.root)
            self._run("copy", self._batches(self._walk(""), forced=False))
        if not (walk and self._seeding):  # all was copied just now
            self._run("copy", self._batches(self._listed(changed), forced=True))
        self._run("link", self._groups())
        self._run("finish", _in_batches(self._manifest.take_folders()))
        self._manifest.end_round()
        self.commit()
        return Outcome(self._bytes, self._files, self.looked - looked, self._removed, self._unsettled)

    def commit(self) -> None:
        posix.sync_filesystem(self._target.root)
        self._manifest.commit()
        self._committed = time.monotonic()

    def _run(self, kind: str, jobs: Iterator[Any]) -> None:
        for answer in self._pool.run(((kind, job) for job in jobs), self._ticked):
            self._record(answer, folders=kind == "finish")

    def _ticked(self) -> None:
        self._tick(self)
        if time.monotonic() - self._committed > CHECKPOINT:
            self.commit()

    def _record(self, copied: Copied, *, folders: bool) -> None:
        self.looked += copied.looked[0]
        for path in copied.replaced:
            self._manifest.forget_tree(path)
            self._manifest.add_folder(split(path)[0], 0)
        if self._seeding and not copied.touched and not copied.replaced:
            self._manifest.put_new(copied.entries)
        else:
            self._manifest.forget(copied.touched)
            self._manifest.put(copied.entries)
        self._unsettled += len(copied.touched)
        self._manifest.add_links(copied.linked)
        self._links = self._links or bool(copied.linked)
        if not folders:
            self._files += len(copied.entries)
            self._bytes += sum(_written(entry) for entry in copied.entries)

    # Which entries
    def _batches(
        self, found: Iterator[tuple[str, list[str]]], *, forced: bool
    ) -> Iterator[list[tuple[str, list[Any]]]]:
        """Names, gathered over folders to jobs of a size that keeps a worker busy; with what is known of each.
        `forced`: let nothing be taken for unchanged."""
        batch: list[tuple[str, list[str]]] = []
        count = 0
        for folder, names in found:
            batch.append((folder, names))
            count += len(names)
            if count >= BATCH:
                yield self._with_known(batch, forced=forced)
                batch, count = [], 0
        if batch:
            yield self._with_known(batch, forced=forced)

    def _with_known(self, batch: list[tuple[str, list[str]]], *, forced: bool) -> list[tuple[str, list[Any]]]:
        if self._seeding:
            return [(folder, [(name, None) for name in names]) for folder, names in batch]
        known = self._manifest.known([joined(folder, name) for folder, names in batch for name in names])
        if forced:
            known = {path: entry._replace(ctime=0) for path, entry in known.items()}
        return [(folder, [(name, known.get(joined(folder, name))) for name in names]) for folder, names in batch]

    def _groups(self) -> Iterator[Any]:
        if not self._links:
            return iter(())
        return ([group] for group in self._manifest.take_links())

    def _walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
        stack = [top]
        while stack:
            path = stack.pop()
            opened = self._open_source(path)
            if opened is None:
                continue
            try:
                if not self._prepare_folder(path, opened):
                    self._unsettled += 1
                    continue
                names: list[str] = []
                with os.scandir(opened) as listed:
                    for entry in listed:
                        if entry.is_dir(follow_symlinks=False):
                            stack.append(joined(path, entry.name))
                            continue
                        names.append(entry.name)
                        if len(names) == BATCH:
                            yield path, names
                            names = []
                if names:
                    yield path, names
            finally:
                os.close(opened)

    def _open_source(self, path: str) -> int | None:
        """None where no directory is any more."""
        try:
            return posix.open_folder(self._source.root, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            if error.errno == errno.EXDEV:
                raise Failure(path, errno.EXDEV, "another file system is mounted here, inside of the volume") from None
            raise Failure(path, error.errno or errno.EIO, error.strerror or "") from None

    def _prepare_folder(self, path: str, source: int) -> bool:
        """The target's directory is there, and holds nothing that the source's does not. False when its parent is not
        what it was."""
        found = os.fstat(source)
        known = None if self._seeding else self._manifest.known([path]).get(path)
        try:
            made = bool(path) and self._make_folder(path)
            changed = made or self._after_cut or known is None or known.signature != entries.signature_of(found)
            target = posix.open_folder(self._target.root, path)
        except OSError as error:
            if error.errno in SHIFTED:
                return False
            raise Failure(path, error.errno or errno.EIO, error.strerror or "") from None
        try:
            if not made:
                # Unlocked or written to by a round that was killed before it came to finish directories.
                cut_short = known is not None and (bool(known.about) or os.fstat(target).st_mtime_ns != known.mtime)
                changed = entries.unlock(target, known) or cut_short or changed
                changed = self._remove_extra(path, source, target) or changed
        finally:
            os.close(target)
        self.looked += 1
        if changed:
            self._manifest.add_folder(path, found.st_ctime_ns)
        return True

    def _make_folder(self, path: str) -> bool:
        parent, name = split(path)
        folder = posix.open_folder(self._target.root, parent)
        try:
            try:
                os.mkdir(name, 0o700, dir_fd=folder)
            except FileExistsError:
                if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    return False
                posix.remove_tree(folder, name)
                self._manifest.forget_tree(path)
                os.mkdir(name, 0o700, dir_fd=folder)
            return True
        finally:
            os.close(folder)

    def _remove_extra(self, path: str, source: int, target: int) -> bool:
        removed = False
        with os.scandir(target) as listed:
            for entry in listed:
                try:
                    os.stat(entry.name, dir_fd=source, follow_symlinks=False)
                except FileNotFoundError:
                    self._remove(target, joined(path, entry.name))
                    removed = True
        return removed

    def _remove(self, folder: int, path: str) -> None:
        try:
            posix.remove_tree(folder, split(path)[1])
        except OSError as error:
            raise Failure(path, error.errno or errno.EIO, error.strerror or "") from None
        self._manifest.forget_tree(path)
        self._removed += 1

    # A list of what changed
    def _listed(self, changed: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        self._walked = "/"  # no path begins so
        folders: set[str] = set()  # known to be on both sides
        for parent, names in _by_folder(sorted(set(changed))):
            top = self._unknown_ancestor(parent, folders)
            if top is not None:
                yield from self._walk_once(top)
                continue
            opened = self._open_source(parent)
            if opened is None:  # that it is gone is in the list by itself
                continue
            try:
                self._manifest.add_folder(parent, os.fstat(opened).st_ctime_ns)
                yield from self._listed_in(parent, opened, names)
            except OSError as error:
                if error.errno not in SHIFTED:
                    raise Failure(parent, error.errno or errno.EIO, error.strerror or "") from None
                self._unsettled += 1
            finally:
                os.close(opened)

    def _listed_in(self, parent: str, opened: int, names: list[str]) -> Iterator[tuple[str, list[str]]]:
        files: list[str] = []
        known = self._manifest.known([parent, *(joined(parent, name) for name in names)])
        target = posix.open_folder(self._target.root, parent)
        try:
            entries.unlock(target, known.get(parent))
            yield from self._sorted_out(parent, (opened, target), names, known, files)
        finally:
            os.close(target)
        if files:
            yield parent, files

    def _sorted_out(
        self, parent: str, folders: tuple[int, int], names: list[str], known: dict[str, Entry], files: list[str]
    ) -> Iterator[tuple[str, list[str]]]:
        """What is gone is removed, what is no directory added to `files`, new directories walked."""
        opened, target = folders
        for name in names:
            path = joined(parent, name)
            if not name or _below(path, self._walked):
                continue
            try:
                found = os.stat(name, dir_fd=opened, follow_symlinks=False)
            except FileNotFoundError:
                self._remove(target, path)
                continue
            before = known.get(path)
            if not stat.S_ISDIR(found.st_mode):
                files.append(name)
            elif before is not None and before.inode == entries.inode_of(found) and self._is_old(opened, name):
                self._manifest.add_folder(path, found.st_ctime_ns)
            else:
                yield from self._walk_once(path)

    def _is_old(self, folder: int, name: str) -> bool:
        """Whether the directory was there before the last round began: the number of one that was removed is given to
        another at once."""
        born = posix.born(folder, name)
        return born is not None and born < self._begun_before - entries.GRAIN_NS

    def _walk_once(self, top: str) -> Iterator[tuple[str, list[str]]]:
        if not _below(top, self._walked):
            self._walked = top
            yield from self._walk(top)

    def _unknown_ancestor(self, path: str, folders: set[str]) -> str | None:
        """The uppermost directory on the way that no round has copied."""
        if path in folders:
            return None
        parts = path.split("/") if path else []
        for depth in range(len(parts) + 1):
            above = "/".join(parts[:depth])
            if above not in folders:
                known = self._manifest.known([above]).get(above)
                if known is None or not stat.S_ISDIR(known.mode):
                    return above
                folders.add(above)
        return None

    # Proof
    def compare(self) -> list[tuple[str, str]]:
        """Read back, past the cache, what was written and is not proven yet; what is written down is on storage
        already. Path and difference of what differs."""
        self._pool.tell_each(("forget_folders", None))
        different: list[tuple[str, str]] = []
        for answer in self._pool.run((("compare", job) for job in self._unproven()), self._ticked):
            assert isinstance(answer, Compared)
            self.compared += len(answer.numbers)
            if answer.different:
                different += answer.different
            else:
                self._manifest.prove(answer.numbers)
            if len(different) >= MAX_DIFFERENCES:
                break
        self._manifest.commit()
        return different[:MAX_DIFFERENCES]

    def _unproven(self) -> Iterator[tuple[list[int], list[tuple[str, list[tuple[str, Entry]]]]]]:
        numbers: list[int] = []
        folders: list[tuple[str, list[tuple[str, Entry]]]] = []
        for number, entry in self._manifest.unproven():
            parent, name = split(entry.path)
            if not folders or folders[-1][0] != parent:
                folders.append((parent, []))
            folders[-1][1].append((name, entry))
            numbers.append(number)
            if len(numbers) == BATCH:
                yield numbers, folders
                numbers, folders = [], []
        if numbers:
            yield numbers, folders


def _written(entry: Entry) -> int:
    if entry.changed is None:
        return entry.size
    return min(entry.size, len(content.unpack(entry.changed)) * content.CHUNK)


def _in_batches(found: Iterator[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for each in found:
        batch.append(each)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _by_folder(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    folder, names = "", list[str]()
    for path in paths:
        parent, name = split(path)
        if names and parent != folder:
            yield folder, names
            names = []
        folder = parent
        names.append(name)
    if names:
        yield folder, names


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")
