"""What the admin API tells of storage: backends, classes, drivers, and what lies there already."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastapi import APIRouter

from volumed.core.backends import Backend
from volumed.core.classes import PlacementClass
from volumed.core.core import Core
from volumed.core.drivers import DriverInfo
from volumed.core.placement import Needs, check
from volumed.driver import Driver, Options
from volumed.errors import DriverLoadError, InvalidRequest, NotFound, VolumedError
from volumed.frontends.admin.schemas import (
    BackendDetail,
    BackendView,
    CapacityView,
    ClassMemberView,
    ClassView,
    DriverDetail,
    DriverView,
    ImportBody,
    OptionView,
    RebuildBody,
    RebuildLineView,
    VolumeView,
)
from volumed.model import VolumeMode


def imports(core: Core) -> APIRouter:
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


def backends(core: Core) -> APIRouter:
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


def classes(core: Core) -> APIRouter:
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
