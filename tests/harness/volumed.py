"""A volumed of the test's own: real process, real sockets, everything below one folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.processes import Process
from volumed.cli.client import ApiError, Client
from volumed.host import loop, mounts
from volumed.host.mounts import parse_mountinfo
from volumed.unix_http import UnixConnection

BIN = Path(sys.executable).parent


_BACKENDS = """\
[backends.local]
driver = "directory"
path = "{folder}/volumes"
[backends.sized]
driver = "image"
path = "{folder}/images"
"""


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]

    @property
    def error(self) -> str:
        return str(self.body.get("Err", ""))


class Volumed:
    def __init__(
        self,
        folder: Path,
        *,
        plugin_socket: Path | None = None,
        docker_socket: Path | None = None,
        podman: tuple[str, ...] | None = None,
        backends: str = "",
        default_backends: tuple[str, ...] = ("local", "sized"),
        only: bool = False,
        csi: str | None = None,
        quiet: bool = False,
    ) -> None:
        """`quiet`: as installed, not hurried and without its debug log: for figures. `csi`: serve it, with these
        settings besides; `backends`: further tables, or with `only` all of them."""
        self.folder = folder
        self.state = folder / "state"
        self.plugin_socket = plugin_socket or folder / "docker.sock"
        self.admin_socket = folder / "admin.sock"
        self.csi_socket = folder / "csi" / "csi.sock"
        self.targets = folder / "pods"  # where an orchestrator may want its volumes
        self.config = folder / "volumed.toml"
        self.api = Client(self.admin_socket)
        self.env: dict[str, str] = {}  # of every start
        self._process: Process | None = None
        self._serves_csi = csi is not None
        self.config.write_text(
            f"""\
state-dir = "{self.state}"
runtime-dir = "{folder}/run"
node = "node-1"
reconcile-interval = "{30 if quiet else 1}s"
consumer-grace = "{30 if quiet else 1}s"
default-backends = {json.dumps(default_backends)}
[docker]
socket = "{self.plugin_socket}"
[admin]
socket = "{self.admin_socket}"
[csi]
enabled = {str(csi is not None).lower()}
socket = "{self.csi_socket}"
target-roots = ["{self.targets}"]
{csi or ""}
[log]
level = "{"info" if quiet else "debug"}"
[engines.docker]
enabled = {str(docker_socket is not None).lower()}
socket = "{docker_socket or "/nonexistent"}"
[engines.podman]
enabled = {str(podman is not None).lower()}
command = "podman"
arguments = {json.dumps(list(podman or ()))}
{"" if only else _BACKENDS.format(folder=folder)}
{backends}
"""
        )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, env: Mapping[str, str] | None = None, wait: bool = True) -> None:
        self._process = Process(
            [sys.executable, "-m", "volumed.daemon", "--config", self.config],
            log=self.folder / "volumed.log",
            env={**self.env, **(env or {})},
        )
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout: float = 30.0) -> None:
        assert self._process is not None
        ends = time.monotonic() + timeout
        while not _answers(self.plugin_socket) or (self._serves_csi and not _answers(self.csi_socket)):
            assert self._process.running(), f"volumed ended: {self.log()[-3000:]}"
            assert time.monotonic() < ends, f"volumed is not ready: {self.log()[-3000:]}"
            time.sleep(0.005)

    def running(self) -> bool:
        return self._process is not None and self._process.running()

    def kill(self) -> None:
        assert self._process is not None
        self._process.end(signal.SIGKILL)

    def stop(self) -> int:
        assert self._process is not None
        return self._process.end(signal.SIGTERM)

    def wait_end(self, timeout: float = 30.0) -> int:
        assert self._process is not None
        return self._process.wait(timeout)

    def log(self) -> str:
        path = self.folder / "volumed.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # Its sockets
    def plugin(self, endpoint: str, timeout: float = 60.0, **fields: Any) -> Answer:
        """A request as dockerd sends it: `plugin("Create", Name="data", Opts={"size": "1g"})`."""
        connection = UnixConnection(self.plugin_socket, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("POST", f"/VolumeDriver.{endpoint}", body=json.dumps(fields))
            answer = connection.getresponse()
            return Answer(answer.status, json.loads(answer.read()))

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        told = subprocess.run(
            [sys.executable, "-m", "volumed.cli.main", "--socket", str(self.admin_socket), *words],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "COLUMNS": "200"},
        )
        if check:
            assert told.returncode == 0, f"volumectl {words}: {told.stdout}{told.stderr}"
        return told

    def bindings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.get("bindings")
        return found

    def events(self) -> list[dict[str, Any]]:
        return list(self.api.lines("events"))

    def wait_for_event(self, kind: str, timeout: float = 20.0) -> dict[str, Any]:
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            for event in self.events():
                if event["kind"] == kind:
                    return event
            time.sleep(0.05)
        raise AssertionError(f"no {kind} came: {self.events()}")

    def metrics(self) -> str:
        """What Prometheus is told."""
        connection = UnixConnection(self.admin_socket, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    # What is on the machine because of it
    def mounted(self) -> dict[str, str]:
        """Volume id -> what is mounted at its path on the host."""
        text = Path("/proc/self/mountinfo").read_text()
        return {
            entry.target.name: entry.source
            for entry in parse_mountinfo(text)
            if entry.target.parent == self.state / "mounts"
        }

    def targets_mounted(self) -> list[Path]:
        """Paths of orchestrators that have something mounted, the innermost first."""
        entries = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
        return [entry.target for entry in reversed(entries) if entry.target.is_relative_to(self.targets)]

    def loops(self) -> list[Path]:
        return [found.backing_file for found in loop.attached() if found.backing_file.is_relative_to(self.folder)]

    def stored(self) -> list[str]:
        """Names of everything on the backends' storage, but for what a look at it needs for a moment."""
        return sorted(name for name in self._on_storage() if not name.startswith(".probe-"))

    def _on_storage(self) -> list[str]:
        folders = [self.folder / "volumes", self.folder / "images"]
        return [path.name for folder in folders if folder.exists() for path in folder.iterdir()]

    def assert_nothing_left(self) -> None:
        assert self.mounted() == {}
        assert self.targets_mounted() == []
        assert self.loops() == []
        found = _at_last(self._on_storage)
        assert found == [], found
        assert list((self.state / "mounts").iterdir()) == []
        assert self.api.get("volumes")["volumes"] == []
        assert self.bindings() == []
        found = _at_last(lambda: self.api.get("doctor"))
        assert found == [], found

    def clean_up(self) -> None:
        if self.running():
            self.kill()
        self.plugin_socket.unlink(missing_ok=True)
        for path in self.targets_mounted():
            mounts.unmount(path)
        for path in sorted((self.state / "mounts").glob("*")):
            mounts.unmount(path)
        for found in list(loop.attached()):
            if found.backing_file.is_relative_to(self.folder):
                loop.detach(found.device)


@contextlib.contextmanager
def running_volumed(folder: Path, **options: Any) -> Iterator[Volumed]:
    """Started; killed and its mounts taken away at the end, whatever happened."""
    folder.mkdir(parents=True, exist_ok=True)
    volumed = Volumed(folder, **options)
    try:
        volumed.start()
        yield volumed
    finally:
        volumed.clean_up()


def _at_last(look: Callable[[], Any]) -> Any:
    """What it finds when it has had its time: a file of a probe, or a container that is gone, is seen for a moment."""
    ends = time.monotonic() + 30
    while (found := look()) and time.monotonic() < ends:
        time.sleep(0.2)
    return found


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True


__all__ = ["Answer", "ApiError", "Volumed", "running_volumed"]
