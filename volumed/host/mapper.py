"""Device-mapper nodes of one table line, through dmsetup(8): linear, or a mirror of two legs.

A table is swapped in one system call of the kernel's (`dmsetup resume` of a loaded table): what was under way is
finished by the old table, what comes later waits for the new one. So a node is never left suspended, whoever is killed.
Frozen is nothing meanwhile (--nolockfs), and what a failed leg kept is handed to the new table (--noflush).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from volumed.driver import Host
from volumed.errors import CommandFailed, HostError, InUse
from volumed.host.run import ENVIRONMENT

MAPPER = Path("/dev/mapper")
# One that leads to a volume's device and does nothing else (`volumed.core.layer`).
VOLUME_NODE = re.compile(r"volumed-(v[0-9a-f]{32})")
_SECTOR = 512
TIMEOUT = 60.0
# Sectors that the mirror copies, and keeps writers of, at once: smaller is slower, larger makes a writer wait longer.
REGION = 4096
# Status of a leg in `dmsetup status` (dm-raid1.c): A is alive, all else is a kind of failure.
_ALIVE = "AA"


@cache
def available() -> bool:
    """Whether this machine has device-mapper."""
    return (MAPPER / "control").exists() and shutil.which("dmsetup", path=ENVIRONMENT["PATH"]) is not None


class Mirrored(NamedTuple):
    """What a mirror says of itself: regions that are equal on both legs, of all."""

    done: int
    total: int
    alive: bool  # both legs take what they are given

    @property
    def whole(self) -> bool:
        return self.alive and self.done == self.total


def size_of(device: Path) -> int:
    """Bytes."""
    return int((_sysfs(device) / "size").read_text()) * _SECTOR


def logical_block_size(device: Path) -> int:
    return int((_sysfs(device) / "queue" / "logical_block_size").read_text())


def _sysfs(device: Path) -> Path:
    return Path("/sys/dev/block", _number(device))


def _number(device: Path) -> str:
    number = device.stat().st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def linear(device: Path, size: int) -> str:
    """The table: `device` as it is, its first `size` bytes."""
    return f"0 {size // _SECTOR} linear {_number(device)} 0"


def mirror(source: Path, target: Path, size: int) -> str:
    """The table: each write goes to both, and what is at the source is copied to the target. A write that one of them
    did not take is answered neither way until another table is there (handle_errors)."""
    legs = f"2 {_number(source)} 0 {_number(target)} 0"
    return f"0 {size // _SECTOR} mirror core 1 {REGION} {legs} 1 handle_errors"


def node(name: str) -> Path | None:
    path = MAPPER / name
    return path if path.exists() else None


def legs(name: str) -> set[str]:
    """Numbers of the devices below it that the machine still has, those of a table not yet swapped in as well."""
    found: set[str] = set()
    for leg in (_sysfs(MAPPER / name) / "slaves").iterdir():
        try:
            found.add((leg / "dev").read_text().strip())
        except OSError:  # the disk was pulled
            continue
    return found


def leads_to(name: str, device: Path) -> bool:
    return _number(device) in legs(name)


def below(device: Path) -> Path:
    """What a volume's node leads to, where that is one device; any other device as it is."""
    if not VOLUME_NODE.fullmatch(device.name):
        return device
    folder = _sysfs(device) / "slaves"
    names = [leg.name for leg in folder.iterdir()] if folder.is_dir() else []
    return Path("/dev", names[0]) if len(names) == 1 else device


def create(host: Host, name: str, table: str) -> Path:
    host.run(["dmsetup", "create", name, "--table", table], timeout=TIMEOUT)
    return MAPPER / name


def table(host: Host, name: str) -> str:
    return host.run(["dmsetup", "table", name], timeout=TIMEOUT).stdout.strip()


def swap(host: Host, name: str, wanted: str) -> float:
    """Another table, as large as the one it has. Returns the seconds that it took: no writer waited longer for it."""
    host.run(["dmsetup", "load", name, "--table", wanted], timeout=TIMEOUT)
    begun = time.monotonic()
    host.run(["dmsetup", "resume", "--noflush", "--nolockfs", name], timeout=TIMEOUT)
    return time.monotonic() - begun


def resize(host: Host, name: str, wanted: str) -> None:
    """A longer table; that takes that nothing is under way (no --noflush)."""
    host.run(["dmsetup", "load", name, "--table", wanted], timeout=TIMEOUT)
    host.run(["dmsetup", "resume", "--nolockfs", name], timeout=TIMEOUT)


def mirrored(host: Host, name: str) -> Mirrored | None:
    """None for what is no mirror. `0 S mirror 2 7:0 7:1 12/128 1 AA 1 core`: dm-mirror's documentation."""
    words = host.run(["dmsetup", "status", name], timeout=TIMEOUT).stdout.split()
    if len(words) < 9 or words[2] != "mirror":
        return None
    done, _, total = words[6].partition("/")
    return Mirrored(int(done), int(total), words[8] == _ALIVE)


def remove(host: Host, name: str) -> None:
    """Not there is success. Raises InUse while it is held."""
    held = node(name)
    if held is None:
        return
    told = host.run(["dmsetup", "remove", "--retry", name], timeout=TIMEOUT, check=False)
    if node(name) is None:
        return
    if "busy" not in told.stderr.lower():
        raise CommandFailed(f"dmsetup cannot remove {name}: {told.stderr.strip()}", returncode=told.returncode)
    host.check_unheld(held)  # says by whom
    raise InUse("is held by", holders=["a mount or a process that has it open"], subject=str(held))


def require_blocks(source: Path, target: Path) -> None:
    """Raises HostError when what is written to the source could be too small for the target: the kernel would do it
    wrongly without a word."""
    least, most = logical_block_size(source), logical_block_size(target)
    if most > least:
        raise HostError(
            f"its device has blocks of {least} bytes and the target's has {most}",
            hint="choose another target, or move it by another path (--path)",
        )
