"""Storage behind a server: core looks at its trees in a child, mounts anew what died, and says which helper ended."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.unit.conftest import Lab
from volumed.driver import Completed, Helper
from volumed.errors import CommandFailed, DeadlineExceeded, HostError, MountFailed
from volumed.host import permissions
from volumed.model import Ownership
from volumed.testing.memory import MemoryDriver


@pytest.fixture
def remote(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(MemoryDriver, "remote", True)
    return lab


def dead(number: int) -> MountFailed:
    return MountFailed("cannot be measured", errno=number)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN])
def test_a_dead_mount_is_mounted_anew_under_its_users(remote: Lab, number: int) -> None:
    volume = remote.create()
    path = remote.mount(volume)
    for _ in ("seen by the reconciler", "seen again when it is mounted"):
        remote.host.fail("tree_status", dead(number))
    remote.core.reconciler.run()
    assert remote.mounted() == {volume.id}
    assert [call[0] for call in remote.host.calls][-2:] == ["bind", "revive"]
    assert ("unmount_network", str(path)) in remote.host.calls
    assert "mount.repaired" in remote.events()


def test_whoever_comes_to_a_dead_mount_gets_a_live_one(remote: Lab) -> None:
    volume = remote.create()
    remote.mount(volume)
    remote.host.fail("tree_status", dead(errno.ESTALE))
    remote.mount(volume, "id-2")
    assert [call[0] for call in remote.host.calls].count("bind") == 2
    assert remote.bound() == ["id-1", "id-2"]


def test_a_dead_mount_that_nobody_has_goes(remote: Lab) -> None:
    volume = remote.create()
    path = remote.core.mounts.presence.path(volume.id)
    path.mkdir()
    remote.host.bind(remote.tree(volume), path)
    remote.host.fail("tree_status", dead(errno.ENOTCONN))
    remote.core.reconciler.run()
    assert remote.mounted() == set()


def test_one_that_only_hangs_is_left_alone(remote: Lab) -> None:
    volume = remote.create()
    remote.mount(volume)
    remote.host.fail("tree_status", DeadlineExceeded("its server does not answer"))
    remote.core.reconciler.run()
    assert remote.mounted() == {volume.id}
    assert "mount.repaired" not in remote.events()
    remote.host.fail("tree_status", DeadlineExceeded("its server does not answer"))
    (finding,) = remote.core.doctor.examine()
    assert (finding.kind, finding.text) == ("mount-unknown", "its server does not answer")


def test_local_storage_forks_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = lab.create(ownership=Ownership(mode=0o750))
    lab.mount(volume)
    lab.core.reconciler.run()
    lab.core.usage.statistics(volume)
    assert not {"run", "tree_status"} & {call[0] for call in lab.host.calls}


def test_statistics_are_looked_up_in_a_child(remote: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = remote.create()
    remote.mount(volume)
    monkeypatch.setattr(os, "statvfs", lambda _: pytest.fail("a daemon's thread waits for a server"))
    assert remote.core.usage.statistics(volume).space.total == 1 << 30


def test_ownership_is_set_in_a_child_and_squashed_root_is_explained(
    remote: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chown", lambda *_: pytest.fail("a daemon's thread waits for a server"))
    remote.host.answers[permissions.CHILD[0]] = Completed(0, "", "")
    volume = remote.create(ownership=Ownership(uid=1000, mode=0o750))
    path = remote.core.mounts.presence.path(volume.id)
    assert ("run", *permissions.CHILD, "own", str(path), "1000", "-1", str(0o750)) in remote.host.calls
    remote.host.fail("run", CommandFailed("x", returncode=1, stderr="Operation not permitted\n"))
    with pytest.raises(HostError, match="owner cannot be set: Operation not permitted.*root_squash"):
        remote.create("other", ownership=Ownership(uid=1000))


def test_the_child_does_what_a_thread_would(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    assert permissions._main("own", str(tmp_path), "-1", "-1", str(0o710)) == ""
    assert tmp_path.stat().st_mode & 0o777 == 0o710
    assert permissions._main("group", str(tmp_path), str(os.getgid())) == ""
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o660
    assert permissions._main("own", str(tmp_path / "none"), "0", "0", "-1") == "No such file or directory"


def test_a_helper_that_ends_is_said_once_with_its_volume(lab: Lab) -> None:
    volume = lab.create("data")
    lab.host.start_helper(f"fuse-{volume.id}", ["client", "-f"])
    lab.core.helpers.look()
    assert "helper.died" not in lab.events()
    lab.host._helpers[f"fuse-{volume.id}"] = Helper(f"fuse-{volume.id}", 7, ("client", "-f"), running=False)
    for _ in range(2):
        lab.core.helpers.look()
    died = [event for event in lab.core.events.recent() if event.kind == "helper.died"]
    assert [event.subject for event in died] == ["data"]
    assert "client (helper fuse-" in died[0].text
    lab.host.stop_helper(f"fuse-{volume.id}")
    lab.host._helpers[f"fuse-{volume.id}"] = Helper(f"fuse-{volume.id}", 8, ("client", "-f"), running=False)
    lab.core.helpers.look()
    assert lab.events().count("helper.died") == 2
    lab.host._helpers[f"fuse-{volume.id}"] = Helper(f"fuse-{volume.id}", 9, ("client", "-f"), running=True)
    lab.core.helpers.look()
    lab.host._helpers[f"fuse-{volume.id}"] = Helper(f"fuse-{volume.id}", 10, ("client", "-f"), running=True)
    lab.core.helpers.look()
    assert lab.events().count("helper.restarted") == 1
