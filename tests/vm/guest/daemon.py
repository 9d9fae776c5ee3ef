"""volumed in a process of the machine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from volumed.config import parse
from volumed.core.core import Core, ledger_path
from volumed.core.drivers import DriverRegistry
from volumed.core.planning import CreateVolume
from volumed.host.linux import LinuxHost
from volumed.migration.migrations import Migrations
from volumed.migration.planner import Wish
from volumed.model import Engine, Migration, MigrationPhase, Volume
from volumed.store.sqlite import SqliteStore

PATIENCE = 240.0


class Daemon:
    """All of volumed but its sockets; Python starts slowly in this machine, so it is not started. The machine has it
    installed."""

    def __init__(self, folder: Path, *, backends: str, more: str = "") -> None:
        """`folder`: for its state. `backends`: tables of volumed.toml; `more`: what stands before them."""
        self.folder = folder
        self._settings = parse(
            f'state-dir = "{folder}/state"\nnode = "node-1"\n{more}\n{backends}', source="volumed.toml"
        )
        self.start()

    def start(self) -> None:
        (self.folder / "state").mkdir(exist_ok=True)
        self._store = SqliteStore(ledger_path(self._settings))
        drivers = DriverRegistry.installed()
        self.core = Core(settings=self._settings, store=self._store, host=LinuxHost(), drivers=drivers)
        self.migrations = Migrations(self.core)
        self.core.recover(self.migrations.recover)
        self.migrations.start()

    def stop(self) -> None:
        self.migrations.stop()
        self.core.stop()
        self._store.close()

    def create(self, backend: str, *, name: str = "data", **more: Any) -> Volume:
        return self.core.volumes.create(CreateVolume(name=name, backend=backend, **more))

    def volume(self, name: str = "data") -> Volume:
        return self.core.volumes.get(name)

    def mount(self, name: str = "data") -> Path:
        return self.core.mounts.acquire(self.volume(name), engine=Engine.DOCKER, mount_id="id-1")

    def unmount(self, name: str = "data") -> None:
        self.core.mounts.release(self.volume(name), engine=Engine.DOCKER, mount_id="id-1")

    def begin(self, to: str, *, name: str = "data", **more: Any) -> Migration:
        return self.migrations.begin(name, Wish(backend=to, **more))

    def move(self, to: str, *, name: str = "data", **more: Any) -> Migration:
        self.begin(to, name=name, **more)
        return self.outcome(name)

    def outcome(self, name: str = "data") -> Migration:
        """Of its latest move, when that has ended or its source is kept."""

        def over() -> bool:
            found = self.migrations.get(name)
            return found.phase.ended or found.phase is MigrationPhase.KEPT

        wait_until(over, timeout=PATIENCE)
        return self.migrations.get(name)
