"""One frozen machine for all, a copy of it for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.machine import Machine, machine

collect_ignore = ["guest"]  # those run inside


@pytest.fixture
def guest() -> Iterator[Machine]:
    with machine() as running:
        running.put_sources()
        yield running
