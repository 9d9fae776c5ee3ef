"""Runs inside the machine: everything a tree can hold, between storage that other machines of the tests have not and
storage that they have, there and back, and compared by somebody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import sh, wait_until
from tests.migration import trees
from tests.vm.guest.daemon import PATIENCE, Daemon
from tests.vm.guest.nfs_server import TOP, NfsServer
from volumed.host import loop
from volumed.model import MigrationPhase
from volumed.units import GIB, MIB
from volumed_drivers.ebs import disks
from volumed_drivers.nfs import NfsDriver

pytestmark = pytest.mark.timeout(600)

EC2 = os.environ.get("VOLUMED_EC2", "")
BACKENDS = """
[backends.folders]
driver = "directory"
path = "{folder}/folders"
[backends.images]
driver = "image"
path = "{folder}/images"
"""
THIN = """
[backends.thin]
driver = "lvm"
vg = "vg0"
thinpool = "pool"
"""
NAS = """
[backends.nas]
driver = "nfs"
server = "127.0.0.1"
export = "/plain"
"""
CLOUD = f"""
[backends.cloud]
driver = "ebs"
endpoint = "{EC2}"
metadata-endpoint = "{EC2}"
access-key = "env:EC2_KEY"
secret-key = "env:EC2_SECRET"
"""
UNSIZED = {"folders", "nas"}


@pytest.fixture
def thin() -> Iterator[str]:
    Path("/etc/lvm/lvmlocal.conf").write_text("backup { backup=0 archive=0 }\nactivation { monitoring=0 }\n")
    sh("vgcreate", "-q", "vg0", os.environ["VOLUMED_DISK"])
    sh("lvcreate", "-q", "--type", "thin-pool", "-L", "512m", "-n", "pool", "vg0")
    yield THIN
    assert sh("lvs", "--noheadings", "-o", "lv_name", "@volumed").split() == []
    sh("vgremove", "-ff", "-y", "-q", "vg0")


@pytest.fixture(scope="module")
def nas() -> Iterator[str]:
    server = NfsServer()
    server.export("plain")
    server.start()
    yield NAS
    assert list((TOP / "plain").iterdir()) == []
    server.stop()


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(disks, "SETTLED", 2.0)  # nothing that EC2 shows here is stale
    return CLOUD


@pytest.mark.parametrize(
    ("here", "there", "path"),
    [
        ("images", "thin", "block"),
        ("folders", "thin", "tree"),
        ("images", "nas", "tree"),
        ("folders", "nas", "tree"),
        ("images", "cloud", "block"),
    ],
)
def test_everything_arrives_and_comes_back(
    here: str, there: str, path: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    table: str = request.getfixturevalue(there)
    daemon = Daemon(tmp_path, backends=BACKENDS.format(folder=tmp_path) + table)
    # An ext4 that is made small has blocks of 1024 bytes, too small for the attributes.
    size = GIB if there == "cloud" or (there, path) == ("thin", "tree") else 64 * MIB
    without = NfsDriver.cannot_hold if there == "nas" else frozenset[str]()
    try:
        sized: dict[str, Any] = {} if here in UNSIZED else {"size": size}
        before = daemon.create(here, **sized)
        tree = daemon.mount()
        trees.make_everything(tree, without=without)
        everything = trees.picture(tree)
        daemon.unmount()
        for to in (there, here):
            wanted: dict[str, Any] = {"accept": ("size",)} if to in UNSIZED else {"size": size}
            moved = daemon.move(to, keep_source=0.0, **wanted)
            assert moved.phase in (MigrationPhase.KEPT, MigrationPhase.DONE), moved.error
            assert moved.path == path
            after = daemon.volume()
            assert (after.id, after.backend) == (before.id, to)
            found = trees.picture(daemon.mount())
            assert [name for name in everything if found.get(name) != everything[name]] == []
            assert found == everything, f"to {to}"
            daemon.unmount()
        wait_until(lambda: daemon.migrations.get("data").phase is MigrationPhase.DONE, timeout=PATIENCE)
        daemon.core.volumes.remove("data")
        assert [each.text for each in daemon.core.doctor.examine()] == []
        assert list(loop.attached()) == []
    finally:
        daemon.stop()
        if here == "folders":
            trees.unlock(tmp_path)
