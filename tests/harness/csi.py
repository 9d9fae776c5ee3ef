"""An orchestrator's side of CSI: any call by its name, its request from keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FileDescriptor

from volumed.frontends.csi.proto import csi_pb2 as csi

MODES = csi.VolumeCapability.AccessMode


def capability(mode: Any = MODES.SINGLE_NODE_WRITER, *, block: bool = False, **mount: Any) -> csi.VolumeCapability:
    access = csi.VolumeCapability.AccessMode(mode=mode)
    if block:
        return csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=access)
    return csi.VolumeCapability(mount=csi.VolumeCapability.MountVolume(**mount), access_mode=access)


class Caller:
    """`caller.NodeGetInfo()`, `caller.CreateVolume(name="data", ...)`; grpc.RpcError as gRPC raises it."""

    def __init__(self, socket: Path, described: FileDescriptor = csi.DESCRIPTOR) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self._methods = {
            method.name: method for service in described.services_by_name.values() for method in service.methods
        }

    def __getattr__(self, name: str) -> Any:
        try:
            method = self._methods[name]
        except KeyError:
            raise AttributeError(name) from None
        request = message_factory.GetMessageClass(method.input_type)
        answer = message_factory.GetMessageClass(method.output_type)
        path = f"/{method.containing_service.full_name}/{name}"
        make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        call = make(path, request.SerializeToString, answer.FromString)

        def ask(sent: Any = None, *, timeout: float = 60.0, **fields: Any) -> Any:
            return call(request(**fields) if sent is None else sent, timeout=timeout)

        return ask

    def close(self) -> None:
        self.channel.close()


@contextmanager
def calling(socket: Path, described: FileDescriptor = csi.DESCRIPTOR) -> Iterator[Caller]:
    caller = Caller(socket, described)
    try:
        yield caller
    finally:
        caller.close()
