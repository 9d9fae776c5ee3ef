"""Encryption at rest needs device-mapper: it is tested inside the machine, with the daemon as it is installed."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("part", ["not killed", "killed"])
def test_in_the_machine(guest: Machine, part: str) -> None:
    guest.install()
    guest.run_suite("test_encryption.py", "-k", part, timeout=2300)
