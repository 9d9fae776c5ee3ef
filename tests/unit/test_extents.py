"""Which runs of two files differ, told from where their data lies."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from volumed.driver import Extent, FileExtent
from volumed_drivers.image import differing_extents, merged

SIZE = 64


def file_extents(blocks: list[int | None]) -> list[FileExtent]:
    """A file of one-byte blocks, each at a place or a hole; runs that lie together are told together."""
    found: list[FileExtent] = []
    for offset, place in enumerate(blocks):
        if place is None:
            continue
        last = found[-1] if found else None
        if (
            last
            and last.place is not None
            and last.offset + last.length == offset
            and last.place + last.length == place
        ):
            found[-1] = last._replace(length=last.length + 1)
        else:
            found.append(FileExtent(offset, 1, place, written=True))
    return found


blocks = st.lists(st.none() | st.integers(0, 5), min_size=SIZE, max_size=SIZE)


@given(blocks, st.dictionaries(st.integers(0, SIZE - 1), st.none() | st.integers(0, 5)))
def test_every_difference_and_nothing_else(old: list[int | None], changes: dict[int, int | None]) -> None:
    new = [changes.get(offset, place) for offset, place in enumerate(old)]
    told = list(merged(differing_extents(file_extents(old), file_extents(new))))
    seen = {offset for extent in told for offset in range(extent.offset, extent.offset + extent.length)}
    assert seen == {offset for offset in range(SIZE) if old[offset] != new[offset]}
    assert all(one.offset + one.length < two.offset for one, two in itertools.pairwise(told))


def test_a_place_that_is_not_known_may_differ() -> None:
    vague = [FileExtent(0, 4, None, written=True)]
    assert list(differing_extents(vague, vague)) == [Extent(0, 4)]


def test_what_was_reserved_and_is_written_now_differs() -> None:
    reserved, written = FileExtent(0, 4, 7, written=False), FileExtent(0, 4, 7, written=True)
    assert list(differing_extents([reserved], [written])) == [Extent(0, 4)]
