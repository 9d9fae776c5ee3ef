"""`ebs` beside bare boto3 calls with its waiters, both against the same EC2 with the same delays."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.measure import milliseconds, percentile, show
from tests.harness.ec2 import KEYS, ZONES, Ec2Server, Hardware, ec2_server
from volumed.driver import VolumeSpec
from volumed.model import Handle, VolumeMode, new_volume_id
from volumed.testing.fake_host import FakeHost
from volumed.units import GIB
from volumed_drivers.ebs import EbsDriver, EbsOptions

DELAY = 1.5  # seconds of each transition; EC2's own are of this order


class Shown(Hardware):
    def __init__(self) -> None:
        self.host = FakeHost()

    def attached(self, disk: str, machine: str, name: str) -> None:
        self.host.devices[("ID_SERIAL_SHORT", disk.replace("-", "")),] = Path(f"/dev/{disk}")


def ebs() -> None:
    hardware = Shown()
    with ec2_server(hardware) as ec2:
        ec2.layer.manners.delay, ec2.layer.manners.most_attached = DELAY, 200
        os.environ["BENCH_EC2_KEY"], os.environ["BENCH_EC2_SECRET"] = next(iter(KEYS.items()))
        options = EbsOptions(
            endpoint=ec2.url,
            metadata_endpoint=ec2.url,
            access_key="env:BENCH_EC2_KEY",
            secret_key="env:BENCH_EC2_SECRET",
        )
        driver = EbsDriver("cloud", options, hardware.host)
        driver.probe()
        ours = sorted(_timed(lambda: _ours(driver)) for _ in range(5))
        bare = sorted(_timed(lambda: _bare(ec2)) for _ in range(5))
        show(
            "EBS: create, attach and see the device",
            [
                ("volumed", milliseconds(percentile(ours, 50))),
                ("boto3 alone", milliseconds(percentile(bare, 50))),
            ],
            goal=f"EC2 itself takes {2 * DELAY:.0f} s here",
        )
        _fifty(ec2, driver)


def _fifty(ec2: Ec2Server, driver: EbsDriver) -> None:
    with ThreadPoolExecutor(50) as pool:
        handles = list(pool.map(lambda _: _made(driver), range(50)))
        ec2.layer.calls.clear()
        took = _timed(lambda: list(pool.map(driver.map, handles)))
    looks = [at for at, action in ec2.layer.calls if action.startswith("Describe")]
    busiest = max(sum(begun <= at < begun + 1 for at in looks) for begun in looks)
    show(
        "EBS: 50 attaches at once",
        [
            ("all attached after", f"{took:.1f} s"),
            ("Describe calls", str(len(looks))),
            ("a second, on average", f"{len(looks) / max(looks[-1] - looks[0], 1):.1f}"),
            ("in the busiest second, as the server saw them", str(busiest)),
            ("other calls", str(len(ec2.layer.calls) - len(looks))),
        ],
        goal="at most 3 Describe calls a second",
    )


def _made(driver: EbsDriver) -> Handle:
    spec = VolumeSpec(new_volume_id(), GIB, VolumeMode.BLOCK, driver.VolumeOptions())
    return driver.create(spec).handle


def _ours(driver: EbsDriver) -> None:
    driver.map(_made(driver))


def _bare(ec2: Ec2Server) -> None:
    """What a program does that looks twice a second; boto3's waiters look every 15 seconds by themselves."""
    often: Any = {"Delay": 0.5, "MaxAttempts": 100}
    disk = ec2.client.create_volume(Size=1, AvailabilityZone=ZONES[0], VolumeType="gp3")["VolumeId"]
    ec2.client.get_waiter("volume_available").wait(VolumeIds=[disk], WaiterConfig=often)
    there = {
        each["DeviceName"]
        for reservation in ec2.client.describe_instances(InstanceIds=[ec2.layer.instance])["Reservations"]
        for each in reservation["Instances"][0]["BlockDeviceMappings"]
    }
    name = next(f"/dev/xvdc{letter}" for letter in "abcdefghij" if f"/dev/xvdc{letter}" not in there)
    ec2.client.attach_volume(VolumeId=disk, InstanceId=ec2.layer.instance, Device=name)
    while ec2.client.describe_volumes(VolumeIds=[disk])["Volumes"][0]["Attachments"][0]["State"] != "attached":
        time.sleep(0.5)


def _timed(job: Any) -> float:
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun
