"""What every driver must pass. A driver's author subclasses this in a test file, and pytest does the rest:

    class TestMyDriver(DriverConformance):
        @pytest.fixture
        def make_driver(self, tmp_path: Path) -> MakeDriver:
            return lambda: MyDriver("under-test", MyOptions(path=tmp_path), LinuxHost())

Each call of `make_driver` must give a new instance over the same storage: as the daemon has after a restart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from volumed.driver import (
    BlockDriver,
    Capability,
    Driver,
    FilesystemDriver,
    SupportsCapacity,
    SupportsClone,
    SupportsExpand,
    SupportsImport,
    SupportsSnapshots,
    VolumeSpec,
)
from volumed.errors import InUse, NotFound, NotSupported, OutOfRange
from volumed.model import Handle, SnapshotId, VolumeId, VolumeMode, new_snapshot_id, new_volume_id
from volumed.testing import crash
from volumed.units import MIB

MakeDriver = Callable[[], Driver]
BLKFLSBUF = 0x1261


class _Killed(BaseException):
    """Raised at a crash point: not even a careful `except Exception` sees it."""


class DriverConformance:
    size: ClassVar[int] = 16 * MIB
    # False for a host on which a mount that somebody holds can be taken away all the same (the fake one).
    holds_are_seen: ClassVar[bool] = True
    # False for storage that cannot hold `VolumeSpec.mark`: then none is told, never another's.
    keeps_marks: ClassVar[bool] = True
    # What a write beyond a tree's size is told: a protocol may know no better word than "refused".
    full: ClassVar[frozenset[int]] = frozenset({errno.EDQUOT, errno.ENOSPC})

    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        raise NotImplementedError("a subclass says how its driver is made")

    @pytest.fixture
    def driver(self, make_driver: MakeDriver) -> Driver:
        made = make_driver()
        made.probe()
        return made

    @pytest.fixture(autouse=True)
    def _target(self, tmp_path: Path) -> None:
        self._at = tmp_path / "mounted"
        self._at.mkdir()

    # Looking
    def test_probe_says_only_what_is_lacking_of_the_class_and_why(self, driver: Driver) -> None:
        found = driver.probe()
        assert set(found.lacking) <= set(driver.all_capabilities())
        assert all(len(reason) > 10 for reason in found.lacking.values())

    def test_a_volume_is_found_listed_and_inspected(self, driver: Driver) -> None:
        volume_id, handle = self._create(driver)
        assert driver.find(volume_id) == handle
        assert [found.handle for found in driver.list() if found.volume_id == volume_id] == [handle]
        if self._can(driver, Capability.SIZE):
            assert (driver.inspect(handle).size or 0) >= self.size

    def test_a_mark_is_kept_with_the_volume(self, driver: Driver, make_driver: MakeDriver) -> None:
        _, handle = self._create(driver)
        self._write(driver, handle, b"something")
        if isinstance(driver, SupportsClone):
            driver.clone(handle, self._spec(driver, new_volume_id()))
        if isinstance(driver, SupportsSnapshots):
            snapshot = driver.snapshot(handle, new_snapshot_id())
            driver.create_from_snapshot(snapshot, self._spec(driver, new_volume_id()))
            driver.restore(handle, snapshot)
        again = make_driver()
        again.probe()
        self._check_marks(again)

    def test_what_is_not_there_is_not_found(self, driver: Driver) -> None:
        assert driver.find(new_volume_id()) is None
        _, handle = self._create(driver)
        driver.delete(handle)
        with pytest.raises(NotFound):
            driver.inspect(handle)

    def test_nothing_is_kept_in_memory_alone(self, driver: Driver, make_driver: MakeDriver) -> None:
        volume_id, handle = self._create(driver)
        self._write(driver, handle, b"before the restart")
        again = make_driver()
        again.probe()
        assert again.find(volume_id) == handle
        assert again.inspect(handle).size == driver.inspect(handle).size
        assert self._read(again, handle) == b"before the restart"

    def test_capacity_is_what_can_be(self, driver: Driver) -> None:
        if not isinstance(driver, SupportsCapacity):
            pytest.skip("the driver does not tell its capacity")
        capacity = driver.capacity()
        assert 0 <= capacity.available <= capacity.total
        assert capacity.total > 0

    # Creating and deleting
    def test_create_again_keeps_the_data(self, driver: Driver) -> None:
        volume_id, handle = self._create(driver)
        self._write(driver, handle, b"mine")
        assert self._create(driver, volume_id) == (volume_id, handle)
        assert self._read(driver, handle) == b"mine"

    def test_a_new_volume_is_empty_even_where_another_was(self, driver: Driver) -> None:
        volume_id, handle = self._create(driver)
        self._write(driver, handle, b"of the one before")
        driver.delete(handle)
        _, handle = self._create(driver, volume_id)
        assert self._read(driver, handle) == b""

    def test_volumes_do_not_see_one_another(self, driver: Driver) -> None:
        _, one = self._create(driver)
        _, other = self._create(driver)
        self._write(driver, one, b"one")
        assert self._read(driver, other) == b""
        driver.delete(other)
        assert self._read(driver, one) == b"one"

    def test_delete_leaves_nothing_and_bears_repeating(self, driver: Driver) -> None:
        volume_id, handle = self._create(driver)
        self._write(driver, handle, b"to be gone")
        driver.delete(handle)
        assert driver.find(volume_id) is None
        assert volume_id not in {found.volume_id for found in driver.list()}
        driver.delete(handle)

    def test_many_at_once(self, driver: Driver) -> None:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: self._create(driver), range(8)))
        assert {found.volume_id for found in driver.list()} >= {volume_id for volume_id, _ in made}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda each: driver.delete(each[1]), made))
        assert not {found.volume_id for found in driver.list()} & {volume_id for volume_id, _ in made}

    def test_a_size_that_cannot_be_enforced_is_refused(self, driver: Driver) -> None:
        if self._can(driver, Capability.SIZE):
            pytest.skip("sizes are enforced here")
        if isinstance(driver, FilesystemDriver) and type(driver).capabilities & {Capability.SIZE}:
            volume_id = new_volume_id()
            with pytest.raises(NotSupported):
                driver.create(self._spec(driver, volume_id, size=self.size))
            assert driver.find(volume_id) is None

    # Mounting
    def test_mounts_come_and_go(self, driver: Driver) -> None:
        if not isinstance(driver, FilesystemDriver):
            pytest.skip("a block driver")
        _, handle = self._create(driver)
        driver.mount(handle, self._at, options=(), readonly=False)
        assert driver.host.is_mountpoint(self._at)
        assert driver.owns_mount(handle, self._at)
        driver.unmount(handle, self._at)
        assert not driver.host.is_mountpoint(self._at)
        driver.unmount(handle, self._at)

    def test_another_volumes_mount_is_not_ours(self, driver: Driver) -> None:
        if not isinstance(driver, FilesystemDriver) or not self.holds_are_seen:
            pytest.skip("a block driver, or a host without mounts")
        _, one = self._create(driver)
        _, other = self._create(driver)
        driver.mount(one, self._at, options=(), readonly=False)
        try:
            assert not driver.owns_mount(other, self._at)
        finally:
            driver.unmount(one, self._at)

    def test_a_mount_that_is_held_is_not_taken_away(self, driver: Driver) -> None:
        if not isinstance(driver, FilesystemDriver) or not self.holds_are_seen:
            pytest.skip("a block driver, or a host without mounts")
        _, handle = self._create(driver)
        driver.mount(handle, self._at, options=(), readonly=False)
        with (self._at / "held").open("w"), pytest.raises(InUse):
            driver.unmount(handle, self._at)
        driver.unmount(handle, self._at)

    def test_mount_of_what_is_gone_is_not_found(self, driver: Driver) -> None:
        _, handle = self._create(driver)
        driver.delete(handle)
        with pytest.raises(NotFound):
            if isinstance(driver, FilesystemDriver):
                driver.mount(handle, self._at, options=(), readonly=False)
            elif isinstance(driver, BlockDriver):
                driver.map(handle)

    # Devices
    def test_devices_come_and_go(self, driver: Driver, make_driver: MakeDriver) -> None:
        driver = self._block(driver)
        volume_id, handle = self._create(driver)
        assert driver.mapped(handle) is None
        device = driver.map(handle)
        assert driver.map(handle) == device
        again = self._block(make_driver())
        assert again.mapped(handle) == device
        assert again.mappings()[volume_id] == device
        driver.unmap(handle)
        assert driver.mapped(handle) is None
        assert volume_id not in driver.mappings()
        driver.unmap(handle)

    def test_a_device_is_as_large_as_is_said(self, driver: Driver) -> None:
        driver = self._block(driver)
        _, handle = self._create(driver)
        assert _device_size(driver.map(handle)) == driver.inspect(handle).size
        driver.unmap(handle)

    def test_a_device_that_is_held_is_not_taken_away(self, driver: Driver) -> None:
        driver = self._block(driver)
        _, handle = self._create(driver)
        device = driver.map(handle)
        with device.open("rb"), pytest.raises(InUse):
            driver.unmap(handle)
        driver.unmap(handle)
        assert driver.mapped(handle) is None

    # Sizes
    def test_a_tree_cannot_outgrow_its_size(self, driver: Driver) -> None:
        if not isinstance(driver, FilesystemDriver) or not self._can(driver, Capability.SIZE):
            pytest.skip("sizes are not enforced here, or a device has its own")
        _, handle = self._create(driver)
        with self._mounted(driver, handle) as tree, pytest.raises(OSError) as refused:
            (tree / "file").write_bytes(bytes(self.size // 2))
            with (tree / "too much").open("wb", buffering=0) as file:
                for _ in range(2 * self.size // MIB):
                    file.write(os.urandom(MIB))
                    os.fsync(file)
        assert refused.value.errno in self.full

    def test_expand_grows_and_keeps_the_data(self, driver: Driver) -> None:
        if not isinstance(driver, SupportsExpand) or not self._can(driver, Capability.EXPAND):
            pytest.skip("volumes cannot grow here")
        _, handle = self._create(driver, size=self.size)
        self._write(driver, handle, b"kept")
        grown = driver.expand(handle, 2 * self.size)
        assert grown >= 2 * self.size
        assert driver.inspect(handle).size == grown
        assert driver.expand(handle, self.size) == grown  # never smaller
        assert self._read(driver, handle) == b"kept"

    def test_a_device_in_use_shows_its_new_size(self, driver: Driver) -> None:
        driver = self._block(driver)
        if not isinstance(driver, SupportsExpand):
            pytest.skip("volumes cannot grow here")
        _, handle = self._create(driver)
        device = driver.map(handle)
        grown = driver.expand(handle, 2 * self.size)
        assert _device_size(device) == grown
        driver.unmap(handle)

    # Snapshots and clones
    def test_a_snapshot_is_a_point_in_time(self, driver: Driver) -> None:
        snapshots = self._snapshots(driver)
        _, handle = self._create(driver)
        self._write(driver, handle, b"then")
        snapshot_id = new_snapshot_id()
        snapshot = snapshots.snapshot(handle, snapshot_id)
        assert snapshots.snapshot(handle, snapshot_id) == snapshot
        assert (snapshot, snapshot_id) in list(snapshots.list_snapshots())
        self._write(driver, handle, b"now")
        copy_id = new_volume_id()
        copy = snapshots.create_from_snapshot(snapshot, self._spec(driver, copy_id))
        assert self._read(driver, copy.handle) == b"then"
        assert self._read(driver, handle) == b"now"
        assert driver.find(copy_id) == copy.handle

    def test_snapshots_are_no_volumes(self, driver: Driver) -> None:
        snapshots = self._snapshots(driver)
        volume_id, handle = self._create(driver)
        snapshots.snapshot(handle, new_snapshot_id())
        assert [found.volume_id for found in driver.list()] == [volume_id]

    def test_a_snapshot_is_deleted_and_nothing_else(self, driver: Driver) -> None:
        snapshots = self._snapshots(driver)
        _, handle = self._create(driver)
        self._write(driver, handle, b"kept")
        doomed = snapshots.snapshot(handle, new_snapshot_id())
        kept = snapshots.snapshot(handle, new_snapshot_id())
        copy = snapshots.create_from_snapshot(doomed, self._spec(driver, new_volume_id()))
        snapshots.delete_snapshot(doomed)
        snapshots.delete_snapshot(doomed)
        assert [found.handle for found in snapshots.list_snapshots()] == [kept]
        assert self._read(driver, handle) == b"kept"
        assert self._read(driver, copy.handle) == b"kept"

    def test_restore_puts_back_and_keeps_the_snapshot(self, driver: Driver) -> None:
        snapshots = self._snapshots(driver)
        volume_id, handle = self._create(driver)
        self._write(driver, handle, b"then")
        snapshot = snapshots.snapshot(handle, new_snapshot_id())
        for _ in range(2):
            self._write(driver, handle, b"now")
            snapshots.restore(handle, snapshot)
            assert self._read(driver, handle) == b"then"
        assert [found.volume_id for found in driver.list()] == [volume_id]
        assert [found.handle for found in snapshots.list_snapshots()] == [snapshot]

    def test_restore_keeps_a_size_that_has_grown(self, driver: Driver) -> None:
        snapshots = self._snapshots(driver)
        if not isinstance(driver, SupportsExpand) or not self._can(driver, Capability.EXPAND):
            pytest.skip("volumes cannot grow here")
        _, handle = self._create(driver, size=self.size)
        snapshot = snapshots.snapshot(handle, new_snapshot_id())
        grown = driver.expand(handle, 2 * self.size)
        snapshots.restore(handle, snapshot)
        assert driver.inspect(handle).size == grown

    def test_a_clone_stands_alone(self, driver: Driver) -> None:
        if not isinstance(driver, SupportsClone):
            pytest.skip("volumes cannot be cloned here")
        _, source = self._create(driver)
        self._write(driver, source, b"both")
        copy_id = new_volume_id()
        copy = driver.clone(source, self._spec(driver, copy_id)).handle
        assert driver.clone(source, self._spec(driver, copy_id)).handle == copy
        self._write(driver, copy, b"the copy's")
        assert self._read(driver, source) == b"both"
        driver.delete(source)
        assert self._read(driver, copy) == b"the copy's"

    def test_a_clone_may_be_larger_and_not_smaller(self, driver: Driver) -> None:
        if not isinstance(driver, SupportsClone) or not isinstance(driver, BlockDriver):
            pytest.skip("trees have no least size")
        _, source = self._create(driver)
        larger = driver.clone(source, self._spec(driver, new_volume_id(), size=2 * self.size))
        assert (larger.size or 0) >= 2 * self.size
        small = new_volume_id()
        with pytest.raises(OutOfRange):
            driver.clone(source, self._spec(driver, small, size=self.size // 2))
        assert driver.find(small) is None

    # Crashes: at every crash point the driver passes, as if the daemon had been killed there
    @pytest.mark.parametrize("undone", [True, False])
    def test_a_crash_in_create_is_found_and_undone_or_finished(
        self, driver: Driver, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, undone: bool
    ) -> None:
        volume_ids: list[VolumeId] = []

        def create() -> None:
            volume_ids.append(new_volume_id())
            self._create(driver, volume_ids[-1])

        for _ in _killed_at_each_point(create, monkeypatch):
            again = make_driver()
            again.probe()
            if undone:
                left = again.find(volume_ids[-1])
                if left is not None:
                    again.delete(left)
                assert again.find(volume_ids[-1]) is None
            else:
                _, handle = self._create(again, volume_ids[-1])
                assert self._read(again, handle) == b""
        assert {found.volume_id for found in driver.list()} <= set(volume_ids)

    def test_a_crash_in_delete_is_found_and_finished(
        self, driver: Driver, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[tuple[VolumeId, Handle]] = []

        def prepare() -> None:
            made.append(self._create(driver))
            self._write(driver, made[-1][1], b"doomed")

        for _ in _killed_at_each_point(lambda: driver.delete(made[-1][1]), monkeypatch, prepare=prepare):
            again = make_driver()
            again.probe()
            volume_id, handle = made[-1]
            assert again.find(volume_id) in (handle, None)
            again.delete(handle)
            assert again.find(volume_id) is None
        assert not list(driver.list())

    def test_a_crash_in_restore_loses_neither_state(
        self, driver: Driver, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshots = self._snapshots(driver)
        volume_id, handle = self._create(driver)
        self._write(driver, handle, b"then")
        snapshot = snapshots.snapshot(handle, new_snapshot_id())
        now = lambda: self._write(driver, handle, b"now")  # noqa: E731
        for _ in _killed_at_each_point(lambda: snapshots.restore(handle, snapshot), monkeypatch, prepare=now):
            again = make_driver()
            again.probe()
            assert again.find(volume_id) == handle
            self._snapshots(again).restore(handle, snapshot)
            assert self._read(again, handle) == b"then"
        assert [found.volume_id for found in driver.list()] == [volume_id]

    def test_a_crash_in_a_copy_is_found_and_undone_or_finished(
        self, driver: Driver, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshots = self._snapshots(driver)
        source_id, source = self._create(driver)
        self._write(driver, source, b"copied")
        taken: list[SnapshotId] = []

        def take() -> None:
            taken.append(new_snapshot_id())
            snapshots.snapshot(source, taken[-1])

        for _ in _killed_at_each_point(take, monkeypatch):
            again = self._snapshots(make_driver())
            for found in again.list_snapshots():
                if found.snapshot_id == taken[-1]:
                    again.delete_snapshot(found.handle)
            assert taken[-1] not in {found.snapshot_id for found in again.list_snapshots()}
            snapshot = again.snapshot(source, taken[-1])
            again.delete_snapshot(snapshot)
        assert [found.volume_id for found in driver.list()] == [source_id]

    # Importing
    def make_stranger(self, driver: Driver, name: str) -> str | None:
        """Make an object that volumed knows nothing of, and that its driver could import by this name, whose content is
        as `_write` with b"old" leaves a volume's. Returns its name where the storage gives names by itself. For drivers
        that import."""
        pytest.skip("the subclass says not how such an object is made")

    def test_what_others_made_is_imported_with_its_data(self, driver: Driver, make_driver: MakeDriver) -> None:
        importing = self._imports(driver)
        name = self.make_stranger(driver, "stranger") or "stranger"
        assert list(importing.importable()) == [name]
        assert list(driver.list()) == []
        volume_id = new_volume_id()
        spec = self._spec(driver, volume_id)._replace(size=None)
        with pytest.raises(NotFound):
            importing.adopt("nonesuch", spec)
        assert driver.find(volume_id) is None
        adopted = [importing.adopt(name, spec).handle for _ in range(2)]
        assert adopted[0] == adopted[1] == driver.find(volume_id)
        assert list(importing.importable()) == []
        again = make_driver()
        again.probe()
        self._check_marks(again)
        assert self._read(again, adopted[0]) == b"old"
        self._write(again, adopted[0], b"new")
        again.delete(adopted[0])
        assert list(again.list()) == []

    def test_a_crash_in_an_import_loses_nothing(
        self, driver: Driver, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        importing = self._imports(driver)
        names: list[tuple[str, VolumeSpec]] = []

        def prepare() -> None:
            name = f"stranger-{len(names)}"
            name = self.make_stranger(driver, name) or name
            names.append((name, self._spec(driver, new_volume_id())._replace(size=None)))

        for _ in _killed_at_each_point(lambda: importing.adopt(*names[-1]) and None, monkeypatch, prepare=prepare):
            again = make_driver()
            again.probe()
            handle = self._imports(again).adopt(*names[-1]).handle
            assert again.find(names[-1][1].id) == handle
            assert self._read(again, handle) == b"old"
        assert list(importing.importable()) == []
        self._check_marks(driver)

    @staticmethod
    def _imports(driver: Driver) -> SupportsImport:
        if not isinstance(driver, SupportsImport):
            pytest.skip("the driver imports nothing")
        return driver

    # What subclasses may need
    def _spec(self, driver: Driver, volume_id: VolumeId, *, size: int | None = None) -> VolumeSpec:
        sized = isinstance(driver, BlockDriver) or self._can(driver, Capability.SIZE)
        mode = VolumeMode.BLOCK if isinstance(driver, BlockDriver) else VolumeMode.FILESYSTEM
        asked = size or (self.size if sized else None)
        return VolumeSpec(
            id=volume_id, size=asked, mode=mode, options=driver.VolumeOptions(), mark=self._mark(volume_id)
        )

    @staticmethod
    def _mark(volume_id: VolumeId) -> dict[str, str]:
        """Of another content for each volume, with letters that some storage has to write otherwise."""
        return {"name": f"data-{volume_id[-6:]}", "labels": '{"team": "été, a=b ~:/%"}'}

    def _check_marks(self, driver: Driver) -> None:
        for found in driver.list():
            assert found.mark == (self._mark(found.volume_id) if self.keeps_marks else {})
            assert found.whole

    def _create(
        self, driver: Driver, volume_id: VolumeId | None = None, *, size: int | None = None
    ) -> tuple[VolumeId, Handle]:
        volume_id = volume_id or new_volume_id()
        return volume_id, driver.create(self._spec(driver, volume_id, size=size)).handle

    @staticmethod
    def _can(driver: Driver, capability: Capability) -> bool:
        return capability in driver.all_capabilities() and capability not in driver.probe().lacking

    @staticmethod
    def _block(driver: Driver) -> BlockDriver:
        if not isinstance(driver, BlockDriver):
            pytest.skip("not a block driver")
        return driver

    @staticmethod
    def _snapshots(driver: Driver) -> SupportsSnapshots:
        if not isinstance(driver, SupportsSnapshots):
            pytest.skip("the driver has no snapshots")
        return driver

    def _write(self, driver: Driver, handle: Handle, data: bytes) -> None:
        with self._mounted(driver, handle) as tree:
            if isinstance(driver, BlockDriver):
                _write_device(tree, data)
            else:
                (tree / "file").write_bytes(data)

    def _read(self, driver: Driver, handle: Handle) -> bytes:
        with self._mounted(driver, handle) as tree:
            if isinstance(driver, BlockDriver):
                return tree.open("rb", buffering=0).read(4096).rstrip(b"\0")
            file = tree / "file"
            return file.read_bytes() if file.exists() else b""

    @contextlib.contextmanager
    def _mounted(self, driver: Driver, handle: Handle) -> Iterator[Path]:
        """The device of a block driver's volume, the tree of another's."""
        if isinstance(driver, BlockDriver):
            yield driver.map(handle)
            driver.unmap(handle)
            return
        assert isinstance(driver, FilesystemDriver)
        driver.mount(handle, self._at, options=(), readonly=False)
        try:
            yield self._see(driver, self._at)
        finally:
            driver.unmount(handle, self._at)

    def _see(self, driver: Driver, target: Path) -> Path:
        """Where the mounted tree can be read: another place only on a host that does not really mount."""
        return target


def _killed_at_each_point(
    job: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, prepare: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Run the job killed at its first crash point, at its second, and so on, until it comes through."""
    number = 0
    while True:
        prepare()
        number += 1
        with monkeypatch.context() as patched:
            patched.setattr(crash, "point", _killer(number))
            try:
                job()
            except _Killed:
                pass
            else:
                return
        yield


def _killer(number: int) -> Callable[[str], None]:
    """Kills at the `number`th point passed."""
    passed = itertools.count(1)

    def point(_: str) -> None:
        if next(passed) == number:
            raise _Killed

    return point


def _device_size(device: Path) -> int:
    with device.open("rb") as opened:
        return opened.seek(0, os.SEEK_END)


def _write_device(device: Path, data: bytes) -> None:
    with device.open("r+b", buffering=0) as opened:
        opened.write(data.ljust(4096, b"\0"))
        os.fsync(opened)
        fcntl.ioctl(opened, BLKFLSBUF)
