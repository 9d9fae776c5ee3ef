"""The admin API, held to its own OpenAPI description, and what that cannot say."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.harness.volumed import ApiError, Volumed
from volumed.unix_http import UnixConnection

pytestmark = pytest.mark.root


def raw(
    volumed: Volumed, method: str, path: str, body: bytes | None = None, *, headers: dict[str, str] | None = None
) -> tuple[int, Any, Any]:
    connection = UnixConnection(volumed.admin_socket, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers={"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
        shown = json.loads(data) if "json" in (answer.headers["content-type"] or "") and data else data
        return answer.status, shown, answer.headers


def test_an_error_has_one_shape(volumed: Volumed) -> None:
    for method, path, body, status, code in (
        ("GET", "/v1/volumes/none", None, 404, "not_found"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("PUT", "/v1/volumes", None, 405, "invalid_request"),
        ("POST", "/v1/volumes", b"{}", 400, "invalid_request"),
        ("POST", "/v1/volumes", b"not json", 400, "invalid_request"),
        ("POST", "/v1/volumes", b"[" * 100_000, 400, "invalid_request"),
        ("POST", "/v1/volumes", b'{"name": "a", "sise": 1}', 400, "invalid_request"),
        ("POST", "/v1/volumes", b'{"name": "a", "size": "ten"}', 400, "invalid_request"),
        ("POST", "/v1/volumes", b'{"name": "a/b"}', 400, "invalid_request"),
        ("POST", "/v1/volumes", b'{"name": "a", "size": -1}', 400, "invalid_request"),
        ("POST", "/v1/volumes", b'{"name": "a", "size": 1e30}', 400, "invalid_request"),
        ("POST", "/v1/volumes", b'{"name": "' + b"a" * 2_000_000 + b'"}', 413, "invalid_request"),
        ("GET", "/v1/volumes?limit=0", None, 400, "invalid_request"),
    ):
        got, answer, headers = raw(volumed, method, path, body)
        assert (got, answer["code"]) == (status, code), (path, answer)
        assert set(answer) == {"code", "message", "subject", "hint", "retry_after", "request_id"}
        assert answer["message"]
        assert headers["x-request-id"] == answer["request_id"]
    volumed.assert_nothing_left()


def test_the_callers_request_id_leads_through_the_log(volumed: Volumed) -> None:
    _, _, headers = raw(
        volumed, "POST", "/v1/volumes", b'{"name": "traced", "size": "64m"}', headers={"X-Request-Id": "my-id-1"}
    )
    assert headers["x-request-id"] == "my-id-1"
    lines = [line for line in volumed.log().splitlines() if "[my-id-1]" in line]
    assert any("mkfs.ext4" in line for line in lines)
    assert any("traced: created" in line for line in lines)
    volumed.api.delete("volumes", "traced")
    _, _, headers = raw(volumed, "GET", "/v1/version", headers={"X-Request-Id": "forged] line"})
    assert headers["x-request-id"] != "forged] line"


def test_pages(volumed: Volumed) -> None:
    for number in range(5):
        volumed.api.post("volumes", body={"name": f"v{number}"})
    seen, after = [], ""
    while True:
        page = volumed.api.get("volumes", after=after, limit=2)
        seen += [volume["name"] for volume in page["volumes"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert sorted(seen) == [f"v{number}" for number in range(5)]
    for name in seen:
        volumed.api.delete("volumes", name)


def test_names_that_look_like_addresses(volumed: Volumed) -> None:
    for name in ("..", "../bindings", "a/../../version", "%2e%2e", "?x=1", "#"):
        with pytest.raises(ApiError) as refused:
            volumed.api.get("volumes", name)
        assert refused.value.code == "not_found"


def test_events_are_followed_and_end_with_the_daemon(tmp_path: Path) -> None:
    from tests.harness.volumed import running_volumed  # noqa: PLC0415

    with running_volumed(tmp_path) as volumed:
        volumed.api.post("volumes", body={"name": "before"})
        lines = volumed.api.lines("events", follow=True)
        assert next(lines)["subject"] == "before"
        volumed.api.post("volumes", body={"name": "after"})
        assert next(lines)["subject"] == "after"
        assert volumed.stop() == 0
        with contextlib.suppress(OSError):
            assert list(lines) == []


def test_metrics(volumed: Volumed) -> None:
    volumed.api.post("volumes", body={"name": "measured", "size": "64m"})
    volumed.plugin("Mount", Name="measured", ID="m")
    _, text, headers = raw(volumed, "GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = text.decode().splitlines()
    for line in (
        'volumed_volumes{backend="sized"} 1.0',
        'volumed_provisioned_bytes{backend="sized"} 6.7108864e+07',
        'volumed_bindings{engine="docker"} 1.0',
        "volumed_mounted_volumes 1.0",
        'volumed_backend_up{backend="local",driver="directory"} 1.0',
        "volumed_stuck_operations 0.0",
        "volumed_missing_mounts 0.0",
    ):
        assert line in lines, line
    assert any(line.startswith('volumed_operation_seconds_count{kind="create",outcome="done"}') for line in lines)
    assert any('endpoint="Mount",frontend="docker",outcome="ok"' in line for line in lines)
    volumed.plugin("Unmount", Name="measured", ID="m")
    volumed.api.delete("volumes", "measured")


def test_metrics_are_all_documented(volumed: Volumed) -> None:
    from volumed.core.metrics import METRICS  # noqa: PLC0415

    _, text, _ = raw(volumed, "GET", "/metrics")
    shown = {line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")}
    names = {metric.name.removesuffix("_total") for metric in METRICS}
    assert {name.removesuffix("_total") for name in shown} <= names


def test_a_slow_reader_of_events_holds_nobody_up(volumed: Volumed) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(volumed.admin_socket))
        client.sendall(b"GET /v1/events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
        for number in range(20):
            volumed.api.post("volumes", body={"name": f"s{number}"})
            volumed.api.delete("volumes", f"s{number}")
    wait_until(lambda: volumed.api.get("version")["version"])


def test_it_is_what_its_description_says(tmp_path: Path) -> None:
    """schemathesis sends what the OpenAPI description allows and what it does not, and compares the answers."""
    from tests.harness.volumed import running_volumed  # noqa: PLC0415

    test = tmp_path / "test_fuzz.py"
    test.write_text(FUZZ)
    with running_volumed(tmp_path / "v") as volumed:
        told = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", test],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "ADMIN_SOCKET": str(volumed.admin_socket)},
        )
        assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]
        assert "a bug" not in volumed.log(), volumed.log()[-4000:]


FUZZ = """
import os
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error, response_schema_conformance, status_code_conformance
import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
import socket

class Connection(HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(os.environ["ADMIN_SOCKET"])

class Pool(HTTPConnectionPool):
    ConnectionCls = Connection

class Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        return Pool("localhost")

session = requests.Session()
session.mount("http://volumed", Adapter())
schema = schemathesis.openapi.from_dict(session.get("http://volumed/openapi.json").json())
schema.config.base_url = "http://volumed" if hasattr(schema.config, "base_url") else None
schema = schema.exclude(path_regex="events|metrics")

@schema.parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_api(case):
    answer = case.call(session=session, base_url="http://volumed")
    case.validate_response(answer, checks=[response_schema_conformance, not_a_server_error])
"""
