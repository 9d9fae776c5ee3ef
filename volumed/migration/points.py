"""A volume as it is at one point in time: a snapshot made readable where its backend takes one of a volume in use, else
the volume itself while nobody uses it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import NamedTuple

from volumed.core.core import Core
from volumed.core.planning import CreateVolume
from volumed.driver import Capability
from volumed.errors import InUse, VolumedError
from volumed.model import CopyId, Volume
from volumed.testing import crash


class Point(NamedTuple):
    """`text`: how it is of one point in time, for people."""

    volume: Volume
    text: str


class Points:
    def __init__(self, core: Core) -> None:
        self._core = core

    def check(self, volume: Volume, snapshot: str) -> None:
        """Raises NotFound for a snapshot that is not there, InUse for a volume that is used and cannot be copied so."""
        if snapshot:
            self._core.snapshots.get(volume.id, snapshot)
            return
        holders = self._core.mounts.holders(volume)
        if holders and not self._takes_snapshots(volume):
            backend = self._core.backends.get(volume.backend)
            lacking = (backend.lacking.get(each) for each in (Capability.SNAPSHOT, Capability.SNAPSHOT_LIVE))
            reason = next(filter(None, lacking), f"backend {backend.name} takes no snapshots of volumes in use")
            raise InUse(
                "cannot be copied as of one moment while it is in use by",
                holders=holders,
                subject=f"volume {volume.name}",
                hint=f"stop them first: {reason}",
            )

    def _takes_snapshots(self, volume: Volume) -> bool:
        capabilities = self._core.backends.get(volume.backend).capabilities
        return {Capability.SNAPSHOT, Capability.SNAPSHOT_LIVE} <= capabilities

    @contextlib.contextmanager
    def of(self, volume: Volume, snapshot: str, owner: CopyId) -> Iterator[Point]:
        """What is made for it goes again; what a crash leaves of it is known by its owner. The volume itself is locked
        by whoever reads it."""
        if volume.hidden or (not snapshot and not self._takes_snapshots(volume)):
            yield Point(volume, "nobody used it")
            return
        core, taken, text = self._core, None, f"snapshot {snapshot}"
        with contextlib.ExitStack() as cleanup:
            if not snapshot:
                taken = core.snapshots.create(volume.id, f"copying-{secrets.token_hex(6)}", hidden=owner)
                cleanup.callback(_quietly, lambda: core.snapshots.destroy(taken))
                snapshot, text = taken.name, f"a snapshot of {taken.created:%Y-%m-%d %H:%M:%S}Z"
                crash.point("copy.snapped")
            view = core.volumes.create(
                CreateVolume(
                    name=f"{volume.name[:200]}-as-it-was",
                    mode=volume.mode,
                    source=f"{volume.id}@{snapshot}",
                    hidden=owner,
                )
            )
            cleanup.callback(_quietly, lambda: core.volumes.discard(view))
            crash.point("copy.viewed")
            yield Point(view, text)


def _quietly(job: object) -> None:
    """What stays is taken away later, by its owner."""
    with contextlib.suppress(VolumedError):
        job()  # type: ignore[operator]
