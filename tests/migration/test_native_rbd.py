"""Moves from pool to pool of one Ceph cluster, which copies by itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.crash.killing import crash_points
from tests.harness.ceph import POOL, Ceph
from tests.harness.volumed import ApiError, Volumed
from tests.migration.conftest import Mover
from tests.migration.test_crash import data_of, survive
from tests.migration.test_verify import outcomes, verified

pytestmark = pytest.mark.root
MIB = 1 << 20
OTHER = "others"
POINTS = ["native.ceph-rbd.snapshot", "ceph-rbd.clone.made", "native.ceph-rbd.cloned", "native.taken"]


@pytest.fixture(scope="session")
def keys(ceph: Ceph) -> dict[str, Path]:
    """One user for both pools, and one for the other pool alone."""
    ceph.make_pool(OTHER)
    both = f"profile rbd pool={POOL}, profile rbd pool={OTHER}"
    return {
        "both": ceph.make_user("mover", mon='profile rbd, allow command "mgr dump"', osd=both, mgr=both),
        "alone": ceph.make_rbd_user("alone", pool=OTHER),
    }


@pytest.fixture
def volumed(ceph: Ceph, keys: dict[str, Path]) -> Iterator[Volumed]:
    # Of a short name: the paths of sockets must fit into 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="rbd-", dir="/tmp"))
    tables = "".join(
        f"""
[backends.{name}]
driver = "ceph-rbd"
pool = "{pool}"
user = "{"alone" if name == "alone" else "mover"}"
conf = "{ceph.conf}"
key = "file:{keys["alone" if name == "alone" else "both"]}"
map-with = "qsd"
"""
        for name, pool in (("rbd-a", POOL), ("rbd-b", OTHER), ("alone", OTHER))
    )
    made = Volumed(folder, backends=tables)
    try:
        yield made
    finally:
        made.clean_up()
        shutil.rmtree(folder)
        for pool in (POOL, OTHER):
            for image in ceph.rbd("ls", pool).split():
                ceph.rbd("rm", f"{pool}/{image}")


def fill(mover: Mover) -> dict[str, bytes]:
    mover.create("data", "rbd-a", size="96m", filesystem="ext4")
    path = mover.mount("data")
    for number in range(20):
        (path / str(number)).write_bytes(b"%d" % number * 300_000)
    held = data_of(path)
    mover.unmount("data")
    return held


def plan(mover: Mover, to: str, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = mover.volumed.api.post("volumes", "data", "migration-plan", body={"backend": to, **body})
    return found


def test_the_cluster_copies_and_the_copy_is_its_own(mover: Mover, ceph: Ceph) -> None:
    held = fill(mover)
    told = plan(mover, "rbd-b")
    assert (told["path"], told["rejected"]) == ("native", {})
    assert "clone" in told["way"]
    refused = plan(mover, "alone")
    assert refused["path"] == "block"
    assert f"client.alone cannot read pool {POOL}" in refused["rejected"]["native"]
    moved = mover.move("data", "rbd-b")
    assert (moved["phase"], moved["path"], moved["copied"]) == ("kept", "native", 0), moved
    (image,) = ceph.rbd("ls", OTHER).split()
    assert "parent" not in ceph.rbd("info", f"{OTHER}/{image}")
    (source,) = ceph.rbd("ls", POOL).split()
    assert ceph.rbd("snap", "ls", "--all", f"{POOL}/{source}").strip() == ""
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    mover.volumed.api.post("migrations", "data", "finish")
    assert ceph.rbd("ls", POOL).split() == []
    mover.assert_clean()


def test_it_is_proven(mover: Mover) -> None:
    fill(mover)
    assert mover.move("data", "rbd-b")["path"] == "native"
    assert outcomes(verified(mover)) == ["equal", "equal"]
    mover.volumed.stop()


def test_every_point_is_tried() -> None:
    assert {point for point in crash_points() if point.startswith("native.ceph-rbd.")} <= set(POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_the_cluster_copies(mover: Mover, ceph: Ceph, point: str) -> None:
    held, volumed = fill(mover), mover.volumed
    survive(volumed, point, lambda: mover.move("data", "rbd-b", keep_source="0s"))
    wait_until(lambda: volumed.api.get("migrations", "data")["phase"] == "done", timeout=120)
    assert mover.volume("data")["backend"] == "rbd-b"
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    assert ceph.rbd("ls", POOL).split() == []
    mover.assert_clean()


@pytest.mark.slow
def test_killed_and_aborted_it_leaves_nothing(mover: Mover, ceph: Ceph) -> None:
    held, volumed = fill(mover), mover.volumed
    survive(volumed, "native.ceph-rbd.cloned", lambda: mover.move("data", "rbd-b"))
    try:
        volumed.api.post("migrations", "data", "abort")
    except ApiError as error:
        assert "cannot be aborted" in str(error)
    last = mover.outcome("data")
    assert last["phase"] in ("aborted", "kept"), last
    if last["phase"] == "aborted":
        assert ceph.rbd("ls", OTHER).split() == []
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    mover.assert_clean()
