"""The guest's kernel NFS server, and what can happen to it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import sh

TOP = Path("/srv/nfs")
EXPORTS = Path("/etc/exports")
OPTIONS = "rw,insecure,no_subtree_check"


class NfsServer:
    """Versions 3 and 4 at 127.0.0.1. `exports`: folder below TOP -> its options."""

    def __init__(self) -> None:
        self.exports = {"": "no_root_squash,fsid=0,crossmnt"}
        sh("ip", "link", "set", "lo", "up")
        TOP.mkdir(parents=True, exist_ok=True)
        sh("modprobe", "nfsd")
        if not Path("/proc/fs/nfsd/threads").exists():
            sh("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        sh("rpcbind", "-w")  # version 3 asks it where the rest is
        sh("rpc.statd")
        sh("rpc.mountd", "-N", "2")

    def export(self, name: str, options: str = "no_root_squash") -> Path:
        folder = TOP / name
        folder.mkdir(parents=True, exist_ok=True)
        self.exports[name] = options
        self._write()
        return folder

    def _write(self) -> None:
        lines = [f"{TOP / name} 127.0.0.0/8({OPTIONS},{more})\n" for name, more in self.exports.items()]
        EXPORTS.write_text("".join(lines))
        sh("exportfs", "-ra")

    def start(self) -> None:
        self._write()
        sh("rpc.nfsd", "-V", "3", "-V", "4.2", "--no-udp", "--lease-time", "10", "--grace-time", "10", "8")
        with contextlib.suppress(OSError):  # nobody has anything to reclaim
            Path("/proc/fs/nfsd/v4_end_grace").write_text("Y")

    def stop(self) -> None:
        """As a machine that is switched off in order: connections end, the port refuses."""
        sh("rpc.nfsd", "0")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """As one whose power is gone: packets are dropped, nobody refuses anything."""
        sh("tc", "qdisc", "add", "dev", "lo", "root", "netem", "loss", "100%")
        try:
            yield
        finally:
            sh("tc", "qdisc", "del", "dev", "lo", "root")

    def forget(self, folder: Path) -> None:
        """As one whose files were put back from a backup: the same names, other handles."""
        backup = folder.with_name(f"{folder.name}.backup")
        shutil.copytree(folder, backup, symlinks=True)
        shutil.rmtree(folder)
        backup.rename(folder)
