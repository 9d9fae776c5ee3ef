"""What the drivers of Ceph share: the distribution's Python bindings, and a cluster that is asked through a child.

The bindings are C extensions of the system's Python. A virtual environment of the same Python does not see them; so
exactly these modules are taken from where the distribution keeps them, and nothing that lies beside them.

librados can wait for ever, and some calls of librbd spin. So the daemon never loads them: workers
(`volumed_drivers.ceph_worker`) do, one call at a time each, and one that does not answer is killed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from volumed import context, redact
from volumed.driver import Host, Options, Secret, Worker
from volumed.driver.secret import read_secret
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    DeadlineExceeded,
    HostError,
    InUse,
    InvalidRequest,
    NotFound,
    NotSupported,
    OutOfRange,
    PermissionDenied,
    VolumedError,
)

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# Debian and its kin; Fedora and its kin.
_FOLDERS = (
    "/usr/lib/python3/dist-packages",
    f"/usr/lib64/python{_VERSION}/site-packages",
    f"/usr/lib/python{_VERSION}/site-packages",
)


def load(name: Literal["rados", "rbd"]) -> ModuleType:
    """The module; loads the C libraries, so only where they are needed. Raises ConfigError naming the package."""
    if name != "rados":
        load("rados")  # the others import it by its name
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        raise _unusable(name, str(error)) from None
    spec = PathFinder.find_spec(name, _FOLDERS)
    if spec is None or spec.loader is None:
        raise _unusable(name, f"there is none for Python {_VERSION} in {', '.join(_FOLDERS)}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _unusable(name, str(error)) from None
    return sys.modules.setdefault(name, module)


def _unusable(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"Ceph's Python module {name} cannot be used: {reason}",
        hint=f"install python3-{name}, and run volumed with the distribution's own Python",
    )


class CephOptions(Options):
    monitors: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_.:,\[\]/-]*$",
        description="Addresses of the monitors, with commas between; default: those that `conf` names",
    )
    conf: Path = Field(default=Path("/etc/ceph/ceph.conf"), description="Ceph's configuration file, where there is one")
    user: str = Field(
        default="volumed", pattern=r"^[A-Za-z0-9_.-]+$", description="cephx user, without the leading `client.`"
    )
    key: Secret = Field(description="Where its key lies: the bare key, or a keyring")
    timeout: int = Field(default=30, ge=2, le=300, description="Seconds that the cluster may take for one answer")


Ask = Callable[..., Any]

_IN_KEYRING = re.compile(r"^\s*key\s*=\s*(\S+)\s*$", re.MULTILINE)
# What a worker may send back, by its code.
_ERRORS: dict[str, type[VolumedError]] = {
    kind.code: kind
    for kind in (
        *(AlreadyExists, BackendError, BackendUnavailable, CapacityExhausted, ConfigError, InUse, InvalidRequest),
        *(NotFound, NotSupported, OutOfRange, PermissionDenied, HostError),
    )
}
# More than what the cluster may take: the worker's own error says more than that it was killed.
GRACE = 5.0
START_TIMEOUT = 300.0  # seconds, for Python itself: no cluster is asked
LONGEST = 600.0  # seconds to wait for a worker, where the request says nothing
# Workers at a time, and those kept for the next call; each holds some 40 MiB and a connection.
MOST, IDLE = 4, 2


class Cluster:
    """One cluster as one user. Calls may come from several threads: each has a worker to itself meanwhile."""

    def __init__(self, host: Host, options: CephOptions, *, backend: str) -> None:
        self.options = options
        self._host = host
        self._subject = f"backend {backend}"
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(MOST)

    def key(self) -> str:
        """The bare key. Raises ConfigError."""
        text = read_secret(self.options.key, subject=self._subject)
        found = _IN_KEYRING.search(text)
        if found:
            redact.register(found[1])
        return found[1] if found else text

    def settings(self) -> dict[str, str]:
        """Of librados, the key left out."""
        return {"mon_host": self.options.monitors} if self.options.monitors else {}

    def call(self, function: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        """`call("ceph_worker.command", ...)`: a function of a module of this package, in a worker, with what JSON can
        hold; its answer. `timeout`: seconds for all of it; default: what the cluster may take for one answer.

        Raises BackendUnavailable for a cluster that does not answer, and what the function raises.
        """
        with self.session() as ask:
            return ask(function, timeout=timeout, **arguments)

    @contextlib.contextmanager
    def session(self) -> Iterator[Ask]:
        """Several calls by one and the same client: what it locks, it alone can unlock. No `call` is made meanwhile:
        there may be no worker left for it."""
        patience = context.remaining(LONGEST)
        if not self._room.acquire(timeout=patience):
            raise BackendUnavailable("all its workers are waiting for the cluster", subject=self._subject, hint=_LOOK)
        try:
            worker = self._take()
            try:
                yield functools.partial(self._ask, worker)
            finally:
                self._give_back(worker)
        finally:
            self._room.release()

    def _ask(self, worker: Worker, function: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        patience = (timeout or self.options.timeout) + GRACE
        try:
            told = json.loads(worker.ask(json.dumps({"call": function, "arguments": arguments}), timeout=patience))
        except DeadlineExceeded:
            raise DeadlineExceeded("the cluster did not answer in time", subject=self._subject, hint=_LOOK) from None
        if "error" in told:
            if told["broken"]:
                worker.close()
            error = told["error"]
            raise _ERRORS[error["code"]](error["text"], subject=error["subject"] or self._subject, hint=error["hint"])
        return told["answer"]

    def command(self, prefix: str, *, manager: bool = False, **arguments: Any) -> Any:
        """A command of the monitors, or of the manager, as `ceph` sends it; its answer, decoded where it is JSON."""
        return self.call("ceph_worker.command", prefix=prefix, manager=manager, words=arguments)

    def _take(self) -> Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
        # Read for each: a key that was changed is taken up.
        options, key = self.options, self.key()
        conf = "" if options.monitors and not options.conf.exists() else str(options.conf)
        worker = self._host.start_worker("volumed_drivers.ceph_worker")
        hello = {
            "conf": conf,
            "user": options.user,
            "key": key,
            "settings": self.settings(),
            "timeout": options.timeout,
        }
        try:
            worker.ask(json.dumps(hello), timeout=START_TIMEOUT)
        except BaseException:
            worker.close()
            raise
        return worker

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            if worker.alive and len(self._idle) < IDLE:
                self._idle.append(worker)
                return
        worker.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()


_LOOK = "look at it with `ceph status`"
