from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.unit.conftest import Lab
from volumed.core import core
from volumed.core.presence import Observed
from volumed.core.reconcile import TABLE, Action, Desired
from volumed.errors import BackendUnavailable


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(itertools.product(Desired, Observed))


def test_nothing_foreign_is_ever_touched() -> None:
    assert {action for (_, observed), action in TABLE.items() if observed is Observed.FOREIGN} == {Action.REPORT}


def test_what_lost_its_device_is_left_to_its_users() -> None:
    assert TABLE[Desired.BOUND, Observed.LOST] is Action.NAME
    assert TABLE[Desired.UNBOUND, Observed.LOST] is Action.UNMOUNT


def test_nothing_bound_is_ever_unmounted() -> None:
    assert Action.UNMOUNT not in {action for (desired, _), action in TABLE.items() if desired is Desired.BOUND}


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.parametrize("thorough", [True, False])
def test_the_machine_is_brought_to_what_the_ledger_says(lab: Lab, bound: bool, mounted: bool, thorough: bool) -> None:
    volume = lab.create()
    path = lab.core.mounts.presence.path(volume.id)
    if bound:
        lab.mount(volume)
    if mounted and not bound:
        path.mkdir()
        lab.host.bind(lab.tree(volume), path)
    if bound and not mounted:
        lab.host.unmount(path)
    lab.core.reconciler.run(thorough=thorough)
    assert lab.mounted() == ({volume.id} if bound else set())
    before = list(lab.host.calls)
    lab.core.reconciler.run(thorough=thorough)
    assert lab.host.calls == before  # in agreement there is nothing to do


def test_one_that_fails_stops_no_other(lab: Lab) -> None:
    sick, well = lab.create("sick", backend="one"), lab.create("well", backend="two")
    for volume in (sick, well):
        lab.host.unmount(lab.mount(volume))
    lab.driver("one").fail("mount", BackendUnavailable("is away"))
    lab.core.reconciler.run()
    assert lab.mounted() == {well.id}
    lab.driver("one").heal()
    lab.core.reconciler.run()
    assert lab.mounted() == {sick.id, well.id}


def test_what_is_in_nobodys_ledger_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    path = lab.core.mounts.presence.mounts_dir / "somebodys"
    path.mkdir()
    lab.host.bind(tmp_path, path)
    lab.core.reconciler.run()
    assert lab.mounted() == {"somebodys"}
    (finding,) = lab.core.doctor.examine()
    assert finding.kind == "orphan-mount"
    (fixed,) = lab.core.doctor.fix()
    assert fixed.fixed
    assert lab.mounted() == set()


def test_all_is_unmounted_when_the_machine_goes_down(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.core.reconciler.release_all()
    assert lab.mounted() == set()
    assert lab.bound() == ["id-1"]  # and comes back at the next start
    lab.restart()
    assert lab.mounted() == {volume.id}


def test_a_table_that_never_rests_does_not_put_off_the_thorough_look(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that come and go all the time change the mount table all the time."""
    monkeypatch.setattr(core, "SETTLE_TIME", 0.01)
    lab = make_lab(reconcile_interval=0.2)
    looks: list[bool] = []
    monkeypatch.setattr(lab.core.reconciler, "run", lambda *, thorough: looks.append(thorough))
    monkeypatch.setattr(lab.host, "wait_for_mount_change", lambda timeout: True)
    lab.core.start()
    wait_until(lambda: True in looks)
    assert False in looks
