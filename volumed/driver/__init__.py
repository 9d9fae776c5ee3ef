"""The public interface for driver authors: everything a driver imports is here, in model and in errors."""

from volumed.driver.capability import Capability
from volumed.driver.host import Completed, FileExtent, Host, Loop, MountEntry
from volumed.driver.interface import (
    BlockDriver,
    Capacity,
    CreatedVolume,
    Driver,
    Extent,
    Facts,
    FilesystemDriver,
    Found,
    FoundSnapshot,
    Probe,
    SupportsCapacity,
    SupportsChangedBlocks,
    SupportsClone,
    SupportsExpand,
    SupportsGroupSnapshots,
    SupportsModify,
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
    "Extent",
    "Facts",
    "FileExtent",
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
    "SupportsChangedBlocks",
    "SupportsClone",
    "SupportsExpand",
    "SupportsGroupSnapshots",
    "SupportsModify",
    "SupportsSnapshots",
    "VolumeSpec",
]
