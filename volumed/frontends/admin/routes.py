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
from volumed.core.core import Core
from volumed.core.doctor import Finding
from volumed.errors import NotFound
from volumed.frontends.admin import storage
from volumed.frontends.admin.schemas import (
    BindingView,
    ConsumerView,
    CreateBody,
    DoctorBody,
    ExpandBody,
    FindingView,
    HistoricBindingView,
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
from volumed.model import PVC, Binding, Volume

MAX_PAGE = 10_000
_encode = msgspec.json.Encoder().encode


def routers(core: Core) -> list[APIRouter]:
    parts = (_volumes, _snapshots, _bindings, storage.backends, storage.classes, storage.imports, _health)
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
