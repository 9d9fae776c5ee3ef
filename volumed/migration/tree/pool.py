"""Worker processes, forked; and what they share: how much they have done, how much they may do.

A word of each worker's own in shared memory is written by it alone, so nobody waits for a lock.
"""

from __future__ import annotations

import gc
import mmap
import os
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from volumed.migration.tree import posix
from volumed.migration.tree.content import Gate
from volumed.migration.tree.entries import Tree
from volumed.migration.tree.reading import Reader
from volumed.migration.tree.worker import Failure, Worker

TICK = 0.05  # seconds
_ALLOWED, _PAUSED, _FIRST = 0, 1, 2  # words of the shared memory
_WORD = struct.Struct("=q")
_UNLIMITED = 2**62
_QUEUED = 2  # jobs a worker has at hand, so that it never waits for the next


class Stopped(Exception):
    """The round was told to stop."""


class Shared:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._put(_ALLOWED, _UNLIMITED)

    def _get(self, word: int) -> int:
        return int(_WORD.unpack_from(self._memory, word * 8)[0])

    def _put(self, word: int, value: int) -> None:
        _WORD.pack_into(self._memory, word * 8, value)

    def done(self) -> int:
        """Bytes that all workers read of the source or read back, ever."""
        return sum(self._get(_FIRST + number) for number in range(self._workers))

    def allow(self, amount: int | None) -> None:
        self._put(_ALLOWED, _UNLIMITED if amount is None else amount)

    @property
    def allowed(self) -> int:
        return self._get(_ALLOWED)

    def stop(self, *, stopped: bool) -> None:
        self._put(_PAUSED, int(stopped))

    def gate(self, number: int) -> Gate:
        """For worker `number`: called with each amount before it is read."""
        word = _FIRST + number

        def gate(amount: int) -> None:
            self._put(word, self._get(word) + amount)
            if self._get(_ALLOWED) != _UNLIMITED:
                while self.done() > self._get(_ALLOWED) and not self._get(_PAUSED):
                    time.sleep(TICK / 2)
            if self._get(_PAUSED):
                raise Stopped

        return gate


class Pool:
    """`run` gives jobs out and yields answers as they come, never holding more than a few of either."""

    def __init__(self, source: Tree, target: Tree, *, workers: int) -> None:
        self.shared = Shared(workers)
        self._connections: list[Connection[Any, Any]] = []
        for number in range(workers):
            ours, theirs = Pipe()
            if os.fork() == 0:
                for other in (ours, *self._connections):
                    other.close()
                _serve(theirs, Reader(source, target, self.shared.gate(number)))
            theirs.close()
            self._connections.append(ours)

    def run(self, jobs: Iterator[tuple[str, Any]], tick: Callable[[], None]) -> Iterator[Any]:
        """`tick` is called a few times a second, and may raise. Raises Failure, Stopped when a worker was."""
        idle = deque(self._connections * _QUEUED)
        busy: list[Connection[Any, Any]] = []
        more, failed = True, None
        while more or busy:
            while more and idle and failed is None:
                job = next(jobs, None)
                if job is None:
                    more = False
                    break
                connection = idle.popleft()
                connection.send(job)
                busy.append(connection)
            if failed is not None:
                more = False
            tick()
            for ready in wait(set(busy), timeout=TICK):
                assert isinstance(ready, Connection)
                error, answer = self._receive(ready)
                busy.remove(ready)
                idle.append(ready)
                failed = failed or error
                if answer is not None:
                    yield answer
        if failed is not None:
            raise failed

    @staticmethod
    def _receive(connection: Connection[Any, Any]) -> tuple[Exception | None, Any]:
        try:
            kind, answer, about = connection.recv()
        except EOFError:
            raise Failure("", 0, "a worker process died; the kernel's log may say why") from None
        if kind == "failure":
            return Failure(*about), answer
        return Stopped() if kind == "stopped" else None, answer

    def tell_each(self, job: tuple[str, Any]) -> None:
        """A job for every worker, while none has one."""
        for connection in self._connections:
            connection.send(job)
        for connection in self._connections:
            self._receive(connection)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for _ in self._connections:
            os.wait()


def _serve(connection: Connection[Any, Any], worker: Worker) -> None:
    """The life of a worker process: ends with its parent's end of the pipe. What it did of a job before that failed or
    was stopped is answered as well."""
    gc.freeze()
    status = 1
    try:
        while True:
            kind, argument = connection.recv()
            worker.done = None
            try:
                answer: object = None
                if kind == "priority":
                    posix.lower_priority(low=argument)
                elif kind == "forget_folders":
                    worker.forget_folders()
                else:
                    answer = getattr(worker, kind)(argument)
                connection.send(("answer", answer, None))
            except Failure as failure:
                connection.send(("failure", worker.done, (failure.path, failure.number, failure.text)))
            except Stopped:
                connection.send(("stopped", worker.done, None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
