"""`iscsi` without a target: what it may be told, and whose a LUN is. A real target comes in the machine (tests/vm)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from volumed.driver import VolumeSpec
from volumed.errors import BackendUnavailable, IntegrityError, NotFound, OutOfRange
from volumed.model import Handle, VolumeId, VolumeMode, new_volume_id
from volumed.testing.fake_host import FakeHost
from volumed_drivers.iscsi import IscsiDriver, IscsiOptions
from volumed_drivers.iscsi.claims import Claim, Claims, place
from volumed_drivers.iscsi.options import Portal, luns, portals

IQN = "iqn.2003-01.com.example:storage.disk1"


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    made = Claims(tmp_path / "claims", "backend array")
    made.prepare()
    return made


def test_of_many_that_want_a_lun_one_gets_it(claims: Claims) -> None:
    wanted = [Claim(IQN, 3, new_volume_id()) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(claims.take, wanted))
    assert sum(got) == 1
    winner = wanted[got.index(True)]
    assert list(claims.all()) == [winner]
    assert claims.of(VolumeId(winner.volume_id)) == winner


def test_a_claim_is_as_it_was_put(claims: Claims) -> None:
    claim = Claim(IQN, 0, new_volume_id(), size=1 << 40, taken=True, mark={"name": "\u00e9t\u00e9"})
    assert claims.take(claim)
    changed = claim._replace(wiped=5)
    claims.put(changed)
    assert claims.get(claim.handle) == changed
    assert place(claim.handle) == (IQN, 0)
    claims.drop(claim)
    claims.drop(claim)
    assert claims.get(claim.handle) is None


def test_a_claim_that_cannot_be_read_stops_everything(claims: Claims, tmp_path: Path) -> None:
    (tmp_path / "claims" / "x-lun-0.json").write_text("{")
    with pytest.raises(IntegrityError, match="x-lun-0.json: is no claim of a LUN"):
        list(claims.all())


def test_what_is_left_of_a_write_is_no_claim(claims: Claims, tmp_path: Path) -> None:
    (tmp_path / "claims" / "x-lun-0.1.v0.new").write_text("{")
    assert list(claims.all()) == []


def test_portals_and_luns_are_read() -> None:
    assert portals("10.0.0.5, array.example.org:3261,[fd00::1]:3260") == [
        Portal("10.0.0.5", 3260),
        Portal("array.example.org", 3261),
        Portal("[fd00::1]", 3260),
    ]
    assert luns("0-3,7") == [0, 1, 2, 3, 7]
    assert luns("") == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"portal": "10.0.0.5 -x"},
        {"portal": ""},
        {"iqn": "iqn.2003-01.com.example:../../etc"},
        {"iqn": "storage"},
        {"luns": "0-"},
        {"luns": "99999"},
        {"user": "me"},
        {"password": "file:/x"},
        {"user": "a b", "password": "file:/x"},
        {"user": "me", "password": "plain"},
        {"target_user": "array", "target_password": "file:/x"},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        IscsiOptions(**({"portal": "10.0.0.5", "iqn": IQN} | wrong))


def test_what_nobody_claimed_is_not_found(tmp_path: Path) -> None:
    driver = IscsiDriver("array", IscsiOptions(portal="127.0.0.1", iqn=IQN, claims=tmp_path), FakeHost())
    handle = Handle(f"3@{IQN}")
    for call in (driver.inspect, driver.map):
        with pytest.raises(NotFound, match=f"LUN {handle} of backend array: nobody has claimed"):
            call(handle)
    driver.delete(handle)
    assert driver.mapped(handle) is None
    with pytest.raises(OutOfRange):
        driver.create(VolumeSpec(new_volume_id(), None, VolumeMode.BLOCK, driver.VolumeOptions()))


def test_a_daemon_that_is_not_there_is_said(tmp_path: Path) -> None:
    driver = IscsiDriver("array", IscsiOptions(portal="127.0.0.1", iqn=IQN, claims=tmp_path), FakeHost())
    with pytest.raises(BackendUnavailable, match="iscsid does not run.*install open-iscsi"):
        driver.probe()
