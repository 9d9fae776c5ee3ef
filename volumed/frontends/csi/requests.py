"""What an orchestrator sends, checked and turned into the core's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from volumed.core.core import Core
from volumed.core.names import name_for_claim
from volumed.core.planning import CreateVolume
from volumed.core.publications import Usage
from volumed.errors import InvalidRequest, NotFound, OutOfRange
from volumed.frontends.csi.capabilities import ACCESS_MODES
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.volume_options import read_create
from volumed.model import PVC, Claim, Volume, VolumeMode
from volumed.units import MAX_SIZE, parse_size

MAX_ID = 128  # bytes of an id or name (CSI specification, "Size Limits")
MAX_MAP = 4096  # bytes of a map
# What Kubernetes' sidecars and kubelet add of their own, in parameters and contexts.
KUBERNETES = "csi.storage.k8s.io/"
PV = "kubernetes.pv"  # a label of ours, as PVC is
_LARGEST_GROUP = 2**32 - 2


class Range(NamedTuple):
    """Bytes; 0: not said."""

    required: int
    limit: int


def required(text: str, what: str) -> str:
    """Raises InvalidRequest when it is missing, or longer than the specification allows."""
    if not text:
        raise InvalidRequest(f"no {what} is given")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_ID:
        raise InvalidRequest(f"the {what} has more than {MAX_ID} bytes")
    return text


def find_volume(core: Core, volume_id: str) -> Volume:
    """By its id, or, for one that lives inside a pod's life, by the id that kubelet made up. Raises NotFound."""
    required(volume_id, "volume id")
    volume = core.repository.volume(volume_id) or core.repository.volume_by_name(volume_id)
    if (
        volume is not None
        and not volume.hidden
        and (volume.id == volume_id or (volume.ephemeral and volume.name == volume_id))
    ):
        return volume
    raise NotFound("there is no such volume", subject=f"volume {volume_id}")


def read_range(given: csi.CapacityRange) -> Range:
    """Raises InvalidRequest, OutOfRange."""
    found = Range(given.required_bytes, given.limit_bytes)
    if found.required < 0 or found.limit < 0:
        raise OutOfRange("a size cannot be negative")
    if 0 < found.limit < found.required:
        raise InvalidRequest(f"the limit of {found.limit} bytes is below the {found.required} that are required")
    if found.required > MAX_SIZE:
        raise OutOfRange(f"{found.required} bytes are more than any backend holds")
    return found


def read_usage(capability: csi.VolumeCapability, *, readonly: bool = False) -> Usage:
    """Raises InvalidRequest for what is missing or makes no sense."""
    kind = capability.WhichOneof("access_type")
    if kind is None:
        raise InvalidRequest("the volume capability says neither block nor mount")
    access = ACCESS_MODES.get(capability.access_mode.mode)
    if access is None:
        raise InvalidRequest(f"the access mode {capability.access_mode.mode} is unknown")
    mount = capability.mount
    return Usage(
        access=access,
        block=kind == "block",
        readonly=readonly or access.reader_only or "ro" in mount.mount_flags,
        filesystem=mount.fs_type,
        mount_options=tuple(word for flag in mount.mount_flags for word in flag.split(",") if word not in ("", "ro")),
        group=_group(mount.volume_mount_group),
    )


def _group(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > _LARGEST_GROUP:
        raise InvalidRequest(f"{text[:40]!r} is no group", hint="give its number")
    return int(text)


def read_usages(capabilities: Iterable[csi.VolumeCapability]) -> list[Usage]:
    """All that a volume must allow. Raises InvalidRequest for none, and for a device and a tree at once."""
    found = [read_usage(capability) for capability in capabilities]
    if not found:
        raise InvalidRequest("no volume capabilities are given")
    if len({usage.block for usage in found}) > 1:
        raise InvalidRequest("a volume cannot be a device and a tree")
    if len({usage.filesystem for usage in found if usage.filesystem}) > 1:
        raise InvalidRequest("a volume cannot hold two file systems")
    return found


def _own_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
    """Without what Kubernetes adds. Raises InvalidRequest for what a class of volumes cannot say."""
    own = {key: value for key, value in parameters.items() if not key.startswith(KUBERNETES)}
    for key, instead in (("size", "capacity_range"), ("from", "volume_content_source")):
        if key in own:
            raise InvalidRequest(f"parameter {key!r} cannot be given here", hint=f"it is the request's {instead}")
    if sum(len(key) + len(value) for key, value in own.items()) > MAX_MAP:
        raise InvalidRequest(f"the parameters have more than {MAX_MAP} bytes")
    return own


def read_creation(core: Core, request: csi.CreateVolumeRequest) -> CreateVolume:
    """Raises InvalidRequest, OutOfRange."""
    name = name_for_claim(request.name)
    usages = read_usages(request.volume_capabilities)
    wanted = read_range(request.capacity_range)
    parameters = _own_parameters(request.parameters)
    mutable = _own_parameters(request.mutable_parameters)
    filesystem = next((usage.filesystem for usage in usages if usage.filesystem), "")
    flags = tuple(dict.fromkeys(option for usage in usages for option in usage.mount_options))
    read = read_create(name, parameters | mutable, driver_options=core.volumes.known_options())
    claim = Claim(
        name=request.name,
        parameters=parameters,
        required=wanted.required,
        limit=wanted.limit,
        filesystem=filesystem,
        source=_source(request),
    )
    return _with(
        read,
        claim=claim,
        size=wanted.required or None,
        mode=VolumeMode.BLOCK if usages[0].block else VolumeMode.FILESYSTEM,
        filesystem=filesystem or read.filesystem,
        mount_options=tuple(dict.fromkeys((*read.mount_options, *flags))),
        multi_node=not all(usage.access.single_node for usage in usages),
        places=tuple(dict(place.segments) for place in request.accessibility_requirements.requisite),
        labels=read.labels | _kubernetes_labels(request.parameters),
    )


def _with(request: CreateVolume, **fields: object) -> CreateVolume:
    return msgspec.structs.replace(request, **fields)


def _source(request: csi.CreateVolumeRequest) -> str:
    kind = request.volume_content_source.WhichOneof("type")
    if kind == "snapshot":
        return f"snapshot:{required(request.volume_content_source.snapshot.snapshot_id, 'source snapshot id')}"
    if kind == "volume":
        return f"volume:{required(request.volume_content_source.volume.volume_id, 'source volume id')}"
    if request.HasField("volume_content_source"):
        raise InvalidRequest("the content source is neither a snapshot nor a volume")
    return ""


def _kubernetes_labels(parameters: Mapping[str, str]) -> dict[str, str]:
    """Which claim it is for, when the provisioner tells (--extra-create-metadata)."""
    labels = {}
    claim = parameters.get(f"{KUBERNETES}pvc/name")
    if claim:
        labels[PVC] = f"{parameters.get(f'{KUBERNETES}pvc/namespace', 'default')}/{claim}"
    if volume := parameters.get(f"{KUBERNETES}pv/name"):
        labels[PV] = volume
    return labels


def read_ephemeral(core: Core, volume_id: str, context: Mapping[str, str], usage: Usage) -> CreateVolume:
    """A pod's inline volume: its attributes are those of `docker volume create -o`. Raises InvalidRequest."""
    own = {key: value for key, value in context.items() if not key.startswith(KUBERNETES)}
    size = parse_size(own.pop("size")) if "size" in own else None
    if "from" in own:
        raise InvalidRequest("parameter 'from' cannot be given for an inline volume")
    name = name_for_claim(volume_id)
    read = read_create(name, own, driver_options=core.volumes.known_options())
    return _with(
        read,
        claim=Claim(name=volume_id, parameters=own, required=size or 0, filesystem=usage.filesystem),
        size=size,
        mode=VolumeMode.BLOCK if usage.block else VolumeMode.FILESYSTEM,
        filesystem=usage.filesystem or read.filesystem,
        ephemeral=True,
    )


class Modification(NamedTuple):
    labels: dict[str, str]
    mount_options: tuple[str, ...] | None  # None: stay
    options: dict[str, str]


def read_modification(core: Core, parameters: Mapping[str, str]) -> Modification:
    """Raises InvalidRequest for what only a new volume can be given."""
    own = _own_parameters(parameters)
    read = read_create("x", own, driver_options=core.volumes.known_options())
    fixed = own.keys() - {f"label.{key}" for key in read.labels} - read.options.keys() - {"mount-options"}
    if fixed:
        raise InvalidRequest(
            f"parameter {min(fixed)!r} cannot be changed", hint="labels, mount-options and some of a driver's own can"
        )
    return Modification(read.labels, read.mount_options if "mount-options" in own else None, read.options)
