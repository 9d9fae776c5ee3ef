"""`s3` on moto, which is quick, and on Ceph's RADOS Gateway, which is real; mounted by the real s3fs."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.conftest import sh
from tests.harness.ceph import Ceph, S3User
from tests.harness.s3 import Server, moto_server, options
from volumed.host.linux import LinuxHost
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed_drivers.s3 import S3Driver, S3Options

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(ceph: Ceph) -> tuple[str, S3User]:
    """With a user who may set quotas."""
    endpoint = ceph.start_gateway()
    user = ceph.make_s3_user("volumed")
    sh("radosgw-admin", "-c", ceph.conf, "caps", "add", "--uid", "volumed", "--caps", "buckets=*")
    return endpoint, user


def real(folder: Path, gateway: tuple[str, S3User], **more: object) -> S3Options:
    """Options of a backend of this test's own, at the gateway."""
    endpoint, user = gateway
    return own(options(folder, endpoint, access=user.access_key, secret=user.secret_key), **more)


def own(chosen: S3Options, **more: object) -> S3Options:
    return chosen.model_copy(update={"prefix": f"t{secrets.token_hex(4)}-", **more})


def driver_of(chosen: S3Options) -> S3Driver:
    return S3Driver("objects", chosen, LinuxHost())


def make_bucket(chosen: S3Options) -> str:
    """One bucket for all volumes, as an operator makes it."""
    name = f"shared-{secrets.token_hex(4)}"
    driver_of(chosen)._s3.create_bucket(name)
    return name


class TestBucketsOnMoto(DriverConformance):
    @pytest.fixture
    def make_driver(self, moto: Server, tmp_path: Path) -> MakeDriver:
        chosen = own(options(tmp_path, moto.endpoint))
        return lambda: driver_of(chosen)


class TestPrefixesOnMoto(DriverConformance):
    @pytest.fixture
    def make_driver(self, moto: Server, tmp_path: Path) -> MakeDriver:
        chosen = options(tmp_path, moto.endpoint)
        shared = chosen.model_copy(update={"bucket": make_bucket(chosen), "prefix": "volumes/"})
        return lambda: driver_of(shared)


class TestBucketsOnRadosGateway(DriverConformance):
    # The gateway answers 403 for a full bucket, and s3fs has no finer word for that.
    full: ClassVar[frozenset[int]] = frozenset({errno.EPERM, errno.EIO})

    @pytest.fixture
    def make_driver(self, gateway: tuple[str, S3User], tmp_path: Path) -> MakeDriver:
        chosen = real(tmp_path, gateway)
        return lambda: driver_of(chosen)


class TestPrefixesOnRadosGateway(DriverConformance):
    @pytest.fixture
    def make_driver(self, gateway: tuple[str, S3User], tmp_path: Path) -> MakeDriver:
        chosen = real(tmp_path, gateway)
        shared = chosen.model_copy(update={"bucket": make_bucket(chosen)})
        return lambda: driver_of(shared)
