"""An orchestrator's attachments, on storage that wants to be told which machine uses a volume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.harness.attached import installed
from tests.harness.csi import calling, capability
from tests.harness.volumed import Volumed

pytestmark = pytest.mark.root


@pytest.fixture
def volumed(tmp_path: Path) -> Iterator[Volumed]:
    folder = tmp_path / "volumed"
    folder.mkdir()
    table = f'[backends.cloud]\ndriver = "attached"\npath = "{folder}/volumes"\n'
    made = Volumed(folder, only=True, backends=table, default_backends=("cloud",), csi="")
    made.env = installed(tmp_path / "drivers")
    made.targets.mkdir()
    try:
        made.start()
        yield made
    finally:
        made.clean_up()


def ask(volumed: Volumed, call: str, /, **fields: Any) -> Any:
    with calling(volumed.csi_socket) as caller:
        return getattr(caller, call)(**fields)


def attached(volumed: Volumed) -> list[str]:
    return [path.name for path in volumed.folder.glob("attached/*/*")]


def test_published_by_the_controller_before_the_node(volumed: Volumed) -> None:
    made = ask(volumed, "CreateVolume", name="data", volume_capabilities=[capability()])
    volume_id = made.volume.volume_id
    assert [dict(place.segments) for place in made.volume.accessible_topology] == [{"zone": "a"}]
    assert dict(ask(volumed, "NodeGetInfo").accessible_topology.segments)["zone"] == "a"
    ask(volumed, "ControllerPublishVolume", volume_id=volume_id, node_id="node-1", volume_capability=capability())
    assert attached(volumed) == ["machine-1"]
    volumed.kill()
    volumed.start()
    staging = volumed.targets / "staging"
    staging.mkdir()
    where = {"volume_id": volume_id, "staging_target_path": str(staging)}
    ask(volumed, "NodeStageVolume", **where, volume_capability=capability())
    assert len(volumed.mounted()) == 1
    ask(volumed, "NodeUnstageVolume", **where)
    assert attached(volumed) == ["machine-1"]
    with pytest.raises(grpc.RpcError) as refused:
        ask(volumed, "DeleteVolume", volume_id=volume_id)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    ask(volumed, "ControllerUnpublishVolume", volume_id=volume_id, node_id="node-1")
    assert attached(volumed) == []
    ask(volumed, "DeleteVolume", volume_id=volume_id)
    staging.rmdir()
    volumed.assert_nothing_left()


def test_a_container_and_an_orchestrator_share_one_attachment(volumed: Volumed) -> None:
    made = ask(volumed, "CreateVolume", name="data", volume_capabilities=[capability()])
    volume_id = made.volume.volume_id
    assert volumed.plugin("Mount", Name="data", ID="id-1").error == ""
    ask(volumed, "ControllerPublishVolume", volume_id=volume_id, node_id="node-1", volume_capability=capability())
    ask(volumed, "ControllerUnpublishVolume", volume_id=volume_id, node_id="node-1")
    assert attached(volumed) == ["machine-1"]
    assert volumed.plugin("Unmount", Name="data", ID="id-1").error == ""
    assert attached(volumed) == []
