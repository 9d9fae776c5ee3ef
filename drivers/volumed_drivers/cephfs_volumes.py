"""Subvolumes of a CephFS, as the manager's module `volumes` makes, copies and removes them.

What a subvolume is for is written into its metadata: JSON in base64, as the module takes no percent sign. A subvolume
that is put back to a snapshot has none of its own meanwhile; what it will get is kept with that snapshot.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from volumed import context
from volumed.errors import BackendError, BackendUnavailable, DeadlineExceeded, NotFound
from volumed_drivers.ceph import Cluster

_KEY = "volumed"
# Seconds between looks at a copy in the making: the manager begins one every few seconds.
# EAGAIN of the manager's module `volumes`: what it held before goes in the background; it is being filled.
_PURGING, _NOT_READY = "purge of subvolume in progress", "is not ready for operation"
NO_ANSWER = (BackendUnavailable, DeadlineExceeded)
_SOON, _LATER = 0.2, 2.0
CLONE_TIMEOUT = 580.0


class State(enum.StrEnum):
    COMPLETE = "complete"
    PENDING = "pending"  # being filled
    RETAINED = "snapshot-retained"  # its snapshots alone are left
    FAILED = "failed"


class Subvolume(NamedTuple):
    """`path`, `size`, `used` and `old` of a complete one. `size`: bytes, None when it has no quota. `old`: of a version
    that holds its snapshots in its tree and cannot be put back to one."""

    state: State
    path: str = ""
    size: int | None = None
    used: int = 0
    monitors: tuple[str, ...] = ()
    old: bool = False


class Note(NamedTuple):
    """What a subvolume is for. `size`: what was asked for, in bytes. `volume_id`: of one that has another name."""

    size: int | None = None
    mark: Mapping[str, str] = {}
    volume_id: str = ""


class Subvolumes:
    """Of one group of one file system."""

    def __init__(self, cluster: Cluster, *, filesystem: str, group: str, subject: str) -> None:
        self._cluster = cluster
        self._filesystem = filesystem
        self._group = group
        self._subject = subject

    def _ask(self, prefix: str, **words: Any) -> Any:
        return self._cluster.command(f"fs {prefix}", manager=True, vol_name=self._filesystem, **words)

    def _ask_of(self, prefix: str, name: str, **words: Any) -> Any:
        return self._ask(f"subvolume {prefix}", sub_name=name, group_name=self._group, **words)

    def make_group(self) -> None:
        """There already is success."""
        self._ask("subvolumegroup create", group_name=self._group)

    def names(self) -> list[str]:
        return [each["name"] for each in self._ask("subvolume ls", group_name=self._group)]

    def look(self, name: str) -> Subvolume | None:
        """None when there is no such subvolume."""
        try:
            info = self._ask_of("info", name)
        except NotFound:
            return None
        except BackendError as error:
            if _NOT_READY not in error.text:
                raise
            state = self.clone_state(name)
            if state is None:
                raise
            if state is not State.COMPLETE:
                return Subvolume(state)
            info = self._ask_of("info", name)  # it has been filled meanwhile
        if info["state"] == State.RETAINED:
            return Subvolume(State.RETAINED)
        quota = info["bytes_quota"]
        size = quota if isinstance(quota, int) else None
        old = "snapshot-retention" not in info["features"]
        return Subvolume(State.COMPLETE, info["path"], size, info["bytes_used"], tuple(info["mon_addrs"]), old)

    def create(self, name: str, size: int | None) -> None:
        """Not for one that is there: owner and mode of its root would be put back."""
        self._ask_of("create", name, **({} if size is None else {"size": size}))

    def remove(self, name: str, *, keep_snapshots: bool = False) -> None:
        """Gone already is success."""
        with contextlib.suppress(NotFound):
            self._ask_of("rm", name, **({"retain_snapshots": True} if keep_snapshots else {"force": True}))

    def resize(self, name: str, size: int) -> None:
        self._ask_of("resize", name, new_size=str(size), no_shrink=True)

    # What it is for
    def note(self, name: str, note: Note) -> None:
        self._ask_of("metadata set", name, key_name=_KEY, value=_encoded(note))

    def read_note(self, name: str) -> Note | None:
        """None when there is none; of one that is not complete, neither."""
        try:
            return _decoded(self._ask_of("metadata ls", name))
        except NO_ANSWER:
            raise
        except (NotFound, BackendError):
            return None

    # Snapshots
    def snapshots(self, name: str) -> list[str]:
        """Of one that is gone or in the making: none."""
        try:
            return [each["name"] for each in self._ask_of("snapshot ls", name)]
        except NotFound:
            return []
        except BackendError as error:
            if _NOT_READY in error.text:
                return []
            raise

    def take_snapshot(self, name: str, snapshot: str) -> None:
        """There already is success."""
        if snapshot not in self.snapshots(name):
            self._ask_of("snapshot create", name, snap_name=snapshot)

    def remove_snapshot(self, name: str, snapshot: str) -> None:
        """Gone already is success."""
        with contextlib.suppress(NotFound):
            self._ask_of("snapshot rm", name, snap_name=snapshot, force=True)

    def note_snapshot(self, name: str, snapshot: str, note: Note) -> None:
        self._ask_of("snapshot metadata set", name, snap_name=snapshot, key_name=_KEY, value=_encoded(note))

    def read_snapshot_note(self, name: str, snapshot: str) -> Note | None:
        return _decoded(self._ask_of("snapshot metadata ls", name, snap_name=snapshot))

    def forget_snapshot_note(self, name: str, snapshot: str) -> None:
        with contextlib.suppress(NotFound):
            self._ask_of("snapshot metadata rm", name, snap_name=snapshot, key_name=_KEY)

    # Copies
    def clone(self, name: str, snapshot: str, target: str) -> None:
        """Begins to fill `target`, which is not there, or has snapshots alone. Not done on return: `wait_for_clone`."""
        words = {"snap_name": snapshot, "target_sub_name": target, "target_group_name": self._group}
        ends, pause = time.monotonic() + context.remaining(CLONE_TIMEOUT), _SOON
        while True:
            try:
                self._ask_of("snapshot clone", name, **words)
                return
            except BackendError as error:
                if _PURGING not in error.text or time.monotonic() + pause > ends:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LATER)

    def clone_state(self, target: str) -> State | None:
        try:
            state = self._ask("clone status", clone_name=target, group_name=self._group)["status"]["state"]
        except NotFound:
            return None
        if state in ("failed", "canceled"):
            return State.FAILED
        return State.COMPLETE if state == "complete" else State.PENDING

    def cancel_clone(self, target: str) -> None:
        """Ended already is success."""
        with contextlib.suppress(NotFound, BackendError):
            self._ask("clone cancel", clone_name=target, group_name=self._group)

    def wait_for_clone(self, target: str) -> None:
        """Raises DeadlineExceeded while the copying goes on, BackendError when it failed."""
        ends = time.monotonic() + context.remaining(CLONE_TIMEOUT)
        pause = _SOON
        while (state := self.clone_state(target)) is State.PENDING:
            if time.monotonic() + pause > ends:
                raise DeadlineExceeded(f"{target} is still being copied", subject=self._subject)
            time.sleep(pause)
            pause = min(2 * pause, _LATER)
        if state is not State.COMPLETE:
            raise BackendError(
                f"copying to {target} failed", subject=self._subject, hint="`ceph fs clone status` says more"
            )


def _encoded(note: Note) -> str:
    told = {"size": note.size, "mark": dict(note.mark)} | ({"id": note.volume_id} if note.volume_id else {})
    return base64.urlsafe_b64encode(json.dumps(told).encode()).decode()


def _decoded(told: Mapping[str, str]) -> Note | None:
    """None for none, and for what nobody of us wrote."""
    try:
        read = json.loads(base64.urlsafe_b64decode(told[_KEY]))
        mark = {str(key): str(value) for key, value in read["mark"].items()}
        return Note(read["size"], mark, read.get("id", ""))
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
