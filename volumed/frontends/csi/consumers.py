"""Who a publication is for: what each orchestrator shows of itself, in a request's context and paths.

Kubernetes adds the pod to the context (podInfoOnMount of the CSIDriver object). Nomad tells it by the path alone, Swarm
publishes once per node and tells nobody, Mesos tells nobody either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from volumed.frontends.csi.requests import KUBERNETES
from volumed.model import Consumer, Engine

_POD = re.compile(r"/pods/([^/]+)/volumes/kubernetes\.io~csi/[^/]+/mount$")
_POD_DEVICE = re.compile(r"/plugins/kubernetes\.io/csi/volumeDevices/publish/[^/]+/([^/]+)$")
_ALLOCATION = re.compile(r"/per-alloc/([^/]+)/")
_SWARM = re.compile(r"/data/(?:staged|published)/([^/]+)$")
# Any path of theirs, staging paths too.
_PATHS = (
    (re.compile(r"/plugins/kubernetes\.io/csi/|/pods/[^/]+/volumes/"), Engine.KUBERNETES),
    (re.compile(r"/per-alloc/|/csi/staging/"), Engine.NOMAD),
    (_SWARM, Engine.SWARM),
    (re.compile(r"/mesos/"), Engine.MESOS),
)


class Holder(NamedTuple):
    engine: Engine
    consumer: Consumer


def engine_of(path: str) -> Engine:
    return next((engine for pattern, engine in _PATHS if pattern.search(path)), Engine.CSI)


def holder_of(path: str, context: Mapping[str, str], *, readonly: bool) -> Holder:
    """The consumer as far as it shows itself; never fails."""
    told = {key.removeprefix(KUBERNETES): value for key, value in context.items() if key.startswith(KUBERNETES)}
    if told.get("pod.name"):
        return Holder(Engine.KUBERNETES, _pod(path, told, readonly=readonly))
    pod = _POD.search(path) or _POD_DEVICE.search(path)
    if pod:
        return Holder(Engine.KUBERNETES, Consumer(id=pod[1], kind="pod", target=path, readonly=readonly))
    allocation = _ALLOCATION.search(path)
    if allocation:
        return Holder(Engine.NOMAD, Consumer(id=allocation[1], kind="allocation", target=path, readonly=readonly))
    swarm = _SWARM.search(path)
    if swarm:
        return Holder(Engine.SWARM, Consumer(id=swarm[1], kind="cluster volume", target=path, readonly=readonly))
    return Holder(engine_of(path), Consumer(id=path, name=path, kind="workload", readonly=readonly))


def _pod(path: str, told: Mapping[str, str], *, readonly: bool) -> Consumer:
    details = {"service-account": account} if (account := told.get("serviceAccount.name")) else {}
    return Consumer(
        id=told.get("pod.uid", ""),
        name=f"{told.get('pod.namespace', 'default')}/{told['pod.name']}",
        kind="pod",
        target=path,
        readonly=readonly,
        details=details,
    )
