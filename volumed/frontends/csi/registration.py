"""Known to kubelet without a sidecar: it looks for sockets in its folder and asks what is behind them.

Kubernetes calls this the kubelet plugin registration; usually a second container does it for a driver.
"""

from __future__ import annotations

import logging

from volumed.core.core import Core
from volumed.frontends.csi.proto import pluginregistration_pb2 as registration

_log = logging.getLogger(__name__)
KIND = "CSIPlugin"
VERSIONS = ("1.0.0",)  # of CSI, as kubelet compares it: major 1


class Registration:
    def __init__(self, core: Core) -> None:
        self._core = core

    def get_info(self, _: registration.InfoRequest) -> registration.PluginInfo:
        csi = self._core.settings.csi
        return registration.PluginInfo(
            type=KIND,
            name=csi.driver_name,
            endpoint=self._core.settings.kubelet.endpoint or str(csi.socket),
            supported_versions=VERSIONS,
        )

    def notify_registration_status(
        self, status: registration.RegistrationStatus
    ) -> registration.RegistrationStatusResponse:
        if status.plugin_registered:
            _log.info("registered with kubelet")
        else:
            _log.error("kubelet refused the registration: %s", status.error[:500])
        return registration.RegistrationStatusResponse()
