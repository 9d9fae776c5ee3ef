"""Docker's volume plugin protocol, version 1: eight POST endpoints with JSON bodies over a unix socket.

A lean ASGI app and not FastAPI: `docker volume ls` and every container's start wait for it. What it must bear is
measured in the tests of tests/engines: ids that repeat, Unmounts that never come, callers that are gone.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec

from volumed import context
from volumed.core.core import Core
from volumed.errors import InvalidRequest, NotFound, VolumedError
from volumed.frontends.docker.status import status_of_volume
from volumed.frontends.volume_options import read_create
from volumed.model import Engine, Volume

_log = logging.getLogger(__name__)

CONTENT_TYPE = b"application/vnd.docker.plugins.v1.2+json"
MAX_BODY = 1024 * 1024
# Docker waits 120 s for Create and Mount (settings.operation_timeout is below that) and 60 s for the rest.
SHORT_TIMEOUT = 50.0
# Podman 4.3.1 sends this id with every Mount and Unmount, whatever the container.
PODMAN_MOUNT_ID = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2"

_Scope = dict[str, Any]
_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class Request(msgspec.Struct, frozen=True, rename={"name": "Name", "mount_id": "ID", "options": "Opts"}):
    """Every body of the protocol; fields that an endpoint has no use for are absent."""

    name: str = ""
    mount_id: str = ""
    options: dict[str, str] | None = None


_decode = msgspec.json.Decoder(Request).decode
_encode = msgspec.json.Encoder().encode
Answer = dict[str, Any]
_Handler = Callable[[Request], Awaitable[Answer]]


class _Endpoint(NamedTuple):
    handler: _Handler
    timeout: float


class DockerApp:
    def __init__(self, core: Core) -> None:
        self._core = core
        # One backend that hangs fills its own share, never all; threads are made as they are needed.
        self._pool = ThreadPoolExecutor(core.backends.room + 32, thread_name_prefix="docker")
        self._endpoints: dict[str, _Endpoint] = {
            "/Plugin.Activate": _Endpoint(_answered(lambda _: {"Implements": ["VolumeDriver"]}), SHORT_TIMEOUT),
            "/VolumeDriver.Capabilities": _Endpoint(
                _answered(lambda _: {"Capabilities": {"Scope": "local"}}), SHORT_TIMEOUT
            ),
            "/VolumeDriver.Create": _Endpoint(self._on_thread(self._create), core.settings.operation_timeout),
            "/VolumeDriver.Get": _Endpoint(_answered(self._get), SHORT_TIMEOUT),
            "/VolumeDriver.List": _Endpoint(self._on_thread(self._list), SHORT_TIMEOUT),
            "/VolumeDriver.Path": _Endpoint(_answered(self._path), SHORT_TIMEOUT),
            "/VolumeDriver.Remove": _Endpoint(self._on_thread(self._remove), SHORT_TIMEOUT),
            "/VolumeDriver.Mount": _Endpoint(self._mount, core.settings.operation_timeout),
            "/VolumeDriver.Unmount": _Endpoint(self._unmount, SHORT_TIMEOUT),
        }

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        try:
            body = await _read_body(receive)
        except InvalidRequest as error:
            await _answer(send, 413, {"Err": str(error)})
            return
        status, answer, request = await self._handle(scope, path, body)
        if path == "/VolumeDriver.Mount" and status == 200 and await _is_gone(receive):
            await self._take_back(request)
            return
        await _answer(send, status, answer)

    def _on_thread(self, handler: Callable[[Request], Answer]) -> _Handler:
        async def run(request: Request) -> Answer:
            run_in = contextvars.copy_context().run
            return await asyncio.get_running_loop().run_in_executor(self._pool, run_in, handler, request)

        return run

    async def _handle(self, scope: _Scope, path: str, body: bytes) -> tuple[int, Answer, Request]:
        """The whole request, its errors as Docker shows them to people."""
        begun = time.perf_counter()
        name = path.rpartition(".")[2] if path in self._endpoints else "unknown"
        request = Request()
        with context.request() as identifier:
            outcome = "ok"
            try:
                endpoint = self._find(scope, path)
                request = _parse(body)
                with context.request(identifier, timeout=endpoint.timeout):
                    return 200, await endpoint.handler(request), request
            except VolumedError as error:
                outcome = error.code
                _log.info("%s refused: %s", name, error, extra={"endpoint": name})
                return _http_status(error), {"Err": str(error)}, request
            except Exception:
                outcome = "internal"
                _log.exception("%s failed", name, extra={"endpoint": name})
                text = f"a bug of volumed: see its log for request {identifier}"
                return 500, {"Err": text}, request
            finally:
                self._core.metrics.request("docker", name, outcome, time.perf_counter() - begun)

    def _find(self, scope: _Scope, path: str) -> _Endpoint:
        if scope["method"] != "POST":
            raise InvalidRequest(f"{scope['method']} is not part of the volume plugin protocol", hint="use POST")
        try:
            return self._endpoints[path]
        except KeyError:
            raise NotFound(f"there is no endpoint {path[:100]!r}") from None

    # The endpoints
    def _create(self, request: Request) -> Answer:
        known = self._core.volumes.known_options()
        self._core.volumes.create(read_create(request.name, request.options or {}, driver_options=known))
        return {"Err": ""}

    def _get(self, request: Request) -> Answer:
        """From the ledger and memory alone. An error here makes Docker believe that the volume does not exist, and
        put an empty local one in its place."""
        volume = self._core.volumes.get(request.name)
        return {"Volume": {**self._entry(volume), "Status": status_of_volume(self._core, volume)}, "Err": ""}

    def _entry(self, volume: Volume) -> Answer:
        return {
            "Name": volume.name,
            "Mountpoint": str(self._core.mounts.path(volume.id) or ""),
            "CreatedAt": f"{volume.created:%Y-%m-%dT%H:%M:%SZ}",
        }

    def _list(self, _: Request) -> Answer:
        mounted = self._core.mounts.mounted_ids()
        path = self._core.mounts.path
        return {
            "Volumes": [
                {"Name": name, "Mountpoint": str(path(volume_id) or "") if volume_id in mounted else ""}
                for name, volume_id in self._core.volumes.names()
            ],
            "Err": "",
        }

    def _path(self, request: Request) -> Answer:
        volume = self._core.volumes.get(request.name)
        return {"Mountpoint": str(self._core.mounts.path(volume.id) or ""), "Err": ""}

    def _remove(self, request: Request) -> Answer:
        self._core.volumes.remove(request.name)
        return {"Err": ""}

    async def _mount(self, request: Request) -> Answer:
        volume = self._core.volumes.get(request.name)
        pending = self._core.mounts.begin_acquire(volume, engine=_engine(request), mount_id=_mount_id(request))
        return {"Mountpoint": str(await pending.outcome()), "Err": ""}

    async def _unmount(self, request: Request) -> Answer:
        volume = self._core.volumes.get(request.name)
        await self._core.mounts.begin_release(volume, engine=_engine(request), mount_id=_mount_id(request)).outcome()
        return {"Err": ""}

    async def _take_back(self, request: Request) -> None:
        """The caller was gone before the answer: no Unmount will ever come for this mount."""
        with context.request(timeout=SHORT_TIMEOUT):
            try:
                await self._unmount(request)
            except VolumedError as error:
                _log.warning("volume %s: a mount nobody waited for stays for now: %s", request.name, error)


def _answered(handler: Callable[[Request], Answer]) -> _Handler:
    """A handler that reads the ledger alone: done sooner than it could be handed to a thread."""

    async def run(request: Request) -> Answer:
        return handler(request)

    return run


def _engine(request: Request) -> Engine:
    return Engine.PODMAN if request.mount_id == PODMAN_MOUNT_ID else Engine.DOCKER


def _mount_id(request: Request) -> str:
    if not request.mount_id or len(request.mount_id) > 255 or not request.mount_id.isprintable():
        raise InvalidRequest("the request has no usable ID", subject=f"volume {request.name[:100]}")
    return request.mount_id


def _parse(body: bytes) -> Request:
    if not body:
        return Request()
    try:
        return _decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not what the protocol says: {error}") from None


async def _read_body(receive: _Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY:
            parts.append(part)
        if not message.get("more_body"):
            break
    if size > MAX_BODY:
        raise InvalidRequest(f"the body has more than {MAX_BODY} bytes")
    return b"".join(parts)


async def _is_gone(receive: _Receive) -> bool:
    """Whether the caller hung up; never waits: where `receive` would, it is dropped."""
    await asyncio.sleep(0)  # what the socket has said is heard
    asking = receive().__await__()
    try:
        next(asking)
    except StopIteration as received:
        return bool(received.value["type"] == "http.disconnect")
    asking.close()
    return False


async def _answer(send: _Send, status: int, answer: Answer) -> None:
    body = _encode(answer)
    headers = [(b"content-type", CONTENT_TYPE), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _http_status(error: VolumedError) -> int:
    """Docker shows `Err` of any answer; it takes every status but 200 for an error, and 404 for an endpoint that is
    not there, which it must not believe."""
    return 400 if isinstance(error, InvalidRequest) else 500
