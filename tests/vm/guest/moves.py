"""Runs inside the machine, before each power cut and after the last: looks whether all moves came through the cut
before, brings others to where the next one is to catch them, and says so.

Of either kind of move one stands at each point. The ledger, the sources and the targets of either kind lie on a disk
of their own each, whose file system writes nothing down that nobody asked it to: what was not synced is not saved by
chance, nor by a sync for somebody else.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.conftest import wait_until
from tests.migration import trees
from tests.vm.guest.daemon import PATIENCE, Daemon
from volumed.host import loop
from volumed.migration import migrations
from volumed.migration.movers import tree
from volumed.model import Migration, MigrationPhase, VolumeMode
from volumed.testing import crash
from volumed.units import MIB

TOP = Path("/mnt")
READY = Path("/run/ready")  # lost with the power
NOTES = Path("/root/notes.json")
UNFLUSHED = TOP / "source/unflushed"
SIZE = 16 * MIB
PLACES = {
    "folders": TOP / "source/folders",
    "images": TOP / "source/images",
    "trees": TOP / "trees/volumes",
    "blocks": TOP / "blocks/volumes",
}
DRIVERS = {"folders": "directory", "images": "image", "trees": "directory", "blocks": "image"}
BACKENDS = "".join(f'[backends.{name}]\ndriver = "{DRIVERS[name]}"\npath = "{path}"\n' for name, path in PLACES.items())
TARGETS = {"folders": "trees", "images": "blocks"}
LARGE = "b''/b'large'"
WRITTEN = b"written, and not synced" * 1000


class Note(NamedTuple):
    """What is known of a volume."""

    source: str
    end: str  # the backend that it is to be on after the next cut
    place: str  # on its source's storage
    data: dict[str, str]  # see `look`


def look(place: Path) -> dict[str, str]:
    """What storage holds, without volumed: for each path all of it, or the digest of a device."""
    if place.is_dir():
        return {path: repr(found) for path, found in trees.picture(place).items()}
    return {"": hashlib.sha256(place.read_bytes()).hexdigest()}


def hold_at(where: str, act: Callable[[], object]) -> None:
    """Do it, and wait until a thread has come to the crash point (`point:2`: for the second time), where it stays."""
    point, _, count = where.partition(":")
    left, held = int(count or 1), threading.Event()

    def stay(name: str) -> None:
        nonlocal left
        left -= name == point
        if name == point and left == 0:
            held.set()
            threading.Event().wait()

    crash.point = stay
    act()
    assert held.wait(PATIENCE), f"nobody comes to {where}"


def goes_on(migration: Migration) -> bool:
    return not (migration.phase.ended or (migration.phase is MigrationPhase.KEPT and not migration.reclaiming))


class Cuts:
    def __init__(self) -> None:
        self.notes = {name: Note(*note) for name, note in json.loads(NOTES.read_text()).items()}
        if self.notes:
            assert not UNFLUSHED.read_bytes().strip(b"\0"), "the disks keep what they were not told to keep"
        self.in_use = [name for name, note in self.notes.items() if not note.end]
        for name in self.in_use:
            note = self.notes[name]
            found = look(Path(note.place))
            assert found.pop(LARGE) != note.data[LARGE], "what nobody synced is there"
            self.note(name, note._replace(end=TARGETS[note.source], data=look(Path(note.place))))
        tree._LEAST_WORKERS = tree._MOST_WORKERS = 1  # an emulated machine takes its time to start a process
        migrations.PER_BACKEND = migrations.PER_NODE = 100  # none waits for those that stay where they are
        self.daemon = Daemon(TOP / "state", backends=BACKENDS)
        self.migrations = self.daemon.migrations

    # After a cut
    def assert_through(self) -> None:
        """Every move is at its end, or back, with the data that was there before it; and nothing else is anywhere."""
        for migration in filter(goes_on, self.migrations.all()):
            self.migrations.throttle(migration.id, 0)
        for name in self.in_use:
            self.migrations.resume(name)
            self.daemon.unmount(name)
        wait_until(lambda: not any(map(goes_on, self.migrations.all())), timeout=PATIENCE)
        stored = {backend: set[str]() for backend in PLACES}
        for name, note in self.notes.items():
            moved, volume = self.migrations.get(name), self.daemon.volume(name)
            print(name, *(phase for phase, _ in moved.phases), moved.error, flush=True)
            assert volume.backend == note.end, f"{name}: {moved}"
            assert volume.handle is not None
            found = look(self.data_of(volume.backend, volume.handle))
            different = [path for path in note.data.keys() | found.keys() if note.data.get(path) != found.get(path)]
            assert different == [], f"{name} is not what it was: {different}"
            stored[volume.backend].add(self.name_of(volume.backend, volume.handle))
            if moved.phase is MigrationPhase.KEPT:
                assert moved.source.handle is not None
                stored[moved.source.backend].add(self.name_of(moved.source.backend, moved.source.handle))
        assert [found.text for found in self.daemon.core.doctor.examine()] == []
        assert {backend: {found.name for found in path.iterdir()} for backend, path in PLACES.items()} == stored
        assert list(loop.attached()) == []
        going = {moved.id for moved in self.migrations.all() if not moved.phase.ended}
        folders = TOP / "state/state/migrations"
        wait_until(lambda: {path.name for path in folders.iterdir()} <= going, timeout=PATIENCE)

    @staticmethod
    def name_of(backend: str, handle: str) -> str:
        return handle if DRIVERS[backend] == "directory" else f"{handle}.img"

    def data_of(self, backend: str, handle: str) -> Path:
        place = PLACES[backend] / self.name_of(backend, handle)
        return place / "data" if DRIVERS[backend] == "directory" else place

    # Before the next
    def make(self, source: str, what: str, *, back: bool = False) -> str:
        """A volume on stable storage, under the name that it returns. `back`: it will stay where it is."""
        name = f"{source}-{what.replace(':', '-')}"
        block = DRIVERS[source] == "image"
        if block:
            volume = self.daemon.create(source, name=name, size=SIZE, mode=VolumeMode.BLOCK)
        else:
            volume = self.daemon.create(source, name=name)
        assert volume.handle is not None
        place = self.data_of(source, volume.handle)
        if block:
            with place.open("r+b") as image:
                for offset in range(12345, SIZE, MIB):
                    image.seek(offset)
                    image.write(random.Random(f"{name}{offset}").randbytes(100_000))
        else:
            (place / "linked/deep/er").mkdir(parents=True)
            trees.write(place / "linked/first", b"three names")
            trees.hard_links(place)
            trees.write(place / "large", random.Random(name).randbytes(MIB + 300_000))
            trees.write(place / "owned", name.encode() * 500, mode=0o640, owner=(1234, 4321))
        self.sync(place)
        self.note(name, Note(source, source if back else TARGETS[source], str(place), look(place)))
        return name

    @staticmethod
    def sync(place: Path) -> None:
        """All of its file system."""
        opened = os.open(place, os.O_RDONLY)
        try:
            trees._libc.syncfs(opened)
        finally:
            os.close(opened)

    def note(self, name: str, note: Note) -> None:
        self.notes[name] = note
        with NOTES.open("w") as file:
            json.dump(self.notes, file)
            file.flush()
            os.fsync(file.fileno())

    def begin(self, name: str, **more: object) -> None:
        self.daemon.begin(TARGETS[self.notes[name].source], name=name, **more)

    def begin_slowly(self, name: str) -> None:
        """Some of it is copied, and little more will be."""
        self.begin(name, bandwidth=MIB // 4)

        def copies() -> bool:
            migration = self.migrations.get(name)
            progress = self.migrations.progress(migration)
            return migration.phase is MigrationPhase.SEEDING and progress is not None and progress.done > 0

        wait_until(copies, timeout=PATIENCE)

    def use_and_rewrite(self) -> None:
        """A volume in use is copied, then what is written to it, which its own disk was not made to keep yet: it does
        keep the time of it, as that goes with the next sync of anybody."""
        name = self.make("folders", "in-use")
        place = self.daemon.mount(name)
        self.begin(name, wait=True)
        wait_until(lambda: self.migrations.get(name).phase is MigrationPhase.CONVERGING, timeout=PATIENCE)
        with (place / "large").open("r+b") as large:
            large.seek(MIB)
            large.write(WRITTEN)
        (TOP / "source/other").write_bytes(b"x")
        with (TOP / "source/other").open("r+b") as other:
            os.fsync(other.fileno())
        self.note(name, self.notes[name]._replace(end="", data=look(place)))
        target = self.migrations.get(name).target
        assert target.handle is not None
        copy = self.data_of("trees", target.handle) / "large"
        wait_until(lambda: WRITTEN in copy.read_bytes(), timeout=PATIENCE)
        self.migrations.pause(name)
        wait_until(lambda: self.migrations.progress(self.migrations.get(name)) is None, timeout=PATIENCE)

    def copying(self) -> None:
        UNFLUSHED.write_bytes(bytes(4096))
        for source in TARGETS:  # whose making syncs it
            for point in ("migrate.made", "migrate.taken"):
                name = self.make(source, point)
                hold_at(point, lambda name=name: self.begin(name))  # type: ignore[misc]
        slow = [self.make(source, "seeding") for source in TARGETS]
        last = [self.make(source, "converging") for source in TARGETS]
        self.use_and_rewrite()
        for name in slow:
            self.begin_slowly(name)
        self.hold_last("migrate.advanced:3", last)  # what was copied is proven, and will not be looked at again

    def committing(self) -> None:
        for source in TARGETS:
            for point in ("migrate.copied", "migrate.closed"):
                name = self.make(source, point)
                hold_at(point, lambda name=name: self.begin(name))  # type: ignore[misc]
            name = self.make(source, "aborting", back=True)
            self.begin_slowly(name)
            hold_at("migrate.destroyed", lambda name=name: self.migrations.abort(name))  # type: ignore[misc]
        self.hold_last("migrate.committed", [self.make(source, "committed") for source in TARGETS])

    def taking_away(self) -> None:
        for source in TARGETS:
            for point, name in (("migrate.reclaiming", "migrate.made"), ("migrate.reclaimed", "migrate.taken")):
                finish = threading.Thread(target=self.migrations.finish, args=(f"{source}-{name}",), daemon=True)
                hold_at(point, finish.start)
            name = self.make(source, "hidden")
            hold_at("migrate.hidden", lambda name=name: self.begin(name))  # type: ignore[misc]
        names = [self.make(source, "aborted", back=True) for source in TARGETS]
        for name in names:
            self.begin_slowly(name)
        for name in names:
            self.migrations.abort(name)
        for source in TARGETS:
            self.migrations.finish(f"{source}-seeding")
        for name in names:
            assert self.daemon.outcome(name).phase is MigrationPhase.ABORTED

    def hold_last(self, point: str, names: list[str]) -> None:
        """One of each kind. Nothing else touches their targets' disks from here to the cut."""
        for name in names:
            hold_at(point, lambda name=name: self.begin(name))  # type: ignore[misc]

    def write_unflushed(self) -> None:
        """Past every cache but the disk's own."""
        opened = os.open(UNFLUSHED, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as page:
            page[:7] = b"written"
            os.pwritev(opened, [page], 0)
        os.close(opened)


if __name__ == "__main__":
    try:
        cuts = Cuts()
        if cuts.notes:
            cuts.assert_through()
        if len(sys.argv) > 1:
            getattr(cuts, sys.argv[1])()
            cuts.write_unflushed()
            READY.touch()
            threading.Event().wait()
        cuts.daemon.stop()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # what stays at a crash point ends by nothing else
