"""What should be mounted on this node, what is, and the one small action for each pair of the two.

Converging, not scripting: it runs at start, when the mount table changed, and on a timer, and does nothing when the
ledger and the machine agree. The table is complete by test.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import logging
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

from volumed.core.backends import Backend, Backends
from volumed.core.events import Events
from volumed.core.locks import KeyedLocks
from volumed.core.mounts import Mounts, describe_each, wanted_options
from volumed.core.presence import Observed, Presence
from volumed.core.reach import Reach
from volumed.driver import BlockDriver
from volumed.errors import HostError, InUse, OperationPending, VolumedError
from volumed.model import Binding, Engine, Volume, VolumeId, VolumeState
from volumed.store.repository import Repository

_log = logging.getLogger(__name__)


class Desired(enum.StrEnum):
    BOUND = "bound"  # somebody on this node holds it
    UNBOUND = "unbound"


class Action(enum.StrEnum):
    NOTHING = "nothing"
    MOUNT = "mount"
    UNMOUNT = "unmount"
    REPORT = "report"  # what lies there is not ours to touch
    NAME = "name"  # who still uses what is lost: only they can let go of it


TABLE: Mapping[tuple[Desired, Observed], Action] = {
    (Desired.BOUND, Observed.ABSENT): Action.MOUNT,
    (Desired.BOUND, Observed.MAPPED): Action.MOUNT,
    (Desired.BOUND, Observed.MOUNTED): Action.NOTHING,
    (Desired.BOUND, Observed.DEAD): Action.MOUNT,
    (Desired.BOUND, Observed.LOST): Action.NAME,
    (Desired.BOUND, Observed.FOREIGN): Action.REPORT,
    (Desired.UNBOUND, Observed.ABSENT): Action.NOTHING,
    (Desired.UNBOUND, Observed.MAPPED): Action.UNMOUNT,
    (Desired.UNBOUND, Observed.MOUNTED): Action.UNMOUNT,
    (Desired.UNBOUND, Observed.DEAD): Action.UNMOUNT,
    (Desired.UNBOUND, Observed.LOST): Action.UNMOUNT,
    (Desired.UNBOUND, Observed.FOREIGN): Action.REPORT,
}


class Reconciler:
    def __init__(
        self,
        *,
        node: str,
        repository: Repository,
        backends: Backends,
        presence: Presence,
        reach: Reach,
        mounts: Mounts,
        locks: KeyedLocks,
        events: Events,
        observe: Callable[[str], None],
    ) -> None:
        """`observe` is told every action taken."""
        self._node = node
        self._repository = repository
        self._backends = backends
        self._presence = presence
        self._reach = reach
        self._mounts = mounts
        self._locks = locks
        self._events = events
        self._observe = observe

    def run(self, *, thorough: bool = True) -> None:
        """Bring the machine to what the ledger says. `thorough` looks at every bound and every present volume; else
        only at those where ledger and mount table differ at first sight. Errors of one volume stop no other."""
        bound = {binding.volume_id for binding in self._repository.bindings(node=self._node)}
        mounted = self._presence.scan()
        if thorough:
            self._tidy(mounted)
        suspects = bound ^ mounted
        if thorough:
            suspects = bound | mounted | self.mapped() | self._reach.left_here()
        by_backend: dict[str, list[Volume]] = {}
        for volume_id in suspects:
            volume = self._repository.volume(volume_id)
            if volume is not None and volume.handle is not None:
                by_backend.setdefault(volume.backend, []).append(volume)
        # Side by side: one that hangs must not use up the others' time.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._converge_backend, name, volumes))
            for name, volumes in by_backend.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _tidy(self, mounted: Set[VolumeId]) -> None:
        """Mount points of volumes that are gone, which a power cut brought back. One that holds anything stays, and is
        the doctor's to report."""
        for path in self._presence.mounts_dir.iterdir():
            volume_id = VolumeId(path.name)
            if volume_id in mounted or self._repository.volume(volume_id) is not None:
                continue
            with contextlib.suppress(OperationPending, HostError), self._locks.hold(volume_id, wait=0.0):
                if self._repository.volume(volume_id) is None:
                    self._presence.forget(volume_id)

    def mapped(self) -> set[VolumeId]:
        """Volumes whose device is on this node, mounted or not."""
        found: set[VolumeId] = set()
        for backend in self._backends.all():
            driver = backend.driver
            if isinstance(driver, BlockDriver) and backend.health.ok:
                try:
                    found |= {known for there in backend.call(driver.mappings) if (known := self._volume_of(there))}
                except VolumedError as error:
                    _log.warning("backend %s: %s", backend.name, error, extra={"backend": backend.name})
        return found

    def _volume_of(self, storage_id: VolumeId) -> VolumeId | None:
        """Of a device on this node; None for the other place of a move, which is the move's affair."""
        volume = self._repository.volume_stored_as(storage_id)
        if volume is None and self._repository.migration_holding(storage_id) is not None:
            return None
        return volume.id if volume else storage_id

    def _converge_backend(self, name: str, volumes: list[Volume]) -> None:
        try:
            self._backends.get(name).call(partial(self._converge_all, volumes))
        except VolumedError as error:
            _log.warning("backend %s: reconciling goes on later: %s", name, error, extra={"backend": name})

    def _converge_all(self, volumes: list[Volume]) -> None:
        for volume in volumes:
            try:
                self.converge(volume.id)
            except OperationPending:
                continue  # somebody is at it, and will leave it in order
            except VolumedError as error:
                _log.error("volume %s: %s", volume.name, error, extra={"volume": volume.name})
            except Exception:
                _log.exception("volume %s: reconciling failed", volume.name, extra={"volume": volume.name})

    def converge(self, volume_id: VolumeId) -> None:
        """One volume. Raises OperationPending while somebody else is at it."""
        with self._locks.hold(volume_id, wait=0.0):
            volume = self._repository.volume(volume_id)
            if volume is None or volume.state is not VolumeState.READY:
                return  # the journal's, not ours
            backend = self._backends.get(volume.backend)
            held = self._repository.bindings(volume_id, node=self._node)
            migration = self._repository.migration_of(volume_id)
            if migration is not None and migration.phase.committed:
                return  # its move shows it, or takes it back
            if held and all(binding.engine is Engine.VOLUMED and binding.block for binding in held):
                return  # its blocks are being moved, and nobody else is there
            desired = Desired.BOUND if held else Desired.UNBOUND
            observed = self._presence.observe(volume, backend.driver)
            self._act(TABLE[desired, observed], volume, backend, held)
            if (desired, observed) == (Desired.UNBOUND, Observed.ABSENT):
                self._reach.detach_here(volume)

    def _act(self, action: Action, volume: Volume, backend: Backend, held: Sequence[Binding]) -> None:
        if action is Action.NOTHING:
            return
        self._observe(action)
        if action is Action.MOUNT:
            self._presence.establish(volume, backend.driver, options=wanted_options(held))
            self._events.publish("mount.repaired", volume.name, "is bound and was not mounted: mounted it again")
            if backend.driver.remote:
                self._revive(volume)
        elif action is Action.UNMOUNT:
            try:
                self._presence.remove(volume, backend.driver)
            except InUse as error:
                _log.warning("%s", error, extra={"volume": volume.name})
                return
            self._events.publish("mount.removed", volume.name, "nobody is bound to it: unmounted it")
        elif action is Action.REPORT:
            self._events.publish(
                "mount.foreign",
                volume.name,
                f"something that is not this volume is mounted at {self._presence.path(volume.id)}",
                level=logging.ERROR,
            )
        elif action is Action.NAME:
            users = ", ".join(line for binding in held for line in describe_each(binding))
            self._events.publish(
                "mount.lost",
                volume.name,
                f"its device has gone from this machine, and is used by {users}: stop them to have it mounted anew",
                level=logging.ERROR,
            )

    def _revive(self, volume: Volume) -> None:
        """Whoever had the volume before has a mount of its own of it, and that is as dead as ours was."""
        for seen in self._presence.revive(volume):
            who = f"process {seen.pid} and what runs beside it"
            if seen.error:
                self._events.publish(
                    "mount.dead",
                    volume.name,
                    f"{who} still sees a dead mount at {seen.path} ({seen.error}): restart the container",
                    level=logging.CRITICAL,
                )
            else:
                self._events.publish("mount.revived", volume.name, f"{who} has it again at {seen.path}")

    def release_all(self) -> None:
        """Unmount every volume on this node, bound or not, as far as no process holds it: the machine goes down."""
        for volume_id in sorted(self._presence.scan() | self.mapped()):
            volume = self._repository.volume(volume_id)
            if volume is None:
                continue
            backend = self._backends.get(volume.backend)
            try:
                with self._locks.hold(volume_id, wait=5.0):
                    self._presence.remove(volume, backend.driver)
            except VolumedError as error:
                _log.error("%s", error, extra={"volume": volume.name})
        for backend in self._backends.all():
            try:
                backend.driver.leave()
            except VolumedError as error:
                _log.error("backend %s: %s", backend.name, error, extra={"backend": backend.name})
