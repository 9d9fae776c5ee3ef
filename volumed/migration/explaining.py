"""Errors of movers, who know two places on this node and no names, in words that name the volume and its backends."""

from __future__ import annotations

import contextlib

from volumed.core.backends import Backend
from volumed.core.provision import NEARLY_NOTHING
from volumed.driver import SupportsCapacity
from volumed.errors import CapacityExhausted, HostError, VolumedError


def explained(error: VolumedError, target: Backend, *, volume_name: str) -> VolumedError:
    """On storage that is full a sparse device fails with an I/O error, and knows nothing better to say."""
    if isinstance(error, HostError) and _is_full(target):
        error = CapacityExhausted(f"is full: {error.text}", hint="free some space there")
    if isinstance(error, CapacityExhausted):
        error.subject = error.subject or f"backend {target.name}"
    elif not error.subject:
        error.subject = f"volume {volume_name}"
        error.hint = error.hint or f"look at its backend and at backend {target.name}"
    return error


def _is_full(backend: Backend) -> bool:
    driver = backend.driver
    with contextlib.suppress(VolumedError):
        return isinstance(driver, SupportsCapacity) and backend.call(driver.capacity).available < NEARLY_NOTHING
    return False
