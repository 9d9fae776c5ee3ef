"""Which boot of this machine it is."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """Another after each boot: what was not on stable storage before the last one may be gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
