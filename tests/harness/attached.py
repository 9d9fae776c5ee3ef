"""Folders that a machine must have attached, as a driver that a daemon of its own finds: in the place of a cloud's
disks where only core is tested."""

from __future__ import annotations

from pathlib import Path

from volumed.driver import Probe
from volumed.testing.attached import FencedMachines
from volumed_drivers.directory import DirectoryDriver

ROOT = Path(__file__).parents[2]


class AttachedFolders(FencedMachines, DirectoryDriver):
    """Folders, each of which a machine must have attached before it can mount it."""

    def attachments_folder(self) -> Path:
        return self._path.parent / "attached"

    def probe(self) -> Probe:
        return super().probe()._replace(topology={"zone": "a"})


def installed(folder: Path) -> dict[str, str]:
    """The environment in which Python finds the driver as installed, under the name `attached`."""
    info = folder / "test_drivers-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: test-drivers\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[volumed.drivers]\nattached = tests.harness.attached:AttachedFolders\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}
