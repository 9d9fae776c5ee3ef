"""Docker: containers by its API, and the exact mount ids from its own files.

Never called from inside a request of Docker's, nor under a lock: `GET /containers/ID/json` waits for our answer to
Mount. The list does not.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from volumed.core.consumers.source import ConsumerSource, Hold
from volumed.model import Consumer, Engine
from volumed.unix_http import UnixConnection

_log = logging.getLogger(__name__)

ALIVE = frozenset({"running", "paused", "restarting", "removing"})
# What may change who uses a volume; docker's own words.
_EVENTS = {"type": ["container"], "event": ["start", "die", "destroy", "rename", "pause", "unpause"]}
TIMEOUT = 10.0
LONGEST_PAUSE = 15.0


class DockerSource(ConsumerSource):
    engine = Engine.DOCKER

    def __init__(self, socket_path: Path, *, driver_names: frozenset[str]) -> None:
        """`driver_names`: what this Docker calls us, which is the name of our socket."""
        self._socket = socket_path
        self._drivers = driver_names

    def look(self) -> list[Hold] | None:
        try:
            containers = self._get("/containers/json?all=1")
            root = Path(self._get("/info")["DockerRootDir"])
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            _log.debug("docker at %s cannot be asked: %s", self._socket, error)
            return None
        return [
            hold
            for container in containers
            for mount in container.get("Mounts", ())
            if mount.get("Driver") in self._drivers
            for hold in self._holds(container, mount, root)
        ]

    def _holds(self, container: dict[str, Any], mount: dict[str, Any], root: Path) -> list[Hold]:
        identifier = container["Id"]
        state = _state(root, identifier)
        consumer = Consumer(
            id=identifier,
            name=(container.get("Names") or [""])[0].lstrip("/"),
            image=container.get("Image", ""),
            pid=state.get("State", {}).get("Pid", 0),
            target=mount["Destination"],
            readonly=not mount.get("RW", True),
        )
        point = state.get("MountPoints", {}).get(mount["Destination"], {})
        running = container.get("State") in ALIVE
        return [Hold(volume=mount["Name"], mount_id=point.get("ID") or None, consumer=consumer, running=running)]

    def watch(self, changed: Callable[[], None], stop: threading.Event) -> None:
        pause = 1.0
        while not stop.is_set():
            try:
                connection = UnixConnection(self._socket, timeout=TIMEOUT)
                connection.request("GET", f"/events?filters={quote(json.dumps(_EVENTS))}")
                answer = connection.getresponse()
                pause = 1.0
                changed()  # what happened while we did not listen
                self._follow(connection, answer, changed, stop)
            except (OSError, http.client.HTTPException) as error:
                _log.debug("docker events at %s: %s", self._socket, error)
            stop.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    @staticmethod
    def _follow(
        connection: http.client.HTTPConnection,
        answer: http.client.HTTPResponse,
        changed: Callable[[], None],
        stop: threading.Event,
    ) -> None:
        """Any byte is an event; which one does not matter, as all is looked at again."""
        if connection.sock is not None:
            connection.sock.settimeout(1.0)
        while not stop.is_set():
            try:
                if not answer.read1(65536):
                    return
                changed()
            except TimeoutError:
                # http.client refuses to read on after a timeout unless its file object is told.
                raw = getattr(answer.fp, "raw", None)
                if raw is not None:
                    raw._timeout_occurred = False

    def _get(self, path: str) -> Any:
        connection = UnixConnection(self._socket, timeout=TIMEOUT)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != http.client.OK:
                raise http.client.HTTPException(f"{path}: {answer.status} {body[:200]!r}")
            return json.loads(body)
        finally:
            connection.close()


def _state(root: Path, container: str) -> dict[str, Any]:
    """Docker's own record of a container: undocumented, the only place that has the mount's id. Empty when it cannot
    be read; then bindings are matched by the volume alone."""
    try:
        read = json.loads((root / "containers" / container / "config.v2.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
