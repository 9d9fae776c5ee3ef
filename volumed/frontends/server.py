"""HTTP over a unix socket: uvicorn, several in one event loop, signals left to the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from volumed.errors import ConfigError

BACKLOG = 1024
SHUTDOWN_TIMEOUT = 5  # seconds for requests that run; what they began goes on by the journal


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The daemon has handlers of its own."""
        yield


class UnixServer:
    """An ASGI app on a socket that only root, or a named group, may use."""

    def __init__(self, app: Any, path: Path, *, group: str, inherited: socket.socket | None = None) -> None:
        self._path = path
        self._group = group
        self._inherited = inherited
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
            timeout_keep_alive=600,  # dockerd keeps its connections
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listening on return. Raises ConfigError when the socket cannot be made or belongs to somebody who answers."""
        listener = self._inherited or bind_private(self._path, group=self._group)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.001)
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        if self._inherited is None:
            self._path.unlink(missing_ok=True)


def bind_private(path: Path, *, group: str) -> socket.socket:
    """A listening socket that never was open to others: made under a private umask, then given to the group."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen there: {error.strerror}", subject=f"socket {path}") from None
    finally:
        os.umask(before)
    if group:
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except KeyError:
            listener.close()
            raise ConfigError(
                f"there is no group {group!r}", subject=f"socket {path}", hint=f"make it: groupadd --system {group}"
            ) from None
        path.chmod(0o660)
    listener.listen(BACKLOG)
    return listener


def remove_stale(path: Path) -> None:
    """What a daemon that was killed left; never the socket of one that answers, never what is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError("is there and is no socket", subject=str(path), hint="move it away")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise ConfigError("another daemon answers there", subject=f"socket {path}", hint="stop it first")
