"""Runs inside the machine: numbered records, each on stable storage before it is told to be (O_DSYNC).

usage: writer.py DATA TOLD    (DATA: a file or a device; TOLD: a file, the number of the last record that was written)
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

SLOTS, RECORD = 256, 4096


def record(number: int) -> bytes:
    return b"%020d" % number * (RECORD // 20) + bytes(RECORD % 20)


def lost(data: Path, told: int) -> list[int]:
    """Records that were told to be written and are neither there nor overwritten by a later one."""
    content = data.open("rb", buffering=0).read(SLOTS * RECORD)
    missing = []
    for number in range(max(1, told - SLOTS + 1), told + 1):
        there = content[number % SLOTS * RECORD :][:RECORD]
        if there != record(number) and there != record(number + SLOTS):
            missing.append(number)
    return missing


def main(data: str, told: str) -> None:
    flags = os.O_RDWR | os.O_DSYNC
    out = os.open(data, flags if data.startswith("/dev/") else flags | os.O_CREAT)
    said = os.open(told, flags | os.O_CREAT)
    longest, number = 0.0, 0
    while True:
        number += 1
        begun = time.monotonic()
        os.pwrite(out, record(number), number % SLOTS * RECORD)
        longest = max(longest, time.monotonic() - begun)
        os.pwrite(said, b"%020d %.3f\n" % (number, longest), 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
