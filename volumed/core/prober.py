"""Every backend looked at, on a timer and apart from all other work: whether it is well, what it can do, its room."""

from __future__ import annotations

import threading
from collections.abc import Callable

from volumed import context
from volumed.core.backends import Backend, Backends
from volumed.core.reach import Reach
from volumed.errors import VolumedError


class Prober:
    def __init__(self, *, backends: Backends, reach: Reach, found: Callable[[], None]) -> None:
        """`found` is called after each look: what was seen may concern the node's record."""
        self._backends = backends
        self._reach = reach
        self._found = found

    def look(self, *, patience: float) -> None:
        """All at once, so that one that hangs costs its patience once; it is left behind, and counts as unavailable
        until its look ends."""
        looks = [
            threading.Thread(target=self._try, args=(backend, patience), daemon=True)
            for backend in self._backends.all()
        ]
        for look in looks:
            look.start()
        for look in looks:
            look.join()
        self._found()

    def _try(self, backend: Backend, patience: float) -> None:
        try:
            with context.request(timeout=patience):
                backend.call(lambda: self._look_at(backend))
        except VolumedError as error:
            backend.unavailable(str(error))

    def _look_at(self, backend: Backend) -> None:
        backend.probe()
        if backend.health.ok:
            self._reach.learn(backend)
