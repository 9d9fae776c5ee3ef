"""Planted secrets, and everything that volumed shows, keeps or starts searched for them.

Its backends talk to a server that tells all it is sent, in every way a program may print it: nothing of that may
appear in an answer, an event, a metric, the log at its loudest, the ledger or the arguments of a process.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import grpc
import pytest

from tests.harness.csi import calling, capability
from tests.harness.processes import command_lines
from tests.harness.volumed import Volumed

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

SECRETS = {
    "s3-access": "AKIAPLANTED0000000001",
    "s3-secret": 'pl4nted/s3+secret="quoted"&=',
    "ceph-key": "QVFEcGxhbnRlZGNlcGhrZXlwbGFudGVkY2VwaA==",
    "ebs-access": "AKIAPLANTED0000000002",
    "ebs-secret": "pl4nted/ebs+secret",
}
# Written where its place belongs, or given as an option: never accepted, never repeated.
MISPLACED = "pl4nted-in-the-wrong-place"


class _Teller(BaseHTTPRequestHandler):
    """Answers every request with an error that holds the secrets of whoever asks."""

    def _tell(self) -> None:
        kind = "s3" if "/s3/aws4_request" in str(self.headers.get("Authorization")) else "ebs"
        told = [form for name, secret in SECRETS.items() if name.startswith(kind) for form in forms(secret)]
        text = escape(" ".join(told))
        body = (
            f"<Error><Code>AccessDenied</Code><Message>{text}</Message></Error>"
            if kind == "s3"
            else "<Response><Errors><Error><Code>UnauthorizedOperation</Code>"
            f"<Message>{text}</Message></Error></Errors><RequestID>x</RequestID></Response>"
        ).encode()
        self.send_response(403)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _tell

    def log_message(self, format: str, *args: Any) -> None:
        pass


def forms(secret: str) -> list[str]:
    return [
        secret,
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
        html.escape(secret),
        urllib.parse.quote(secret, safe=""),
        base64.b64encode(secret.encode()).decode().rstrip("="),
    ]


@pytest.fixture(scope="module")
def teller() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Teller)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def volumed(tmp_path_factory: pytest.TempPathFactory, teller: str) -> Iterator[Volumed]:
    folder = tmp_path_factory.mktemp("v")
    places = folder / "secrets"
    places.mkdir()
    for name, secret in SECRETS.items():
        (places / name).write_text(f"{secret}\n")
    tables = f"""
[backends.objects]
driver = "s3"
endpoint = "{teller}"
access-key = "file:{places}/s3-access"
secret-key = "env:PLANTED_S3_SECRET"
[backends.ceph]
driver = "ceph-rbd"
pool = "rbd"
monitors = "127.0.0.1:1"
key = "file:{places}/ceph-key"
timeout = 2
[backends.cloud]
driver = "ebs"
region = "eu-west-1"
endpoint = "{teller}"
metadata-endpoint = "{teller}"
access-key = "file:{places}/ebs-access"
secret-key = "credential:ebs-secret"
"""
    env = {"PLANTED_S3_SECRET": SECRETS["s3-secret"], "CREDENTIALS_DIRECTORY": str(places)}
    volumed = Volumed(folder, backends=tables, csi='role = "all"\n')
    try:
        volumed.start(env=env)
        yield volumed
    finally:
        volumed.clean_up()


class Seen:
    """All that was shown, with where."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def add(self, where: str, what: object) -> None:
        if isinstance(what, subprocess.CompletedProcess):
            what = f"{what.stdout}{what.stderr}"
        self.texts.append((where, what if isinstance(what, str) else repr(what)))

    def assert_clean(self, *secrets: str) -> None:
        for secret in secrets:
            for form in forms(secret):
                assert not [where for where, text in self.texts if form in text], f"a secret shows: {form[:6]}..."


def test_nothing_that_volumed_shows_keeps_or_starts_holds_a_secret(volumed: Volumed) -> None:
    seen = Seen()
    arguments = _WatchArguments(seen)
    with arguments:
        for backend in ("objects", "ceph", "cloud"):
            options = {"backend": backend, "size": "1g"} if backend != "objects" else {"backend": backend}
            seen.add("Docker's Create", volumed.plugin("Create", Name=f"on-{backend}", Opts=options))
            seen.add("Docker's Mount", volumed.plugin("Mount", Name=f"on-{backend}", ID="x"))
            seen.add("create", volumed.ctl("create", f"other-{backend}", "--backend", backend, check=False))
            seen.add("backend inspect", volumed.ctl("backend", "inspect", backend, check=False))
            with calling(volumed.csi_socket) as csi:
                try:
                    csi.CreateVolume(
                        name=f"claim-{backend}", volume_capabilities=[capability()], parameters={"backend": backend}
                    )
                except grpc.RpcError as error:
                    seen.add("CSI's CreateVolume", str(error))
        time.sleep(2)  # two rounds of the timer: probes, health
        for words in (("backend", "ls"), ("doctor",), ("ls",), ("-o", "json", "backend", "ls"), ("events",)):
            seen.add(" ".join(words), volumed.ctl(*words, check=False))
        for path in ("backends", "doctor", "volumes", "metrics", "openapi.json"):
            with contextlib.suppress(Exception):
                seen.add(path, volumed.api.get(path))
        seen.add("events", volumed.events())
    seen.add("the log", volumed.log())
    for file in (*volumed.state.glob("ledger*"), *(volumed.folder / "run").rglob("*")):
        if file.is_file():
            seen.add(str(file), file.read_bytes().decode("utf-8", "backslashreplace"))
    assert any("***" in text for _, text in seen.texts), "the servers' word never came here: nothing is proven"
    seen.assert_clean(*SECRETS.values())


class _WatchArguments:
    """What `ps` of anybody on the machine would show meanwhile."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        known: set[bytes] = set()
        while not self._stop.wait(0.01):
            known.update(command_lines().values())
        self._seen.add("arguments of processes", b" ".join(known).decode("utf-8", "backslashreplace"))


@pytest.mark.parametrize("key", ["access-key", "secret-key"])
def test_a_secret_in_the_settings_is_refused_unsaid(volumed: Volumed, tmp_path: Path, key: str) -> None:
    table = f'[backends.objects]\ndriver = "s3"\naccess-key = "env:A"\nsecret-key = "env:B"\n{key} = "{MISPLACED}"\n'
    lines = table.splitlines()
    wrong = Volumed(tmp_path, backends="\n".join(line for line in lines if not line.startswith(f'{key} = "env')))
    wrong.start(wait=False)
    assert wrong.wait_end() == 78
    assert "say where the secret lies" in wrong.log()
    assert MISPLACED not in wrong.log()


def test_a_secret_given_as_an_option_is_not_kept(volumed: Volumed) -> None:
    seen = Seen()
    seen.add("Docker", volumed.plugin("Create", Name="careless", Opts={"secret-key": MISPLACED}))
    seen.add("volumectl", volumed.ctl("create", "careless", "--option", f"secret-key={MISPLACED}", check=False))
    seen.add("the log", volumed.log())
    for file in volumed.state.glob("ledger*"):
        seen.add(str(file), file.read_bytes().decode("utf-8", "backslashreplace"))
    seen.assert_clean(MISPLACED)
