from __future__ import annotations

import pytest

from tests.conftest import wait_until
from tests.unit.conftest import Lab
from volumed.core import core
from volumed.driver import VolumeSpec
from volumed.errors import BackendUnavailable
from volumed.model import SnapshotId, VolumeId, VolumeMode, new_snapshot_id, new_volume_id


def orphan(lab: Lab) -> VolumeId:
    driver = lab.driver()
    volume_id = new_volume_id()
    driver.create(VolumeSpec(volume_id, None, VolumeMode.FILESYSTEM, driver.VolumeOptions()))
    return volume_id


def test_all_is_well(lab: Lab) -> None:
    lab.mount(lab.create())
    lab.core.snapshots.create("data")
    assert lab.core.doctor.examine() == []


def test_data_is_deleted_only_when_it_is_named(lab: Lab) -> None:
    one, other = orphan(lab), orphan(lab)
    found = lab.core.doctor.examine()
    assert {finding.id for finding in found} == {f"orphan:one:{one}", f"orphan:one:{other}"}
    assert all(finding.destroys and "ledger does not know" in finding.text for finding in found)
    lab.core.doctor.fix()
    lab.core.doctor.fix([f"orphan:one:{one}"])
    assert lab.core.doctor.examine() == found
    fixed = lab.core.doctor.fix(destroy=[f"orphan:one:{one}"])
    assert {finding.id for finding in fixed if finding.fixed} == {f"orphan:one:{one}"}
    assert [finding.id for finding in lab.core.doctor.examine()] == [f"orphan:one:{other}"]


def test_an_orphan_snapshot(lab: Lab) -> None:
    volume = lab.create()
    assert volume.handle
    snapshot_id: SnapshotId = new_snapshot_id()
    lab.driver().snapshot(volume.handle, snapshot_id)
    (finding,) = lab.core.doctor.examine()
    assert (finding.kind, finding.destroys) == ("orphan-snapshot", True)
    lab.core.doctor.fix(destroy=[finding.id])
    assert lab.core.doctor.examine() == []


def test_a_snapshot_that_is_gone_is_reported_but_not_while_its_volume_is_put_back(lab: Lab) -> None:
    """Storage may tell nothing of a volume meanwhile."""
    lab.create()
    kept, gone = lab.core.snapshots.create("data", "kept"), lab.core.snapshots.create("data", "gone")
    assert gone.handle
    lab.driver().delete_snapshot(gone.handle)
    assert [(finding.kind, finding.subject) for finding in lab.core.doctor.examine()] == [
        ("missing-storage", "snapshot gone")
    ]
    lab.driver().fail("restore", BackendUnavailable("is away"))
    with pytest.raises(BackendUnavailable):
        lab.core.snapshots.restore("data", kept.name)
    assert [finding.kind for finding in lab.core.doctor.examine()] == ["stuck-operation"]


def test_storage_that_is_gone_is_reported_and_never_made_anew(lab: Lab) -> None:
    volume = lab.create()
    assert volume.handle
    lab.driver().delete(volume.handle)
    for found in (lab.core.doctor.examine(), lab.core.doctor.fix()):
        (finding,) = found
        assert (finding.kind, finding.fixed) == ("missing-storage", False)
    assert lab.core.volumes.get("data") == volume


def test_a_mount_that_is_missing_and_one_too_many(lab: Lab) -> None:
    bound, unbound = lab.create("bound"), lab.create("unbound")
    lab.host.unmount(lab.mount(bound))
    path = lab.core.mounts.presence.path(unbound.id)
    path.mkdir()
    lab.host.bind(lab.tree(unbound), path)
    found = lab.core.doctor.examine()
    assert {finding.kind for finding in found} == {"not-mounted", "not-bound"}
    assert all(finding.fixed for finding in lab.core.doctor.fix())
    assert lab.mounted() == {bound.id}
    assert lab.core.doctor.examine() == []


def test_a_backend_that_is_away_hides_no_other(lab: Lab) -> None:
    lab.driver("two").fail("list", BackendUnavailable("is away"))
    orphan(lab)
    assert {finding.kind for finding in lab.core.doctor.examine()} == {"orphan-volume", "backend-unavailable"}


def test_the_metrics_learn_of_orphans_by_themselves(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "FIRST_SWEEP", 0.01)
    orphan(lab)
    lab.core.start()
    wait_until(lambda: b'volumed_findings{kind="orphan-volume"} 1.0' in lab.core.metrics.render())
