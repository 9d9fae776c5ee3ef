"""Encryption at rest needs device-mapper: it is tested inside the machine, with the daemon as it is installed."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("part", ["not killed", "killed"])
def test_in_the_machine(guest: Machine, part: str) -> None:
    guest.install()
    told = guest.run(
        *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=/root/volumed"),
        *("-c", "/root/volumed/pyproject.toml", "--rootdir=/root/volumed"),
        *("-k", part, "/root/volumed/tests/vm/guest/test_encryption.py"),
        timeout=2300,
        PYTHONPATH="/root/volumed:/root/volumed/drivers",
        PYTHONDONTWRITEBYTECODE="1",
    )
    print(told.text)
    assert told.status == 0
    assert " passed" in told.text
