"""A folder per volume on an NFS export, mounted by the kernel.

    SERVER:EXPORT/PATH/<id>/data    mounted at the volume's path, with the options of backend and volume

How the folders are kept, and how sizes are enforced, is told in `remote_folders`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from volumed.driver import Host, MountEntry, Options
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    MountFailed,
    NotFound,
    PermissionDenied,
    VolumedError,
)
from volumed.model import Handle
from volumed_drivers.remote_folders import RemoteFolderOptions, RemoteFolders

# Of the backend's own mount: it sees at once what other nodes make, and its calls fail one day though a kill did not
# reach them. Data never goes through it, so what `soft` can lose it cannot lose.
_TOP_OPTIONS = ("soft", "lookupcache=none")


class NfsOptions(RemoteFolderOptions):
    server: str = Field(description="Name or address of the server", pattern=r"^[A-Za-z0-9][A-Za-z0-9.:%_-]*$")
    export: str = Field(description="What the server exports: /srv/volumes", pattern=r"^/[^\x00\n]*$")
    nfsvers: Literal["4.2", "4.1", "4.0", "4", "3"] = Field(default="4.2", description="Version of the protocol")
    sec: Literal["sys", "krb5", "krb5i", "krb5p"] = Field(default="sys", description="How users are proven")
    port: int | None = Field(default=None, ge=1, le=65535, description="Port of the server; 2049 if left out")
    mount_options: str = Field(default="", description="Further words for mount, with commas: rsize=1048576,nconnect=4")


class NfsDriver(RemoteFolders):
    BackendOptions: ClassVar[type[Options]] = NfsOptions
    # Of attributes NFS knows those of users alone (RFC 8276), and of ACLs only what another kind would become.
    cannot_hold: ClassVar[frozenset[str]] = frozenset({"trusted-xattrs", "capabilities", "acls", "flags"})

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, NfsOptions)
        self._options = options
        name = f"[{options.server}]" if ":" in options.server else options.server
        self._exported = f"{name}:/{options.export.strip('/')}"
        words = [f"nfsvers={options.nfsvers}", f"sec={options.sec}", "retry=0"]
        if options.port is not None:
            words.append(f"port={options.port}")
        self._words = (*words, *(word for word in options.mount_options.split(",") if word))

    def _identity(self) -> str:
        return " ".join((self._exported, *self._words))

    def _server(self) -> str:
        return f"NFS server {self._exported}"

    def _source(self, handle: Handle) -> str:
        return "/".join(part for part in (self._exported.rstrip("/"), self._below, handle, "data") if part)

    # The backend's own mount
    def _attach(self, top: Path) -> None:
        try:
            self._mount(self._exported, top, (*self._words, *_TOP_OPTIONS), readonly=False)
        except NotFound:
            raise ConfigError(
                f"the server does not export {self._options.export}",
                subject=f"backend {self.backend}",
                hint=f"`showmount -e {self._options.server}` lists what it does, and `exportfs -v` on it",
            ) from None

    def _attached(self, top: Path) -> bool:
        return self._entry(top) is not None

    def _detach(self, top: Path) -> None:
        with contextlib.suppress(DeadlineExceeded):  # the kernel goes on with it
            self.host.unmount_network(top, timeout=5.0, force=True)

    def _entry(self, target: Path) -> MountEntry | None:
        table = reversed(self.host.mounts())
        return next((entry for entry in table if entry.target == target and entry.fstype.startswith("nfs")), None)

    # Mounting
    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        self._mount(self._source(handle), target, (*self._words, *options), readonly=readonly)

    def _mount(self, source: str, target: Path, options: Sequence[str], *, readonly: bool) -> None:
        try:
            self.host.mount_network(
                source, target, fstype="nfs", options=options, readonly=readonly, timeout=self._timeout
            )
        except DeadlineExceeded:
            raise self._silent() from None
        except MountFailed as error:
            raise self._explained(error) from None

    def _explained(self, error: MountFailed) -> VolumedError:
        """What mount.nfs(8) says in the words of errno, in those of whoever has to do something about it."""
        subject, server = f"backend {self.backend}", self._options.server
        unresolved = BackendUnavailable(
            f"the name {server} cannot be resolved", subject=subject, hint="look at DNS, or write its address"
        )
        reasons: dict[str, VolumedError] = {
            "Failed to resolve": unresolved,
            "Resource temporarily unavailable": unresolved,  # no name server answers
            "No route to host": BackendUnavailable(
                f"there is no route to {server}", subject=subject, hint="look at network and firewalls"
            ),
            "Network is unreachable": BackendUnavailable(
                f"there is no route to {server}", subject=subject, hint="look at network and firewalls"
            ),
            "Connection refused": BackendUnavailable(
                f"no NFS server listens at {server}, port {self._options.port or 2049}",
                subject=subject,
                hint="start it, or set the port",
            ),
            "timed out": self._silent(),
            "No such file or directory": NotFound("its folder is gone", subject=subject, hint="is there a backup?"),
            "Not a directory": NotFound("its folder is gone", subject=subject, hint="is there a backup?"),
            "access denied": PermissionDenied(
                f"{self._server()} does not let this machine mount it",
                subject=subject,
                hint="export it to this machine's address",
            ),
            "not supported": ConfigError(
                f"{server} does not speak NFS {self._options.nfsvers} with sec={self._options.sec}",
                subject=subject,
                hint="set nfsvers, or sec",
            ),
            "Stale file handle": BackendUnavailable(f"{self._server()}: stale file handle", subject=subject),
        }
        return next((told for words, told in reasons.items() if words in error.text), error)

    def unmount(self, handle: Handle, target: Path) -> None:
        self.host.unmount_network(target)

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        """By the mount table, where nobody waits; the id is in no other's path."""
        entry = self._entry(target)
        return entry is not None and entry.source.endswith(f"/{handle}/data")

    def _on_server(self, handle: Handle) -> str:
        return f"/{self._source(handle).partition(':/')[2]}"
