"""A folder per volume on a Gluster volume, mounted by its FUSE client.

    HOST:VOLUME/PATH/<id>/data    bound to the volume's path

One client serves all volumes of a backend, and outlives the daemon. How the folders are kept, and how sizes are
enforced, is told in `remote_folders`.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from volumed import context
from volumed.driver import Host, MountEntry, Options
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    HostError,
    MountFailed,
    NotFound,
    VolumedError,
)
from volumed.model import Handle
from volumed_drivers.remote_folders import RemoteFolderOptions, RemoteFolders

_FSTYPE = "fuse.glusterfs"
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]*")
# What a bind mount can have of its own; the rest would be the client's, which all volumes share.
_PER_MOUNT = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "ro", "rw"})


class GlusterOptions(RemoteFolderOptions):
    servers: tuple[str, ...] = Field(
        description="Hosts of the trusted pool: the first that answers tells the client where the bricks are"
    )
    volume: str = Field(description="The Gluster volume", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")

    @field_validator("servers")
    @classmethod
    def _hosts(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [server for server in servers if not _HOST.fullmatch(server)]
        if wrong or not servers:
            raise ValueError(f"{wrong[0]!r} is no host" if wrong else "name at least one host")
        return servers


class GlusterDriver(RemoteFolders):
    BackendOptions: ClassVar[type[Options]] = GlusterOptions
    # Gluster names all by its path; its client knows ACLs only if it is to check modes itself, and capabilities only if
    # it is to ask for them before each write.
    cannot_hold: ClassVar[frozenset[str]] = frozenset({"longest-paths", "acls", "capabilities", "flags"})

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, GlusterOptions)
        self._options = options

    def _identity(self) -> str:
        return self._server()

    def _server(self) -> str:
        return f"Gluster volume {self._options.volume} of {', '.join(self._options.servers)}"

    def _on_server(self, handle: Handle) -> str:
        return "/" + "/".join(part for part in (self._below, handle, "data") if part)

    # The client
    def _helper(self, top: Path) -> str:
        return f"gluster-{self.backend}-{top.name}"

    def _attach(self, top: Path) -> None:
        argv: list[str | Path] = ["glusterfs", "--no-daemon", "--log-file=/dev/stderr", "--log-level=WARNING"]
        argv += [f"--volfile-server={server}" for server in self._options.servers]
        argv += [f"--volfile-id={self._options.volume}", "--process-name=fuse", top]
        name = self._helper(top)
        self.host.start_helper(name, argv)
        ends = time.monotonic() + context.remaining(self._timeout)
        while not self._answers(top):
            helper = self.host.helper(name)
            ended = helper is None or not helper.running
            if ended or time.monotonic() > ends:
                said = self.host.helper_log(name, limit=20_000)
                self._detach(top)
                raise self._explained(said, ended=ended)
            time.sleep(0.02)

    def _answers(self, top: Path) -> bool:
        """The mount is there before the client has found its bricks, and for a moment when it finds no server."""
        if not self.host.is_mountpoint(top):
            return False
        try:
            self.host.tree_status(top, timeout=self._timeout)
        except (MountFailed, DeadlineExceeded):
            return False
        return self._attached(top)

    def _explained(self, said: str, *, ended: bool) -> VolumedError:
        """What the client logs, in the words of whoever has to do something about it."""
        subject = f"backend {self.backend}"
        names = ", ".join(self._options.servers)
        if "failed to get the 'volume file'" in said or "failed to fetch volume file" in said:
            return ConfigError(
                f"{names} knows no volume {self._options.volume}", subject=subject, hint="`gluster volume list` there"
            )
        if "DNS resolution failed" in said or "getaddrinfo failed" in said:
            return BackendUnavailable(f"the name of {names} cannot be resolved", subject=subject, hint="look at DNS")
        if "Connection refused" in said or "received signum (1)" in said:  # it ends itself so when nobody is there
            return BackendUnavailable(
                f"no glusterd listens at {names}", subject=subject, hint="start it there, or look at the network"
            )
        if not ended:
            return self._silent()
        last = said.strip().rpartition("\n")[2] or "it said nothing"
        return BackendUnavailable(f"the client of {self._server()} ended: {last}", subject=subject)

    def _attached(self, top: Path) -> bool:
        helper = self.host.helper(self._helper(top))
        return helper is not None and helper.running and self._entry(top) is not None

    def _detach(self, top: Path) -> None:
        with contextlib.suppress(DeadlineExceeded):  # it goes with its client
            self.host.unmount_network(top, timeout=5.0, force=True)
        with contextlib.suppress(HostError):
            self.host.stop_helper(self._helper(top))

    def _renew(self) -> None:
        """A client that runs finds its bricks again by itself, and other volumes hang on it."""
        if self._attached(self._top):
            raise BackendUnavailable(
                f"{self._server()}: its bricks are away",
                subject=f"backend {self.backend}",
                hint="gluster volume status",
            )
        super()._renew()

    def needs_remount(self, handle: Handle, target: Path, number: int) -> bool:
        """Not while its own client runs, which finds its bricks again. One that was started since is another."""
        mine, client = self._entry(target), self._entry(self._top)
        served = mine is not None and client is not None and mine.device == client.device
        return number == errno.ESTALE or not (served and self._attached(self._top))

    def _entry(self, target: Path) -> MountEntry | None:
        table = reversed(self.host.mounts())
        return next((entry for entry in table if entry.target == target and entry.fstype == _FSTYPE), None)

    # Mounting
    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        words = [word for option in options for word in option.split(",") if word]
        for word in words:
            if word not in _PER_MOUNT:
                raise MountFailed(f"a volume on Gluster cannot take the option {word!r}", subject=str(target))
        data = self._ready() / handle / "data"
        try:
            self.host.bind_network(data, target, readonly=readonly, options=words, timeout=self._timeout)
        except DeadlineExceeded:
            raise self._silent() from None
        except MountFailed as error:
            if error.errno == errno.ENOENT and not self._there(data):
                raise NotFound(
                    "its folder is gone", subject=f"backend {self.backend}", hint="is there a backup?"
                ) from None
            raise

    def unmount(self, handle: Handle, target: Path) -> None:
        self.host.unmount_network(target)

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        entry = self._entry(target)
        return entry is not None and entry.root.endswith(f"/{handle}/data")
