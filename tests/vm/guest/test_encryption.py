"""Runs inside the machine, whose kernel has device-mapper: encrypted volumes of a real daemon, and crashes of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import sh, wait_until
from tests.crash.killing import crash_points, live_through
from tests.harness.csi import calling, capability
from tests.harness.volumed import ApiError, Volumed
from volumed.units import MIB

OLD, NEW = "the-key-of-before-0123456789", "the-key-of-today-9876543210"
SECRET = b"nobody may read this on the storage"


def settings(folder: Path, *, key: str = "new", old: str = "old") -> str:
    return f"""
[keys.main]
key = "file:{folder}/{key}"
old = ["file:{folder}/{old}"]
[keys.told]
command = ["{folder}/tell", "{{id}}"]
[backends.safe]
driver = "image"
path = "{folder}/volumed/images"
encrypt = "main"
"""


@pytest.fixture
def volumed(tmp_path: Path) -> Iterator[Volumed]:
    for name, key in (("old", OLD), ("new", NEW)):
        (tmp_path / name).write_text(f"{key}\n")
    tell = tmp_path / "tell"
    tell.write_text("#!/bin/sh\necho key-of-$1\n")
    tell.chmod(0o700)
    folder = tmp_path / "volumed"
    folder.mkdir()
    made = Volumed(folder, only=True, backends=settings(tmp_path), default_backends=("safe",), csi="")
    made.targets.mkdir()
    try:
        yield made
    finally:
        made.clean_up()
        for node in Path("/dev/mapper").glob("volumed-*"):
            sh("cryptsetup", "close", node.name)
        made.clean_up()


def image_of(volumed: Volumed, name: str) -> Path:
    found: str = volumed.api.get("volumes", name)["id"]
    return volumed.folder / "images" / f"{found}.img"


def node_of(volumed: Volumed, name: str) -> Path:
    return Path(f"/dev/mapper/volumed-{image_of(volumed, name).stem}-crypt")


def opens(image: Path, key: str) -> bool:
    file = image.parent.parent / "tried"
    file.write_text(key)
    try:
        sh("cryptsetup", "open", "--test-passphrase", f"--key-file={file}", image)
    except AssertionError:
        return False
    return True


def mounted(volumed: Volumed, name: str, mount_id: str = "id-1") -> Path:
    answer = volumed.plugin("Mount", Name=name, ID=mount_id)
    assert answer.error == "", answer
    return Path(answer.body["Mountpoint"])


def unmounted(volumed: Volumed, name: str, mount_id: str = "id-1") -> None:
    assert volumed.plugin("Unmount", Name=name, ID=mount_id).error == ""
    assert not node_of(volumed, name).exists()


def check(volumed: Volumed, name: str, content: bytes = SECRET) -> None:
    assert (mounted(volumed, name, "look") / "file").read_bytes() == content
    unmounted(volumed, name, "look")


def size_of(device: Path) -> int:
    return int(sh("blockdev", "--getsize64", device))


def test_a_whole_life(volumed: Volumed) -> None:
    volumed.start()
    assert volumed.plugin("Create", Name="data", Opts={"size": "64m"}).error == ""
    made = volumed.api.get("volumes", "data")
    assert (made["encryption"], made["size"]) == ("main", 64 * MIB)
    path = mounted(volumed, "data")
    (path / "file").write_bytes(SECRET)
    sh("sync", "-f", path)
    assert size_of(node_of(volumed, "data")) == 64 * MIB  # a promise: the header is beside it
    assert SECRET not in image_of(volumed, "data").read_bytes()
    # Nothing notices that the daemon dies.
    volumed.kill()
    volumed.start()
    assert (path / "file").read_bytes() == SECRET
    assert volumed.api.get("doctor") == []
    # In use, then not.
    volumed.api.post("volumes", "data", "expand", body={"size": "96m"})
    assert size_of(node_of(volumed, "data")) == 96 * MIB
    unmounted(volumed, "data")
    volumed.api.post("volumes", "data", "expand", body={"size": "112m"})
    assert volumed.api.get("volumes", "data")["size"] == 112 * MIB
    check(volumed, "data")
    volumed.api.post("volumes", "data", "snapshots", body={"name": "then"})
    (mounted(volumed, "data") / "file").write_bytes(b"later")
    unmounted(volumed, "data")
    volumed.api.post("volumes", "data", "snapshots", "then", "restore")
    check(volumed, "data")
    volumed.api.delete("volumes", "data", "snapshots", "then")
    assert volumed.plugin("Remove", Name="data").error == ""
    assert list(Path("/dev/mapper").glob("volumed-*")) == []
    volumed.assert_nothing_left()
    assert NEW not in volumed.log()
    assert b"luksFormat" in volumed.log().encode()  # the log has the commands, so it would have the key


def test_copies_have_keys_of_their_own(volumed: Volumed) -> None:
    volumed.start()
    assert volumed.plugin("Create", Name="data", Opts={"size": "64m", "encrypt": "told"}).error == ""
    (mounted(volumed, "data") / "file").write_bytes(SECRET)
    unmounted(volumed, "data")
    volumed.api.post("volumes", "data", "snapshots", body={"name": "then"})
    assert volumed.plugin("Create", Name="copy", Opts={"from": "data"}).error == ""
    assert volumed.plugin("Create", Name="older", Opts={"from": "data@then", "encrypt": "main"}).error == ""
    keys = {name: f"key-of-{image_of(volumed, name).stem}" for name in ("data", "copy")} | {"older": NEW}
    for name, key in keys.items():
        check(volumed, name)
        assert opens(image_of(volumed, name), key)
        others = [other for other in keys.values() if other != key]
        assert not any(opens(image_of(volumed, name), other) for other in others)
    assert (
        volumed.plugin("Create", Name="data", Opts={"encrypt": "main"}).error == ""
    )  # known: Docker's own check is by name
    with pytest.raises(ApiError, match="another encrypt"):
        volumed.api.post("volumes", body={"name": "data", "encryption": "main"})


def test_a_new_key_in_the_settings(volumed: Volumed, tmp_path: Path) -> None:
    """Opened by the old one until it is rotated; a snapshot of before comes back with the old one, and is rekeyed."""
    new = volumed.config.read_text()
    volumed.config.write_text(new.replace(f"{tmp_path}/new", f"{tmp_path}/old"))
    volumed.start()
    assert volumed.plugin("Create", Name="data", Opts={"size": "64m"}).error == ""
    (mounted(volumed, "data") / "file").write_bytes(SECRET)
    unmounted(volumed, "data")
    volumed.api.post("volumes", "data", "snapshots", body={"name": "then"})
    image = image_of(volumed, "data")
    assert (opens(image, OLD), opens(image, NEW)) == (True, False)
    volumed.stop()
    volumed.config.write_text(new)
    volumed.start()
    check(volumed, "data")
    path = mounted(volumed, "data")
    assert volumed.ctl("encryption", "rotate", "data").stdout == "data\n"
    assert (opens(image, OLD), opens(image, NEW)) == (False, True)
    assert (path / "file").read_bytes() == SECRET
    unmounted(volumed, "data")
    volumed.ctl("encryption", "rotate", "data")
    volumed.api.post("volumes", "data", "snapshots", "then", "restore")
    assert (opens(image, OLD), opens(image, NEW)) == (False, True)
    check(volumed, "data")


def test_wrong_keys_and_headers_are_said(volumed: Volumed, tmp_path: Path) -> None:
    volumed.start()
    assert volumed.plugin("Create", Name="data", Opts={"size": "64m"}).error == ""
    refused = volumed.plugin("Create", Name="other", Opts={"size": "64m", "encrypt": "mian"}).error
    assert "there is no key 'mian'. did you mean 'main'" in refused
    (tmp_path / "new").write_text("of-somebody-else-altogether")
    refused = volumed.plugin("Mount", Name="data", ID="id-1").error
    assert "no key of the name 'main' opens it" in refused
    assert "somebody-else" not in refused + volumed.log()
    assert volumed.loops() == []
    (tmp_path / "new").unlink()
    assert f"the secret in {tmp_path}/new cannot be read" in volumed.plugin("Mount", Name="data", ID="id-1").error
    (tmp_path / "new").write_text(NEW)
    with image_of(volumed, "data").open("r+b") as opened:
        opened.write(bytes(MIB))
        os.fsync(opened)
    assert "no LUKS header" in volumed.plugin("Mount", Name="data", ID="id-1").error
    assert list(Path("/dev/mapper").glob("volumed-*")) == []


def test_a_raw_device(volumed: Volumed) -> None:
    volumed.start()
    device = capability(block=True)
    with calling(volumed.csi_socket) as caller:
        made = caller.CreateVolume(
            name="raw", volume_capabilities=[device], capacity_range={"required_bytes": 32 * MIB}
        ).volume
        staging, target = volumed.targets / "staging", volumed.targets / "target"
        staging.mkdir()
        where = {"volume_id": made.volume_id, "staging_target_path": str(staging)}
        caller.NodeStageVolume(**where, volume_capability=device)
        caller.NodePublishVolume(**where, target_path=str(target), volume_capability=device)
        assert size_of(target) == 32 * MIB
        with target.open("r+b", buffering=0) as opened:
            opened.write(SECRET.ljust(4096))
            os.fsync(opened)
        assert SECRET not in image_of(volumed, "raw").read_bytes()
        caller.NodeUnpublishVolume(volume_id=made.volume_id, target_path=str(target))
        caller.NodeUnstageVolume(**where)
        assert not node_of(volumed, "raw").exists()
        staging.rmdir()
        caller.DeleteVolume(volume_id=made.volume_id)
    volumed.assert_nothing_left()


def test_the_doctor_closes_what_is_open_for_no_volume(volumed: Volumed, tmp_path: Path) -> None:
    volumed.start()
    stray, key = tmp_path / "stray", tmp_path / "new"
    stray.write_bytes(bytes(32 * MIB))
    sh("cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--iter-time", "10", f"--key-file={key}", stray)
    name = f"volumed-v{'0' * 32}-crypt"
    sh("cryptsetup", "open", f"--key-file={key}", stray, name)
    (finding,) = volumed.api.get("doctor")
    assert (finding["kind"], finding["subject"]) == ("orphan-device", f"/dev/mapper/{name}")
    volumed.api.post("doctor", body={})
    assert not Path("/dev/mapper", name).exists()


class Life:
    def __init__(self, volumed: Volumed) -> None:
        self._volumed = volumed

    def steps(self) -> list[Callable[[], None]]:
        return [
            self._create,
            self._mount,
            lambda: unmounted(self._volumed, "data"),
            self._make_old,
            self._rotate,
            self._remove,
        ]

    def _create(self) -> None:
        assert self._volumed.plugin("Create", Name="data", Opts={"size": "64m"}).error == ""

    def _mount(self) -> None:
        (mounted(self._volumed, "data") / "file").write_bytes(SECRET)

    def _make_old(self) -> None:
        """As one that has the key of before."""
        image, folder = image_of(self._volumed, "data"), self._volumed.folder.parent
        quick = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
        for name, key in (("plain-old", OLD), ("plain-new", NEW)):
            (folder / name).write_text(key)
        sh("cryptsetup", "luksAddKey", *quick, f"--key-file={folder}/plain-new", image, folder / "plain-old")
        sh("cryptsetup", "luksRemoveKey", "-q", image, folder / "plain-new")

    def _rotate(self) -> None:
        self._volumed.api.post("volumes", "data", "rotate-key")
        image = image_of(self._volumed, "data")
        assert (opens(image, OLD), opens(image, NEW)) == (False, True)
        check(self._volumed, "data")

    def _remove(self) -> None:
        answer = self._volumed.plugin("Remove", Name="data")
        assert answer.error == "" or "no such volume" in answer.error


POINTS = [point for point in crash_points() if point.partition(".")[0] in ("encryption", "rotate")]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(volumed: Volumed, point: str) -> None:
    assert live_through(volumed, Life(volumed).steps(), point) == 1, f"{point} was not passed"
    wait_until(lambda: not list(Path("/dev/mapper").glob("volumed-*")))
    volumed.assert_nothing_left()
