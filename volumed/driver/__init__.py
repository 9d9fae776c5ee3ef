"""The public interface for driver authors: everything a driver imports is here, in model and in errors."""

from volumed.driver.capability import Capability
from volumed.driver.host import Completed, Host, Loop, MountEntry
from volumed.driver.interface import (
    BlockDriver,
    Capacity,
    CreatedVolume,
    Driver,
    Facts,
    FilesystemDriver,
    Found,
    FoundSnapshot,
    Probe,
    SupportsCapacity,
    SupportsClone,
    SupportsExpand,
    SupportsSnapshots,
    VolumeSpec,
)
from volumed.driver.options import NoOptions, Options

__all__ = [
    "BlockDriver",
    "Capability",
    "Capacity",
    "Completed",
    "CreatedVolume",
    "Driver",
    "Facts",
    "FilesystemDriver",
    "Found",
    "FoundSnapshot",
    "Host",
    "Loop",
    "MountEntry",
    "NoOptions",
    "Options",
    "Probe",
    "SupportsCapacity",
    "SupportsClone",
    "SupportsExpand",
    "SupportsSnapshots",
    "VolumeSpec",
]
