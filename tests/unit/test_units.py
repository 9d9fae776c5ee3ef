from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volumed.errors import InvalidRequest
from volumed.units import MAX_SIZE, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20g", 20 << 30),
        ("512MiB", 512 << 20),
        ("1.5t", 3 << 39),
        ("1048576", 1 << 20),
        ("1 KB", 1024),
        (" 7b ", 7),
        ("9223372036854775807", MAX_SIZE),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0g",
        "-1",
        "1e30",
        "ten",
        "1.5.2g",
        "g",
        "0x10",
        "99999999999999e",
        "8e",
        "1" * 50,
        "١g",
        "1\n2",
        "1 g b",
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_size(text)


@given(st.integers(1, MAX_SIZE))
def test_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(1, 2**40), st.sampled_from(["k", "M", "Gi", "TiB"]))
def test_shown_sizes_are_read_again(number: int, unit: str) -> None:
    text = f"{number}{unit}"
    try:
        size = parse_size(text)
    except InvalidRequest:
        return  # too large
    if size > MAX_SIZE * 0.99:
        return  # shown as 8 EiB, which is one byte more than there can be
    assert abs(parse_size(format_size(size).replace(" ", "")) - size) <= size * 0.05


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2592000), ("90s", 90), ("500ms", 0.5), ("45", 45), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1y", "1 fortnight"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_duration(text)
