"""A disk that fills up, under ledger and storage: a clear error, nothing half made, and all well once there is room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem
from tests.harness.volumed import Volumed, running_volumed

pytestmark = pytest.mark.root


@pytest.fixture
def small(make_filesystem: MakeFilesystem) -> Path:
    return make_filesystem("ext4", size=64 << 20)


@pytest.fixture
def volumed(small: Path) -> Iterator[Volumed]:
    """Ledger and storage on one small disk."""
    with running_volumed(small / "v") as running:
        yield running


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 20))
    with filler.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(512))
    return filler


def test_full(volumed: Volumed, small: Path) -> None:
    assert volumed.plugin("Create", Name="before").error == ""
    assert volumed.plugin("Mount", Name="before", ID="x").error == ""
    filler = fill(small)
    refused = set()
    for number in range(50):
        answer = volumed.plugin("Create", Name=f"v{number}", Opts={"size": "16m"})
        refused.add(answer.error)
        assert "bug" not in answer.error
    # By the backend itself, or, once it was looked at while it was full, by who would place volumes there.
    assert all(
        error == "backend sized: is full: there is no room for a file system. free some space"
        or error.endswith("No space left on device")
        for error in refused
    ), refused
    assert volumed.plugin("Get", Name="before").error == ""
    filler.unlink()
    volumed.kill()
    volumed.start()
    assert volumed.api.get("doctor") == []
    assert [binding["volume"] for binding in volumed.bindings()] == ["before"]
    assert volumed.plugin("Unmount", Name="before", ID="x").error == ""
    for volume in volumed.api.get("volumes")["volumes"]:
        assert volumed.plugin("Remove", Name=volume["name"]).error == ""
    assert volumed.plugin("Create", Name="after", Opts={"size": "16m"}).error == ""
    assert volumed.plugin("Remove", Name="after").error == ""
    volumed.assert_nothing_left()


def test_a_preallocated_volume_that_does_not_fit(volumed: Volumed) -> None:
    answer = volumed.plugin("Create", Name="large", Opts={"size": "1g", "preallocate": "true"})
    assert "no room for 1073741824 bytes" in answer.error
    volumed.assert_nothing_left()
