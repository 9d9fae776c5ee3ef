from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.conftest import Lab
from volumed import context
from volumed.core.names import check_words
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    HostError,
    InUse,
    InvalidRequest,
    NotFound,
    NotSupported,
    OperationPending,
    OutOfRange,
    VolumedError,
)
from volumed.model import Ownership, VolumeMode, VolumeState


def test_the_whole_life(lab: Lab) -> None:
    volume = lab.create(labels={"team": "web"}, options={"color": "red"})
    assert volume.state is VolumeState.READY
    assert lab.core.volumes.get("data") == volume
    assert lab.core.volumes.get(volume.id) == volume
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()
    assert lab.events() == ["volume.created", "volume.removed"]


def test_the_same_request_again_is_the_same_volume(lab: Lab) -> None:
    volume = lab.create(labels={"a": "b"})
    assert lab.create(labels={"a": "b"}) == volume
    assert lab.create() == volume


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backend": "two"}, "another backend"),
        ({"labels": {"a": "c"}}, "another labels"),
        ({"options": {"color": "green"}}, "another options"),
        ({"ownership": Ownership(uid=1)}, "uid, gid or mode"),
        ({"mount_options": ("noatime",)}, "mount-options"),
    ],
)
def test_another_request_of_the_same_name_is_refused(lab: Lab, fields: dict[str, Any], told: str) -> None:
    volume = lab.create(labels={"a": "b"})
    with pytest.raises(AlreadyExists, match=told):
        lab.create(**fields)
    assert lab.core.volumes.get("data") == volume


@pytest.mark.parametrize("name", ["", "..", "a/b", "/", "a\0b", "x" * 256, "ü", "-a", ".a", "a b", "a\n", "😀"])
def test_names_that_cannot_be(lab: Lab, name: str) -> None:
    with pytest.raises(InvalidRequest):
        lab.create(name)
    lab.assert_nothing_left()


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"backend": "tow"}, InvalidRequest, "did you mean 'two'"),
        ({"options": {"colour": "red"}}, InvalidRequest, "did you mean 'color'"),
        ({"size": 1 << 30}, NotSupported, "has no size"),
        ({"mode": VolumeMode.BLOCK}, NotSupported, "has no block"),
        ({"filesystem": "xfs"}, NotSupported, "fs=xfs cannot be had"),
        ({"mkfs_options": ("-L",)}, InvalidRequest, "none is made here"),
        ({"source": "none"}, NotFound, "volume none: there is no such volume"),
        ({"labels": {"": "x"}}, InvalidRequest, "label"),
        ({"labels": {str(number): "" for number in range(65)}}, InvalidRequest, "at most 64 labels"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    lab: Lab, fields: dict[str, Any], error: type[VolumedError], told: str
) -> None:
    with pytest.raises(error, match=told):
        lab.create(**fields)
    lab.assert_nothing_left()


@pytest.mark.parametrize(
    "words",
    [
        ("/dev/sda",),
        ("-d", "/etc"),
        ("sda",),
        ("-L", "x", "sda"),
        ("UUID=1234",),
        ("-L", "LABEL=root"),
        ("-J", "device=UUID=1"),
        ("-E", "a\0b"),
    ],
)
def test_options_that_could_name_another_device(words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="could name a device"):
        check_words(words, what="mkfs-options")


def test_options_that_name_none() -> None:
    check_words(
        ("-L", "my-label", "-N", "4096", "-E", "lazy_itable_init=0,stride=4", "-O^has_journal"), what="mkfs-options"
    )
    check_words(("noatime", "data=journal", "compress=zstd:3"), what="mount-options")
    with pytest.raises(InvalidRequest, match="could name a device"):
        check_words(("device=/dev/sdb",), what="mount-options")


def test_a_storage_that_refuses_leaves_nothing(lab: Lab) -> None:
    lab.driver().fail("create", CapacityExhausted("is full", subject="backend one"))
    with pytest.raises(CapacityExhausted, match="backend one: is full"):
        lab.create()
    lab.driver().heal()
    lab.assert_nothing_left()
    lab.create()


def test_a_root_that_cannot_be_owned_leaves_nothing(lab: Lab) -> None:
    lab.driver().fail("mount", BackendError("does not mount"))
    with pytest.raises(BackendError):
        lab.create(ownership=Ownership(mode=0o700))
    lab.driver().heal()
    lab.assert_nothing_left()


def test_an_undo_that_fails_is_tried_again(lab: Lab) -> None:
    driver = lab.driver()

    def before(method: str) -> None:
        if method in ("mount", "delete"):
            raise BackendUnavailable(f"{method} is away")

    driver.before = before
    with pytest.raises(BackendUnavailable, match="mount is away"):  # the first error, not that of cleaning up
        lab.create(ownership=Ownership(mode=0o700))
    assert [finding.kind for finding in lab.core.doctor.examine()] == ["stuck-operation"]
    with pytest.raises(BackendUnavailable, match="delete is away"):
        lab.create()
    driver.heal()
    lab.create()
    assert lab.core.doctor.examine() == []


def test_two_at_once_make_one(lab: Lab) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: lab.create(), range(8)))
    assert len({volume.id for volume in made}) == 1
    assert len(lab.storages["one"].volumes) == 1


def test_two_that_differ_at_once(lab: Lab) -> None:
    def create(backend: str) -> str:
        try:
            return lab.create(backend=backend).backend
        except AlreadyExists:
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(create, ["one", "two"]))
    assert sorted(answers) in (["one", "refused"], ["refused", "two"])
    assert sum(len(storage.volumes) for storage in lab.storages.values()) == 1


def test_a_retry_joins_the_work_that_runs(lab: Lab) -> None:
    go, calls = threading.Event(), []

    def before(method: str) -> None:
        if method == "create":
            calls.append(method)
            go.wait(30)

    lab.driver().before = before
    with context.request(timeout=0.05), pytest.raises(OperationPending, match="is taking long; the work goes on"):
        lab.create()
    retry = threading.Thread(target=lab.create)
    retry.start()
    go.set()
    retry.join(30)
    assert calls == ["create"]
    assert lab.core.volumes.get("data").state is VolumeState.READY


def test_remove_refuses_what_is_in_use_and_says_by_whom(lab: Lab) -> None:
    volume = lab.create()
    lab.mount(volume, "id-1")
    lab.docker.run("data", "id-1")
    lab.core.bindings.reconcile(lab.docker)
    for dry_run in (True, False):
        with pytest.raises(
            InUse, match=r"volume data: is in use by: docker container web-1 \(pid 7\) at /data on node"
        ):
            lab.core.volumes.remove("data", dry_run=dry_run)
    assert lab.mounted() == {volume.id}


def test_remove_refuses_what_has_snapshots(lab: Lab) -> None:
    lab.create()
    lab.core.snapshots.create("data", "first")
    with pytest.raises(InUse, match="has snapshots: first.*volumectl snapshot rm data first"):
        lab.core.volumes.remove("data")


def test_a_dry_run_destroys_nothing(lab: Lab) -> None:
    volume = lab.create()
    (lab.tree(volume) / "file").write_bytes(b"12345")
    removal = lab.core.volumes.remove("data", dry_run=True)
    assert (removal.volume, removal.used) == (volume, 5)
    assert lab.core.volumes.get("data") == volume


def test_remove_that_fails_goes_on_later(lab: Lab) -> None:
    lab.create()
    lab.driver().fail("delete", BackendUnavailable("is away"))
    with pytest.raises(BackendUnavailable):
        lab.core.volumes.remove("data")
    assert lab.core.volumes.get("data").state is VolumeState.DELETING
    with pytest.raises(OperationPending, match="is deleting"):
        lab.mount(lab.core.volumes.get("data"))
    lab.driver().heal()
    lab.core.journal.recover()
    lab.assert_nothing_left()


def test_expand(lab: Lab) -> None:
    with pytest.raises(NotSupported, match="has no size that could grow"):
        lab.core.volumes.expand(lab.create().name, 10)


def test_growth(sized: Lab) -> None:
    volume = sized.create(size=10)
    assert sized.core.volumes.expand("data", 20).size == 20
    assert sized.core.volumes.expand("data", 20).size == 20
    with pytest.raises(OutOfRange, match="has 20 bytes and cannot shrink to 10"):
        sized.core.volumes.expand("data", 10)
    assert volume.handle
    assert sized.driver().inspect(volume.handle).size == 20


def half_grown(lab: Lab) -> None:
    """The storage grew, and then something failed."""
    volume = lab.create(size=10)
    driver = lab.driver()

    def before(method: str) -> None:
        if method == "expand":
            assert volume.handle
            lab.storages["one"].volumes[volume.handle].size = 20
            raise BackendError("did not come to its end")

    driver.before = before
    with pytest.raises(BackendError):
        lab.core.volumes.expand("data", 20)
    assert [finding.kind for finding in lab.core.doctor.examine()] == ["stuck-operation"]


def test_a_growth_that_was_begun_is_finished(sized: Lab) -> None:
    half_grown(sized)
    sized.driver().heal()
    sized.core.journal.recover()
    assert sized.core.volumes.get("data").size == 20
    assert sized.core.doctor.examine() == []


def test_a_growth_that_cannot_be_finished_keeps_nobody_from_mounting_or_removing(sized: Lab) -> None:
    half_grown(sized)
    volume = sized.core.volumes.get("data")
    sized.mount(volume)
    sized.unmount(volume)
    sized.core.volumes.remove("data")
    sized.assert_nothing_left()


def test_a_growth_that_was_refused_leaves_nothing_behind(sized: Lab) -> None:
    sized.create(size=10)
    sized.driver().fail("expand", CapacityExhausted("is full"))
    with pytest.raises(CapacityExhausted):
        sized.core.volumes.expand("data", 20)
    assert sized.core.doctor.examine() == []
    assert sized.core.volumes.get("data").size == 10


def test_files_under_a_mount_point_keep_the_volume_until_somebody_looked(lab: Lab) -> None:
    """Written while it was not mounted, by a process that did not notice: data, too."""
    volume = lab.create()
    point = lab.core.mounts.presence.path(volume.id)
    point.mkdir()
    (point / "stray").write_text("somebody's")
    with pytest.raises(HostError, match="mount point cannot be removed: Directory not empty.*look at what lies in it"):
        lab.core.volumes.remove("data")
    assert lab.storages["one"].volumes
    assert (point / "stray").read_text() == "somebody's"
    (point / "stray").unlink()
    lab.core.volumes.remove("data")
    lab.assert_nothing_left()


def test_snapshots(lab: Lab) -> None:
    volume = lab.create()
    (lab.tree(volume) / "file").write_text("then")
    lab.core.snapshots.create("data", "first")
    (lab.tree(volume) / "file").write_text("now")
    copy, older = lab.create("copy", source="data"), lab.create("older", source="data@first")
    assert [(lab.tree(each) / "file").read_text() for each in (copy, older)] == ["now", "then"]
    lab.core.snapshots.restore("data", "first")
    assert (lab.tree(volume) / "file").read_text() == "then"
    with pytest.raises(AlreadyExists):
        lab.core.snapshots.create("data", "first")
    with pytest.raises(NotFound, match="did you mean 'first'"):
        lab.core.snapshots.remove("data", "frist")
    with pytest.raises(NotFound, match="did you mean 'first'"):
        lab.create("other", source="data@fist")
    with pytest.raises(InvalidRequest):
        lab.core.snapshots.create("data", "../x")
    lab.core.snapshots.remove("data", "first")
    for name in ("data", "copy", "older"):
        lab.core.volumes.remove(name)
    lab.assert_nothing_left()


def test_a_restore_under_a_container_is_refused(lab: Lab) -> None:
    volume = lab.create()
    lab.core.snapshots.create("data", "first")
    lab.mount(volume)
    for dry_run in (True, False):
        with pytest.raises(InUse, match="docker by mount id id-1"):
            lab.core.snapshots.restore("data", "first", dry_run=dry_run)


def test_a_clone_cannot_change_its_backend(lab: Lab) -> None:
    lab.create()
    with pytest.raises(NotSupported, match="lies on backend one and cannot be cloned to two"):
        lab.create("copy", source="data", backend="two")


def test_a_volume_may_be_named_like_anothers_id(lab: Lab) -> None:
    first = lab.create()
    second = lab.create(first.id)
    lab.core.volumes.remove(first.id)  # the name goes before the id
    assert lab.core.volumes.get("data") == first
    assert first.id != second.id


def test_a_backend_that_is_away_is_passed_over_only_when_another_can(lab: Lab) -> None:
    lab.core.backends.get("one").unavailable("is away")
    with pytest.raises(BackendUnavailable, match="backend one: cannot be used now: is away"):
        lab.create()
    assert lab.create(backend="two").backend == "two"


def test_a_disabled_ability_is_refused(make_lab: Any) -> None:
    from volumed.config import BackendSettings  # noqa: PLC0415

    lab = make_lab(backends={"one": BackendSettings(driver="memory", disabled_capabilities=("snapshot",))})
    lab.create()
    with pytest.raises(NotSupported, match="snapshot is turned off in the configuration"):
        lab.core.snapshots.create("data")


def test_out_of_range_is_an_invalid_request() -> None:
    assert issubclass(OutOfRange, InvalidRequest)
