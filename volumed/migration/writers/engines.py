"""What a container engine can be asked to do with its containers: pause, stop, start."""

from __future__ import annotations

import http.client
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from volumed.driver import Host
from volumed.errors import CommandFailed, HostError
from volumed.migration.movers.mover import EngineSilent
from volumed.model import Engine
from volumed.unix_http import UnixConnection

# A container may take its own time to stop; dockerd kills it when that is over.
TIMEOUT = 300.0
# Others than a person started these, and would start another when one is stopped.
_MANAGED = ("com.docker.swarm.task.id", "io.kubernetes.pod.uid", "com.hashicorp.nomad.alloc_id")


class Container(NamedTuple):
    status: str  # running, paused, restarting, exited, created
    started: str  # sorts by time
    pid: int
    name: str
    obstacle: str  # why it must not be stopped by us; empty when it may


class ContainerEngine(ABC):
    engine: Engine
    # Whether it asks us for a mount before each start of a container; else one that starts beside others, be they
    # frozen, is given what is mounted, and nobody tells us. (Podman counts by itself, and too many after a restart.)
    asks_for_each: bool

    @abstractmethod
    def look(self, container: str) -> Container | None:
        """None when there is no such container. All raise EngineSilent when the engine does not answer, HostError when
        it refuses."""

    @abstractmethod
    def pause(self, container: str) -> None: ...

    @abstractmethod
    def resume(self, container: str) -> None: ...

    @abstractmethod
    def stop(self, container: str) -> None:
        """As the engine's own stop: with the container's signal and patience, and without being restarted."""

    @abstractmethod
    def start(self, container: str) -> None: ...


class DockerEngine(ContainerEngine):
    engine = Engine.DOCKER
    asks_for_each = True

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def look(self, container: str) -> Container | None:
        status, told = self._ask("GET", f"/containers/{container}/json")
        if status == http.client.NOT_FOUND:
            return None
        if status != http.client.OK:
            raise HostError(f"docker refuses: {told.get('message', status)}", subject=f"container {container[:12]}")
        return _container(told, removed=bool(told["HostConfig"].get("AutoRemove")))

    def pause(self, container: str) -> None:
        self._do(container, "pause")

    def resume(self, container: str) -> None:
        self._do(container, "unpause")

    def stop(self, container: str) -> None:
        self._do(container, "stop")

    def start(self, container: str) -> None:
        self._do(container, "start")

    def _do(self, container: str, what: str) -> None:
        status, told = self._ask("POST", f"/containers/{container}/{what}")
        if status not in (http.client.NO_CONTENT, http.client.NOT_MODIFIED):
            raise HostError(
                f"docker cannot {what} it: {told.get('message', status)}", subject=f"container {container[:12]}"
            )

    def _ask(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        connection = UnixConnection(self._socket, timeout=TIMEOUT)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
            return answer.status, json.loads(body) if body else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineSilent(f"docker does not answer: {error}", subject=str(self._socket)) from None
        finally:
            connection.close()


class PodmanEngine(ContainerEngine):
    engine = Engine.PODMAN
    asks_for_each = False

    def __init__(self, host: Host, command: str, *, arguments: Sequence[str]) -> None:
        self._host = host
        self._argv = [command, *arguments]

    def look(self, container: str) -> Container | None:
        try:
            told = json.loads(self._podman("container", "inspect", container))[0]
        except CommandFailed as error:
            if "no such container" in error.stderr.lower():
                return None
            raise
        return _container(told, removed=bool(told["HostConfig"].get("AutoRemove")))

    def pause(self, container: str) -> None:
        self._podman("pause", container)

    def resume(self, container: str) -> None:
        self._podman("unpause", container)

    def stop(self, container: str) -> None:
        self._podman("stop", container)

    def start(self, container: str) -> None:
        self._podman("start", container)

    def _podman(self, *words: str) -> str:
        return self._host.run([*self._argv, *words], timeout=TIMEOUT).stdout


def _container(told: dict[str, Any], *, removed: bool) -> Container:
    """Both engines' inspect."""
    state = told["State"]
    labels = (told.get("Config") or {}).get("Labels") or {}
    manager = next((label.split(".")[-3] for label in _MANAGED if label in labels), "")
    obstacle = "it was started with --rm, so it would be gone" if removed else ""
    if manager:
        obstacle = f"{manager} manages it, and would start another"
    return Container(
        status=state["Status"],
        started=str(state.get("StartedAt", "")),
        pid=int(state.get("Pid") or 0),
        name=str(told.get("Name", "")).lstrip("/"),
        obstacle=obstacle,
    )
