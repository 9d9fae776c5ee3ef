"""Moves of volumes in the admin API."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator, Field

from volumed.errors import InvalidRequest
from volumed.frontends.admin.copies import copy_routers
from volumed.frontends.admin.following import ProgressView, followed
from volumed.frontends.admin.schemas import Body, Size, View
from volumed.frontends.admin.verification import verification_router
from volumed.migration.migrations import Migrations
from volumed.migration.planner import Wish
from volumed.model import Migration, MigrationPhase, MovePath
from volumed.units import parse_duration


def _seconds(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
    return value


Seconds = Annotated[
    float,
    BeforeValidator(_seconds, json_schema_input_type=float | str),
    Field(ge=0, le=10 * 365 * 86400, description="Seconds, or text as 500ms, 5s and 24h"),
]


class MigrateBody(Body):
    backend: str = Field(description="Where to")
    path: str = Field(default="", description="block or tree; left out: the best that can be taken")
    size: Size | None = Field(default=None, description="Of the volume at its new place; left out: as it is")
    filesystem: str = ""
    options: dict[str, str] = Field(default={}, description="The target driver's own")
    accept_loss: tuple[str, ...] = Field(default=(), description="What may be lost, by name")
    bandwidth: Size | None = Field(default=None, description="Bytes a second; left out: as fast as it goes")
    max_pause: Seconds | None = None
    keep_source: Seconds = 86400.0
    wait: bool = Field(default=False, description="Until nobody uses it, instead of holding its users still")
    by: str = Field(default="", max_length=100, description="Who asks, for the history")

    def wish(self) -> Wish:
        fields = {key: value for key, value in dict(self).items() if key not in ("accept_loss", "bandwidth")}
        return Wish(**fields, accept=self.accept_loss, bandwidth=self.bandwidth or 0)


class RollbackBody(Body):
    discard: bool = Field(default=False, description="What was written since may be lost")
    carry: bool = Field(default=False, description="Carry back what was written since")


class ThrottleBody(Body):
    bandwidth: Size | None = Field(description="Bytes a second; null: as fast as it goes")


class PlaceView(View):
    backend: str
    size: int | None
    filesystem: str | None
    options: dict[str, str]


class LossView(View):
    kind: str
    text: str


class PlanView(View):
    path: MovePath
    way: str = Field(description="Of the native path: how the storage copies")
    rejected: dict[str, str] = Field(description="Better paths, and why each cannot be taken")
    target: PlaceView
    phases: list[str]
    bytes: int
    files: int
    seconds: float = Field(description="Estimated")
    pause: float = Field(description="For which its users wait, predicted; 0: nobody does")
    touched: list[str] = Field(description="Who uses it now")
    losses: list[LossView]


class PhaseView(View):
    phase: MigrationPhase
    entered: datetime


class MigrationView(View):
    id: str
    volume: str
    volume_id: str
    node: str
    phase: MigrationPhase
    path: MovePath
    source: PlaceView
    target: PlaceView
    created: datetime
    by: str
    bandwidth: int
    max_pause: float | None
    keep_source: float
    wait: bool
    accepted: list[str]
    paused: bool
    attempt: int
    error: str
    expected: int
    copied: int
    files: int
    digest: str = Field(description="blake3 of all of the data, when it was verified")
    pause: float | None = Field(description="Seconds for which nobody could write")
    phases: list[PhaseView]
    kept_until: datetime | None
    returns: str | None
    progress: ProgressView | None = Field(description="null when it does not run now")


def migration_routers(migrations: Migrations) -> list[APIRouter]:
    return [_begin(migrations), _moves(migrations), verification_router(migrations), *copy_routers(migrations)]


def _view(migrations: Migrations, migration: Migration) -> MigrationView:
    fields = msgspec.structs.asdict(migration)
    phases = [PhaseView(phase=phase, entered=entered) for phase, entered in migration.phases]
    progress = migrations.progress(migration)
    for key in ("source", "target"):
        fields[key] = PlaceView.model_validate(fields[key])
    return MigrationView(
        **{key: value for key, value in fields.items() if key in MigrationView.model_fields and key != "phases"},
        volume=migration.volume_name,
        phases=phases,
        progress=ProgressView.model_validate(progress) if progress else None,
    )


def _begin(migrations: Migrations) -> APIRouter:
    router = APIRouter(prefix="/v1/volumes", tags=["migrations"])

    @router.post("/{reference}/migration-plan")
    def plan(reference: str, body: MigrateBody) -> PlanView:
        """What a move would do; changes nothing."""
        return PlanView.model_validate(migrations.plan(reference, body.wish()))

    @router.post("/{reference}/migrate", status_code=201)
    def migrate(reference: str, body: MigrateBody) -> MigrationView:
        """Begin to move the volume to another backend; it goes on by itself."""
        return _view(migrations, migrations.begin(reference, body.wish()))

    return router


def _moves(migrations: Migrations) -> APIRouter:
    router = APIRouter(prefix="/v1/migrations", tags=["migrations"])

    @router.get("")
    def list_migrations() -> list[MigrationView]:
        """Those that run and those that ended, in the order they were begun."""
        return [_view(migrations, migration) for migration in migrations.all()]

    @router.get("/{reference}")
    def show(reference: str) -> MigrationView:
        """By id, or of a volume the latest."""
        return _view(migrations, migrations.get(reference))

    @router.get("/{reference}/follow", response_class=StreamingResponse)
    def follow(reference: str) -> StreamingResponse:
        """As `show`, one JSON object a line, until it ends, is kept or is paused."""
        migration = migrations.get(reference)

        def look() -> tuple[MigrationView, bool]:
            current = migrations.get(migration.id)
            rests = current.phase.ended or current.phase is MigrationPhase.KEPT or current.paused
            return _view(migrations, current), rests

        return followed(look)

    @router.post("/{reference}/pause")
    def pause(reference: str) -> MigrationView:
        return _view(migrations, migrations.pause(reference))

    @router.post("/{reference}/resume")
    def resume(reference: str) -> MigrationView:
        return _view(migrations, migrations.resume(reference))

    @router.post("/{reference}/throttle")
    def throttle(reference: str, body: ThrottleBody) -> MigrationView:
        return _view(migrations, migrations.throttle(reference, body.bandwidth or 0))

    @router.post("/{reference}/abort")
    def abort(reference: str) -> MigrationView:
        """Only up to its commit point; the source was never touched."""
        return _view(migrations, migrations.abort(reference))

    @router.post("/{reference}/rollback")
    def rollback(reference: str, body: RollbackBody) -> MigrationView:
        """Back to the source, while it is kept; with `carry` that is a move of its own, which is answered."""
        return _view(migrations, migrations.rollback(reference, discard=body.discard, carry=body.carry))

    @router.post("/{reference}/finish")
    def finish(reference: str) -> MigrationView:
        """Give the undo up: the source goes now."""
        return _view(migrations, migrations.finish(reference))

    return router
