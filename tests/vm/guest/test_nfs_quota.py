"""Runs inside the machine: `nfs` on an export with quotas of folders, under the suite that all drivers pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sh
from tests.vm.guest.nfs_server import TOP, NfsServer
from volumed.host.linux import LinuxHost
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed_drivers.nfs import NfsDriver, NfsOptions

DISK = os.environ.get("VOLUMED_DISK", "")

QUOTA_COMMAND = """#!/bin/sh
# quota set FOLDER BYTES | quota clear FOLDER, as an administrator of the server would write it.
set -e
folder="/srv/nfs$2"
number=$(printf %s "$2" | cksum | cut -d' ' -f1)
case $1 in
set)
    xfs_quota -x -c "project -s -p $folder $number" /srv/nfs/bounded >/dev/null
    xfs_quota -x -c "limit -p bhard=$3 $number" /srv/nfs/bounded ;;
clear) xfs_quota -x -c "limit -p bhard=0 $number" /srv/nfs/bounded ;;
esac
"""


@pytest.fixture(scope="module")
def command() -> Path:
    """An export on XFS with project quotas, and the command that sets one."""
    server = NfsServer()
    folder = TOP / "bounded"
    folder.mkdir(parents=True, exist_ok=True)
    sh("mkfs.xfs", "-q", "-f", DISK)
    sh("mount", "-o", "prjquota", DISK, folder)
    server.export("bounded")
    command = Path("/root/quota")
    command.write_text(QUOTA_COMMAND)
    command.chmod(0o755)
    server.start()
    return command


def make(command: Path) -> NfsDriver:
    options = NfsOptions(server="127.0.0.1", export="/bounded", timeout=30, quota_command=command)
    return NfsDriver("quota", options, LinuxHost())


@pytest.fixture(autouse=True)
def _nothing_between_tests(command: Path) -> Iterator[None]:
    yield
    driver = make(command)
    for found in list(driver.list()):
        driver.delete(found.handle)


class TestNfsDriverWithQuota(DriverConformance):
    @pytest.fixture
    def make_driver(self, command: Path) -> MakeDriver:
        return lambda: make(command)
