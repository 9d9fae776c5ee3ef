"""Sizes and durations as people write them. Inside the program: bytes and seconds."""

from __future__ import annotations

import re

from volumed.errors import InvalidRequest

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

# The largest size that every consumer holds: ledger, CSI (int64) and the kernel's loff_t.
MAX_SIZE = 2**63 - 1

_SIZE = re.compile(r"(?P<number>\d{1,20}(?:\.\d{1,6})?)\s*(?P<unit>[kmgtpe]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_FACTORS: dict[str, int] = {unit: KIB**power for power, unit in enumerate(("", "k", "m", "g", "t", "p", "e"))}

_DURATION = re.compile(r"(?P<number>\d{1,9}(?:\.\d{1,3})?)\s*(?P<unit>ms|s|m|h|d|w)?", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, None: 1}


def parse_size(text: str) -> int:
    """Bytes of `20g`, `512MiB`, `1.5t` or `1048576`. Units are binary, as with docker and lvcreate.

    Raises InvalidRequest for anything else, for zero and for more than 2**63 - 1.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"{text[:40]!r} is not a size", hint="write it as 20g, 512MiB or 1073741824")
    whole, _, fraction = match["number"].partition(".")
    factor = _FACTORS[match["unit"].lower()]
    size = int(whole) * factor + int(fraction or 0) * factor // int("1" + "0" * len(fraction))
    if size == 0:
        raise InvalidRequest("a size of zero is not possible", hint="write it as 20g or 512MiB")
    if size > MAX_SIZE:
        raise InvalidRequest(f"a size of {text[:40]} is larger than any storage", hint="the largest is 8 EiB")
    return size


def format_size(size: int) -> str:
    """`20 GiB`, `1.5 GiB`, `512 B`: at most one decimal, for people."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if abs(value) < KIB or unit == "EiB":
            break
        value /= KIB
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def parse_duration(text: str) -> float:
    """Seconds of `30d`, `90s`, `500ms` or `45`. Raises InvalidRequest."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"{text[:40]!r} is not a duration", hint="write it as 30s, 10m, 24h or 30d")
    return float(match["number"]) * _SECONDS[match["unit"]]
