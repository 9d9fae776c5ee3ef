"""Core on a host that is not there and storage that is memory: what needs no kernel is tested without one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from volumed.config import BackendSettings, CsiSettings, Settings
from volumed.core.consumers.source import ConsumerSource, Hold
from volumed.core.core import Core, ledger_path
from volumed.core.drivers import DriverInfo, DriverRegistry
from volumed.core.planning import CreateVolume
from volumed.driver import Capability, Host, Options
from volumed.model import Consumer, Engine, Volume
from volumed.store.sqlite import SqliteStore
from volumed.testing.fake_host import FakeHost
from volumed.testing.memory import MemoryDriver, MemoryStorage


class FakeEngine(ConsumerSource):
    """`holds` is what the engine would tell; None while it cannot be asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.holds: list[Hold] | None = []

    def look(self) -> list[Hold] | None:
        return self.holds

    def watch(self, changed: Callable[[], None], stop: threading.Event) -> None:
        stop.wait()

    def run(self, volume: str, mount_id: str | None, name: str = "web-1", *, running: bool = True) -> None:
        consumer = Consumer(id=name * 16, name=name, image="busybox", pid=7, target="/data")
        assert self.holds is not None
        self.holds.append(Hold(volume=volume, mount_id=mount_id, consumer=consumer, running=running))


class Lab:
    """A core that can be restarted over the same ledger, mounts and storage."""

    def __init__(self, folder: Path, *, driver: type[MemoryDriver] = MemoryDriver, **settings: Any) -> None:
        self.host = FakeHost()
        self._driver = driver
        self.storages: dict[str, MemoryStorage] = {}
        self.docker = FakeEngine(Engine.DOCKER)
        self.root = folder / "pods"  # where an orchestrator may want its volumes
        self.root.mkdir(parents=True)
        self._settings = Settings(
            **{
                "state_dir": folder / "state",
                "node": "node-1",
                "default_backends": ("one",),
                "consumer_grace": 0.0,
                "csi": CsiSettings(target_roots=(self.root,)),
                "backends": {name: BackendSettings(driver="memory") for name in ("one", "two")},
                **settings,
            }
        )
        self.start()

    def start(self) -> None:
        storages = self.storages

        class Driver(self._driver):  # type: ignore[misc, name-defined]
            def __init__(self, backend: str, options: Options, host: Host) -> None:
                super().__init__(backend, options, host, storages.setdefault(backend, MemoryStorage()))

        self.store = SqliteStore(ledger_path(self._settings))
        info = DriverInfo(name="memory", distribution="tests", load=lambda: Driver)
        self.core = Core(
            settings=self._settings,
            store=self.store,
            host=self.host,
            drivers=DriverRegistry([info]),
            sources=[self.docker],
        )
        self.core.recover()

    def stop(self) -> None:
        self.core.stop()
        self.store.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def driver(self, backend: str = "one") -> MemoryDriver:
        driver = self.core.backends.get(backend).driver
        assert isinstance(driver, MemoryDriver)
        return driver

    def create(self, name: str = "data", **fields: Any) -> Volume:
        return self.core.volumes.create(CreateVolume(name=name, **fields))

    def mount(self, volume: Volume, mount_id: str = "id-1") -> Path:
        return self.core.mounts.acquire(volume, engine=Engine.DOCKER, mount_id=mount_id)

    def unmount(self, volume: Volume, mount_id: str = "id-1") -> None:
        self.core.mounts.release(volume, engine=Engine.DOCKER, mount_id=mount_id)

    def bound(self) -> list[str]:
        return [binding.mount_id for binding in self.core.bindings.all()]

    def mounted(self) -> set[str]:
        return {entry.target.name for entry in self.host.mounts()}

    def events(self) -> list[str]:
        return [event.kind for event in self.core.events.recent()]

    def tree(self, volume: Volume) -> Path:
        """The volume's data on its storage."""
        assert volume.handle is not None
        return self.storages[volume.backend].volumes[volume.handle].tree

    def assert_nothing_left(self) -> None:
        assert self.mounted() == set()
        assert self.bound() == []
        assert all(not storage.volumes and not storage.snapshots for storage in self.storages.values())
        for prefix in ("volumes/", "volume-names/", "snapshots/", "snapshot-names/", "operations/", "consumers/"):
            assert self.store.count(prefix) == 0, prefix


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(**settings: Any) -> Lab:
        made.append(Lab(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield make
    for lab in made:
        lab.stop()
        for storage in lab.storages.values():
            storage.close()


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


@pytest.fixture
def sized(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Its driver enforces sizes."""
    monkeypatch.setattr(MemoryDriver, "capabilities", MemoryDriver.capabilities | {Capability.SIZE})
    return make_lab()
