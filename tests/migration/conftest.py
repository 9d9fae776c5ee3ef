"""A volumed with storage of every local kind twice, so that everything can be moved to everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeFilesystem
from tests.harness.volumed import Volumed
from volumed.units import MIB


class Mover:
    """What an operator does with a volumed, and looks at afterwards."""

    def __init__(self, volumed: Volumed) -> None:
        self.volumed = volumed

    def create(self, name: str, backend: str, **fields: Any) -> dict[str, Any]:
        made: dict[str, Any] = self.volumed.api.post("volumes", body={"name": name, "backend": backend, **fields})
        return made

    def create_raw(self, name: str) -> bytes:
        """A raw device of 32 MiB on `sized`, with something in it; its content."""
        made = self.create(name, "sized", size="32m", mode="block")
        image = self.volumed.folder / "images" / f"{made['id']}.img"
        with image.open("r+b") as opened:
            opened.seek(5 * MIB + 4096)
            opened.write(b"raw" * 5000)
        return image.read_bytes()

    def mount(self, name: str, mount_id: str = "id-1") -> Path:
        answer = self.volumed.plugin("Mount", Name=name, ID=mount_id)
        assert answer.error == "", answer
        return Path(answer.body["Mountpoint"])

    def unmount(self, name: str, mount_id: str = "id-1") -> None:
        assert self.volumed.plugin("Unmount", Name=name, ID=mount_id).error == ""

    def begin(self, name: str, to: str, **body: Any) -> str:
        begun = self.volumed.api.post("volumes", name, "migrate", body={"backend": to, **body})
        return str(begun["id"])

    def outcome(self, reference: str) -> dict[str, Any]:
        """Of a move, when it has ended, is kept or is paused."""
        *_, last = self.volumed.api.lines("migrations", reference, "follow")
        return dict(last)

    def move(self, name: str, to: str, **body: Any) -> dict[str, Any]:
        return self.outcome(self.begin(name, to, **body))

    def volume(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.volumed.api.get("volumes", name)
        return found

    def assert_clean(self) -> None:
        """Nothing is where it should not be."""
        assert self.volumed.api.get("doctor") == []
        assert self.volumed.loops() == []
        assert self.volumed.mounted() == {}


@pytest.fixture
def volumed(tmp_path: Path, make_filesystem: MakeFilesystem) -> Iterator[Volumed]:
    folder = tmp_path / "volumed"
    folder.mkdir()
    more = f"""
[backends.images]
driver = "image"
path = "{folder}/images-2"
[backends.folders]
driver = "directory"
path = "{folder}/volumes-2"
[backends.tree]
driver = "btrfs"
path = "{make_filesystem("btrfs", size=2 << 30)}/volumes"
"""
    made = Volumed(folder, backends=more)
    try:
        yield made
    finally:
        made.clean_up()


@pytest.fixture
def mover(volumed: Volumed) -> Mover:
    volumed.start()
    return Mover(volumed)
