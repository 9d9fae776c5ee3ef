"""The plugin's socket, byte by byte: what dockerd sends, what it never would, and callers that go away."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import wait_until
from tests.harness.volumed import Volumed
from volumed.host.mounts import is_mountpoint
from volumed.unix_http import UnixConnection

pytestmark = pytest.mark.root

ENDPOINTS = ("Create", "Get", "List", "Path", "Remove", "Mount", "Unmount", "Capabilities")


def raw(volumed: Volumed, path: str, body: bytes, *, method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = UnixConnection(volumed.plugin_socket, timeout=60)
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    read = answer.read()
    connection.close()
    return answer.status, json.loads(read)


def test_handshake(volumed: Volumed) -> None:
    assert raw(volumed, "/Plugin.Activate", b"") == (200, {"Implements": ["VolumeDriver"]})
    assert raw(volumed, "/VolumeDriver.Capabilities", b"{}") == (200, {"Capabilities": {"Scope": "local"}})


def test_every_body_that_dockerd_sends(volumed: Volumed) -> None:
    assert volumed.plugin("Get", Name="data").error == "volume data: there is no such volume"
    assert volumed.plugin("Create", Name="data", Opts=None) == (200, {"Err": ""})
    got = volumed.plugin("Get", Name="data").body["Volume"]
    assert got["Name"] == "data"
    assert got["Mountpoint"] == ""
    assert got["CreatedAt"].endswith("Z")
    assert got["Status"]["used by"] == []
    path = volumed.plugin("Mount", Name="data", ID="a" * 64).body["Mountpoint"]
    assert is_mountpoint(Path(path))
    assert volumed.plugin("Path", Name="data").body == {"Mountpoint": path, "Err": ""}
    assert volumed.plugin("List").body == {"Volumes": [{"Name": "data", "Mountpoint": path}], "Err": ""}
    assert "is in use by" in volumed.plugin("Remove", Name="data").error
    assert volumed.plugin("Unmount", Name="data", ID="b" * 64).status == 500
    assert volumed.plugin("Unmount", Name="data", ID="a" * 64) == (200, {"Err": ""})
    assert volumed.plugin("Remove", Name="data") == (200, {"Err": ""})
    volumed.assert_nothing_left()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b"{",
        b"not json",
        b"\xff\xfe",
        b'{"Name": 5}',
        b'{"Name": "x", "Opts": {"size": 5}}',
        b'{"Name": "x", "Opts": []}',
        b'{"Name": null}',
        b"[" * 100_000,
        b'{"Name":' * 50_000,
        b'{"Name": "a\\u0000b"}',
        b'{"Name": "../../etc"}',
        b'{"Name": "' + b"x" * 300 + b'"}',
        b'{"Name": "\xc3\xbc"}',
        b'{"Name": "\\ud800"}',
    ],
)
def test_bodies_that_are_wrong_are_refused_and_change_nothing(volumed: Volumed, body: bytes) -> None:
    for endpoint in ("Create", "Remove", "Mount", "Unmount", "Get", "Path"):
        status, answer = raw(volumed, f"/VolumeDriver.{endpoint}", body)
        assert status in (400, 500)
        assert answer["Err"]
        assert "bug" not in answer["Err"]
    volumed.assert_nothing_left()


def test_ten_megabytes_are_refused(volumed: Volumed) -> None:
    status, answer = raw(volumed, "/VolumeDriver.Create", b'{"Name": "' + b"x" * 10_000_000 + b'"}')
    assert status == 413
    assert "more than 1048576 bytes" in answer["Err"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/VolumeDriver.List"), ("POST", "/nonesuch"), ("POST", "/../etc/passwd")]
)
def test_what_is_not_in_the_protocol(volumed: Volumed, method: str, path: str) -> None:
    status, answer = raw(volumed, path, b"{}", method=method)
    assert status in (400, 500)
    assert answer["Err"]


@given(endpoint=st.sampled_from(ENDPOINTS), body=st.binary(max_size=200))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(volumed: Volumed, endpoint: str, body: bytes) -> None:
    status, answer = raw(volumed, f"/VolumeDriver.{endpoint}", body)
    assert status in (200, 400, 500)
    assert "bug" not in answer.get("Err", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


@given(
    endpoint=st.sampled_from(ENDPOINTS),
    name=st.text(max_size=20) | JSON,
    mount_id=st.text(max_size=20) | JSON,
    options=st.dictionaries(
        st.sampled_from(["size", "fs", "uid", "gid", "mode", "from", "backend", "label.a", "mount-options"])
        | st.text(max_size=8),
        st.text(max_size=10) | JSON,
        max_size=3,
    ),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fields(volumed: Volumed, endpoint: str, name: object, mount_id: object, options: object) -> None:
    body = json.dumps({"Name": name, "ID": mount_id, "Opts": options}).encode()
    status, answer = raw(volumed, f"/VolumeDriver.{endpoint}", body)
    assert status in (200, 400, 500)
    assert "bug" not in answer.get("Err", "")
    if endpoint == "Create" and status == 200:
        assert volumed.plugin("Remove", Name=name).error == ""


def test_garbage_on_the_socket_harms_nobody(volumed: Volumed) -> None:
    for garbage in (b"\0" * 1000, b"GET", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"\x16\x03\x01" * 50):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(volumed.plugin_socket))
            client.sendall(garbage)
    assert volumed.plugin("List").status == 200


def test_a_caller_that_is_gone_holds_nothing(volumed: Volumed) -> None:
    """The answer to a Mount that nobody waits for any more: no Unmount will ever come for it."""
    assert volumed.plugin("Create", Name="data", Opts={"size": "64m"}).error == ""
    before = mounts_answered(volumed)
    body = json.dumps({"Name": "data", "ID": "gone"}).encode()
    for _ in range(5):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(volumed.plugin_socket))
        client.sendall(b"POST /VolumeDriver.Mount HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        client.close()
    wait_until(lambda: mounts_answered(volumed) == before + 5)
    wait_until(lambda: volumed.bindings() == [] and volumed.mounted() == {} and volumed.loops() == [])
    assert volumed.plugin("Remove", Name="data").error == ""


def mounts_answered(volumed: Volumed) -> int:
    connection = UnixConnection(volumed.admin_socket, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    line = re.search(r'volumed_request_seconds_count{endpoint="Mount",frontend="docker",outcome="ok"} (\S+)', text)
    return int(float(line[1])) if line else 0


def test_many_connections_at_once(volumed: Volumed) -> None:
    failures: list[Exception] = []

    def use(number: int) -> None:
        try:
            name = f"many-{number}"
            steps: tuple[tuple[str, dict[str, Any]], ...] = (
                ("Create", {}),
                ("Mount", {"ID": "x"}),
                ("Unmount", {"ID": "x"}),
                ("Remove", {}),
            )
            for endpoint, fields in steps:
                answer = volumed.plugin(endpoint, Name=name, **fields)
                assert answer.error == "", answer
        except (AssertionError, OSError, http.client.HTTPException) as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    volumed.assert_nothing_left()


def test_the_sockets_are_private(volumed: Volumed) -> None:
    for path in (volumed.plugin_socket, volumed.admin_socket):
        assert path.stat().st_mode & 0o777 == 0o600
