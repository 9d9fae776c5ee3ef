"""Bulkheads: a backend that hangs fills its own pool, refuses the rest at once, and its late results are handed on."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import ClassVar

import pytest

from volumed import context
from volumed.core.backends import Backend, Backends
from volumed.driver import (
    Capability,
    CreatedVolume,
    Driver,
    Facts,
    FilesystemDriver,
    Found,
    NoOptions,
    Probe,
    VolumeSpec,
)
from volumed.errors import BackendUnavailable, InvalidRequest, NotSupported, OperationPending
from volumed.model import Handle


class QuietDriver(FilesystemDriver):
    """Does nothing: these tests are about what stands before a driver."""

    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.SIZE})

    def probe(self) -> Probe:
        return Probe(lacking={Capability.SIZE: "this file system has no quota"}, facts={"kind": "quiet"})

    def create(self, spec: VolumeSpec) -> CreatedVolume:
        return CreatedVolume(Handle(spec.id), spec.size)

    def delete(self, handle: Handle) -> None: ...

    def inspect(self, handle: Handle) -> Facts:
        return Facts(size=None, used=None)

    def list(self) -> Iterable[Found]:
        return []

    def mount(self, handle: Handle, target: object, *, options: object, readonly: bool) -> None: ...


def make_backend(name: str = "quiet", *, workers: int = 2, disabled: Iterable[str] = ()) -> Backend:
    driver: Driver = QuietDriver(name, NoOptions(), host=None)  # type: ignore[arg-type]
    return Backend(name, "quiet", driver, workers=workers, disabled=disabled, waiting=workers)


def test_a_result_and_an_error_come_back() -> None:
    backend = make_backend()
    assert backend.call(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        backend.call(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="of the job itself"):
        backend.call(_times_out)


def _times_out() -> None:
    raise TimeoutError("of the job itself")


def test_a_caller_leaves_at_its_deadline_and_the_late_result_is_handed_on() -> None:
    backend = make_backend()
    hang, late, handed = threading.Event(), [], threading.Event()

    def hand_on(result: str) -> None:
        late.append(result)
        handed.set()

    def job() -> str:
        hang.wait(30)
        return "done"

    with context.request(timeout=0.05), pytest.raises(OperationPending, match="the work goes on"):
        backend.call(job, late=hand_on)
    assert late == []
    hang.set()
    assert handed.wait(30)
    assert late == ["done"]


def test_a_result_in_time_is_not_late() -> None:
    late: list[int] = []
    with context.request(timeout=30):
        assert make_backend().call(lambda: 1, late=late.append) == 1
    assert late == []


def test_a_hanging_backend_refuses_at_once_and_another_does_not_notice() -> None:
    sick, well = make_backend("sick", workers=1), make_backend("well", workers=1)
    hang = threading.Event()
    callers = [threading.Thread(target=_call_quietly, args=(sick, hang)) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        while sick._room.acquire(blocking=False):  # until both have taken their place
            sick._room.release()
        with pytest.raises(BackendUnavailable, match="backend sick: too many requests"):
            sick.call(lambda: None)
        assert well.call(lambda: "well") == "well"
    finally:
        hang.set()
        for caller in callers:
            caller.join()
    assert sick.call(lambda: "recovered") == "recovered"


def _call_quietly(backend: Backend, hang: threading.Event) -> None:
    backend.call(lambda: hang.wait(30))


def _hang(begun: threading.Event, hang: threading.Event) -> None:
    begun.set()
    hang.wait(30)


def test_a_request_that_never_got_a_worker_was_never_begun() -> None:
    backend = make_backend(workers=1)
    hang, begun = threading.Event(), threading.Event()
    blocker = threading.Thread(target=backend.call, args=(lambda: _hang(begun, hang),))
    blocker.start()
    begun.wait(30)
    ran: list[int] = []
    with context.request(timeout=0.05), pytest.raises(BackendUnavailable, match="did not get to this request"):
        backend.call(lambda: ran.append(1))
    hang.set()
    blocker.join()
    backend.call(lambda: None)
    assert ran == []


def test_who_holds_a_lock_does_not_wait_for_those_who_wait_for_it() -> None:
    backend, lock = make_backend(workers=1), threading.Lock()
    with lock:
        waiting = backend.begin(lambda: lock.acquire(timeout=30))
        with context.request(timeout=5):
            assert backend.call_holding(lambda: 42) == 42
    assert waiting.wait()
    lock.release()


def test_the_request_id_goes_along_to_the_worker() -> None:
    with context.request("abc123"):
        assert make_backend().call(context.request_id.get) == "abc123"


def test_capabilities_are_the_class_less_what_the_probe_and_the_operator_took() -> None:
    backend = make_backend(disabled=["filesystem"])
    assert backend.capabilities == {Capability.SIZE}
    backend.probe()
    assert backend.health.ok
    assert backend.capabilities == frozenset()
    with pytest.raises(NotSupported, match="this file system has no quota"):
        backend.require(Capability.SIZE)
    with pytest.raises(NotSupported, match="turned off in the configuration"):
        backend.require(Capability.FILESYSTEM)
    with pytest.raises(NotSupported, match="driver quiet has no snapshot"):
        backend.require(Capability.SNAPSHOT)


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'quiet'"):
        Backends([make_backend()], default=()).get("quit")
