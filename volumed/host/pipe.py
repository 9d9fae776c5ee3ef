"""Two child processes, the output of one being the input of the other, for as long as they get on."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from volumed.driver import Tell
from volumed.errors import CommandFailed, DeadlineExceeded
from volumed.host import left
from volumed.host.run import ENVIRONMENT, MAX_SHOWN

_AT_ONCE = 1 << 20
_BEAT = 0.5  # seconds between two calls of `tell` while nothing moves
# Seconds: storage that takes longer over one piece hangs.
STALLED = 600.0
# A child whose input or output has ended.
_ENDING = 600.0


def pipe(source: Sequence[str | Path], sink: Sequence[str | Path], *, tell: Tell) -> None:
    """See `volumed.driver.Host.pipe`."""
    with _child(source, stdin=subprocess.DEVNULL) as first, _child(sink, stdin=subprocess.PIPE) as second:
        reader, writer = first.process.stdout, second.process.stdin
        assert reader is not None
        assert writer is not None
        for descriptor in (reader.fileno(), writer.fileno()):
            os.set_blocking(descriptor, False)
        order = (first, second)
        try:
            while data := _read(reader, tell):
                tell(len(data))
                _write(writer, data, tell)
        except BrokenPipeError:  # the second knows why
            reader.close()
            order = (second, first)
        with contextlib.suppress(BrokenPipeError):
            writer.close()
        for child in order:
            child.wait(tell)


def _read(reader: IO[bytes], tell: Tell) -> bytes:
    _wait(reader, select.POLLIN, tell)
    return os.read(reader.fileno(), _AT_ONCE)


def _write(writer: IO[bytes], data: bytes, tell: Tell) -> None:
    rest = memoryview(data)
    while rest:
        _wait(writer, select.POLLOUT, tell)
        rest = rest[os.write(writer.fileno(), rest) :]


def _wait(end: IO[bytes], event: int, tell: Tell) -> None:
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(end, event)
    ends = time.monotonic() + STALLED
    while not poll.poll(_BEAT * 1000):
        tell(0)
        if time.monotonic() > ends:
            raise DeadlineExceeded(f"nothing moved for {STALLED:g} s")


class _Child:
    def __init__(self, argv: Sequence[str | Path], said: IO[bytes], *, stdin: int) -> None:
        self._words = words = tuple(str(word) for word in argv)
        self._shown, self._said = shlex.join(words), said
        try:
            self.process = subprocess.Popen(
                words,
                stdin=stdin,
                stdout=subprocess.PIPE if stdin == subprocess.DEVNULL else subprocess.DEVNULL,
                stderr=said,
                env=ENVIRONMENT,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise CommandFailed(f"{words[0]} cannot be run: {error.strerror}", returncode=126) from None

    def wait(self, tell: Tell) -> None:
        """Raises CommandFailed with what it said."""
        ends = time.monotonic() + _ENDING
        while self.process.poll() is None:
            if time.monotonic() > ends:
                raise DeadlineExceeded(f"`{self._shown}` does not end")
            time.sleep(0.02)
            tell(0)
        if self.process.returncode == 0:
            return
        self._said.seek(0)
        stderr = self._said.read().decode(errors="backslashreplace")
        raise CommandFailed(
            f"`{self._shown}` failed with status {self.process.returncode}: "
            f"{stderr.strip()[-MAX_SHOWN:] or 'it said nothing'}",
            returncode=self.process.returncode,
            stderr=stderr,
        )

    def end(self) -> None:
        """With all it started. What the kernel holds is left behind."""
        left.kill(self.process, self._words)
        for end in (self.process.stdin, self.process.stdout):
            if end is not None:
                with contextlib.suppress(BrokenPipeError):
                    end.close()


@contextlib.contextmanager
def _child(argv: Sequence[str | Path], *, stdin: int) -> Iterator[_Child]:
    with tempfile.TemporaryFile() as said:
        child = _Child(argv, said, stdin=stdin)
        try:
            yield child
        finally:
            child.end()
