"""Processes that outlive the daemon: started once, found again by whoever comes after, ended to the last child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.conftest import wait_until
from volumed import redact
from volumed.errors import CommandFailed
from volumed.host import helpers
from volumed.host.linux import LinuxHost

pytestmark = pytest.mark.root

STARTER = """
import sys, time
from pathlib import Path
from volumed.host.linux import LinuxHost
host = LinuxHost(Path(sys.argv[1]))
print(host.start_helper("fuse-v1", ["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def host(tmp_path: Path) -> LinuxHost:
    return LinuxHost(tmp_path)


@pytest.fixture(autouse=True)
def _none_left(host: LinuxHost) -> object:
    yield
    for helper in host.helpers(""):
        host.stop_helper(helper.name)


def lives(pid: int) -> bool:
    return helpers.born(pid) is not None


def test_it_outlives_a_killed_starter_and_is_found_again(tmp_path: Path, host: LinuxHost) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, tmp_path], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    starter.stdout.close()
    found = host.helper("fuse-v1")
    assert found is not None
    assert (found.pid, found.argv, found.running) == (pid, ("sleep", "600"), True)
    assert host.start_helper("fuse-v1", ["sleep", "600"]).pid == pid
    assert [each.pid for each in host.helpers("fuse-")] == [pid]
    assert host.helpers("other") == []
    host.stop_helper("fuse-v1")
    assert not lives(pid)
    assert host.helper("fuse-v1") is None
    host.stop_helper("fuse-v1")


def test_a_starter_killed_before_it_wrote_the_record_starts_nothing(tmp_path: Path) -> None:
    """Or a process that nobody knows of would hold the mount for ever."""
    marker = tmp_path / "ran"
    killed = """
import os, signal, sys
from pathlib import Path
import msgspec
from volumed.host.linux import LinuxHost
msgspec.json.encode = lambda record: os.kill(os.getpid(), signal.SIGKILL)
LinuxHost(Path(sys.argv[1])).start_helper("one", ["sh", "-c", f"touch {sys.argv[2]}; sleep 600"])
"""
    child = subprocess.Popen([sys.executable, "-c", killed, tmp_path, marker])
    assert child.wait(30) == -signal.SIGKILL
    time.sleep(0.3)
    assert not marker.exists()
    assert subprocess.run(["pgrep", "-f", f"touch {marker}"], capture_output=True, check=False).stdout == b""


def test_one_that_ends_is_no_zombie_and_not_running(host: LinuxHost) -> None:
    started = host.start_helper("one", ["sh", "-c", "echo what went wrong >&2; exit 3"])
    wait_until(lambda: not (host.helper("one") or started).running)
    wait_until(lambda: host.helper("one") and not Path(f"/proc/{started.pid}").exists())
    assert host.helper_log("one") == "what went wrong"
    again = host.start_helper("one", ["sleep", "600"])
    assert again.running
    assert again.pid != started.pid


def test_a_pid_that_somebody_else_has_by_now_is_not_ours(tmp_path: Path, host: LinuxHost) -> None:
    started = host.start_helper("one", ["sleep", "600"])
    place = tmp_path / "helpers" / "one" / "process"
    record = msgspec.json.decode(place.read_bytes())
    for wrong in ({"born": record["born"] + 1}, {"boot": "of another boot"}):
        place.write_bytes(msgspec.json.encode({**record, **wrong}))
        found = host.helper("one")
        assert found is not None
        assert not found.running
        host.stop_helper("one")
        assert lives(started.pid)
        place.parent.mkdir()
        place.write_bytes(msgspec.json.encode(record))


def test_a_record_that_was_cut_short_is_none(tmp_path: Path, host: LinuxHost) -> None:
    place = tmp_path / "helpers" / "one"
    place.mkdir(parents=True)
    (place / "process").write_bytes(b'{"pid": 1')
    (tmp_path / "helpers" / "not a name").mkdir()
    assert host.helper("one") is None
    assert host.helpers("") == []


def test_all_it_started_ends_with_it_though_it_does_not_want_to(tmp_path: Path, host: LinuxHost) -> None:
    child = tmp_path / "child"
    host.start_helper("one", ["sh", "-c", f"trap '' TERM; sleep 600 & echo $! > {child}; wait; wait"])
    wait_until(lambda: child.exists() and child.read_text())
    host.stop_helper("one", timeout=0.2)
    wait_until(lambda: not lives(int(child.read_text())))


def test_two_that_ask_at_once_get_one_process(host: LinuxHost) -> None:
    with ThreadPoolExecutor(8) as pool:
        started = list(pool.map(lambda _: host.start_helper("one", ["sleep", "600"]).pid, range(8)))
    assert len(set(started)) == 1


def test_daemons_do_not_see_one_anothers(tmp_path: Path, host: LinuxHost) -> None:
    other = LinuxHost(tmp_path / "other")
    host.start_helper("one", ["sleep", "600"])
    assert other.helper("one") is None


def test_its_log_is_bounded_and_goes_on(host: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "LOG_LIMIT", 10_000)
    monkeypatch.setattr(helpers, "LOG_KEPT", 1_000)
    host.start_helper("one", ["sh", "-c", "seq 5000; read -r line; sleep 0.5; while sleep 0.05; do echo on; done"])
    wait_until(lambda: "5000" in host.helper_log("one"))
    assert [helper.name for helper in host.helpers("")] == ["one"]
    assert len(host.helper_log("one", limit=100_000)) <= 1_000 + 200
    wait_until(lambda: host.helper_log("one").endswith("on"))
    assert "5000" in host.helper_log("one")
    assert "\0" not in host.helper_log("one")


def test_its_world_is_small_and_holds_what_it_is_given(host: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "hunter2")
    redact.register("the-secret-key")
    host.start_helper("one", ["env"], env={"AWS_SECRET_ACCESS_KEY": "the-secret-key"})
    wait_until(lambda: "PATH=" in host.helper_log("one"))
    said = host.helper_log("one")
    assert "INHERITED" not in said
    assert "AWS_SECRET_ACCESS_KEY=***" in said
    assert os.getpgid(0) != host.start_helper("two", ["sleep", "600"]).pid


def test_what_is_not_installed(host: LinuxHost) -> None:
    with pytest.raises(CommandFailed, match="no-such-client is not installed"):
        host.start_helper("one", ["no-such-client", "-f"])
    assert host.helper("one") is None


@pytest.mark.parametrize("name", ["", "-x", "../x", "a/b", "a b", "a\n", "a.b", "ä", "x" * 201])
def test_names_that_could_be_something_else_are_refused(host: LinuxHost, name: str) -> None:
    with pytest.raises(ValueError, match="no name of a helper"):
        host.start_helper(name, ["sleep", "600"])
