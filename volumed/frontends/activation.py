"""Sockets that systemd opened for us before we ran (sd_listen_fds(3)): calls made during our start wait in them."""

from __future__ import annotations

import os
import socket

FIRST = 3


def inherited_sockets() -> dict[str, socket.socket]:
    """By the unit's FileDescriptorName. Taken once: the environment is cleared, so that no child believes in them."""
    try:
        if int(os.environ.get("LISTEN_PID", "0")) != os.getpid():
            return {}
        count = int(os.environ["LISTEN_FDS"])
    except (KeyError, ValueError):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(key, None)
    found: dict[str, socket.socket] = {}
    for offset in range(count):
        os.set_inheritable(FIRST + offset, False)
        name = names[offset] if offset < len(names) else str(offset)
        found[name] = socket.socket(fileno=FIRST + offset)
    return found
