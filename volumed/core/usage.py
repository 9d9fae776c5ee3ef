"""How full volumes are. Looked up on a timer and on demand, remembered, so that whoever only reads never waits."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from volumed import context
from volumed.core.backends import Backend, Backends
from volumed.core.encryption import overhead
from volumed.core.presence import Presence, handle_of
from volumed.driver import BlockDriver, TreeStatus
from volumed.errors import BackendUnavailable, CommandFailed, HostError, OperationPending, VolumedError
from volumed.model import Volume, VolumeId, VolumeMode, now
from volumed.store.repository import Repository

_log = logging.getLogger(__name__)
COUNTING_TIMEOUT = 30.0


class UsageSample(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. `total` is None for a volume without a size; `used` is None when it could not be told."""

    used: int | None
    total: int | None
    at: datetime


class Room(NamedTuple):
    """Of a mounted file system, or a device: bytes, and inodes where they are counted."""

    total: int
    used: int
    available: int


class Statistics(NamedTuple):
    space: Room
    inodes: Room | None


class Usage:
    def __init__(self, *, repository: Repository, backends: Backends, presence: Presence) -> None:
        self._repository = repository
        self._backends = backends
        self._presence = presence
        self._samples: dict[VolumeId, UsageSample] = {}

    def latest(self, volume_id: VolumeId) -> UsageSample | None:
        return self._samples.get(volume_id)

    def refresh(self, volume: Volume, *, count: bool = True) -> UsageSample:
        """Look now. `count`: walk the tree when its storage does not keep count of it. Raises what the storage does."""
        backend = self._backends.get(volume.backend)
        sample = backend.call(lambda: self._look(volume, backend, count=count))
        self._samples[volume.id] = sample
        return sample

    def statistics(self, volume: Volume) -> Statistics:
        """Of a volume that is mounted on this node, looked up now. Raises DeadlineExceeded, HostError."""
        path = self._presence.path(volume.id)
        if volume.mode is VolumeMode.BLOCK:
            size = volume.size or 0
            return Statistics(space=Room(total=size, used=size, available=0), inodes=None)
        found = self._measure(volume, path)
        space = Room(total=found.total, used=found.used, available=found.available)
        if not found.inodes:  # btrfs makes them as they are needed
            return Statistics(space=space, inodes=None)
        inodes = Room(total=found.inodes, used=found.inodes_used, available=found.inodes_available)
        return Statistics(space=space, inodes=inodes)

    def _measure(self, volume: Volume, path: Path) -> TreeStatus:
        """Behind a server in a child; a local file system answers from memory, where a child would cost more."""
        if self._backends.get(volume.backend).driver.remote:
            return self._presence.host.tree_status(path)
        try:
            found = os.statvfs(path)
        except OSError as error:
            raise HostError(f"cannot be measured: {error.strerror}", subject=f"volume {volume.name}") from None
        unit = found.f_frsize
        return TreeStatus(
            total=found.f_blocks * unit,
            used=(found.f_blocks - found.f_bfree) * unit,
            available=found.f_bavail * unit,
            inodes=found.f_files,
            inodes_used=found.f_files - found.f_ffree,
            inodes_available=found.f_favail,
        )

    def refresh_mounted(self) -> None:
        """On the timer: every mounted volume whose usage costs no walk; what is gone is forgotten."""
        mounted = set(self._presence.mounted_ids())
        self._samples = {key: sample for key, sample in self._samples.items() if key in mounted}
        slow: set[str] = set()  # one that hangs costs a round its patience once
        for volume_id in mounted:
            volume = self._repository.volume(volume_id)
            if volume is None or volume.backend in slow:
                continue
            try:
                with context.request(timeout=5.0):
                    self.refresh(volume, count=False)
            except (OperationPending, BackendUnavailable):
                slow.add(volume.backend)
            except VolumedError as error:
                _log.debug("usage of %s: %s", volume.name, error)

    def _look(self, volume: Volume, backend: Backend, *, count: bool) -> UsageSample:
        path = self._presence.path(volume.id)
        mounted = volume.id in self._presence.mounted_ids()
        if mounted and isinstance(backend.driver, BlockDriver) and volume.mode is VolumeMode.FILESYSTEM:
            room = os.statvfs(path)
            used = (room.f_blocks - room.f_bfree) * room.f_frsize
            return UsageSample(used=used, total=room.f_blocks * room.f_frsize, at=now())
        facts = backend.driver.inspect(handle_of(volume))
        used_there = facts.used
        if used_there is None and count:
            used_there = self._count(volume, mounted=mounted)
        total = None if facts.size is None else facts.size - overhead(volume)
        return UsageSample(used=used_there, total=total, at=now())

    def _count(self, volume: Volume, *, mounted: bool) -> int | None:
        """Walk the tree, in a child that can be killed. Not mounted: not counted, mounting it would be a change."""
        if not mounted:
            return None
        try:
            told = self._presence.host.run(
                ["du", "--summarize", "--block-size=1", "--one-file-system", self._presence.path(volume.id)],
                timeout=COUNTING_TIMEOUT,
            )
        except CommandFailed as error:  # a file that vanished while du looked
            _log.debug("du of %s: %s", volume.name, error)
            return None
        return int(told.stdout.split()[0])
