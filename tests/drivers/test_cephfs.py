"""`cephfs` on a real cluster, mounted by ceph-fuse (the kernel's client: tests/vm)."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.drivers.conftest import CEPH_PATIENCE
from tests.harness.ceph import FILESYSTEM, Ceph
from tests.harness.tree_drivers import client_pid, create, mounted, nothing_left
from tests.harness.trees import not_held
from tests.migration import trees
from volumed.driver import Driver, VolumeSpec
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    MountFailed,
    NotFound,
    PermissionDenied,
)
from volumed.host import helpers
from volumed.host.linux import LinuxHost
from volumed.host.run import ENVIRONMENT
from volumed.model import Handle, VolumeMode, new_snapshot_id, new_volume_id
from volumed.testing import crash
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.cephfs import CephFsDriver, CephFsOptions
from volumed_drivers.cephfs_volumes import State, Subvolume

pytestmark = pytest.mark.root

MakeCephFs = Callable[..., CephFsDriver]


@pytest.fixture(scope="module")
def key(ceph: Ceph) -> Path:
    """Of a user with the least that it takes: as in the README."""
    ceph.start_filesystem()
    return ceph.make_files_user()


@pytest.fixture
def make_cephfs(ceph: Ceph, key: Path) -> Iterator[MakeCephFs]:
    """Drivers of this test's own subvolume group."""
    made: list[CephFsDriver] = []
    group = f"t{secrets.token_hex(4)}"

    def make(**options: object) -> CephFsDriver:
        values = {"filesystem": FILESYSTEM, "group": group, "conf": ceph.conf, "user": "files", "key": f"file:{key}"}
        options = {"timeout": CEPH_PATIENCE, **options}
        driver = CephFsDriver("files", CephFsOptions.model_validate({**values, **options}), LinuxHost())
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver._cluster.close()


class TestConformance(DriverConformance):
    @pytest.fixture
    def make_driver(self, make_cephfs: MakeCephFs) -> MakeDriver:
        return make_cephfs

    def make_stranger(self, driver: Driver, name: str) -> None:
        """A subvolume that somebody made by hand, on a mount of his own."""
        assert isinstance(driver, CephFsDriver)
        driver._volumes.create(name, None)
        with tempfile.TemporaryDirectory() as folder, mounted(driver, Handle(name), Path(folder)) as tree:
            (tree / "file").write_bytes(b"old")


@pytest.fixture
def driver(make_cephfs: MakeCephFs) -> CephFsDriver:
    made = make_cephfs()
    made.probe()
    return made


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left("cephfs"):
        yield


def test_it_holds_what_it_says_and_no_more(driver: CephFsDriver, tmp_path: Path) -> None:
    with mounted(driver, create(driver), tmp_path / "at") as tree:
        assert not_held(tree) == driver.cannot_hold


def test_a_full_volume_takes_more_once_it_has_grown(driver: CephFsDriver, tmp_path: Path) -> None:
    handle = create(driver, 8 * MIB)
    with mounted(driver, handle, tmp_path / "at") as tree:
        with pytest.raises(OSError) as full:
            (tree / "large").write_bytes(bytes(64 * MIB))
        assert full.value.errno == errno.EDQUOT
        (tree / "large").unlink()
        assert driver.expand(handle, 128 * MIB) == 128 * MIB
        (tree / "large").write_bytes(bytes(64 * MIB))
        assert driver.host.tree_status(tree).total == 128 * MIB


def test_no_container_lifts_its_own_quota(driver: CephFsDriver, tmp_path: Path) -> None:
    with mounted(driver, create(driver, 8 * MIB), tmp_path / "at") as tree, pytest.raises(PermissionError):
        os.setxattr(tree, "ceph.quota.max_bytes", b"0")


def test_nodes_see_one_another_at_once(driver: CephFsDriver, tmp_path: Path) -> None:
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "one") as one, mounted(driver, handle, tmp_path / "other") as other:
        (one / "file").write_text("from one")
        assert (other / "file").read_text() == "from one"
        with (one / "file").open("r+") as mine, (other / "file").open("r+") as yours:
            fcntl.flock(mine, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError):
                fcntl.flock(yours, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_mount_that_reads_only(driver: CephFsDriver, tmp_path: Path) -> None:
    handle = create(driver)
    (tmp_path / "at").mkdir()
    driver.mount(handle, tmp_path / "at", options=("noexec",), readonly=True)
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "at" / "file").touch()
    driver.unmount(handle, tmp_path / "at")
    with pytest.raises(MountFailed, match="cannot take the option 'keyring=x'"):
        driver.mount(handle, tmp_path / "at", options=("keyring=x",), readonly=False)


def test_the_key_is_in_no_command_line_environment_or_file(driver: CephFsDriver, key: Path, tmp_path: Path) -> None:
    secret = key.read_text().strip()
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at"):
        for name in ("cmdline", "environ"):
            assert secret.encode() not in Path(f"/proc/{client_pid(driver, 'cephfs', handle)}/{name}").read_bytes()
        assert subprocess.run(["grep", "-rqsF", secret, "/run/volumed"], check=False).returncode == 1


def test_a_wrong_key_is_named_and_not_shown(make_cephfs: MakeCephFs, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("AQBAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==")
    wrong.chmod(0o600)
    with pytest.raises(PermissionDenied, match=r"client\.files") as refused:
        make_cephfs(key=f"file:{wrong}").probe()
    assert "AQBAAA" not in str(refused.value)


def test_a_file_system_that_is_not_there_is_named(make_cephfs: MakeCephFs) -> None:
    with pytest.raises(BackendUnavailable, match=f"no CephFS nowhere. there are: {FILESYSTEM}"):
        make_cephfs(filesystem="nowhere").probe()


def test_the_kernel_is_refused_where_it_cannot(make_cephfs: MakeCephFs) -> None:
    with pytest.raises(ConfigError, match="this kernel has no module ceph"):
        make_cephfs(**{"mount-with": "kernel"}).probe()
    assert make_cephfs().probe().facts["not kernel"] == "this kernel has no module ceph"


def test_a_subvolume_removed_behind_our_back_is_not_found(driver: CephFsDriver, tmp_path: Path) -> None:
    handle = create(driver)
    driver._volumes.remove(handle)
    (tmp_path / "at").mkdir()
    with pytest.raises(NotFound, match="is gone. put it back from a backup"):
        driver.mount(handle, tmp_path / "at", options=(), readonly=False)
    driver.delete(handle)


def test_a_copy_that_was_never_finished_leaves_nothing_on_its_source(
    driver: CephFsDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = create(driver)
    spec = VolumeSpec(new_volume_id(), None, VolumeMode.FILESYSTEM, driver.VolumeOptions())

    def kill(name: str) -> None:
        if name == "cephfs.copy.begun":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(crash, "point", kill)
        driver.clone(source, spec)
    left = driver.find(spec.id)
    assert left is not None
    driver.delete(left)
    assert driver.find(spec.id) is None
    assert driver._volumes.snapshots(source) == []
    driver.delete(source)


@pytest.mark.parametrize("point", ["cephfs.restore.removed", "cephfs.restore.filled"])
def test_one_that_was_imported_is_put_back_in_spite_of_a_crash(
    driver: CephFsDriver, make_cephfs: MakeCephFs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    """Its name is not its id, and a subvolume that has snapshots alone tells nobody its id: nobody can have it even so,
    and filled again it tells."""
    TestConformance().make_stranger(driver, "theirs")
    spec = VolumeSpec(new_volume_id(), 32 * MIB, VolumeMode.FILESYSTEM, driver.VolumeOptions(), {"name": "data"})
    handle = driver.adopt("theirs", spec).handle
    with pytest.raises(AlreadyExists, match=f"subvolume {driver._options.group}/theirs: is volume {spec.id} already"):
        driver.adopt("theirs", spec._replace(id=new_volume_id()))
    snapshot = driver.snapshot(handle, new_snapshot_id())
    with mounted(driver, handle, tmp_path / "at") as tree:
        (tree / "file").write_bytes(b"new")

    def kill(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(crash, "point", kill)
        driver.restore(handle, snapshot)
    again = make_cephfs()
    assert list(again.importable()) == []
    if point == "cephfs.restore.filled":
        assert [(found.volume_id, found.whole) for found in again.list()] == [(spec.id, False)]
        assert [found.handle for found in again.list_snapshots()] == [snapshot]
        with pytest.raises(AlreadyExists, match=f"theirs: is volume {spec.id} already"):
            again.adopt("theirs", spec._replace(id=new_volume_id()))
    again.restore(handle, snapshot)
    assert [(found.volume_id, found.mark) for found in again.list()] == [(spec.id, {"name": "data"})]
    assert again.find(spec.id) == handle
    assert again.inspect(handle).size == 32 * MIB
    with mounted(again, handle, tmp_path / "at") as tree:
        assert (tree / "file").read_bytes() == b"old"
    again.delete_snapshot(snapshot)
    again.delete(handle)


def test_one_that_is_being_filled_stands_in_nobodys_way(
    ceph: Ceph, driver: CephFsDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager tells nothing of its snapshots meanwhile."""
    handle, other = create(driver), create(driver)
    snapshots = [driver.snapshot(each, new_snapshot_id()) for each in (handle, other)]
    ceph.ceph("config", "set", "mgr", "mgr/volumes/snapshot_clone_delay", "5")

    def kill(name: str) -> None:
        if name == "cephfs.restore.begun":
            raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(crash, "point", kill)
            driver.restore(handle, snapshots[0])
        assert snapshots[1] in [found.handle for found in driver.list_snapshots()]
        driver.delete_snapshot(snapshots[1])
        driver.delete(other)
        assert [(found.handle, found.whole) for found in driver.list()] == [(handle, False)]
    finally:
        ceph.ceph("config", "rm", "mgr", "mgr/volumes/snapshot_clone_delay")
    driver.restore(handle, snapshots[0])
    driver._volumes._ask_of("metadata rm", handle, key_name="volumed")
    with pytest.raises(BackendError, match="nothing tells what subvolume v.* is for, so it is left as it is"):
        driver.restore(handle, snapshots[0])  # it could be the state that is wanted, or not
    driver.delete_snapshot(snapshots[0])


def test_what_is_nobodys_volume_is_not_deleted(driver: CephFsDriver) -> None:
    driver._volumes.create("theirs", None)
    with pytest.raises(NotFound, match="theirs is not ours"):
        driver.delete(Handle("theirs"))
    assert list(driver.importable()) == ["theirs"]


def make_old(group: Path, name: str, *, layout: bool) -> None:
    """A subvolume as Ceph 14 made it, with a snapshot; without its layout the manager fails to tell of it."""
    tree = group / name / str(uuid.uuid4())
    tree.mkdir(parents=True)
    path = f"/volumes/{group.name}/{name}/{tree.name}"
    (group / name / ".meta").write_text(f"[GLOBAL]\nversion = 1\ntype = subvolume\npath = {path}\nstate = complete\n\n")
    os.setxattr(tree, "ceph.dir.subvolume", b"1")
    if layout:
        os.setxattr(tree, "ceph.dir.layout.pool", b"files-data")
    (tree / ".snap" / "theirs").mkdir()


def test_one_of_an_old_format_is_not_imported_before_it_has_the_new_one(
    ceph: Ceph, driver: CephFsDriver, make_cephfs: MakeCephFs, tmp_path: Path
) -> None:
    """And one that is broken hides no other."""
    admin = make_cephfs(user="admin", key=f"file:{ceph.folder}/client.admin.keyring")
    group = tmp_path / driver._options.group
    group.mkdir()
    admin._mount(Handle("group"), Subvolume(State.COMPLETE, f"/volumes/{group.name}"), group)
    try:
        make_old(group, "old", layout=True)
        make_old(group, "broken", layout=False)
    finally:
        admin.unmount(Handle("group"), group)
    spec = VolumeSpec(new_volume_id(), None, VolumeMode.FILESYSTEM, driver.VolumeOptions())
    assert (list(driver.list()), list(driver.importable())) == ([], [])
    with pytest.raises(InvalidRequest, match=f"{group.name}/old: is of an old format.*. import a clone of it"):
        driver.adopt("old", spec)
    driver._volumes.remove_snapshot("old", "theirs")
    assert list(driver.importable()) == ["old"]
    handle = driver.adopt("old", spec).handle
    snapshot = driver.snapshot(handle, new_snapshot_id())
    driver.restore(handle, snapshot)
    driver.delete_snapshot(snapshot)


# Clients and servers that fail
def test_a_client_that_died_is_seen_and_replaced(driver: CephFsDriver, tmp_path: Path) -> None:
    handle, target = create(driver), tmp_path / "at"
    with mounted(driver, handle, target) as tree:
        with (tree / "file").open("w") as file:
            file.write("kept")
            file.flush()
            os.fsync(file.fileno())
        os.kill(client_pid(driver, "cephfs", handle), signal.SIGKILL)
        wait_until(lambda: error_of(target) == errno.ENOTCONN)
        assert driver.owns_mount(handle, target)
        driver.unmount(handle, target)
        driver.mount(handle, target, options=(), readonly=False)
        assert (tree / "file").read_text() == "kept"


def test_a_client_that_cannot_remount_what_is_gone_writes_all_it_holds(
    driver: CephFsDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ceph-fuse runs mount(8) to remount its mount as soon as it has it: here the volume is unmounted before that, as
    on a busy machine. It used to abort after five tries, with or without having written by then."""
    late = tmp_path / "bin" / "mount"
    late.parent.mkdir()
    late.write_text(f'#!/bin/sh\nwhile mountpoint -q {tmp_path}/at; do sleep 0.01; done; exec /usr/bin/mount "$@"\n')
    late.chmod(0o755)
    slow = {**ENVIRONMENT, "PATH": f"{late.parent}:{ENVIRONMENT['PATH']}"}
    monkeypatch.setattr(helpers, "ENVIRONMENT", slow)
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        (tree / "file").write_bytes(b"written")
    assert "fuse finished with error 0 and tester_r 32" in caplog.text
    with mounted(driver, handle, tmp_path / "at") as tree:
        assert (tree / "file").read_bytes() == b"written"


def error_of(target: Path) -> int:
    try:
        LinuxHost().tree_status(target)
    except MountFailed as error:
        return error.errno
    return 0


def test_a_manager_that_hangs_ends_calls_and_keeps_mounts(ceph: Ceph, make_cephfs: MakeCephFs, tmp_path: Path) -> None:
    driver = make_cephfs(timeout=5)
    driver.probe()
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        ceph.hang("mgr.x")
        try:
            for call in (lambda: create(driver), lambda: driver.inspect(handle), lambda: driver.delete(handle)):
                with pytest.raises(BackendError, match="did not answer"):
                    call()
            (tree / "file").write_text("goes on")
        finally:
            ceph.resume("mgr.x")
        assert (tree / "file").read_text() == "goes on"
    wait_until(lambda: answers(driver), timeout=90)


def answers(driver: CephFsDriver) -> bool:
    try:
        driver.probe()
    except BackendError:
        return False
    return True


def test_a_metadata_server_that_hangs_ends_a_mount_and_leaves_nothing(
    ceph: Ceph, make_cephfs: MakeCephFs, tmp_path: Path
) -> None:
    driver = make_cephfs(timeout=5)
    driver.probe()
    handle = create(driver)
    (tmp_path / "at").mkdir()
    found = driver._volumes.look(handle)
    ceph.hang("mds.a")
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(driver._volumes, "look", lambda _: found)
            with pytest.raises((MountFailed, DeadlineExceeded), match="backend files: .*(imed out|no answer)"):
                driver.mount(handle, tmp_path / "at", options=(), readonly=False)
        assert not driver.host.is_mountpoint(tmp_path / "at")
    finally:
        ceph.resume("mds.a")
    wait_until(lambda: serves(ceph), timeout=90)


def serves(ceph: Ceph) -> bool:
    """One that lay still for longer than the monitor's patience is `up:active(laggy or crashed)`, and no client mounts
    before it is told otherwise."""
    stat = ceph.ceph("mds", "stat")
    return "up:active" in stat and "laggy" not in stat


def test_what_was_written_before_the_servers_hung_is_written_when_they_are_back(
    ceph: Ceph, driver: CephFsDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client that is still writing is left to it, and the next mount waits for it."""
    monkeypatch.setattr("volumed_drivers.cephfs.FINISH_TIMEOUT", 2.0)
    handle, target = create(driver), tmp_path / "at"
    target.mkdir()
    driver.mount(handle, target, options=(), readonly=False)
    (target / "file").write_text("written")
    ceph.hang("osd.0")
    try:
        with pytest.raises(DeadlineExceeded, match="has not written everything yet"):
            driver.unmount(handle, target)
        assert not driver.host.is_mountpoint(target)
    finally:
        ceph.resume("osd.0")
    monkeypatch.setattr("volumed_drivers.cephfs.FINISH_TIMEOUT", 60.0)
    with mounted(driver, handle, target) as tree:
        assert (tree / "file").read_text() == "written"


# Copies
def test_what_the_manager_does_not_copy_is_copied_too(driver: CephFsDriver, tmp_path: Path) -> None:
    """By a clone, from a snapshot and back to one."""
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        trees.make_everything(tree, without=driver.cannot_hold)
        then = trees.picture(tree)
    snapshot = driver.snapshot(handle, new_snapshot_id())
    spec = VolumeSpec(new_volume_id(), None, VolumeMode.FILESYSTEM, driver.VolumeOptions())
    made = [driver.clone(handle, spec).handle]
    made.append(driver.create_from_snapshot(snapshot, spec._replace(id=new_volume_id())).handle)
    with mounted(driver, handle, tmp_path / "at") as tree:
        (tree / "plain").unlink()
    driver.restore(handle, snapshot)
    later = driver.snapshot(handle, new_snapshot_id())  # of what was put back once already
    made.append(driver.create_from_snapshot(later, spec._replace(id=new_volume_id())).handle)
    for copy in (*made, handle):
        with mounted(driver, copy, tmp_path / "at") as tree:
            assert trees.picture(tree) == then
    driver.delete_snapshot(snapshot)
    driver.delete_snapshot(later)
