"""`ceph-rbd` by the guest's kernel, on a cluster that the host runs; and guest and host as two nodes of one cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.ceph import POOL, Ceph, address_for_guests, ceph_cluster
from tests.vm.machine import SOURCES, Machine
from volumed.driver import VolumeSpec
from volumed.errors import InUse
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeMode, new_volume_id
from volumed.units import MIB
from volumed_drivers.ceph_rbd import CephRbdDriver, RbdOptions, RbdVolumeOptions

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def reachable() -> Iterator[Ceph]:
    with address_for_guests() as address, ceph_cluster(address=address) as cluster:
        cluster.make_rbd_user()
        yield cluster


@pytest.fixture
def host(reachable: Ceph) -> Iterator[CephRbdDriver]:
    """This machine as a node of the cluster, with qemu-storage-daemon."""
    values = {"pool": POOL, "conf": reachable.conf, "key": f"file:{reachable.folder}/volumed.key", "map-with": "qsd"}
    with tempfile.TemporaryDirectory(prefix="node-", dir="/tmp") as folder:
        driver = CephRbdDriver("ceph", RbdOptions.model_validate(values), LinuxHost(Path(folder)))
        yield driver
        for volume_id in driver.mappings():
            driver.unmap(Handle(volume_id))
        driver._cluster.close()


@pytest.fixture
def node(guest: Machine, reachable: Ceph) -> Machine:
    guest.connect()
    guest.put("/root/ceph.key", (reachable.folder / "volumed.key").read_bytes())
    return guest


def test_guest_and_host_are_two_nodes(node: Machine, reachable: Ceph, host: CephRbdDriver) -> None:
    """The kernel's client in one, QEMU's in the other: refused, told by whom, and cut off."""
    handle = host.create(VolumeSpec(new_volume_id(), 64 * MIB, VolumeMode.BLOCK, RbdVolumeOptions())).handle
    script = f"""
from tests.vm.guest.test_ceph_rbd import make
print(make().map({handle!r}))
"""
    told = node.run("python3", "-c", script, VOLUMED_MONITORS=reachable.monitors, **SOURCES, timeout=300)
    assert told.status == 0, told.text
    device = told.text.split()[-1]
    node.sh(f"echo before | dd of={device} bs=4096 conv=sync oflag=direct")
    with pytest.raises(InUse, match="is mapped by: node guest"):
        host.map(handle)
    (holder,) = host.holders(handle)
    assert (holder.node, holder.ours) == ("guest", False)
    host.fence(handle, holder)
    behind = node.sh(f"timeout 60 dd if=/dev/zero of={device} bs=4096 count=1 oflag=direct 2>&1", check=False)
    assert "error" in behind
    assert host.map(handle).open("rb").read(6) == b"before"


# What differs between the ways of mapping: the devices. The rest is the same code, and slow on an emulated machine.
DEVICES = "a_device or devices or restart or grows or key or way or room"


@pytest.mark.parametrize(("method", "chosen"), [("auto", ""), ("nbd", DEVICES)])
def test_in_the_machine(node: Machine, reachable: Ceph, method: str, chosen: str) -> None:
    told = {"VOLUMED_MONITORS": reachable.monitors, "VOLUMED_MAP_WITH": method}
    node.run_suite("test_ceph_rbd.py", "--timeout=600", "-k", chosen, timeout=1100, **told)
