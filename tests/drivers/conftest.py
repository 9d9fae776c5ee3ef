"""What the tests of a driver on several nodes share."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.harness.ceph import POOL, Ceph
from volumed.errors import VolumedError
from volumed.host.linux import LinuxHost
from volumed.model import Handle
from volumed_drivers.ceph_rbd import CephRbdDriver, RbdOptions

# Seconds. A cluster on a busy machine may stand still for longer than the 30 that are the default.
CEPH_PATIENCE = 120


class MakeRbd(Protocol):
    def __call__(self, *, node: str = "here", **options: object) -> CephRbdDriver: ...


@pytest.fixture(scope="session")
def rbd_key(ceph: Ceph) -> Path:
    return ceph.make_rbd_user()


@pytest.fixture
def make_rbd(ceph: Ceph, rbd_key: Path) -> Iterator[MakeRbd]:
    """`make_rbd(node="other", timeout=5)`: each node has processes of its own. Nothing of it stays in the pool."""
    drivers: list[CephRbdDriver] = []
    # Of a short name: the paths of sockets must fit into 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))

    def made(*, node: str = "here", **options: object) -> CephRbdDriver:
        values = {
            "pool": POOL,
            "conf": ceph.conf,
            "key": f"file:{rbd_key}",
            "map-with": "qsd",
            "timeout": CEPH_PATIENCE,
        }
        driver = CephRbdDriver("ceph", RbdOptions.model_validate({**values, **options}), LinuxHost(folder / node))
        driver._node = node
        drivers.append(driver)
        return driver

    yield made
    for driver in drivers:
        for volume_id in driver.mappings():
            with contextlib.suppress(VolumedError):
                driver.unmap(Handle(volume_id))
        driver._cluster.close()
    shutil.rmtree(folder)
    for image in ceph.rbd("ls", POOL).split():
        ceph.rbd("snap", "purge", f"{POOL}/{image}")
        ceph.rbd("trash", "mv", f"{POOL}/{image}")
