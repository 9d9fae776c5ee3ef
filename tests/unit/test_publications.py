"""Staging and publishing, without a kernel: what is written when, what a failure leaves, what is repaired."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.conftest import Lab
from volumed.config import BackendSettings, CsiSettings
from volumed.core.planning import CreateVolume
from volumed.core.publications import Usage
from volumed.errors import AlreadyExists, InUse, InvalidRequest, MountFailed, NotSupported, PreconditionFailed
from volumed.model import AccessMode, Claim, Consumer, Engine, Volume

SHARED = Usage(access=AccessMode.SINGLE_NODE_WRITER)


class Pods:
    """An orchestrator on a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.publications = lab.core.publications
        self.staging = f"{lab.root}/staging"

    def path(self, name: str) -> str:
        return f"{self.lab.root}/{name}"

    def stage(self, volume: Volume, usage: Usage = SHARED) -> None:
        self.publications.stage(volume, self.staging, usage, engine=Engine.KUBERNETES)

    def publish(self, volume: Volume, name: str = "db", usage: Usage = SHARED) -> None:
        consumer = Consumer(id=name, name=f"shop/{name}", kind="pod")
        self.publications.publish(
            volume, self.path(name), usage, engine=Engine.KUBERNETES, consumer=consumer, staged_at=self.staging
        )

    def unpublish(self, volume: Volume, name: str = "db") -> None:
        self.publications.unpublish(volume.id, self.path(name))

    def unstage(self, volume: Volume) -> None:
        self.publications.unstage(volume.id, self.staging)


@pytest.fixture
def pods(lab: Lab) -> Pods:
    return Pods(lab)


def test_a_life(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    for _ in range(2):
        pods.stage(volume)
    for _ in range(2):
        pods.publish(volume)
    assert lab.mounted() == {volume.id, "db"}
    assert [consumer.name for binding in lab.core.bindings.all() for consumer in binding.consumers] == ["shop/db"]
    for _ in range(2):
        pods.unpublish(volume)
    assert not Path(pods.path("db")).exists()
    assert lab.mounted() == {volume.id}
    for _ in range(2):
        pods.unstage(volume)
    assert lab.mounted() == set()
    (ended,) = lab.core.bindings.history(volume.id)
    assert ended.consumers[0].name == "shop/db"
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()


@pytest.mark.parametrize("order", ["unstage first", "unpublish first"])
def test_the_mount_lasts_as_long_as_anybody_has_it(lab: Lab, pods: Pods, order: str) -> None:
    volume = lab.create()
    pods.stage(volume)
    pods.publish(volume)
    if order == "unstage first":
        pods.unstage(volume)
        assert volume.id in lab.mounted()
        pods.unpublish(volume)
    else:
        pods.unpublish(volume)
        assert volume.id in lab.mounted()
        pods.unstage(volume)
    assert lab.mounted() == set()


def test_what_must_come_first(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    with pytest.raises(PreconditionFailed, match="is not staged at .*stage it first"):
        pods.publish(volume)
    with pytest.raises(PreconditionFailed, match="no staging path is given"):
        pods.publications.publish(
            volume, pods.path("db"), SHARED, engine=Engine.CSI, consumer=Consumer(id="x"), staged_at=""
        )
    pods.stage(volume)
    Path(pods.staging).rmdir()
    with pytest.raises(PreconditionFailed, match="is not staged"):
        pods.publish(volume)
    pods.stage(volume)
    pods.publish(volume)


def test_another_usage_at_the_same_path_is_refused(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    with pytest.raises(AlreadyExists, match="another access"):
        pods.stage(volume, Usage(access=AccessMode.SINGLE_NODE_SINGLE_WRITER))
    pods.publish(volume)
    with pytest.raises(AlreadyExists, match="another readonly"):
        pods.publish(volume, usage=Usage(access=AccessMode.SINGLE_NODE_WRITER, readonly=True))
    with pytest.raises(InvalidRequest, match="is published at"):
        pods.publications.unstage(volume.id, pods.path("db"))
    with pytest.raises(InvalidRequest, match="is staged at"):
        pods.publications.unpublish(volume.id, pods.staging)


def test_staged_for_reading_alone(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    reading = Usage(access=AccessMode.SINGLE_NODE_READER_ONLY, readonly=True)
    pods.stage(volume, reading)
    with pytest.raises(PreconditionFailed, match="for reading alone"):
        pods.publish(volume)
    pods.publish(volume, usage=reading)
    assert lab.host.mounts()[-1].options == ("ro",)


def test_several_nodes_need_storage_that_they_share(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(
        backends={
            "one": BackendSettings(driver="memory", disabled_capabilities=("multi-node",)),
            "two": BackendSettings(driver="memory"),
        }
    )
    everywhere = Usage(access=AccessMode.MULTI_NODE_MULTI_WRITER)
    pods = Pods(lab)
    with pytest.raises(NotSupported, match="multi-node"):
        pods.stage(lab.create(), everywhere)
    pods.stage(lab.create("shared", backend="two"), everywhere)


def test_a_publication_that_failed_never_was(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    before = lab.bound()
    lab.host.fail("bind", MountFailed("no"))
    with pytest.raises(MountFailed):
        pods.publish(volume)
    assert lab.bound() == before
    assert lab.core.bindings.history(volume.id) == []
    assert not Path(pods.path("db")).exists()
    pods.publish(volume)


def test_a_staging_that_failed_never_was(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    lab.host.fail("bind", MountFailed("no"))
    with pytest.raises(MountFailed):
        pods.stage(volume)
    assert lab.bound() == []
    assert lab.mounted() == set()


def test_what_is_staged_cannot_be_removed(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    with pytest.raises(InUse, match="kubernetes, which has it staged at"):
        lab.core.volumes.remove("data")


# Paths
@pytest.mark.parametrize("path", ["", "relative", "/a/../b", "/etc/passwd", "/", "/x\0y", "/" + "x" * 5000])
def test_paths_that_are_refused(lab: Lab, pods: Pods, path: str) -> None:
    volume = lab.create()
    with pytest.raises(InvalidRequest):
        pods.publications.stage(volume, path, SHARED, engine=Engine.CSI)
    assert lab.bound() == []


def test_symbolic_links_lead_nowhere_else(lab: Lab, pods: Pods, tmp_path: Path) -> None:
    volume = lab.create()
    outside = tmp_path / "outside"
    outside.mkdir()
    (lab.root / "way").symlink_to(outside)
    (lab.root / "end").symlink_to(lab.root / "other")
    for name in ("way/db", "end"):
        with pytest.raises(InvalidRequest, match="does not lie below|is a symbolic link"):
            pods.publications.stage(volume, pods.path(name), SHARED, engine=Engine.CSI)
        with pytest.raises(InvalidRequest):
            pods.publications.unpublish(volume.id, pods.path(name))
    assert list(outside.iterdir()) == []


def test_a_root_may_be_a_symbolic_link_itself(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    lab = make_lab(csi=CsiSettings(target_roots=(link,)))
    lab.core.publications.stage(lab.create(), f"{link}/staging", SHARED, engine=Engine.CSI)
    assert (real / "staging").is_dir()


def test_a_file_where_a_folder_must_be(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    Path(pods.path("db")).write_text("somebody's")
    pods.stage(volume)
    with pytest.raises(InvalidRequest, match="is no directory"):
        pods.publish(volume)
    assert Path(pods.path("db")).read_text() == "somebody's"


def test_something_else_is_mounted_there(lab: Lab, pods: Pods, tmp_path: Path) -> None:
    volume = lab.create()
    target = Path(pods.path("db"))
    target.mkdir()
    lab.host.bind(tmp_path, target)
    pods.stage(volume)
    with pytest.raises(InUse, match="something else is mounted"):
        pods.publish(volume)
    pods.unpublish(volume)
    assert lab.host.source_of(target) == tmp_path  # never was ours, so it stays


def test_files_under_a_target_are_left_alone(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    target = Path(pods.path("db"))
    target.mkdir()
    (target / "stray").write_text("x")
    pods.stage(volume)
    pods.publish(volume)
    pods.unpublish(volume)
    assert (target / "stray").read_text() == "x"


# Keeping true
def test_what_was_unmounted_by_hand_is_mounted_again(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    pods.publish(volume)
    lab.host.unmount(Path(pods.path("db")))
    lab.core.publications.reconcile()
    assert lab.mounted() == {volume.id, "db"}
    assert "publication.repaired" in lab.events()
    before = list(lab.host.calls)
    lab.core.publications.reconcile()
    assert lab.host.calls == before


def test_after_a_reboot_everything_is_there_again(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    pods.publish(volume)
    for entry in reversed(lab.host.mounts()):
        lab.host.unmount(entry.target)
    lab.restart()
    assert lab.mounted() == {volume.id, "db"}


def test_a_path_that_is_gone_had_a_consumer_that_is_gone(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    pods.publish(volume)
    lab.host.unmount(Path(pods.path("db")))
    Path(pods.path("db")).rmdir()
    Path(pods.staging).rmdir()
    lab.core.publications.reconcile()
    assert lab.bound() == []
    assert lab.mounted() == set()
    assert lab.core.bindings.history(volume.id)[0].reason == "vanished"


def test_an_older_ledger_does_not_leave_a_target_mounted(lab: Lab, pods: Pods) -> None:
    volume = lab.create()
    pods.stage(volume)
    pods.publish(volume)
    with lab.core.repository.transaction() as transaction:
        transaction.delete(next(binding for binding in lab.core.bindings.all() if not binding.staging))
    pods.unpublish(volume)
    assert lab.mounted() == {volume.id}


# Inline volumes
def inline(name: str = "csi-" + "0" * 64) -> CreateVolume:
    return CreateVolume(name=name, claim=Claim(name=name), ephemeral=True)


def publish_inline(pods: Pods) -> Volume:
    pods.publications.publish_ephemeral(
        inline(), pods.path("db"), SHARED, engine=Engine.KUBERNETES, consumer=Consumer(id="x", kind="pod")
    )
    return pods.lab.core.volumes.get(inline().name)


def test_an_inline_volume_lives_as_long_as_its_publication(lab: Lab, pods: Pods) -> None:
    for _ in range(2):
        volume = publish_inline(pods)
    assert lab.mounted() == {volume.id, "db"}
    pods.unpublish(volume)
    lab.assert_nothing_left()


def test_an_inline_volume_that_nobody_has_goes_by_itself(lab: Lab, pods: Pods) -> None:
    lab.core.volumes.create(inline())
    kept = lab.create("kept")
    lab.core.publications.reconcile()
    assert [volume.id for volume in lab.core.volumes.list()] == [kept.id]
