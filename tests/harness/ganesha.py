"""nfs-ganesha on a free port of loopback: a server of NFS 4 in user space, on a file system of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import wait_until
from tests.harness.processes import Process

_CONF = """
NFS_CORE_PARAM {{ NFS_Port = {port}; Bind_addr = 127.0.0.1; Protocols = 4; mount_path_pseudo = true;
    Enable_NLM = false; Enable_RQUOTA = false; }}
# Leases of the usual length: an emulated machine that has to wait for its processor renews no short one in time.
NFSv4 {{ Minor_Versions = 0, 1, 2; Graceless = true; RecoveryBackend = fs;
    RecoveryRoot = {folder}/recovery; }}
EXPORT {{ Export_Id = 1; Path = {tree}; Pseudo = /plain; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
    Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }} }}
EXPORT {{ Export_Id = 2; Path = {tree}/squashed; Pseudo = /squashed; Access_Type = RW; Squash = Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }} }}
LOG {{ Default_Log_Level = EVENT; }}
"""


class Ganesha:
    """Exports `tree` as /plain, and a folder of it, where root is nobody, as /squashed."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self._folder = tree, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        (tree / "squashed").mkdir()
        (folder / "recovery").mkdir()
        (folder / "ganesha.conf").write_text(_CONF.format(port=self.port, folder=folder, tree=tree))

    def start(self) -> None:
        words = ("-F", "-f", self._folder / "ganesha.conf", "-L", "STDERR", "-p", self._folder / "pid")
        self._process = Process(["ganesha.nfsd", *words], log=self._folder / "log")
        wait_until(self._listens, timeout=60)

    def _listens(self) -> bool:
        assert self._process.running(), self._process.said()[-3000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    def kill(self) -> None:
        self._process.end(signal.SIGKILL)


@contextlib.contextmanager
def ganesha(tree: Path, folder: Path) -> Iterator[Ganesha]:
    """`tree`: on a file system that gives handles of its files."""
    server = Ganesha(tree, folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
