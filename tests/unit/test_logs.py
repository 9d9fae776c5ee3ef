from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

import pytest

from volumed import context, logs, notify


def record(message: str = "said", **fields: str) -> logging.LogRecord:
    made = logging.LogRecord("volumed.test", logging.WARNING, "file", 1, message, None, None)
    vars(made).update(fields)
    return made


def test_every_line_has_its_requests_id() -> None:
    with context.request("id-1"):
        assert "[id-1] said" in logs.TextFormatter().format(record())
        shown = json.loads(logs.JsonFormatter().format(record(volume="data")))
    assert (shown["request"], shown["volume"], shown["level"]) == ("id-1", "data", "warning")


def test_a_name_cannot_forge_a_line() -> None:
    assert "\n" not in logs.TextFormatter().format(record("a\n12:00:00 info [x] all is well"))
    assert "\n" not in logs.JsonFormatter().format(record("a\nb"))


def test_the_journals_protocol(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        handler = logs.JournalHandler(path)
        with context.request("id-1"):
            handler.emit(record("one", volume="data"))
            handler.emit(record("two\nlines"))
        one, two = journal.recv(65536), journal.recv(65536)
    assert b"MESSAGE=one\n" in one
    assert b"PRIORITY=4\n" in one
    assert b"VOLUMED_VOLUME=data\n" in one
    assert b"VOLUMED_REQUEST=id-1\n" in one
    assert b"MESSAGE\n" + (9).to_bytes(8, "little") + b"two\nlines\n" in two


def test_a_journal_that_is_away_does_not_stop_us(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.JournalHandler(str(tmp_path / "none")).emit(record())
    assert capsys.readouterr().err == "said\n"


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify.ready("serving")
        notify.stopping()
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1\nSTATUS=serving", b"STOPPING=1"]
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify.ready("nobody listens")


def test_sockets_of_systemd_are_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from volumed.frontends import activation  # noqa: PLC0415

    read, write = socket.socketpair()
    monkeypatch.setattr(activation, "FIRST", read.fileno())
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "docker")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert activation.inherited_sockets() == {}
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    found = activation.inherited_sockets()
    assert list(found) == ["docker"]
    assert not os.get_inheritable(found["docker"].fileno())
    assert "LISTEN_FDS" not in os.environ
    found["docker"].detach()
    read.close()
    write.close()
