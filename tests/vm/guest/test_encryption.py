"""Runs inside the machine, whose kernel has device-mapper: encrypted volumes, and kill -9 at every step of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.crash.killing import crash_points
from volumed.config import Settings, parse
from volumed.core.core import Core, ledger_path
from volumed.core.drivers import DriverInfo, DriverRegistry
from volumed.core.planning import CreateVolume
from volumed.core.publications import Usage
from volumed.errors import AlreadyExists, ConfigError, IntegrityError, InvalidRequest, PermissionDenied
from volumed.host.linux import LinuxHost
from volumed.model import AccessMode, Consumer, Engine, Volume, VolumeMode
from volumed.store.sqlite import SqliteStore
from volumed.testing import crash
from volumed.units import MIB
from volumed_drivers.image import ImageDriver

pytestmark = pytest.mark.timeout(1500)  # the machine is emulated, and cryptsetup computes

OLD, NEW = "the-key-of-before-0123456789-0123456789", "the-key-of-today-9876543210-9876543210"
SECRET = b"nobody may read this on the storage"
DOCKER = Engine.DOCKER


class Daemon:
    """All of volumed but its sockets, over one folder; Python starts slowly in this machine, so it is not started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, key in (("old", OLD), ("new", NEW)):
            (folder / name).write_text(f"{key}\n")
        tell = folder / "tell"
        tell.write_text("#!/bin/sh\necho key-of-$1\n")
        tell.chmod(0o700)
        self.start()

    def settings(self, newest: str) -> Settings:
        text = f"""
state-dir = "{self.folder}/state"
node = "node-1"
[csi]
target-roots = ["{self.folder}"]
[keys.main]
key = "file:{self.folder}/{newest}"
old = ["file:{self.folder}/old"]
[keys.told]
command = ["{self.folder}/tell", "{{id}}"]
[backends.safe]
driver = "image"
path = "{self.folder}/images"
encrypt = "main"
"""
        return parse(text, source="volumed.toml")

    def start(self, *, newest: str = "new") -> None:
        settings = self.settings(newest)
        (self.folder / "state").mkdir(exist_ok=True)
        self._store = SqliteStore(ledger_path(settings))
        drivers = DriverRegistry([DriverInfo(name="image", distribution="tests", load=lambda: ImageDriver)])
        self.core = Core(settings=settings, store=self._store, host=LinuxHost(), drivers=drivers)
        self.core.recover()

    def stop(self) -> None:
        self.core.stop()
        self._store.close()

    def restart(self, *, newest: str = "new") -> None:
        self.stop()
        self.start(newest=newest)

    def create(self, name: str = "data", *, size: int | None = 64 * MIB, **more: object) -> Volume:
        return self.core.volumes.create(CreateVolume(name=name, size=size, **more))  # type: ignore[arg-type]

    def volume(self, name: str = "data") -> Volume:
        return self.core.volumes.get(name)

    def mount(self, name: str = "data") -> Path:
        return self.core.mounts.acquire(self.volume(name), engine=DOCKER, mount_id="id-1")

    def unmount(self, name: str = "data") -> None:
        self.core.mounts.release(self.volume(name), engine=DOCKER, mount_id="id-1")
        assert not self.node(name).exists()

    def check(self, name: str = "data", content: bytes = SECRET) -> None:
        assert (self.mount(name) / "file").read_bytes() == content
        self.unmount(name)

    def image(self, name: str = "data") -> Path:
        return self.folder / "images" / f"{self.volume(name).id}.img"

    def node(self, name: str = "data") -> Path:
        return Path(f"/dev/mapper/volumed-{self.volume(name).id}-crypt")

    def assert_nothing_left(self) -> None:
        assert opened() == []
        assert list((self.folder / "images").iterdir()) == []
        assert self.core.repository.volumes() == []
        assert self.core.repository.operations() == []
        assert self.core.doctor.examine() == []


def opened() -> list[Path]:
    return list(Path("/dev/mapper").glob("volumed-*"))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    try:
        yield made
    finally:
        made.stop()
        for path in (tmp_path / "state" / "mounts").iterdir():
            sh("sh", "-c", f"umount {path} 2>/dev/null || true")
        for node in opened():
            sh("cryptsetup", "close", node.name)
        sh("sh", "-c", f"losetup -n -O NAME,BACK-FILE | grep {tmp_path} | while read d f; do losetup -d $d; done; true")


def opens(image: Path, key: str) -> bool:
    file = image.parent.parent / "tried"
    file.write_text(key)
    done = LinuxHost().run(
        ["cryptsetup", "open", "--test-passphrase", f"--key-file={file}", image], check=False, timeout=60
    )
    assert done.returncode in (0, 2), done
    return done.returncode == 0


def size_of(device: Path) -> int:
    return int(sh("blockdev", "--getsize64", device))


def test_a_whole_life(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    made = daemon.create()
    assert (made.encryption, made.size) == ("main", 64 * MIB)
    path = daemon.mount()
    (path / "file").write_bytes(SECRET)
    sh("sync", "-f", path)
    assert size_of(daemon.node()) == 64 * MIB  # a promise: the header is beside it
    assert SECRET not in daemon.image().read_bytes()
    daemon.restart()
    assert (path / "file").read_bytes() == SECRET
    assert daemon.core.doctor.examine() == []
    # In use, then not.
    daemon.core.volumes.expand("data", 96 * MIB)
    assert size_of(daemon.node()) == 96 * MIB
    daemon.unmount()
    assert daemon.core.volumes.expand("data", 112 * MIB).size == 112 * MIB
    daemon.check()
    daemon.core.snapshots.create("data", "then")
    (daemon.mount() / "file").write_bytes(b"later")
    daemon.unmount()
    daemon.core.snapshots.restore("data", "then")
    daemon.check()
    daemon.core.snapshots.remove("data", "then")
    daemon.core.volumes.remove("data")
    daemon.assert_nothing_left()
    assert "luksFormat" in caplog.text  # the log has the commands, so it would have a key that is one of their words
    assert NEW not in caplog.text


def test_copies_have_keys_of_their_own(daemon: Daemon) -> None:
    daemon.create(encryption="told")
    (daemon.mount() / "file").write_bytes(SECRET)
    daemon.unmount()
    daemon.core.snapshots.create("data", "then")
    daemon.create("copy", size=None, source="data")
    daemon.create("older", size=None, source="data@then", encryption="main")
    keys = {name: f"key-of-{daemon.volume(name).id}" for name in ("data", "copy")} | {"older": NEW}
    for name, key in keys.items():
        daemon.check(name)
        assert opens(daemon.image(name), key)
        assert not any(opens(daemon.image(name), other) for other in keys.values() if other != key)
    with pytest.raises(AlreadyExists, match="another encrypt"):
        daemon.create(size=None, encryption="main")


def test_a_new_key_in_the_settings(daemon: Daemon) -> None:
    """Opened by the old one until it is rotated; a snapshot of before comes back with the old one, and is rekeyed."""
    daemon.restart(newest="old")
    daemon.create()
    (daemon.mount() / "file").write_bytes(SECRET)
    daemon.unmount()
    daemon.core.snapshots.create("data", "then")
    image = daemon.image()
    assert (opens(image, OLD), opens(image, NEW)) == (True, False)
    daemon.restart()
    path = daemon.mount()
    daemon.core.volumes.expand("data", 80 * MIB)  # the kernel is told the key that the header has
    daemon.core.volumes.rotate("data")
    assert (opens(image, OLD), opens(image, NEW)) == (False, True)
    assert (path / "file").read_bytes() == SECRET
    daemon.unmount()
    daemon.core.volumes.rotate("data")
    daemon.core.snapshots.restore("data", "then")
    assert (opens(image, OLD), opens(image, NEW)) == (False, True)
    daemon.check()


def test_wrong_keys_and_headers_are_said(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    daemon.create()
    with pytest.raises(InvalidRequest, match="there is no key 'mian'. did you mean 'main'"):
        daemon.create("other", encryption="mian")
    (daemon.folder / "new").write_text("of-somebody-else-altogether")
    with pytest.raises(PermissionDenied, match="no key of the name 'main' opens it") as refused:
        daemon.mount()
    assert "somebody-else" not in str(refused.value) + caplog.text
    (daemon.folder / "new").unlink()
    with pytest.raises(ConfigError, match="/new cannot be read"):
        daemon.mount()
    (daemon.folder / "new").write_text(NEW)
    with daemon.image().open("r+b") as image:
        image.write(bytes(MIB))
        os.fsync(image)
    with pytest.raises(IntegrityError, match="no LUKS header"):
        daemon.mount()
    assert opened() == []
    assert sh("losetup", "-n", "-O", "BACK-FILE").count("images") == 0


def test_a_raw_device(daemon: Daemon) -> None:
    volume = daemon.create(size=32 * MIB, mode=VolumeMode.BLOCK)
    usage = Usage(access=AccessMode.SINGLE_NODE_WRITER, block=True)
    staging, target = daemon.folder / "staging", daemon.folder / "target"
    publications = daemon.core.publications
    publications.stage(volume, str(staging), usage, engine=Engine.CSI)
    publications.publish(
        volume, str(target), usage, engine=Engine.CSI, consumer=Consumer(id="pod"), staged_at=str(staging)
    )
    assert size_of(target) == 32 * MIB
    with target.open("r+b", buffering=0) as device:
        device.write(SECRET.ljust(4096))
        os.fsync(device)
    assert SECRET not in daemon.image().read_bytes()
    publications.unpublish(volume.id, str(target))
    publications.unstage(volume.id, str(staging))
    daemon.core.volumes.remove("data")
    daemon.assert_nothing_left()


def test_the_doctor_closes_what_is_open_for_no_volume(daemon: Daemon) -> None:
    stray, key = daemon.folder / "stray", daemon.folder / "new"
    stray.write_bytes(bytes(32 * MIB))
    sh("cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--iter-time", "10", stray, key)
    name = f"volumed-v{'0' * 32}-crypt"
    sh("cryptsetup", "open", f"--key-file={key}", stray, name)
    (finding,) = daemon.core.doctor.examine()
    assert (finding.kind, finding.subject) == ("orphan-device", f"/dev/mapper/{name}")
    daemon.core.doctor.fix()
    assert opened() == []


def test_the_ledger_is_rebuilt(daemon: Daemon) -> None:
    made = daemon.create()
    (daemon.mount() / "file").write_bytes(SECRET)
    daemon.unmount()
    with daemon.core.repository.transaction() as transaction:
        transaction.delete(daemon.volume())
    daemon.core.imports.rebuild(dry_run=False)
    back = daemon.volume()
    assert (back.id, back.size, back.encryption) == (made.id, made.size, "main")
    daemon.check()


# kill -9
def killed_at(point: str, job: Callable[[], object]) -> bool:
    """Whether a process that did the job was killed at the point."""
    child = os.fork()
    if child == 0:
        crash._name, crash._left = point, 1
        try:
            job()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    "point", [point for point in crash_points() if point.partition(".")[0] in ("encryption", "rotate")]
)
def test_killed_at(daemon: Daemon, point: str) -> None:
    """In a process of its own, with threads of its own; the daemon starts anew after it."""

    def create() -> None:
        daemon.start()
        daemon.create()

    def rotate() -> None:
        daemon.start()
        daemon.core.volumes.rotate("data")

    daemon.stop()
    killed = killed_at(point, create)
    daemon.start()
    wait_until(lambda: opened() == [] and daemon.core.repository.operations() == [])
    assert daemon.core.doctor.examine() == []
    if killed:
        assert daemon.core.repository.volumes() == []
        daemon.create()
    (daemon.mount() / "file").write_bytes(SECRET)
    daemon.unmount()
    make_old(daemon)
    daemon.stop()
    killed = killed_at(point, rotate) or killed
    assert killed, f"{point} was not passed"
    daemon.start()
    wait_until(lambda: daemon.core.repository.operations() == [])
    assert opened() == []
    daemon.core.volumes.rotate("data")
    assert (opens(daemon.image(), OLD), opens(daemon.image(), NEW)) == (False, True)
    daemon.check()
    daemon.core.volumes.remove("data")
    daemon.assert_nothing_left()


def make_old(daemon: Daemon) -> None:
    """As one that has the key of before."""
    quick = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    old, new = daemon.folder / "plain-old", daemon.folder / "plain-new"
    old.write_text(OLD)
    new.write_text(NEW)
    sh("cryptsetup", "luksAddKey", *quick, f"--key-file={new}", daemon.image(), old)
    sh("cryptsetup", "luksRemoveKey", "-q", daemon.image(), new)
