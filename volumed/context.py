"""What belongs to the request at hand: its id, for every log line it causes, and its deadline.

Both are context variables: a thread pool that copies the context (`volumed.core.backends`) carries them along.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def new_request_id() -> str:
    return secrets.token_hex(6)


@contextlib.contextmanager
def request(identifier: str | None = None, *, timeout: float | None = None) -> Iterator[str]:
    """Run a block as one request; `timeout` in seconds from now bounds all it does."""
    identifier = identifier or new_request_id()
    id_token = request_id.set(identifier)
    deadline_token = _deadline.set(None if timeout is None else time.monotonic() + timeout)
    try:
        yield identifier
    finally:
        _deadline.reset(deadline_token)
        request_id.reset(id_token)


def remaining(default: float) -> float:
    """Seconds left of the request's deadline, at most `default`; never below zero."""
    deadline = _deadline.get()
    if deadline is None:
        return default
    return max(0.0, min(default, deadline - time.monotonic()))
