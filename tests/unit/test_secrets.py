"""Credentials: read from where they are said to lie, bounded, and shown by nothing that people or programs read."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from volumed import redact
from volumed.core.events import Events
from volumed.core.options import read_options
from volumed.driver import Options, Secret
from volumed.driver.secret import read_secret
from volumed.errors import CommandFailed, ConfigError, InUse, InvalidRequest, VolumedError
from volumed.host.run import run
from volumed.logs import JsonFormatter, TextFormatter, fields_of


class _Options(Options):
    key: Secret


@pytest.mark.parametrize("written", ["hunter2hunter2", "file:relative", "env:", "credential:", "", "FILE:/x"])
def test_a_secret_written_in_place_of_its_place_is_refused_unsaid(written: str) -> None:
    with pytest.raises(InvalidRequest, match="say where the secret lies") as refused:
        read_options(_Options, {"key": written}, subject="backend one")
    assert "hunter2" not in str(refused.value)


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("  of a file\n")
    monkeypatch.setenv("KEY", "of the environment")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_secret(f"file:{tmp_path}/key", subject="x") == "of a file"
    assert read_secret("env:KEY", subject="x") == "of the environment"
    assert read_secret("credential:key", subject="x") == "of a file"
    assert read_secret("credential:../../key", subject="x") == "of a file"
    (tmp_path / "key").write_text("rotated")
    assert read_secret(f"file:{tmp_path}/key", subject="x") == "rotated"


def test_what_cannot_be_read_is_said_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd\xfc")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("abc")
    monkeypatch.setenv("EMPTY", "")
    for reference, reason in {
        f"file:{tmp_path}/none": "No such file",
        f"file:{tmp_path}": "Is a directory",
        f"file:{tmp_path}/pipe": "it is no file",
        "file:/dev/zero": "it is no file",
        f"file:{tmp_path}/binary": "is not text",
        f"file:{tmp_path}/empty": "is empty",
        f"file:{tmp_path}/short": "fewer than 4",
        "env:EMPTY": "env:EMPTY is not set",
        "env:NONE": "env:NONE is not set",
        "credential:..": "Is a directory|No such file",
    }.items():
        with pytest.raises(ConfigError, match=reason) as failed:
            read_secret(reference, subject="backend one")
        assert failed.value.subject == "backend one"


SECRETS = [
    "plain-s3cret-AQBx",
    'with "quotes", \\ and \ttabs',
    "slash/plus+equals==&percent%",
    "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----",
    "ümlaut-pässword",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_nothing_shows_a_secret(secret: str) -> None:
    redact.register(secret)
    told = f"said: {secret}; {secret!r}; {json.dumps(secret)}"
    shown: list[str] = []
    for error in (
        VolumedError(told, subject=told, hint=told),
        InUse(told, holders=[told]),
        CommandFailed(told, returncode=1, stderr=told),
    ):
        shown += [str(error), repr(error), str(vars(error))]
    record = logging.LogRecord("volumed", logging.INFO, "", 1, "%s", (told,), None)
    record.volume = told
    record.exc_info = (RuntimeError, RuntimeError(told), None)
    shown += [TextFormatter().format(record), JsonFormatter().format(record), str(fields_of(record))]
    events = Events()
    events.publish("x", "data", told, detail=told)
    shown.append(str(events.recent()))
    with pytest.raises(CommandFailed) as failed:
        run(["sh", "-c", 'echo "$KEY" >&2; exit 1'], env={"KEY": secret})
    shown += [str(failed.value), failed.value.stderr]
    parts = [secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]]
    parts += [line for line in secret.splitlines() if "-----" not in line]
    for text in shown:
        assert not [part for part in parts if part in text]
        assert "***" in text


def test_a_secret_within_another_leaves_nothing_of_it() -> None:
    redact.register("inner-part")
    redact.register("outer-inner-part-outer")
    assert redact.blank("outer-inner-part-outer inner-part") == "*** ***"
