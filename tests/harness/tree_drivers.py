"""Drivers of trees, called as core calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from volumed.driver import FilesystemDriver, VolumeSpec
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeMode, new_volume_id


def create(driver: FilesystemDriver, size: int | None = None) -> Handle:
    return driver.create(VolumeSpec(new_volume_id(), size, VolumeMode.FILESYSTEM, driver.VolumeOptions())).handle


@contextlib.contextmanager
def mounted(driver: FilesystemDriver, handle: Handle, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    driver.mount(handle, target, options=(), readonly=False)
    try:
        yield target
    finally:
        driver.unmount(handle, target)


def client_pid(driver: FilesystemDriver, kind: str, handle: Handle) -> int:
    """Of the process that serves the volume."""
    (helper,) = driver.host.helpers(f"{kind}-{handle}-")
    assert helper.running
    return helper.pid


@contextlib.contextmanager
def nothing_left(kind: str) -> Iterator[None]:
    """No client, key or private mount outlives what is done within; what was left here before is not its fault."""
    before = _left(kind)
    yield
    left = _left(kind) - before
    host = LinuxHost()
    for helper in host.helpers(f"{kind}-"):
        if helper.name in left:
            host.stop_helper(helper.name)
    assert left == set()


def _left(kind: str) -> set[str]:
    host = LinuxHost()
    folder = host.private_folder(f"{kind}-none")
    folder.rmdir()
    return {helper.name for helper in host.helpers(f"{kind}-")} | {
        str(kept) for kept in folder.parent.glob(f"{kind}-*")
    }
