"""Everything a tree can hold, between every two kinds of storage, there and back, and compared by somebody else."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from tests.conftest import filesystems, wait_until
from tests.harness.ceph import POOL, Ceph
from tests.harness.files import backend_tables
from tests.harness.gluster import running_gluster
from tests.harness.volumed import Volumed
from tests.migration import trees
from tests.migration.conftest import Mover
from tests.migration.test_backups import back_up, restore
from volumed.host.linux import LinuxHost
from volumed_drivers.cephfs import CephFsDriver
from volumed_drivers.gluster import GlusterDriver
from volumed_drivers.s3 import S3Driver

pytestmark = [pytest.mark.root, pytest.mark.slow]

LOCAL = ("folders", "images", "btrfs")
KINDS = (*LOCAL, "ceph", "files", "gluster", "objects")
PAIRS = [*((kind, f"{kind}-2") for kind in LOCAL), *combinations(KINDS, 2)]
SIZE = "300m"
PATHS = {("images", "images-2"): "block", ("images", "ceph"): "block"}
UNSIZED = {"folders", "folders-2", "gluster"}
WITHOUT = {
    "files": CephFsDriver.cannot_hold,
    "gluster": GlusterDriver.cannot_hold,
    "objects": S3Driver.cannot_hold,
}


@pytest.fixture(scope="module")
def volumed(ceph: Ceph) -> Iterator[Volumed]:
    """With each kind, those of this machine twice, on storage of its own."""
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    with filesystems(folder) as make, running_gluster(folder / "server") as gluster:
        gluster.make_volume("files")
        tables = ""
        for end in ("", "-2"):
            tables += f"""
[backends.folders{end}]
driver = "directory"
path = "{make("ext4")}/volumes"
[backends.images{end}]
driver = "image"
path = "{folder}/images{end}"
[backends.btrfs{end}]
driver = "btrfs"
path = "{make("btrfs")}/volumes"
"""
        tables += f"""
[backends.ceph]
driver = "ceph-rbd"
pool = "{POOL}"
conf = "{ceph.conf}"
key = "file:{ceph.make_rbd_user()}"
[backends.gluster]
driver = "gluster"
servers = ["{gluster.address}"]
volume = "files"
"""
        tables += backend_tables(ceph, folder, group=f"m{secrets.token_hex(4)}")
        (folder / "v").mkdir()
        made = Volumed(folder / "v", backends=tables, only=True, default_backends=("folders",))
        try:
            made.start()
            yield made
        finally:
            made.clean_up()
            end_clients(folder / "v")
    shutil.rmtree(folder, ignore_errors=True)


def end_clients(folder: Path) -> None:
    host = LinuxHost(folder / "run")
    for entry in host.mounts():
        if entry.target.is_relative_to(folder / "run") or entry.target.is_relative_to(folder / "state"):
            host.unmount_network(entry.target, force=True)
    for helper in host.helpers(""):
        host.stop_helper(helper.name)


@pytest.fixture
def mover(volumed: Volumed) -> Iterator[Mover]:
    yield Mover(volumed)
    volumed.api.delete("volumes", "data")
    wait_until(lambda: not any(each["phase"] == "kept" for each in volumed.api.get("migrations")), timeout=60)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_everything_arrives_and_comes_back(mover: Mover, pair: tuple[str, str]) -> None:
    source, target = pair
    before = mover.create("data", source, **({} if source in UNSIZED else {"size": SIZE}))
    path = mover.mount("data")
    trees.make_everything(path, without=WITHOUT.get(source, frozenset()) | WITHOUT.get(target, frozenset()))
    everything = trees.picture(path)
    mover.unmount("data")
    for here, there in (pair, pair[::-1]):
        size = {"accept_loss": ["size"]} if there in UNSIZED else {"size": SIZE}
        moved = mover.move("data", there, keep_source="0s", **size)
        assert moved["phase"] in ("kept", "done"), moved["error"]
        assert moved["path"] == PATHS.get(pair, "tree")
        after = mover.volume("data")
        assert (after["id"], after["backend"]) == (before["id"], there)
        found = trees.picture(mover.mount("data"))
        assert [name for name in everything if found.get(name) != everything[name]] == []
        assert found == everything, f"{here} to {there}"
        mover.unmount("data")
    mover.assert_clean()


@pytest.mark.parametrize("to", [kind for kind in KINDS if kind not in LOCAL])
def test_a_backup_across_the_network_comes_back(mover: Mover, to: str) -> None:
    mover.create("data", "btrfs", size=SIZE)
    path = mover.mount("data")
    without = WITHOUT.get(to, frozenset())
    trees.make_everything(path, without=without)
    then = trees.picture(path)
    lost = ["size"] if to in UNSIZED else []
    backups = [back_up(mover, to=to, accept_loss=lost)]
    (path / "new").write_bytes(b"since")
    now = trees.picture(path)
    backups.append(back_up(mover, to=to, accept_loss=lost))
    mover.unmount("data")
    for backup, picture in zip(backups, (then, now), strict=True):
        assert mover.volumed.ctl("backup", "verify", backup["id"]).returncode == 0
        assert restore(mover, backup["id"], name="again", backend="btrfs-2")["state"] == "ready"
        assert trees.picture(mover.mount("again")) == picture
        mover.unmount("again")
        mover.volumed.ctl("rm", "-y", "again")
    mover.volumed.ctl("backup", "rm", "-y", backups[0]["id"])
    mover.volumed.ctl("backup", "rm", "-y", backups[1]["id"])
    mover.assert_clean()
