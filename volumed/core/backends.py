"""Backends: a driver with its settings, its own bounded workers, and what it can do.

The bulkhead: each backend has a pool of workers and a number of callers it lets in. One that hangs fills its own
pool and then refuses at once, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Generic, TypeVar

from volumed import context
from volumed.core.drivers import DriverRegistry
from volumed.core.options import nearest, read_options
from volumed.driver import (
    BlockDriver,
    Capability,
    Driver,
    Host,
    SupportsCapacity,
)
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    InvalidRequest,
    NotSupported,
    OperationPending,
    VolumedError,
)
from volumed.model import now

_log = logging.getLogger(__name__)
T = TypeVar("T")


# A job outlives its caller's patience, but not for ever: whatever it waits for in a child process is killed then.
WORK_TIMEOUT = 600.0
# How many callers may wait for a worker: more than the containers that a machine starts at once.
WAITING = 256
HOLDERS = 8  # workers for those who hold a volume's lock: moves and copies, of which few run at once


@dataclass(frozen=True)
class Health:
    """As the last probe found it; `since`: when it became so, well or with this error."""

    ok: bool
    error: str = ""
    checked: datetime | None = None
    since: datetime | None = None


@dataclass(frozen=True)
class Measured:
    """Bytes, as the storage counted them at that time."""

    total: int
    available: int
    at: datetime


@dataclass
class _Ticket:
    """A caller that waits for a job: which of the two gives up first is decided under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: bool = False
    abandoned: bool = False


def _work(job: Callable[[], T], ticket: _Ticket, late: Callable[[T], None] | None) -> T:
    with context.request(context.request_id.get(), timeout=WORK_TIMEOUT):
        result = job()
        with ticket.lock:
            ticket.finished = True
            if not ticket.abandoned:
                return result
        if late is not None:
            late(result)
        return result


class Pending(Generic[T]):
    """A job on its way."""

    def __init__(self, future: Future[T], ticket: _Ticket, *, subject: str) -> None:
        self._future = future
        self._ticket = ticket
        self._subject = subject

    def wait(self) -> T:
        """Until the request's deadline. Raises OperationPending, BackendUnavailable and what the job raises."""
        try:
            return self._future.result(timeout=context.remaining(WORK_TIMEOUT))
        except FutureTimeout:
            return self._overdue()

    async def outcome(self) -> T:
        """As `wait`, in an event loop."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def wake_from_worker(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake)

        self._future.add_done_callback(wake_from_worker)
        overdue = loop.call_later(context.remaining(WORK_TIMEOUT), wake)
        try:
            await waiter
        finally:
            overdue.cancel()
        return self._future.result() if self._future.done() else self._overdue()

    def _overdue(self) -> T:
        if self._future.done():  # the job itself raised a TimeoutError, or ended in this very moment
            return self._future.result()
        if self._future.cancel():
            raise BackendUnavailable("did not get to this request in time", subject=self._subject) from None
        with self._ticket.lock:
            if not self._ticket.finished:
                self._ticket.abandoned = True
        if self._ticket.abandoned:
            raise OperationPending(
                "is taking long; the work goes on", subject=self._subject, hint="ask again to join it"
            ) from None
        return self._future.result()


class Backend:
    def __init__(
        self,
        name: str,
        driver_name: str,
        driver: Driver,
        *,
        workers: int,
        disabled: Iterable[str],
        encrypt: str = "",
        waiting: int = WAITING,
    ) -> None:
        """`encrypt`: the name of the key that its new volumes have, unless they are given another."""
        self.name = name
        self.encrypt = encrypt
        self.driver_name = driver_name
        self.driver = driver
        self.disabled = frozenset(Capability(capability) for capability in disabled)
        self.health = Health(ok=False, error="not probed yet")
        self.lacking: dict[Capability, str] = {}
        self.capabilities = self._capabilities()
        self.facts: dict[str, str] = {}
        self.topology: Mapping[str, str] = {}  # where a node must be to reach its volumes
        self.measured: Measured | None = None  # by the last probe; None where the driver cannot tell
        self._probing = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"backend-{name}")
        self._holders_pool = ThreadPoolExecutor(HOLDERS, thread_name_prefix=f"backend-{name}-holder")
        # Bursts wait their turn; with more than this waiting the backend is not keeping up, or hangs.
        self.room = workers + waiting
        self._room = threading.BoundedSemaphore(self.room)

    def _capabilities(self) -> frozenset[Capability]:
        return self.driver.all_capabilities() - frozenset(self.lacking) - self.disabled

    def require(self, capability: Capability) -> None:
        """Raises NotSupported with the reason and what to do instead."""
        if capability in self.capabilities:
            return
        if capability in self.disabled:
            reason = f"{capability} is turned off in the configuration"
        else:
            reason = self.lacking.get(capability, f"driver {self.driver_name} has no {capability}")
        raise NotSupported(reason, subject=f"backend {self.name}")

    def probe(self) -> None:
        """Look at the storage; what is found, or the error, is kept in `health`, `lacking`, `facts`, `topology` and
        `measured`. While another look hangs nothing is done: looks must not use up the workers."""
        if not self._probing.acquire(blocking=False):
            return
        try:
            found = self.driver.probe()
            self.lacking, self.facts, self.topology = found.lacking, found.facts, found.topology
            self.capabilities = self._capabilities()
            self.measured = self._measure()
            self._set_health(Health(ok=True, checked=now()))
        except VolumedError as error:
            self.unavailable(str(error))
        finally:
            self._probing.release()

    def _measure(self) -> Measured | None:
        if Capability.CAPACITY not in self.capabilities or not isinstance(self.driver, SupportsCapacity):
            return None
        found = self.driver.capacity()
        return Measured(total=found.total, available=found.available, at=now())

    def unavailable(self, reason: str) -> None:
        if self.health.error != reason:
            _log.warning("backend %s cannot be used: %s", self.name, reason, extra={"backend": self.name})
        self._set_health(Health(ok=False, error=reason, checked=now()))

    def _set_health(self, found: Health) -> None:
        same = (found.ok, found.error) == (self.health.ok, self.health.error)
        if found.ok and not self.health.ok and self.health.since is not None:
            _log.info("backend %s can be used again", self.name, extra={"backend": self.name})
        self.health = replace(found, since=self.health.since if same else found.checked)

    def call(self, job: Callable[[], T], *, late: Callable[[T], None] | None = None) -> T:
        """Run a job on a worker and wait for it until the request's deadline.

        Past the deadline the job goes on, with WORK_TIMEOUT of its own; `late` is then given its result. Raises
        BackendUnavailable at once when too many wait already, OperationPending at the deadline.
        """
        return self.begin(job, late=late).wait()

    def call_holding(self, job: Callable[[], T]) -> T:
        """As `call`, for a caller that holds a volume's lock: its workers wait for no lock, so it never has to wait for
        those who wait for its own."""
        ticket = _Ticket()
        future = self._holders_pool.submit(contextvars.copy_context().run, _work, job, ticket, None)
        return Pending(future, ticket, subject=f"backend {self.name}").wait()

    def begin(self, job: Callable[[], T], *, late: Callable[[T], None] | None = None) -> Pending[T]:
        """As `call`, for a caller that waits in its own way."""
        if not self._room.acquire(blocking=False):
            raise BackendUnavailable(
                "too many requests are waiting for it", subject=f"backend {self.name}", hint="try again later"
            )
        ticket = _Ticket()
        try:
            future = self._pool.submit(contextvars.copy_context().run, _work, job, ticket, late)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return Pending(future, ticket, subject=f"backend {self.name}")

    def close(self) -> None:
        """Take no more jobs; those that run are not waited for: a hung one would hold the daemon."""
        for pool in (self._pool, self._holders_pool):
            pool.shutdown(wait=False, cancel_futures=True)


class Backends:
    def __init__(self, backends: Iterable[Backend], *, default: Iterable[str]) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self.default = tuple(default) or tuple(self._backends)

    def all(self) -> list[Backend]:
        return list(self._backends.values())

    def get(self, name: str) -> Backend:
        """Raises InvalidRequest for an unknown one, naming the nearest."""
        try:
            return self._backends[name]
        except KeyError:
            raise InvalidRequest(f"there is no backend {name!r}", hint=nearest(name, self._backends)) from None

    @property
    def room(self) -> int:
        """How many callers all of them let in: a front end with more threads always has one left to answer with."""
        return sum(backend.room for backend in self._backends.values())

    def close(self) -> None:
        for backend in self._backends.values():
            backend.close()


def open_backend(
    name: str,
    table: Mapping[str, object],
    *,
    driver_name: str,
    workers: int,
    disabled: Iterable[str],
    encrypt: str,
    where: Callable[[str], str],
    drivers: DriverRegistry,
    host: Host,
) -> Backend:
    """A backend of the configuration. `where` tells file and line of a key. Raises ConfigError, DriverLoadError."""
    cls = drivers.get(driver_name).cls
    try:
        options = read_options(cls.BackendOptions, table, subject=f"backend {name}", locate=where)
    except InvalidRequest as error:
        raise ConfigError(error.text, subject=error.subject, hint=error.hint) from None
    if encrypt and not issubclass(cls, BlockDriver):
        raise ConfigError(
            f"driver {driver_name} holds folders, which cannot be encrypted",
            subject=where("encrypt"),
            hint="encrypt the file system below them, or use a driver of block devices, as image",
        )
    driver = cls(name, options, host)
    return Backend(name, driver_name, driver, workers=workers, disabled=disabled, encrypt=encrypt)
