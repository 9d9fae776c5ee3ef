"""Volumes that move while they are written to need device-mapper: they are tested inside the machine, and so is what is
left of them when its power goes."""

from __future__ import annotations

import pytest

from tests.vm.machine import SOURCES, Machine
from volumed.units import GIB

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(2400)]

SETTINGS = b"""
[backends.one]
driver = "image"
path = "/var/lib/volumed/one"
[backends.two]
driver = "image"
path = "/var/lib/volumed/two"
"""
DROP_INS = "/etc/systemd/system/volumed.service.d"
# The clock of a machine that was booted on a busy host runs ahead of what it gets done.
PATIENT = b"[Service]\nTimeoutStartSec=infinity\nWatchdogSec=0\n"
PATIENCE = 3000.0


@pytest.mark.parametrize("part", ["not killed", "killed"])
def test_in_the_machine(guest: Machine, part: str) -> None:
    guest.install()  # the children that read trees find volumed, too
    disk = guest.plug("storage", size=2 * GIB)
    guest.run_suite("test_live.py", "-k", part, timeout=2300, VOLUMED_DISK=disk)


@pytest.mark.parametrize("point", ["live.synced", "migrate.committed"])
def test_power_cut(guest: Machine, point: str) -> None:
    """The daemon has died on one or the other side of the commit point, the kernel went on, and then all is gone but
    what the disks were given: it is whole where the ledger says that it is."""
    guest.install()
    guest.put("/etc/volumed/volumed.toml", SETTINGS)
    guest.sh(f"mkdir -p {DROP_INS}")
    guest.put(f"{DROP_INS}/patient.conf", PATIENT)
    guest.put(f"{DROP_INS}/crash.conf", f"[Service]\nEnvironment=VOLUMED_CRASH_AT={point}\nRestart=no\n".encode())
    guest.sh("systemctl daemon-reload; systemctl start volumed.service", timeout=PATIENCE)
    guest.sh("volumectl create data --backend one --size 32m")
    path = guest.plugin("Mount", Name="data", ID="id-1")["Mountpoint"]
    writer = f"python3 /root/volumed/tests/vm/guest/writer.py {path}/file /root/told"
    guest.sh(f"setsid nohup {writer} >/root/writer.log 2>&1 </dev/null & until [ -s /root/told ]; do sleep 0.1; done")
    guest.sh("volumectl migrate data --to two --detach")
    guest.sh("while systemctl -q is-active volumed.service; do sleep 0.2; done", timeout=300)
    assert "mirror" in guest.sh("dmsetup table")
    told = int(guest.sh("head -c 20 /root/told"))
    guest.sh(f"until [ $(head -c 20 /root/told) -ge {told + 20} ]; do sleep 0.1; done")
    guest.cut_power()

    guest.boot()
    guest.sh(f"rm {DROP_INS}/crash.conf; systemctl daemon-reload; systemctl start volumed.service", timeout=PATIENCE)
    guest.sh(
        'until volumectl -o json migration show data | grep -q \'"phase": "kept"\'; do sleep 1; done', timeout=PATIENCE
    )
    assert "two" in guest.sh("volumectl inspect data", timeout=PATIENCE)
    check = f"""
from pathlib import Path
from tests.vm.guest.writer import lost
told = int(Path("/root/told").read_text().split()[0])
print(told, lost(Path("{path}/file"), told))
"""
    number, lost = guest.run("python3", "-c", check, timeout=PATIENCE, **SOURCES).text.split(maxsplit=1)
    assert int(number) >= told + 20
    assert lost.strip() == "[]"
    assert guest.sh("volumectl -o json doctor", timeout=PATIENCE).strip() == "[]"
