"""`cephfs` by the guest's kernel, on a cluster that the host runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.ceph import Ceph, address_for_guests, ceph_cluster
from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]

# What differs from ceph-fuse: the mounts. The rest is the same code, and slow on an emulated machine.
MOUNTS = "mount or key or quota or outgrow or restart or empty or another or expand_grows"


@pytest.fixture(scope="module")
def reachable() -> Iterator[Ceph]:
    with address_for_guests() as address, ceph_cluster(address=address) as cluster:
        cluster.start_filesystem()
        cluster.make_files_user()
        yield cluster


def test_in_the_machine(guest: Machine, reachable: Ceph) -> None:
    guest.connect()
    guest.put("/root/ceph.key", (reachable.folder / "files.key").read_bytes())
    words = ("--timeout=600", "-k", MOUNTS)
    guest.run_suite("test_cephfs.py", *words, timeout=1100, VOLUMED_MONITORS=reachable.monitors)
