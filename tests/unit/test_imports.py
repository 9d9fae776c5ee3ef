"""Objects of others made volumes; and a ledger rebuilt from what lies on storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.conftest import Lab
from volumed.config import BackendSettings
from volumed.core import marks
from volumed.core.imports import Outcome
from volumed.errors import AlreadyExists, BackendUnavailable, InvalidRequest, NotFound, NotSupported
from volumed.model import Handle, VolumeId, VolumeState, new_volume_id
from volumed.testing.memory import _Held


def put(lab: Lab, name: str = "photos") -> Path:
    tree = lab.driver().storage.folder / name
    tree.mkdir()
    (tree / "file").write_text("old")
    lab.driver().storage.strangers[name] = tree
    return tree


def test_adopted_with_its_data(lab: Lab) -> None:
    put(lab)
    assert lab.core.imports.importable("one") == ["photos"]
    volume = lab.core.imports.adopt("one", "photos", name="data", labels={"team": "web"})
    assert (volume.state, volume.name, volume.labels) == (VolumeState.READY, "data", {"team": "web"})
    assert (lab.tree(volume) / "file").read_text() == "old"
    assert lab.core.imports.importable("one") == []
    assert "volume.imported" in lab.events()
    assert lab.core.doctor.examine() == []
    lab.mount(volume)
    (found,) = lab.driver().list()
    assert found.mark["name"] == "data"


def test_what_cannot_be_adopted_changes_nothing(make_lab: Callable[..., Lab]) -> None:
    backends = {
        "one": BackendSettings(driver="memory"),
        "two": BackendSettings(driver="memory", disabled_capabilities=("import",)),
    }
    lab = make_lab(backends=backends)
    put(lab)
    lab.create("taken")
    with pytest.raises(AlreadyExists):
        lab.core.imports.adopt("one", "photos", name="taken")
    with pytest.raises(NotFound, match="of the name 'photo'"):
        lab.core.imports.adopt("one", "photo", name="data")
    with pytest.raises(InvalidRequest, match="no volume name"):
        lab.core.imports.adopt("one", "photos", name="../data")
    with pytest.raises(NotSupported, match="block"):
        lab.core.imports.adopt("one", "photos", name="data", block=True)
    with pytest.raises(NotSupported, match="turned off"):
        lab.core.imports.importable("two")
    assert lab.core.imports.importable("one") == ["photos"]
    assert [volume.name for volume in lab.core.repository.volumes()] == ["taken"]
    assert lab.core.repository.operations() == []


def test_an_import_whose_answer_was_lost_is_finished(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    put(lab)
    driver = lab.driver()
    adopt = driver.adopt

    def lost(*words: object) -> None:
        driver.adopt = adopt  # type: ignore[method-assign]
        adopt(*words)  # type: ignore[arg-type]
        raise BackendUnavailable("the answer was lost")

    driver.adopt = lost  # type: ignore[method-assign, assignment]
    with pytest.raises(BackendUnavailable):
        lab.core.imports.adopt("one", "photos", name="data")
    volume = lab.core.volumes.get("data")
    assert volume.state is VolumeState.READY
    assert (lab.tree(volume) / "file").read_text() == "old"
    assert lab.core.repository.operations() == []


# Rebuilding
def lose_the_ledger(lab: Lab) -> None:
    for volume in lab.core.repository.volumes():
        with lab.core.repository.transaction() as transaction:
            transaction.delete(volume)


def test_volumes_come_back_by_their_marks(lab: Lab) -> None:
    made = {name: lab.create(name, labels={"of": name}) for name in ("a", "b")}
    lose_the_ledger(lab)
    would = lab.core.imports.rebuild(dry_run=True)
    assert {(line.name, line.outcome) for line in would} == {("a", Outcome.RECREATED), ("b", Outcome.RECREATED)}
    assert lab.core.repository.volumes() == []
    lab.core.imports.rebuild(dry_run=False)
    for name, volume in made.items():
        back = lab.core.volumes.get(name)
        assert (back.id, back.handle, back.labels) == (volume.id, volume.handle, volume.labels)
    assert {line.outcome for line in lab.core.imports.rebuild(dry_run=False)} == {Outcome.KNOWN}
    assert lab.core.doctor.examine() == []
    lab.mount(lab.core.volumes.get("a"))


def test_a_name_that_is_taken_is_not_taken_away(lab: Lab) -> None:
    old = lab.create("data")
    lose_the_ledger(lab)
    new = lab.create("data")
    lines = {line.id: line for line in lab.core.imports.rebuild(dry_run=False)}
    assert lines[old.id].name == f"data-{old.id[:13]}"
    assert "belongs to another" in lines[old.id].text
    assert lab.core.volumes.get("data").id == new.id
    assert lab.core.volumes.get(lines[old.id].name).id == old.id


def test_two_places_of_one_volume_are_both_kept(lab: Lab) -> None:
    """As a move that was not undone yet leaves it: nobody can tell any more which one counts."""
    volume = lab.create("data", backend="two")
    copy = lab.create("copy")
    assert copy.handle is not None
    lab.driver().storage.volumes[copy.handle].mark = {**marks.write(volume), "id": volume.id}
    lose_the_ledger(lab)
    lines = {line.backend: line for line in lab.core.imports.rebuild(dry_run=False)}
    moved, source = lab.core.volumes.get("data"), lab.core.volumes.get(lines["two"].name)
    assert (moved.id, moved.stored_as, moved.backend) == (volume.id, copy.id, "one")
    assert (source.stored_as, source.backend) == (volume.id, "two")
    assert "in two places" in lines["two"].text
    assert {line.outcome for line in lab.core.imports.rebuild(dry_run=False)} == {Outcome.KNOWN}
    assert lab.core.doctor.examine() == []


def test_what_has_no_mark_is_left_to_the_doctor(lab: Lab) -> None:
    volume_id = new_volume_id()
    tree = lab.driver().storage.folder / volume_id
    tree.mkdir()
    lab.driver().storage.volumes[Handle(f"memory:{volume_id}")] = _Held(tree, None)
    (line,) = lab.core.imports.rebuild(dry_run=False)
    assert (line.outcome, line.id) == (Outcome.LEFT, VolumeId(volume_id))
    assert lab.core.repository.volumes() == []
    assert [finding.kind for finding in lab.core.doctor.examine()] == ["orphan-volume"]


def test_a_backend_that_fails_stops_no_other(lab: Lab) -> None:
    lab.create("a")
    lab.create("b", backend="two")
    lose_the_ledger(lab)
    lab.driver("one").fail("list", BackendUnavailable("the cable is out"))
    lines = {line.backend: line for line in lab.core.imports.rebuild(dry_run=False)}
    assert (lines["one"].outcome, lines["one"].text) == (Outcome.UNREAD, "the cable is out")
    assert lines["two"].outcome is Outcome.RECREATED
