"""Keyed locks: one key waits, another does not, and nothing is remembered of a key that nobody holds."""

from __future__ import annotations

import threading

import pytest

from volumed import context
from volumed.core.locks import KeyedLocks
from volumed.errors import OperationPending


def test_a_held_key_refuses_a_caller_whose_patience_ends() -> None:
    locks = KeyedLocks()
    with locks.hold("a"):
        refused: list[str] = []

        def second() -> None:
            try:
                with locks.hold("a", subject="volume a", wait=0.01):
                    refused.append("entered")
            except OperationPending as error:
                refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused == ["volume a: another change is still running. try again later"]


def test_the_deadline_of_the_request_bounds_the_wait() -> None:
    locks = KeyedLocks()
    outcome: list[type[BaseException]] = []

    def second() -> None:
        try:
            with context.request(timeout=0.01), locks.hold("a"):
                pass
        except OperationPending as error:
            outcome.append(type(error))

    with locks.hold("a"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=30)
        assert outcome == [OperationPending]


def test_another_key_does_not_wait() -> None:
    locks = KeyedLocks()
    with locks.hold("a"), locks.hold("b", wait=0.0):
        pass


def test_a_key_is_given_to_one_at_a_time() -> None:
    locks, inside, most = KeyedLocks(), 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with locks.hold("a"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_an_error_inside_frees_the_key_and_nothing_is_remembered() -> None:
    locks = KeyedLocks()
    with pytest.raises(ZeroDivisionError), locks.hold("a"):
        raise ZeroDivisionError
    with locks.hold("a", wait=0.0):
        pass
    assert locks._locks == {}
