"""What runs for long, told a line at a time for as long as it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from fastapi.responses import StreamingResponse
from pydantic import Field

from volumed.frontends.admin.schemas import View

# How often a follower is told, in seconds.
BEAT = 0.5
NDJSON = "application/x-ndjson"


class ProgressView(View):
    step: str
    done: int
    total: int
    rate: float = Field(description="Bytes a second")
    left: float | None = Field(description="Seconds")


def followed(look: Callable[[], tuple[View, bool]]) -> StreamingResponse:
    """`look` tells what there is to show now, and whether it is the last."""

    def lines() -> Iterator[bytes]:
        while True:
            shown, last = look()
            yield shown.model_dump_json().encode() + b"\n"
            if last:
                return
            time.sleep(BEAT)

    return StreamingResponse(lines(), media_type=NDJSON)
