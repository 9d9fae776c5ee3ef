"""The power goes in the middle of everything; after the boot nothing is lost and nothing leaked."""

from __future__ import annotations

import contextlib
import json
import threading

import pytest

from tests.vm.machine import SOURCES, Machine, MachineError
from volumed.units import GIB

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

# Makes and removes volumes without end; a line of the journal for each that was answered, with what was written to it.
WORK = """
import http.client, json, os, socket, sys
def plugin(endpoint, **fields):
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("/run/docker/plugins/volumed.sock")
    connection.request("POST", f"/VolumeDriver.{endpoint}", body=json.dumps(fields))
    answer = json.loads(connection.getresponse().read())
    assert answer["Err"] == "", answer
    return answer
journal = open("/root/journal", "a")
def note(**said):
    journal.write(json.dumps(said) + "\\n"); journal.flush(); os.fsync(journal.fileno())
for number in range(10**6):
    name, options = f"v{number}", [{}, {"size": "16m"}, {"backend": "sized", "size": "32m"}][number % 3]
    plugin("Create", Name=name, Opts=options)
    path = plugin("Mount", Name=name, ID="work")["Mountpoint"]
    with open(f"{path}/file", "w") as file:
        file.write(name); file.flush(); os.fsync(file.fileno())
    note(kept=name)
    if number % 2:
        plugin("Unmount", Name=name, ID="work")
        note(removing=name)
        plugin("Remove", Name=name)
        note(removed=name)
"""


def test_power_cut(guest: Machine) -> None:
    guest.install()
    guest.sh("systemctl -q enable volumed.service && systemctl start volumed.service")
    guest.put("/root/work.py", WORK.encode())
    worker = threading.Thread(target=_work, args=(guest,))
    worker.start()
    guest.sh("until [ -s /root/journal ] && [ $(grep -c kept /root/journal) -ge 12 ]; do sleep 0.1; done", timeout=300)
    guest.cut_power()
    worker.join()
    guest.boot()
    guest.sh("systemctl start volumed.service", timeout=300)
    print(guest.sh("journalctl -b --no-pager -u 'volumed*' | tail -40", check=False))

    said = [json.loads(line) for line in guest.sh("cat /root/journal").splitlines() if line.endswith("}")]
    kept = {line["kept"] for line in said if "kept" in line}
    going = {line["removing"] for line in said if "removing" in line}
    removed = {line["removed"] for line in said if "removed" in line}
    there = set(guest.sh("volumectl ls -q").split())
    assert len(kept - going) >= 5
    assert kept - going <= there
    assert not removed & there
    assert guest.sh("volumectl -o json doctor").strip() == "[]"
    for name in sorted(kept - going):
        path = guest.plugin("Mount", Name=name, ID="look")["Mountpoint"]
        assert guest.sh(f"cat {path}/file") == name


def _work(guest: Machine) -> None:
    with contextlib.suppress(MachineError, TimeoutError, OSError):  # the power is gone
        guest.run("python3", "/root/work.py", timeout=600)


DISKS = ("state", "source", "trees", "blocks")
CUTS = ("copying", "committing", "taking_away")
# Nothing is written down because time has passed.
MOUNT = "sysctl -q vm.dirty_writeback_centisecs=0; " + "; ".join(
    f"mkdir -p /mnt/{name}; mount -o commit=3000 /dev/disk/by-id/virtio-{name} /mnt/{name}" for name in DISKS
)


def test_power_cut_in_every_phase_of_a_move(guest: Machine) -> None:
    """See guest/moves.py."""
    guest.install()
    for name in DISKS:
        disk = guest.plug(name, size=GIB // 4, volatile=True)
        guest.sh(f"mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=1 {disk}")
    guest.put("/root/notes.json", b"{}")
    guest.sh(f"{MOUNT}; sync")
    for cut in CUTS:
        run_moves(
            guest,
            f"{cut} >/root/log 2>&1 </dev/null & pid=$!; until [ -e /run/ready ]; do sleep 0.05; "
            "kill -0 $pid || { cat /root/log; exit 1; }; done; sync /root/log",
        )
        guest.cut_power()
        guest.boot()
        guest.sh(MOUNT)
    run_moves(guest, "")


def run_moves(guest: Machine, words: str) -> None:
    environment = " ".join(f"{name}={value}" for name, value in SOURCES.items())
    guest.sh(f"{environment} python3 -m tests.vm.guest.moves {words}", timeout=600)
