from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.unit.conftest import Lab
from volumed import context
from volumed.errors import BackendError, InUse, MountFailed, NotFound, OperationPending


def test_ids_are_counted(lab: Lab) -> None:
    """`docker cp` takes a running container's own id again and gives it back."""
    volume = lab.create()
    assert lab.mount(volume) == lab.mount(volume) == lab.mount(volume, "id-2")
    lab.unmount(volume)
    assert sorted(lab.bound()) == ["id-1", "id-2"]
    lab.unmount(volume)
    assert lab.bound() == ["id-2"]
    assert lab.mounted() == {volume.id}
    lab.unmount(volume, "id-2")
    assert lab.mounted() == set()
    assert [ended.reason for ended in lab.core.bindings.history(volume.id)] == ["released", "released"]


def test_what_is_not_held_cannot_be_given_back(lab: Lab) -> None:
    volume = lab.create()
    with pytest.raises(NotFound, match="is not mounted for docker by the id id-1"):
        lab.unmount(volume)
    lab.mount(volume)
    with pytest.raises(NotFound):
        lab.unmount(volume, "id-2")
    assert lab.bound() == ["id-1"]


def test_a_mount_that_fails_is_not_held(lab: Lab) -> None:
    volume = lab.create()
    lab.driver().fail("mount", BackendError("does not mount"))
    with pytest.raises(BackendError):
        lab.mount(volume)
    assert lab.bound() == []
    lab.driver().heal()
    lab.mount(volume)
    lab.host.unmount(lab.core.mounts.presence.path(volume.id))
    lab.driver().fail("mount", BackendError("does not mount"))
    with pytest.raises(BackendError):
        lab.mount(volume)
    assert [binding.count for binding in lab.core.bindings.all()] == [1]  # what was held before is held still


def test_a_late_mount_is_given_back(lab: Lab) -> None:
    """Docker does not wait for ever, and sends no Unmount for what it gave up."""
    volume = lab.create()
    go = threading.Event()

    def before(method: str) -> None:
        if method == "mount":
            go.wait(30)

    lab.driver().before = before
    with context.request(timeout=0.05), pytest.raises(OperationPending):
        lab.mount(volume)
    go.set()
    wait_until(lambda: lab.bound() == [] and lab.mounted() == set())


def test_a_foreign_mount_is_never_handed_out(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = lab.create()
    target = lab.core.mounts.presence.path(volume.id)
    target.mkdir()
    lab.host.bind(tmp_path, target)
    monkeypatch.setattr(type(lab.driver()), "owns_mount", lambda *_: False)
    lab.core.reconciler.run()
    with pytest.raises(MountFailed, match="something else is mounted"):
        lab.mount(volume)
    assert lab.bound() == []
    assert lab.host.source_of(target) == tmp_path  # nor taken away


def test_a_mount_that_is_held_by_a_process_is_told_and_tried_again(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume)
    lab.driver().fail("unmount", InUse("is held by", holders=["nginx (pid 12)"]))
    lab.unmount(volume)
    assert "mount.held" in lab.events()
    lab.driver().heal()
    lab.core.reconciler.run()
    assert lab.mounted() == set()


def test_many_at_once(lab: Lab) -> None:
    volumes = [lab.create(f"v{number}") for number in range(16)]

    def use(number: int) -> None:
        volume = volumes[number % 16]
        lab.mount(volume, f"id-{number}")
        lab.unmount(volume, f"id-{number}")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(200)))
    assert lab.bound() == []
    assert lab.mounted() == set()


def test_mounts_come_back_after_a_restart(lab: Lab) -> None:
    volume = lab.create()
    path = lab.mount(volume)
    lab.host.unmount(path)  # a reboot
    lab.restart()
    assert lab.mounted() == {volume.id}
    assert lab.bound() == ["id-1"]
