"""Snapshots and clones of a volume that is being written to: one point in time, on every file system."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, sh
from tests.harness.volumed import running_volumed

pytestmark = pytest.mark.root


@pytest.mark.parametrize(("kind", "size"), [("ext4", "64m"), ("xfs", "300m"), ("btrfs", "256m")])
def test_a_point_in_time(make_filesystem: MakeFilesystem, tmp_path: Path, kind: str, size: str) -> None:
    """A writer puts each number into one file and then into another. In a copy the first is never behind, and at most
    one ahead; and where the file system tells, the copy is clean: it was taken of a frozen one."""
    backend = f'[backends.shared]\ndriver = "image"\npath = "{make_filesystem("xfs", size=4 << 30)}"\n'
    with running_volumed(tmp_path / "v", backends=backend) as volumed:
        assert volumed.plugin("Create", Name="data", Opts={"backend": "shared", "size": size, "fs": kind}).error == ""
        tree = Path(volumed.plugin("Mount", Name="data", ID="x").body["Mountpoint"])
        stop = threading.Event()
        writer = threading.Thread(target=_write, args=(tree, stop))
        writer.start()
        try:
            for number in range(5):
                volumed.api.post("volumes", "data", "snapshots", body={"name": f"s{number}"})
            volumed.api.post("volumes", body={"name": "clone", "source": "data"})
        finally:
            stop.set()
            writer.join()
        snapshots = volumed.api.get("volumes", "data", "snapshots")
        assert len(snapshots) == 5
        if kind == "ext4":
            for image in paths_of(backend, snapshots):
                assert "needs_recovery" not in sh("dumpe2fs", "-h", image)
        for number in range(5):
            volumed.api.post("volumes", body={"name": f"c{number}", "source": f"data@s{number}"})
        for name in ("clone", *(f"c{number}" for number in range(5))):
            copy = Path(volumed.plugin("Mount", Name=name, ID="x").body["Mountpoint"])
            first, second = int((copy / "first").read_text()), int((copy / "second").read_text())
            assert first - second in (0, 1), name
            assert volumed.plugin("Unmount", Name=name, ID="x").error == ""
        assert volumed.plugin("Unmount", Name="data", ID="x").error == ""
        for name in ("clone", *(f"c{number}" for number in range(5))):
            volumed.api.delete("volumes", name)
        for number in range(5):
            volumed.api.delete("volumes", "data", "snapshots", f"s{number}")
        volumed.api.delete("volumes", "data")
        volumed.assert_nothing_left()


def paths_of(backend: str, snapshots: list[dict[str, str]]) -> list[Path]:
    folder = Path(backend.partition('path = "')[2].partition('"')[0])
    return [folder / f"{snapshot['id']}.snap" for snapshot in snapshots]


def _write(tree: Path, stop: threading.Event) -> None:
    """In place, so that a torn write would show."""
    with (tree / "first").open("w") as first, (tree / "second").open("w") as second:
        number = 0
        while not stop.is_set() or number == 0:
            number += 1
            for file in (first, second):
                file.seek(0)
                file.write(f"{number:012}")
                file.flush()
