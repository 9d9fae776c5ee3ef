"""What all tiers share: real file systems on loop devices, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from volumed.host import loop, mounts
from volumed.host.linux import LinuxHost

if TYPE_CHECKING:
    from tests.harness.ceph import Ceph

MakeFilesystem = Callable[..., Path]

# Of no test a time is asked, also where hypothesis would.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def sh(*words: str | Path) -> str:
    """Run a command; its output. A failure fails the test with what it said."""
    told = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert told.returncode == 0, f"{words}: {told.stdout}{told.stderr}"
    return told.stdout


def wait_until(condition: Callable[[], object], *, timeout: float = 30.0) -> None:
    """Fails the test when it does not come true in time."""
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, "it did not come true in time"
        time.sleep(0.02)


def fill_disk(folder: Path) -> Path:
    """To the last block; the file that has to go to make room."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 512):
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(size))
    return filler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run by nobody but root, a test that needs root would prove nothing: it fails instead of being left out."""
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.xfail(reason="needs root", run=False, strict=True))


@pytest.fixture
def host() -> LinuxHost:
    return LinuxHost()


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A cluster for the whole session: whoever breaks it mends it, or takes `ceph_cluster()` for itself."""
    from tests.harness.ceph import ceph_cluster  # noqa: PLC0415 (it uses what is above)

    with ceph_cluster() as cluster:
        yield cluster


@contextlib.contextmanager
def filesystems(folder: Path) -> Iterator[MakeFilesystem]:
    """`make("btrfs", size=1 << 30)` is a mounted file system of its own, on a file in the folder."""
    made: list[Path] = []

    def make(kind: str, *, size: int = 1 << 30, options: tuple[str, ...] = ()) -> Path:
        image, target = folder / f"{kind}-{len(made)}.img", folder / f"{kind}-{len(made)}"
        with image.open("wb") as file:
            file.truncate(size)
        device = loop.attach(image, direct_io=False, readonly=False)
        sh(f"mkfs.{kind}", "-q", device)
        target.mkdir()
        mounts.mount(device, target, fstype=kind, options=options, readonly=False)
        made.append(target)
        return target

    try:
        yield make
    finally:
        for target in made:
            mounts.unmount(target)
            device = loop.find(target.with_suffix(".img"))
            if device:
                loop.detach(device)


@pytest.fixture
def make_filesystem(tmp_path: Path) -> Iterator[MakeFilesystem]:
    with filesystems(tmp_path) as make:
        yield make
