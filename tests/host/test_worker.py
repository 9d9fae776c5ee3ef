"""A worker is asked, outlives a wrong question, and is given up when it does not answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from volumed.driver import Worker
from volumed.errors import DeadlineExceeded, HostError
from volumed.host import worker

_SCRIPT = """
import os, sys, time
for line in sys.stdin:
    word = line.strip()
    if word == "hang":
        time.sleep(1000)
    if word == "end":
        sys.exit("so it ends")
    print(os.getpid() if word == "pid" else word * 100_000, flush=True)
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    (tmp_path / "worker_under_test.py").write_text(_SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    made = worker.start("worker_under_test")
    yield made
    made.close()


def test_it_answers_one_line_for_each(asked: Worker) -> None:
    assert asked.ask("a", timeout=30) == "a" * 100_000 + "\n"  # more than a pipe holds
    assert asked.ask("b", timeout=30) == "b" * 100_000 + "\n"
    assert asked.alive


def test_one_that_does_not_answer_is_killed(asked: Worker) -> None:
    pid = int(asked.ask("pid", timeout=30))
    with pytest.raises(DeadlineExceeded):
        asked.ask("hang", timeout=0.2)
    assert not asked.alive
    assert not Path(f"/proc/{pid}").exists()


def test_what_it_printed_is_told_when_it_ends(asked: Worker) -> None:
    with pytest.raises(HostError, match="status 1: so it ends"):
        asked.ask("end", timeout=30)
    assert not asked.alive
    with pytest.raises(HostError, match="so it ends"):
        asked.ask("a", timeout=30)


def test_it_ends_when_the_daemon_dies(asked: Worker, tmp_path: Path) -> None:
    """A daemon that is killed closes nothing itself; the kernel closes the pipe for it."""
    child = os.fork()
    if child == 0:
        made = worker.start("worker_under_test")
        (tmp_path / "pid.new").write_text(made.ask("pid", timeout=30))
        (tmp_path / "pid.new").rename(tmp_path / "pid")
        time.sleep(1000)
    wait_until((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    os.kill(child, 9)
    os.waitpid(child, 0)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
