"""From device to device: what is allocated and not zeros, many requests in flight, past the page cache."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from blake3 import blake3

from volumed.driver import Extent
from volumed.errors import CapacityExhausted, HostError, OutOfRange
from volumed.host import priority
from volumed.host.allocation import data_extents, direct, punch
from volumed.migration.movers.chunks import CHUNK, Chunks, State
from volumed.migration.movers.mover import Control, Estimate, Mover, Round, Verified

IN_FLIGHT = 8
SECTOR = 4096  # what direct I/O counts in, at most
BLOCK = 1 << 16  # what stays a hole inside a chunk
MOST_DIFFERENCES = 100
_ZERO_BLOCK = bytes(BLOCK)
_FULL = (errno.ENOSPC, errno.EDQUOT)

Work = Callable[[int, mmap.mmap], None]


class BlockMover(Mover):
    """Holes stay holes. What a writer changed meanwhile is found by reading everything again, which is done after
    `watch` alone, and comparing digests."""

    def __init__(self, source: Path, target: Path, workdir: Path, *, filled: bool = False) -> None:
        """`filled`: the target was given the source's data as it was a while ago; both are read, and only what differs
        is written."""
        super().__init__(source, target, workdir)
        self._filled = filled
        self._chunks: Chunks | None = None
        self._suspect = False
        self._last = False  # somebody is held still until it is proven

    def _opened(self) -> Chunks:
        if self._chunks is None:
            size, room = size_of(self.source), size_of(self.target)
            if room < size:
                raise OutOfRange(f"has {room} bytes, and {size} are to be copied", subject=str(self.target))
            self._chunks = Chunks(self.workdir / "chunks", size)
        return self._chunks

    def estimate(self, control: Control) -> Estimate:
        return self._reading()

    def _reading(self) -> Estimate:
        """What a round over everything reads: whole chunks."""
        chunks = self._opened()
        return Estimate(sum(map(chunks.length, _touched(data_extents(self.source), chunks))))

    def watch(self) -> None:
        self._suspect = True

    def pending(self) -> Estimate | None:
        return self._reading() if self._suspect else Estimate(0)

    # Copying
    def round(self, control: Control, *, last: bool = False) -> Round:
        begun, chunks = time.monotonic(), self._opened()
        suspect, self._suspect, self._last = self._suspect, False, last
        held = _touched(data_extents(self.source), chunks)
        empty = _untouched(data_extents(self.target), chunks)
        changed = 0
        counting = threading.Lock()

        # Exclusive: of one that was given up while it waited for its storage a last write may be on its way.
        with direct(self.source, os.O_RDONLY) as source, direct(self.target, os.O_RDWR | os.O_EXCL) as target:

            def copy(number: int, buffer: mmap.mmap) -> None:
                nonlocal changed
                length = chunks.length(number)
                control.admit(length)
                there = self._there(number, target, buffer, empty, control)
                digest = _read(source, number, length, buffer) if number in held else chunks.zeros(number)
                if there == digest and chunks.state(number) is State.UNKNOWN:  # it was read back just now
                    chunks.copied(number, digest)
                    chunks.proven(number)
                elif there != digest:
                    fresh = chunks.state(number) is State.UNKNOWN and number in empty
                    chunks.began(number)
                    if digest != chunks.zeros(number):
                        for part in _filled(buffer, length) if fresh else (Extent(0, length),):
                            _write(target, number, part, buffer)
                    elif not fresh:
                        _clear(target, number, length, buffer)
                    chunks.copied(number, digest)
                    with counting:
                        changed += length if number in held else 0
                control.done(bytes=length if number in held else 0)

            todo = [number for number in range(chunks.count) if suspect or chunks.state(number) is State.UNKNOWN]
            control.done(bytes=sum(map(chunks.length, frozenset(held).difference(todo))))
            try:
                self._work(iter(todo), copy)
                os.fsync(target)
            except BaseException:
                self._suspect = suspect
                raise
        return Round(changed=changed, seconds=time.monotonic() - begun)

    def _there(
        self, number: int, target: int, buffer: mmap.mmap, empty: frozenset[int], control: Control
    ) -> bytes | None:
        """The digest of what the target holds; None when it is not known, and not worth reading."""
        chunks = self._opened()
        if chunks.state(number) is not State.UNKNOWN:
            return chunks.digest(number)
        if not self._filled:
            return None
        if number in empty:
            return chunks.zeros(number)
        length = chunks.length(number)
        control.admit(length)
        os.posix_fadvise(target, number * CHUNK, length, os.POSIX_FADV_DONTNEED)  # where there is no direct I/O
        return _read(target, number, length, buffer)

    # Proving
    def verify(self, control: Control) -> Verified:
        chunks = self._opened()
        empty = _untouched(data_extents(self.target), chunks)
        differences: list[int] = []
        read = 0
        counting = threading.Lock()

        with direct(self.target, os.O_RDONLY) as target:
            os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)  # where there is no direct I/O

            def compare(number: int, buffer: mmap.mmap) -> None:
                nonlocal read
                length = chunks.length(number)
                if number in empty:
                    digest = chunks.zeros(number)
                else:
                    control.admit(length)
                    digest = _read(target, number, length, buffer)
                    control.done(bytes=length)
                if digest == chunks.digest(number) and chunks.state(number) is not State.UNKNOWN:
                    chunks.proven(number)
                    return
                with counting:
                    differences.append(number)

            todo = [number for number in range(chunks.count) if chunks.state(number) is not State.PROVEN]
            read = sum(chunks.length(number) for number in todo if number not in empty)
            self._work(iter(todo), compare)
        lines = [_named(number, chunks) for number in sorted(differences)[:MOST_DIFFERENCES]]
        return Verified(digest=chunks.whole(), differences=lines, bytes=read)

    def read(self, control: Control) -> Verified:
        """All of the source, past every cache, into a workdir that knew nothing; the target is not looked at."""
        chunks = self._opened()
        held = _touched(data_extents(self.source), chunks)
        with direct(self.source, os.O_RDONLY) as source:
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)  # where there is no direct I/O

            def look(number: int, buffer: mmap.mmap) -> None:
                length = chunks.length(number)
                if number in held:
                    control.admit(length)
                    chunks.copied(number, _read(source, number, length, buffer))
                    control.done(bytes=length)
                else:
                    chunks.copied(number, chunks.zeros(number))

            self._work(iter(range(chunks.count)), look)
        return Verified(digest=chunks.whole(), bytes=chunks.size)

    def _work(self, todo: Iterator[int], job: Work) -> None:
        """The job for each chunk, on as many threads as there are requests in flight; the first error ends all."""
        guard, broken = threading.Lock(), threading.Event()

        def run() -> None:
            if not self._last:
                priority.lower()
            buffer = mmap.mmap(-1, CHUNK)  # page-aligned, as direct I/O needs it
            while not broken.is_set():
                with guard:
                    number = next(todo, None)
                if number is None:
                    return
                try:
                    job(number, buffer)
                except OSError as error:
                    broken.set()
                    raise _explained(error, number) from None
                except BaseException:
                    broken.set()
                    raise

        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="move-blocks") as pool:
            jobs = [pool.submit(run) for _ in range(IN_FLIGHT)]
            wait(jobs, return_when=FIRST_EXCEPTION)
        for each in jobs:
            each.result()

    def forget(self) -> None:
        self.close()
        (self.workdir / "chunks").unlink(missing_ok=True)

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


def differences(before: Path, after: Path, *, beginning: bool = False) -> list[str]:
    """What the second of two workdirs knows otherwise than the first, for people, at most a hundred. `beginning`: it
    may be larger, and its beginning alone is compared."""
    kept, fresh = Chunks.kept(before / "chunks"), Chunks.kept(after / "chunks")
    with contextlib.closing(kept), contextlib.closing(fresh):
        if fresh.size < kept.size or (fresh.size > kept.size and not beginning):
            return [f"has {fresh.size} bytes, not {kept.size}"]
        count = kept.count if fresh.size == kept.size else kept.size // CHUNK
        other = [number for number in range(count) if kept.digest(number) != fresh.digest(number)]
        return [_named(number, kept) for number in other[:MOST_DIFFERENCES]]


def size_in(workdir: Path) -> int:
    """Bytes of the device that a finished copy was made of."""
    with contextlib.closing(Chunks.kept(workdir / "chunks")) as kept:
        return kept.size


def digest(workdir: Path) -> str:
    """Of all that a finished copy knows."""
    with contextlib.closing(Chunks.kept(workdir / "chunks")) as kept:
        return kept.whole()


def size_of(path: Path) -> int:
    """Of a device or a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def _read(descriptor: int, number: int, length: int, buffer: mmap.mmap) -> bytes:
    """The chunk into the buffer, and its digest."""
    done = 0
    while done < length:
        with memoryview(buffer) as view:
            got = os.preadv(descriptor, [view[done : -(-length // SECTOR) * SECTOR]], number * CHUNK + done)
        if got == 0:
            raise HostError(f"ends at byte {number * CHUNK + done}, before its size")
        done += got
    with memoryview(buffer) as view:
        return blake3(view[:length]).digest()


def _filled(buffer: mmap.mmap, length: int) -> Iterator[Extent]:
    """The runs of the chunk that are not zeros, in blocks: so that a file in a hole does not fill it."""
    start = end = 0
    with memoryview(buffer) as view:
        for at in range(0, length, BLOCK):
            block = min(BLOCK, length - at)
            if view[at : at + block] == _ZERO_BLOCK[:block]:
                if end > start:
                    yield Extent(start, end - start)
                start = at + block
            end = at + block if start <= at else end
    if end > start:
        yield Extent(start, end - start)


def _write(descriptor: int, number: int, part: Extent, buffer: mmap.mmap) -> None:
    """A part of what the buffer holds; an end that fills no sector is filled up with zeros."""
    done, end = part.offset, part.offset + part.length
    whole = _up_to_sector(descriptor, number, end)
    if whole != end:
        buffer[end:whole] = bytes(whole - end)
    while done < whole:
        with memoryview(buffer) as view:
            done += os.pwritev(descriptor, [view[done:whole]], number * CHUNK + done)


def _up_to_sector(descriptor: int, number: int, end: int) -> int:
    """The end of a part of a chunk, rounded up; a device of smaller sectors may end in between."""
    whole = -(-end // SECTOR) * SECTOR
    if whole == end or not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return whole
    return max(end, min(whole, os.lseek(descriptor, 0, os.SEEK_END) - number * CHUNK))


def _clear(descriptor: int, number: int, length: int, buffer: mmap.mmap) -> None:
    if not punch(descriptor, number * CHUNK, _up_to_sector(descriptor, number, length)):
        buffer[:length] = bytes(length)
        _write(descriptor, number, Extent(0, length), buffer)


def _touched(extents: list[Extent] | None, chunks: Chunks) -> frozenset[int] | range:
    """The chunks that hold any of it; all, where it is not known."""
    if extents is None:
        return range(chunks.count)
    return frozenset(
        itertools.chain.from_iterable(
            range(extent.offset // CHUNK, min(chunks.count, -(-(extent.offset + extent.length) // CHUNK)))
            for extent in extents
        )
    )


def _untouched(extents: list[Extent] | None, chunks: Chunks) -> frozenset[int]:
    """The chunks that surely read as zeros."""
    if extents is None:
        return frozenset()
    return frozenset(range(chunks.count)) - frozenset(_touched(extents, chunks))


def _named(number: int, chunks: Chunks) -> str:
    first = number * CHUNK
    return f"bytes {first} to {first + chunks.length(number) - 1}"


def _explained(error: OSError, number: int) -> Exception:
    where = f"at byte {number * CHUNK}"
    if error.errno in _FULL:
        return CapacityExhausted(f"is full {where}", hint="free some space there, and move it again")
    return HostError(f"{error.strerror} {where}")
