"""The core put together: what every front end is given, and the threads that keep it true."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from volumed import context
from volumed.config import Settings
from volumed.core.attachments import Attachments
from volumed.core.backends import Backends, open_backend
from volumed.core.bindings import Bindings
from volumed.core.classes import Classes
from volumed.core.consumers.source import ConsumerSource
from volumed.core.doctor import Doctor
from volumed.core.drivers import DriverRegistry
from volumed.core.encryption import Encryption
from volumed.core.events import Events
from volumed.core.groups import GroupSnapshots
from volumed.core.health import Health
from volumed.core.helpers import HelperWatch
from volumed.core.imports import Imports
from volumed.core.journal import Journal
from volumed.core.layer import Layer
from volumed.core.locks import KeyedLocks
from volumed.core.metrics import Metrics
from volumed.core.mounts import Mounts
from volumed.core.planning import Planner
from volumed.core.presence import Presence
from volumed.core.prober import Prober
from volumed.core.provision import Provision
from volumed.core.publications import Publications
from volumed.core.reach import Reach
from volumed.core.reconcile import Reconciler
from volumed.core.snapshots import Snapshots
from volumed.core.takeover import Takeovers
from volumed.core.targets import Targets
from volumed.core.usage import Usage
from volumed.core.volumes import Volumes
from volumed.driver import Host
from volumed.errors import VolumedError
from volumed.store.repository import Repository
from volumed.store.store import Store

_log = logging.getLogger(__name__)

# Our own mounts change the mount table too: looked at together, not one by one.
SETTLE_TIME = 2.0
FIRST_SWEEP, SWEEP_INTERVAL = 60.0, 3600.0
# How long the start, or a round of the timer, waits for a backend; what it began goes on.
PATIENCE = 10.0


class Core:
    """Everything between the front ends and the storage of one node."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        host: Host,
        drivers: DriverRegistry,
        sources: Sequence[ConsumerSource] = (),
    ) -> None:
        """Opens the backends, touches no storage. Raises ConfigError, DriverLoadError."""
        self.settings = settings
        self.node = settings.node
        self.drivers = drivers
        self.repository = Repository(store)
        self.events = Events()
        self.backends = open_backends(settings, drivers=drivers, host=host)
        self.host = host
        self.locks = locks = KeyedLocks()
        mounts_dir = settings.state_dir / "mounts"
        mounts_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.reach = Reach(node=self.node, repository=self.repository, backends=self.backends)
        self.encryption = Encryption(settings.keys, host)
        layer = Layer(host, wanted=settings.live_moves)
        presence = Presence(host, mounts_dir, self.reach, self.encryption, layer)
        self.mounts = Mounts(
            node=self.node,
            repository=self.repository,
            backends=self.backends,
            presence=presence,
            locks=locks,
            events=self.events,
        )
        self.metrics = Metrics(self)
        provision = Provision(presence=presence, mounts=self.mounts, locks=locks)
        self.journal = Journal(
            node=self.node,
            repository=self.repository,
            backends=self.backends,
            provision=provision,
            locks=locks,
            events=self.events,
            observe=self.metrics.operation,
        )
        self.attachments = Attachments(
            node=self.node,
            topology=settings.topology,
            limit=settings.csi.max_volumes,
            repository=self.repository,
            backends=self.backends,
            reach=self.reach,
            locks=locks,
        )
        self._prober = Prober(backends=self.backends, reach=self.reach, found=self.attachments.register)
        self.classes = Classes(settings, self.backends)
        planner = Planner(
            repository=self.repository,
            backends=self.backends,
            classes=self.classes,
            encryption=self.encryption,
            here=lambda: self.attachments.topology,
        )
        self.volumes = Volumes(
            repository=self.repository,
            backends=self.backends,
            mounts=self.mounts,
            locks=locks,
            journal=self.journal,
            provision=provision,
            planner=planner,
            events=self.events,
        )
        self.snapshots = Snapshots(
            repository=self.repository,
            backends=self.backends,
            volumes=self.volumes,
            mounts=self.mounts,
            locks=locks,
            journal=self.journal,
            provision=provision,
            events=self.events,
        )
        self.groups = GroupSnapshots(
            repository=self.repository,
            backends=self.backends,
            snapshots=self.snapshots,
            mounts=self.mounts,
            locks=locks,
            journal=self.journal,
            events=self.events,
        )
        self.publications = Publications(
            node=self.node,
            repository=self.repository,
            backends=self.backends,
            volumes=self.volumes,
            mounts=self.mounts,
            targets=Targets(host, settings.csi.target_roots),
            locks=locks,
            events=self.events,
            grace=settings.consumer_grace,
        )
        self.bindings = Bindings(
            node=self.node,
            repository=self.repository,
            mounts=self.mounts,
            locks=locks,
            events=self.events,
            grace=settings.consumer_grace,
        )
        self.imports = Imports(
            repository=self.repository,
            backends=self.backends,
            presence=presence,
            journal=self.journal,
            provision=provision,
            locks=locks,
            events=self.events,
        )
        self.takeovers = Takeovers(
            node=self.node,
            repository=self.repository,
            backends=self.backends,
            volumes=self.volumes,
            reach=self.reach,
            locks=locks,
            events=self.events,
        )
        self.usage = Usage(repository=self.repository, backends=self.backends, presence=presence)
        self.health = Health(node=self.node, repository=self.repository, backends=self.backends, presence=presence)
        self.reconciler = Reconciler(
            node=self.node,
            repository=self.repository,
            backends=self.backends,
            presence=presence,
            reach=self.reach,
            mounts=self.mounts,
            locks=locks,
            events=self.events,
            observe=self.metrics.reconcile_action,
        )
        self.doctor = Doctor(
            node=self.node,
            repository=self.repository,
            backends=self.backends,
            presence=presence,
            bindings=self.bindings,
            journal=self.journal,
            reconciler=self.reconciler,
            encryption=self.encryption,
            locks=locks,
        )
        self.helpers = HelperWatch(host=host, repository=self.repository, events=self.events)
        self._sources = tuple(sources)
        self._stop = threading.Event()
        self._wake = {source.engine: threading.Event() for source in sources}
        self._threads: list[threading.Thread] = []

    def recover(self, *first: Callable[[], None]) -> None:
        """Before anybody is served: the backends are probed, what a crash cut short is settled, by `first` too, and
        every volume that is bound is mounted again. A backend that hangs is left behind after a few seconds."""
        self._guarded("helpers", self.helpers.look)  # before the probes start them again
        self._prober.look(patience=5.0)
        for settle in first:
            settle()
        self.journal.recover()
        with context.request(timeout=PATIENCE):
            self.reconciler.run()
            self.publications.reconcile()

    def start(self) -> None:
        """Begin to watch the machine and the engines."""
        self._spawn("reconcile", self._keep_converging)
        self._spawn("probe", self._keep_probing)
        self._spawn("sweep", self._sweep)
        for source in self._sources:
            self._spawn(f"consumers-{source.engine}", partial(self._follow, source))
            wake = self._wake[source.engine]
            self._spawn(f"watch-{source.engine}", partial(source.watch, wake.set, self._stop))

    def stop(self) -> None:
        """End the threads; mounts stay as they are, for the containers that use them."""
        self._stop.set()
        for wake in self._wake.values():
            wake.set()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self.backends.close()

    def _spawn(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _keep_converging(self) -> None:
        """On every change of the mount table a glance; every interval, however often it changes, a thorough look."""
        due = time.monotonic() + self.settings.reconcile_interval
        while not self._stop.is_set():
            # In slices, so that a stop is noticed.
            changed = self.host.wait_for_mount_change(min(1.0, max(0.0, due - time.monotonic())))
            thorough = time.monotonic() >= due
            if not changed and not thorough:
                continue
            if changed and self._stop.wait(SETTLE_TIME):
                return
            if thorough:
                self._guarded("helpers", self.helpers.look)
            with context.request(timeout=PATIENCE):
                self._guarded("reconciling", partial(self.reconciler.run, thorough=thorough))
            if thorough:
                self._guarded("recovery", self.journal.recover)
                with context.request(timeout=PATIENCE):
                    self._guarded("publications", self.publications.reconcile)
                self._guarded("usage", self.usage.refresh_mounted)
                due = time.monotonic() + self.settings.reconcile_interval

    def _keep_probing(self) -> None:
        while not self._stop.wait(self.settings.reconcile_interval):
            self._guarded("probing", partial(self._prober.look, patience=PATIENCE))

    def _follow(self, source: ConsumerSource) -> None:
        """Compare bindings with the engine's containers on each of its events, and on the timer."""
        wake = self._wake[source.engine]
        while not self._stop.is_set():
            with context.request(timeout=PATIENCE):
                self._guarded(f"bindings of {source.engine}", lambda: self.bindings.reconcile(source))
            wake.wait(min(self.settings.reconcile_interval, max(self.settings.consumer_grace, 1.0)))
            if self._stop.wait(0.2):  # events come in bursts: one look for all of them
                return
            wake.clear()

    def _sweep(self) -> None:
        """Now and then: old history goes, and the metrics learn what the doctor would find."""
        pause = FIRST_SWEEP
        while not self._stop.wait(pause):
            pause = SWEEP_INTERVAL
            self._guarded("history", lambda: self.bindings.forget_history(older_than=self.settings.history))
            with context.request():
                self._guarded("doctor", self._count_findings)

    def _count_findings(self) -> None:
        self.metrics.findings(Counter(finding.kind for finding in self.doctor.examine()))

    @staticmethod
    def _guarded(what: str, job: Callable[[], None]) -> None:
        try:
            job()
        except VolumedError as error:
            _log.warning("%s goes on later: %s", what, error)
        except Exception:
            _log.exception("%s failed; it is tried again", what)


def open_backends(settings: Settings, *, drivers: DriverRegistry, host: Host) -> Backends:
    opened = [
        open_backend(
            name,
            table.options,
            driver_name=table.driver,
            workers=table.workers,
            disabled=table.disabled_capabilities,
            encrypt=table.encrypt,
            where=partial(settings.locate, "backends", name),
            drivers=drivers,
            host=host,
        )
        for name, table in settings.backends.items()
    ]
    return Backends(opened, default=settings.default_backends)


def ledger_path(settings: Settings) -> Path:
    return settings.state_dir / "ledger.db"
