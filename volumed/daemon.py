"""The daemon: builds everything, serves it, and stops in order.

Mounts outlive it. Stopping, restarting and upgrading disturb no container; `--unmount-all` is for the machine's
shutdown, when the containers have stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from volumed import __version__, logs, notify
from volumed.config import ROLES, Settings, default_settings, load
from volumed.core.consumers.docker import DockerSource
from volumed.core.consumers.podman import PodmanSource
from volumed.core.consumers.source import ConsumerSource
from volumed.core.core import Core, ledger_path
from volumed.core.drivers import DriverRegistry
from volumed.errors import ConfigError, DriverLoadError, IntegrityError, VolumedError
from volumed.frontends.activation import inherited_sockets
from volumed.frontends.admin.lazy import LazyApp
from volumed.frontends.docker.app import DockerApp
from volumed.frontends.server import UnixServer
from volumed.host.linux import LinuxHost
from volumed.migration.migrations import Migrations
from volumed.migration.writers.containers import stopping_writers
from volumed.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from volumed.frontends.csi.server import GrpcServer

_log = logging.getLogger(__name__)

DEFAULT_CONFIG = Path("/etc/volumed/volumed.toml")
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: only a person can help, a restart cannot


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    os.umask(0o022)  # every mode is said where it matters; nobody's shell takes part in it
    try:
        settings = _settings(arguments)
        logs.configure(level=settings.log.level, format=settings.log.format)
        return _run(settings, arguments)
    except (ConfigError, IntegrityError, DriverLoadError) as error:
        print(f"volumed: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except VolumedError as error:
        print(f"volumed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="volumed", description="Persistent volume manager for containers.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", type=Path, help=f"settings; default {DEFAULT_CONFIG}, if it exists")
    where.add_argument("--root", type=Path, help="try it out: keep everything, sockets too, below this folder")
    parser.add_argument("--role", choices=ROLES, help="serve CSI in this role, whatever the settings say")
    parser.add_argument("--check", action="store_true", help="read the settings, say what is wrong, and end")
    parser.add_argument(
        "--unmount-all", action="store_true", help="unmount every volume that no process holds, and end"
    )
    parser.add_argument("--version", action="version", version=f"volumed {__version__}")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.config:
        settings = load(arguments.config)
    elif arguments.root:
        settings = default_settings(arguments.root.absolute())
    else:
        settings = load(DEFAULT_CONFIG) if DEFAULT_CONFIG.exists() else default_settings()
    csi = settings.csi
    if arguments.role:
        csi = msgspec.structs.replace(csi, enabled=True, role=arguments.role)
    if endpoint := os.environ.get("CSI_ENDPOINT"):
        csi = msgspec.structs.replace(csi, enabled=True, socket=_endpoint(endpoint))
    return msgspec.structs.replace(settings, csi=csi)


def _endpoint(text: str) -> Path:
    """Where an orchestrator that starts its plugins wants the socket (CSI specification, "Configuration and
    Operation"). Raises ConfigError."""
    path = text.removeprefix("unix://").removeprefix("unix:")
    if not path.startswith("/"):
        raise ConfigError(f"{text!r} is no unix socket", subject="CSI_ENDPOINT", hint="write unix:///run/csi.sock")
    return Path(path)


def _run(settings: Settings, arguments: argparse.Namespace) -> int:
    if arguments.check:
        print("the settings are good")
        return 0
    if os.geteuid() != 0 and not arguments.root:
        raise ConfigError(
            "volumed mounts file systems and so must run as root",
            hint="use sudo, or try it out in a folder of your own: volumed --root ./try",
        )
    for folder in (settings.state_dir, settings.runtime_dir):
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        store = SqliteStore(ledger_path(settings))
        cleanup.callback(store.close)
        host = LinuxHost(settings.runtime_dir)
        core = Core(
            settings=settings,
            store=store,
            host=host,
            drivers=DriverRegistry.installed(),
            sources=_sources(settings, host),
        )
        cleanup.callback(core.stop)
        migrations = Migrations(core, stop_writers=stopping_writers(core))
        if arguments.unmount_all:
            core.recover(migrations.recover)
            core.reconciler.release_all()
            return 0
        core.recover(migrations.recover)
        core.start()
        migrations.start()
        cleanup.callback(migrations.stop)
        asyncio.run(_serve(core, migrations))
    _log.info("stopped; mounted volumes stay mounted")
    return leave(0)


def leave(code: int) -> NoReturn:
    """End now. Python would wait for every worker, and one that waits for a storage that hangs never ends."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _sources(settings: Settings, host: LinuxHost) -> list[ConsumerSource]:
    sources: list[ConsumerSource] = []
    names = frozenset({settings.docker.socket.stem})
    if settings.engines.docker.enabled:
        sources.append(DockerSource(settings.engines.docker.socket, driver_names=names))
    if settings.engines.podman.enabled:
        podman = settings.engines.podman
        sources.append(PodmanSource(host, podman.command, arguments=podman.arguments, driver_names=names))
    return sources


async def _serve(core: Core, migrations: Migrations) -> None:
    settings = core.settings
    inherited = inherited_sockets()
    servers = [
        UnixServer(
            LazyApp(core, migrations),
            settings.admin.socket,
            group=settings.admin.group,
            inherited=inherited.get("admin"),
        )
    ]
    if settings.docker.enabled:
        servers.append(
            UnixServer(
                DockerApp(core), settings.docker.socket, group=settings.docker.group, inherited=inherited.get("docker")
            )
        )
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    for server in servers:
        await server.start()
    remote = _grpc_servers(core)
    for remote_server in remote:
        remote_server.start()
    notify.ready(f"serving {len(core.backends.all())} backends")
    watchdog = asyncio.create_task(notify.keep_watchdog())
    _greet(core)
    await stopping.wait()
    notify.stopping()
    core.events.close()  # who follows them would hold the stop
    watchdog.cancel()
    for remote_server in remote:
        await loop.run_in_executor(None, remote_server.stop)
    await asyncio.gather(*(server.stop() for server in servers))


def _grpc_servers(core: Core) -> list[GrpcServer]:
    """gRPC costs a third of a second and 20 MiB: only whoever serves CSI has it."""
    if not core.settings.csi.enabled:
        return []
    from volumed.frontends.csi.server import csi_server, registration_server  # noqa: PLC0415

    registers = core.settings.kubelet.registration and core.settings.csi.role != "controller"
    return [csi_server(core), *([registration_server(core)] if registers else [])]


def _greet(core: Core) -> None:
    """For whoever started it by hand; under systemd the log says it."""
    settings = core.settings
    backends = ", ".join(
        f"{backend.name} ({backend.driver_name}{'' if backend.health.ok else ', unavailable'})"
        for backend in core.backends.all()
    )
    _log.info("volumed %s is ready; backends: %s", __version__, backends)
    if not sys.stdout.isatty() and "VOLUMED_GREET" not in os.environ:
        return
    lines = [f"volumed {__version__} is ready. Its sockets:", f"  admin   {settings.admin.socket}"]
    prefix = "volumectl"
    if settings.csi.enabled:
        lines.append(f"  CSI     {settings.csi.socket} ({settings.csi.role})")
    if settings.docker.enabled:
        name = settings.docker.socket.stem
        lines += [
            f"  Docker  {settings.docker.socket}",
            "Type next, in another shell:",
            f"  docker volume create -d {name} -o size=1g data",
            "  docker run --rm -it -v data:/data busybox",
            f"  {prefix} who data",
        ]
    else:
        prefix += f" --socket {settings.admin.socket}"
        lines += ["Type next, in another shell:", f"  {prefix} create data", f"  {prefix} ls", f"  {prefix} doctor"]
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
