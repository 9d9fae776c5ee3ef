"""The admin app, built when it is first asked for: FastAPI takes a quarter of a second to import, and a start that
containers wait for should not pay for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from volumed.core.core import Core
from volumed.migration.migrations import Migrations

ASGIApp = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class LazyApp:
    def __init__(self, core: Core, migrations: Migrations) -> None:
        self._core = core
        self._migrations = migrations
        self._lock = threading.Lock()
        self._app: ASGIApp | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        app = self._app
        if app is None:
            app = await asyncio.to_thread(self._build)
        await app(scope, receive, send)

    def _build(self) -> ASGIApp:
        with self._lock:
            app = self._app
            if app is None:
                from volumed.frontends.admin.app import create_app  # noqa: PLC0415 (late on purpose)

                app = self._app = create_app(self._core, self._migrations)
            return app
