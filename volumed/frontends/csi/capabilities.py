"""What the plugin can do: computed from the configured backends and the role, never written down twice."""

from __future__ import annotations

from volumed.core.core import Core
from volumed.driver import Capability
from volumed.errors import NotSupported
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.model import AccessMode

_MODE = csi.VolumeCapability.AccessMode
ACCESS_MODES = {
    _MODE.SINGLE_NODE_WRITER: AccessMode.SINGLE_NODE_WRITER,
    _MODE.SINGLE_NODE_READER_ONLY: AccessMode.SINGLE_NODE_READER_ONLY,
    _MODE.MULTI_NODE_READER_ONLY: AccessMode.MULTI_NODE_READER_ONLY,
    _MODE.MULTI_NODE_SINGLE_WRITER: AccessMode.MULTI_NODE_SINGLE_WRITER,
    _MODE.MULTI_NODE_MULTI_WRITER: AccessMode.MULTI_NODE_MULTI_WRITER,
    _MODE.SINGLE_NODE_SINGLE_WRITER: AccessMode.SINGLE_NODE_SINGLE_WRITER,
    _MODE.SINGLE_NODE_MULTI_WRITER: AccessMode.SINGLE_NODE_MULTI_WRITER,
}

_CONTROLLER = csi.ControllerServiceCapability.RPC
_NODE = csi.NodeServiceCapability.RPC
_PLUGIN = csi.PluginCapability.Service
_GROUP = csi.GroupControllerServiceCapability.RPC

# None: whatever the backends are.
CONTROLLER: tuple[tuple[csi.ControllerServiceCapability.RPC.Type, Capability | None], ...] = (
    (_CONTROLLER.CREATE_DELETE_VOLUME, None),
    (_CONTROLLER.PUBLISH_UNPUBLISH_VOLUME, None),
    (_CONTROLLER.LIST_VOLUMES, None),
    (_CONTROLLER.GET_CAPACITY, Capability.CAPACITY),
    (_CONTROLLER.CREATE_DELETE_SNAPSHOT, Capability.SNAPSHOT),
    (_CONTROLLER.LIST_SNAPSHOTS, Capability.SNAPSHOT),
    (_CONTROLLER.GET_SNAPSHOT, Capability.SNAPSHOT),
    (_CONTROLLER.CLONE_VOLUME, Capability.CLONE),
    (_CONTROLLER.PUBLISH_READONLY, None),
    (_CONTROLLER.EXPAND_VOLUME, Capability.EXPAND),
    (_CONTROLLER.LIST_VOLUMES_PUBLISHED_NODES, None),
    (_CONTROLLER.VOLUME_CONDITION, None),
    (_CONTROLLER.GET_VOLUME, None),
    (_CONTROLLER.SINGLE_NODE_MULTI_WRITER, None),
    (_CONTROLLER.MODIFY_VOLUME, None),  # labels and mount options of any volume
    (_CONTROLLER.GET_VOLUME_HEALTH, None),
    (_CONTROLLER.LIST_VOLUME_HEALTH, None),
)
NODE: tuple[tuple[csi.NodeServiceCapability.RPC.Type, Capability | None], ...] = (
    (_NODE.STAGE_UNSTAGE_VOLUME, None),
    (_NODE.GET_VOLUME_STATS, None),
    (_NODE.EXPAND_VOLUME, Capability.EXPAND),
    (_NODE.VOLUME_CONDITION, None),
    (_NODE.SINGLE_NODE_MULTI_WRITER, None),
    (_NODE.VOLUME_MOUNT_GROUP, None),
    (_NODE.GET_VOLUME_HEALTH, None),
    (_NODE.GET_STORAGE_HEALTH, None),
)


def available(core: Core) -> frozenset[Capability]:
    """What at least one backend can do."""
    return frozenset(capability for backend in core.backends.all() for capability in backend.capabilities)


def require(core: Core, capability: Capability) -> None:
    """Raises NotSupported when no backend can do it: then the call is one that this plugin does not have."""
    if capability not in available(core):
        raise NotSupported(f"no configured backend has the capability {capability}")


def plugin(core: Core) -> list[csi.PluginCapability]:
    there = available(core)
    controller = core.settings.csi.role != "node"
    services = [_PLUGIN.VOLUME_ACCESSIBILITY_CONSTRAINTS]
    if controller:
        services.append(_PLUGIN.CONTROLLER_SERVICE)
    if controller and Capability.GROUP_SNAPSHOT in there:
        services.append(_PLUGIN.GROUP_CONTROLLER_SERVICE)
    if controller and Capability.CHANGED_BLOCKS in there:
        services.append(_PLUGIN.SNAPSHOT_METADATA_SERVICE)
    if controller and Capability.SNAPSHOT in there:
        services.append(_PLUGIN.SNAPSHOT_ACCESSIBILITY_CONSTRAINTS)
    found = [csi.PluginCapability(service=_PLUGIN(type=service)) for service in services]
    if Capability.EXPAND in there:
        online = csi.PluginCapability.VolumeExpansion(type=csi.PluginCapability.VolumeExpansion.ONLINE)
        found.append(csi.PluginCapability(volume_expansion=online))
    return found


def controller(core: Core) -> list[csi.ControllerServiceCapability]:
    there = available(core)
    # With a controller beside each node, who grows and changes volumes (Kubernetes' resizer) runs once and asks but one
    # of them. Growing can be left to the volume's own node; changing cannot.
    wandering = {_CONTROLLER.EXPAND_VOLUME, _CONTROLLER.MODIFY_VOLUME}
    elsewhere = wandering if core.settings.csi.node_deployment else set()
    return [
        csi.ControllerServiceCapability(rpc=_CONTROLLER(type=kind))
        for kind, needed in CONTROLLER
        if (needed is None or needed in there) and kind not in elsewhere
    ]


def node(core: Core) -> list[csi.NodeServiceCapability]:
    there = available(core)
    return [
        csi.NodeServiceCapability(rpc=_NODE(type=kind)) for kind, needed in NODE if needed is None or needed in there
    ]


def group(core: Core) -> list[csi.GroupControllerServiceCapability]:
    if Capability.GROUP_SNAPSHOT not in available(core):
        return []
    return [csi.GroupControllerServiceCapability(rpc=_GROUP(type=_GROUP.CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT))]
