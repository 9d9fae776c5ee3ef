"""What each endpoint of the admin API does: one call of core, and its answer as a view."""

from __future__ import annotations

import platform
import queue
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from volumed import __version__
from volumed.core.backends import Backend
from volumed.core.classes import PlacementClass
from volumed.core.core import Core
from volumed.core.doctor import Finding
from volumed.core.drivers import DriverInfo
from volumed.core.placement import Needs, check
from volumed.driver import Driver, Options
from volumed.errors import DriverLoadError, InvalidRequest, NotFound, VolumedError
from volumed.frontends.admin.schemas import (
    BackendDetail,
    BackendView,
    BindingView,
    CapacityView,
    ClassMemberView,
    ClassView,
    ConsumerView,
    CreateBody,
    DoctorBody,
    DriverDetail,
    DriverView,
    ExpandBody,
    FindingView,
    HistoricBindingView,
    ImportBody,
    OptionView,
    RebuildBody,
    RebuildLineView,
    RemovalView,
    SnapshotBody,
    SnapshotView,
    TakeoverBody,
    TakeoverView,
    UsageView,
    VersionView,
    VolumeDetail,
    VolumePage,
    VolumeView,
)
from volumed.model import PVC, Binding, Volume, VolumeMode

MAX_PAGE = 10_000
_encode = msgspec.json.Encoder().encode


def routers(core: Core) -> list[APIRouter]:
    parts = (_volumes, _snapshots, _bindings, _backends, _classes, _imports, _health)
    return [part(core) for part in parts]


def _volumes(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1/volumes", tags=["volumes"])

    @router.get("")
    def list_volumes(
        after: Annotated[str, Query(max_length=300)] = "", limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 1000
    ) -> VolumePage:
        """In the order of their ids."""
        found = core.volumes.list(after=after, limit=limit)
        views = [VolumeView.model_validate(volume) for volume in found]
        return VolumePage(volumes=views, next=found[-1].id if len(found) == limit else None)

    @router.post("", status_code=201)
    def create(body: CreateBody) -> VolumeView:
        """The one that is there when it is what was asked for."""
        return VolumeView.model_validate(core.volumes.create(body.request()))

    @router.get("/{reference}")
    def inspect(reference: str) -> VolumeDetail:
        """By name or id; everything the ledger and the node know, no storage is asked."""
        return _detail(core, core.volumes.get(reference))

    @router.delete("/{reference}")
    def remove(reference: str, dry_run: bool = False) -> RemovalView:
        """With its data. `dry_run`: say what would go, or why it cannot."""
        return RemovalView.model_validate(core.volumes.remove(reference, dry_run=dry_run))

    @router.post("/{reference}/expand")
    def expand(reference: str, body: ExpandBody) -> VolumeView:
        return VolumeView.model_validate(core.volumes.expand(reference, body.size))

    @router.post("/{reference}/takeover")
    def take_over(reference: str, body: TakeoverBody) -> TakeoverView:
        """Take the volume from a node that is gone; refused while that node may still write to it."""
        return TakeoverView.model_validate(
            core.takeovers.run(reference, node=body.node, operator_word=body.operator_word, dry_run=body.dry_run)
        )

    @router.post("/{reference}/rotate-key")
    def rotate_key(reference: str) -> VolumeView:
        """The newest key of its name alone opens the volume from now on."""
        return VolumeView.model_validate(core.volumes.rotate(reference))

    @router.get("/{reference}/usage")
    def usage(reference: str) -> UsageView:
        """Looked up now; may walk the tree."""
        return UsageView.model_validate(core.usage.refresh(core.volumes.get(reference)))

    @router.get("/{reference}/bindings")
    def who(reference: str) -> list[BindingView]:
        return [_binding(core, binding) for binding in core.bindings.of_volume(core.volumes.get(reference).id)]

    @router.get("/{reference}/history")
    def history(reference: str, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[HistoricBindingView]:
        """Bindings that ended, the latest first."""
        volume = core.volumes.get(reference)
        return [
            HistoricBindingView(volume=volume.name, **_fields(ended, "volume_name"))
            for ended in core.bindings.history(volume.id, limit=limit)
        ]

    return router


def _imports(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["imports"])

    @router.get("/backends/{name}/importable")
    def importable(name: str) -> list[str]:
        """References of what the backend could make a volume of."""
        return core.imports.importable(name)

    @router.post("/imports", status_code=201)
    def adopt(body: ImportBody) -> VolumeView:
        """Make what is on storage already a volume, with its data as it is."""
        return VolumeView.model_validate(
            core.imports.adopt(body.backend, body.reference, name=body.name, block=body.block, labels=body.labels)
        )

    @router.post("/rebuild")
    def rebuild(body: RebuildBody) -> list[RebuildLineView]:
        """Put volumes of ours into a ledger that lost them, by the marks on their storage."""
        return [RebuildLineView.model_validate(line) for line in core.imports.rebuild(dry_run=body.dry_run)]

    return router


def _detail(core: Core, volume: Volume) -> VolumeDetail:
    path, usage = core.mounts.path(volume.id), core.usage.latest(volume.id)
    return VolumeDetail(
        **VolumeView.model_validate(volume).model_dump(),
        path=str(path) if path else None,
        usage=UsageView.model_validate(usage) if usage else None,
        snapshots=[SnapshotView.model_validate(snapshot) for snapshot in core.repository.snapshots(volume.id)],
        bindings=[_binding(core, binding) for binding in core.bindings.of_volume(volume.id)],
    )


def _fields(record: msgspec.Struct, *without: str) -> dict[str, Any]:
    fields = msgspec.structs.asdict(record)
    fields["consumers"] = [ConsumerView.model_validate(consumer) for consumer in fields["consumers"]]
    return {key: value for key, value in fields.items() if key not in (*without, "revision")}


def _binding(core: Core, binding: Binding) -> BindingView:
    volume = core.repository.volume(binding.volume_id)
    return BindingView(
        volume=volume.name if volume else "",
        claim=volume.labels.get(PVC, "") if volume else "",
        **_fields(binding, "block", "mount_options", "group"),
    )


def _snapshots(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1/volumes/{reference}/snapshots", tags=["snapshots"])

    @router.get("")
    def list_snapshots(reference: str) -> list[SnapshotView]:
        return [SnapshotView.model_validate(snapshot) for snapshot in core.snapshots.list(reference)]

    @router.post("", status_code=201)
    def create(reference: str, body: SnapshotBody) -> SnapshotView:
        return SnapshotView.model_validate(core.snapshots.create(reference, body.name))

    @router.delete("/{name}", status_code=204)
    def remove(reference: str, name: str) -> None:
        core.snapshots.remove(reference, name)

    @router.post("/{name}/restore")
    def restore(reference: str, name: str, dry_run: bool = False) -> VolumeView:
        """Put the volume back; what was written since is lost."""
        return VolumeView.model_validate(core.snapshots.restore(reference, name, dry_run=dry_run))

    return router


def _bindings(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["bindings"])

    @router.get("/bindings")
    def all_bindings() -> list[BindingView]:
        return [_binding(core, binding) for binding in core.bindings.all()]

    @router.get("/consumers/{reference:path}")
    def what(reference: str) -> list[BindingView]:
        """What a container uses: by its name, its id or the beginning of it."""
        found = core.bindings.of_consumer(reference)
        if not found:
            raise NotFound("uses no volume, as far as is known", subject=f"container {reference[:100]}")
        return [_binding(core, binding) for binding in found]

    return router


def _backends(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["backends"])

    @router.get("/backends")
    def list_backends() -> list[BackendView]:
        counts = Counter(volume.backend for volume in core.repository.volumes())
        return [BackendView(**_backend(core, backend, counts)) for backend in core.backends.all()]

    @router.get("/backends/{name}")
    def inspect(name: str) -> BackendDetail:
        """As the last probe saw it: no storage is asked."""
        backend = core.backends.get(name)
        counts = Counter(volume.backend for volume in core.repository.volumes())
        return BackendDetail(
            **_backend(core, backend, counts),
            lacking={str(capability): reason for capability, reason in backend.lacking.items()},
            disabled=sorted(backend.disabled),
            facts=backend.facts,
            topology=dict(backend.topology),
        )

    @router.get("/drivers")
    def list_drivers() -> list[DriverView]:
        return [DriverView(**_driver(info)[0]) for info in core.drivers.all()]

    @router.get("/drivers/{name}")
    def show(name: str) -> DriverDetail:
        """Its options and abilities, read from its class."""
        try:
            info = core.drivers.get(name)
        except DriverLoadError as error:
            raise NotFound(error.text, hint=error.hint) from None
        view, cls = _driver(info)
        if cls is None:
            raise DriverLoadError(view["error"])
        return DriverDetail(
            **view,
            capabilities=sorted(cls.all_capabilities()),
            backend_options=_options(cls.BackendOptions),
            volume_options=_options(cls.VolumeOptions),
        )

    return router


def _classes(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1/classes", tags=["classes"])

    @router.get("")
    def list_classes() -> list[ClassView]:
        return [_class(core, each) for each in core.classes.all()]

    @router.get("/{name}")
    def show(name: str) -> ClassView:
        """With what speaks against each of its backends now."""
        try:
            return _class(core, core.classes.get(name))
        except InvalidRequest as error:
            raise NotFound(error.text, hint=error.hint) from None

    return router


def _class(core: Core, found: PlacementClass) -> ClassView:
    members = [core.backends.get(name) for name in found.backends]
    return ClassView(
        name=found.name,
        backends=[_member(core, found, backend) for backend in members],
        requires=sorted(found.requires),
        topology=found.topology,
        size=found.size,
        filesystem=found.filesystem,
        mkfs_options=list(found.mkfs_options),
        mount_options=list(found.mount_options),
        encryption=found.encryption,
        options=found.options,
        volumes=sum(volume.class_name == found.name for volume in core.repository.volumes()),
    )


def _member(core: Core, found: PlacementClass, backend: Backend) -> ClassMemberView:
    needs = Needs(mode=VolumeMode.FILESYSTEM, size=found.size, capabilities=found.requires, region=found.topology)
    refusal = ""
    try:
        check(backend, needs, here=core.attachments.topology)
    except VolumedError as error:
        refusal = error.text
    return ClassMemberView(
        name=backend.name,
        driver=backend.driver_name,
        refusal=refusal,
        capacity=CapacityView.model_validate(backend.measured) if backend.measured else None,
    )


def _backend(core: Core, backend: Backend, counts: Counter[str]) -> dict[str, Any]:
    return {
        "name": backend.name,
        "driver": backend.driver_name,
        "default": backend.name in core.backends.default,
        "ok": backend.health.ok,
        "error": backend.health.error,
        "since": backend.health.since,
        "checked": backend.health.checked,
        "capacity": CapacityView.model_validate(backend.measured) if backend.measured else None,
        "capabilities": sorted(backend.capabilities),
        "volumes": counts[backend.name],
    }


def _driver(info: DriverInfo) -> tuple[dict[str, Any], type[Driver] | None]:
    """A driver that cannot be loaded is shown with the reason, not left out."""
    view = {"name": info.name, "distribution": info.distribution, "description": "", "error": ""}
    try:
        cls = info.cls
    except DriverLoadError as error:
        return view | {"error": str(error)}, None
    return view | {"description": cls.describe()}, cls


def _options(model: type[Options]) -> list[OptionView]:
    properties = model.model_json_schema(by_alias=True).get("properties", {})
    return [
        OptionView(
            key=(key := field.alias or name),
            type=_type(properties[key]),
            default=None if field.is_required() or field.default is None else str(field.default).lower(),
            required=field.is_required(),
            description=field.description or "",
        )
        for name, field in model.model_fields.items()
    ]


def _type(schema: dict[str, Any]) -> str:
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
    return " or ".join(str(choice.get("format") or choice.get("type", "text")) for choice in choices)


def _health(core: Core) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["health"])

    @router.get("/version")
    def version() -> VersionView:
        return VersionView(
            version=__version__, node=core.node, python=platform.python_version(), kernel=platform.release()
        )

    @router.get("/doctor")
    def examine() -> list[FindingView]:
        """Ledger, machine and storage compared; changes nothing."""
        return _found(core.doctor.examine())

    @router.post("/doctor")
    def fix(body: DoctorBody) -> list[FindingView]:
        """Do what the findings say; data is deleted only where `destroy` names the finding."""
        return _found(core.doctor.fix(body.fix, destroy=body.destroy))

    def _found(findings: list[Finding]) -> list[FindingView]:
        core.metrics.findings(Counter(finding.kind for finding in findings if not finding.fixed))
        return [FindingView.model_validate(finding) for finding in findings]

    @router.get("/events", response_class=StreamingResponse)
    def events(follow: bool = False, limit: Annotated[int, Query(ge=0, le=1000)] = 1000) -> StreamingResponse:
        """The latest events, oldest first, one JSON object a line; with `follow` they go on as they happen."""
        return StreamingResponse(_stream(core, follow=follow, limit=limit), media_type="application/x-ndjson")

    return router


def _stream(core: Core, *, follow: bool, limit: int) -> Iterator[bytes]:
    with core.events.subscribe() as heard:
        last = 0
        for event in core.events.recent(limit):
            last = event.id
            yield _encode(event) + b"\n"
        while follow:
            try:
                new = heard.get(timeout=1.0)
            except queue.Empty:
                yield b"\n"  # a reader that has gone is noticed by writing to it
                continue
            if new is None:
                return
            if new.id > last:
                yield _encode(new) + b"\n"
