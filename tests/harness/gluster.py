"""A real Gluster of the test's own, at an address of its own on the loopback: glusterd, and volumes of one brick.

with running_gluster(folder) as gluster:
    gluster.make_volume("files")
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import wait_until
from tests.harness.processes import Process, pids_with

_CONF = """
volume management
    type mgmt/glusterd
    option working-directory {folder}/state
    option run-directory {folder}/run
    option glusterd-sockfile {folder}/run/glusterd.socket
    option transport-type socket
    option transport.socket.bind-address {address}
    option ping-timeout 0
    option event-threads 1
end-volume
"""
_SOCKETS, _LOGS = Path("/var/run/gluster"), Path("/var/log/glusterfs")


class Gluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = "127." + ".".join(str(1 + secrets.randbelow(250)) for _ in range(3))
        self._server: Process | None = None
        for name in ("state", "run", "bricks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for shared in (_SOCKETS, _LOGS / "bricks"):
            shared.mkdir(parents=True, exist_ok=True)
        (folder / "glusterd.vol").write_text(_CONF.format(folder=folder, address=self.address))

    def start(self) -> None:
        """Its bricks, too, as far as their volumes were started."""
        argv: list[str | Path] = [
            "glusterd",
            "--no-daemon",
            "-f",
            self.folder / "glusterd.vol",
            "-l",
            self.folder / "glusterd.log",
        ]
        self._server = Process([*argv, "-p", self.folder / "run/glusterd.pid"], log=self.folder / "out")
        wait_until(self._answers, timeout=60)

    def _answers(self) -> bool:
        assert self._server is not None
        assert self._server.running(), self._server.said()
        return self._gluster("volume", "list").returncode == 0

    def _gluster(self, *words: str) -> subprocess.CompletedProcess[str]:
        socket = f"--glusterd-sock={self.folder}/run/glusterd.socket"
        log = f"--log-file={self.folder}/cli.log"
        return subprocess.run(
            ["gluster", "--mode=script", socket, log, *words], capture_output=True, text=True, timeout=120, check=False
        )

    def ctl(self, *words: str) -> str:
        told = self._gluster(*words)
        assert told.returncode == 0, f"gluster {words}: {told.stdout}{told.stderr}"
        return told.stdout

    def make_volume(self, name: str, *, quota: bool = False, brick: Path | None = None) -> None:
        """`brick`: the folder that holds it, on a file system of its own."""
        brick = brick or self.folder / "bricks" / name
        self.ctl("volume", "create", name, f"{self.address}:{brick}", "force")
        self.ctl("volume", "start", name)
        if quota:
            self.ctl("volume", "quota", name, "enable")
            for limit in ("hard-timeout", "soft-timeout"):  # or it is looked at every few seconds only
                self.ctl("volume", "quota", name, limit, "0")

    def quota_command(self, volume: str) -> Path:
        """As an administrator would write it."""
        command = self.folder / f"quota-{volume}"
        gluster = f"gluster --mode=script --glusterd-sock={self.folder}/run/glusterd.socket volume quota {volume}"
        command.write_text(
            f'#!/bin/sh\ncase $1 in\nset) exec {gluster} limit-usage "$2" "$3" ;;\n'
            f'clear) {gluster} remove "$2" >/dev/null 2>&1; exit 0 ;;\nesac\n'
        )
        command.chmod(0o755)
        return command

    # What can happen to it
    def kill_brick(self, name: str) -> None:
        for pid in pids_with(f"--brick-name {self.folder}/bricks/{name} "):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not pids_with(f"--brick-name {self.folder}/bricks/{name} "))

    def revive_brick(self, name: str) -> None:
        def online() -> bool:
            self._gluster("volume", "start", name, "force")  # does nothing until glusterd has noticed that it is gone
            return bool(pids_with(f"--brick-name {self.folder}/bricks/{name} "))

        wait_until(online)

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """The brick answers nobody, and refuses nobody."""
        pids = pids_with(f"--brick-name {self.folder}/bricks/{name} ")
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def kill_server(self) -> None:
        """glusterd alone: bricks and clients go on without it."""
        assert self._server is not None
        self._server.end(signal.SIGKILL)

    def end(self) -> None:
        if self._server is not None and self._server.running():
            self._server.end(signal.SIGKILL)
        # Bricks and quotad are told a path of ours, and the mounts that the quota's commands leave behind our address.
        for pid in {*pids_with(f"{self.folder}/"), *pids_with(self.address)}:
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for log in _LOGS.glob(f"**/*{str(self.folder).strip('/').replace('/', '-')}*"):
            log.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "bricks", ignore_errors=True)


@contextlib.contextmanager
def running_gluster(folder: Path) -> Iterator[Gluster]:
    made = Gluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.end()
