"""The admin API as volumectl sees it: JSON over a unix socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from volumed.unix_http import UnixConnection

DEFAULT_SOCKET = Path("/run/volumed/admin.sock")
PATIENCE = 630.0  # a little more than the daemon's own bound on a request


class ApiError(Exception):
    """An answer that is an error, or no answer at all (`unreachable`)."""

    def __init__(self, code: str, message: str, *, subject: str = "", hint: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.subject = subject
        self.hint = hint
        self.request_id = request_id


class Client:
    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, *segments: str, **query: Any) -> Any:
        return self._call("GET", segments, query, None)

    def post(self, *segments: str, body: Any = None, **query: Any) -> Any:
        return self._call("POST", segments, query, {} if body is None else body)

    def delete(self, *segments: str, **query: Any) -> Any:
        return self._call("DELETE", segments, query, None)

    def lines(self, *segments: str, **query: Any) -> Iterator[Any]:
        """An answer that is one JSON object a line, as they come."""
        connection, answer = self._send("GET", segments, query, None)
        with contextlib.closing(connection):
            for line in answer:
                if line.strip():
                    yield json.loads(line)

    def _call(self, method: str, segments: tuple[str, ...], query: dict[str, Any], body: Any) -> Any:
        connection, answer = self._send(method, segments, query, body)
        with contextlib.closing(connection):
            data = answer.read()
            return json.loads(data) if data else None

    def _send(
        self, method: str, segments: tuple[str, ...], query: dict[str, Any], body: Any
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Each segment is quoted: what somebody types never becomes another address."""
        target = "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
        asked = {key: str(value).lower() if isinstance(value, bool) else value for key, value in query.items()}
        if asked:
            target += "?" + urlencode(asked)
        data = None if body is None else json.dumps(body)
        connection = UnixConnection(self._path, timeout=PATIENCE)
        try:
            connection.request(method, target, body=data, headers={"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
        except OSError as error:
            connection.close()
            raise _unreachable(self._path, error) from None
        except http.client.HTTPException as error:
            connection.close()
            raise ApiError(
                "unreachable",
                f"the daemon at {self._path} ended in the middle of the request ({type(error).__name__})",
                hint="look at what became of it with the same command, or see `journalctl -u volumed`",
            ) from None
        if answer.status >= 400:
            with contextlib.closing(connection):
                raise _error(answer.status, answer.read())
        return connection, answer


def joined(call: Callable[[], Any], *, patience: float = PATIENCE) -> Any:
    """The call's answer; while the daemon says that such work is under way already, it is asked again."""
    ends = time.monotonic() + patience
    while True:
        try:
            return call()
        except ApiError as error:
            if error.code != "operation_pending" or time.monotonic() > ends:
                raise
        time.sleep(0.5)


def _unreachable(path: Path, error: OSError) -> ApiError:
    if isinstance(error, PermissionError):
        return ApiError("permission_denied", f"you may not use {path}", hint="use sudo, or join the socket's group")
    return ApiError(
        "unreachable",
        f"no daemon answers at {path}: {error.strerror or error}",
        hint="start it with `systemctl start volumed`, or name its socket with --socket",
    )


def _error(status: int, data: bytes) -> ApiError:
    try:
        told = json.loads(data)
        return ApiError(
            told["code"],
            told["message"],
            subject=told.get("subject", ""),
            hint=told.get("hint", ""),
            request_id=told.get("request_id", ""),
        )
    except (ValueError, KeyError, TypeError):
        return ApiError("internal", f"the daemon answered {status}: {data[:200]!r}")
