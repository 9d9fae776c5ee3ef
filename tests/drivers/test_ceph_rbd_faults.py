"""`ceph-rbd` when its cluster refuses, hangs, is gone, is full, or loses an image: clear errors in time, no damage."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.drivers.conftest import MakeRbd
from tests.drivers.test_ceph_rbd import spec, write
from tests.harness.ceph import POOL, READY, Ceph
from volumed.errors import (
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    NotFound,
    PermissionDenied,
    VolumedError,
)
from volumed.model import Handle, new_volume_id
from volumed.units import MIB
from volumed_drivers.ceph_rbd import CephRbdDriver

pytestmark = pytest.mark.root


# What cannot work from the start
def test_a_wrong_key(make_rbd: MakeRbd, tmp_path: Path) -> None:
    key = tmp_path / "key"
    for text in ("AQCHCwZrn2YMHxAAoOEPYJ/B1aPd2AB8FjglWg==", "no key at all"):
        key.write_text(text)
        with pytest.raises(
            PermissionDenied, match="backend ceph: the cluster refuses the key of client.volumed"
        ) as got:
            make_rbd(key=f"file:{key}").probe()
        assert text not in str(got.value)
    with pytest.raises(ConfigError, match="the secret in .* cannot be read: No such file"):
        make_rbd(key="file:/nonexistent/key").probe()


def test_a_key_that_was_put_right_is_taken_up(make_rbd: MakeRbd, rbd_key: Path, tmp_path: Path) -> None:
    key = tmp_path / "keyring"
    key.write_text("AQCHCwZrn2YMHxAAoOEPYJ/B1aPd2AB8FjglWg==")
    driver = make_rbd(key=f"file:{key}")
    with pytest.raises(PermissionDenied):
        driver.probe()
    key.write_text(f"[client.volumed]\n\tkey = {rbd_key.read_text()}\n")
    driver.probe()


def test_a_wrong_pool(make_rbd: MakeRbd, ceph: Ceph) -> None:
    with pytest.raises(BackendUnavailable, match="there is no pool puddle. make it with `ceph osd pool create puddle`"):
        make_rbd(pool="puddle").probe()
    ceph.make_pool("forbidden")
    with pytest.raises(PermissionDenied, match="backend ceph"):
        make_rbd(pool="forbidden").probe()


@pytest.mark.parametrize("monitors", ["127.0.0.1:1", "198.51.100.255:6789", "no.such.host.invalid"])
def test_no_way_to_the_monitors(make_rbd: MakeRbd, monitors: str) -> None:
    """Refused, not routed, and not resolved."""
    driver = make_rbd(monitors=monitors, timeout=2)
    with pytest.raises(BackendUnavailable, match=f"backend ceph: no monitor answers at {monitors}"):
        driver.probe()
    with pytest.raises(BackendUnavailable, match="no monitor answers"):
        driver.create(spec())


# A cluster that hangs
@pytest.fixture
def hang(ceph: Ceph) -> Iterator[Callable[[str], None]]:
    hung: list[str] = []

    def hang(name: str) -> None:
        ceph.hang(name)
        hung.append(name)

    yield hang
    for name in hung:
        ceph.resume(name)
    ceph.recover()


Job = Callable[[CephRbdDriver, Handle], object]
JOBS: dict[str, Job] = {
    "create": lambda driver, handle: driver.create(spec(volume_id=new_volume_id())),
    "map": lambda driver, handle: driver.map(handle),
    "inspect": lambda driver, handle: driver.inspect(handle),
    "expand": lambda driver, handle: driver.expand(handle, 128 * MIB),
    "list": lambda driver, handle: list(driver.list()),
    "delete": lambda driver, handle: driver.delete(handle),
}


@pytest.mark.parametrize("job", JOBS)
def test_an_osd_that_hangs(ceph: Ceph, make_rbd: MakeRbd, hang: Callable[[str], None], job: str) -> None:
    driver = make_rbd(timeout=2)
    handle = driver.create(spec()).handle
    hang("osd.0")
    with pytest.raises(BackendError, match="did not answer|could not map|in time"):
        JOBS[job](driver, handle)
    ceph.resume("osd.0")
    ceph.recover()
    patient = make_rbd(timeout=60)  # the watch of a client that was given up lasts for half a minute
    JOBS[job](patient, handle)
    assert len([found for found in patient.list() if found.whole]) == (
        0 if job == "delete" else len(list(patient.list()))
    )


def test_unmapping_while_an_osd_hangs_does_not_hang(ceph: Ceph, make_rbd: MakeRbd, hang: Callable[[str], None]) -> None:
    driver = make_rbd(timeout=2)
    handle = driver.create(spec()).handle
    write(driver.map(handle), b"kept")
    hang("osd.0")
    driver.unmap(handle)
    assert driver.mapped(handle) is None
    ceph.resume("osd.0")
    ceph.recover()
    wait_until(lambda: not driver.holders(handle), timeout=60)
    assert driver.map(handle).open("rb").read(4) == b"kept"


def test_a_monitor_that_hangs(ceph: Ceph, make_rbd: MakeRbd, hang: Callable[[str], None]) -> None:
    hang("mon.a")
    with pytest.raises(BackendUnavailable, match="no monitor answers at .*timed out"):
        make_rbd(timeout=2).probe()


def test_a_volume_in_use_waits_for_its_cluster_and_goes_on(ceph: Ceph, make_rbd: MakeRbd, tmp_path: Path) -> None:
    """The whole of it ends, and comes back a while later."""
    driver = make_rbd(timeout=5)
    handle = driver.create(spec()).handle
    device = driver.map(handle)
    sh("mkfs.ext4", "-q", device)
    driver.host.mount(device, tmp_path, fstype="ext4")
    try:
        (tmp_path / "before").write_bytes(b"before")
        sh("sync", "-f", tmp_path)
        for name in ("osd.0", "mon.a"):
            ceph.stop(name)
        written = threading.Event()

        def use() -> None:
            with (tmp_path / "meanwhile").open("wb") as file:
                file.write(os.urandom(MIB))
                os.fsync(file.fileno())
            written.set()

        user = threading.Thread(target=use)
        user.start()
        with pytest.raises(BackendError):
            driver.inspect(handle)
        assert not written.is_set()
        for name in ("mon.a", "osd.0"):
            ceph.run(name)
        wait_until(ceph.clean, timeout=READY)
        user.join(60)
        assert written.is_set()
        assert (tmp_path / "before").read_bytes() == b"before"
        assert driver.mapped(handle) == device
    finally:
        driver.host.unmount(tmp_path)
    driver.unmap(handle)
    sh("e2fsck", "-fn", driver.map(handle))


# Storage that changed behind our back
def test_a_quota_that_is_reached(ceph: Ceph, make_rbd: MakeRbd) -> None:
    driver = make_rbd(timeout=5)
    handle = driver.create(spec()).handle
    write(driver.map(handle), os.urandom(8 * MIB))
    driver.unmap(handle)
    ceph.ceph("osd", "pool", "set-quota", POOL, "max_bytes", str(4 * MIB))
    try:
        wait_until(lambda: "POOL_FULL" in ceph.ceph("health", "detail"), timeout=READY)
        assert driver.capacity() == (4 * MIB, 0)
        with pytest.raises(CapacityExhausted, match="backend ceph"):
            driver.create(spec())
        for found in driver.list():  # what makes room is let through
            driver.delete(found.handle)
    finally:
        ceph.ceph("osd", "pool", "set-quota", POOL, "max_bytes", "0")
    wait_until(lambda: "POOL_FULL" not in ceph.ceph("health", "detail"), timeout=READY)
    driver.create(spec())


def test_an_image_that_was_deleted_by_hand(ceph: Ceph, make_rbd: MakeRbd) -> None:
    driver = make_rbd()
    handle = driver.create(spec()).handle
    ceph.rbd("rm", f"{POOL}/{handle}", "--no-progress")
    for job in (driver.inspect, driver.map, driver.holders):
        with pytest.raises(NotFound, match=f"image rbd/{handle} is gone"):
            job(handle)
    driver.unmap(handle)
    driver.delete(handle)
    assert list(driver.list()) == []


def test_other_backends_do_not_notice(ceph: Ceph, make_rbd: MakeRbd, hang: Callable[[str], None]) -> None:
    """Whoever waits for the cluster waits in a process of its own: this one goes on."""
    driver, jobs = make_rbd(timeout=4), []
    handle = driver.create(spec()).handle
    hang("osd.0")
    errors: list[VolumedError] = []

    def ask() -> None:
        try:
            driver.inspect(handle)
        except VolumedError as error:
            errors.append(error)

    for _ in range(4):
        jobs.append(threading.Thread(target=ask))
        jobs[-1].start()
    turns = 0
    while any(job.is_alive() for job in jobs):
        threading.Event().wait(0.05)
        turns += 1
    assert turns > 10  # librados holds Python's lock in some calls: it would have let us turn once or twice
    assert len(errors) == 4
