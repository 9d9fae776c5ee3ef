"""An orchestrator on a running volumed: what Kubernetes' controller and kubelet do with a volume, in their order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.harness.csi import Caller, capability
from tests.harness.csi_backends import CsiBackend
from tests.harness.volumed import Volumed


class Cluster:
    def __init__(self, volumed: Volumed, caller: Caller, backend: CsiBackend) -> None:
        self.volumed = volumed
        self.csi = caller
        self.backend = backend

    def capability(self, mode: Any = None, **mount: Any) -> Any:
        words = {} if mode is None else {"mode": mode}
        if self.backend.block:
            return capability(**words, block=True)
        return capability(**words, fs_type=self.backend.fs, **mount)

    def create(self, name: str, **fields: Any) -> Any:
        """A volume message."""
        asked = {
            "name": name,
            "parameters": {"backend": self.backend.name},
            "volume_capabilities": [self.capability()],
            "capacity_range": {"required_bytes": self.backend.size},
        }
        return self.csi.CreateVolume(**(asked | fields)).volume

    def staging(self, volume_id: str) -> str:
        return f"{self.volumed.targets}/staging/{volume_id}"

    def target(self, volume_id: str, pod: str = "pod") -> Path:
        return self.volumed.targets / f"{pod}-{volume_id}"

    def stage(self, volume_id: str, used: Any = None) -> None:
        self.csi.NodeStageVolume(
            volume_id=volume_id,
            staging_target_path=self.staging(volume_id),
            volume_capability=used or self.capability(),
        )

    def publish(self, volume_id: str, pod: str = "pod", used: Any = None, **fields: Any) -> Path:
        target = self.target(volume_id, pod)
        asked = {
            "volume_id": volume_id,
            "staging_target_path": self.staging(volume_id),
            "target_path": str(target),
            "volume_capability": used or self.capability(),
        }
        self.csi.NodePublishVolume(**(asked | fields))
        return target

    def unpublish(self, volume_id: str, pod: str = "pod") -> None:
        self.csi.NodeUnpublishVolume(volume_id=volume_id, target_path=str(self.target(volume_id, pod)))

    def unstage(self, volume_id: str) -> None:
        self.csi.NodeUnstageVolume(volume_id=volume_id, staging_target_path=self.staging(volume_id))

    def delete(self, volume_id: str) -> None:
        self.csi.DeleteVolume(volume_id=volume_id)

    def use(self, volume_id: str, pod: str = "pod", **fields: Any) -> Path:
        self.stage(volume_id, fields.get("used"))
        return self.publish(volume_id, pod, **fields)

    def leave(self, volume_id: str, *pods: str) -> None:
        for pod in pods or ("pod",):
            self.unpublish(volume_id, pod)
        self.unstage(volume_id)

    def write(self, target: Path, data: bytes, offset: int = 0) -> None:
        """Into a file of the tree, or onto the device; on the storage when it returns."""
        path = target if self.backend.block else target / "file"
        descriptor = os.open(path, os.O_RDWR | (0 if self.backend.block else os.O_CREAT), 0o644)
        try:
            os.pwrite(descriptor, data, offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, target: Path, length: int, offset: int = 0) -> bytes:
        with (target if self.backend.block else target / "file").open("rb") as file:
            file.seek(offset)
            return file.read(length)
