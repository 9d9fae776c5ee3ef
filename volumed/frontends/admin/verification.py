"""Verification of volumes in the admin API: a long answer, told a line at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import Field

from volumed import context
from volumed.errors import VolumedError
from volumed.frontends.admin.following import BEAT, NDJSON
from volumed.frontends.admin.schemas import ErrorView, View
from volumed.migration.migrations import Migrations
from volumed.migration.movers.mover import Control
from volumed.migration.verification import Outcome, Verification
from volumed.model import MovePath


class ComparisonView(View):
    against: str
    outcome: Outcome = Field(description="changed: it was used since, so that it may rightly differ")
    text: str
    differences: list[str] = Field(description="Files or extents, at most a hundred")


class VerificationView(View):
    volume: str
    path: MovePath
    digest: str = Field(description="blake3 of all that was read")
    bytes: int
    files: int
    seconds: float
    comparisons: list[ComparisonView]


class ReadingView(View):
    step: str
    bytes: int = Field(description="Read so far")


class VerifyingView(View):
    """A line: of these one is not null. The last has the outcome or the error."""

    reading: ReadingView | None = None
    verification: VerificationView | None = None
    error: ErrorView | None = None


Verify = Callable[[Control, Callable[[str], None]], Verification]


def verification_router(migrations: Migrations) -> APIRouter:
    router = APIRouter(prefix="/v1/volumes", tags=["volumes"])

    @router.get("/{reference}/verify", response_class=StreamingResponse, responses={200: {"model": VerifyingView}})
    def verify(reference: str) -> StreamingResponse:
        """Read all of the volume from its storage and compare it with what is kept of it; changes nothing. One JSON
        object a line; whoever stops to listen ends it."""
        volume = migrations.verifications.check(reference)
        job = lambda control, tell: migrations.verifications.run(volume.id, control, tell)  # noqa: E731
        return streamed(job)

    return router


def streamed(job: Verify) -> StreamingResponse:
    return StreamingResponse(_lines(job), media_type=NDJSON)


def _lines(job: Verify) -> Iterator[bytes]:
    control, ended, steps = Control(), queue.SimpleQueue[VerifyingView](), ["reading"]
    identifier = context.request_id.get()

    def run() -> None:
        try:
            with context.request(identifier):
                found = job(control, steps.append)
                ended.put(VerifyingView(verification=VerificationView.model_validate(found)))
        except VolumedError as error:
            ended.put(VerifyingView(error=ErrorView.of(error, request_id=identifier)))
        except BaseException:
            ended.put(VerifyingView(error=ErrorView(code="internal", message="a bug", request_id=identifier)))
            raise

    threading.Thread(target=run, name="verify", daemon=True).start()
    try:
        while True:
            try:
                last = ended.get(timeout=BEAT)
            except queue.Empty:
                reading = ReadingView(step=steps[-1], bytes=control.bytes)
                yield VerifyingView(reading=reading).model_dump_json().encode() + b"\n"
                continue
            yield last.model_dump_json().encode() + b"\n"
            return
    finally:
        control.stop()
