"""Moves between storage that only a machine of its own has and storage that every one has; those of EBS are with it."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from volumed.units import GIB

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]


def test_everything_arrives_and_comes_back(guest: Machine) -> None:
    guest.install()
    disk = guest.plug("storage", size=GIB)
    guest.run_suite("test_moves.py", "-k", "not cloud", "--durations=0", timeout=1100, VOLUMED_DISK=disk)
