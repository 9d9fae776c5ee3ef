"""Runs inside the machine: `nfs` by the kernel's client, on the nfs-ganesha of the host."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tree_drivers import create, mounted
from volumed.errors import ConfigError, PermissionDenied
from volumed.host.linux import LinuxHost
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed_drivers.nfs import NfsDriver, NfsOptions

SERVER, PORT = os.environ.get("VOLUMED_NFS_SERVER", ""), int(os.environ.get("VOLUMED_NFS_PORT", "2049"))


def make(backend: str = "nas", *, export: str = "/plain/volumes", **options: Any) -> NfsDriver:
    top, _, path = export.strip("/").partition("/")
    fields = {"server": SERVER, "port": PORT, "export": f"/{top}", "path": path, "timeout": 60, **options}
    return NfsDriver(backend, NfsOptions.model_validate(fields), LinuxHost())


@pytest.fixture(autouse=True)
def _nothing_between_tests() -> Iterator[None]:
    yield
    driver = make()
    for found in list(driver.list()):
        driver.delete(found.handle)


class TestNfsDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        return make


@pytest.mark.parametrize("version", ["4.2", "4.1", "4.0"])
def test_every_version_of_the_protocol(version: str, tmp_path: Path) -> None:
    driver = make(nfsvers=version)
    with mounted(driver, create(driver), tmp_path / "at") as tree:
        (tree / "file").write_text("kept")
        (entry,) = [entry for entry in driver.host.mounts() if entry.target == tree]
        assert {f"vers={version}", f"port={PORT}"} <= set(entry.super_options)


def test_a_folder_that_was_swapped_on_the_server_is_a_dead_mount_by_its_errno(tmp_path: Path) -> None:
    driver = make()
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        (tree / "file").write_text("kept")
        driver._look("rm", "-rf", "--", driver._root / handle)
        with pytest.raises(OSError) as failed:
            (tree / "other").write_text("lost")
        assert failed.value.errno in (errno.ESTALE, errno.ENOENT)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="the server does not export /wrong"):
        make("wrong", export="/wrong").probe()
    with pytest.raises(PermissionDenied, match="does not let root write there.*root_squash.*no_root_squash"):
        make("squashed", export="/squashed").probe()
