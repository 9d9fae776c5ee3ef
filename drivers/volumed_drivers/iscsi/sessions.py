"""Sessions with a target, and the LUNs of it that are devices here: open-iscsi's tools and the kernel's sysfs.

A session scans nothing by itself: a LUN becomes a device when it is asked for, and no other one does. The last device
of a session takes the session with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from volumed.driver import Host
from volumed.driver.secret import Secret, read_secret
from volumed.errors import BackendUnavailable, CommandFailed, HostError, NotFound, PermissionDenied
from volumed_drivers.iscsi.options import Portal

_SESSIONS = Path("/sys/class/iscsi_session")
_CONNECTIONS = Path("/sys/class/iscsi_connection")
# Where open-iscsi keeps what it knows of targets: Debian 12, and later.
_RECORDS = (Path("/etc/iscsi/nodes"), Path("/var/lib/iscsi/nodes"))
_LISTENING = "@ISCSIADM_ABSTRACT_NAMESPACE"
_TIMEOUT = 40.0  # seconds for a login: one attempt of 15, and some patience
_THERE, _NO_RECORD, _NO_SESSION, _REFUSED = 15, 21, 21, 24  # exit statuses: iscsiadm(8)
_HOST = re.compile(r"/host(\d+)/")

# One at a time for each target, whichever backend asks: a login must not meet a logout.
_locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)


class LunPath(NamedTuple):
    """A LUN as seen through one session."""

    session: str
    lun: int
    device: Path  # /dev/sdX
    scsi: Path  # its folder in sysfs


class Credentials(NamedTuple):
    user: str
    password: Secret | None
    target_user: str
    target_password: Secret | None


class Sessions:
    def __init__(self, host: Host, portals: Sequence[Portal], credentials: Credentials, subject: str) -> None:
        self._host, self._portals, self._credentials, self._subject = host, portals, credentials, subject

    def check(self) -> None:
        """Raises BackendUnavailable when open-iscsi's daemon does not listen."""
        if _LISTENING not in Path("/proc/net/unix").read_text():
            raise BackendUnavailable(
                "iscsid does not run", subject=self._subject, hint="install open-iscsi; systemctl enable --now iscsid"
            )

    @staticmethod
    def lock(iqn: str) -> threading.RLock:
        return _locks[iqn]

    # Looking
    @staticmethod
    def of(iqn: str) -> list[str]:
        """Names of the sessions with the target, as sysfs has them."""
        return [name for name in _listed(_SESSIONS) if _read(_SESSIONS / name / "targetname") == iqn]

    def paths(self, iqn: str, lun: int | None = None) -> list[LunPath]:
        """Its LUNs, or one of them, that are devices here."""
        found = [path for session in self.of(iqn) for path in _devices(session)]
        return [path for path in found if lun is None or path.lun == lun]

    # Coming and going
    def open(self, iqn: str, *, every: bool) -> None:
        """A session by the first portal that answers, or by each. Raises PermissionDenied, BackendUnavailable."""
        connected = {self._portal(session) for session in self.of(iqn)}
        failed: list[BackendUnavailable] = []
        for portal in self._portals:
            if portal not in connected:
                try:
                    self._login(iqn, portal)
                except BackendUnavailable as error:
                    failed.append(error)
                    continue
            connected.add(portal)
            if not every:
                return
        if not connected:
            raise failed[0]

    @staticmethod
    def _portal(session: str) -> Portal | None:
        connection = _CONNECTIONS / f"connection{session.removeprefix('session')}:0"
        host, port = _read(connection / "persistent_address"), _read(connection / "persistent_port")
        return Portal(host, int(port)) if host and port.isdecimal() else None

    def _login(self, iqn: str, portal: Portal) -> None:
        self._admin(iqn, portal, "-o", "new")
        self._configure(iqn, portal)
        try:
            self._admin(iqn, portal, "--login", timeout=_TIMEOUT)
        except CommandFailed as error:
            if error.returncode == _THERE:
                return
            self._forget(iqn, portal)
            if error.returncode == _REFUSED:
                raise PermissionDenied(
                    f"{iqn} at {portal} refuses us",
                    subject=self._subject,
                    hint="look at user, password and the initiators that the target knows (initiatorname.iscsi)",
                ) from None
            said = error.stderr.strip().splitlines()[-1:] or [error.text]
            raise BackendUnavailable(f"no session with {iqn} at {portal}: {said[0]}", subject=self._subject) from None

    def _configure(self, iqn: str, portal: Portal) -> None:
        """Written into open-iscsi's own record, as its tool takes a password on the command line alone."""
        wanted = {
            "node.startup": "manual",
            "node.session.scan": "manual",
            "node.session.initial_login_retry_max": "1",
            "node.conn[0].timeo.login_timeout": "15",
            **self._authentication(),
        }
        for record in self._record_files(iqn, portal):
            kept = [line for line in record.read_text().splitlines() if line.partition(" = ")[0] not in wanted]
            end = next((index for index, line in enumerate(kept) if line.startswith("# END RECORD")), len(kept))
            kept[end:end] = [f"{key} = {value}" for key, value in wanted.items()]
            made = record.with_name(f".{record.name}.volumed")
            with open(made, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write("\n".join(kept) + "\n")
            made.replace(record)

    def _authentication(self) -> dict[str, str]:
        user, password, target_user, target_password = self._credentials
        if password is None:
            return {"node.session.auth.authmethod": "None"}
        wanted = {
            "node.session.auth.authmethod": "CHAP",
            "node.session.auth.username": user,
            "node.session.auth.password": read_secret(password, subject=self._subject),
        }
        if target_password is not None:
            wanted["node.session.auth.username_in"] = target_user
            wanted["node.session.auth.password_in"] = read_secret(target_password, subject=self._subject)
        return wanted

    def _record_files(self, iqn: str, portal: Portal) -> list[Path]:
        name = f"{portal.host.strip('[]')},{portal.port}"  # and, when it was discovered, the portal group's number
        found = [path for base in _RECORDS for way in (name, f"{name},*") for path in (base / iqn).glob(way)]
        files = [file for path in found for file in (path.iterdir() if path.is_dir() else (path,)) if file.is_file()]
        if not files:
            raise HostError(f"iscsiadm has made no record of {iqn} below {_RECORDS[0]}", subject=self._subject)
        return files

    def show(self, iqn: str, lun: int) -> None:
        """Make the LUN a device, through each session. Raises NotFound for one that the target does not have."""
        for session in self.of(iqn):
            host = _HOST.search(f"{(_SESSIONS / session).resolve()}/")
            if host is not None and not any(path.session == session for path in self.paths(iqn, lun)):
                _write(Path(f"/sys/class/scsi_host/host{host[1]}/scan"), f"0 0 {lun}")
        if not any(_scsi_lun(path) == lun for session in self.of(iqn) for path in _scsi(session)):
            raise NotFound(
                f"target {iqn} shows us no LUN {lun}",
                subject=self._subject,
                hint="is it mapped to this machine's initiator name?",
            )

    @staticmethod
    def hide(paths: Sequence[LunPath]) -> None:
        for path in paths:
            _write(path.scsi / "delete", "1")

    @staticmethod
    def rescan(paths: Sequence[LunPath]) -> None:
        """Devices take the size that their LUN has now."""
        for path in paths:
            _write(path.scsi / "rescan", "1")

    def close(self, iqn: str) -> None:
        """End each session of ours that has no device left."""
        for session in self.of(iqn):
            portal = self._portal(session)
            if portal in self._portals and not _scsi(session):
                assert portal is not None
                self._admin(iqn, portal, "--logout", timeout=_TIMEOUT, bear=(_NO_SESSION,))
                self._forget(iqn, portal)

    def _forget(self, iqn: str, portal: Portal) -> None:
        """The record, and the secret in it."""
        self._admin(iqn, portal, "-o", "delete", bear=(_NO_RECORD,))

    def _admin(self, iqn: str, portal: Portal, *words: str, timeout: float = 20.0, bear: Sequence[int] = ()) -> None:
        try:
            self._host.run(["iscsiadm", "-m", "node", "-T", iqn, "-p", str(portal), *words], timeout=timeout)
        except CommandFailed as error:
            if error.returncode not in bear:
                raise


def _devices(session: str) -> Iterator[LunPath]:
    for scsi in _scsi(session):
        for name in _listed(scsi / "block"):
            yield LunPath(session, _scsi_lun(scsi), Path("/dev") / name, scsi)


def _scsi(session: str) -> list[Path]:
    """Folders of the LUNs that this session has as devices, or soon."""
    base = _SESSIONS / session / "device"
    return [
        base / target / name
        for target in _listed(base)
        if target.startswith("target")
        for name in _listed(base / target)
        if name.count(":") == 3
    ]


def _scsi_lun(scsi: Path) -> int:
    return int(scsi.name.rpartition(":")[2])


def _listed(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))  # noqa: PTH208 (names alone)
    return []


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except FileNotFoundError:  # it went by itself
        return
    except OSError as error:
        raise HostError(f"cannot be told {text!r}: {error.strerror}", subject=str(path)) from None
