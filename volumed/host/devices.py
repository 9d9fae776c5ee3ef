"""Block devices by what udev knows of them: serial number, path, port. By its events, never by looking in a loop.

Where no udev runs (most containers) the kernel's own events serve, and sysfs tells the serial numbers of virtio and
NVMe disks; nothing else about a device is known then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from volumed import context
from volumed.errors import DeadlineExceeded

if TYPE_CHECKING:
    import pyudev

_UDEV_RUNS = Path("/run/udev/control")  # libudev's own test
_SYS_BLOCK = Path("/sys/class/block")
_SECTOR = 512  # of /sys/class/block/*/size, whatever the device's own is
# Below a disk's sysfs folder: of virtio, and of the controller of an NVMe namespace.
_SERIALS = ("serial", "device/serial")

Properties = Mapping[str, str]


def find(choices: Sequence[Properties]) -> Path | None:
    """See `volumed.driver.Host.find_device`."""
    import pyudev  # noqa: PLC0415 (a backend without devices of its own pays nothing for it)

    return _find(pyudev.Context(), choices)


def wait(choices: Sequence[Properties], *, timeout: float) -> Path:
    """See `volumed.driver.Host.wait_for_device`."""
    import pyudev  # noqa: PLC0415

    udev = pyudev.Context()
    found = _wait_for(udev, lambda: _find(udev, choices), lambda device: _matching(device, choices), timeout)
    if found is not None:
        return found
    wanted = " or ".join(", ".join(f"{key}={value}" for key, value in each.items()) for each in choices)
    hint = "" if _UDEV_RUNS.exists() else "no udev runs here, so devices are known by name and some serials alone"
    raise DeadlineExceeded(f"no block device with {wanted} appeared on this machine", hint=hint)


def wait_for_size(device: Path, size: int, *, timeout: float) -> None:
    """See `volumed.driver.Host.wait_for_device_size`."""
    import pyudev  # noqa: PLC0415

    name = device.resolve().name

    def grown(_: object = None) -> Path | None:
        return device if _size(name) >= size else None

    if _wait_for(pyudev.Context(), grown, grown, timeout, source="kernel") is None:
        raise DeadlineExceeded(f"has {_size(name)} bytes still, and not {size}", subject=f"device {device}")


def _wait_for(
    udev: pyudev.Context,
    look: Callable[[], Path | None],
    judge: Callable[[pyudev.Device], Path | None],
    timeout: float,
    source: str = "",
) -> Path | None:
    """What `look` finds, or `judge` in an event that comes later; None at the timeout."""
    import pyudev  # noqa: PLC0415

    # Before the first look: what comes between the two is not missed.
    monitor = pyudev.Monitor.from_netlink(udev, source=source or ("udev" if _UDEV_RUNS.exists() else "kernel"))
    monitor.filter_by("block")
    monitor.start()
    ends = time.monotonic() + context.remaining(timeout)
    found = look()
    while found is None and (left := ends - time.monotonic()) > 0:
        device = monitor.poll(left)
        # None: the time is over, or so many events came at once that some were lost. A device is never falsy to be
        # trusted: pyudev gives it a length.
        found = look() if device is None else judge(device)
    return found


def _find(udev: pyudev.Context, choices: Sequence[Properties]) -> Path | None:
    devices = udev.list_devices(subsystem="block")
    if _UDEV_RUNS.exists():
        devices = devices.match_is_initialized()  # else udev's rules are still at it
    return next(_all_matching(devices, choices), None)


def _all_matching(devices: pyudev.Enumerator, choices: Sequence[Properties]) -> Iterator[Path]:
    for device in devices:
        found = _matching(device, choices)
        if found is not None:
            yield found


def _matching(device: pyudev.Device, choices: Sequence[Properties]) -> Path | None:
    """Its node, if it is one of the choices. A partition has all its disk's properties, and is none."""
    known = device.properties
    if device.action == "remove" or known.get("DEVTYPE") != "disk" or not device.device_node:
        return None
    told = dict(known)
    if "ID_SERIAL" not in told and (serial := _serial(Path(device.sys_path))):
        told |= {"ID_SERIAL": serial, "ID_SERIAL_SHORT": serial}
    node = Path(device.device_node)
    wanted = any(all(told.get(key) == value for key, value in each.items()) for each in choices)
    return node if wanted and node.is_block_device() else None


def _serial(folder: Path) -> str:
    for name in _SERIALS:
        try:
            return (folder / name).read_text().strip()
        except OSError:  # no such thing here, or the disk has just gone
            continue
    return ""


def _size(name: str) -> int:
    try:
        return int((_SYS_BLOCK / name / "size").read_text()) * _SECTOR
    except OSError:  # it has gone
        return 0
