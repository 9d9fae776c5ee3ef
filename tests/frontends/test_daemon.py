"""The daemon as a program: what it refuses to start with, what it says, and how it ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.harness.csi import calling
from tests.harness.volumed import Volumed, running_volumed

pytestmark = pytest.mark.root


def daemon(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "volumed.daemon", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, **environment},
    )


def test_a_damaged_ledger_is_refused_and_it_says_what_to_do(tmp_path: Path) -> None:
    with running_volumed(tmp_path / "v") as volumed:
        volumed.stop()
        ledger = volumed.state / "ledger.db"
        ledger.write_bytes(b"not a ledger" * 1000)
        told = daemon("--config", volumed.config)
        assert told.returncode == 78
        assert f"{ledger}: the ledger cannot be read" in told.stderr
        assert "backup" in told.stderr
        assert "Traceback" not in told.stderr
        assert ledger.read_bytes() == b"not a ledger" * 1000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[backends.a]\ndriver = "directroy"\n', "there is no driver 'directroy'"),
        (
            '[backends.a]\ndriver = "directory"\npaht = "/x"\n',
            "volumed.toml:5: backend a: there is no option 'paht'. did you mean 'path'?",
        ),
        ("[backends.a]\ndriver = 'directory'\npath = 5\n", "volumed.toml:5: backend a: option 'path'"),
        ("nonsense = 1\n", "volumed.toml:3: there is no key 'nonsense'"),
    ],
)
def test_wrong_settings_are_told_with_their_line(tmp_path: Path, text: str, told: str) -> None:
    config = tmp_path / "volumed.toml"
    config.write_text(f'state-dir = "{tmp_path}/s"\nruntime-dir = "{tmp_path}/r"\n{text}')
    answer = daemon("--config", config)
    assert answer.returncode == 78
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr


def test_two_daemons_do_not_share_a_ledger(tmp_path: Path) -> None:
    with running_volumed(tmp_path / "v") as volumed:
        told = daemon("--config", volumed.config)
        assert told.returncode == 78
        assert f"another volumed uses this ledger (pid {volumed.pid})" in told.stderr
        assert volumed.plugin("List").status == 200


def test_a_socket_of_somebody_who_answers_is_not_taken(tmp_path: Path) -> None:
    with running_volumed(tmp_path / "a") as first:
        second = Volumed(_made(tmp_path / "b"), plugin_socket=first.plugin_socket)
        told = daemon("--config", second.config)
        assert told.returncode == 78
        assert "another daemon answers there" in told.stderr
        assert first.plugin("List").status == 200


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_not_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    told = subprocess.run(
        ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-m", "volumed.daemon"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert told.returncode == 78, told.stderr
    assert "must run as root" in told.stderr
    assert "volumed --root ./try" in told.stderr


@pytest.mark.parametrize("form", ["unix://{}", "unix:{}", "{}"])
def test_it_listens_where_an_orchestrator_that_starts_it_says(tmp_path: Path, form: str) -> None:
    socket = tmp_path / "given" / "csi.sock"
    volumed = Volumed(_made(tmp_path / "v"))
    try:
        volumed.start(env={"CSI_ENDPOINT": form.format(socket)})
        wait_until(socket.exists)
        with calling(socket) as caller:
            assert caller.Probe().ready.value
    finally:
        volumed.clean_up()
    told = daemon("--config", volumed.config, CSI_ENDPOINT="tcp://127.0.0.1:9000")
    assert told.returncode == 78
    assert "CSI_ENDPOINT: 'tcp://127.0.0.1:9000' is no unix socket" in told.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_leaves_the_mounts(tmp_path: Path, number: signal.Signals) -> None:
    with running_volumed(tmp_path / "v") as volumed:
        volumed.plugin("Create", Name="data")
        volumed.plugin("Mount", Name="data", ID="x")
        os.kill(volumed.pid, number)
        assert volumed.wait_end() == 0
        assert "mounted volumes stay mounted" in volumed.log()
        assert not volumed.plugin_socket.exists()
        assert not volumed.admin_socket.exists()
        assert len(volumed.mounted()) == 1
        assert daemon("--config", volumed.config, "--unmount-all").returncode == 0
        assert volumed.mounted() == {}


def test_it_says_what_to_type_next(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "volumed.daemon", "--root", tmp_path / "try"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "VOLUMED_GREET": "1"},
    )
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(6)]
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 0
    assert f"{tmp_path}/try/run/admin.sock" in said[1]
    assert [line.split()[-2:] for line in said[3:]] == [
        ["create", "data"],
        [f"{tmp_path}/try/run/admin.sock", "ls"],
        [f"{tmp_path}/try/run/admin.sock", "doctor"],
    ]


PROGRESS = """
import time
from volumed.cli.output import Output
output = Output(as_json=False)
with output.waiting("copying data"):
    time.sleep({seconds})
"""


@pytest.mark.parametrize(("seconds", "shown"), [(1.6, True), (0.2, False)])
def test_work_over_a_second_shows_that_it_lives(seconds: float, shown: bool) -> None:
    """On a terminal, and there alone."""
    reader, writer = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRESS.format(seconds=seconds)],
        stdout=writer,
        stderr=writer,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(writer)
    said = b""
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        try:
            said += os.read(reader, 4096)
        except OSError:
            break
    child.wait()
    os.close(reader)
    assert (b"copying data" in said) is shown


def test_a_worker_that_hangs_does_not_hold_up_the_end() -> None:
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
from volumed.daemon import leave
ThreadPoolExecutor(1).submit(threading.Event().wait)
print("leaving")
leave(3)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert (told.returncode, told.stdout) == (3, "leaving\n")
