"""Lists of CSI in pages: each entry once, whatever is asked for."""

from __future__ import annotations

import pytest

from volumed.errors import InvalidRequest, OperationPending
from volumed.frontends.csi import paging
from volumed.frontends.csi.paging import read_page, take

IDS = [f"v{number:032x}" for number in range(25)]


def look(after: str, limit: int) -> list[str]:
    return [one for one in IDS if one > after][:limit]


@pytest.mark.parametrize("at_once", [0, 1, 7, 24, 25, 26, 1000])
@pytest.mark.parametrize("most", [4, 10_000])
def test_every_entry_comes_once(monkeypatch: pytest.MonkeyPatch, at_once: int, most: int) -> None:
    """Also of more than a message may hold, which no caller can ask for."""
    monkeypatch.setattr(paging, "MOST", most)
    seen: list[str] = []
    token = ""
    while True:
        page = read_page("volumes", max_entries=at_once, starting_token=token)
        found, token = take(page, "volumes", look, lambda one: one)
        assert len(found) <= min(at_once or most, most)
        seen += found
        if not token:
            break
    assert seen == IDS


def test_tokens_of_others() -> None:
    for token in ("x", f"snapshots.{IDS[0]}", f"volumes.{IDS[0]}x"):
        with pytest.raises(OperationPending):
            read_page("volumes", max_entries=1, starting_token=token)
    with pytest.raises(InvalidRequest):
        read_page("volumes", max_entries=-1, starting_token="")
