"""gRPC over a unix socket: the services of a role, errors as the specification's codes, one request context a call.

The synchronous server: core blocks, and a call here is quicker than with grpc.aio.
"""

from __future__ import annotations

import functools
import grp
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from volumed import context
from volumed.core.core import Core
from volumed.driver import Capability
from volumed.errors import ConfigError, NotSupported, VolumedError
from volumed.frontends.csi.capabilities import available
from volumed.frontends.csi.controller import Controller
from volumed.frontends.csi.group_controller import GroupController
from volumed.frontends.csi.identity import Identity
from volumed.frontends.csi.node import Node
from volumed.frontends.csi.proto import csi_pb2 as csi
from volumed.frontends.csi.proto import pluginregistration_pb2 as registration
from volumed.frontends.csi.registration import Registration
from volumed.frontends.csi.snapshot_metadata import SnapshotMetadata
from volumed.frontends.server import remove_stale
from volumed.frontends.statuses import status_of

_log = logging.getLogger(__name__)

# What a caller's patience loses on the way: the answer must be there before it ends.
MARGIN = 0.1
SHUTDOWN_TIMEOUT = 5.0
MAX_SOCKET_PATH = 107  # sun_path of unix(7), less its NUL
_CONTROLLER = ("Controller", "GroupController", "SnapshotMetadata")
ROLES: Mapping[str, tuple[str, ...]] = {
    "all": ("Identity", *_CONTROLLER, "Node"),
    "controller": ("Identity", *_CONTROLLER),
    "node": ("Identity", "Node"),
}
_CLASSES: Mapping[str, Callable[[Core], object]] = {
    "Identity": Identity,
    "Controller": Controller,
    "GroupController": GroupController,
    "SnapshotMetadata": SnapshotMetadata,
    "Node": Node,
}

_Handler = Callable[[Any], Any]


class GrpcServer:
    """Services on a socket that only root, or a named group, may use."""

    def __init__(self, core: Core, path: Path, *, group: str, services: Mapping[ServiceDescriptor, object]) -> None:
        self._core = core
        self._path = path
        self._group = group
        # One backend that hangs fills its own share, never all; threads are made as they are needed.
        self._server = grpc.server(ThreadPoolExecutor(core.backends.room + 32, thread_name_prefix="csi"))
        for descriptor, service in services.items():
            handlers = {method.name: self._handler(method, service) for method in descriptor.methods}
            generic = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
            self._server.add_generic_rpc_handlers((generic,))

    def start(self) -> None:
        """Listening on return. Raises ConfigError when the socket cannot be made or belongs to somebody who answers."""
        if len(os.fsencode(self._path)) > MAX_SOCKET_PATH:
            raise ConfigError(f"its path is longer than {MAX_SOCKET_PATH} bytes", subject=f"socket {self._path}")
        # gRPC makes the socket as the umask says, and there is an instant before we can change that: the folder is
        # what keeps others out.
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_stale(self._path)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError:
            raise ConfigError("cannot listen there", subject=f"socket {self._path}") from None
        self._path.chmod(0o600)
        if self._group:
            self._admit(self._group)
        self._server.start()

    def _admit(self, group: str) -> None:
        try:
            number = grp.getgrnam(group).gr_gid
        except KeyError:
            raise ConfigError(
                f"there is no group {group!r}",
                subject=f"socket {self._path}",
                hint=f"make it: groupadd --system {group}",
            ) from None
        for path, mode in ((self._path.parent, 0o710), (self._path, 0o660)):
            os.chown(path, -1, number)
            path.chmod(mode)

    def stop(self) -> None:
        """Takes no more calls; those that run have a few seconds, and what they began goes on by the journal."""
        self._server.stop(SHUTDOWN_TIMEOUT).wait(SHUTDOWN_TIMEOUT + 1.0)
        self._path.unlink(missing_ok=True)

    def _handler(self, method: MethodDescriptor, service: object) -> grpc.RpcMethodHandler[Any, Any]:
        run = getattr(service, _snake_case(method.name))
        request = message_factory.GetMessageClass(method.input_type)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                functools.partial(self._stream, method.name, run), request.FromString, _serialize
            )
        return grpc.unary_unary_rpc_method_handler(
            functools.partial(self._unary, method.name, run), request.FromString, _serialize
        )

    def _unary(self, name: str, run: _Handler, request: Message, call: grpc.ServicerContext) -> Message:
        with self._served(name, call):
            answer: Message = run(request)
            return answer

    def _stream(self, name: str, run: _Handler, request: Message, call: grpc.ServicerContext) -> Iterator[Message]:
        with self._served(name, call):
            yield from run(request)

    def _served(self, name: str, call: grpc.ServicerContext) -> _Call:
        return _Call(self._core, name, call)


class _Call:
    """One call: its id and deadline, its errors as gRPC's, its time in the metrics. A request's fields are never
    logged: some are secrets."""

    def __init__(self, core: Core, name: str, call: grpc.ServicerContext) -> None:
        self._core = core
        self._name = name
        self._call = call
        patience = call.time_remaining()
        limit = core.settings.operation_timeout
        self._timeout = limit if patience is None else max(0.0, min(limit, patience - MARGIN))

    def __enter__(self) -> None:
        self._begun = time.perf_counter()
        self._request = context.request(timeout=self._timeout)
        self._identifier = self._request.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code, text = self._explain(error)
        self._request.__exit__(None, None, None)
        self._core.metrics.request("csi", self._name, code.lower(), time.perf_counter() - self._begun)
        if error is not None and not isinstance(error, GeneratorExit):
            self._call.abort(grpc.StatusCode[code], text)

    def _explain(self, error: BaseException | None) -> tuple[str, str]:
        if error is None or isinstance(error, GeneratorExit):
            return "OK", ""
        extra = {"endpoint": self._name}
        if isinstance(error, VolumedError):
            _log.info("%s refused: %s", self._name, error, extra=extra)
            return _code(error, self._name, self._core), str(error)
        _log.error("%s failed", self._name, exc_info=error, extra=extra)
        return "INTERNAL", f"a bug of volumed: see its log for request {self._identifier}"


# Calls that are all about one ability. Where no backend has it, this plugin does not have the call.
_NEEDED: Mapping[str, Capability] = {
    "CreateSnapshot": Capability.SNAPSHOT,
    "CreateVolumeGroupSnapshot": Capability.GROUP_SNAPSHOT,
    "GetMetadataAllocated": Capability.CHANGED_BLOCKS,
    "GetMetadataDelta": Capability.CHANGED_BLOCKS,
    "ControllerExpandVolume": Capability.EXPAND,
    "NodeExpandVolume": Capability.EXPAND,
}


def _code(error: VolumedError, name: str, core: Core) -> str:
    if isinstance(error, NotSupported) and name in _NEEDED and _NEEDED[name] not in available(core):
        return "UNIMPLEMENTED"
    return status_of(error).grpc


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def csi_server(core: Core) -> GrpcServer:
    """The services of the configured role."""
    described = csi.DESCRIPTOR.services_by_name
    services = {described[name]: _CLASSES[name](core) for name in ROLES[core.settings.csi.role]}
    return GrpcServer(core, core.settings.csi.socket, group=core.settings.csi.group, services=services)


def registration_server(core: Core) -> GrpcServer:
    """kubelet's own: a socket of our name in its folder."""
    descriptor = registration.DESCRIPTOR.services_by_name["Registration"]
    path = core.settings.kubelet.registry / f"{core.settings.csi.driver_name}-reg.sock"
    return GrpcServer(core, path, group="", services={descriptor: Registration(core)})
