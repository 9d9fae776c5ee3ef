"""Cables that can be cut: packets to and from a server of the test's own vanish, and nobody is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tests.conftest import sh


@contextlib.contextmanager
def cut(address: str, ports: Sequence[int] = ()) -> Iterator[None]:
    """Of a server on the loopback device; of these ports of it alone, if any are named. Whole again at the end."""
    ends = (("-d", "--dport"), ("-s", "--sport"))
    rules = [
        [side, address, *(["-p", "tcp", name, str(port)] if port else [])]
        for side, name in ends
        for port in ports or (0,)
    ]
    with contextlib.ExitStack() as whole:
        for rule in rules:
            sh("iptables", "--wait", "-I", "INPUT", "-i", "lo", *rule, "-j", "DROP")
            whole.callback(sh, "iptables", "--wait", "-D", "INPUT", "-i", "lo", *rule, "-j", "DROP")
        yield
