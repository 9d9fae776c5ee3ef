"""What an orchestrator claims: the same claim finds what it made, another one never does."""

from __future__ import annotations

import string
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.conftest import Lab
from volumed.core.names import check_name, name_for_claim
from volumed.core.planning import CreateVolume
from volumed.errors import AlreadyExists, InvalidRequest, NotFound, OutOfRange
from volumed.model import Claim, Volume


def create(lab: Lab, name: str = "data", **fields: Any) -> Volume:
    claim = Claim(name=name, **fields)
    size = claim.required or None
    return lab.core.volumes.create(CreateVolume(name=name_for_claim(name), size=size, claim=claim))


@given(st.text(alphabet=st.characters(exclude_characters="", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=32))
def test_any_text_has_a_name_of_ours(text: str) -> None:
    name = name_for_claim(text)
    check_name(name)
    assert name == text or set(text) - set(string.ascii_letters + string.digits + "_.-") or not text[0].isalnum()


@pytest.mark.parametrize("text", ["", "x" * 129, "ä" * 65, "a\x00b", "a\x1fb", "a\x7fb", "a\x85b"])
def test_what_the_specification_bans_as_a_name(text: str) -> None:
    with pytest.raises(InvalidRequest):
        name_for_claim(text)


def test_the_longest_and_the_strangest_names() -> None:
    assert name_for_claim("x" * 128) == "x" * 128
    assert name_for_claim("../../etc").startswith("csi-")
    assert name_for_claim("a\tb\n") != name_for_claim("a b")


def test_the_same_claim_finds_what_it_made(sized: Lab) -> None:
    first = create(sized, required=10, parameters={"a": "b"})
    assert create(sized, required=10, parameters={"a": "b"}).id == first.id
    assert create(sized, required=5, limit=20, parameters={"a": "b"}).id == first.id  # it satisfies that, too


@pytest.mark.parametrize(
    "other",
    [{"required": 20}, {"limit": 5}, {"parameters": {"a": "b"}}, {"filesystem": "xfs"}, {"source": "volume:v1"}],
)
def test_another_claim_of_the_name_is_refused(sized: Lab, other: dict[str, Any]) -> None:
    create(sized, required=10)
    with pytest.raises(AlreadyExists, match="with another"):
        create(sized, **{"required": 10, **other})
    assert len(sized.core.volumes.list()) == 1


def test_nobody_elses_volume_is_claimed(lab: Lab) -> None:
    """Whoever claims a volume deletes it one day."""
    lab.create("data")
    with pytest.raises(AlreadyExists, match="was not made by this orchestrator"):
        create(lab, "data")


def test_sources_by_their_ids(lab: Lab) -> None:
    origin = create(lab, "origin")
    (lab.tree(origin) / "file").write_text("then")
    snapshot = lab.core.snapshots.create_claimed(origin, "before")
    (lab.tree(origin) / "file").write_text("now")
    clone = create(lab, "clone", source=f"volume:{origin.id}")
    older = create(lab, "older", source=f"snapshot:{snapshot.id}")
    assert (lab.tree(clone) / "file").read_text() == "now"
    assert (lab.tree(older) / "file").read_text() == "then"
    assert (clone.source, older.source) == ("origin", "origin@before")
    for source in ("volume:v0", "snapshot:s0", "volume:origin", f"snapshot:{origin.id}"):
        with pytest.raises(NotFound):
            create(lab, "third", source=source)


def test_storage_that_gives_more_than_the_limit(sized: Lab) -> None:
    driver = sized.driver()
    made = driver.create
    driver.create = lambda spec: made(spec._replace(size=4096))  # type: ignore[method-assign]
    with pytest.raises(OutOfRange, match="can only be made with 4096 bytes"):
        create(sized, required=10, limit=100)
    sized.assert_nothing_left()


def test_a_snapshots_name_is_unique_over_all_volumes(lab: Lab) -> None:
    one, two = create(lab, "one"), create(lab, "two")
    first = lab.core.snapshots.create_claimed(one, "nightly / 1")
    assert lab.core.snapshots.create_claimed(one, "nightly / 1").id == first.id
    with pytest.raises(AlreadyExists, match="another volume"):
        lab.core.snapshots.create_claimed(two, "nightly / 1")
    lab.core.snapshots.remove_one(first)
    lab.core.snapshots.create_claimed(two, "nightly / 1")


def test_ids_sort_by_their_age(lab: Lab) -> None:
    """So that whoever pages through a list while it grows comes to the new ones, too."""
    made = []
    for number in range(5):
        made.append(create(lab, f"v{number}").id)
        time.sleep(0.002)
    assert made == sorted(made) == [volume.id for volume in lab.core.volumes.list()]
