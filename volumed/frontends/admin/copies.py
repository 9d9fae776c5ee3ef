"""Clones on other storage, backups and restores in the admin API."""

from __future__ import annotations

from datetime import datetime

import msgspec
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import Field

from volumed import context
from volumed.errors import InvalidRequest
from volumed.frontends.admin.following import ProgressView, followed
from volumed.frontends.admin.schemas import Body, Size, View, VolumeView
from volumed.frontends.admin.verification import VerifyingView, streamed
from volumed.migration.copies import Copies
from volumed.migration.migrations import Migrations
from volumed.migration.planner import Wish
from volumed.model import Copy, CopyKind, CopyState, MovePath

PATIENCE = 590.0  # a little less than a request's


class _WishBody(Body):
    size: Size | None = None
    filesystem: str = ""
    options: dict[str, str] = Field(default={}, description="The target driver's own")
    accept_loss: tuple[str, ...] = Field(default=(), description="What may be lost, by name")
    bandwidth: Size | None = Field(default=None, description="Bytes a second; left out: as fast as it goes")
    by: str = Field(default="", max_length=100, description="Who asks, for the history")

    def wish_for(self, backend: str) -> Wish:
        return Wish(
            backend=backend,
            size=self.size,
            filesystem=self.filesystem,
            options=self.options,
            accept=self.accept_loss,
            bandwidth=self.bandwidth or 0,
            by=self.by,
        )


class CopyBody(_WishBody):
    name: str = Field(description="Of the new volume")
    backend: str


class BackupBody(_WishBody):
    backend: str = Field(description="Where to")
    full: bool = Field(default=False, description="Copy all, whatever earlier backups hold")


class RestoreBody(_WishBody):
    name: str = Field(default="", description="Of the new volume; left out: as its volume was called")
    backend: str = Field(default="", description="Left out: where its volume is")
    in_place: bool = Field(default=False, description="Instead of what its volume has now, which is lost")


class CopyView(View):
    id: str
    kind: CopyKind
    state: CopyState
    node: str
    volume: str = Field(description="Whose data it is")
    volume_id: str
    backend: str = Field(description="Where it lies")
    path: MovePath
    name: str = Field(description="Of the volume that it becomes")
    snapshot: str
    of: str | None = Field(description="The backup that is restored")
    base: str | None = Field(description="The backup from which only what changed since was copied")
    point: str = Field(description="How it is of one point in time")
    size: int | None = Field(description="That the volume had")
    created: datetime
    ended: datetime | None
    by: str
    accepted: list[str]
    expected: int
    copied: int = Field(description="Bytes that had to be written")
    bytes: int = Field(description="Of all data")
    files: int
    digest: str = Field(description="blake3 of all of the data, when it was verified")
    error: str
    progress: ProgressView | None = Field(description="null when it does not run now")


def copy_routers(migrations: Migrations) -> list[APIRouter]:
    return [_begin(migrations.copies), _copies(migrations)]


def _view(copies: Copies, copy: Copy) -> CopyView:
    fields = msgspec.structs.asdict(copy)
    progress = copies.progress(copy)
    return CopyView(
        **{key: value for key, value in fields.items() if key in CopyView.model_fields},
        volume=copy.volume_name,
        backend=copy.target.backend,
        progress=ProgressView.model_validate(progress) if progress else None,
    )


def _begin(copies: Copies) -> APIRouter:
    router = APIRouter(prefix="/v1/volumes", tags=["copies"])

    @router.post("/{reference}/copy", status_code=201)
    def copy(reference: str, body: CopyBody) -> VolumeView:
        """A new volume on another backend with the data of VOLUME, or of VOLUME@SNAPSHOT, proven equal. Of a volume in
        use from a snapshot, where its backend takes one of such."""
        begun = copies.begin_clone(reference, body.name, body.wish_for(body.backend))
        copies.wait(begun, timeout=context.remaining(PATIENCE))
        return VolumeView.model_validate(copies.volume_of(begun))

    @router.post("/{reference}/backup", status_code=201)
    def backup(reference: str, body: BackupBody) -> CopyView:
        """Begin a backup of VOLUME or VOLUME@SNAPSHOT; it goes on by itself. Only what changed since the latest one
        there is copied."""
        return _view(copies, copies.begin_backup(reference, body.wish_for(body.backend), full=body.full))

    return router


def _copies(migrations: Migrations) -> APIRouter:
    copies = migrations.copies
    router = APIRouter(prefix="/v1/copies", tags=["copies"])

    @router.get("")
    def list_copies() -> list[CopyView]:
        """Backups, and what runs and ended of clones and restores, in the order they were begun."""
        return [_view(copies, copy) for copy in copies.all()]

    @router.get("/{reference}")
    def show(reference: str) -> CopyView:
        """By its id, or of a volume the latest backup."""
        return _view(copies, copies.find(reference))

    @router.get("/{reference}/follow", response_class=StreamingResponse)
    def follow(reference: str) -> StreamingResponse:
        """As `show`, one JSON object a line, until it ends."""
        copy = copies.find(reference)

        def look() -> tuple[CopyView, bool]:
            current = copies.get(copy.id)
            return _view(copies, current), current.state is not CopyState.COPYING

        return followed(look)

    @router.get("/{reference}/verify", response_class=StreamingResponse, responses={200: {"model": VerifyingView}})
    def verify(reference: str) -> StreamingResponse:
        """Read all of a backup from its storage and compare it with its record; as of a volume."""
        held = copies.backup(reference)
        return streamed(lambda control, tell: migrations.verifications.run_backup(held, control, tell))

    @router.post("/{reference}/restore", status_code=201)
    def restore(reference: str, body: RestoreBody) -> CopyView:
        """Begin to make a volume of a backup, or with `in_place` to put its data back into its volume."""
        if not body.in_place:
            return _view(copies, copies.begin_restore(reference, body.name, body.wish_for(body.backend)))
        if body.name or body.backend or body.size or body.filesystem or body.options:
            raise InvalidRequest("what is put back in place has the volume's own name, backend and size")
        return _view(copies, copies.begin_restore_in_place(reference, by=body.by))

    @router.post("/{reference}/stop")
    def stop(reference: str) -> CopyView:
        """End one that runs; nothing is left of it."""
        return _view(copies, copies.stop_one(reference))

    @router.delete("/{reference}")
    def remove(reference: str) -> CopyView:
        """A backup with its data, or the record of what ended otherwise; by its id alone."""
        return _view(copies, copies.remove(reference))

    return router
