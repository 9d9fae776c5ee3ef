"""Classes: backends that serve one purpose under one name, with what a volume is there unless somebody says otherwise.

A volume may name a class in the place of a backend, and remembers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from volumed.config import Settings
from volumed.core.backends import Backend, Backends
from volumed.core.options import nearest, option_keys
from volumed.driver import BlockDriver, Capability
from volumed.errors import ConfigError, InvalidRequest
from volumed.units import parse_size


class PlacementClass(msgspec.Struct, frozen=True, kw_only=True):
    """`options`: of the drivers, each of which is given those it knows."""

    name: str
    backends: tuple[str, ...]
    requires: frozenset[Capability] = frozenset()
    topology: dict[str, str] = {}
    size: int | None = None
    filesystem: str = ""
    mkfs_options: tuple[str, ...] = ()
    mount_options: tuple[str, ...] = ()
    encryption: str = ""  # the name of a key
    options: dict[str, str] = {}

    @property
    def places(self) -> Sequence[Mapping[str, str]]:
        return (self.topology,) if self.topology else ()

    def options_for(self, backend: Backend) -> dict[str, str]:
        known = option_keys(backend.driver.VolumeOptions)
        return {key: value for key, value in self.options.items() if key in known}

    def filesystem_for(self, backend: Backend) -> str:
        """Folders have the backend's own."""
        return self.filesystem if isinstance(backend.driver, BlockDriver) else ""


class Classes:
    def __init__(self, settings: Settings, backends: Backends) -> None:
        """Raises ConfigError for an option that no driver of the class knows."""
        self._classes = {name: _read(name, settings) for name in settings.classes}
        for found in self._classes.values():
            known = {key for name in found.backends for key in option_keys(backends.get(name).driver.VolumeOptions)}
            for key in found.options:
                if key not in known:
                    raise ConfigError(
                        f"no driver of class {found.name} has an option {key!r}",
                        subject=settings.locate("classes", found.name, "options", key),
                        hint=nearest(key, known),
                    )

    def all(self) -> list[PlacementClass]:
        return list(self._classes.values())

    def get(self, name: str) -> PlacementClass:
        """Raises InvalidRequest for an unknown one, naming the nearest."""
        try:
            return self._classes[name]
        except KeyError:
            raise InvalidRequest(f"there is no class {name[:60]!r}", hint=nearest(name[:60], self._classes)) from None


def _read(name: str, settings: Settings) -> PlacementClass:
    given = settings.classes[name]
    return PlacementClass(
        name=name,
        backends=given.backends,
        requires=frozenset(map(Capability, given.requires)),
        topology=given.topology,
        size=parse_size(given.size) if given.size else None,
        filesystem=given.fs,
        mkfs_options=tuple(given.mkfs_options.split()),
        mount_options=tuple(word for word in given.mount_options.split(",") if word),
        encryption=given.encrypt,
        options={key: _word(value) for key, value in given.options.items()},
    )


def _word(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
