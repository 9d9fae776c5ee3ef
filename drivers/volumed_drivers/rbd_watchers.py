"""An RBD image opened, who else has it open, and who may map it: what runs in a worker (`ceph_worker`).

An image that somebody maps is watched by its client. An image opened for writing is watched, too, so each is opened
read-only where that will do.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from volumed.errors import InUse, InvalidRequest, NotFound
from volumed_drivers.ceph import load
from volumed_drivers.ceph_worker import Connection

HOLDER = "volumed.holder"  # metadata of an image: the node that mapped it last, and by which clients
MAPPING_LOCK = "volumed.map"
DEAD = 3600  # seconds that a client is kept out that cannot come back anyway
BRIEFLY = 2.0  # seconds that an image is watched by who only changes something about it

Where = tuple[str, str]  # pool and namespace; JSON makes a list of it
Watcher = dict[str, Any]


@contextlib.contextmanager
def opened(
    connection: Connection, where: Where, image: str, *, snapshot: str | None = None, readonly: bool = True
) -> Iterator[Any]:
    """Raises NotFound."""
    rbd = load("rbd")
    try:
        made = rbd.Image(connection.context(*where), image, read_only=readonly)
    except rbd.ImageNotFound:
        raise NotFound(f"image {where[0]}/{image} is gone") from None
    with made:
        # Not when it is opened: librbd (16.2.15) still uses an image opened at a snapshot when it is closed soon after.
        # That ends the process, or hangs it for ever.
        if snapshot:
            try:
                made.set_snap(snapshot)
            except rbd.ImageNotFound:
                raise NotFound(f"snapshot {snapshot} of image {where[0]}/{image} is gone") from None
        yield made


def metadata(image: Any, key: str) -> str:
    with contextlib.suppress(KeyError):
        return str(image.metadata_get(key))
    return ""


# Who has it open
def holders(connection: Connection, *, where: Where, image: str, leaving: Sequence[str] = ()) -> list[Watcher]:
    """Everybody but those that only change something about it, and those that are `leaving`: they are looked at again
    for a moment."""
    ends = time.monotonic() + BRIEFLY
    while True:
        found = _watchers(connection, where, image)
        stay = all(watcher["node"] and watcher["address"] not in leaving for watcher in found)
        if stay or time.monotonic() > ends:
            return found
        time.sleep(0.05)


def _watchers(connection: Connection, where: Where, image: str) -> list[Watcher]:
    with opened(connection, where, image) as found:
        watching = {(watcher["addr"], watcher["id"]) for watcher in found.watchers_list()}
        text = metadata(found, HOLDER)
    if not watching:
        return []
    holder = json.loads(text) if text else {"node": "", "own": "", "clients": []}
    managers = _manager_addresses(connection)
    told = []
    for address, number in sorted(watching):
        if address.rpartition("/")[2] in managers:
            continue
        known = address in holder["clients"]
        by = f"node {holder['node']} " if known else ""
        told.append(
            {
                "address": address,
                "node": holder["node"] if known else "",
                "own": holder["own"] if known else "",
                "text": f"{by}(client.{number} at {address})",
            }
        )
    return told


def _manager_addresses(connection: Connection) -> set[str]:
    """Nonces of what runs in the manager: it flattens images, and never writes what a volume would."""
    try:
        told = connection.ask("mgr dump")
    except Exception:
        return set()  # not allowed to ask: whoever watches is a holder, then
    return {str(address["nonce"]) for client in told.get("active_clients", []) for address in client["addrvec"]}


def begin_mapping(connection: Connection, *, where: Where, image: str, node: str, own: str, patience: int) -> None:
    """Take the right to map the image, for twice `patience` at most. Raises InUse naming who has it mapped,
    or that somebody is about to."""
    rados = load("rados")
    context = connection.context(*where)
    with opened(connection, where, image):  # or its lock would make the object that says its name
        pass
    ends = time.monotonic() + patience
    while True:
        try:
            # On the object that says the image's name: it goes with the image.
            context.lock_exclusive(f"rbd_id.{image}", MAPPING_LOCK, "map", desc=node, duration=2 * patience)
            break
        except rados.ObjectBusy:
            if time.monotonic() > ends:
                raise InUse(
                    "is being mapped by", holders=["another node"], subject=f"image {where[0]}/{image}"
                ) from None
            time.sleep(0.05)
    try:
        without_watchers(connection, where, image, own)
    except BaseException:
        _unlock(connection, where, image)
        raise


def end_mapping(connection: Connection, *, where: Where, image: str, node: str, own: str, mapped: bool) -> list[str]:
    """Give the right back. `mapped`: it is; write down by whom, for others to read. The clients that have it."""
    clients = []
    try:
        if mapped:
            clients = [watcher["address"] for watcher in _watchers(connection, where, image)]
            with opened(connection, where, image, readonly=False) as found:
                found.metadata_set(HOLDER, json.dumps({"node": node, "own": own, "clients": clients}))
    finally:
        _unlock(connection, where, image)
    return clients


def _unlock(connection: Connection, where: Where, image: str) -> None:
    rados = load("rados")
    with contextlib.suppress(rados.ObjectNotFound):  # it took too long, and another has the right now
        connection.context(*where).unlock(f"rbd_id.{image}", MAPPING_LOCK, "map")


def fence(connection: Connection, *, address: str, seconds: int) -> None:
    """Cut a client off, by its full address: by that of its machine alone, all others there would go, too."""
    host, _, nonce = address.rpartition("/")
    if not host or not nonce.isdigit() or int(nonce) == 0:
        raise InvalidRequest(f"{address} names no single client")
    connection.ask("osd blocklist", blocklistop="add", addr=address, expire=float(seconds))
    connection.cluster.wait_for_latest_osdmap()


def without_watchers(connection: Connection, where: Where, image: str, own: str) -> None:
    """Raises InUse naming who has it open. What `own` says to be this very node's is dead, as the caller has looked:
    the cluster would believe in it for another half minute."""
    dead = [watcher for watcher in _watchers(connection, where, image) if own and watcher["own"] == own]
    for watcher in dead:
        fence(connection, address=watcher["address"], seconds=DEAD)
    held = holders(connection, where=where, image=image, leaving=[watcher["address"] for watcher in dead])
    if held:
        raise InUse("is mapped by", holders=[holder["text"] for holder in held], subject=f"image {where[0]}/{image}")
