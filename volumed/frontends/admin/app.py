"""The admin API: REST with OpenAPI under /v1, and Prometheus' /metrics, on a unix socket. `volumectl` speaks it."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from volumed import __version__, context
from volumed.core.core import Core
from volumed.errors import InvalidRequest, VolumedError
from volumed.frontends.admin.migration import migration_routers
from volumed.frontends.admin.routes import routers
from volumed.frontends.admin.schemas import ErrorView
from volumed.frontends.statuses import status_of
from volumed.migration.migrations import Migrations

_log = logging.getLogger(__name__)

MAX_BODY = 1024 * 1024
TIMEOUT = 600.0  # an operator waits longer than an engine
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def create_app(core: Core, migrations: Migrations) -> ASGIApp:
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorView, "description": "An error"}}
    app = FastAPI(title="volumed", version=__version__, responses=errors, redoc_url=None)
    for router in (*routers(core), *migration_routers(migrations)):
        app.include_router(router)

    @app.get("/metrics", response_class=Response, tags=["health"])
    def metrics() -> Response:
        """Prometheus' text format."""
        return Response(core.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_exception_handler(VolumedError, _expected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)
    return Requests(app, core)


class Requests:
    """Around every request: its id, its deadline, the bound on its body, and its place in the metrics."""

    def __init__(self, app: ASGIApp, core: Core) -> None:
        self._app = app
        self._core = core
        self._sized = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if not self._sized:
            # One backend that hangs fills its own share, never all; threads are made as they are needed.
            anyio.to_thread.current_default_thread_limiter().total_tokens = self._core.backends.room + 32
            self._sized = True
        begun = time.perf_counter()
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identifier.encode())]
            await send(message)

        with context.request(_wanted_id(scope), timeout=TIMEOUT) as identifier:
            try:
                await self._app(scope, _Bounded(receive), sending)
            except Exception:  # answered and logged by `_bug`
                _log.debug("request ended with an error", exc_info=True)
            finally:
                route = scope.get("route")
                endpoint = f"{scope['method']} {route.path}" if route is not None else "unknown"
                self._core.metrics.request("admin", endpoint, str(status), time.perf_counter() - begun)


class _Bounded:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = MAX_BODY

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise HTTPException(413, f"the body has more than {MAX_BODY} bytes")
        return message


def _wanted_id(scope: Scope) -> str | None:
    """The caller's own, so that one id leads through the logs of both."""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            text = value.decode("latin-1")
            return text if _REQUEST_ID.fullmatch(text) else None
    return None


def _answer(status: int, error: ErrorView) -> JSONResponse:
    return JSONResponse(error.model_dump(), status_code=status)


async def _expected(_: Request, error: Exception) -> Response:
    assert isinstance(error, VolumedError)
    _log.info("refused: %s", error)
    return _answer(status_of(error).http, ErrorView.of(error, request_id=context.request_id.get()))


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    told = str(first["msg"]).removeprefix("Value error, ")
    text = f"{where}: {told}" if where else told
    body = ErrorView(code=InvalidRequest.code, message=text, request_id=context.request_id.get())
    return _answer(400, body)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "invalid_request"
    body = ErrorView(code=code, message=str(error.detail), request_id=context.request_id.get())
    answer = _answer(error.status_code, body)
    answer.headers.update(error.headers or {})
    return answer


async def _bug(_: Request, error: Exception) -> Response:
    identifier = context.request_id.get()
    _log.error("a bug", exc_info=error)
    text = f"a bug of volumed: see its log for request {identifier}"
    return _answer(500, ErrorView(code="internal", message=text, request_id=identifier))
