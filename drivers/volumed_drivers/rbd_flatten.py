"""An image that is made independent of its parent by the cluster's manager: asked for, watched, called off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from volumed.driver import Tell
from volumed.errors import VolumedError
from volumed_drivers import rbd_images
from volumed_drivers.ceph import load
from volumed_drivers.ceph_worker import Connection
from volumed_drivers.rbd_watchers import Where, opened

_POLL = 0.5  # seconds


def wait(ask: Callable[..., Any], amount: int, tell: Tell) -> None:
    """For the driver. `ask`: a function of this module, in a worker. `amount`: bytes that are copied, about."""
    told = 0
    try:
        busy = ask("rbd_flatten.begin")
        while busy and (share := ask("rbd_flatten.share")) is not None:
            done = int(amount * share)
            tell(max(0, done - told))
            told = max(told, done)
            time.sleep(_POLL)
    except BaseException:
        with contextlib.suppress(VolumedError):
            ask("rbd_flatten.end")
        raise
    tell(max(0, amount - told))


# In a worker
def begin(connection: Connection, *, where: Where, image: str) -> bool:
    """Whether the manager was asked to copy what the image reads from its parent; False: it has none any more."""
    if not _has_parent(connection, where, image):
        return False
    rbd_images.flatten(connection, images=["/".join(part for part in (*where, image) if part)])
    return True


def share(connection: Connection, *, where: Where, image: str) -> float | None:
    """How much of it is done, from 0 to 1; None when all is."""
    if not _has_parent(connection, where, image):
        return None
    told = connection.ask("rbd task list", manager=True)
    return max((float(task.get("progress", 0)) for task in _tasks_of(told, where, image)), default=0.0)


def end(connection: Connection, *, where: Where, image: str) -> None:
    """Nobody waits for it any more."""
    for task in _tasks_of(connection.ask("rbd task list", manager=True), where, image):
        connection.ask("rbd task cancel", manager=True, task_id=task["id"])


def _tasks_of(told: list[dict[str, Any]], where: Where, image: str) -> list[dict[str, Any]]:
    wanted = (where[0], where[1], image)
    return [
        task
        for task in told
        if (task["refs"].get("pool_name"), task["refs"].get("pool_namespace", ""), task["refs"].get("image_name"))
        == wanted
    ]


def _has_parent(connection: Connection, where: Where, image: str) -> bool:
    with opened(connection, where, image) as found:
        try:
            found.parent_info()
        except load("rbd").ImageNotFound:
            return False
    return True
