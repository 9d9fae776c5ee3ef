"""volumed killed at every step of everything it does, and looked at afterwards: nothing lost, nothing leaked, and the
request that was cut short succeeds when it is made again."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeFilesystem, sh, wait_until
from tests.crash.killing import CSI_AREAS, assert_agree, crash_points, live_through
from tests.crash.test_csi_crash_points import CASES as CSI_CASES
from tests.harness.attached import installed
from tests.harness.volumed import ApiError, Volumed

pytestmark = [pytest.mark.root, pytest.mark.slow]

# Drivers whose own points their suites pass, where their storage is; `folder` is what nfs and gluster share.
ELSEWHERE = ("lvm", "ceph-rbd", "cephfs", "ebs", "iscsi", "folder", "s3")
# tests/migration/test_crash.py, test_native.py and test_backups.py; tests/vm/guest/test_encryption.py and test_live.py
OTHER_LIVES = ("migrate", "copy", "native", "encryption", "rotate", "live", "layer")
BACKENDS = ("local", "sized", "tree", "attached")


def is_passed(backend: str, point: str) -> bool:
    """Whether the life of a volume on this backend passes the point."""
    area = point.partition(".")[0]
    if area in CSI_AREAS:
        return False  # tests/crash/test_csi_crash_points.py
    if area in OTHER_LIVES:
        return False
    machines = area in ("attach", "detach", "takeover")
    if machines or backend == "attached":
        return machines and backend == "attached"
    own = {"local": "directory", "sized": "image", "tree": "btrfs"}
    if area in (*own.values(), *ELSEWHERE):
        return area == own[backend]
    if point == "journal.settled":
        return False  # on the way back from another crash: below
    if point in ("create.formatted", "mount.mapped"):
        return backend == "sized"
    if area.startswith("snapshot") or area == "expand":
        return backend != "local"
    return True


CASES = [(backend, point) for point in crash_points() for backend in BACKENDS if is_passed(backend, point)]


def test_every_crash_point_is_tried() -> None:
    tried = {point for _, point in (*CASES, *CSI_CASES)}
    here = {point for point in crash_points() if point.partition(".")[0] not in (*OTHER_LIVES, *ELSEWHERE)}
    assert here - tried == {"journal.settled"}


@pytest.fixture
def volumed(tmp_path: Path, make_filesystem: MakeFilesystem, request: pytest.FixtureRequest) -> Iterator[Volumed]:
    """Images on XFS, which can share data between files: so live snapshots, and the freeze, are passed too."""
    backend = request.node.callspec.params.get("backend", "sized")
    more = ""
    if backend == "sized":
        more = f'[backends.shared]\ndriver = "image"\npath = "{make_filesystem("xfs", size=2 << 30)}"\n'
    if backend == "tree":
        more = f'[backends.tree]\ndriver = "btrfs"\npath = "{make_filesystem("btrfs")}/volumes"\n'
    folder = tmp_path / "volumed"
    folder.mkdir()
    made = Volumed(folder, backends=more)
    if backend == "attached":
        made = Volumed(folder, backends=f'[backends.attached]\ndriver = "attached"\npath = "{folder}/volumes"\n')
        made.env = installed(tmp_path / "drivers")
    try:
        yield made
    finally:
        made.clean_up()


class Life:
    """Everything that can happen to a volume, step by step; each step may be made again after a crash in it."""

    def __init__(self, volumed: Volumed, backend: str) -> None:
        self._volumed = volumed
        self._backend = {"sized": "shared"}.get(backend, backend)
        self._options = {"size": "64m"} if backend == "tree" else {"size": "300m", "fs": "xfs"}
        if backend in ("local", "attached"):
            self._options = {}
        self._mounts = 0
        self._copies = backend not in ("local", "attached")
        self._machines = backend == "attached"

    def steps(self) -> list[Callable[[], None]]:
        imported = [self._import, lambda: self._remove("adopted")]
        plain = [self._create, self._mount, lambda: self._write(b"then"), self._unmount]
        copies = [
            lambda: self._snapshot("cold"),
            self._mount,
            lambda: self._write(b"now"),
            lambda: self._snapshot("live"),
            lambda: self._expand("400m"),
            self._unmount,
            lambda: self._expand("500m"),
            lambda: self._clone("copy", "data", b"now"),
            lambda: self._clone("older", "data@cold", b"then"),
            lambda: self._restore("cold", b"then"),
            lambda: self._restore("live", b"now"),
            lambda: self._remove_snapshot("cold"),
            lambda: self._remove_snapshot("live"),
            lambda: self._remove("copy"),
            lambda: self._remove("older"),
        ]
        machines = [self._take_over, self._mount, self._unmount]
        return [
            *plain,
            *(copies if self._copies else []),
            *(machines if self._machines else imported),
            lambda: self._remove("data"),
        ]

    def _ok(self, endpoint: str, **fields: Any) -> None:
        answer = self._volumed.plugin(endpoint, **fields)
        assert answer.error == "", answer

    def _create(self) -> None:
        options = {"backend": self._backend, "uid": "1000", **self._options}
        self._ok("Create", Name="data", Opts=options)
        self._ok("Create", Name="data", Opts=options)

    def _mount(self) -> None:
        """By a new id each time, as dockerd does. What a crash left bound without anybody knowing goes when the engine
        is asked (tests/engines); here it is given back by hand."""
        for binding in self._volumed.bindings():
            self._ok("Unmount", Name="data", ID=binding["mount_id"])
        self._mounts += 1
        self._ok("Mount", Name="data", ID=f"id-{self._mounts}")

    def _unmount(self) -> None:
        for binding in self._volumed.bindings():
            self._ok("Unmount", Name="data", ID=binding["mount_id"])
        wait_until(lambda: self._volumed.mounted() == {})

    def _tree(self, name: str) -> Path:
        path = self._volumed.plugin("Path", Name=name).body["Mountpoint"]
        assert path
        return Path(path)

    def _write(self, data: bytes) -> None:
        with (self._tree("data") / "file").open("wb") as file:
            file.write(data)

    def _check(self, name: str, data: bytes) -> None:
        self._ok("Mount", Name=name, ID="look")
        try:
            assert (self._tree(name) / "file").read_bytes() == data
            assert self._tree(name).stat().st_uid == 1000
        finally:
            self._ok("Unmount", Name=name, ID="look")

    def _snapshot(self, name: str) -> None:
        known = [snapshot["name"] for snapshot in self._volumed.api.get("volumes", "data", "snapshots")]
        if name not in known:  # it was made, and only the answer got lost
            self._volumed.api.post("volumes", "data", "snapshots", body={"name": name})

    def _expand(self, size: str) -> None:
        self._volumed.api.post("volumes", "data", "expand", body={"size": size})

    def _clone(self, name: str, source: str, data: bytes) -> None:
        self._ok("Create", Name=name, Opts={"from": source, "uid": "1000"})
        self._check(name, data)

    def _restore(self, name: str, data: bytes) -> None:
        self._volumed.api.post("volumes", "data", "snapshots", name, "restore")
        self._check("data", data)

    def _remove_snapshot(self, name: str) -> None:
        try:
            self._volumed.api.delete("volumes", "data", "snapshots", name)
        except ApiError as error:
            if error.code != "not_found":
                raise

    def _import(self) -> None:
        """Something that somebody put into the backend's folder; unless it is a volume already."""
        volumed = self._volumed
        if all(volume["name"] != "adopted" for volume in volumed.api.get("volumes")["volumes"]):
            stranger = Path(volumed.api.get("backends", self._backend)["facts"]["path"]) / "stranger"
            if not stranger.exists():
                self._make_stranger(stranger)
            body = {"backend": self._backend, "reference": "stranger", "name": "adopted"}
            volumed.api.post("imports", body=body)
        self._ok("Mount", Name="adopted", ID="look")
        assert (self._tree("adopted") / "file").read_bytes() == b"old"
        self._ok("Unmount", Name="adopted", ID="look")

    def _make_stranger(self, path: Path) -> None:
        if self._backend == "shared":
            with path.open("wb") as file:
                file.truncate(64 << 20)
            source = self._volumed.folder / "source"
            source.mkdir(exist_ok=True)
            (source / "file").write_bytes(b"old")
            sh("mkfs.ext4", "-q", "-b", "4096", "-d", source, path)
            return
        if self._backend == "tree":
            sh("btrfs", "subvolume", "create", path)
        else:
            path.mkdir()
        (path / "file").write_bytes(b"old")

    def _take_over(self) -> None:
        """From a machine that somebody attached it to by hand."""
        volume_id = self._volumed.api.get("volumes", "data")["id"]
        folder = self._volumed.folder / "attached" / volume_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "machine-9").touch()
        told = self._volumed.api.post("volumes", "data", "takeover", body={})
        assert told["proof"] == "its storage has cut off machine machine-9"
        assert list(folder.iterdir()) == []

    def _remove(self, name: str) -> None:
        answer = self._volumed.plugin("Remove", Name=name)
        assert answer.error == "" or "no such volume" in answer.error, answer


@pytest.mark.parametrize(("backend", "point"), CASES)
def test_killed_at(volumed: Volumed, backend: str, point: str) -> None:
    assert live_through(volumed, Life(volumed, backend).steps(), point) == 1, f"{point} was not passed"
    volumed.assert_nothing_left()
    assert list(volumed.folder.glob("attached/*/*")) == []


@pytest.mark.parametrize("backend", ["sized"])
def test_killed_in_the_recovery_itself(volumed: Volumed, backend: str) -> None:
    volumed.start(env={"VOLUMED_CRASH_AT": "create.formatted"})
    with pytest.raises((OSError, http.client.HTTPException)):
        volumed.plugin("Create", Name="data", Opts={"size": "64m"})
    volumed.start(env={"VOLUMED_CRASH_AT": "journal.settled"}, wait=False)
    assert volumed.wait_end() == -9
    volumed.start()
    assert_agree(volumed)
    assert volumed.plugin("Create", Name="data", Opts={"size": "64m"}).error == ""
    assert volumed.plugin("Remove", Name="data").error == ""
    volumed.assert_nothing_left()
