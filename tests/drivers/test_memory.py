"""The memory driver under the suite that all drivers pass; and the suite itself, against drivers that are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from volumed.driver import Driver
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.testing.fake_host import FakeHost
from volumed.testing.memory import MemoryDriver, MemoryOptions, MemoryStorage


class MemoryConformance(DriverConformance):
    holds_are_seen = False
    driver_class = MemoryDriver

    @pytest.fixture
    def storage(self) -> Iterator[MemoryStorage]:
        storage = MemoryStorage()
        yield storage
        storage.close()

    @pytest.fixture
    def make_driver(self, storage: MemoryStorage) -> MakeDriver:
        host = FakeHost()
        return lambda: self.driver_class("memory", MemoryOptions(), host, storage)

    def make_stranger(self, driver: Driver, name: str) -> None:
        assert isinstance(driver, MemoryDriver)
        tree = driver.storage.folder / name
        tree.mkdir()
        (tree / "file").write_bytes(b"old")
        driver.storage.strangers[name] = tree

    def _see(self, driver: Driver, target: Path) -> Path:
        assert isinstance(driver.host, FakeHost)
        return driver.host.source_of(target)


class TestMemoryDriver(MemoryConformance):
    pass
