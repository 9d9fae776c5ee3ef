"""volumed under systemd with a backend on the guest's NFS server, which hangs and forgets; helpers in their scopes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

SETTINGS = """
reconcile-interval = "2s"
default-backends = ["local"]
[csi]
enabled = true
target-roots = ["/pods"]
[backends.local]
driver = "directory"
path = "/var/lib/volumed/volumes"
[backends.nas]
driver = "nfs"
server = "127.0.0.1"
export = "/plain"
timeout = 5
"""
SERVER = """
from tests.vm.guest.nfs_server import NfsServer
server = NfsServer()
server.export("plain")
server.start()
"""
FORGET = """
from pathlib import Path
from tests.vm.guest.nfs_server import NfsServer
NfsServer.forget(None, Path("/srv/nfs/plain"))
"""
PUBLISH = """
from pathlib import Path
from tests.harness.csi import calling, capability
Path("/pods/staging").mkdir(parents=True)
with calling(Path("/run/volumed/csi/csi.sock")) as csi:
    asked = [capability()]
    volume = csi.CreateVolume(name="pvc-1", volume_capabilities=asked, parameters={"backend": "nas"}).volume.volume_id
    used = dict(volume_id=volume, staging_target_path="/pods/staging", volume_capability=asked[0])
    csi.NodeStageVolume(**used)
    csi.NodePublishVolume(target_path="/pods/target", **used)
Path("/pods/target/file").write_text("published")
print(volume)
"""
UNPUBLISH = """
import sys
from pathlib import Path
from tests.harness.csi import calling
with calling(Path("/run/volumed/csi/csi.sock")) as csi:
    csi.NodeUnpublishVolume(volume_id=sys.argv[1], target_path="/pods/target")
    csi.NodeUnstageVolume(volume_id=sys.argv[1], staging_target_path="/pods/staging")
    csi.DeleteVolume(volume_id=sys.argv[1])
"""
HELPER = """
from volumed.host.linux import LinuxHost
print(LinuxHost().start_helper("fuse-1", ["sleep", "600"]).pid)
"""


@pytest.fixture
def installed(guest: Machine) -> Iterator[Machine]:
    guest.install()
    python(guest, SERVER)
    guest.put("/etc/volumed/volumed.toml", SETTINGS.encode())
    guest.sh("systemctl start volumed.service")
    yield guest
    print(guest.sh("journalctl -b --no-pager -u 'volumed*' | tail -60", check=False))


def python(guest: Machine, script: str, *arguments: str) -> str:
    guest.put("/root/script.py", script.encode())
    return guest.sh(f"PYTHONPATH=/root/volumed:/root/volumed/drivers python3 /root/script.py {' '.join(arguments)}")


def use(guest: Machine, name: str, **options: str) -> str:
    assert guest.plugin("Create", Name=name, Opts=options)["Err"] == ""
    answer = guest.plugin("Mount", Name=name, ID=f"container-of-{name}")
    assert answer["Err"] == ""
    return str(answer["Mountpoint"])


def test_a_hanging_server_hurts_its_own_volumes_alone(installed: Machine) -> None:
    path = use(installed, "shared", backend="nas")
    installed.sh(f"echo kept > {path}/file")
    installed.sh("tc qdisc add dev lo root netem loss 100%")
    assert "does not answer" in installed.plugin("Create", Name="other", Opts={"backend": "nas"})["Err"]
    local = use(installed, "local")
    installed.sh(f"echo undisturbed > {local}/file")
    assert installed.plugin("Get", Name="shared")["Volume"]["Mountpoint"] == path
    assert installed.plugin("Unmount", Name="local", ID="container-of-local")["Err"] == ""
    installed.sh("tc qdisc del dev lo root")
    assert installed.sh(f"cat {path}/file").strip() == "kept"


def test_a_forgetful_server_is_borne_by_containers_and_pods(installed: Machine) -> None:
    path = use(installed, "shared", backend="nas")
    volume = python(installed, PUBLISH).strip()
    # A container has a mount of its own, in a namespace of its own.
    installed.sh(
        f"echo kept > {path}/file; mkdir -p /inside; systemd-run -q --unit=container unshare -m --propagation private "
        f"sh -c 'mount --bind {path} /inside && umount {path} && exec sleep 3600'"
    )
    inside = "nsenter -t $(systemctl show -P MainPID container) -m cat /inside/file"
    installed.sh(f"for i in $(seq 100); do {inside} && exit 0; sleep 0.1; done; exit 1")

    python(installed, FORGET)
    installed.sh(f'for i in $(seq 300); do [ "$({inside})" = kept ] && exit 0; sleep 0.2; done; exit 1')
    installed.sh(
        'for i in $(seq 300); do [ "$(cat /pods/target/file)" = published ] && exit 0; sleep 0.2; done; exit 1'
    )
    events = installed.sh("volumectl events")
    assert "mount.revived" in events
    assert "mount.dead" not in events

    python(installed, UNPUBLISH, volume)
    installed.sh("systemctl stop container")
    assert installed.plugin("Unmount", Name="shared", ID="container-of-shared")["Err"] == ""
    assert installed.plugin("Remove", Name="shared")["Err"] == ""
    assert json.loads(installed.sh("volumectl -o json doctor")) == []
    assert installed.sh("ls -A /srv/nfs/plain") == ""
    installed.sh("systemctl stop volumed.service && /opt/volumed/bin/volumed --unmount-all")
    assert "/run/volumed/backends" not in installed.sh("cat /proc/self/mountinfo")


def test_a_helper_has_a_scope_that_outlives_its_starter_and_the_shutdown_of_services(guest: Machine) -> None:
    guest.put("/root/helper.py", HELPER.encode())
    pid = guest.sh(
        "systemd-run -q --pipe --wait --unit=starter --setenv=PYTHONPATH=/root/volumed:/root/volumed/drivers "
        "python3 /root/helper.py 2>/dev/null"
    ).strip()
    scope = guest.sh(f"sed -n 's,.*/,,p' /proc/{pid}/cgroup").strip()
    assert scope.startswith("volumed-fuse-1-")
    assert scope.endswith(".scope")
    assert guest.sh(f"tr '\\0' ' ' < /proc/{pid}/cmdline") == "sleep 600 "
    assert "shutdown.target" not in guest.sh(f"systemctl show -P Conflicts -P Before {scope}")
