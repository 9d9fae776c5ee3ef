"""A disk that fills up, under ledger and storage: a clear error, nothing half made, and all well once there is room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeFilesystem, fill_disk
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


def test_full(volumed: Volumed, small: Path) -> None:
    assert volumed.plugin("Create", Name="before").error == ""
    assert volumed.plugin("Mount", Name="before", ID="x").error == ""
    filler = fill_disk(small)
    refused = set()
    for number in range(50):
        answer = volumed.plugin("Create", Name=f"v{number}", Opts={"size": "16m"})
        refused.add(answer.error)
        assert "bug" not in answer.error
    # It stays a backend where volumes may be made, however often it was looked at meanwhile.
    assert refused == {f"backend sized: {small}/v/images is full. free some space"}
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
