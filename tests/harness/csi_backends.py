"""Each local backend as CSI knows it: its table in the configuration, and how volumes on it are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20


class CsiBackend(NamedTuple):
    name: str
    table: Callable[[Path], str]  # of a folder on a file system of `filesystem`
    filesystem: str  # that its storage lies on; "": any
    block: bool = False
    fs: str = ""
    snapshots: bool = True
    changed_blocks: bool = False
    size: int = 64 * MIB
    larger: int = 128 * MIB
    mutable: tuple[tuple[str, str], ...] = (("label.tier", "gold"), ("mount-options", "noatime"))


def _image(folder: Path) -> str:
    return f'driver = "image"\npath = "{folder}/images"\n'


def _device(folder: Path) -> str:
    return f'driver = "image"\npath = "{folder}/devices"\n'


# Images with XFS: ext4 can only grow while it is mounted where root has CAP_SYS_RESOURCE.
BACKENDS = (
    CsiBackend(
        "directory",
        lambda folder: f'driver = "directory"\npath = "{folder}/folders"\nadvisory-size = true\n',
        filesystem="",
        snapshots=False,
    ),
    CsiBackend("image", _image, filesystem="xfs", fs="xfs", changed_blocks=True, size=300 * MIB, larger=400 * MIB),
    CsiBackend("block", _device, filesystem="xfs", block=True, changed_blocks=True, mutable=(("label.tier", "gold"),)),
    CsiBackend(
        "btrfs",
        lambda folder: f'driver = "btrfs"\npath = "{folder}/subvolumes"\n',
        filesystem="btrfs",
        mutable=(("label.tier", "gold"), ("mount-options", "noatime"), ("compression", "zstd")),
    ),
)
