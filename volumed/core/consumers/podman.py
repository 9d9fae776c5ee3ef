"""Podman: no daemon to ask, so its command is run; one mount id for all containers, so they share a binding."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from volumed.core.consumers.source import ConsumerSource, Hold
from volumed.driver import Host
from volumed.errors import VolumedError
from volumed.host.run import ENVIRONMENT
from volumed.model import Consumer, Engine

_log = logging.getLogger(__name__)

ALIVE = frozenset({"running", "paused", "stopping"})
TIMEOUT = 30.0
# Or it would outlive a daemon that is killed. The kernel counts the thread that started a child as its parent: ours
# lasts as long as the child is read. Not by setpriv(1), which is not everywhere.
_PR_SET_PDEATHSIG = 1
_END_WITH_US = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {signal.SIGKILL:d})
os.execvp(sys.argv[1], sys.argv[1:])
"""
LONGEST_PAUSE = 60.0


class PodmanSource(ConsumerSource):
    engine = Engine.PODMAN

    def __init__(self, host: Host, command: str, *, arguments: Sequence[str], driver_names: frozenset[str]) -> None:
        self._host = host
        self._argv = [command, *arguments]
        self._drivers = driver_names

    def look(self) -> list[Hold] | None:
        try:
            listed = self._podman("ps", "--all", "--quiet", "--no-trunc")
            identifiers = listed.split()
            containers = json.loads(self._podman("container", "inspect", *identifiers)) if identifiers else []
        except (VolumedError, ValueError) as error:
            _log.debug("podman cannot be asked: %s", error)
            return None
        return [
            Hold(
                volume=mount["Name"],
                mount_id=None,
                consumer=_consumer(container, mount),
                running=container.get("State", {}).get("Status") in ALIVE,
            )
            for container in containers
            for mount in container.get("Mounts", ())
            if mount.get("Type") == "volume" and mount.get("Driver") in self._drivers
        ]

    def watch(self, changed: Callable[[], None], stop: threading.Event) -> None:
        """`podman events` as long as it runs; between its ends, and without Podman, the timer's looks must do."""
        pause = 1.0
        while not stop.is_set():
            try:
                if self._follow(changed, stop):
                    pause = 1.0
            except OSError as error:
                _log.debug("podman events: %s", error)
            stop.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    def _follow(self, changed: Callable[[], None], stop: threading.Event) -> bool:
        events = [*self._argv, "events", "--filter", "type=container", "--format", "{{.Status}}"]
        heard = False
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _END_WITH_US, *events],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            text=True,
        ) as child:
            ender = threading.Thread(target=_end_with, args=(child, stop), daemon=True)
            ender.start()
            assert child.stdout is not None
            for _ in child.stdout:
                heard = True
                changed()
        return heard

    def _podman(self, *words: str) -> str:
        return self._host.run([*self._argv, *words], timeout=TIMEOUT).stdout


def _end_with(child: subprocess.Popen[str], stop: threading.Event) -> None:
    """The child ends when we are told to stop, or this thread when the child ends."""
    while child.poll() is None:
        if stop.wait(0.5):
            child.terminate()
            return


def _consumer(container: dict[str, Any], mount: dict[str, Any]) -> Consumer:
    return Consumer(
        id=container["Id"],
        name=container.get("Name", ""),
        image=container.get("ImageName", ""),
        pid=container.get("State", {}).get("Pid", 0),
        target=mount["Destination"],
        readonly=not mount.get("RW", True),
    )
