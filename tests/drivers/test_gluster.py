"""`gluster` on a real glusterd: its bricks, its client, its quota."""

from __future__ import annotations

import errno
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.harness.gluster import Gluster, running_gluster
from tests.harness.tree_drivers import create, mounted
from tests.harness.trees import not_held
from volumed.driver import Capability
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    MountFailed,
    NotFound,
    NotSupported,
    VolumedError,
)
from volumed.host.linux import LinuxHost
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.gluster import GlusterDriver, GlusterOptions

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


# Where glusterd mounts a volume to bound its folders has the volume's name, whoever's glusterd it is.
BOUNDED = f"bounded-{secrets.token_hex(3)}"


class Lab:
    """Drivers of one daemon, whose clients end with it."""

    def __init__(self, folder: Path, gluster: Gluster) -> None:
        self.gluster = gluster
        self.host = LinuxHost(folder)
        self.made: list[GlusterDriver] = []

    def make(self, volume: str = "files", backend: str = "glu", **options: Any) -> GlusterDriver:
        fields = {"servers": (self.gluster.address,), "volume": volume, "timeout": 20, **options}
        self.made.append(GlusterDriver(backend, GlusterOptions.model_validate(fields), self.host))
        return self.made[-1]

    def client(self) -> int:
        (helper,) = [helper for helper in self.host.helpers("gluster-glu-") if helper.running]
        return helper.pid


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("g")
    with running_gluster(folder / "server") as gluster:
        gluster.make_volume("files")
        gluster.make_volume(BOUNDED, quota=True)
        lab = Lab(folder / "run", gluster)
        yield lab
        for driver in lab.made:
            driver.leave()
        assert lab.host.helpers("") == []


@pytest.fixture(autouse=True)
def _nothing_between_tests(lab: Lab) -> Iterator[None]:
    yield
    for volume in ("files", BOUNDED):
        driver = lab.make(volume, backend=f"clean-{volume}")
        for found in list(driver.list()):
            driver.delete(found.handle)
        driver.leave()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "mounted"
    made.mkdir()
    return made


class TestGlusterDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self, lab: Lab) -> MakeDriver:
        return lab.make


def test_it_holds_what_it_says_and_no_more(lab: Lab, target: Path) -> None:
    driver = lab.make()
    driver.probe()
    with mounted(driver, create(driver), target) as tree:
        assert not_held(tree) == driver.cannot_hold - {"longest-paths"}


class TestGlusterDriverWithQuota(DriverConformance):
    @pytest.fixture
    def make_driver(self, lab: Lab) -> MakeDriver:
        command = lab.gluster.quota_command(BOUNDED)
        return lambda: lab.make(BOUNDED, "quota", quota_command=command)


def test_a_size_is_refused_without_a_quota(lab: Lab) -> None:
    driver = lab.make()
    assert "quota-command" in driver.probe().lacking[Capability.SIZE]
    with pytest.raises(NotSupported, match="a size cannot be enforced here"):
        create(driver, 64 * MIB)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"volume": "nonesuch"}, ConfigError, "knows no volume nonesuch.*gluster volume list"),
        ({"servers": ("nonesuch.invalid",)}, BackendUnavailable, "the name of nonesuch.invalid cannot be resolved"),
        ({"servers": ("127.0.0.9",)}, BackendUnavailable, "no glusterd listens at 127.0.0.9"),
    ],
)
def test_mistakes_are_named(lab: Lab, options: dict[str, Any], error: type, says: str) -> None:
    driver = lab.make(backend="wrong", **options)
    with pytest.raises(error, match=says):
        driver.probe()
    assert lab.host.helpers("gluster-wrong-") == []


def test_another_server_is_asked_when_the_first_is_away(lab: Lab) -> None:
    driver = lab.make(backend="backup", servers=("127.0.0.9", lab.gluster.address))
    assert driver.probe().facts["sizes"] == "refused"
    driver.leave()


def test_a_folder_below_the_volume(lab: Lab, target: Path) -> None:
    driver = lab.make(backend="below", path="a/b")
    handle = create(driver)
    assert (lab.gluster.folder / "bricks/files/a/b" / handle / "data").is_dir()
    driver.mount(handle, target, options=("noatime",), readonly=True)
    (entry,) = [entry for entry in lab.host.mounts() if entry.target == target]
    assert {"ro", "noatime"} <= set(entry.options)
    driver.unmount(handle, target)
    with pytest.raises(MountFailed, match="cannot take the option 'sync'"):
        driver.mount(handle, target, options=("sync",), readonly=False)
    driver.delete(handle)
    driver.leave()


def _error_of(lab: Lab, target: Path) -> int:
    try:
        lab.host.tree_status(target)
    except MountFailed as error:
        return error.errno
    return 0


def test_a_killed_client_is_seen_and_started_anew(lab: Lab, target: Path) -> None:
    driver = lab.make()
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    (target / "file").write_text("kept")
    os.kill(lab.client(), signal.SIGKILL)
    wait_until(lambda: not any(helper.running for helper in lab.host.helpers("gluster-glu-")))
    wait_until(lambda: _error_of(lab, target) == errno.ENOTCONN)  # ECONNABORTED for a moment
    assert driver.owns_mount(handle, target)
    for _ in ("before another client runs", "and after"):
        assert driver.needs_remount(handle, target, errno.ENOTCONN)
        driver.probe()
    lab.host.unmount_network(target, force=True)
    driver.mount(handle, target, options=(), readonly=False)
    assert (target / "file").read_text() == "kept"
    driver.unmount(handle, target)


def test_a_killed_brick_is_waited_for_by_the_client_that_all_hang_on(lab: Lab, target: Path) -> None:
    driver = lab.make(timeout=5)
    handle = create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    (target / "file").write_text("kept")
    client = lab.client()
    lab.gluster.kill_brick("files")
    wait_until(lambda: _fails(lab, target))
    with pytest.raises(BackendUnavailable, match="its bricks are away.*gluster volume status"):
        create(driver)
    with pytest.raises(BackendUnavailable):
        driver.probe()
    assert not driver.needs_remount(handle, target, errno.ENOTCONN)
    lab.gluster.revive_brick("files")
    wait_until(lambda: not _fails(lab, target), timeout=60)
    assert (target / "file").read_text() == "kept"
    assert lab.client() == client
    driver.unmount(handle, target)


def _fails(lab: Lab, target: Path) -> bool:
    try:
        lab.host.tree_status(target, timeout=5)
    except VolumedError:
        return True
    return False


def test_a_brick_that_hangs_keeps_nobody_longer_than_asked(lab: Lab, target: Path) -> None:
    driver = lab.make(timeout=3)
    handle, doomed = create(driver), create(driver)
    driver.mount(handle, target, options=(), readonly=False)
    other = target.parent / "other"
    other.mkdir()
    with lab.gluster.stopped("files"):
        for job in (
            lambda: create(driver),
            lambda: driver.mount(doomed, other, options=(), readonly=False),
            lambda: driver.delete(doomed),
            lambda: list(driver.list()),
            lambda: driver.inspect(handle),
        ):
            with pytest.raises(DeadlineExceeded, match="does not answer"):
                job()
    wait_until(lambda: not _fails(lab, target), timeout=60)
    driver.delete(doomed)
    assert not lab.host.is_mountpoint(other)
    driver.unmount(handle, target)


def test_clients_and_bricks_go_on_without_glusterd(lab: Lab, target: Path) -> None:
    driver = lab.make()
    handle = create(driver)
    lab.gluster.kill_server()
    try:
        driver.mount(handle, target, options=(), readonly=False)
        (target / "file").write_text("written without it")
        driver.unmount(handle, target)
        with pytest.raises(BackendUnavailable, match="no glusterd listens"):
            lab.make(backend="late").probe()
    finally:
        lab.gluster.start()
    lab.make(backend="late").probe()


def test_a_folder_that_is_gone(lab: Lab, target: Path) -> None:
    driver = lab.make()
    handle = create(driver)
    driver.delete(handle)
    with pytest.raises(NotFound, match="its folder is gone"):
        driver.mount(handle, target, options=(), readonly=False)
