"""What Prometheus is told. Counted as it happens; what the ledger knows is read when somebody asks."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from volumed.core.core import Core

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time series per histogram that nobody asks for

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Documented(NamedTuple):
    name: str
    help: str
    labels: tuple[str, ...] = ()


OPERATIONS = Documented("volumed_operation_seconds", "Operations on storage, by kind and outcome", ("kind", "outcome"))
REQUESTS = Documented(
    "volumed_request_seconds",
    "Requests answered, by front end, endpoint and outcome",
    ("frontend", "endpoint", "outcome"),
)
RECONCILED = Documented(
    "volumed_reconcile_actions_total", "Differences between ledger and machine put right", ("action",)
)
VOLUMES = Documented("volumed_volumes", "Volumes in the ledger, by backend", ("backend",))
PROVISIONED = Documented("volumed_provisioned_bytes", "Sizes of all volumes that have one, by backend", ("backend",))
BINDINGS = Documented("volumed_bindings", "Bindings of consumers to volumes, by engine", ("engine",))
MOUNTED = Documented("volumed_mounted_volumes", "Volumes mounted on this node")
BACKEND_UP = Documented("volumed_backend_up", "1 when the last probe of the backend succeeded", ("backend", "driver"))
BACKEND_SINCE = Documented(
    "volumed_backend_health_since_seconds", "Unix time at which the backend became well, or ill", ("backend",)
)
CAPACITY = Documented("volumed_backend_capacity_bytes", "Room of the backend, as it was last measured", ("backend",))
AVAILABLE = Documented("volumed_backend_available_bytes", "... and what of it is free", ("backend",))
STUCK = Documented("volumed_stuck_operations", "Operations set aside with an error, tried again on the timer")
MIGRATIONS = Documented("volumed_migrations", "Moves of volumes, by phase; those that ended are history", ("phase",))
COPIES = Documented(
    "volumed_copies",
    "Clones, backups and restores, by kind and state; but for backups those that ended are history",
    ("kind", "state"),
)
MISSING = Documented("volumed_missing_mounts", "Running containers whose volume is not mounted")
ORPHANS = Documented("volumed_findings", "What the last run of the doctor found, by kind", ("kind",))

METRICS = (
    *(OPERATIONS, REQUESTS, RECONCILED, VOLUMES, PROVISIONED, BINDINGS),
    *(BACKEND_SINCE, CAPACITY, AVAILABLE),
    *(MOUNTED, BACKEND_UP, STUCK, MIGRATIONS, COPIES, MISSING, ORPHANS),
)


class Metrics:
    def __init__(self, core: Core) -> None:
        self._registry = CollectorRegistry()
        self._operations = Histogram(*OPERATIONS, registry=self._registry, buckets=_SECONDS)
        self._requests = Histogram(*REQUESTS, registry=self._registry, buckets=_SECONDS)
        self._reconciled = Counter(*RECONCILED, registry=self._registry)
        self._findings: dict[str, int] = {}
        self._registry.register(_LedgerCollector(core, self._findings))

    def operation(self, kind: str, outcome: str, seconds: float) -> None:
        self._operations.labels(kind, outcome).observe(seconds)

    def request(self, frontend: str, endpoint: str, outcome: str, seconds: float) -> None:
        self._requests.labels(frontend, endpoint, outcome).observe(seconds)

    def reconcile_action(self, action: str) -> None:
        self._reconciled.labels(action).inc()

    def findings(self, counts: dict[str, int]) -> None:
        self._findings.clear()
        self._findings.update(counts)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _LedgerCollector(Collector):
    def __init__(self, core: Core, findings: dict[str, int]) -> None:
        self._core = core
        self._findings = findings

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read a ledger that is not open yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        core = self._core
        volumes, sizes = _gauge(VOLUMES), _gauge(PROVISIONED)
        counts: dict[str, int] = {backend.name: 0 for backend in core.backends.all()}
        totals = dict(counts)
        for volume in core.repository.volumes():
            counts[volume.backend] = counts.get(volume.backend, 0) + 1
            totals[volume.backend] = totals.get(volume.backend, 0) + (volume.size or 0)
        for name, count in counts.items():
            volumes.add_metric([name], count)
            sizes.add_metric([name], totals[name])
        yield volumes
        yield sizes
        bindings = _gauge(BINDINGS)
        engines: dict[str, int] = {}
        for binding in core.bindings.all():
            if binding.staging:
                continue
            engines[binding.engine] = engines.get(binding.engine, 0) + 1
        for engine, count in engines.items():
            bindings.add_metric([engine], count)
        yield bindings
        yield from self._backends()
        yield _gauge(MOUNTED, len(core.mounts.mounted_ids()))
        yield _gauge(STUCK, sum(bool(operation.error) for operation in core.repository.operations()))
        moves = _gauge(MIGRATIONS)
        for phase, count in Counts(migration.phase for migration in core.repository.migrations()).items():
            moves.add_metric([phase], count)
        yield moves
        copies = _gauge(COPIES)
        for labels, count in Counts((copy.kind, copy.state) for copy in core.repository.copies()).items():
            copies.add_metric(labels, count)
        yield copies
        yield _gauge(MISSING, len(core.bindings.missing_mounts()))
        found = _gauge(ORPHANS)
        for kind, count in dict(self._findings).items():
            found.add_metric([kind], count)
        yield found

    def _backends(self) -> Iterator[Metric]:
        """As the last probe saw them."""
        up, since, capacity, available = map(_gauge, (BACKEND_UP, BACKEND_SINCE, CAPACITY, AVAILABLE))
        for backend in self._core.backends.all():
            up.add_metric([backend.name, backend.driver_name], float(backend.health.ok))
            if backend.health.since is not None:
                since.add_metric([backend.name], backend.health.since.timestamp())
            if backend.measured is not None:
                capacity.add_metric([backend.name], backend.measured.total)
                available.add_metric([backend.name], backend.measured.available)
        yield from (up, since, capacity, available)


def _gauge(metric: Documented, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(metric.name, metric.help, value=value, labels=metric.labels if value is None else None)
