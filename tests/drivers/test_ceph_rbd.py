"""`ceph-rbd` on a real cluster, its images in loop devices by qemu-storage-daemon (krbd and rbd-nbd: tests/vm)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.ceph import POOL, Ceph
from volumed.host.linux import LinuxHost
from volumed.model import Handle
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed_drivers.ceph_rbd import CephRbdDriver, RbdOptions

pytestmark = pytest.mark.root


@pytest.fixture(scope="session")
def key(ceph: Ceph) -> Path:
    return ceph.make_rbd_user()


@pytest.fixture
def make(ceph: Ceph, key: Path) -> Iterator[MakeDriver]:
    """`make(node="other", timeout=5)`: each node has processes of its own."""
    drivers: list[CephRbdDriver] = []
    # Of a short name: the paths of sockets must fit into 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))

    def made(*, node: str = "here", **options: object) -> CephRbdDriver:
        values = {"pool": POOL, "conf": ceph.conf, "key": f"file:{key}", "map-with": "qsd", **options}
        driver = CephRbdDriver("ceph", RbdOptions.model_validate(values), LinuxHost(folder / node))
        driver._node = node
        drivers.append(driver)
        return driver

    yield made
    for driver in drivers:
        for image in driver.mappings():
            driver.unmap(Handle(image))
        driver._cluster.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _nothing_between_tests(ceph: Ceph, make: MakeDriver) -> Iterator[None]:
    yield
    for image in ceph.rbd("ls", POOL).split():
        ceph.rbd("snap", "purge", f"{POOL}/{image}")
        ceph.rbd("trash", "mv", f"{POOL}/{image}")


class TestConformance(DriverConformance):
    @pytest.fixture
    def make_driver(self, make: MakeDriver) -> MakeDriver:
        return make
