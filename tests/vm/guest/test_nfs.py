"""Runs inside the machine: `nfs` on the kernel's server and client."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import sh, wait_until
from tests.harness.tree_drivers import create
from tests.vm.guest.nfs_server import TOP, NfsServer
from volumed import context
from volumed.driver import Capability, VolumeSpec
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    InUse,
    MountFailed,
    NotFound,
    NotSupported,
    PermissionDenied,
    VolumedError,
)
from volumed.host import mounts
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeMode, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.nfs import NfsDriver, NfsOptions

HOST = LinuxHost()


@pytest.fixture(scope="session")
def server() -> NfsServer:
    made = NfsServer()
    made.export("plain")
    made.start()
    return made


def make(export: str = "plain", backend: str = "nas", **options: Any) -> NfsDriver:
    fields = {"server": "127.0.0.1", "export": f"/{export}", "timeout": 20, **options}
    return NfsDriver(backend, NfsOptions.model_validate(fields), HOST)


@pytest.fixture(autouse=True)
def _nothing_between_tests(server: NfsServer) -> Iterator[None]:
    yield
    driver = make()
    for found in list(driver.list()):
        driver.delete(found.handle)
    assert list((TOP / "plain").iterdir()) == []


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "mounted"
    made.mkdir()
    return made


class TestNfsDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self, server: NfsServer) -> MakeDriver:
        return make


class TestVersion3(DriverConformance):
    """It knows exports by their paths, has no root of its own, and locks by a protocol of its own."""

    @pytest.fixture
    def make_driver(self, server: NfsServer) -> MakeDriver:
        return lambda: make(str(TOP / "plain").removeprefix("/"), nfsvers="3")


def test_version_3_locks_among_nodes(server: NfsServer, target: Path) -> None:
    """By lockd and statd, which a mount starts where they are not there."""
    driver = make(str(TOP / "plain").removeprefix("/"), nfsvers="3")
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    (entry,) = [entry for entry in HOST.mounts() if entry.target == target]
    assert {"vers=3", "local_lock=none"} <= set(entry.super_options)
    with (target / "file").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        on_server = (TOP / "plain" / handle / "data" / "file").stat().st_ino
        assert f":{on_server} " in Path("/proc/locks").read_text()
    driver.unmount(handle, target)


# Sizes
def test_a_quota_command_that_does_nothing_is_found_out(server: NfsServer) -> None:
    driver = make(quota_command=Path("/bin/true"))
    with pytest.raises(NotSupported, match="the server does not enforce 64.*MiB: the folder shows"):
        create(driver, 64 * MIB)
    with pytest.raises(BackendUnavailable, match="the quota cannot be set"):
        create(make(quota_command=Path("/bin/false")), 64 * MIB)


def test_a_size_is_refused_or_advisory(server: NfsServer) -> None:
    assert "quota-command" in make().probe().lacking[Capability.SIZE]
    advisory = make(advisory_size=True)
    assert advisory.probe().lacking == {}
    handle = create(advisory, 64 * MIB)
    assert advisory.expand(handle, 128 * MIB) == 128 * MIB


# Mistakes, each by its name
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"server": "nonesuch.invalid"}, BackendUnavailable, "the name nonesuch.invalid cannot be resolved.*DNS"),
        ({"export": "/wrong"}, ConfigError, "the server does not export /wrong.*showmount"),
        ({"port": 2222}, BackendUnavailable, "no NFS server listens at 127.0.0.1, port 2222"),
        ({"server": "198.51.100.7"}, BackendUnavailable, "there is no route to 198.51.100.7"),
        ({"mount_options": "rubbish"}, MountFailed, "incorrect mount option"),
        ({"mount_options": "bind"}, MountFailed, "cannot take the option 'bind'"),
    ],
)
def test_mistakes_are_named(server: NfsServer, options: dict[str, Any], error: type, says: str) -> None:
    fields = {"server": "127.0.0.1", "export": "/plain", "timeout": 20, **options}
    with pytest.raises(error, match=says):
        NfsDriver("nas", NfsOptions.model_validate(fields), HOST).probe()


def test_a_squashed_root_is_explained(server: NfsServer) -> None:
    folder = TOP / "squashed"
    folder.mkdir(exist_ok=True)
    sh("mount", "-t", "tmpfs", "-o", "mode=755", "none", folder)  # an export of its own is a file system of its own
    server.export("squashed", "root_squash,fsid=5")
    driver = make("squashed", "squashed")
    with pytest.raises(PermissionDenied, match="does not let root write there.*root_squash.*no_root_squash"):
        driver.probe()
    os.chown(folder, 65534, 65534)
    assert driver.probe().facts["root"] == "squashed to uid 65534: owners of files cannot be set"
    driver.delete(create(driver))


# Failures
def test_a_silent_server_keeps_nobody_longer_than_asked(server: NfsServer, target: Path) -> None:
    """In the middle of everything; afterwards all is as if it had not been."""
    driver = make(timeout=3)
    mounted, unmounted, doomed = create(driver), create(driver), create(driver)
    driver.mount(mounted, target, options=(), readonly=False)
    (target / "file").write_text("kept")
    other = target.parent / "other"
    other.mkdir()
    with server.silent():
        for job in (
            lambda: create(driver),
            lambda: driver.mount(unmounted, other, options=(), readonly=False),
            lambda: driver.delete(doomed),
            lambda: driver.inspect(mounted),
            lambda: list(driver.list()),
            driver.capacity,
            driver.probe,
        ):
            with context.request(timeout=30.0), pytest.raises(VolumedError, match="127.0.0.1.*does not answer|handle"):
                job()
        assert driver.owns_mount(mounted, target)
        assert HOST.is_mountpoint(target)
        with pytest.raises(DeadlineExceeded):
            HOST.tree_status(target, timeout=2)
    wait_until(lambda: _answers(target), timeout=120)
    assert (target / "file").read_text() == "kept"
    assert not HOST.is_mountpoint(other)
    driver.mount(unmounted, other, options=(), readonly=False)
    driver.unmount(unmounted, other)
    driver.delete(doomed)
    driver.unmount(mounted, target)


def _answers(target: Path) -> bool:
    try:
        HOST.tree_status(target, timeout=5)
    except VolumedError:
        return False
    return True


def test_unmounting_from_a_silent_server_ends(server: NfsServer, target: Path) -> None:
    driver = make(timeout=3)
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    with server.silent():
        try:
            HOST.unmount_network(target, timeout=10)
        except DeadlineExceeded:
            HOST.unmount_network(target, timeout=10, force=True)
        assert not HOST.is_mountpoint(target)


def test_a_server_that_was_away_is_back_for_those_who_waited(server: NfsServer, target: Path) -> None:
    driver = make(timeout=5)
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    writer: threading.Thread
    with server.stopped():
        with pytest.raises((BackendUnavailable, DeadlineExceeded), match="no NFS server listens|does not answer"):
            create(make(backend="fresh", timeout=5))
        writer = threading.Thread(target=lambda: (target / "file").write_text("written while it was away"))
        writer.start()
        time.sleep(1)
        assert writer.is_alive()
    writer.join(120)
    assert (TOP / "plain" / handle / "data" / "file").read_text() == "written while it was away"
    driver.unmount(handle, target)


def test_forgotten_handles_are_renewed(server: NfsServer, target: Path) -> None:
    """The backend's own mount by itself; a volume's is told as what it is, and works when it is mounted anew."""
    driver = make()
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    (target / "file").write_text("kept")
    server.forget(TOP / "plain")
    assert [found.handle for found in driver.list()] == [handle]
    with pytest.raises(MountFailed) as failed:
        HOST.tree_status(target)
    assert failed.value.errno == errno.ESTALE
    assert driver.owns_mount(handle, target)
    HOST.unmount_network(target, force=True)
    driver.mount(handle, target, options=(), readonly=False)
    assert (target / "file").read_text() == "kept"
    driver.unmount(handle, target)


def test_a_volume_deleted_behind_our_back(server: NfsServer, target: Path) -> None:
    driver = make()
    handle = create(driver)
    sh("rm", "-rf", TOP / "plain" / handle)
    with pytest.raises(NotFound, match="is gone"):
        driver.inspect(handle)
    with pytest.raises(NotFound, match="its folder is gone"):
        driver.mount(handle, target, options=(), readonly=False)
    driver.delete(handle)


def test_a_volume_is_seen_at_once_by_another_node(server: NfsServer) -> None:
    here, there = make(), make(backend="other-node", mount_options="noatime")
    volume_id = new_volume_id()
    assert there.find(volume_id) is None
    spec = VolumeSpec(volume_id, None, VolumeMode.FILESYSTEM, here.VolumeOptions())
    here.create(spec)
    assert there.find(volume_id) is not None
    here.delete(Handle(volume_id))
    assert there.find(volume_id) is None


def test_options_of_a_volume_reach_the_kernel(server: NfsServer, target: Path) -> None:
    driver = make(mount_options="rsize=65536")
    handle = create(driver)
    driver.mount(handle, target, options=("noatime",), readonly=True)
    (entry,) = [entry for entry in HOST.mounts() if entry.target == target]
    assert {"ro", "noatime"} <= set(entry.options)
    assert {"rsize=65536", "hard", "vers=4.2"} <= set(entry.super_options)
    driver.unmount(handle, target)


def test_the_machine_goes_down(server: NfsServer) -> None:
    driver = make(backend="leaving")
    driver.probe()
    assert [entry for entry in HOST.mounts() if "backends/leaving" in str(entry.target)]
    driver.leave()
    assert not [entry for entry in HOST.mounts() if "backends/leaving" in str(entry.target)]
    assert mounts.file_type(Path("/run/volumed/backends/leaving"))


def test_a_process_that_holds_a_volume_is_named(server: NfsServer, target: Path) -> None:
    driver = make()
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    holder = subprocess.Popen(["sleep", "60"], cwd=target)
    with pytest.raises(InUse, match="is held by"):
        driver.unmount(handle, target)
    holder.kill()
    holder.wait()
    driver.unmount(handle, target)
