"""EBS snapshots of ours, by their tags. One that a clone goes by carries the clone's id in the place of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from volumed.driver import Tell
from volumed.errors import BackendError, DeadlineExceeded, NotFound
from volumed.testing import crash
from volumed.units import GIB
from volumed_drivers.ebs.client import Ec2, Item, Lookups, Waited, until
from volumed_drivers.ebs.disks import OWNER, SNAPSHOT, Disk, filters, tagged, tags_of

_SHOWN = Waited(60.0, "EC2 does not show the snapshot that it took")
_COMPLETED = Waited(
    600.0, "EC2 has not stored the snapshot yet, and makes no volume from it before that", "try again later"
)


class Snapshot(NamedTuple):
    id: str
    name: str  # ours: a snapshot's id, or the volume's that is being cloned
    state: str  # pending, completed, error
    size: int  # of the volume
    progress: str
    started: datetime


class Snapshots:
    def __init__(self, ec2: Ec2, *, owner: str, subject: str) -> None:
        self._ec2, self._owner, self._subject = ec2, owner, subject
        self._shared: Lookups[list[Snapshot]] = Lookups(self._fetch, [], subject)
        self._gone: set[str] = set()

    def _fetch(self, names: Sequence[str]) -> Mapping[str, list[Snapshot]]:
        found: dict[str, list[Snapshot]] = {}
        for snapshot in self._described({f"tag:{SNAPSHOT}": names}):
            found.setdefault(snapshot.name, []).append(snapshot)
        return found

    def _described(self, wanted: Mapping[str, Sequence[str]]) -> list[Snapshot]:
        every = {f"tag:{OWNER}": [self._owner], **wanted}
        items = self._ec2.describe("describe_snapshots", "Snapshots", OwnerIds=["self"], Filters=filters(**every))
        return [snapshot for snapshot in map(_read, items) if snapshot.id not in self._gone]

    def owned(self) -> list[Snapshot]:
        return self._described({})

    def all(self, name: str) -> list[Snapshot]:
        """CreateSnapshot takes no token, so a repeated call may have made several: the first is the one."""
        found = [snapshot for snapshot in self._shared.ask(name) if snapshot.id not in self._gone]
        return sorted(found, key=lambda snapshot: snapshot.started)

    def take(self, disk: Disk, name: str, tags: Mapping[str, str]) -> None:
        """A point in time: from this call's return on, whatever is written to the disk does not reach the snapshot."""
        if self.all(name):
            return
        marked = {**tags, OWNER: self._owner, SNAPSHOT: name}
        self._ec2.call("create_snapshot", VolumeId=disk.id, TagSpecifications=tagged("snapshot", marked))
        crash.point("ebs.snapshot.taken")
        until(lambda: self.all(name) or None, _SHOWN, subject=f"snapshot {name} of {self._subject}")

    def current(self, name: str) -> Snapshot:
        """Raises NotFound."""
        found = self.all(name)
        if not found:
            raise NotFound("EC2 has no such snapshot", subject=f"snapshot {name} of {self._subject}")
        return found[0]

    def completed(self, name: str, tell: Tell | None = None) -> Snapshot:
        """It, once a volume can be made from it. Raises DeadlineExceeded saying how far it is; with `tell`, which is
        told of the progress, it is waited for as long as it takes."""
        progress, told = "", 0

        def look() -> Snapshot | None:
            nonlocal progress, told
            snapshot = self.current(name)
            if snapshot.state == "error":
                raise BackendError("EC2 could not store the snapshot", subject=f"EBS snapshot {snapshot.id}")
            progress = f"{snapshot.progress or '0%'} of {snapshot.id}"
            if tell is not None:
                done = snapshot.size * int(snapshot.progress.rstrip("%") or 0) // 100
                tell(max(0, done - told))
                told = max(told, done)
            return snapshot if snapshot.state == "completed" else None

        waited = _COMPLETED if tell is None else _COMPLETED._replace(seconds=math.inf)
        try:
            return until(look, waited, subject=f"snapshot {name} of {self._subject}")
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error.text} ({progress})", subject=error.subject, hint=error.hint) from None

    def delete(self, name: str) -> None:
        """Gone already is success."""
        for snapshot in self.all(name):
            with contextlib.suppress(NotFound):
                self._ec2.call("delete_snapshot", SnapshotId=snapshot.id)
            self._gone.add(snapshot.id)
            crash.point("ebs.snapshot.deleted")


def _read(item: Item) -> Snapshot:
    return Snapshot(
        id=item["SnapshotId"],
        name=tags_of(item).get(SNAPSHOT, ""),
        state=item["State"],
        size=item["VolumeSize"] * GIB,
        progress=item.get("Progress", ""),
        started=item["StartTime"],
    )
