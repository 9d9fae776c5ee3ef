"""Podman with storage and settings of the test's own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness.docker import write_busybox


class Podman:
    def __init__(self, folder: Path, *, driver: str, plugin_socket: Path) -> None:
        self.arguments = (
            *("--root", str(folder / "root"), "--runroot", str(folder / "runroot"), "--tmpdir", str(folder / "tmp")),
            *("--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc"),
        )
        self._settings = folder / "containers.conf"
        self._settings.write_text(
            f"""\
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]
[engine]
runtime = "runc"
volume_path = "{folder}/volumes"
[engine.volume_plugins]
{driver} = "{plugin_socket}"
"""
        )
        archive = folder / "busybox.tar"
        write_busybox(archive)
        self("import", "--quiet", str(archive), "busybox")

    @property
    def environment(self) -> dict[str, str]:
        return {"CONTAINERS_CONF": str(self._settings), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}

    def __call__(self, *words: str, check: bool = True) -> str:
        told = subprocess.run(
            ["podman", *self.arguments, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=150,
            stdin=subprocess.DEVNULL,
            env=self.environment,
        )
        if check:
            assert told.returncode == 0, f"podman {words}: {told.stdout}"
        return told.stdout.strip()

    def inspect(self, volume: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("volume", "inspect", volume))[0]
        return found

    def remove_containers(self) -> None:
        self("rm", "--all", "--force", "--time", "0")


@contextlib.contextmanager
def podman_with(*, driver: str, plugin_socket: Path) -> Iterator[Podman]:
    """In a folder of a short name: Podman takes no runroot of more than 50 characters."""
    with tempfile.TemporaryDirectory(prefix="podman-", ignore_cleanup_errors=True) as folder:
        podman = Podman(Path(folder), driver=driver, plugin_socket=plugin_socket)
        try:
            yield podman
        finally:
            podman.remove_containers()
            for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
                target = line.split(" ")[4]
                if target.startswith(f"{folder}/"):
                    subprocess.run(["umount", "-l", target], check=False, capture_output=True)
