"""The kernel's RBD: images mapped through /sys/bus/rbd (Documentation/ABI/testing/sysfs-bus-rbd).

`find` looks at this machine alone. What asks the cluster, and may wait for it in the kernel, runs in a worker.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from volumed.errors import BackendError, BackendUnavailable, HostError, InUse
from volumed_drivers.ceph_worker import Connection

BUS = Path("/sys/bus/rbd")
DEVICES = BUS / "devices"
_ADD_KEY = {"x86_64": 248, "aarch64": 217, "riscv64": 217, "ppc64le": 269, "s390x": 278}
_KEYRING_OF_PROCESS = -2  # keyctl(2): goes with this process; the kernel's client has its own copy by then


class Mapped(NamedTuple):
    number: str
    device: Path


def find(*, pool: str, namespace: str) -> dict[str, Mapped]:
    """What is mapped of the pool, by image."""
    return dict(_mapped(pool, namespace))


def _mapped(pool: str, namespace: str) -> Iterator[tuple[str, Mapped]]:
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(DEVICES):
            with contextlib.suppress(OSError):  # unmapped meanwhile
                told = {name: Path(entry.path, name).read_text().strip() for name in ("pool", "name", "current_snap")}
                space = Path(entry.path, "pool_ns")
                told["namespace"] = space.read_text().strip() if space.exists() else ""
                if (told["pool"], told["namespace"], told["current_snap"]) == (pool, namespace, "-"):
                    yield told["name"], Mapped(entry.name, Path(f"/dev/rbd{entry.name}"))


def add(connection: Connection, *, where: tuple[str, str], image: str) -> None:
    """Map it. A client of its own for each (noshare): one that is fenced takes no other volume with it."""
    pool, namespace = where
    key = f"volumed-{os.getpid()}"
    _give_key(key, base64.b64decode(connection.key))
    monitors, version = _monitors(connection)
    options = [f"name={connection.user}", f"key={key}", "noshare", *version]
    if namespace:
        options.append(f"_pool_ns={namespace}")
    try:
        _write("add", f"{monitors} {','.join(options)} {pool} {image} -")
    except OSError as error:
        raise _refused(error, pool, image) from None


def _monitors(connection: Connection) -> tuple[str, list[str]]:
    """Of the old protocol, which every kernel speaks, where the cluster speaks it too."""
    told = connection.ask("mon dump")["mons"]
    by_type: dict[str, list[str]] = {"v1": [], "v2": []}
    for monitor in told:
        for address in monitor["public_addrs"]["addrvec"]:
            by_type.setdefault(address["type"], []).append(address["addr"])
    if by_type["v1"]:
        return ",".join(by_type["v1"]), []
    return ",".join(by_type["v2"]), ["ms_mode=prefer-crc"]


def _give_key(name: str, key: bytes) -> None:
    """add_key(2): never in the options, which everybody may read in sysfs."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _ADD_KEY[os.uname().machine]
    if libc.syscall(number, b"ceph", name.encode(), key, len(key), _KEYRING_OF_PROCESS) < 0:
        raise HostError(f"the kernel did not take the key: {os.strerror(ctypes.get_errno())}")


def _refused(error: OSError, pool: str, image: str) -> Exception:
    subject = f"image {pool}/{image}"
    if error.errno in (errno.ETIMEDOUT, errno.EIO):
        return BackendUnavailable(f"the kernel reaches no monitor: {error.strerror}", subject=subject)
    if error.errno in (errno.ENXIO, errno.EINVAL):
        return BackendError(
            "has features that this kernel does not know",
            subject=subject,
            hint="`dmesg` names them; leave them out of `features`, or set map-with to nbd or qsd",
        )
    return HostError(f"the kernel does not map it: {error.strerror}", subject=subject)


def remove(connection: Connection, *, number: str, device: str) -> None:
    """Raises InUse while it is open."""
    try:
        _write("remove", number)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse("is held by", holders=["a process that has it open"], subject=f"device {device}") from None
        if error.errno != errno.ENOENT:
            raise


def refresh(connection: Connection, *, number: str) -> None:
    """Let it see the size that the image has now."""
    Path(DEVICES, number, "refresh").write_text("1")


def _write(what: str, text: str) -> None:
    # The ones that the module has when all devices share a major number, as it does by default.
    single = BUS / f"{what}_single_major"
    path = single if single.exists() else BUS / what
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
