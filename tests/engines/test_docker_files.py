"""Containers on CephFS and on S3 (RADOS Gateway), through a real dockerd."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.engines.conftest import plugin_socket
from tests.engines.test_docker import create, run, start
from tests.harness.ceph import Ceph
from tests.harness.docker import Docker
from tests.harness.files import backend_tables
from tests.harness.volumed import Volumed, running_volumed

pytestmark = [pytest.mark.root, pytest.mark.engine]


@pytest.fixture(scope="module")
def volumed(docker: Docker, ceph: Ceph) -> Iterator[Volumed]:
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))
    with running_volumed(
        folder,
        plugin_socket=plugin_socket("files"),
        docker_socket=docker.socket,
        backends=backend_tables(ceph, folder, group=f"d{secrets.token_hex(4)}"),
    ) as running:
        yield running
        docker.remove_containers()
        wait_until(lambda: running.mounted() == {})
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _nothing_left(docker: Docker, volumed: Volumed) -> Iterator[None]:
    yield
    docker.remove_containers()
    wait_until(lambda: volumed.bindings() == [] and volumed.mounted() == {})
    for volume in docker("volume", "ls", "-q").split():
        docker("volume", "rm", volume)
    volumed.assert_nothing_left()
    assert list((volumed.folder / "run" / "helpers").iterdir()) == []
    assert list((volumed.folder / "run" / "private").iterdir()) == []


@pytest.mark.parametrize("backend", ["files", "objects"])
def test_data_outlives_its_container_and_the_daemon(
    docker: Docker, plugin: str, volumed: Volumed, backend: str
) -> None:
    create(docker, plugin, "data", f"backend={backend}", "size=64m", "uid=1000", "mode=0750")
    assert run(docker, "data", "stat -c '%u %a' /data; echo kept > /data/file") == "1000 750"
    start(docker, "web-1", "data")
    volumed.kill()
    assert docker("exec", "web-1", "cat", "/data/file") == "kept"  # its client is no child of the daemon
    volumed.start()
    assert docker("exec", "web-1", "sh", "-c", "echo more >> /data/file; cat /data/file").split() == ["kept", "more"]
    docker.remove_containers()
    wait_until(lambda: volumed.mounted() == {})
    assert run(docker, "data", "cat /data/file").split() == ["kept", "more"]


@pytest.mark.parametrize("backend", ["files", "objects"])
def test_an_image_fills_a_new_volume(docker: Docker, plugin: str, backend: str) -> None:
    create(docker, plugin, "data", f"backend={backend}")
    assert docker("run", "--rm", "-v", "data:/filled", "busybox", "cat", "/filled/file") == "from the image"


@pytest.mark.parametrize("backend", ["files", "objects"])
def test_a_client_that_is_killed_is_replaced_under_its_container(
    docker: Docker, plugin: str, volumed: Volumed, backend: str
) -> None:
    create(docker, plugin, "data", f"backend={backend}")
    start(docker, "web-1", "data")
    docker("exec", "web-1", "sh", "-c", "echo kept > /data/file; sync")
    (helper,) = (volumed.folder / "run" / "helpers").iterdir()
    os.kill(json.loads((helper / "process").read_bytes())["pid"], 9)
    event = volumed.wait_for_event("helper.died", timeout=60)
    assert event["subject"] == "data"
    # The killed client of CephFS holds what it had to write until the MDS drops it.
    try:
        wait_until(lambda: docker("exec", "web-1", "cat", "/data/file", check=False) == "kept", timeout=180)
    except AssertionError:
        print(volumed.log()[-8000:])
        raise


def test_a_snapshot_of_files_in_use(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "backend=files", "size=64m")
    start(docker, "web-1", "data")
    docker("exec", "web-1", "sh", "-c", "echo then > /data/file; sync")
    volumed.ctl("snapshot", "create", "data", "before")
    docker("exec", "web-1", "sh", "-c", "echo now > /data/file")
    create(docker, plugin, "older", "backend=files", "from=data@before")
    assert run(docker, "older", "cat /data/file") == "then"
    volumed.ctl("snapshot", "rm", "data", "before", "--yes")


def test_what_cannot_be_held_is_shown_and_no_key_is(volumed: Volumed) -> None:
    told = volumed.ctl("backend", "inspect", "objects").stdout
    assert "hardlinks" in told
    for path in volumed.folder.glob("*.key"):
        assert path.read_text() not in told + volumed.log()
