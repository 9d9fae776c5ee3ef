"""Two devices that are written to all the time, and get every write both: whether they hold the same.

A block is read from both. When the two differ a write may have been between the reads: the blocks that differ are read
again, and again, and each has to be seen equal once. That is enough: from when the mirror was in sync on, the kernel
gives every write to both and answers none that one of them did not take (`volumed.host.mapper.mirror`). So what was
once equal stays equal, and a block that the target lost or changed never becomes equal unless it is written anew.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from blake3 import blake3

from volumed.errors import HostError
from volumed.host import priority
from volumed.host.allocation import direct
from volumed.migration.movers.chunks import CHUNK
from volumed.migration.movers.mover import Control, Verified

IN_FLIGHT = 4
BLOCK = 4096
# Seconds for which a block that differs is looked at again before it counts: a writer that gives one block no moment of
# rest for as long is none that writes data.
PATIENCE = 5.0
WATCH = 0.25
MOST_DIFFERENCES = 100


def compare(source: Path, target: Path, size: int, control: Control, watch: Callable[[], object]) -> Verified:
    """The first `size` bytes. `watch` is called every quarter of a second, and ends it by raising. The digest is of
    what each chunk held when it was compared."""
    digests: dict[int, bytes] = {}
    differences: list[int] = []
    with (
        direct(source, os.O_RDONLY) as left,
        direct(target, os.O_RDONLY) as right,
        ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="compare") as pool,
    ):

        def one(number: int) -> None:
            priority.lower()
            length = min(CHUNK, size - number * CHUNK)
            control.admit(length)
            digests[number], found = _compared(left, right, number * CHUNK, length)
            differences.extend(found)
            control.done(bytes=length)

        _each(pool, iter(range(-(-size // CHUNK))), one, watch)
    whole = blake3()
    for number in range(len(digests)):
        whole.update(digests[number])
    lines = [f"bytes {offset} to {offset + BLOCK - 1}" for offset in sorted(differences)[:MOST_DIFFERENCES]]
    return Verified(digest=whole.hexdigest(), differences=lines, bytes=size)


def _each(
    pool: ThreadPoolExecutor, todo: Iterator[int], job: Callable[[int], None], watch: Callable[[], object]
) -> None:
    running: set[Future[None]] = set()
    watched = time.monotonic()
    while True:
        while len(running) < IN_FLIGHT and (number := next(todo, None)) is not None:
            running.add(pool.submit(job, number))
        if not running:
            return
        done, running = wait(running, timeout=WATCH, return_when=FIRST_COMPLETED)
        for each in done:
            each.result()
        if time.monotonic() > watched + WATCH:
            watch()
            watched = time.monotonic()


def _compared(left: int, right: int, offset: int, length: int) -> tuple[bytes, list[int]]:
    """The digest of the chunk, and where blocks differ for good."""
    mine, other = mmap.mmap(-1, CHUNK), mmap.mmap(-1, CHUNK)  # page-aligned, as direct I/O needs it
    _read(left, offset, length, mine)
    _read(right, offset, length, other)
    at = [start for start in range(0, length, BLOCK) if mine[start : start + BLOCK] != other[start : start + BLOCK]]
    ends = time.monotonic() + PATIENCE
    while at and time.monotonic() < ends:
        still = []
        for start in at:
            found = _seen_equal(left, right, offset + start, min(BLOCK, length - start))
            if found is None:
                still.append(start)
            else:
                mine[start : start + len(found)] = found
        at = still
        time.sleep(0.001 if at else 0.0)
    with memoryview(mine) as view:
        return blake3(view[:length]).digest(), [offset + start for start in at]


def _seen_equal(left: int, right: int, offset: int, length: int) -> bytes | None:
    """What the block holds on both, or None."""
    one, two = mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK)
    _read(left, offset, length, one)
    _read(right, offset, length, two)
    return one[:length] if one[:length] == two[:length] else None


def _read(descriptor: int, offset: int, length: int, buffer: mmap.mmap) -> None:
    done = 0
    while done < length:
        try:
            with memoryview(buffer) as view:
                got = os.preadv(descriptor, [view[done:length]], offset + done)
        except OSError as error:
            raise HostError(f"{error.strerror} at byte {offset + done}") from None
        if got == 0:
            raise HostError(f"ends at byte {offset + done}, before its size")
        done += got
