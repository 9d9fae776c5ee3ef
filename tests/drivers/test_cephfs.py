"""`cephfs` on a real cluster, mounted by ceph-fuse (the kernel's client: tests/vm)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.ceph import FILESYSTEM, Ceph
from volumed.host.linux import LinuxHost
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed_drivers.cephfs import CephFsDriver, CephFsOptions

pytestmark = pytest.mark.root

MakeCephFs = Callable[..., CephFsDriver]


@pytest.fixture(scope="module")
def key(ceph: Ceph) -> Path:
    """Of a user with the least that it takes: as in the README."""
    ceph.start_filesystem()
    return ceph.make_user(
        "files",
        mon="allow r",
        mgr="allow module volumes rw",
        mds=f"allow rw fsname={FILESYSTEM} path=/volumes",
        osd=f"allow rw tag cephfs data={FILESYSTEM}",
    )


@pytest.fixture
def make_cephfs(ceph: Ceph, key: Path) -> Iterator[MakeCephFs]:
    """Drivers of this test's own subvolume group."""
    made: list[CephFsDriver] = []
    group = f"t{secrets.token_hex(4)}"

    def make(**options: object) -> CephFsDriver:
        values = {"filesystem": FILESYSTEM, "group": group, "conf": ceph.conf, "user": "files", "key": f"file:{key}"}
        driver = CephFsDriver("files", CephFsOptions.model_validate({**values, **options}), LinuxHost())
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver._cluster.close()


class TestConformance(DriverConformance):
    @pytest.fixture
    def make_driver(self, make_cephfs: MakeCephFs) -> MakeDriver:
        return make_cephfs
