"""Drivers whose kernel parts the test host may lack: their suites run inside the machine."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from volumed.units import GIB

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "suite", ["test_lvm.py", "test_directory_quota.py", "test_iscsi.py", "test_nfs.py", "test_nfs_quota.py"]
)
def test_in_the_machine(guest: Machine, suite: str) -> None:
    disk = guest.plug("storage", size=2 * GIB)
    guest.run_suite(suite, timeout=800, VOLUMED_DISK=disk)
