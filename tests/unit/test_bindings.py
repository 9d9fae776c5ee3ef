from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest

from tests.unit.conftest import Lab
from volumed.core import bindings


def look(lab: Lab, times: int = 2) -> None:
    """With a grace of zero, what two looks agree on is believed."""
    for _ in range(times):
        lab.core.bindings.reconcile(lab.docker)


def test_containers_are_named(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.docker.run("data", "id-1")
    look(lab)
    (binding,) = lab.core.bindings.of_volume(volume.id)
    assert [consumer.name for consumer in binding.consumers] == ["web-1"]
    for reference in ("web-1", "web-1" * 16, ("web-1" * 16)[:12]):
        assert lab.core.bindings.of_consumer(reference) == [binding]
    assert lab.core.bindings.of_consumer("web") == []


def test_of_two_with_ids_each_has_its_own(lab: Lab) -> None:
    volume = lab.create()
    for number in (1, 2):
        lab.mount(volume, f"id-{number}")
        lab.docker.run("data", f"id-{number}", f"web-{number}")
    look(lab)
    named = {binding.mount_id: binding.consumers[0].name for binding in lab.core.bindings.all()}
    assert named == {"id-1": "web-1", "id-2": "web-2"}


def test_without_ids_all_that_use_the_volume_are_named(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.docker.run("data", None, "web-1")
    lab.docker.run("data", None, "web-2")
    lab.docker.run("data", None, "gone", running=False)
    look(lab)
    (binding,) = lab.core.bindings.all()
    assert [consumer.name for consumer in binding.consumers] == ["web-1", "web-2"]


@pytest.mark.parametrize("left", [True, False])
def test_what_a_gone_container_held_is_given_back(lab: Lab, left: bool) -> None:
    """Gone, or there and not running: no Unmount will come."""
    volume = lab.create()
    lab.mount(volume)
    lab.docker.run("data", "id-1")
    look(lab)
    lab.docker.holds = []
    if left:
        lab.docker.run("data", "id-1", running=False)
    look(lab)
    assert lab.bound() == []
    assert lab.mounted() == set()
    (ended,) = lab.core.bindings.history(volume.id)
    assert (ended.reason, ended.consumers[0].name) == ("vanished", "web-1")


def test_nothing_is_concluded_from_one_look(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(consumer_grace=60.0)
    volume = lab.create()
    lab.mount(volume)
    other = lab.create("other")
    lab.docker.run("other", "id-9")
    look(lab, 5)
    assert lab.bound() == ["id-1"]
    assert lab.core.bindings.of_volume(other.id) == []
    assert lab.core.bindings.missing_mounts() == set()


def test_a_sighting_that_was_broken_begins_anew(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(consumer_grace=0.2)
    volume = lab.create()
    lab.mount(volume)
    look(lab, 1)
    lab.docker.run("data", "id-1")
    look(lab, 1)
    lab.docker.holds = []
    time.sleep(0.25)
    look(lab, 1)  # gone for an instant only, as far as was seen
    assert lab.bound() == ["id-1"]
    time.sleep(0.25)
    look(lab, 1)
    assert lab.bound() == []


def test_an_engine_that_cannot_be_asked_changes_nothing(lab: Lab) -> None:
    lab.mount(lab.create())
    lab.docker.holds = None
    look(lab, 5)
    assert lab.bound() == ["id-1"]


def test_what_runs_unrecorded_is_recorded(lab: Lab) -> None:
    """A ledger was put back that is older than the container."""
    volume = lab.create()
    lab.docker.run("data", "id-1")
    look(lab)
    assert lab.bound() == ["id-1"]
    assert lab.mounted() == {volume.id}
    assert "binding.adopted" in lab.events()


def test_a_running_container_without_its_mount_is_told_once_and_loudly(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    volume = lab.create()
    path = lab.mount(volume)
    lab.docker.run("data", "id-1")
    lab.host.unmount(path)
    lab.core.mounts.presence.scan()
    with caplog.at_level(logging.CRITICAL):
        look(lab, 5)
    assert [record.levelname for record in caplog.records if "restart the container" in record.message] == ["CRITICAL"]
    assert lab.core.bindings.missing_mounts() == {("data", "web-1")}
    assert "mount-missing" in {finding.kind for finding in lab.core.doctor.examine()}
    lab.core.reconciler.run()
    look(lab)
    assert lab.core.bindings.missing_mounts() == set()


def test_of_a_volume_in_constant_use_the_latest_history_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "HISTORY_KEPT", 3)
    busy, quiet = lab.create("busy"), lab.create("quiet")
    for number in range(5):
        lab.mount(busy, f"id-{number}")
        lab.unmount(busy, f"id-{number}")
    lab.mount(quiet)
    lab.unmount(quiet)
    lab.core.bindings.forget_history(older_than=60)
    assert [ended.mount_id for ended in lab.core.bindings.history(busy.id)] == ["id-4", "id-3", "id-2"]
    assert len(lab.core.bindings.history(quiet.id)) == 1


def test_history_is_forgotten_in_time(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.unmount(volume)
    lab.core.bindings.forget_history(older_than=60)
    assert len(lab.core.bindings.history()) == 1
    lab.core.bindings.forget_history(older_than=0)
    assert lab.core.bindings.history() == []
