"""What is written beside a volume, and read when the ledger is lost."""

from __future__ import annotations

import pytest

from tests.unit.conftest import Lab
from volumed.core import marks
from volumed.driver import VolumeSpec
from volumed.errors import IntegrityError
from volumed.model import Handle, Volume, VolumeId


def told(lab: Lab) -> dict[str, str]:
    (found,) = lab.driver().list()
    return dict(found.mark)


def test_a_volume_is_read_back_from_its_mark(lab: Lab) -> None:
    made = lab.create(labels={"team": "web"}, options={"color": "red"}, mount_options=("noatime", "nosuid"))
    read = marks.read(told(lab), volume_id=made.id, handle=Handle("x"), backend="one", size=None)
    for key in ("id", "name", "mode", "labels", "options", "mount_options", "filesystem", "state"):
        assert getattr(read, key) == getattr(made, key), key
    assert abs((read.created - made.created).total_seconds()) < 1


def test_copies_have_a_mark_of_their_own(lab: Lab) -> None:
    lab.create("data")
    lab.core.snapshots.create("data", "then")
    lab.create("copy", source="data")
    lab.create("older", source="data@then")
    assert sorted(found.mark["name"] for found in lab.driver().list()) == ["copy", "data", "older"]


def test_what_is_too_long_is_left_out_and_the_volume_made(lab: Lab) -> None:
    lab.create(labels={"long": "x" * 300})
    assert "labels" not in told(lab)
    assert told(lab)["name"] == "data"


@pytest.mark.parametrize(
    "damage",
    [
        {"name": "../etc"},
        {"name": ""},
        {"mode": "odd"},
        {"created": "yesterday"},
        {"filesystem": "ntfs"},
        {"labels": "{"},
        {"labels": "[1]"},
    ],
)
def test_a_mark_that_is_none_of_ours_is_said(lab: Lab, damage: dict[str, str]) -> None:
    lab.create()
    with pytest.raises(IntegrityError, match="volume v1: its mark cannot be read"):
        marks.read(told(lab) | damage, volume_id=VolumeId("v1"), handle=Handle("x"), backend="one", size=None)


def test_every_value_fits_a_tag(lab: Lab) -> None:
    volume: Volume = lab.create("n" * 255, labels={str(number): "x" * 40 for number in range(10)})
    assert all(len(value) <= 255 for value in marks.write(volume).values())
    assert VolumeSpec(volume.id, None, volume.mode, lab.driver().VolumeOptions()).mark == {}
