"""What an engine must tell: which containers use our volumes, and when to look again."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from volumed.model import Consumer, Engine


class Hold(NamedTuple):
    """One use of a volume by a container."""

    volume: str  # its name
    mount_id: str | None  # the engine's id of the mount, where it can be told
    consumer: Consumer
    running: bool  # paused and restarting ones run; created and exited ones do not


class ConsumerSource(ABC):
    engine: Engine

    @abstractmethod
    def look(self) -> list[Hold] | None:
        """Every use of our volumes by any container, running or not. None when the engine cannot be asked now: then
        nothing is known, and nothing may be concluded."""

    @abstractmethod
    def watch(self, changed: Callable[[], None], stop: threading.Event) -> None:
        """Call `changed` whenever a look would show something new. Returns when `stop` is set."""
