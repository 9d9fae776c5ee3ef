"""`s3` on moto, which is quick, and on Ceph's RADOS Gateway, which is real; mounted by the real s3fs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from tests.conftest import sh, wait_until
from tests.harness.ceph import Ceph, S3User
from tests.harness.s3 import Server, certificate, free_port, moto_server, options
from tests.harness.tree_drivers import client_pid, create, mounted, nothing_left
from tests.harness.trees import not_held
from volumed import context
from volumed.driver import Capability
from volumed.errors import (
    BackendError,
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    MountFailed,
    NotFound,
    NotSupported,
    PermissionDenied,
)
from volumed.host.linux import LinuxHost
from volumed.model import Handle, VolumeId, new_volume_id
from volumed.testing.conformance import DriverConformance, MakeDriver
from volumed.units import MIB
from volumed_drivers.radosgw import RadosGateway
from volumed_drivers.s3 import S3Driver, S3Options
from volumed_drivers.s3_client import S3

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(ceph: Ceph) -> tuple[str, S3User]:
    """With a user who may set quotas."""
    endpoint = ceph.start_gateway()
    user = ceph.make_s3_user(f"volumed-{secrets.token_hex(3)}")
    ceph.allow_quotas(user)
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


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left("s3"):
        yield


@pytest.fixture
def driver(moto: Server, tmp_path: Path) -> S3Driver:
    made = driver_of(own(options(tmp_path, moto.endpoint), cache_time=0))
    made.probe()
    return made


@pytest.fixture
def sized(gateway: tuple[str, S3User], tmp_path: Path) -> S3Driver:
    made = driver_of(real(tmp_path, gateway))
    made.probe()
    return made


# What it holds, and what not
def test_it_holds_what_it_says_and_no_more(sized: S3Driver, tmp_path: Path) -> None:
    handle = create(sized)
    with mounted(sized, handle, tmp_path / "at") as tree:
        assert not_held(tree) == sized.cannot_hold - {"locks", "atomic-rename", "longest-paths"}
    sized.delete(handle)  # with a name that no list of things to delete can say
    assert sized.find(VolumeId(handle)) is None


def test_locks_do_not_reach_another_node(driver: S3Driver, tmp_path: Path) -> None:
    """Two mounts are two clients, as on two nodes; what one writes the other sees."""
    assert "locks" in driver.cannot_hold
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "one") as one, mounted(driver, handle, tmp_path / "other") as other:
        (one / "file").write_text("from one")
        wait_until((other / "file").exists)
        assert (other / "file").read_text() == "from one"
        with (one / "file").open("r+") as mine, (other / "file").open("r+") as yours:
            fcntl.flock(mine, fcntl.LOCK_EX)
            fcntl.flock(yours, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("words", [("cp", "-a"), ("rsync", "-a"), ("install", "-m", "4751", "-o", "5", "-g", "6")])
def test_what_copies_leaves_is_seen_at_once(driver: S3Driver, tmp_path: Path, words: tuple[str, ...]) -> None:
    source = tmp_path / "source"
    source.write_text("x")
    os.chown(source, 5, 6)
    source.chmod(0o4751)
    with mounted(driver, create(driver), tmp_path / "at") as tree:
        sh(*words, source, tree / "copy")
        seen = (tree / "copy").stat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid) == (0o4751, 5, 6)


def test_owner_and_mode_of_the_root_are_kept(driver: S3Driver, tmp_path: Path) -> None:
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        os.chown(tree, 999, 998)
        tree.chmod(0o750)
    with mounted(driver, handle, tmp_path / "at") as tree:
        assert (tree.stat().st_uid, tree.stat().st_gid, stat.S_IMODE(tree.stat().st_mode)) == (999, 998, 0o750)
        assert list(tree.iterdir()) == []


def test_somebody_else_gets_in_only_where_modes_let_him(driver: S3Driver, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    tmp_path.parent.parent.chmod(0o755)
    with mounted(driver, create(driver), tmp_path / "at") as tree:
        (tree / "open").write_text("for all")
        (tree / "closed").write_text("for one")
        (tree / "closed").chmod(0o600)
        as_nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "cat")
        assert sh(*as_nobody, tree / "open") == "for all"
        with pytest.raises(AssertionError, match="Permission denied"):
            sh(*as_nobody, tree / "closed")


def test_a_mount_that_reads_only(driver: S3Driver, tmp_path: Path) -> None:
    handle = create(driver)
    target = tmp_path / "at"
    target.mkdir()
    driver.mount(handle, target, options=("noexec",), readonly=True)
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").touch()
    driver.unmount(handle, target)
    with pytest.raises(MountFailed, match="cannot take the option 'url=http://elsewhere'"):
        driver.mount(handle, target, options=("url=http://elsewhere",), readonly=False)


# Sizes
def test_a_full_bucket_takes_more_once_it_has_grown(sized: S3Driver, tmp_path: Path) -> None:
    handle = create(sized, 4 * MIB)
    with mounted(sized, handle, tmp_path / "at") as tree:
        with pytest.raises(OSError):
            (tree / "large").write_bytes(os.urandom(6 * MIB))
        assert sized.expand(handle, 32 * MIB) == 32 * MIB
        time.sleep(1.5)  # for as long the gateway remembers a quota
        (tree / "large").write_bytes(os.urandom(6 * MIB))
    assert sized.inspect(handle).size == 32 * MIB
    assert (sized.inspect(handle).used or 0) >= 6 * MIB


def test_a_user_who_may_set_no_quotas_is_told_so(ceph: Ceph, gateway: tuple[str, S3User], tmp_path: Path) -> None:
    driver = driver_of(real(tmp_path, (gateway[0], ceph.make_s3_user(f"plain-{secrets.token_hex(3)}"))))
    assert "buckets=*" in driver.probe().lacking[Capability.SIZE]
    with pytest.raises(NotSupported, match="advisory-size"):
        create(driver, MIB)
    assert list(driver.list()) == []


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A server that takes a request and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def overloaded() -> Iterator[str]:
    class Overloaded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)

    with HTTPServer(("127.0.0.1", 0), Overloaded) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.1,))
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


@pytest.mark.parametrize("unable", [silent, overloaded])
def test_no_answer_is_no_proof_that_there_are_no_quotas(
    unable: Callable[[], contextlib.AbstractContextManager[str]],
    gateway: tuple[str, S3User],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = driver_of(real(tmp_path, gateway))
    answers = driver._gateway
    with unable() as endpoint, monkeypatch.context() as patched:
        patched.setattr("volumed_drivers.radosgw.READ_TIMEOUT", 0.5)
        no_answer = RadosGateway(S3(driver._s3.access._replace(endpoint=endpoint), subject="it"), subject="it")
        driver._gateway = no_answer
        assert "did not answer whether it has quotas" in driver.probe().lacking[Capability.SIZE]
        driver._gateway = answers
        wait_until(lambda: driver.probe().lacking == {})
        driver._gateway = no_answer
        assert driver.probe().lacking == {}
    driver._gateway = answers
    driver.delete(create(driver, MIB))


def test_an_advisory_size_is_kept_and_grows(moto: Server, tmp_path: Path) -> None:
    driver = driver_of(own(options(tmp_path, moto.endpoint), advisory_size=True))
    assert driver.probe().lacking == {}
    handle = create(driver, MIB)
    assert driver.expand(handle, 2 * MIB) == 2 * MIB
    assert driver.expand(handle, MIB) == 2 * MIB
    assert driver.inspect(handle).size == 2 * MIB


# Deleting
@pytest.mark.parametrize("server", ["moto", "gateway"])
def test_versions_and_unfinished_uploads_go_as_well(
    server: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found = request.getfixturevalue(server)
    driver = driver_of(real(tmp_path, found) if server == "gateway" else own(options(tmp_path, found.endpoint)))
    driver.probe()
    handle = create(driver)
    client, bucket = driver._s3.client(), driver._place(handle)[0]
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for content in (b"first", b"second"):
        client.put_object(Bucket=bucket, Key="data/file", Body=content)
    client.delete_object(Bucket=bucket, Key="data/file")
    client.create_multipart_upload(Bucket=bucket, Key="data/large")
    driver.delete(handle)
    assert not driver._s3.bucket_exists(bucket)


def test_what_needs_longer_than_there_is_time_goes_on_at_the_next_call(driver: S3Driver) -> None:
    handle = create(driver)
    client, bucket = driver._s3.client(), driver._place(handle)[0]
    client.put_object(Bucket=bucket, Key="data/file", Body=b"x")
    with context.request(timeout=0.0), pytest.raises(DeadlineExceeded, match="more than could be removed"):
        driver.delete(handle)
    assert driver.find(VolumeId(handle)) == handle
    assert [found.whole for found in driver.list()] == [True]  # the mark goes last
    driver.delete(handle)
    assert driver.find(VolumeId(handle)) is None


def test_buckets_of_others_are_neither_listed_nor_touched(driver: S3Driver, moto: Server, tmp_path: Path) -> None:
    foreign = make_bucket(options(tmp_path, moto.endpoint))
    handle = create(driver)
    assert [found.handle for found in driver.list()] == [handle]
    with pytest.raises(NotFound):
        driver.delete(Handle(foreign))
    assert driver._s3.bucket_exists(foreign)


# Credentials
def test_keys_are_in_no_command_line_environment_file_or_log(driver: S3Driver, tmp_path: Path) -> None:
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at"):
        pid = client_pid(driver, "s3", handle)
        for name in ("cmdline", "environ"):
            assert b"secret-key-1" not in Path(f"/proc/{pid}/{name}").read_bytes()
        found = subprocess.run(["grep", "-rqs", "secret-key-1", "/run/volumed"], check=False)
        assert found.returncode == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("access", "the access key is unknown"), ("secret", "does not belong to the access key")],
)
def test_a_wrong_key_is_named_and_not_shown(gateway: tuple[str, S3User], tmp_path: Path, wrong: str, told: str) -> None:
    chosen = real(tmp_path, gateway)
    (tmp_path / f"{wrong}.key").write_text("WRONGWRONGWRONG")
    with pytest.raises(PermissionDenied, match=f"backend objects: .*{told}") as refused:
        driver_of(chosen).probe()
    assert "WRONGWRONG" not in str(refused.value)


def test_a_rotated_key_is_taken_up(gateway: tuple[str, S3User], tmp_path: Path) -> None:
    driver = driver_of(real(tmp_path, gateway))
    right = (tmp_path / "secret.key").read_text()
    (tmp_path / "secret.key").write_text("not yet this one")
    with pytest.raises(PermissionDenied):
        driver.probe()
    (tmp_path / "secret.key").write_text(right)
    driver.probe()


def test_a_certificate_is_checked_by_both_clients(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with moto_server("-c", cert, "-k", key, scheme="https", host="localhost") as server:
        chosen = own(options(tmp_path, server.endpoint))
        with pytest.raises(ConfigError, match="tls-ca"):
            driver_of(chosen).probe()
        driver = driver_of(own(chosen, tls_ca=cert))
        driver.probe()
        handle = create(driver)
        with mounted(driver, handle, tmp_path / "at") as tree:
            (tree / "file").write_text("over TLS")
        driver._options = chosen.model_copy(update={"prefix": driver._options.prefix})
        with pytest.raises(MountFailed, match="FUSE client failed"):
            driver.mount(handle, tmp_path / "at", options=(), readonly=False)


# Servers that fail
def test_another_clock_is_named(gateway: tuple[str, S3User], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(real(tmp_path, gateway))
    then = datetime.now(UTC) - timedelta(minutes=20)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: then)
    with pytest.raises(BackendError, match=r"clock .*there it is .*NTP"):
        driver.probe()


def test_a_bucket_that_is_not_there_is_named(driver: S3Driver, moto: Server, tmp_path: Path) -> None:
    shared = options(tmp_path, moto.endpoint).model_copy(update={"bucket": "no-such-bucket"})
    with pytest.raises(ConfigError, match="there is no bucket no-such-bucket"):
        driver_of(shared).probe()
    with pytest.raises(ConfigError, match="no-such-bucket"):
        driver_of(shared).find(new_volume_id())


def test_a_bucket_removed_behind_our_back_is_not_found(driver: S3Driver, tmp_path: Path) -> None:
    handle = create(driver)
    bucket, _ = driver._place(handle)
    driver._s3.remove(bucket, driver._s3.remove_below(bucket, "", sparing="volumed.json"))
    driver._s3.delete_bucket(bucket)
    (tmp_path / "at").mkdir()
    with pytest.raises(NotFound, match="put it back from a backup"):
        driver.mount(handle, tmp_path / "at", options=(), readonly=False)
    driver.delete(handle)


def test_a_server_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    driver = driver_of(options(tmp_path, f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(BackendUnavailable, match="backend objects: listing buckets: .*127.0.0.1"):
        driver.probe()


def test_a_name_that_dns_does_not_know_is_said(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no-such-host.invalid"):
        driver_of(options(tmp_path, "http://no-such-host.invalid")).probe()


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Driver, Callable[[], None]]]:
    """A driver whose server can be stopped: it takes connections and answers nothing. Until then it has all the time
    that it takes; afterwards nobody need wait for long."""
    with moto_server() as server:
        driver = driver_of(own(options(tmp_path, server.endpoint)))
        driver.probe()

        def freeze() -> None:
            server.process.send(signal.SIGSTOP)
            monkeypatch.setattr("volumed_drivers.s3_client.READ_TIMEOUT", 1)
            monkeypatch.setattr("volumed_drivers.s3.MOUNT_TIMEOUT", 2.0)
            driver._s3._made = None  # the client that it had is as patient as ever

        try:
            yield driver, freeze
        finally:
            server.process.send(signal.SIGCONT)


def test_calls_to_a_frozen_server_end(frozen: tuple[S3Driver, Callable[[], None]]) -> None:
    driver, freeze = frozen
    handle = create(driver)
    freeze()
    for call in (driver.probe, lambda: create(driver), lambda: driver.inspect(handle), lambda: driver.delete(handle)):
        with pytest.raises(DeadlineExceeded, match="the server does not answer"):
            call()


def test_a_mount_from_a_server_that_freezes_ends_and_leaves_nothing(
    frozen: tuple[S3Driver, Callable[[], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, freeze = frozen
    handle = create(driver)
    (tmp_path / "at").mkdir()
    monkeypatch.setattr(driver, "_present", lambda *_: freeze())
    with pytest.raises(DeadlineExceeded, match="got no answer from"):
        driver.mount(handle, tmp_path / "at", options=(), readonly=False)
    assert not LinuxHost().is_mountpoint(tmp_path / "at")


def test_a_mount_of_a_frozen_server_goes_away(frozen: tuple[S3Driver, Callable[[], None]], tmp_path: Path) -> None:
    driver, freeze = frozen
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        (tree / "file").write_text("x")
        freeze()


# Clients that fail
def error_of(target: Path) -> int:
    try:
        LinuxHost().tree_status(target)
    except MountFailed as error:
        return error.errno
    return 0


def test_a_restarted_daemon_finds_the_client_again(driver: S3Driver, tmp_path: Path) -> None:
    handle = create(driver)
    with mounted(driver, handle, tmp_path / "at") as tree:
        pid = client_pid(driver, "s3", handle)
        again = driver_of(driver._options)
        assert again.owns_mount(handle, tree)
        assert client_pid(driver, "s3", handle) == pid
        again.unmount(handle, tree)
        assert LinuxHost().helpers(f"s3-{handle}") == []


def test_a_client_that_died_is_seen_and_replaced(driver: S3Driver, tmp_path: Path) -> None:
    handle = create(driver)
    target = tmp_path / "at"
    with mounted(driver, handle, target) as tree:
        (tree / "file").write_text("kept")
        os.kill(client_pid(driver, "s3", handle), signal.SIGKILL)
        wait_until(lambda: error_of(target) == errno.ENOTCONN)
        driver.unmount(handle, target)
        driver.mount(handle, target, options=(), readonly=False)
        assert (tree / "file").read_text() == "kept"


class Killed(BaseException):
    """As `kill -9` would end it."""


def test_what_a_killed_daemon_half_mounted_is_taken_up(
    driver: S3Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = create(driver)

    def kill(*_: object) -> None:
        raise Killed

    (tmp_path / "at").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(driver, "_bind", kill)
        with pytest.raises(Killed):
            driver.mount(handle, tmp_path / "at", options=(), readonly=False)
    with mounted(driver_of(driver._options), handle, tmp_path / "at") as tree:
        (tree / "file").write_text("x")


@pytest.mark.parametrize(
    "wrong", [{"endpoint": "s3.example.org"}, {"endpoint": "http://key@host"}, {"prefix": "Big_"}, {"bucket": "a/b"}]
)
def test_wrong_settings_are_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    right = options(tmp_path, "http://127.0.0.1:1").model_dump()
    with pytest.raises(ValidationError):
        S3Options(**{**right, **wrong})
