"""Which backend a new volume goes to, and what it will be there."""

from __future__ import annotations

from volumed.core.backends import Backend, Backends
from volumed.driver import BlockDriver, Capability
from volumed.errors import BackendUnavailable, InvalidRequest, NotSupported, VolumedError
from volumed.model import VolumeMode

DEFAULT_FILESYSTEM = "ext4"
# For a block driver when nobody said how large: sparse storage gives it for nothing.
DEFAULT_SIZE = 10 * 1024**3


def choose_backend(
    backends: Backends, *, name: str, size: int | None, mode: VolumeMode, filesystem: str, multi_node: bool = False
) -> Backend:
    """The backend that was named, else the first of the default ones that can do all that is asked.

    Raises InvalidRequest for an unknown name, NotSupported or BackendUnavailable with each backend's reason.
    """
    candidates = [backends.get(name)] if name else [backends.get(default) for default in backends.default]
    refusals: list[VolumedError] = []
    for backend in candidates:
        try:
            _check(backend, size=size, mode=mode, filesystem=filesystem, multi_node=multi_node)
        except VolumedError as error:
            refusals.append(error)
        else:
            return backend
    if len(refusals) == 1:
        raise refusals[0]
    if not refusals:
        raise InvalidRequest("no backend is configured", hint="add a [backends.NAME] table to volumed.toml")
    raise NotSupported("no default backend can hold this volume: " + "; ".join(str(error) for error in refusals))


def _check(backend: Backend, *, size: int | None, mode: VolumeMode, filesystem: str, multi_node: bool) -> None:
    if not backend.health.ok:
        raise BackendUnavailable(f"cannot be used now: {backend.health.error}", subject=f"backend {backend.name}")
    backend.require(Capability.BLOCK if mode is VolumeMode.BLOCK else Capability.FILESYSTEM)
    if size is not None:
        backend.require(Capability.SIZE)
    if multi_node:
        backend.require(Capability.MULTI_NODE)
    if filesystem and not isinstance(backend.driver, BlockDriver):
        raise NotSupported(
            f"volumes are folders of the backend's own file system, so fs={filesystem} cannot be had",
            subject=f"backend {backend.name}",
            hint="leave fs out, or name a backend of block devices such as driver image",
        )
