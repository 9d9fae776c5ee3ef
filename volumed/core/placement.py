"""Which backend a new volume goes to: by what it can do, where it can be reached, and how much room it has.

From the last probe alone: no storage is asked, and so none that hangs holds up the choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from volumed.core.backends import Backend, Backends
from volumed.driver import BlockDriver, Capability
from volumed.errors import BackendUnavailable, CapacityExhausted, InvalidRequest, NotSupported, VolumedError
from volumed.model import VolumeMode

DEFAULT_FILESYSTEM = "ext4"
# For a block driver when nobody said how large: sparse storage gives it for nothing.
DEFAULT_SIZE = 10 * 1024**3

Topology = Mapping[str, str]  # segments, of a node or of a place


class Needs(NamedTuple):
    """What is asked of the backend of a volume."""

    mode: VolumeMode
    size: int | None = None
    filesystem: str = ""
    multi_node: bool = False  # several nodes at once
    capabilities: frozenset[Capability] = frozenset()
    places: Sequence[Topology] = ()  # one of them must reach it; none: wherever it is reached from
    region: Topology = MappingProxyType({})  # a place that must reach it besides
    encrypted: bool = False


def bounds(backend: Backend, here: Topology) -> Topology:
    """The segments that a node must have to reach the backend's volumes; empty: any node does. `here`: this node's."""
    if backend.topology:
        return backend.topology
    if backend.capabilities & {Capability.MULTI_NODE, Capability.ATTACH}:
        return {}
    return here


def reaches(backend: Backend, place: Topology, here: Topology) -> bool:
    """Whether from a place the backend's volumes can be had; segments that a place does not tell fit."""
    within = bounds(backend, here)
    if within is here and not place.keys() <= here.keys():
        return False  # a place that this node knows nothing of is not where this node is
    return all(place.get(key, value) == value for key, value in within.items())


def choose_backend(
    backends: Backends, needs: Needs, *, here: Topology, name: str = "", among: Sequence[str] = ()
) -> Backend:
    """The backend that was named; else, `among` a class's, the one with the most room of those that can do all that is
    asked; else the first such one of the default ones.

    Raises InvalidRequest for an unknown name, and the reason, or each backend's, when none will do.
    """
    names = [name] if name else among or backends.default
    fitting: list[Backend] = []
    refusals: list[VolumedError] = []
    for each in names:
        backend = backends.get(each)
        try:
            check(backend, needs, here=here)
        except VolumedError as error:
            refusals.append(error)
        else:
            fitting.append(backend)
    if not fitting:
        raise _nowhere(refusals)
    return _roomiest(fitting, needs.size) if among else fitting[0]


def _roomiest(fitting: Sequence[Backend], size: int | None) -> Backend:
    """Of equals the first; one that does not tell its room comes after those that have enough, and before those that
    have not, as thin storage may bear more than it has."""

    def room(backend: Backend) -> tuple[int, int]:
        if backend.measured is None:
            return 1, 0
        enough = backend.measured.available >= (size or 1)
        return (2 if enough else 0), backend.measured.available

    return max(fitting, key=room)


def _nowhere(refusals: Iterable[VolumedError]) -> VolumedError:
    every = list(refusals)
    if not every:
        return InvalidRequest("no backend is configured", hint="add a [backends.NAME] table to volumed.toml")
    if len(every) == 1:
        return every[0]
    text = "no backend that may hold this volume can: " + "; ".join(str(error) for error in every)
    if any(isinstance(error, CapacityExhausted) for error in every):
        return CapacityExhausted(text)
    if all(isinstance(error, BackendUnavailable) for error in every):
        return BackendUnavailable(text)
    return NotSupported(text)


def check(backend: Backend, needs: Needs, *, here: Topology) -> None:
    """Raises what speaks against the backend: BackendUnavailable, NotSupported, CapacityExhausted for a place."""
    subject = f"backend {backend.name}"
    if not backend.health.ok:
        raise BackendUnavailable(f"cannot be used now: {backend.health.error}", subject=subject)
    backend.require(Capability.BLOCK if needs.mode is VolumeMode.BLOCK else Capability.FILESYSTEM)
    if needs.size is not None:
        backend.require(Capability.SIZE)
    if needs.multi_node:
        backend.require(Capability.MULTI_NODE)
    for capability in sorted(needs.capabilities):
        backend.require(capability)
    if needs.filesystem and not isinstance(backend.driver, BlockDriver):
        raise NotSupported(
            f"volumes are folders of the backend's own file system, so fs={needs.filesystem} cannot be had",
            subject=subject,
            hint="leave fs out, or name a backend of block devices such as driver image",
        )
    if needs.encrypted and not isinstance(backend.driver, BlockDriver):
        raise NotSupported(
            "volumes are folders, which cannot be encrypted",
            subject=subject,
            hint="name a backend of block devices such as driver image",
        )
    anywhere = not needs.places or any(reaches(backend, place, here) for place in needs.places)
    if not anywhere or (needs.region and not reaches(backend, needs.region, here)):
        raise CapacityExhausted("cannot be reached from where the volume is wanted", subject=subject)
