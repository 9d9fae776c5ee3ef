"""Lists in pages. A token names the last id given: it stays good while others come and go, that one too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from volumed.errors import InvalidRequest, OperationPending

_TOKEN = re.compile(r"([a-z]+)\.([a-z][0-9a-f]{32})")
T = TypeVar("T")


# Entries of a page, whatever is asked for: about 1.5 MB, and gRPC's clients take 4 MiB if nobody told them otherwise.
MOST = 10_000


class Page(NamedTuple):
    after: str  # id of the last entry of the page before
    limit: int


def read_page(kind: str, *, max_entries: int, starting_token: str) -> Page:
    """Raises InvalidRequest, and OperationPending (ABORTED) for a token that this list never gave."""
    if max_entries < 0:
        raise InvalidRequest("max_entries cannot be negative")
    after = ""
    if starting_token:
        match = _TOKEN.fullmatch(starting_token)
        if match is None or match[1] != kind:
            raise OperationPending("the starting token is not one of this list's", hint="begin with an empty one")
        after = match[2]
    return Page(after, min(max_entries or MOST, MOST))


def take(
    page: Page, kind: str, look: Callable[[str, int], Sequence[T]], id_of: Callable[[T], str]
) -> tuple[Sequence[T], str]:
    """A page's entries and the token of the next. `look`: entries after an id, so many at most."""
    found = look(page.after, page.limit + 1)
    if len(found) <= page.limit:
        return found, ""
    kept = found[: page.limit]
    return kept, f"{kind}.{id_of(kept[-1])}"
