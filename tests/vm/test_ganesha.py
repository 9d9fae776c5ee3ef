"""`nfs` by the guest's kernel, on an nfs-ganesha that the host runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem
from tests.harness.ganesha import Ganesha, ganesha
from tests.vm.machine import SOURCES, Machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

# The whole suite runs on the kernel's server (test_nfs.py); here what depends on the server, as the machine is slow.
CHOSEN = (
    "mark_is_kept or nothing_is_kept or do_not_see or bears_repeating or many_at_once or mounts_come or held or is_gone"
    " or version or mistakes or swapped"
)

BEFORE = """
from pathlib import Path
from tests.harness.tree_drivers import create
from tests.vm.guest.test_ganesha import make
driver, target = make(), Path("/mnt")
driver.probe()
handle = create(driver)
driver.mount(handle, target, options=(), readonly=False)
(target / "file").write_text("kept")
print(handle)
"""
# What a server that is gone has to be told as: of a call, and of a mount.
WHILE_IT_IS_AWAY = """
from tests.harness.tree_drivers import create
from tests.vm.guest.test_ganesha import make
from volumed.errors import VolumedError
for backend in ("nas", "another"):
    try:
        create(make(backend, timeout=10))
    except VolumedError as error:
        print(error)
"""
AFTERWARDS = """
import sys
from pathlib import Path
from tests.harness.tree_drivers import create
from tests.vm.guest.test_ganesha import make
driver, target, handle = make(), Path("/mnt"), sys.argv[1]
print((target / "file").read_text())
(target / "file").write_text("goes on")
driver.unmount(handle, target)
driver.delete(handle)
driver.leave()
"""


@pytest.fixture
def server(make_filesystem: MakeFilesystem, tmp_path: Path) -> Iterator[Ganesha]:
    with ganesha(make_filesystem("ext4"), tmp_path) as made:
        yield made


@pytest.fixture
def client(guest: Machine, server: Ganesha) -> tuple[Machine, dict[str, str]]:
    return guest, {"VOLUMED_NFS_SERVER": guest.network(), "VOLUMED_NFS_PORT": str(server.port)}


def test_the_suite(client: tuple[Machine, dict[str, str]]) -> None:
    guest, environment = client
    guest.run_suite("test_ganesha.py", "-k", CHOSEN, timeout=800, **environment)


def test_a_server_that_was_killed_is_told_and_its_volumes_go_on_when_it_is_back(
    client: tuple[Machine, dict[str, str]], server: Ganesha
) -> None:
    guest, environment = client

    def python(script: str, *arguments: str) -> str:
        told = guest.run("python3", "-c", script, *arguments, timeout=300, **SOURCES, **environment)
        assert told.status == 0, told.text
        return told.text

    handle = python(BEFORE).strip()
    server.kill()
    told = python(WHILE_IT_IS_AWAY).splitlines()
    assert [line.partition(":")[0] for line in told] == ["backend nas", "backend another"], told
    assert all("does not answer" in line or "no NFS server listens" in line for line in told), told
    server.start()
    assert python(AFTERWARDS, handle).strip() == "kept"
    assert not (server.tree / handle).exists()
