"""Drivers that are installed, found through the entry-point group `volumed.drivers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from volumed.driver import BlockDriver, Driver, FilesystemDriver
from volumed.errors import DriverLoadError

GROUP = "volumed.drivers"


@dataclass(frozen=True)
class DriverInfo:
    name: str
    distribution: str
    load: Callable[[], type[Driver]]  # imports the driver's module, and so its SDK

    @property
    def cls(self) -> type[Driver]:
        return self.load()


class DriverRegistry:
    def __init__(self, found: Iterable[DriverInfo]) -> None:
        """Raises DriverLoadError when two distributions bring one name: which one ran would be chance."""
        self._drivers: dict[str, DriverInfo] = {}
        for info in found:
            rival = self._drivers.setdefault(info.name, info)
            if rival is not info:
                raise DriverLoadError(
                    f"two distributions bring a driver {info.name!r}: {rival.distribution} and {info.distribution}",
                    hint="uninstall one of them",
                )

    @classmethod
    def installed(cls) -> DriverRegistry:
        points = {(point.name, point.value, _distribution(point)): point for point in entry_points(group=GROUP)}
        return cls(
            DriverInfo(name=point.name, distribution=_distribution(point), load=_loader(point))
            for point in points.values()
        )

    def all(self) -> list[DriverInfo]:
        return sorted(self._drivers.values(), key=lambda info: info.name)

    def get(self, name: str) -> DriverInfo:
        """Raises DriverLoadError for a name that nobody brings."""
        try:
            return self._drivers[name]
        except KeyError:
            known = ", ".join(sorted(self._drivers))
            raise DriverLoadError(f"there is no driver {name!r}", hint=f"installed are: {known}") from None


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"


def _loader(point: EntryPoint) -> Callable[[], type[Driver]]:
    def load() -> type[Driver]:
        try:
            loaded = point.load()
        except Exception as error:
            raise DriverLoadError(
                f"driver {point.name!r} of {_distribution(point)} cannot be loaded: {error}",
                hint=f"install what it needs, perhaps volumed[{point.name}]",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, FilesystemDriver | BlockDriver)):
            raise DriverLoadError(f"driver {point.name!r}: {point.value} is no FilesystemDriver and no BlockDriver")
        return loaded

    return load
