"""Runs inside the machine, whose kernel has device-mapper: volumes that move while they are written to, and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.vm.guest.daemon import PATIENCE, Daemon
from tests.vm.guest.writer import lost
from volumed.core.publications import Usage
from volumed.errors import NotSupported
from volumed.host import mapper
from volumed.host.allocation import data_extents
from volumed.host.linux import LinuxHost
from volumed.migration.movers.mover import Control
from volumed.migration.planner import Wish
from volumed.migration.verification import Outcome
from volumed.model import AccessMode, Consumer, Engine, MigrationPhase, MovePath, VolumeMode
from volumed.testing import crash
from volumed.units import MIB

pytestmark = pytest.mark.timeout(900)

DISK = os.environ.get("VOLUMED_DISK", "")
DOCKER = Engine.DOCKER
SIZE = 32 * MIB


BACKENDS = """
[csi]
target-roots = ["{folder}"]
[keys.main]
key = "file:{folder}/key"
[backends.one]
driver = "image"
path = "{folder}/one"
[backends.two]
driver = "image"
path = "{folder}/two"
[backends.thin]
driver = "lvm"
vg = "vg0"
thinpool = "pool"
"""


class Live(Daemon):
    def __init__(self, folder: Path, *, more: str = "") -> None:
        (folder / "key").write_text("a-key-that-nobody-guesses-0123456789\n")
        super().__init__(folder, backends=BACKENDS.format(folder=folder), more=more)

    def node(self) -> Path:
        return Path(f"/dev/mapper/volumed-{self.volume().id}")

    def table(self) -> list[str]:
        return mapper.table(LinuxHost(), self.node().name).split()[2:]

    def assert_on(self, backend: str) -> None:
        """In use, and there alone."""
        assert self.volume().backend == backend
        (number,) = mapper.legs(self.node().name)
        assert self.table() == ["linear", number, "0"]
        assert self.core.doctor.examine() == []

    def assert_whole(self, told: int, file: str = "file") -> None:
        """Nothing that was told to be written is missing from what the storage has."""
        self.unmount()
        assert not self.node().exists()
        assert lost(self.mount() / file, told) == []
        self.unmount()


class Writer:
    """A container's stand-in: it writes without end and is never asked to hold still."""

    def __init__(self, data: Path, told: Path) -> None:
        self._told = told
        script = Path(__file__).with_name("writer.py")
        self._process = subprocess.Popen([sys.executable, script, data, told])
        self.wait_for_more(10)

    def told(self) -> tuple[int, float]:
        words = self._told.read_text().split() if self._told.exists() else []
        return (int(words[0]), float(words[1])) if len(words) == 2 else (0, 0.0)

    def wait_for_more(self, count: int = 5) -> None:
        """It goes on."""
        before = self.told()[0]
        wait_until(lambda: self.told()[0] >= before + count, timeout=PATIENCE)
        assert self._process.poll() is None

    def stop(self) -> int:
        """How many records it was told to have written."""
        assert self._process.poll() is None, "an error ended it"
        self._process.kill()
        self._process.wait(60)
        number, longest = self.told()
        print(f"{number} records, the longest took {longest * 1000:.0f} ms")
        return number

    def end(self) -> None:
        self._process.kill()
        self._process.wait(60)


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    Path("/etc/lvm/lvmlocal.conf").write_text("backup { backup=0 archive=0 }\nactivation { monitoring=0 }\n")
    sh("vgcreate", "-q", "vg0", DISK)
    sh("lvcreate", "-q", "--type", "thin-pool", "-L", "512m", "-n", "pool", "vg0")
    yield
    sh("vgremove", "-ff", "-y", "-q", "vg0")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Live]:
    made = Live(tmp_path)
    try:
        yield made
    finally:
        made.stop()
        sh("sh", "-c", f"for path in {tmp_path}/state/mounts/* {tmp_path}/target; do umount $path; done 2>&1; true")
        sh("sh", "-c", "for name in $(dmsetup ls | grep -o '^volumed-v[0-9a-f-]*crypt\\|^volumed-v[0-9a-f]*' | sort);"
           "do dmsetup remove --retry $name; done 2>&1; true")  # fmt: skip
        sh("sh", "-c", f"losetup -n -O NAME,BACK-FILE | grep {tmp_path} | while read d f; do losetup -d $d; done; true")
        sh("sh", "-c", "lvremove -ff -y -q @volumed 2>&1; true")


@pytest.fixture
def writing(daemon: Live) -> Iterator[Writer]:
    """A volume on `one` that is mounted and written to."""
    daemon.create("one", size=SIZE)
    writer = Writer(daemon.mount() / "file", daemon.folder / "told")
    yield writer
    writer.end()


def test_a_move_under_its_writer(daemon: Live, writing: Writer) -> None:
    known = data_extents(daemon.node())  # of the image below
    assert known
    assert sum(extent.length for extent in known) < SIZE
    plan = daemon.migrations.plan("data", Wish(backend="two"))
    assert (plan.path, plan.carrier, plan.pause) == (MovePath.LIVE, MovePath.BLOCK, 0.0)
    moved = daemon.move("two")
    assert (moved.phase, moved.path, len(moved.digest)) == (MigrationPhase.KEPT, MovePath.LIVE, 64), moved.error
    print(f"the swap took {moved.pause} s")
    writing.wait_for_more()
    daemon.assert_on("two")
    (leg,) = mapper.legs(daemon.node().name)
    assert "/two/" in sh("losetup", "-n", "-O", "MAJ:MIN,BACK-FILE").split(leg)[1].split()[0]
    daemon.assert_whole(writing.stop())
    image = next((daemon.folder / "two").glob("*.img"))
    sh("e2fsck", "-fn", image)
    outcomes = [found.outcome for found in daemon.migrations.verifications.run("data", Control()).comparisons]
    assert outcomes == [Outcome.CHANGED, Outcome.UNKNOWN]


def test_there_and_back_onto_storage_that_is_larger(daemon: Live) -> None:
    """LVM counts in extents of 4 MiB; its blocks are smaller than an image's."""
    daemon.create("one", size=30 * MIB)
    path = daemon.mount()
    writer = Writer(path / "file", daemon.folder / "told")
    before = os.statvfs(path).f_blocks
    assert daemon.move("thin").phase is MigrationPhase.KEPT
    daemon.assert_on("thin")
    assert mapper.size_of(daemon.node()) == daemon.volume().size == SIZE
    assert os.statvfs(path).f_blocks > before
    # Back it cannot go so.
    plan = daemon.migrations.plan("data", Wish(backend="one"))
    assert (plan.path, plan.rejected["live"]) == (
        MovePath.TREE,
        "it is used in blocks of 512 bytes, and they are larger there",
    )
    with pytest.raises(NotSupported, match="cannot go by live: it is used in blocks of 512 bytes"):
        daemon.migrations.plan("data", Wish(backend="one", path="live"))
    writer.wait_for_more()
    told = writer.stop()
    daemon.assert_whole(told)
    # As files it can, and what was written since comes along.
    assert daemon.migrations.rollback("data", carry=True).path is MovePath.TREE
    assert (daemon.outcome().phase, daemon.volume().backend) == (MigrationPhase.KEPT, "one")
    assert lost(daemon.mount() / "file", told) == []
    daemon.unmount()


def test_an_encrypted_raw_device(daemon: Live) -> None:
    volume = daemon.create("one", size=SIZE, mode=VolumeMode.BLOCK, encryption="main")
    usage = Usage(access=AccessMode.SINGLE_NODE_WRITER, block=True)
    staging, target = daemon.folder / "staging", daemon.folder / "target"
    publications = daemon.core.publications
    publications.stage(volume, str(staging), usage, engine=Engine.CSI)
    publications.publish(
        volume, str(target), usage, engine=Engine.CSI, consumer=Consumer(id="pod"), staged_at=str(staging)
    )
    writer = Writer(target, daemon.folder / "told")
    moved = daemon.move("two")
    assert (moved.phase, moved.path) == (MigrationPhase.KEPT, MovePath.LIVE), moved.error
    writer.wait_for_more()
    daemon.assert_on("two")
    assert lost(target, writer.stop()) == []
    publications.unpublish(volume.id, str(target))
    publications.unstage(volume.id, str(staging))
    assert list(Path("/dev/mapper").glob("volumed-*")) == []


def at_point(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """In the middle of the move."""
    acted = iter([act])
    monkeypatch.setattr(crash, "point", lambda passed: next(acted, lambda: None)() if passed == name else None)


def test_a_flipped_byte_is_caught(daemon: Live, writing: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip() -> None:
        with next((daemon.folder / "two").glob("*.img")).open("r+b") as image:
            image.seek(SIZE - 4096 + 100)
            image.write(b"\x01")
            os.fsync(image)

    at_point(monkeypatch, "live.synced", flip)
    moved = daemon.move("two")
    assert moved.phase is MigrationPhase.FAILED
    assert f"bytes {SIZE - 4096} to {SIZE - 1}" in moved.error
    writing.wait_for_more()
    daemon.assert_on("one")
    assert list((daemon.folder / "two").glob("*.img")) == []
    daemon.assert_whole(writing.stop())


@pytest.mark.parametrize("point", ["live.mirrored", "live.synced"])
def test_a_target_that_fails_stops_nobody(
    daemon: Live, writing: Writer, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def fail() -> None:
        leg = sh("sh", "-c", "dmsetup ls | grep -o '^vg0-v[0-9a-f]*'").strip()
        sectors = mapper.size_of(Path("/dev/mapper") / leg) // 512
        sh("dmsetup", "load", leg, "--table", f"0 {sectors} error")
        sh("dmsetup", "resume", "--noflush", "--nolockfs", leg)
        time.sleep(1.0)  # the writer meets it

    at_point(monkeypatch, point, fail)
    moved = daemon.move("thin", keep_source=0.0)
    assert (moved.phase, daemon.volume().backend) == (MigrationPhase.FAILED, "one"), moved
    writing.wait_for_more()
    daemon.assert_on("one")
    daemon.assert_whole(writing.stop())


def test_paused_gone_on_with_and_given_up(daemon: Live, writing: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    at_point(monkeypatch, "live.synced", lambda: daemon.migrations.pause("data"))
    daemon.begin("two")
    wait_until(lambda: daemon.migrations.get("data").paused, timeout=PATIENCE)
    wait_until(lambda: daemon.migrations.progress(daemon.migrations.get("data")) is None, timeout=PATIENCE)
    assert daemon.table()[0] == "linear"  # nobody would see the target fail
    at_point(monkeypatch, "live.mirrored", lambda: daemon.migrations.abort("data"))
    daemon.migrations.resume("data")
    assert daemon.outcome().phase is MigrationPhase.ABORTED
    writing.wait_for_more()
    daemon.assert_on("one")
    daemon.assert_whole(writing.stop())


def test_no_node_where_none_is_wanted(tmp_path: Path) -> None:
    made = Live(tmp_path, more="live-moves = false")
    try:
        made.create("one", size=SIZE)
        made.mount()
        assert not made.node().exists()
        plan = made.migrations.plan("data", Wish(backend="two"))
        assert (plan.path, plan.rejected["live"]) == (
            MovePath.TREE,
            "device-mapper is not there, or live-moves = false",
        )
        made.unmount()
    finally:
        made.stop()


# kill -9
@pytest.mark.parametrize(
    "point",
    ["layer.made", "live.mirrored", "live.synced", "migrate.committed", "live.led", "migrate.hidden"],
)
def test_killed_at(daemon: Live, point: str) -> None:
    """In a process of its own; the kernel and the writer go on, and so does the daemon that starts after it."""
    daemon.create("one", size=SIZE)
    daemon.stop()

    def use_and_move() -> None:
        daemon.start()
        daemon.mount()
        sh("sh", "-c", f"touch {daemon.folder}/mounted; until [ -e {daemon.folder}/told ]; do sleep 0.1; done")
        daemon.move("two")

    child = os.fork()
    if child == 0:
        crash._name, _, count = point.partition(":")
        crash._left = int(count or 1)
        try:
            use_and_move()
        finally:
            os._exit(0)
    writer = None
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if writer is None and (daemon.folder / "mounted").exists():
            (mounted,) = (daemon.folder / "state/mounts").iterdir()
            writer = Writer(mounted / "file", daemon.folder / "told")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGKILL, f"{point} was not passed"
    if writer is not None:
        writer.wait_for_more()  # nobody is there, and nobody waits
    daemon.start()
    if not daemon.migrations.all():
        path = daemon.core.mounts.path(daemon.volume().id)  # what it was killed in was bound, and so is mounted now
        assert path is not None
        writer = Writer(path / "file", daemon.folder / "told")
        daemon.begin("two")
    assert writer is not None
    moved = daemon.outcome()
    assert (moved.phase, daemon.volume().backend) == (MigrationPhase.KEPT, "two"), moved.error
    writer.wait_for_more()
    daemon.assert_on("two")
    told = writer.stop()
    daemon.assert_whole(told)
