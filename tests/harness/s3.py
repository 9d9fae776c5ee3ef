"""An S3 that accepts anything (moto, in a process of its own), over HTTP or TLS. The real one: `tests.harness.ceph`."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import sh, wait_until
from tests.harness.processes import Process
from volumed_drivers.s3 import S3Options


class Server(NamedTuple):
    endpoint: str
    process: Process


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def moto_server(*words: str | Path, scheme: str = "http", host: str = "127.0.0.1") -> Iterator[Server]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="moto-") as folder:
        argv = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port), *words]
        process = Process(argv, log=Path(folder) / "log", env={"PATH": os.environ["PATH"]})
        try:
            wait_until(lambda: _answers(port) or not process.running(), timeout=60)
            assert process.running(), process.said()
            yield Server(f"{scheme}://{host}:{port}", process)
        finally:
            process.end()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of `localhost`, signed by itself: certificate and key."""
    cert, key = folder / "server.crt", folder / "server.key"
    words = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    sh("openssl", "req", "-x509", *words, "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert)
    return cert, key


def options(folder: Path, endpoint: str, *, access: str = "access-key", secret: str = "secret-key-1") -> S3Options:
    """Of a backend, its keys in files."""
    for name, text in (("access", access), ("secret", secret)):
        path = folder / f"{name}.key"
        path.write_text(text)
        path.chmod(0o600)
    return S3Options(endpoint=endpoint, access_key=f"file:{folder}/access.key", secret_key=f"file:{folder}/secret.key")
