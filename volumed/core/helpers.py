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
        self._known: dict[str, Helper] = {}

    def look(self) -> None:
        """Each that has ended since the last look, once. A helper stopped on purpose is forgotten, and not dead."""
        now = {helper.name: helper for helper in self._host.helpers("")}
        for name, helper in now.items():
            before = self._known.get(name)
            if helper.running:
                if before is not None and before.pid != helper.pid and before.running:
                    self._tell("helper.restarted", before, f"has ended, and was started again as pid {helper.pid}")
            elif before != helper:
                said = self._host.helper_log(name, limit=300).replace("\n", "; ") or "it said nothing"
                self._tell("helper.died", helper, f"has ended: {said}")
        self._known = now

    def _tell(self, kind: str, helper: Helper, what: str) -> None:
        named = _VOLUME_ID.search(helper.name)
        volume = self._repository.volume(named[0]) if named else None
        self._events.publish(
            kind,
            volume.name if volume else helper.name,
            f"{helper.argv[0]} (helper {helper.name}, pid {helper.pid}) {what}",
            level=logging.ERROR,
        )
