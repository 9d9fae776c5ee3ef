"""A disk with a volatile write cache, as real ones have: what was written and not flushed is gone when the power is.

An NBD server for QEMU (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md), as far as QEMU needs it.
Its cache ends with the connection, and so with the machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

BLOCK = 4096
_GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 0b11)  # fixed newstyle, no zeroes after it
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_GO, _ACK, _INFO, _UNSUPPORTED = 7, 1, 3, 2**31 + 1
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA = 1, 4, 8
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)
_FUA = 1  # flag of a command


class VolatileDisk:
    def __init__(self, file: Path, address: Path) -> None:
        """Serves the file at the unix socket, to one machine after the other."""
        self._size = file.stat().st_size
        self._file = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(address))
        self._listener.listen()
        self.lost = 0  # blocks, at the last power cut
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        os.close(self._file)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                machine, _ = self._listener.accept()
                cache: dict[int, bytes] = {}
                with machine, contextlib.suppress(OSError, EOFError):
                    _Session(machine, self._file, self._size, cache).run()
                self.lost = len(cache)


class _Session:
    def __init__(self, machine: socket.socket, file: int, size: int, cache: dict[int, bytes]) -> None:
        self._stream = machine.makefile("rwb")
        self._file, self._size, self._cache = file, size, cache

    def run(self) -> None:
        self._agree()
        while True:
            _, flags, command, handle, offset, length = _REQUEST.unpack(self._take(_REQUEST.size))
            told = b""
            if command == _READ:
                told = self._read(offset, length)
            elif command == _WRITE:
                self._write(offset, self._take(length))
                if flags & _FUA:
                    self._flush()  # a disk may write down more than it was asked to
            elif command == _FLUSH:
                self._flush()
            elif command == _DISCONNECT:
                return
            self._give(_REPLY.pack(0x67446698, 0, handle) + told)

    def _agree(self) -> None:
        self._give(_GREETING)
        self._take(4)
        while True:
            _, option, length = _OPTION.unpack(self._take(_OPTION.size))
            self._take(length)
            if option == _GO:
                export = struct.pack(">HQH", 0, self._size, _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA)
                self._answer(option, _INFO, export)
                self._answer(option, _ACK)
                return
            self._answer(option, _UNSUPPORTED)

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self._give(_OPTION_REPLY.pack(0x3E889045565A9, option, kind, len(data)) + data)

    def _read(self, offset: int, length: int) -> bytes:
        found = bytearray(os.pread(self._file, length, offset))
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            if (cached := self._cache.get(block)) is not None:
                start, end = max(block * BLOCK, offset), min((block + 1) * BLOCK, offset + length)
                found[start - offset : end - offset] = cached[start - block * BLOCK : end - block * BLOCK]
        return bytes(found)

    def _write(self, offset: int, data: bytes) -> None:
        first, end = offset // BLOCK * BLOCK, -(-(offset + len(data)) // BLOCK) * BLOCK
        if (first, end) != (offset, offset + len(data)):
            before, after = self._read(first, offset - first), self._read(offset + len(data), end - offset - len(data))
            data = before + data + after
        for at in range(0, len(data), BLOCK):
            self._cache[(first + at) // BLOCK] = data[at : at + BLOCK]

    def _flush(self) -> None:
        for block, data in self._cache.items():
            os.pwrite(self._file, data, block * BLOCK)
        self._cache.clear()

    def _take(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            raise EOFError
        return data

    def _give(self, data: bytes) -> None:
        self._stream.write(data)
        self._stream.flush()
