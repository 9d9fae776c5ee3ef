"""What is known of each chunk of a device that is being copied: in a file, so that kill -9 costs none of it."""

from __future__ import annotations

import enum
import mmap
import os
import struct
from pathlib import Path

from blake3 import blake3

from volumed.host.boot import boot_id

CHUNK = 1 << 20
DIGEST = 32
ZEROS = blake3(bytes(CHUNK)).digest()

_HEADER = struct.Struct("=8sQQ36s")  # magic, size, chunk, boot id
_MAGIC = b"volumed1"
_START = 4096
_ENTRY = DIGEST + 1


class State(enum.IntEnum):
    UNKNOWN = 0
    COPIED = 1  # the target was given what has this digest
    PROVEN = 2  # ... and it was read back


class Chunks:
    """One entry a chunk: its state and the digest of what was read from the source. The pages outlive the process but
    not a power cut, and neither does what a disk had in its cache: after another boot everything is unknown."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self.count = -(-size // CHUNK)
        header = _HEADER.pack(_MAGIC, size, CHUNK, boot_id().encode())
        length = _START + self.count * _ENTRY
        self._file = path.open("r+b" if path.exists() else "w+b")
        if self._file.read(_HEADER.size) != header or os.fstat(self._file.fileno()).st_size != length:
            self._file.truncate(0)  # what was there becomes zeros: unknown
            self._file.truncate(length)
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
        self._map = mmap.mmap(self._file.fileno(), length)

    @classmethod
    def kept(cls, path: Path) -> Chunks:
        """Of a copy that was finished, and on stable storage: what it says holds after another boot, too."""
        with path.open("r+b") as opened:
            _, size, _, _ = _HEADER.unpack(opened.read(_HEADER.size))
            opened.seek(0)
            opened.write(_HEADER.pack(_MAGIC, size, CHUNK, boot_id().encode()))
        return cls(path, size)

    def length(self, number: int) -> int:
        return min(CHUNK, self.size - number * CHUNK)

    def zeros(self, number: int) -> bytes:
        length = self.length(number)
        return ZEROS if length == CHUNK else blake3(bytes(length)).digest()

    def state(self, number: int) -> State:
        return State(self._map[_START + number * _ENTRY])

    def digest(self, number: int) -> bytes:
        at = _START + number * _ENTRY + 1
        return self._map[at : at + DIGEST]

    def began(self, number: int) -> None:
        """Its target is about to be written: until `copied` nothing is known of it."""
        self._map[_START + number * _ENTRY] = State.UNKNOWN

    def copied(self, number: int, digest: bytes) -> None:
        at = _START + number * _ENTRY
        self._map[at + 1 : at + 1 + DIGEST] = digest
        self._map[at] = State.COPIED

    def proven(self, number: int) -> None:
        self._map[_START + number * _ENTRY] = State.PROVEN

    def whole(self) -> str:
        """A digest of all the digests: of the data, whatever the order it was copied in."""
        total = blake3()
        for number in range(self.count):
            total.update(self.digest(number))
        return total.hexdigest()

    def close(self) -> None:
        self._map.close()
        self._file.close()
