"""A file's bytes: read once, digested, written with its holes; later only the chunks that changed; read back cold.

Digests are of chunks of 1 MiB, so a large file that changed in one place costs one read and the writing of that place.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator

from blake3 import blake3

from volumed.migration.tree import posix

CHUNK = 1 << 20
DIGEST = 32
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
_BLOCK = 512  # of st_blocks
_SECTOR = 4096  # what direct I/O counts in, at most
_NOTHING = bytes(CHUNK)
HOLE = bytes(DIGEST)  # instead of the digest of a chunk of zeros, be they stored or not

Gate = Callable[[int], None]


class Torn(Exception):
    """The file was cut off while it was read: what was written is of no use."""


def digest_of(chunks: bytes) -> bytes:
    """The file's, from its chunks'. Of an empty file: empty."""
    return chunks if len(chunks) <= DIGEST else bytes(blake3(chunks).digest())


def _chunk_digest(data: bytes) -> bytes:
    if data[0] == 0 and data == (_NOTHING if len(data) == CHUNK else bytes(len(data))):
        return HOLE
    return bytes(blake3(data).digest())


def copy(source: int, target: int, found: os.stat_result, known: bytes, gate: Gate) -> tuple[bytes, list[int]]:
    """Make the target's bytes those of the source. `known`: the chunks' digests as the target holds them, empty for a
    new file. Returns the chunks' digests and the numbers of those written.

    A file that is written meanwhile gives some mixture, whose times tell that to the next round. Raises Torn.
    """
    size = found.st_size
    if size <= CHUNK and not known and found.st_blocks * _BLOCK >= size:
        return _copy_small(source, target, size, gate)
    sparse = found.st_blocks * _BLOCK < size
    count = -(-size // CHUNK)
    digests: list[bytes] = []
    written: list[int] = []
    number = 0
    while number < count:
        if sparse:
            filled = _next_data(source, number * CHUNK, size) // CHUNK
            if filled > number:
                _clear(target, digests, written, known=known, end=min(filled, count))
                number = min(filled, count)
                continue
        gate(CHUNK)
        data = os.pread(source, min(CHUNK, size - number * CHUNK), number * CHUNK)
        if len(data) < min(CHUNK, size - number * CHUNK):
            raise Torn
        digest = _chunk_digest(data)
        if known[number * DIGEST : (number + 1) * DIGEST] != digest:
            _write_chunk(source, target, number * CHUNK, data, sparse=sparse, fresh=not known)
            written.append(number)
        digests.append(digest)
        number += 1
    if os.fstat(target).st_size != size:
        os.ftruncate(target, size)
    return b"".join(digests), written


def digests(source: int, found: os.stat_result, gate: Gate) -> bytes:
    """The chunks' digests of what the file holds, as `copy` tells them. Raises Torn."""
    size, found_data = found.st_size, 0
    told: list[bytes] = []
    for offset in range(0, size, CHUNK):
        length = min(CHUNK, size - offset)
        if found.st_blocks * _BLOCK < size:
            found_data = max(found_data, _next_data(source, offset, size))
            if found_data >= offset + length:
                told.append(HOLE)
                continue
        gate(length)
        data = _pread(source, length, offset)
        if len(data) < length:
            raise Torn
        told.append(_chunk_digest(data))
    return b"".join(told)


def _copy_small(source: int, target: int, size: int, gate: Gate) -> tuple[bytes, list[int]]:
    if size == 0:
        return b"", []
    gate(size)
    data = os.read(source, size)
    if len(data) < size:
        raise Torn
    write_all(target, data, 0)
    return _chunk_digest(data), [0]


def _next_data(descriptor: int, offset: int, size: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # holes up to the end
            return size + CHUNK
        raise


def _clear(target: int, digests: list[bytes], written: list[int], *, known: bytes, end: int) -> None:
    """Chunks of nothing but hole, up to `end`: nothing to do in a new file."""
    for number in range(len(digests), end):
        there = known[number * DIGEST : (number + 1) * DIGEST]
        if there not in (b"", HOLE):
            _punch(target, number * CHUNK, CHUNK)
            written.append(number)
        digests.append(HOLE)


def _punch(target: int, offset: int, length: int) -> None:
    try:
        posix.punch_hole(target, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        write_all(target, bytes(length), offset)


def _write_chunk(source: int, target: int, offset: int, data: bytes, *, sparse: bool, fresh: bool) -> None:
    if not sparse:
        write_all(target, data, offset)
        return
    if not fresh:
        _punch(target, offset, len(data))
    end = offset + len(data)
    for start, stop in segments(source, offset, end):
        write_all(target, data[start - offset : stop - offset], start)


def segments(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of data between holes."""
    while start < end:
        data = min(_next_data(descriptor, start, end), end)
        if data >= end:
            return
        start = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        yield data, start


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    done = os.pwrite(descriptor, data, offset)
    while done < len(data):
        data = memoryview(data)[done:]
        offset += done
        done = os.pwrite(descriptor, data, offset)


def open_cold(folder: int, name: str, *, remote: bool) -> int:
    """To be read from its storage, be it past a cache that lies in a client and not in the kernel (ceph-fuse)."""
    if remote:
        try:
            return os.open(name, READ | os.O_DIRECT, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(name, READ, dir_fd=folder)


def drop_cache(descriptor: int, size: int) -> None:
    """What is read next comes from storage; pages that are not on storage yet stay, so sync first."""
    if _is_direct(descriptor):
        return
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if size:
        os.posix_fadvise(descriptor, 0, min(size, CHUNK), os.POSIX_FADV_WILLNEED)


def first_difference(target: int, size: int, chunks: bytes, changed: bytes | None, gate: Gate) -> int | None:
    """The offset of the first chunk that is not as written down. `changed`: look at these alone (numbers, packed)."""
    numbers = range(-(-size // CHUNK)) if changed is None else unpack(changed)
    hole_until = 0
    for number in numbers:
        expected = chunks[number * DIGEST : (number + 1) * DIGEST]
        offset = number * CHUNK
        if expected == HOLE:
            if offset < hole_until and offset + CHUNK <= hole_until:
                continue
            hole_until = _next_data(target, offset, size)
            if hole_until >= min(offset + CHUNK, size):
                continue
        length = min(CHUNK, size - offset)
        gate(length)
        data = _pread(target, length, offset)
        if len(data) != length or _chunk_digest(data) != expected:
            return offset
    return None


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    """As os.pread, of at most a chunk; and as direct I/O wants it, in whole sectors to the address of one."""
    if not _is_direct(descriptor):
        return os.pread(descriptor, length, offset)
    done, wanted = 0, -(-length // _SECTOR) * _SECTOR
    with mmap.mmap(-1, CHUNK) as buffer:
        while done < length:
            with memoryview(buffer) as view:
                got = os.preadv(descriptor, [view[done:wanted]], offset + done)
            if got == 0:
                break
            done += got
        return buffer[: min(done, length)]


def pack(numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def unpack(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
