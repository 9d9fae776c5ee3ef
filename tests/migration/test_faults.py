"""Servers that go away in the middle of a move: it goes on when they are back, or is cleanly where it was."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import wait_until
from tests.engines.test_docker_ceph import backend_table
from tests.harness.ceph import Ceph
from tests.harness.gluster import running_gluster
from tests.harness.volumed import Volumed
from tests.migration.conftest import Mover
from tests.migration.test_matrix import end_clients
from volumed.units import MIB

pytestmark = [pytest.mark.root, pytest.mark.slow]

SLOW = "4m"
PAIRS = [("sized", "ceph"), ("ceph", "sized"), ("local", "gluster"), ("gluster", "local")]


class Storage(NamedTuple):
    volumed: Volumed
    faults: dict[str, tuple[Callable[[], None], Callable[[], None]]]  # backend -> how it breaks, how it is mended


@pytest.fixture(scope="module")
def storage(ceph: Ceph) -> Iterator[Storage]:
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    with running_gluster(folder / "server") as gluster:
        gluster.make_volume("files")
        table = f'[backends.gluster]\ndriver = "gluster"\nservers = ["{gluster.address}"]\nvolume = "files"\n'
        made = Volumed(folder, backends=backend_table(ceph) + table)
        try:
            made.start()
            yield Storage(
                made,
                {
                    "ceph": (lambda: ceph.hang("osd.0"), lambda: ceph.resume("osd.0")),
                    "gluster": (lambda: gluster.kill_brick("files"), lambda: gluster.revive_brick("files")),
                },
            )
        finally:
            made.clean_up()
            end_clients(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    "pair", [("sized", "ceph"), ("ceph", "sized"), ("local", "gluster"), ("gluster", "local")], ids="-".join
)
def test_a_server_that_is_gone_for_a_while_costs_nothing_but_time(storage: Storage, pair: tuple[str, str]) -> None:
    volumed, (source, target) = storage.volumed, pair
    mover, api = Mover(volumed), volumed.api
    ruin, mend = next(storage.faults[each] for each in pair if each in storage.faults)
    mover.create("data", source, **({"size": "64m"} if source in ("sized", "ceph") else {}))
    content = os.urandom(24 * MIB)
    (mover.mount("data") / "data").write_bytes(content)
    mover.unmount("data")
    reference = mover.begin("data", target, bandwidth=SLOW, keep_source="0s")
    wait_until(lambda: ((api.get("migrations", reference)["progress"] or {}).get("done") or 0) >= 4 * MIB, timeout=90)
    ruin()
    try:
        api.post("migrations", reference, "throttle", body={"bandwidth": None})  # it would be done in a moment
        time.sleep(3)
        assert api.get("migrations", reference)["phase"] not in ("kept", "done")
        assert mover.volume("data")["backend"] == source
    finally:
        mend()
    ended = mover.outcome(reference)
    assert ended["phase"] in ("kept", "done", "failed"), ended
    where = source if ended["phase"] == "failed" else target
    assert mover.volume("data")["backend"] == where, ended["error"]
    # A client may need a moment to find its server again.
    wait_until(lambda: volumed.plugin("Mount", Name="data", ID="id-1").error == "", timeout=90)
    path = Path(volumed.plugin("Path", Name="data").body["Mountpoint"])
    assert (path / "data").read_bytes() == content
    mover.unmount("data")
    mover.assert_clean()
    api.delete("volumes", "data")
    wait_until(lambda: not any(each["phase"] == "kept" for each in api.get("migrations")), timeout=60)
    assert volumed.stored() == []
