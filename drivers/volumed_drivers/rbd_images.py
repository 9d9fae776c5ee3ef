"""Images as `ceph_rbd` needs them: what runs in a worker (`ceph_worker`), where librbd may be loaded."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from volumed.errors import InUse, InvalidRequest, NotFound, OutOfRange, VolumedError
from volumed_drivers.ceph import load
from volumed_drivers.ceph_worker import Connection
from volumed_drivers.rbd_watchers import Where, metadata, opened, without_watchers

# Metadata of an image: our mark, and the size it keeps while it is put back.
MARK, RESTORING = "volumed", "volumed.restoring"
# Of the snapshot that a clone is made from, for as long as that takes.
INTERNAL = "volumed-clone-"


# Looking
def look(connection: Connection, *, where: Where) -> dict[str, str]:
    """Whether the pool can be used; facts about it. Raises NotFound."""
    rbd = load("rbd")
    context = connection.context(*where)
    if where[1] and not rbd.RBD().namespace_exists(context, where[1]):
        raise NotFound(
            f"there is no namespace {where[1]} in pool {where[0]}",
            hint=f"make it with `rbd namespace create {where[0]}/{where[1]}`, or name another",
        )
    trash = sum(1 for _ in rbd.RBD().trash_list(context))
    return {"cluster": connection.cluster.get_fsid(), "in the trash": str(trash)}


def capacity(connection: Connection, *, pool: str) -> tuple[int, int]:
    """Total and available bytes of the pool, as its quota and its cluster have it."""
    for found in connection.ask("df")["pools"]:
        if found["name"] == pool:
            stats = found["stats"]
            break
    else:
        raise NotFound(f"there is no pool {pool}")
    stored, available = stats.get("stored", stats["bytes_used"]), stats["max_avail"]
    quota = connection.ask("osd pool get-quota", pool=pool)["quota_max_bytes"]
    if quota:
        return quota, max(0, min(available, quota - stored))
    return stored + available, available


def names(connection: Connection, *, where: Where) -> list[str]:
    found: list[str] = load("rbd").RBD().list(connection.context(*where))
    return found


def marks(connection: Connection, *, where: Where, images: list[str]) -> dict[str, dict[str, str] | None]:
    """The mark of each, None where it is not written yet; what is gone meanwhile is left out."""
    told: dict[str, dict[str, str] | None] = {}
    for image in images:
        with contextlib.suppress(NotFound), opened(connection, where, image) as found:
            text = metadata(found, MARK)
            told[image] = json.loads(text)["mark"] if text else None
    return told


def exists(connection: Connection, *, where: Where, image: str) -> bool:
    with contextlib.suppress(NotFound), opened(connection, where, image):
        return True
    return False


def size(connection: Connection, *, where: Where, image: str) -> int:
    with opened(connection, where, image) as found:
        return int(found.size())


def inspect(connection: Connection, *, where: Where, image: str) -> tuple[int, int]:
    """Size, and bytes occupied: by the map of its objects, where it has one."""
    used = 0

    def count(_: int, length: int, exist: bool) -> None:
        nonlocal used
        used += length if exist else 0

    with opened(connection, where, image) as found:
        size = found.size()
        found.diff_iterate(0, size, None, count, include_parent=False, whole_object=True)
    return size, used


# Making
def create(connection: Connection, *, where: Where, image: str, size: int, features: int, data_pool: str) -> int:
    """Its size; of the one that is there, when there is one."""
    rbd = load("rbd")
    if data_pool:
        connection.context(data_pool)
    with contextlib.suppress(rbd.ImageExists):
        rbd.RBD().create(
            connection.context(*where), image, size, old_format=False, features=features, data_pool=data_pool or None
        )
        return size
    with opened(connection, where, image) as found:
        return int(found.size())


def mark(connection: Connection, *, where: Where, image: str, text: str) -> None:
    with opened(connection, where, image, readonly=False) as found:
        found.metadata_set(MARK, text)


def resize(connection: Connection, *, where: Where, image: str, size: int) -> int:
    """Never smaller: a mounted file system would be cut."""
    with opened(connection, where, image, readonly=False) as found:
        if found.size() < size:
            found.resize(size)
        return int(found.size())


# Removing
def remove(connection: Connection, *, where: Where, image: str, own: str) -> list[str]:
    """Gone already is success. One that clones still read from goes to the trash; the clones in question are told."""
    rbd = load("rbd")
    context = connection.context(*where)
    children: list[str] = []
    with contextlib.suppress(NotFound):
        with opened(connection, where, image, readonly=False) as found:
            kept = [snap["name"] for snap in _user_snapshots(found) if not snap["name"].startswith(INTERNAL)]
            if kept:
                raise InUse("has snapshots", holders=kept, subject=f"image {where[0]}/{image}")
            _remove_internal(found)
            children = _children(found)
        without_watchers(connection, where, image, own)
        try:
            if children:
                rbd.RBD().trash_move(context, image, 0)
            else:
                rbd.RBD().remove(context, image)
        except rbd.ImageNotFound:
            pass
        except rbd.ImageHasSnapshots:  # a clone made in this very moment
            rbd.RBD().trash_move(context, image, 0)
    return children


def _user_snapshots(image: Any) -> list[dict[str, Any]]:
    user = load("rbd").RBD_SNAP_NAMESPACE_TYPE_USER
    return [snap for snap in image.list_snaps() if snap["namespace"] == user]


def _remove_internal(image: Any) -> None:
    """Of a clone that was begun and not finished; and of one that was, it goes to the trash."""
    for snap in _user_snapshots(image):
        if snap["name"].startswith(INTERNAL):
            image.remove_snap(snap["name"])


def _children(image: Any) -> list[str]:
    """As the manager wants to have them named."""
    return [
        "/".join(part for part in (child["pool"], child["pool_namespace"], child["image"]) if part)
        for child in image.list_children2()
        if not child["trash"]
    ]


def purge(connection: Connection, *, where: Where, pattern: str) -> tuple[list[str], list[str]]:
    """Remove from the trash what nobody reads from any more. The clones that hold the rest there are told, and what
    could not be removed and why: one that this user may not remove keeps none of the others."""
    rbd = load("rbd")
    context, holding, kept = connection.context(*where), [], []
    for found in list(rbd.RBD().trash_list(context)):
        if not re.fullmatch(pattern, found["name"]):
            continue
        try:
            with contextlib.suppress(rbd.ImageNotFound, rbd.ImageBusy):
                holding += _trash_remove(context, found["id"])
        except rbd.Error as error:
            kept.append(f"{found['name']}: {error}")
    return holding, kept


def _trash_remove(context: Any, image_id: str) -> list[str]:
    """The clones that keep it, if any do."""
    rbd = load("rbd")
    try:
        rbd.RBD().trash_remove(context, image_id, True)
    except rbd.ImageHasSnapshots:
        with rbd.Image(context, image_id=image_id, read_only=True) as image:
            return _children(image)
    return []


def flatten(connection: Connection, *, images: list[str]) -> None:
    """Ask the cluster's manager to copy into each what it reads from its parent: it goes on when we do not. One that
    is refused keeps none of the others from it; the last refusal is raised."""
    refused = None
    for image in images:
        try:
            connection.ask("rbd task add flatten", manager=True, image_spec=image)
        except VolumedError as error:
            refused = error
    if refused is not None:
        raise refused


# Copies
def snapshot(connection: Connection, *, where: Where, image: str, name: str) -> None:
    with opened(connection, where, image, readonly=False) as found, contextlib.suppress(load("rbd").ImageExists):
        if name not in [snap["name"] for snap in _user_snapshots(found)]:
            found.create_snap(name)


def remove_snapshot(connection: Connection, *, where: Where, image: str, name: str) -> None:
    """Gone already is success. One that has clones goes to the trash of its image, and with the last of them."""
    rbd = load("rbd")
    with (
        contextlib.suppress(NotFound, rbd.ImageNotFound),
        opened(connection, where, image, readonly=False) as found,
    ):
        if found.is_protected_snap(name):  # by somebody's hand, for clones of the old format
            raise InUse("is protected", holders=["clones of format 1"], subject=f"snapshot {image}@{name}")
        found.remove_snap(name)


def snapshots(connection: Connection, *, where: Where, images: list[str]) -> list[str]:
    """As IMAGE@SNAPSHOT."""
    told = []
    for image in images:
        with contextlib.suppress(NotFound), opened(connection, where, image) as found:
            told += [f"{image}@{snap['name']}" for snap in _user_snapshots(found)]
    return told


def begin_restore(connection: Connection, *, where: Where, image: str, name: str, own: str) -> int:
    """The size that the image is to keep: written down, as the snapshot brings back the one it had."""
    with opened(connection, where, image, snapshot=name):
        pass
    without_watchers(connection, where, image, own)
    with opened(connection, where, image) as found:
        text, now = metadata(found, RESTORING), str(found.size())
    if not text:
        with opened(connection, where, image, readonly=False) as found:
            found.metadata_set(RESTORING, now)
    return int(text or now)


def roll_back(connection: Connection, *, where: Where, image: str, name: str) -> None:
    with opened(connection, where, image, readonly=False) as found:
        found.rollback_to_snap(name)


def end_restore(connection: Connection, *, where: Where, image: str, size: int) -> None:
    with opened(connection, where, image, readonly=False) as found:
        if found.size() < size:
            found.resize(size)
        found.metadata_remove(RESTORING)


def clone(
    connection: Connection,
    *,
    where: Where,
    image: str,
    name: str,
    copy: str,
    size: int,
    features: int,
    data_pool: str,
    origin: Where | None = None,
) -> None:
    """A copy-on-write child of a snapshot, which may lie in another pool, the `origin`. There already is success.
    Raises OutOfRange when `size` is too small."""
    rbd = load("rbd")
    parent, child = connection.context(*(origin or where)), connection.context(*where)
    with opened(connection, origin or where, image, snapshot=name) as found:
        if found.size() > size:
            raise OutOfRange(f"{found.size()} bytes do not fit into {size}")
    with contextlib.suppress(rbd.ImageExists):
        rbd.RBD().clone(parent, image, name, child, copy, features=features, data_pool=data_pool or None)


def forget_internal(connection: Connection, *, where: Where, image: str) -> None:
    with opened(connection, where, image, readonly=False) as found:
        _remove_internal(found)


def extents(connection: Connection, *, where: Where, image: str, name: str, base: str | None) -> list[tuple[int, int]]:
    """Runs of bytes that hold data in the snapshot, or that differ from the snapshot `base`; neighbours joined."""
    runs: list[tuple[int, int]] = []

    def add(offset: int, length: int, exist: bool) -> None:
        if base is None and not exist:
            return
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((offset, length))

    with opened(connection, where, image, snapshot=name) as found:
        found.diff_iterate(0, found.size(), base, add, include_parent=True, whole_object=False)
    return runs


# Taking over what others made
def adopt(connection: Connection, *, where: Where, reference: str, image: str) -> int:
    """Rename it; its size. Done already is success."""
    rbd = load("rbd")
    with contextlib.suppress(NotFound), opened(connection, where, image) as found:
        return int(found.size())
    with opened(connection, where, reference) as found:
        if found.old_format():
            raise InvalidRequest(
                "is of format 1", subject=f"image {where[0]}/{reference}", hint="migrate it: `rbd migration prepare`"
            )
        size = int(found.size())
    without_watchers(connection, where, reference, "")
    rbd.RBD().rename(connection.context(*where), reference, image)
    return size
