"""`ceph-rbd` by the guest's kernel, on a cluster that the host runs; and guest and host as two nodes of one cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.ceph import Ceph, address_for_guests, ceph_cluster
from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def reachable() -> Iterator[Ceph]:
    with address_for_guests() as address, ceph_cluster(address=address) as cluster:
        cluster.make_rbd_user()
        yield cluster


@pytest.fixture
def node(guest: Machine, reachable: Ceph) -> Machine:
    guest.connect()
    guest.put("/root/ceph.key", (reachable.folder / "volumed.key").read_bytes())
    return guest


# What differs between the ways of mapping: the devices. The rest is the same code, and slow on an emulated machine.
DEVICES = "device or restart or grows or key or way"


@pytest.mark.parametrize(("method", "chosen"), [("auto", ""), ("nbd", DEVICES)])
def test_in_the_machine(node: Machine, reachable: Ceph, method: str, chosen: str) -> None:
    told = node.run(
        *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=/root/volumed"),
        *("-c", "/root/volumed/pyproject.toml", "--rootdir=/root/volumed", "--timeout=600"),
        *("-k", chosen, "/root/volumed/tests/vm/guest/test_ceph_rbd.py"),
        timeout=1100,
        VOLUMED_MONITORS=reachable.monitors,
        VOLUMED_MAP_WITH=method,
        PYTHONPATH="/root/volumed:/root/volumed/drivers",
        PYTHONDONTWRITEBYTECODE="1",
    )
    print(told.text)
    assert told.status == 0
    assert " passed" in told.text
