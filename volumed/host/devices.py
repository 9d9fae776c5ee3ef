"""Block devices by what udev knows of them: serial number, path, port. By its events, never by looking in a loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from volumed import context
from volumed.errors import DeadlineExceeded


def find(properties: Mapping[str, str]) -> Path | None:
    """See `volumed.driver.Host.find_device`."""
    import pyudev  # noqa: PLC0415 (a backend without devices of its own pays nothing for it)

    return _find(pyudev.Context(), properties)


def wait(properties: Mapping[str, str], *, timeout: float) -> Path:
    """See `volumed.driver.Host.wait_for_device`."""
    import pyudev  # noqa: PLC0415

    udev = pyudev.Context()
    # Before the first look: what comes between the two is not missed.
    monitor = pyudev.Monitor.from_netlink(udev)
    monitor.filter_by("block")
    monitor.start()
    ends = time.monotonic() + context.remaining(timeout)
    while True:
        found = _find(udev, properties)
        if found is not None:
            return found
        left = ends - time.monotonic()
        if left <= 0 or monitor.poll(left) is None:
            wanted = ", ".join(f"{key}={value}" for key, value in properties.items())
            raise DeadlineExceeded(f"no block device with {wanted} appeared on this machine")


def _find(udev: object, properties: Mapping[str, str]) -> Path | None:
    for device in udev.list_devices(subsystem="block"):  # type: ignore[attr-defined]
        if device.device_node and all(device.properties.get(key) == value for key, value in properties.items()):
            return Path(device.device_node)
    return None
