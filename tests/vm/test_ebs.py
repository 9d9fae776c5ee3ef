"""`ebs` with real disks: EC2 as it behaves, on the host, and what it attaches is plugged into the machine."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.ec2 import KEYS, Ec2Server, Hardware, ec2_server
from tests.vm.machine import Machine
from volumed.units import GIB

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]


class Plugged(Hardware):
    """A sparse file for each disk and each snapshot; the machine has those that are attached."""

    def __init__(self, folder: Path, machine: Machine, model: str) -> None:
        self._folder, self._machine, self._model = folder, machine, model
        self.plugged: set[str] = set()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.raw"

    def made(self, disk: str, size: int, snapshot: str) -> None:
        if snapshot:
            _copy(self._file(snapshot), self._file(disk))
        with self._file(disk).open("ab") as file:
            file.truncate(size * GIB)

    def stored(self, disk: str, snapshot: str) -> None:
        _copy(self._file(disk), self._file(snapshot))

    def deleted(self, disk: str) -> None:
        self._file(disk).unlink()

    def attached(self, disk: str, machine: str, name: str) -> None:
        self._machine.plug_file(disk.replace("-", ""), self._file(disk), model=self._model)
        self.plugged.add(disk)

    def detached(self, disk: str, machine: str, *, force: bool) -> None:
        if disk in self.plugged:
            self._machine.unplug(disk.replace("-", ""))
        self.plugged.discard(disk)

    def pull(self, disk: str) -> None:
        """Surprise removal: EC2 knows nothing of it."""
        self.plugged.discard(disk)
        self._machine.unplug(disk.replace("-", ""))

    def grown(self, disk: str, size: int) -> None:
        with self._file(disk).open("ab") as file:
            file.truncate(size * GIB)
        if disk in self.plugged:
            self._machine.resize(disk.replace("-", ""), size * GIB)


SETTINGS = """
default-backends = ["cloud"]
reconcile-interval = "2s"

[backends.cloud]
driver = "ebs"
endpoint = "{url}"
metadata-endpoint = "{url}"
access-key = "file:/etc/volumed/ec2.key"
secret-key = "file:/etc/volumed/ec2.secret"
"""


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


@contextlib.contextmanager
def cloud(guest: Machine, folder: Path, model: str = "virtio-blk-pci") -> Iterator[tuple[Ec2Server, dict[str, str]]]:
    """EC2 with the machine as its instance, and what a program in there needs to know."""
    with ec2_server(Plugged(folder, guest, model)) as ec2:
        host = guest.network()
        key, secret = next(iter(KEYS.items()))
        yield ec2, {"VOLUMED_EC2": ec2.url.replace("127.0.0.1", host), "EC2_KEY": key, "EC2_SECRET": secret}


def run_suite(guest: Machine, environment: dict[str, str], *words: str, suite: str = "test_ebs.py") -> None:
    guest.run_suite(suite, "--timeout=300", *words, timeout=1100, **environment)


def test_the_suite_of_all_drivers(guest: Machine, tmp_path: Path) -> None:
    with cloud(guest, tmp_path) as (ec2, environment):
        ec2.layer.manners.delay = 0.3
        run_suite(guest, environment, "-k", "TestEbsDriver", "--durations=5")


def test_disks_as_nitro_instances_have_them(guest: Machine, tmp_path: Path) -> None:
    with cloud(guest, tmp_path, "nvme") as (_, environment):
        run_suite(guest, environment, "-k", "nitro")


def test_everything_moves_there_and_back(guest: Machine, tmp_path: Path) -> None:
    guest.install()
    with cloud(guest, tmp_path) as (ec2, environment):
        run_suite(guest, environment, "-k", "cloud", suite="test_moves.py")
        assert ec2.layer.hardware.plugged == set()  # type: ignore[attr-defined]


def test_a_disk_that_is_pulled_is_named_and_comes_back(guest: Machine, tmp_path: Path) -> None:
    guest.install()
    with cloud(guest, tmp_path) as (ec2, environment):
        guest.put("/etc/volumed/ec2.key", environment["EC2_KEY"].encode())
        guest.put("/etc/volumed/ec2.secret", environment["EC2_SECRET"].encode())
        guest.put("/etc/volumed/volumed.toml", SETTINGS.format(url=environment["VOLUMED_EC2"]).encode())
        guest.sh("chmod 600 /etc/volumed/*; systemctl start volumed.service", timeout=300)
        # boto3 takes its time on an emulated machine, and the first look at a backend is not waited for.
        guest.sh(
            "for i in $(seq 60); do volumectl backend ls | grep -q ' ok ' && exit 0; sleep 2; done; exit 1", timeout=300
        )
        assert guest.plugin("Create", Name="data", Opts={"size": "1g"})["Err"] == ""
        path = guest.plugin("Mount", Name="data", ID="container-1")["Mountpoint"]
        guest.sh(f"echo kept > {path}/file; sync")
        (disk,) = ec2.layer.hardware.plugged  # type: ignore[attr-defined]
        ec2.layer.hardware.pull(disk)  # type: ignore[attr-defined]
        try:
            assert guest.run("sh", "-c", f"echo lost > {path}/other && sync {path}/other", timeout=60).status != 0
            refused = guest.plugin("Mount", Name="data", ID="container-2")["Err"]
            assert "its device has gone from this machine" in refused
            assert "volumectl who data" in refused
            guest.sh(
                "said='has gone from this machine, and is used by docker by mount id container-1';"
                ' for i in $(seq 100); do journalctl --no-pager -u volumed | grep -q "$said" && exit 0; sleep 1; done;'
                " exit 1"
            )
            assert "its device has gone" in guest.sh("volumectl doctor", check=False)
            assert guest.plugin("Unmount", Name="data", ID="container-1")["Err"] == ""
            assert guest.plugin("Mount", Name="data", ID="container-3")["Err"] == ""
            assert guest.sh(f"cat {path}/file").strip() == "kept"
            assert guest.plugin("Unmount", Name="data", ID="container-3")["Err"] == ""
            assert guest.plugin("Remove", Name="data")["Err"] == ""
            assert ec2.layer.hardware.plugged == set()  # type: ignore[attr-defined]
        finally:
            print(guest.sh("journalctl -b --no-pager -u volumed | tail -40", check=False))
