"""Storage across the network that fails in the middle of a move: it goes on when its server is back, or is cleanly
where it was. Every server is real; whatever was done to it, the data is equal and nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.conftest import filesystems, fill_disk, sh, wait_until
from tests.engines.test_docker_ceph import backend_table
from tests.harness.cables import cut
from tests.harness.ceph import FILESYSTEM, POOL, Ceph
from tests.harness.files import backend_tables
from tests.harness.gluster import Gluster, running_gluster
from tests.harness.processes import Process
from tests.harness.volumed import Volumed
from tests.migration.conftest import Mover
from tests.migration.test_matrix import end_clients
from volumed.units import MIB

pytestmark = [pytest.mark.root, pytest.mark.slow]

SLOW = "4m"
PATIENCE = 4  # seconds: a Gluster client asks so often, and waits so long, whether its brick is there
SIZED = ("sized", "ceph")


class Network(Mover):
    """Backends `local` and `sized` on this machine; `gluster` and `small` (some MiB), `ceph`, `files` and `objects` on
    servers of the tests' own."""

    def __init__(self, volumed: Volumed, ceph: Ceph, gluster: Gluster, *, disk: Path, group: str) -> None:
        """`disk`: of the brick that is `small`; `group`: of the subvolumes, and in the names of the buckets."""
        super().__init__(volumed)
        self.ceph, self.gluster, self.disk, self.group = ceph, gluster, disk, group
        (osd,) = ceph.told("osd", "dump")["osds"]
        self.osd_ports = [int(each["addr"].rpartition(":")[2]) for each in osd["public_addrs"]["addrvec"]]

    # A volume `data` with files of 4 MiB, and what becomes of it
    def fill(self, backend: str, count: int = 6) -> dict[str, bytes]:
        """What its files hold, by name."""
        self.create("data", backend, **({"size": "64m"} if backend in SIZED else {}))
        content = {f"file-{number}": os.urandom(4 * MIB) for number in range(count)}
        path = self.mount("data")
        for name, data in content.items():
            (path / name).write_bytes(data)
        self.unmount("data")
        return content

    def state(self, reference: str) -> dict[str, Any]:
        found: dict[str, Any] = self.volumed.api.get("migrations", reference)
        return found

    def wait_for_some(self, reference: str, least: int) -> None:
        """Until some of it is copied."""
        wait_until(lambda: ((self.state(reference)["progress"] or {}).get("done") or 0) >= least, timeout=90)

    def step(self, reference: str) -> str:
        return str((self.state(reference)["progress"] or {}).get("step"))

    def pause(self, reference: str) -> None:
        self.volumed.api.post("migrations", reference, "pause")
        wait_until(lambda: self.state(reference)["progress"] is None)
        assert self.state(reference)["paused"]

    def hurry(self, reference: str) -> None:
        """It goes on, if it was paused, as fast as it can."""
        self.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": None})
        if self.state(reference)["paused"]:
            self.volumed.api.post("migrations", reference, "resume")

    # Storage, as its administrator sees it
    @contextlib.contextmanager
    def gone(self, backend: str) -> Iterator[None]:
        """The server of the data: it answers nothing, or there is none."""
        self.ceph.hang("osd.0") if backend == "ceph" else self.gluster.kill_brick("files")
        try:
            yield
        finally:
            self.ceph.resume("osd.0") if backend == "ceph" else self.gluster.revive_brick("files")

    def cut_off(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """No packet reaches the server of the data, or comes from it."""
        if backend == "gluster":
            return cut(self.gluster.address)
        return cut(self.ceph.address, self.osd_ports)

    def assert_answers(self, backend: str) -> None:
        """It notices nothing of what happens to another."""
        self.create("other", backend, **({"size": "64m"} if backend in SIZED else {}))
        (self.mount("other", "id-2") / "file").write_text("answers")
        self.unmount("other", "id-2")
        self.volumed.api.delete("volumes", "other")

    def on_target(self, backend: str) -> list[str]:
        """Names with a volume's id in them."""
        tops = {"gluster": self.gluster.folder / "bricks/files/volumes", "small": self.disk / "brick/volumes"}
        if backend in tops:
            found = [path.name for path in tops[backend].iterdir()]
        elif backend == "ceph":
            found = self.ceph.rbd("ls", POOL).split()
        else:
            found = [each["name"] for each in self.ceph.told("fs", "subvolume", "ls", FILESYSTEM, self.group)]
        return [name for name in found if re.search("v[0-9a-f]{32}", name)]

    def assert_whole(self, content: dict[str, bytes], backend: str) -> None:
        """There, with this in it, and nothing anywhere else; it goes afterwards."""
        assert self.volume("data")["backend"] == backend
        # A client may need a moment to find its server again.
        wait_until(lambda: self.volumed.plugin("Mount", Name="data", ID="id-1").error == "", timeout=90)
        path = Path(self.volumed.plugin("Path", Name="data").body["Mountpoint"])
        assert {each.name: each.read_bytes() for each in path.iterdir()} == content
        self.unmount("data")
        self.assert_clean()
        self.volumed.api.delete("volumes", "data")
        wait_until(lambda: not any(each["phase"] == "kept" for each in self.volumed.api.get("migrations")), timeout=60)
        self.assert_clean()


@pytest.fixture(scope="module")
def network(ceph: Ceph) -> Iterator[Network]:
    folder = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    group = f"m{secrets.token_hex(4)}"
    with filesystems(folder) as make, running_gluster(folder / "server") as gluster:
        tables = backend_table(ceph) + backend_tables(ceph, folder, group=group)
        disk = make("ext4", size=64 * MIB)
        for backend, volume, brick in (("gluster", "files", None), ("small", "small", disk / "brick")):
            gluster.make_volume(volume, brick=brick)
            gluster.ctl("volume", "set", volume, "network.ping-timeout", str(PATIENCE))
            tables += f'[backends.{backend}]\ndriver = "gluster"\nservers = ["{gluster.address}"]\n'
            tables += f'volume = "{volume}"\npath = "volumes"\n'
        (folder / "v").mkdir()
        made = Volumed(folder / "v", backends=tables)
        try:
            made.start()
            yield Network(made, ceph, gluster, disk=disk, group=group)
        finally:
            made.clean_up()
            end_clients(folder / "v")
    shutil.rmtree(folder, ignore_errors=True)


# Bytes that flip on storage: what they belong to, as it is to be named
PLACE = 2 * MIB + 5


def flip_in_brick(network: Network) -> str:
    (top,) = network.gluster.folder.glob("bricks/files/volumes/v*/data")
    path = whole_file(top)
    with path.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, PLACE)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), PLACE)
    return f"{path.name} has other data at byte {2 * MIB}"


def whole_file(top: Path) -> Path:
    """One that is copied already."""
    return next(path for path in top.iterdir() if path.stat().st_size == 4 * MIB)


def flip_in_pool(network: Network, pool: str, name: str) -> bool:
    """As on a disk of the cluster: past every client. False when nothing is there."""
    command = ("timeout", "60", "rados", "-c", network.ceph.conf, "-p", pool)
    with tempfile.NamedTemporaryFile() as held:
        sh(*command, "get", name, held.name)
        data = held.read()
        if not any(data[2 * MIB : 3 * MIB]):
            return False
        Path(held.name).write_bytes(bytes([data[PLACE] ^ 1]))
        sh(*command, "put", name, held.name, "--offset", str(PLACE))
    return True


def flip_in_image(network: Network) -> str:
    objects = sh("timeout", "60", "rados", "-c", network.ceph.conf, "-p", POOL, "ls").split()
    name = next(each for each in objects if each.startswith("rbd_data.") and flip_in_pool(network, POOL, each))
    first = int(name.rpartition(".")[2], 16) * 4 * MIB  # an object holds so much
    return f"bytes {first + 2 * MIB} to {first + 3 * MIB - 1}"


def flip_in_filesystem(network: Network) -> str:
    (top,) = (network.volumed.state / "migrations").glob("*/mounts/v*")
    path = whole_file(top)
    assert flip_in_pool(network, "files-data", f"{path.stat().st_ino:x}.00000000")
    return f"{path.name} has other data at byte {2 * MIB}"


def flip_in_bucket(network: Network) -> str:
    folder = network.volumed.folder.parent
    client = boto3.client(
        "s3",
        endpoint_url=network.ceph.start_gateway(),
        region_name="us-east-1",
        aws_access_key_id=(folder / "access.key").read_text(),
        aws_secret_access_key=(folder / "secret.key").read_text(),
    )
    (bucket,) = (each["Name"] for each in client.list_buckets()["Buckets"])
    key = next(each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"] if each["Size"] == 4 * MIB)
    held = client.get_object(Bucket=bucket, Key=key)
    data = bytearray(held["Body"].read())
    data[PLACE] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(data), Metadata=held["Metadata"])
    return f"{Path(key).name} has other data at byte {2 * MIB}"


@pytest.mark.parametrize(
    ("source", "target", "flip"),
    [
        ("local", "gluster", flip_in_brick),
        ("sized", "ceph", flip_in_image),
        ("local", "files", flip_in_filesystem),
        ("local", "objects", flip_in_bucket),
    ],
)
def test_a_flipped_byte_is_caught_and_named(
    network: Network, source: str, target: str, flip: Callable[[Network], str]
) -> None:
    content = network.fill(source)
    reference = network.begin("data", target, bandwidth=SLOW)
    network.wait_for_some(reference, 12 * MIB)
    network.pause(reference)
    told = flip(network)
    network.hurry(reference)
    failed = network.outcome(reference)
    assert failed["phase"] == "failed", failed
    assert failed["error"].startswith(f"volume data: the copy is not what was read: {told}. look at backend {target}")
    if target != "objects":
        assert network.on_target(target) == []
    network.assert_whole(content, source)


# Servers that are full
@contextlib.contextmanager
def full_brick(network: Network) -> Iterator[None]:
    filler = fill_disk(network.disk)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def full_pool(network: Network) -> Iterator[None]:
    def is_full() -> bool:
        (found,) = (each for each in network.ceph.told("osd", "dump")["pools"] if each["pool_name"] == "files-data")
        return "full" in found["flags_names"].split(",")

    network.ceph.ceph("osd", "pool", "set-quota", "files-data", "max_bytes", "4096")
    try:
        wait_until(is_full)
        yield
    finally:
        network.ceph.ceph("osd", "pool", "set-quota", "files-data", "max_bytes", "0")
        wait_until(lambda: not is_full())


@pytest.mark.parametrize(("target", "full"), [("small", full_brick), ("files", full_pool)])
def test_a_server_that_is_full_is_named_and_left(
    network: Network, target: str, full: Callable[[Network], contextlib.AbstractContextManager[None]]
) -> None:
    content = network.fill("local")
    reference = network.begin("data", target, bandwidth=SLOW)
    network.wait_for_some(reference, 8 * MIB)
    network.pause(reference)
    with full(network):
        network.hurry(reference)
        failed = network.outcome(reference)
        assert failed["phase"] == "failed", failed
        assert re.match(rf"backend {target}: is full at 'file-\d'\. free some space there", failed["error"])
        assert network.on_target(target) == []
    network.assert_whole(content, "local")


# Servers that are gone
@pytest.mark.parametrize(
    "pair", [("sized", "ceph"), ("ceph", "sized"), ("local", "gluster"), ("gluster", "local")], ids="-".join
)
def test_a_server_that_is_gone_for_a_while_costs_nothing_but_time(network: Network, pair: tuple[str, str]) -> None:
    source, target = pair
    content = network.fill(source)
    reference = network.begin("data", target, bandwidth=SLOW, keep_source="0s")
    network.wait_for_some(reference, 4 * MIB)
    with network.gone("ceph" if "ceph" in pair else "gluster"):
        network.hurry(reference)  # it would be done in a moment
        time.sleep(3)
        assert network.state(reference)["phase"] not in ("kept", "done")
        assert network.volume("data")["backend"] == source
    ended = network.outcome(reference)
    assert ended["phase"] in ("kept", "done", "failed"), ended
    network.assert_whole(content, source if ended["phase"] == "failed" else target)


@pytest.mark.parametrize("pair", [("local", "gluster"), ("sized", "ceph"), ("local", "files")], ids="-".join)
def test_a_move_to_a_server_that_is_gone_for_good_is_aborted(network: Network, pair: tuple[str, str]) -> None:
    source, target = pair
    content = network.fill(source)
    reference = network.begin("data", target, bandwidth=SLOW)
    network.wait_for_some(reference, 8 * MIB)
    with network.gone("gluster") if target == "gluster" else network.cut_off("ceph"):
        network.hurry(reference)
        if target == "gluster":
            wait_until(lambda: "Transport endpoint is not connected" in network.state(reference)["error"])
            assert network.state(reference)["error"].startswith("volume data: the tree cannot be copied")
        network.volumed.api.post("migrations", reference, "abort")
        path = network.mount("data")
        assert {each.name: each.read_bytes() for each in path.iterdir()} == content
        network.unmount("data")
        assert network.state(reference)["phase"] == "aborting"
        assert network.volume("data")["backend"] == source
    ended = network.outcome(reference)
    assert (ended["phase"], ended["error"]) == ("aborted", "")
    assert network.on_target(target) == []
    network.assert_whole(content, source)


def test_the_daemon_ends_and_starts_while_a_target_does_not_answer(network: Network) -> None:
    content = network.fill("sized")
    reference = network.begin("data", "ceph", bandwidth=SLOW)
    network.wait_for_some(reference, 8 * MIB)
    with network.cut_off("ceph"):
        network.hurry(reference)
        time.sleep(1)  # writes wait for the cluster, and cannot be interrupted
        network.volumed.stop()
        network.volumed.start()
        path = network.mount("data")
        assert {each.name: each.read_bytes() for each in path.iterdir()} == content
        network.unmount("data")
        assert network.state(reference)["phase"] == "seeding"
    assert network.outcome(reference)["phase"] == "kept"
    network.assert_whole(content, "ceph")


# Cables that are cut
WRITER = """
import os, sys, time
with open(sys.argv[1], "a") as file:
    for number in range(1000000):
        file.write(f"{number}\\n")
        file.flush()
        os.fsync(file.fileno())
        print(number, flush=True)
        time.sleep(0.01)
"""


# Longer than it takes a client to see it: Gluster's then fails what it was asked for, Ceph's connects anew.
CUT = {"gluster": 2 * PATIENCE + 2, "ceph": 12}


@pytest.fixture
def write_lines(tmp_path: Path) -> Iterator[Callable[[Path], Process]]:
    """A process that writes them into a file, and says each as soon as it is on storage."""
    with contextlib.ExitStack() as ends:

        def write(path: Path) -> Process:
            writer = Process([sys.executable, "-c", WRITER, path], log=tmp_path / "written")
            ends.callback(writer.end, signal.SIGKILL)
            return writer

        yield write


@pytest.mark.parametrize(
    "pair", [("local", "gluster"), ("gluster", "local"), ("sized", "ceph"), ("ceph", "sized")], ids="-".join
)
def test_a_cut_cable_costs_a_volume_in_use_nothing(
    network: Network, pair: tuple[str, str], write_lines: Callable[[Path], Process]
) -> None:
    """In the copy, and in the last round."""
    source, target = pair
    remote, other = ("ceph", "gluster") if "ceph" in pair else ("gluster", "ceph")
    content = network.fill(source)
    path = network.mount("data")
    writer = write_lines(path / "lines")
    reference = network.begin("data", target, bandwidth=SLOW, keep_source="0s")
    network.wait_for_some(reference, 8 * MIB)
    with network.cut_off(remote):
        network.hurry(reference)
        ends = time.monotonic() + CUT[remote]
        network.assert_answers(other)
        network.assert_answers("local")
        time.sleep(max(0.0, ends - time.monotonic()))
        assert network.volume("data")["backend"] == source
    wait_until(lambda: network.step(reference) == "waiting until nobody uses it", timeout=90)
    network.pause(reference)
    writer.end(signal.SIGKILL)
    (path / "late").write_bytes(os.urandom(8 * MIB))
    time.sleep(2)  # a write that a FUSE client has taken comes even so when its writer is killed
    content = {each.name: each.read_bytes() for each in path.iterdir() if each.name != "lost+found"}
    acknowledged = [line for line in writer.said().splitlines() if line.isdigit()]
    assert content["lines"].decode().splitlines()[: len(acknowledged)] == acknowledged != []
    network.unmount("data")
    network.volumed.api.post("migrations", reference, "throttle", body={"bandwidth": "2m"})
    network.volumed.api.post("migrations", reference, "resume")
    wait_until(lambda: network.state(reference)["phase"] == "quiesced")
    with network.cut_off(remote):
        network.hurry(reference)
        time.sleep(CUT[remote])
        if remote == target:  # of a source this machine may have in memory what is left to read
            assert network.volume("data")["backend"] == source
    ended = network.outcome(reference)
    assert ended["phase"] in ("kept", "done"), ended
    network.assert_whole(content, target)
