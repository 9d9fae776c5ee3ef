"""A dockerd of the test's own: its own data, socket and network namespace; plugin sockets are the machine's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness.processes import Process, pids_with

PLUGINS = Path("/run/docker/plugins")


class Docker:
    def __init__(self, folder: Path, *, live_restore: bool = False) -> None:
        self.folder = folder
        self.socket = folder / "docker.sock"
        self._live_restore = live_restore
        self._process: Process | None = None
        self._containerd: Process | None = None

    def start(self) -> None:
        if self._containerd is None:  # of its own, as on every installed machine: it outlives a killed dockerd
            self._containerd = self._start_containerd()
        argv = [
            *("dockerd", "--data-root", str(self.folder / "data"), "--exec-root", str(self.folder / "exec")),
            *("--pidfile", str(self.folder / "docker.pid"), "-H", f"unix://{self.socket}", "--bridge", "none"),
            *("--config-file", str(self.folder / "none.json")),
            *("--containerd", str(self.folder / "containerd.sock")),
            *(("--live-restore",) if self._live_restore else ()),
        ]
        (self.folder / "none.json").write_text("{}")  # not what the machine has in /etc/docker
        # `exec` keeps the pid: what we kill is dockerd itself.
        self._process = Process(
            ["unshare", "-n", "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh", *argv],
            log=self.folder / "dockerd.log",
        )
        ends = time.monotonic() + 60
        while subprocess.run(self._argv("version"), capture_output=True, check=False).returncode != 0:
            assert self._process.running(), f"dockerd ended: {self._process.said()[-500:]}"
            assert time.monotonic() < ends, f"dockerd is not ready: {self._process.said()[-500:]}"
            time.sleep(0.05)

    def _start_containerd(self) -> Process:
        config = self.folder / "containerd.toml"
        config.write_text(
            f"""\
version = 2
root = "{self.folder}/containerd/root"
state = "{self.folder}/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{self.folder}/containerd.sock"
"""
        )
        process = Process(["containerd", "--config", config], log=self.folder / "containerd.log")
        while not (self.folder / "containerd.sock").exists():
            assert process.running(), process.said()[-500:]
            time.sleep(0.02)
        return process

    def _argv(self, *words: str) -> list[str]:
        return ["docker", "-H", f"unix://{self.socket}", *words]

    def __call__(self, *words: str, check: bool = True, timeout: float = 150.0) -> str:
        """Run a docker command; its output, standard error included."""
        told = subprocess.run(
            self._argv(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert told.returncode == 0, f"docker {words}: {told.stdout}"
        return told.stdout.strip()

    def inspect(self, volume: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("volume", "inspect", volume))[0]
        return found

    def kill(self) -> None:
        """As a crash would. Its containerd and containers live on."""
        assert self._process is not None
        self._process.end(signal.SIGKILL)

    def remove_containers(self) -> None:
        containers = self("ps", "-aq").split()
        if containers:
            self("rm", "-f", *containers)

    def clean_up(self) -> None:
        if self._process is not None and self._process.running():
            self.remove_containers()
            self._process.end(signal.SIGTERM, timeout=60)
        if self._containerd is not None:
            self._containerd.end(signal.SIGTERM)
        self._end_what_is_left()

    def _end_what_is_left(self) -> None:
        """containerd and shims of a dockerd that was killed: those whose command line names our folder."""
        for _ in range(50):
            mine = pids_with(str(self.folder))
            if not mine:
                break
            for pid in mine:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            target = line.split(" ")[4]
            if target.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", target], check=False, capture_output=True)


@contextlib.contextmanager
def running_docker(*, live_restore: bool = False) -> Iterator[Docker]:
    """Started, with the image `busybox`. In a folder of a short name: a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="docker-", ignore_cleanup_errors=True) as folder:
        yield from _running(Path(folder), live_restore=live_restore)


def _running(folder: Path, *, live_restore: bool) -> Iterator[Docker]:
    PLUGINS.mkdir(parents=True, exist_ok=True)
    for stale in PLUGINS.glob("volumed-*-*.sock"):  # a socket that nobody answers costs every `volume ls` 15 s
        if not Path("/proc", stale.stem.rpartition("-")[2]).exists():
            stale.unlink()
    docker = Docker(folder, live_restore=live_restore)
    try:
        docker.start()
        archive = folder / "busybox.tar"
        write_busybox(archive)
        docker("import", str(archive), "busybox")
        yield docker
    finally:
        docker.clean_up()


def write_busybox(archive: Path) -> None:
    """A root folder of busybox alone, with something in /filled for volumes to be filled from."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    with tarfile.open(archive, "w") as tar:
        tar.add(busybox, "bin/busybox")
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        for applet in applets:
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        for folder in ("tmp", "etc", "dev", "proc", "filled"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        content = b"from the image"
        entry = tarfile.TarInfo("filled/file")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
