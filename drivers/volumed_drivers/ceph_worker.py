"""A process that holds a connection to a Ceph cluster and does what it is asked, one call at a time.

The first line it reads says how to connect; each other one is a call of a function of this package, whose first
argument is the `Connection`. Errors travel by their code. It is killed when it does not answer (`ceph.Cluster`).
"""

from __future__ import annotations

import base64
import errno
import functools
import importlib
import json
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from volumed.answering import answer_all
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    HostError,
    InUse,
    NotFound,
    OutOfRange,
    PermissionDenied,
    VolumedError,
)
from volumed_drivers.ceph import load

_BY_ERRNO: dict[int, type[VolumedError]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EBUSY: InUse,
    errno.EDQUOT: CapacityExhausted,
    errno.ENOSPC: CapacityExhausted,
    errno.EPERM: PermissionDenied,
    errno.EACCES: PermissionDenied,
    errno.EFBIG: OutOfRange,
    errno.ETIMEDOUT: BackendUnavailable,
    errno.ESHUTDOWN: BackendUnavailable,
    errno.ENOTCONN: BackendUnavailable,
}


class Connection:
    """Made at the first use: what only looks at this machine needs no cluster."""

    def __init__(self, hello: dict[str, Any]) -> None:
        self.user: str = hello["user"]
        self.key: str = hello["key"]
        self.timeout: int = hello["timeout"]
        self._conf, self._settings = hello["conf"], hello["settings"]
        self._contexts: dict[tuple[str, str], Any] = {}

    @property
    def connected(self) -> bool:
        return "cluster" in self.__dict__

    @cached_property
    def cluster(self) -> Any:
        rados = load("rados")
        if self._conf and not Path(self._conf).exists():
            raise ConfigError(
                f"{self._conf} is not there", hint="name the monitors of the cluster, or its configuration file"
            )
        seconds = str(self.timeout)
        made = rados.Rados(
            name=f"client.{self.user}",
            **({"conffile": self._conf} if self._conf else {}),
            conf={
                **self._settings,
                "key": self.key,
                "keyring": "",
                "client_mount_timeout": seconds,
                "rados_mon_op_timeout": seconds,
                "rados_osd_op_timeout": seconds,
                # Clones whose parents need no protection, and may go.
                "rbd_default_clone_format": "2",
                "admin_socket": "",
                "log_file": "",
            },
        )
        try:
            made.connect(timeout=self.timeout)
        except rados.Error as error:
            raise self._unreachable(error, made.conf_get("mon_host") or "") from None
        return made

    def _unreachable(self, error: Any, monitors: str) -> VolumedError:
        number = abs(error.errno or 0)
        if number in (errno.EPERM, errno.EACCES) or not _is_key(self.key):
            return PermissionDenied(
                f"the cluster refuses the key of client.{self.user}",
                hint=f"compare it with `ceph auth get client.{self.user}`",
            )
        return BackendUnavailable(
            f"no monitor answers at {monitors or 'no address: none is configured'}: {os.strerror(number)}",
            hint="look at the network between, and at the cluster with `ceph status`",
        )

    def context(self, pool: str, namespace: str = "") -> Any:
        """Of a pool. A full one refuses at once, instead of holding every caller until it has room; and what makes
        room is let through. Raises NotFound."""
        found = self._contexts.get((pool, namespace))
        if found is None:
            try:
                found = self.cluster.open_ioctx(pool)
            except load("rados").ObjectNotFound:
                raise NotFound(
                    f"there is no pool {pool}", hint=f"make it with `ceph osd pool create {pool}`, or name another"
                ) from None
            found.set_namespace(namespace)
            found.set_osdmap_full_try()
            self._contexts[pool, namespace] = found
        return found

    def ask(self, prefix: str, *, manager: bool = False, **words: Any) -> Any:
        """A command of the monitors, or of the manager."""
        question = json.dumps({"prefix": prefix, "format": "json", **words})
        send = self.cluster.mgr_command if manager else self.cluster.mon_command
        number, told, text = send(question, b"", timeout=self.timeout)
        number = abs(number)  # a manager's is positive when it did not answer
        if number == errno.ETIMEDOUT:
            who = "manager" if manager else "cluster"
            raise BackendUnavailable(f"`{prefix}`: the {who} did not answer within {self.timeout} s")
        if number != 0:
            raise _error_of(number, f"`{prefix}` failed: {text or os.strerror(number)}")
        try:
            return json.loads(told)
        except ValueError:
            return told.decode(errors="backslashreplace")

    def state(self) -> str:
        """What may be the reason that it does not answer; as the monitors tell it."""
        try:
            osds = self.ask("osd stat")
            checks = self.ask("health").get("checks", {})
        except Exception as error:  # (this very thing explains an error)
            return f"nor do its monitors ({error})"
        told = [check["summary"]["message"] for check in checks.values()]
        up = f"{osds['num_up_osds']} of {osds['num_osds']} OSDs are said to be up"
        return "; ".join([up, *told])


def _is_key(text: str) -> bool:
    """Type, time and length of a secret, and the secret: in base64."""
    try:
        return len(base64.b64decode(text, validate=True)) >= 28
    except ValueError:
        return False


def command(connection: Connection, *, prefix: str, manager: bool, words: dict[str, Any]) -> Any:
    return connection.ask(prefix, manager=manager, **words)


def _error_of(number: int, text: str) -> VolumedError:
    kind = _BY_ERRNO.get(number, BackendError)
    return kind(text, hint="it is too large for this cluster" if kind is OutOfRange else "")


def _describe(error: BaseException, connection: Connection) -> dict[str, Any]:
    number = getattr(error, "errno", None)
    if isinstance(error, VolumedError):
        described = error
    elif isinstance(number, int) and not isinstance(error, OSError):  # rados.Error, rbd.Error
        number, text = abs(number), str(error)
        if number == errno.ETIMEDOUT:
            text = f"the cluster did not answer within {connection.timeout} s: {connection.state()}"
        elif number == errno.ESHUTDOWN:
            text = "this client was cut off (blocklisted); the next call connects anew"
        described = _error_of(number, text)
    elif isinstance(error, OSError):
        described = HostError(f"{error.filename or ''}: {error.strerror}")
    else:
        described = BackendError(f"{type(error).__name__}: {error}")
    return {
        "error": {
            "code": described.code,
            "text": described.text,
            "subject": described.subject,
            "hint": described.hint,
        },
        # Nothing good comes any more from the connection of a client that was cut off, or refused.
        "broken": isinstance(described, BackendUnavailable) or not connection.connected,
    }


def _respond(connection: Connection, line: str) -> str:
    asked = json.loads(line)
    module, _, name = asked["call"].partition(".")
    try:
        function = getattr(importlib.import_module(f"volumed_drivers.{module}"), name)
        told = {"answer": function(connection, **asked["arguments"])}
    except Exception as error:  # (whatever it is, whoever asked must know)
        told = _describe(error, connection)
    return json.dumps(told)


if __name__ == "__main__":
    hello = json.loads(sys.stdin.readline())
    answer_all(functools.partial(_respond, Connection(hello)), greeting="{}")
