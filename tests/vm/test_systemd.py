"""The units under a real systemd: start, sockets, watchdog, restart, shutdown. In one machine for all, in this order;
each test leaves it as it was, and the last one turns it off."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.vm.machine import Machine, machine

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def only_one() -> Iterator[Machine]:
    with machine() as running:
        running.install()
        running.sh("systemctl -q enable volumed.service && systemctl start volumed.service")
        yield running


@pytest.fixture
def installed(only_one: Machine) -> Iterator[Machine]:
    yield only_one
    print(only_one.sh("journalctl -b --no-pager -u 'volumed*' | tail -60", check=False))


def main_pid(guest: Machine) -> int:
    return int(guest.sh("systemctl show -P MainPID volumed.service"))


def mount(guest: Machine, name: str, **options: str) -> str:
    assert guest.plugin("Create", Name=name, Opts=options)["Err"] == ""
    answer = guest.plugin("Mount", Name=name, ID="container-1")
    assert answer["Err"] == ""
    return str(answer["Mountpoint"])


def unmount(guest: Machine, name: str) -> None:
    assert guest.plugin("Unmount", Name=name, ID="container-1")["Err"] == ""
    assert guest.plugin("Remove", Name=name)["Err"] == ""


def test_sockets_are_private_and_a_call_waits_for_the_start(installed: Machine) -> None:
    modes = installed.sh("stat -c '%a %U %G' /run/docker/plugins/volumed.sock /run/volumed/admin.sock")
    assert modes.splitlines() == ["600 root root", "660 root volumed"]
    installed.sh("systemctl stop volumed.service && test -S /run/docker/plugins/volumed.sock")
    assert installed.plugin("List") == {"Volumes": [], "Err": ""}
    assert installed.sh("systemctl is-active volumed.service").strip() == "active"
    assert "version" not in installed.sh("volumectl version").partition("volumed")[0]


def test_mounts_outlive_restart_kill_and_a_daemon_that_hangs(installed: Machine) -> None:
    path = mount(installed, "data", size="64m")
    installed.sh(f"echo kept > {path}/file; sync")
    ways = {
        "restart": "systemctl restart volumed.service",
        "killed": "kill -9 MAINPID",
        # Stopped, it no more tells the watchdog that it lives.
        "hangs": "systemctl set-property --runtime volumed.service WatchdogSec=5 2>/dev/null || true; "
        "mkdir -p /run/systemd/system/volumed.service.d; "
        "printf '[Service]\\nWatchdogSec=5\\n' > /run/systemd/system/volumed.service.d/watchdog.conf; "
        "systemctl daemon-reload; systemctl restart volumed.service; "
        "kill -STOP $(systemctl show -P MainPID volumed.service)",
    }
    for way, script in ways.items():
        before = main_pid(installed)
        installed.sh(script.replace("MAINPID", str(before)))
        installed.sh(
            f"for i in $(seq 300); do p=$(systemctl show -P MainPID volumed.service);"
            f" [ $p != 0 ] && [ $p != {before} ] && [ $(systemctl is-active volumed.service) = active ] && exit 0;"
            " sleep 0.2; done; exit 1",
            timeout=120,
        )
        assert installed.sh(f"cat {path}/file").strip() == "kept", way
        if way == "hangs":
            installed.sh(
                "for i in $(seq 300); do systemctl show -P NRestarts volumed.service | grep -qv '^0$' &&"
                " [ $(systemctl is-active volumed.service) = active ] && exit 0; sleep 0.2; done; exit 1"
            )
    installed.sh("rm /run/systemd/system/volumed.service.d/watchdog.conf; systemctl daemon-reload")
    unmount(installed, "data")
    assert installed.sh("losetup -a; ls /var/lib/volumed/mounts /var/lib/volumed/images").split() == [
        "/var/lib/volumed/images:",
        "/var/lib/volumed/mounts:",
    ]


def test_a_wrong_setting_is_told_and_not_tried_again(installed: Machine) -> None:
    installed.sh("sed -i 's/^default-backends/defualt-backends/' /etc/volumed/volumed.toml")
    installed.sh("systemctl restart volumed.service", check=False)
    said = installed.sh("journalctl -b --no-pager -u volumed.service", check=False)
    assert re.search(r"volumed\.toml:\d+: .*defualt-backends.*did you mean 'default-backends'", said)
    assert installed.sh("systemctl is-failed volumed.service", check=False).strip() == "failed"
    installed.sh("sed -i 's/^defualt-backends/default-backends/' /etc/volumed/volumed.toml")
    installed.sh("systemctl reset-failed 'volumed*'; systemctl start volumed.service")


def test_ext4_grows_under_its_container(installed: Machine) -> None:
    """Here root has CAP_SYS_RESOURCE, and so has the unit."""
    path = mount(installed, "data", size="64m")
    installed.sh(f"echo kept > {path}/file; volumectl expand data 256m")
    assert int(installed.sh(f"df -k --output=size {path} | tail -1")) > 200_000
    assert installed.sh(f"cat {path}/file").strip() == "kept"
    unmount(installed, "data")


def test_the_unit_is_as_closed_as_mounting_allows(installed: Machine) -> None:
    assert installed.sh("systemd-analyze verify /etc/systemd/system/volumed*.service 2>&1") == ""
    told = installed.sh("systemd-analyze security --no-pager volumed.service | tail -1", check=False)
    exposure = re.search(r"(\d+\.\d)", told)
    assert exposure, told
    assert float(exposure[1]) <= 6.9  # of 10; most of the rest would need another mount namespace


def test_shutdown_unmounts_in_order(installed: Machine) -> None:
    """After a power-off the file system of a mounted volume is clean, its last bytes in it."""
    path = mount(installed, "data", size="64m")
    installed.sh(f"echo 'last words' > {path}/file")  # not synced: a clean unmount must do that
    installed.sh("systemctl -q disable volumed.service")
    installed.power_off()
    installed.boot()
    installed.sh("systemctl stop volumed-docker.socket volumed-admin.socket volumed.service", check=False)
    (image,) = installed.sh("ls /var/lib/volumed/images/*.img").split()
    assert "needs_recovery" not in installed.sh(f"dumpe2fs -h {image} 2>/dev/null")
    assert installed.sh(f"debugfs -R 'cat /file' {image} 2>/dev/null") == "last words\n"
