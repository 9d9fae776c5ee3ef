"""What one worker process does: copies entries, links, finishes directories, compares. Paths in, entries out.

It works in small batches, opens all files of a batch before it reads the first, and so lets the storage fetch them
side by side.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from volumed.migration.tree import content, entries, posix
from volumed.migration.tree.content import Gate, Torn
from volumed.migration.tree.entries import Entry, Spot, Tree

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PATCH = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT_OPEN = 64
# A tree in use: a directory is gone, or has become a file or a link, since it was listed.
SHIFTED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
AT_ONCE = 64  # files open side by side

Names = Sequence[tuple[str, Entry | None]]
Folder = tuple[str, Names]


class Copied(NamedTuple):
    entries: list[Entry]
    linked: list[tuple[str, int]]  # path and inode of each new or changed file of more than one name: see `link`
    looked: list[int]  # one: files found unchanged or copied
    touched: list[str]  # paths written without becoming an entry: what was known of them holds no more
    replaced: list[str]  # paths at which the target had something else, with perhaps more below it


def nothing() -> Copied:
    return Copied([], [], [0], [], [])


class Todo(NamedTuple):
    """`found`: at the source, `looked` at before that. `opened`: its file there."""

    name: str
    known: Entry | None
    found: os.stat_result
    opened: int | None
    looked: int  # when, ns


class Compared(NamedTuple):
    numbers: list[int]
    different: list[tuple[str, str]]  # path and difference of each entry of the target that is not as written down


class Failure(Exception):
    """At a path of the tree, relative to its root."""

    def __init__(self, path: str, number: int, text: str) -> None:
        super().__init__(text)
        self.path, self.number, self.text = path, number, text


class Worker:
    def __init__(self, source: Tree, target: Tree, gate: Gate) -> None:
        self._source, self._target, self._gate = source, target, gate
        self._open: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._plain: dict[int, bool] = {}  # by descriptor of the target's directories: `passes_nothing_on`
        self.done: Copied | None = None  # of the job at hand, which may be cut short
        os.umask(0)

    def _folder(self, tree: Tree, path: str) -> int:
        key = (tree.root, path)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        opened = posix.open_folder(tree.root, path)
        self._open[key] = opened
        if tree is self._target:
            self._plain[opened] = entries.passes_nothing_on(tree, opened)
        if len(self._open) > _KEPT_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return opened

    def forget_folders(self) -> None:
        """Between steps: a directory may have been replaced by another of its name."""
        while self._open:
            os.close(self._open.popitem()[1])

    # Copying
    def copy(self, folders: Sequence[Folder]) -> Copied:
        done = self.done = nothing()
        for path, names in folders:
            try:
                source, target = self._folder(self._source, path), self._folder(self._target, path)
            except OSError as error:
                if error.errno not in SHIFTED:
                    raise Failure(path, error.errno or errno.EIO, error.strerror or "") from None
                done.touched.extend(joined(path, name) for name, _ in names)
                continue
            for start in range(0, len(names), AT_ONCE):
                self._copy_some(done, path, source, target, names[start : start + AT_ONCE])
        return done

    def _copy_some(self, done: Copied, path: str, source: int, target: int, names: Names) -> None:
        with _Files() as files:
            todo = []
            looked = time.time_ns()
            for name, known in names:
                with _Blaming(joined(path, name)), suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=source, follow_symlinks=False)
                    done.looked[0] += 1
                    if known is not None and known.signature == entries.signature_of(found):
                        continue
                    if stat.S_ISDIR(found.st_mode) or self._is_lost(found):
                        continue
                    if found.st_nlink > 1 and "hardlinks" not in self._source.losses:
                        done.linked.append((joined(path, name), entries.inode_of(found)))
                        continue
                    try:
                        todo.append(Todo(name, known, *_open_source(source, name, found, files), looked))
                    except Torn:
                        done.touched.append(joined(path, name))
            for each in todo:
                self._copy_one(done, path, (source, target), each)

    def _is_lost(self, found: os.stat_result) -> bool:
        kind = found.st_mode
        losses = self._source.losses
        return (
            ((stat.S_ISCHR(kind) or stat.S_ISBLK(kind)) and "devices" in losses)
            or (stat.S_ISFIFO(kind) and "fifos" in losses)
            or (stat.S_ISSOCK(kind) and "sockets" in losses)
            or (stat.S_ISLNK(kind) and "symlinks" in losses)
        )

    def _copy_one(self, done: Copied, path: str, folders: tuple[int, int], todo: Todo) -> None:
        full = joined(path, todo.name)
        with _Blaming(full):
            try:
                done.entries.append(self._copy_entry(done, full, folders, todo))
            except Torn:
                done.touched.append(full)
            except FileNotFoundError:  # it was removed since, or the target's directory was replaced
                done.touched.append(full)

    def _copy_entry(self, done: Copied, full: str, folders: tuple[int, int], todo: Todo) -> Entry:
        name, known, found, opened, looked = todo
        about = entries.read_about(self._source, Spot(folders[0], name, opened), found.st_mode)
        if opened is None:
            if self._make_special(folders[1], name, found, about):
                done.replaced.append(full)
            return entries.describe(full, found, about.packed(), looked=looked)
        target, known, new = self._open_target(folders[1], name, found, known)
        if new is None:
            done.replaced.append(full)
        try:
            chunks, written = content.copy(opened, target, found, known.chunks if known else b"", self._gate)
            pristine = new is not False and self._plain[folders[1]]
            entries.apply(self._target, Spot(folders[1], name, target), found, about, pristine=pristine)
        finally:
            os.close(target)
        changed = None if known is None else content.pack(written)
        return entries.describe(
            full,
            found,
            about.packed(),
            looked=looked,
            digest=content.digest_of(chunks),
            chunks=chunks,
            changed=changed,
        )

    def _make_special(self, folder: int, name: str, found: os.stat_result, about: entries.About) -> bool:
        """Whether something else had to go."""
        for attempt in (1, 2):
            try:
                if stat.S_ISLNK(found.st_mode):
                    os.symlink(about.link, name, dir_fd=folder)
                else:
                    os.mknod(name, stat.S_IFMT(found.st_mode) | 0o600, found.st_rdev, dir_fd=folder)
                break
            except FileExistsError:
                if attempt == 2:
                    raise
                posix.remove_tree(folder, name)
        entries.apply(self._target, Spot(folder, name, None), found, about)
        return attempt == 2

    def _open_target(
        self, folder: int, name: str, found: os.stat_result, known: Entry | None
    ) -> tuple[int, Entry | None, bool | None]:
        """The file to write, what is known of its data, and whether it is new (None: in the place of another).
        What we wrote for another inode, or of
        which nothing is known, is not written over."""
        if known is not None and known.inode == entries.inode_of(found) and stat.S_ISREG(known.mode):
            opened = self._open_known(folder, name, known)
            if opened is not None:
                return opened, known if known.size > content.CHUNK else None, False
        mode = found.st_mode & 0o777
        try:
            return os.open(name, _NEW, mode, dir_fd=folder), None, None
        except FileExistsError:
            filled = self._open_filled(folder, name, found) if self._target.filled else None
            if filled is not None:
                return *filled, False
            posix.remove_tree(folder, name)
            return os.open(name, _NEW, mode, dir_fd=folder), None, None

    def _open_filled(self, folder: int, name: str, found: os.stat_result) -> tuple[int, Entry] | None:
        """What somebody else copied, read back: its chunks are known then, and those that are right are neither written
        nor compared again. None for what cannot be such a copy. One of several names is none: what is written to it is
        written to the others as well."""
        posix.unlock_each(folder, (name,))
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1 or found.st_nlink > 1 or not there.st_size:
            return None
        opened = os.open(name, _PATCH, dir_fd=folder)
        try:
            content.drop_cache(opened, there.st_size)
            chunks = content.digests(opened, there, self._gate)
        except BaseException:
            os.close(opened)
            raise
        return opened, entries.describe("", there, b"", looked=0, chunks=chunks)

    @staticmethod
    def _open_known(folder: int, name: str, known: Entry) -> int | None:
        """None when it is not what was written down. While it is written it has no modification time: cut short, it is
        not taken for what it was. That must be on storage before any new byte is."""
        try:
            if known.about:
                posix.unlock_each(folder, (name,))
            opened = os.open(name, _PATCH, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            return None
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode) or (found.st_mtime_ns, found.st_size) != (known.mtime, known.size):
            os.close(opened)
            return None
        if known.size > content.CHUNK:
            os.utime(opened, (0, 0))
            os.fsync(opened)
        else:
            os.ftruncate(opened, 0)
        return opened

    # Files of several names
    def link(self, groups: Sequence[Names]) -> Copied:
        """Each group: all names of one inode, known ones first. The first is copied, the others are links to it."""
        done = self.done = nothing()
        for group in groups:
            self._link_group(done, group)
        return done

    def _link_group(self, done: Copied, group: Names) -> None:
        first: tuple[int, str, Entry] | None = None
        for path, known in group:
            parent, name = split(path)
            with _Blaming(path), self._settled(done, path), _Files() as files:
                source = self._folder(self._source, parent)
                target = self._folder(self._target, parent)
                if first is not None:
                    self._link_one(done, first, source, (target, name), path)
                    continue
                looked = time.time_ns()
                found = os.stat(name, dir_fd=source, follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode) or self._is_lost(found):
                    continue
                todo = Todo(name, known, *_open_source(source, name, found, files), looked)
                before = len(done.entries)
                self._copy_one(done, parent, (source, target), todo)
                if len(done.entries) > before:
                    # By path and not by descriptor: a worker keeps only so many open.
                    first = (os.dup(target), name, done.entries[-1])
                    continue
        if first is not None:
            os.close(first[0])

    def _link_one(
        self, done: Copied, first: tuple[int, str, Entry], source: int, place: tuple[int, str], path: str
    ) -> None:
        folder, called, entry = first
        target, name = place
        found = os.stat(name, dir_fd=source, follow_symlinks=False)
        if entries.inode_of(found) != entry.inode:  # another file by now: the next round copies it
            done.touched.append(path)
            return
        original = os.stat(called, dir_fd=folder, follow_symlinks=False)
        with suppress(FileNotFoundError):
            there = os.stat(name, dir_fd=target, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (original.st_dev, original.st_ino):
                done.entries.append(entry._replace(path=path))
                return
            posix.remove_tree(target, name)
            done.replaced.append(path)
        locked = _locked(folder, called) if entry.about and stat.S_ISREG(entry.mode) else 0
        if locked:  # nothing can be linked to an immutable file
            posix.unlock_each(folder, (called,))
        os.link(called, name, src_dir_fd=folder, dst_dir_fd=target, follow_symlinks=False)
        if locked:
            _lock(folder, called, locked)
        done.entries.append(entry._replace(path=path))

    @staticmethod
    @contextmanager
    def _settled(done: Copied, path: str) -> Iterator[None]:
        """What is not where it was when it was listed is left for the next round."""
        try:
            yield
        except OSError as error:
            if error.errno not in SHIFTED:
                raise
            done.touched.append(path)

    # Directories
    def finish(self, folders: Sequence[tuple[str, int]]) -> Copied:
        """Metadata of directories whose entries are all in place. With each its change time as it was when it was
        listed: what changed since shows in the next round."""
        done = self.done = nothing()
        for path, listed in folders:
            with _Blaming(path), self._settled(done, path):
                source = self._folder(self._source, path)
                target = self._folder(self._target, path)
                looked = time.time_ns()
                found = os.fstat(source)
                about = entries.read_about(self._source, Spot(source, ".", source), found.st_mode)
                if not path:
                    about = about._replace(project=None)
                entries.unlock(target, None)
                entries.apply(self._target, Spot(target, ".", target), found, about)
                entry = entries.describe(path, found, about.packed(), looked=looked)
                done.entries.append(entry._replace(ctime=entry.ctime if found.st_ctime_ns == listed else 0))
        return done

    # Comparing
    def compare(self, job: tuple[list[int], Sequence[tuple[str, list[tuple[str, Entry]]]]]) -> Compared:
        """`job`: numbers of the entries, given back with the answer, and the entries by their folders."""
        numbers, folders = job
        different: list[tuple[str, str]] = []
        for path, names in folders:
            for start in range(0, len(names), AT_ONCE):
                self._compare_some(different, path, names[start : start + AT_ONCE])
        return Compared(numbers, different)

    def _compare_some(self, different: list[tuple[str, str]], path: str, names: Sequence[tuple[str, Entry]]) -> None:
        with _Files() as files:
            todo = []
            for name, entry in names:
                full = joined(path, name)
                with _Blaming(full):
                    try:
                        folder = self._folder(self._target, path)
                        opened = None
                        if stat.S_ISREG(entry.mode):
                            opened = content.open_cold(folder, name, remote=self._target.remote)
                            files.append(opened)
                            if entry.size:
                                content.drop_cache(opened, entry.size)
                        todo.append((full, folder, name, opened, entry))
                    except (FileNotFoundError, NotADirectoryError):
                        different.append((full, "is missing"))
                    except OSError as error:
                        if error.errno != errno.ELOOP:
                            raise
                        different.append((full, "is of another type"))
            for full, folder, name, opened, entry in todo:
                with _Blaming(full):
                    told = self._compare_one(folder, name, opened, entry)
                if told:
                    different.append((full, told))

    def _compare_one(self, folder: int, name: str, opened: int | None, entry: Entry) -> str:
        if stat.S_ISDIR(entry.mode):
            opened = self._folder(self._target, entry.path)
            name = "."
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False) if opened is None else os.fstat(opened)
        except FileNotFoundError:
            return "is missing"
        about = entries.difference(self._target, Spot(folder, name, opened), entry, found)
        if about or opened is None or not entry.size:
            return about
        offset = content.first_difference(opened, entry.size, entry.chunks, entry.changed, self._gate)
        return "" if offset is None else f"has other data at byte {offset}"


def joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _open_source(folder: int, name: str, found: os.stat_result, files: _Files) -> tuple[os.stat_result, int | None]:
    """What it is before it is read. Regular files alone are opened, and fetched ahead. Raises Torn when it is another
    thing by now."""
    if not stat.S_ISREG(found.st_mode):
        return found, None
    try:
        opened = os.open(name, content.READ, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Torn from None
        raise
    files.append(opened)
    found = os.fstat(opened)
    if not stat.S_ISREG(found.st_mode):
        raise Torn
    if found.st_size:
        os.posix_fadvise(opened, 0, min(found.st_size, content.CHUNK), os.POSIX_FADV_WILLNEED)
    return found, opened


def _locked(folder: int, name: str) -> int:
    opened = os.open(name, content.READ, dir_fd=folder)
    try:
        found = posix.get_flags(opened)
    finally:
        os.close(opened)
    return found[0] if found and found[0] & (posix.XFLAG_IMMUTABLE | posix.XFLAG_APPEND) else 0


def _lock(folder: int, name: str, flags: int) -> None:
    opened = os.open(name, content.READ, dir_fd=folder)
    try:
        posix.set_flags(opened, flags, None)
    finally:
        os.close(opened)


class _Blaming:
    """An error of the system gets the path of the tree at which it happened. A class, and `_Files` another, as what
    contextlib makes of a generator or keeps on a stack is dear for what is done twice a file."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise Failure(self._path, error.errno or errno.EIO, error.strerror or str(error)) from error


class _Files(list[int]):
    """Descriptors, closed at the end."""

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self:
            os.close(each)
