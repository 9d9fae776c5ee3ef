"""What is written beside a volume on its storage, and read again when the ledger was lost.

Short text under few keys: a cloud's tags take 256 characters each, a volume manager's fewer signs than that. What does
not fit is left out; the volume can be had without it. A mark is as the volume was made: its size is the storage's to
tell, and labels may have changed since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from volumed.core.names import check_labels, check_name
from volumed.errors import IntegrityError, VolumedError
from volumed.host import filesystems
from volumed.model import Handle, Volume, VolumeId, VolumeMode, VolumeState

LONGEST = 255  # of a value


def write(volume: Volume) -> dict[str, str]:
    """The mark of a volume that is about to be made."""
    every = {
        "name": volume.name,
        "id": volume.id if volume.moved_to else "",  # what its storage does not call it
        "mode": str(volume.mode),
        "filesystem": volume.filesystem or "",
        "class": volume.class_name,
        "encryption": volume.encryption,
        "created": volume.created.astimezone(UTC).isoformat(timespec="seconds"),
        "labels": _json(volume.labels),
        "options": _json(volume.options),
        "mount-options": ",".join(volume.mount_options),
    }
    return {key: value for key, value in every.items() if value and len(value) <= LONGEST}


def _json(words: Mapping[str, str]) -> str:
    return json.dumps(words, separators=(",", ":"), ensure_ascii=False) if words else ""


def read(mark: Mapping[str, str], *, volume_id: VolumeId, handle: Handle, backend: str, size: int | None) -> Volume:
    """The record of a volume that was found by its mark. Raises IntegrityError for a mark that is none of ours."""
    try:
        name, filesystem = mark["name"], mark.get("filesystem") or None
        check_name(name)
        if filesystem is not None:
            filesystems.get(filesystem)
        labels = _words(mark.get("labels", ""))
        check_labels(labels)
        return Volume(
            id=VolumeId(mark.get("id", volume_id)),
            moved_to=volume_id if mark.get("id", volume_id) != volume_id else None,
            name=name,
            backend=backend,
            state=VolumeState.READY,
            created=datetime.fromisoformat(mark["created"]),
            handle=handle,
            size=size,
            mode=VolumeMode(mark["mode"]),
            filesystem=filesystem,
            mount_options=tuple(word for word in mark.get("mount-options", "").split(",") if word),
            options=_words(mark.get("options", "")),
            labels=labels,
            class_name=mark.get("class", ""),
            encryption=mark.get("encryption", ""),
        )
    except (KeyError, ValueError, TypeError, VolumedError) as error:
        raise IntegrityError(f"its mark cannot be read: {error}", subject=f"volume {volume_id}") from None


def _words(text: str) -> dict[str, str]:
    read = json.loads(text) if text else {}
    if not isinstance(read, dict):
        raise TypeError("not a list of words")
    return {str(key): str(value) for key, value in read.items()}
