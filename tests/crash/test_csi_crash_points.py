"""volumed killed at every step of what an orchestrator asks of it; its retry succeeds, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeFilesystem
from tests.crash.killing import CSI_AREAS, crash_points, live_through
from tests.harness.csi import calling, capability
from tests.harness.volumed import Volumed

pytestmark = [pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
BACKENDS = ("folders", "trees", "images", "devices")
INLINE = f"csi-{'0' * 64}"


def is_passed(backend: str, point: str) -> bool:
    area = point.partition(".")[0]
    if area not in (*CSI_AREAS, "mount", "unmount"):
        return False
    if area == "group-snapshot":
        return backend != "folders"
    if area == "modify":
        return backend == "trees"
    return point != "mount.mapped" or backend in ("images", "devices")


CASES = [(backend, point) for point in crash_points() for backend in BACKENDS if is_passed(backend, point)]


@pytest.fixture
def volumed(tmp_path: Path, make_filesystem: MakeFilesystem, request: pytest.FixtureRequest) -> Iterator[Volumed]:
    backend = request.node.callspec.params["backend"]
    tables = {
        "folders": lambda: f'driver = "directory"\npath = "{tmp_path}/folders"\nadvisory-size = true\n',
        "trees": lambda: f'driver = "btrfs"\npath = "{make_filesystem("btrfs")}/volumes"\n',
        "images": lambda: f'driver = "image"\npath = "{make_filesystem("xfs", size=2 << 30)}"\n',
        "devices": lambda: f'driver = "image"\npath = "{make_filesystem("xfs", size=2 << 30)}"\n',
    }
    folder = tmp_path / "volumed"
    folder.mkdir()
    made = Volumed(
        folder, only=True, backends=f"[backends.one]\n{tables[backend]()}", default_backends=("one",), csi=""
    )
    made.targets.mkdir()
    try:
        yield made
    finally:
        made.clean_up()


class Orchestrator:
    """Everything that one does with two volumes, and with one inside a pod's life; each step may be made again."""

    def __init__(self, volumed: Volumed, backend: str) -> None:
        self._volumed = volumed
        self._block = backend == "devices"
        self._size = {"images": 300 * MIB}.get(backend, 64 * MIB)
        self._capability = capability(block=True) if self._block else capability(fs_type="xfs" * (backend == "images"))
        self._ids: dict[str, str] = {}
        self._group = ""
        self._snapping, self._modifying = backend != "folders", backend == "trees"

    def steps(self) -> list[Callable[[], None]]:
        return [
            lambda: self._create("one"),
            lambda: self._create("two"),
            lambda: self._stage("one"),
            lambda: self._publish("one"),
            lambda: self._write("one"),
            *([self._take_group] if self._snapping else []),
            *([self._modify] if self._modifying else []),
            lambda: self._check("one"),
            lambda: self._unpublish("one"),
            lambda: self._unstage("one"),
            *([self._drop_group] if self._snapping else []),
            lambda: self._delete("one"),
            lambda: self._delete("two"),
            self._publish_inline,
            self._unpublish_inline,
        ]

    def _ask(self, call: str, /, **fields: Any) -> Any:
        with calling(self._volumed.csi_socket) as caller:
            return getattr(caller, call)(**fields)

    def _create(self, name: str) -> None:
        made = self._ask(
            "CreateVolume",
            name=name,
            volume_capabilities=[self._capability],
            capacity_range={"required_bytes": self._size},
        )
        self._ids[name] = made.volume.volume_id

    def _staging(self, name: str) -> str:
        return f"{self._volumed.targets}/staging-{name}"

    def _target(self, name: str) -> Path:
        return self._volumed.targets / f"target-{name}"

    def _stage(self, name: str) -> None:
        Path(self._staging(name)).mkdir(exist_ok=True)
        self._ask(
            "NodeStageVolume",
            volume_id=self._ids[name],
            staging_target_path=self._staging(name),
            volume_capability=self._capability,
        )

    def _publish(self, name: str) -> None:
        self._ask(
            "NodePublishVolume",
            volume_id=self._ids[name],
            staging_target_path=self._staging(name),
            target_path=str(self._target(name)),
            volume_capability=self._capability,
        )

    def _file(self, name: str) -> Path:
        return self._target(name) if self._block else self._target(name) / "file"

    def _write(self, name: str) -> None:
        with self._file(name).open("r+b" if self._block else "wb") as file:
            file.write(b"kept")

    def _check(self, name: str) -> None:
        with self._file(name).open("rb") as file:
            assert file.read(4) == b"kept"

    def _take_group(self) -> None:
        taken = self._ask("CreateVolumeGroupSnapshot", name="all", source_volume_ids=list(self._ids.values()))
        self._group = taken.group_snapshot.group_snapshot_id
        assert len(taken.group_snapshot.snapshots) == 2
        assert len(self._ask("ListSnapshots").entries) == 2

    def _drop_group(self) -> None:
        self._ask("DeleteVolumeGroupSnapshot", group_snapshot_id=self._group)
        assert not self._ask("ListSnapshots").entries

    def _modify(self) -> None:
        self._ask("ControllerModifyVolume", volume_id=self._ids["one"], mutable_parameters={"compression": "zstd"})

    def _unpublish(self, name: str) -> None:
        self._ask("NodeUnpublishVolume", volume_id=self._ids[name], target_path=str(self._target(name)))
        assert not self._target(name).exists()

    def _unstage(self, name: str) -> None:
        self._ask("NodeUnstageVolume", volume_id=self._ids[name], staging_target_path=self._staging(name))
        Path(self._staging(name)).rmdir()

    def _delete(self, name: str) -> None:
        self._ask("DeleteVolume", volume_id=self._ids[name])

    def _publish_inline(self) -> None:
        self._ask(
            "NodePublishVolume",
            volume_id=INLINE,
            target_path=str(self._target("inline")),
            volume_capability=self._capability,
            volume_context={"csi.storage.k8s.io/ephemeral": "true", "size": str(self._size)},
        )

    def _unpublish_inline(self) -> None:
        self._ask("NodeUnpublishVolume", volume_id=INLINE, target_path=str(self._target("inline")))
        assert not self._target("inline").exists()


@pytest.mark.parametrize(("backend", "point"), CASES)
def test_killed_at(volumed: Volumed, backend: str, point: str) -> None:
    assert live_through(volumed, Orchestrator(volumed, backend).steps(), point) == 1, f"{point} was not passed"
    volumed.assert_nothing_left()
    assert list(volumed.targets.iterdir()) == []
