"""systemd's readiness and watchdog protocol (sd_notify(3)): a datagram to a socket named in the environment."""

from __future__ import annotations

import asyncio
import os
import socket


def ready(status: str) -> None:
    _send(f"READY=1\nSTATUS={status}")


def stopping() -> None:
    _send("STOPPING=1")


async def keep_watchdog() -> None:
    """Tell systemd at half its interval that the event loop still turns; returns at once when it does not watch."""
    microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        _send("WATCHDOG=1")
        await asyncio.sleep(microseconds / 2_000_000)


def _send(message: str) -> None:
    """Nothing happens without systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.sendall(message.encode())
