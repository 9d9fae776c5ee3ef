"""volumed killed at every step of a move: after the next start it goes on to its end, or is cleanly back, and the data
is what it was."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.crash.killing import assert_agree, crash_points
from tests.harness.volumed import ApiError, Volumed
from tests.migration.conftest import Mover

pytestmark = [pytest.mark.root, pytest.mark.slow]

# Passed on the way back, on the way to an undo, or only when containers are stopped.
BACK = {
    *("migrate.destroyed", "migrate.unmounted-for-rollback", "migrate.rolled-back", "migrate.planned-back"),
    "migrate.fell-back",  # tests/engines/test_gluster.py
}
HELD = {"migrate.planned-hold", "migrate.held"}
ADVANCES = 7  # one for each phase from prepared to done
FORTH = [
    *(point for point in crash_points() if point.startswith("migrate.") and point not in BACK | HELD),
    *(f"migrate.advanced:{number}" for number in range(2, ADVANCES + 1)),
]
PAIRS = [("sized", "images"), ("local", "tree"), ("tree", "sized")]


def data_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def fill(mover: Mover, backend: str) -> dict[str, bytes]:
    mover.create("data", backend, **({} if backend == "local" else {"size": "64m"}))
    path = mover.mount("data")
    (path / "folder").mkdir()
    for number in range(30):
        (path / "folder" / str(number)).write_bytes(b"%d" % number * 10_000)
    found = data_of(path)
    mover.unmount("data")
    return found


def survive(volumed: Volumed, point: str, job: Callable[[], object]) -> None:
    """The job, killed at the point; started again without it."""
    volumed.stop()
    volumed.start(env={"VOLUMED_CRASH_AT": point})
    try:
        job()
    except (OSError, http.client.HTTPException, ValueError, ApiError) as error:
        if isinstance(error, ApiError) and error.code != "unreachable":
            raise
    assert volumed.wait_end() == -9, volumed.log()[-3000:]
    volumed.start()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("point", FORTH)
def test_killed_on_the_way(mover: Mover, pair: tuple[str, str], point: str) -> None:
    source, target = pair
    volumed, held = mover.volumed, fill(mover, source)
    survive(volumed, point, lambda: mover.move("data", target, keep_source="0s"))
    begun = volumed.api.get("migrations")
    if begun:
        last = mover.outcome(begun[-1]["id"])
        while last["phase"] == "kept":
            last = volumed.api.get("migrations", last["id"])
        assert last["phase"] == "done", last
    else:
        assert mover.move("data", target, keep_source="0s")["phase"] in ("kept", "done")
    assert mover.volume("data")["backend"] == target
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    assert_agree_on_moved(volumed)


def assert_agree_on_moved(volumed: Volumed) -> None:
    assert volumed.api.get("doctor") == []
    assert volumed.mounted() == {}
    assert volumed.loops() == []


def test_what_is_left_of_a_move_that_is_over_goes_at_the_next_start(mover: Mover) -> None:
    """Its folder goes after the move's end is written down, and a power cut may bring it back."""
    volumed = mover.volumed
    fill(mover, "local")
    begun = mover.begin("data", "folders", keep_source="0s")
    wait_until(lambda: volumed.api.get("migrations", begun)["phase"] == "done")
    folder = volumed.state / "migrations" / begun
    wait_until(lambda: not folder.exists())
    volumed.stop()
    (folder / "mounts").mkdir(parents=True)
    (folder / "tree.db").touch()
    volumed.start()
    assert not folder.exists()
    assert mover.volume("data")["backend"] == "folders"


def test_killed_on_the_way_back(mover: Mover) -> None:
    volumed, held = mover.volumed, fill(mover, "sized")

    def there_and_not() -> None:
        reference = mover.begin("data", "images", bandwidth="64k")
        volumed.api.post("migrations", reference, "abort")
        mover.outcome(reference)

    survive(volumed, "migrate.destroyed", there_and_not)
    last = mover.outcome("data")
    assert last["phase"] == "aborted", last
    assert mover.volume("data")["backend"] == "sized"
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    assert_agree(volumed)
    assert len(volumed.stored()) == 1


@pytest.mark.parametrize("point", ["migrate.unmounted-for-rollback", "migrate.rolled-back", "migrate.destroyed"])
def test_killed_in_an_undo(mover: Mover, point: str) -> None:
    volumed, held = mover.volumed, fill(mover, "sized")
    assert mover.move("data", "images")["phase"] == "kept"

    def undo() -> None:
        volumed.api.post("migrations", "data", "rollback", body={})
        mover.outcome("data")

    survive(volumed, point, undo)
    last = mover.outcome("data")
    if last["phase"] == "kept":  # nobody was told of it
        undo()
        last = mover.outcome("data")
    assert last["phase"] == "rolled-back", last
    assert mover.volume("data")["backend"] == "sized"
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    assert_agree(volumed)


@pytest.mark.parametrize("point", ["migrate.reclaiming", "delete.absent", "migrate.reclaimed"])
@pytest.mark.parametrize("body", [{"discard": True}, {"carry": True}], ids="".join)
def test_there_is_no_way_back_into_a_source_that_is_half_gone(mover: Mover, point: str, body: dict[str, bool]) -> None:
    volumed, held = mover.volumed, fill(mover, "sized")
    assert mover.move("data", "images")["phase"] == "kept"
    survive(volumed, point, lambda: volumed.api.post("migrations", "data", "finish"))
    with pytest.raises(ApiError, match="source is being taken away already|is done"):
        volumed.api.post("migrations", "data", "rollback", body=body)
    wait_until(lambda: volumed.api.get("migrations", "data")["phase"] == "done")
    assert mover.volume("data")["backend"] == "images"
    assert data_of(mover.mount("data")) == held
    mover.unmount("data")
    assert_agree_on_moved(volumed)
