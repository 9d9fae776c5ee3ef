"""What this plugin is."""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import BoolValue

from volumed import __version__
from volumed.core.core import Core
from volumed.frontends.csi import capabilities
from volumed.frontends.csi.proto import csi_pb2 as csi


class Identity:
    def __init__(self, core: Core) -> None:
        self._core = core

    def get_plugin_info(self, _: csi.GetPluginInfoRequest) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=self._core.settings.csi.driver_name, vendor_version=__version__)

    def get_plugin_capabilities(self, _: csi.GetPluginCapabilitiesRequest) -> csi.GetPluginCapabilitiesResponse:
        return csi.GetPluginCapabilitiesResponse(capabilities=capabilities.plugin(self._core))

    def probe(self, _: csi.ProbeRequest) -> csi.ProbeResponse:
        """Ready while it serves: a backend that is away must not have the volumes of the others taken away."""
        return csi.ProbeResponse(ready=BoolValue(value=True))
