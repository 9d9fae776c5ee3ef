"""What is shipped for orchestrators: valid by their schemas, and of one mind with the settings that it carries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import kubernetes_validate
import pytest
import yaml
from google.protobuf.json_format import ParseDict

from volumed.config import DEFAULT_TARGET_ROOTS, Settings, parse
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.requests import read_usage
from volumed.frontends.volume_options import read_create
from volumed_drivers.image import ImageVolumeOptions

DEPLOY = Path(__file__).parents[2] / "deploy"
DRIVER = "volumed.csi"
KUBERNETES = "1.35"


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}: {document['kind']}", document


def found(kind: str) -> Iterator[dict[str, Any]]:
    return (document for _, document in documents() if document["kind"] == kind)


@pytest.mark.parametrize("document", [pytest.param(document, id=name) for name, document in documents()])
def test_kubernetes_takes_it(document: dict[str, Any]) -> None:
    group = document["apiVersion"].partition("/")[0]
    if group in ("snapshot.storage.k8s.io", "kustomize.config.k8s.io"):
        assert set(document) <= {"apiVersion", "kind", "metadata", "driver", "deletionPolicy", "spec", "resources"}
        return
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def kubernetes_settings() -> Settings:
    (config,) = found("ConfigMap")
    return parse('node = "node-1"\n' + config["data"]["volumed.toml"], source="config.yaml")


def test_everything_is_applied() -> None:
    (kustomization,) = found("Kustomization")
    there = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert set(kustomization["resources"]) == there - {"kustomization.yaml", "example.yaml"}


def test_the_driver_has_one_name() -> None:
    assert kubernetes_settings().csi.driver_name == DRIVER
    (driver,) = found("CSIDriver")
    assert driver["metadata"]["name"] == DRIVER
    assert {one["provisioner"] for one in found("StorageClass")} == {DRIVER}
    assert {one["driver"] for one in found("VolumeSnapshotClass")} == {DRIVER}


def test_the_pods_folders_are_where_the_settings_say() -> None:
    settings = kubernetes_settings()
    (daemons,) = found("DaemonSet")
    pod = daemons["spec"]["template"]["spec"]
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in pod["volumes"]}
    volumed, *sidecars = pod["containers"]
    mounts = {mount["mountPath"]: mount for mount in volumed["volumeMounts"]}
    socket = settings.csi.socket
    host_socket = f"{paths[mounts[str(socket.parent)]['name']]}/{socket.name}"
    assert host_socket == settings.kubelet.endpoint == f"/var/lib/kubelet/plugins/{DRIVER}/csi.sock"
    assert paths[mounts[str(settings.kubelet.registry)]["name"]] == "/var/lib/kubelet/plugins_registry"
    for path in (*map(str, settings.csi.target_roots), str(settings.state_dir)):
        # What is mounted there must be seen by kubelet and by every pod, also by those of the next volumed.
        assert mounts[path]["mountPropagation"] == "Bidirectional"
        assert paths[mounts[path]["name"]] == path
    assert volumed["securityContext"]["privileged"]
    for sidecar in sidecars:
        assert f"--csi-address={socket}" in sidecar["args"]
        assert sidecar["volumeMounts"] == [{"name": "csi", "mountPath": str(socket.parent)}]
    assert settings.csi.node_deployment
    assert settings.kubelet.registration


def known_backends(settings: Settings) -> set[str]:
    return set(settings.backends)


def check_parameters(parameters: dict[str, Any], settings: Settings) -> None:
    own = {key: str(value) for key, value in parameters.items() if not key.startswith("csi.storage.k8s.io/")}
    read = read_create("x", own, driver_options=ImageVolumeOptions.model_fields)
    assert not read.backend or read.backend in settings.backends


def test_parameters_are_ours() -> None:
    settings = kubernetes_settings()
    for storage_class in found("StorageClass"):
        check_parameters(storage_class["parameters"], settings)
    (stateful,) = found("StatefulSet")
    inline = [volume["csi"] for volume in stateful["spec"]["template"]["spec"]["volumes"] if "csi" in volume]
    assert inline
    for volume in inline:
        assert volume["driver"] == DRIVER
        check_parameters(volume["volumeAttributes"], settings)


# Nomad
def hcl(name: str) -> Any:
    return _plain(hcl2.loads((DEPLOY / "nomad" / name).read_text()))


def _plain(value: Any) -> Any:
    """Blocks that come once as themselves, texts without their quotes."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items() if not str(key).startswith("__")}
    if isinstance(value, list):
        return _plain(value[0]) if len(value) == 1 and isinstance(value[0], dict) else [_plain(each) for each in value]
    return value.strip('"') if isinstance(value, str) else value


def test_nomads_plugin() -> None:
    task = hcl("plugin.nomad.hcl")["job"]["volumed"]["group"]["volumed"]["task"]["volumed"]
    text = re.sub(r'"\{\{ env .*? \}\}"', '"client-1"', (DEPLOY / "nomad" / "plugin.nomad.hcl").read_text())
    settings = parse(text.partition("<<EOF\n")[2].partition("\nEOF")[0], source="plugin.nomad.hcl")
    plugin = task["csi_plugin"]
    assert plugin["type"] == "monolith"
    assert plugin["mount_dir"] == str(settings.csi.socket.parent)
    assert settings.csi.socket.name == "csi.sock"  # Nomad looks for no other
    assert plugin["stage_publish_base_dir"] in map(str, settings.csi.target_roots)
    assert task["config"]["privileged"] is True
    assert task["config"]["args"] == ["--config", f"/{task['template']['destination']}"]
    assert any(mount["target"] == str(settings.state_dir) for mount in task["config"]["mount"])


def test_nomads_volume_and_job() -> None:
    volume, job = hcl("volume.nomad.hcl"), hcl("example.nomad.hcl")
    assert (
        volume["plugin_id"]
        == hcl("plugin.nomad.hcl")["job"]["volumed"]["group"]["volumed"]["task"]["volumed"]["csi_plugin"]["id"]
    )
    check_parameters(volume["parameters"], kubernetes_settings())
    used = job["job"]["db"]["group"]["db"]["volume"]["data"]
    assert used["source"] == volume["id"]
    assert used["access_mode"] == volume["capability"]["access_mode"]


# Mesos
def test_mesos() -> None:
    application = json.loads((DEPLOY / "mesos" / "marathon-app.json").read_text())
    (volume,) = application["container"]["volumes"]
    options = {key.removeprefix("dvdi/"): value for key, value in volume["external"]["options"].items()}
    assert options.pop("driver") == "volumed"
    check_parameters(options, kubernetes_settings())
    plugin = json.loads((DEPLOY / "mesos" / "csi-plugin.json").read_text())
    defaults = Settings()
    for endpoint in plugin["endpoints"]:
        assert endpoint["endpoint"] == f"unix://{defaults.csi.socket}"
    assert any(Path(plugin["target_path_root"]).is_relative_to(root) for root in DEFAULT_TARGET_ROOTS)


def test_mesos_profiles() -> None:
    """In the form that its profile adaptor reads: a capability of CSI, and parameters of ours."""
    plugin = json.loads((DEPLOY / "mesos" / "csi-plugin.json").read_text())
    profiles = json.loads((DEPLOY / "mesos" / "disk-profiles.json").read_text())["profile_matrix"]
    assert profiles
    for profile in profiles.values():
        assert profile["csi_plugin_type_selector"] == {"plugin_type": plugin["type"]}
        read_usage(ParseDict(profile["volume_capabilities"], csi.VolumeCapability()))
        check_parameters(profile["create_parameters"], kubernetes_settings())
