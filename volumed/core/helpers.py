"""The processes that hold mounts and devices: one that ends is said at once, with what it said last.

What it held is dead from then on. Reconciling sees that of a mount and mounts it anew, by a new process; the file
system on a dead device can only be named.
"""

from __future__ import annotations

import logging
import re

from volumed.core.events import Events
from volumed.driver import Helper, Host
from volumed.store.repository import Repository

_VOLUME_ID = re.compile(r"v[0-9a-f]{32}")


class HelperWatch:
    def __init__(self, *, host: Host, repository: Repository, events: Events) -> None:
        self._host = host
        self._repository = repository
        self._events = events
        self._told: set[tuple[str, int]] = set()

    def look(self) -> None:
        """Each that has ended since the last look, once. A helper stopped on purpose is forgotten, and not dead."""
        dead = {(helper.name, helper.pid): helper for helper in self._host.helpers("") if not helper.running}
        for key in dead.keys() - self._told:
            self._tell(dead[key])
        self._told = set(dead)

    def _tell(self, helper: Helper) -> None:
        named = _VOLUME_ID.search(helper.name)
        volume = self._repository.volume(named[0]) if named else None
        said = self._host.helper_log(helper.name, limit=300).replace("\n", "; ") or "it said nothing"
        self._events.publish(
            "helper.died",
            volume.name if volume else helper.name,
            f"{helper.argv[0]} (helper {helper.name}, pid {helper.pid}) has ended: {said}",
            level=logging.ERROR,
        )
