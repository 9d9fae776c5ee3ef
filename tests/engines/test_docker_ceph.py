"""Containers on RBD images of a real Ceph, through a real dockerd."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.engines.test_docker import create, run, start
from tests.harness.ceph import POOL, Ceph
from tests.harness.docker import Docker
from tests.harness.volumed import Volumed, running_volumed

pytestmark = [pytest.mark.root, pytest.mark.engine]


def backend_table(ceph: Ceph) -> str:
    return (
        f'[backends.ceph]\ndriver = "ceph-rbd"\npool = "{POOL}"\n'
        f'conf = "{ceph.conf}"\nkey = "file:{ceph.make_rbd_user()}"\ntimeout = 10\n'
    )


@pytest.fixture(scope="module")
def volumed(docker: Docker, ceph: Ceph) -> Iterator[Volumed]:
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    with running_volumed(
        folder,
        plugin_socket=plugin_socket("ceph"),
        docker_socket=docker.socket,
        backends=backend_table(ceph),
    ) as running:
        yield running
        docker.remove_containers()
        wait_until(lambda: running.mounted() == {})
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _nothing_left(docker: Docker, volumed: Volumed, ceph: Ceph) -> Iterator[None]:
    yield
    docker.remove_containers()
    wait_until(lambda: volumed.bindings() == [] and volumed.mounted() == {} and volumed.loops() == [])
    for volume in docker("volume", "ls", "-q").split():
        docker("volume", "rm", volume)
    volumed.assert_nothing_left()
    assert ceph.rbd("ls", POOL) == ""


def test_data_outlives_its_container_and_the_daemon(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "backend=ceph", "size=64m")
    run(docker, "data", "echo kept > /data/file")
    start(docker, "web-1", "data")
    volumed.kill()
    assert docker("exec", "web-1", "cat", "/data/file") == "kept"  # what holds its device is no child of the daemon
    volumed.start()
    assert docker("exec", "web-1", "sh", "-c", "echo more >> /data/file; cat /data/file").split() == ["kept", "more"]
    docker.remove_containers()
    wait_until(lambda: volumed.mounted() == {})
    assert run(docker, "data", "cat /data/file").split() == ["kept", "more"]


def test_a_volume_is_as_large_as_was_asked_for_and_grows_in_use(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "backend=ceph", "size=300m", "fs=xfs")
    assert "No space left" in run(docker, "data", "dd if=/dev/zero of=/data/file bs=1M count=400", check=False)
    start(docker, "web-1", "data")
    volumed.ctl("expand", "data", "600m")
    docker("exec", "web-1", "dd", "if=/dev/zero", "of=/data/file", "bs=1M", "count=400")


def test_snapshots_and_clones_of_a_volume_in_use(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "backend=ceph", "size=64m")
    start(docker, "web-1", "data")
    docker("exec", "web-1", "sh", "-c", "echo then > /data/file")
    volumed.ctl("snapshot", "create", "data", "before")
    docker("exec", "web-1", "sh", "-c", "echo now > /data/file")
    create(docker, plugin, "older", "backend=ceph", "from=data@before")
    create(docker, plugin, "copy", "backend=ceph", "from=data")
    assert run(docker, "older", "cat /data/file") == "then"
    assert run(docker, "copy", "cat /data/file") == "now"
    docker.remove_containers()
    wait_until(lambda: volumed.mounted() == {})
    volumed.ctl("snapshot", "restore", "data", "before", "--yes")
    assert run(docker, "data", "cat /data/file") == "then"
    volumed.ctl("snapshot", "rm", "data", "before", "--yes")


def test_what_is_known_of_the_backend_is_shown(volumed: Volumed) -> None:
    told = volumed.ctl("backend", "inspect", "ceph").stdout
    assert "map-with" in told
    assert "qsd" in told
    assert "this kernel has no module rbd" in told
    assert "librados" not in Path(f"/proc/{volumed.pid}/maps").read_text()  # its workers have loaded it


def test_a_device_whose_process_was_killed_is_named(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "backend=ceph", "size=64m")
    run(docker, "data", "echo kept > /data/file; sync")
    start(docker, "web-1", "data")
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 1)
    (helper,) = (volumed.folder / "run" / "helpers").glob("rbd-qsd-*")
    wait_until((helper / "process").exists)
    os.kill(json.loads((helper / "process").read_bytes())["pid"], 9)
    event = volumed.wait_for_event("helper.died", timeout=60)
    assert "qemu-storage-daemon" in event["text"]
    assert event["subject"] == "data"
    lost = volumed.wait_for_event("mount.lost", timeout=60)
    assert "container web-1" in lost["text"]
    docker.remove_containers()
    assert run(docker, "data", "cat /data/file") == "kept"


def test_a_target_that_dies_after_the_commit_point_is_said_and_waited_for(
    docker: Docker, plugin: str, volumed: Volumed, ceph: Ceph
) -> None:
    """Its containers must not go on with what is the old place by now."""
    create(docker, plugin, "data", "backend=local")
    start(docker, "web-1", "data")
    docker("exec", "web-1", "sh", "-c", "echo kept > /data/file")
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 1)
    volumed.stop()
    volumed.start(env={"VOLUMED_CRASH_AT": "migrate.committed"})
    wait_until(lambda: sum(len(binding["consumers"]) for binding in volumed.bindings()) == 1)
    body = {"backend": "ceph", "size": 64 << 20, "keep_source": "0s"}
    begun = volumed.api.post("volumes", "data", "migrate", body=body)
    assert volumed.wait_end(timeout=90) == -9, volumed.log()[-3000:]
    ceph.hang("osd.0")
    try:
        volumed.start(wait=False)
        volumed.wait_ready(timeout=90)
        event = volumed.wait_for_event("migration.stranded", timeout=120)
        assert "its containers are held until backend ceph, where it lies now, works" in event["text"]
        assert docker("inspect", "-f", "{{.State.Status}}", "web-1") in ("paused", "exited")
    finally:
        ceph.resume("osd.0")
        ceph.recover()
    *_, ended = volumed.api.lines("migrations", begun["id"], "follow")
    assert ended["phase"] in ("kept", "done"), ended["error"]
    wait_until(lambda: docker("inspect", "-f", "{{.State.Status}}", "web-1") == "running", timeout=60)
    assert docker("exec", "web-1", "cat", "/data/file") == "kept"
    wait_until(lambda: volumed.api.get("migrations", begun["id"])["phase"] == "done", timeout=60)
