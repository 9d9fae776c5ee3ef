"""volumed.toml, read once into frozen settings. An error names file, line and key, and the nearest right one."""

from __future__ import annotations

import difflib
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from volumed.driver import Capability
from volumed.driver.secret import check_reference
from volumed.errors import ConfigError, InvalidRequest
from volumed.host import filesystems
from volumed.units import parse_duration, parse_size

T = TypeVar("T", bound=msgspec.Struct)

DEFAULT_TARGET_ROOTS = tuple(
    map(
        Path,
        (
            "/var/lib/kubelet",  # Kubernetes, k3s
            "/var/lib/k0s/kubelet",
            "/var/snap/microk8s/common/var/lib/kubelet",
            "/local/csi",  # Nomad, inside its plugin's task
            "/opt/nomad",
            "/var/lib/nomad",
            "/data",  # Swarm, inside its managed plugin
            "/var/lib/mesos",
        ),
    )
)
MAX_VOLUMES = 10_000  # far beyond what a node can bear
ROLES = ("all", "controller", "node")
# CSI: a domain name's form; Kubernetes: 63 characters at most
_DRIVER_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?")
_BACKEND_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class DockerSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    socket: Path = Path("/run/docker/plugins/volumed.sock")
    group: str = ""  # who may use it besides root
    enabled: bool = True


class AdminSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    socket: Path = Path("/run/volumed/admin.sock")
    group: str = ""


class CsiSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    enabled: bool = False
    socket: Path = Path("/run/volumed/csi/csi.sock")
    group: str = ""
    driver_name: str = "volumed.csi"
    role: str = "all"
    # One controller beside each node, for this node's storage alone: growing is then left to the nodes.
    node_deployment: bool = False
    # Below these, and nowhere else, an orchestrator may ask for a volume.
    target_roots: tuple[Path, ...] = DEFAULT_TARGET_ROOTS
    max_volumes: int = 0  # per node; 0: the orchestrator decides


class KubeletSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    registration: bool = False  # make ourselves known to kubelet, with no sidecar
    registry: Path = Path("/var/lib/kubelet/plugins_registry")
    endpoint: str = ""  # the CSI socket as kubelet sees it; empty: as we do


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    level: str = "info"
    format: str = "auto"


class DockerEngine(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    socket: Path = Path("/run/docker.sock")
    enabled: bool = True


class PodmanEngine(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    command: str = "podman"
    arguments: tuple[str, ...] = ()
    enabled: bool = True


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    docker: DockerEngine = DockerEngine()
    podman: PodmanEngine = PodmanEngine()


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`options` are the driver's own keys, checked by the driver's model when the backend is opened."""

    driver: str
    workers: int = 16
    disabled_capabilities: tuple[str, ...] = ()
    encrypt: str = ""  # the name of the key that its volumes have
    options: dict[str, Any] = {}


class KeySettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Where the key of encrypted volumes lies, or what command prints it; `{id}` and `{name}` in its words are the
    volume's. The old ones are tried as well, until `volumectl encryption rotate` has replaced them."""

    key: str = ""
    command: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    old_command: tuple[str, ...] = ()


class ClassSettings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Backends that serve one purpose, and what a volume is there unless somebody says otherwise."""

    backends: tuple[str, ...]
    requires: tuple[str, ...] = ()  # capabilities
    topology: dict[str, str] = {}  # of a place that must reach the volume
    size: str = ""
    fs: str = ""
    mkfs_options: str = ""
    mount_options: str = ""
    encrypt: str = ""  # the name of a key
    options: dict[str, str | int | bool] = {}  # of the drivers; each is given those it knows


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Durations are seconds."""

    state_dir: Path = Path("/var/lib/volumed")  # the ledger and the mounts
    runtime_dir: Path = Path("/run/volumed")
    node: str = ""
    default_backends: tuple[str, ...] = ()  # the first that can do what is asked; empty: all, in the file's order
    history: float = 30 * 86400.0  # how long ended bindings are kept
    reconcile_interval: float = 30.0
    consumer_grace: float = 30.0  # how long a container must be gone before its binding is dropped
    live_moves: bool = True  # block volumes lie under device-mapper where the machine has it
    operation_timeout: float = 100.0  # below Docker's patience of 120 s for Create and Mount
    docker: DockerSettings = DockerSettings()
    admin: AdminSettings = AdminSettings()
    csi: CsiSettings = CsiSettings()
    kubelet: KubeletSettings = KubeletSettings()
    topology: dict[str, str] = {}  # where this node is: zone = "a"
    log: LogSettings = LogSettings()
    engines: EngineSettings = EngineSettings()
    backends: dict[str, BackendSettings] = {}
    classes: dict[str, ClassSettings] = {}
    keys: dict[str, KeySettings] = {}
    source: str = "the embedded default"
    lines: dict[tuple[str, ...], int] = {}  # of each key in the file

    def locate(self, *path: str) -> str:
        """`/etc/volumed/volumed.toml:12` for a key, or for what holds it when it is not written there."""
        for length in range(len(path), 0, -1):
            if (line := self.lines.get(path[:length])) is not None:
                return f"{self.source}:{line}"
        return self.source


_DURATIONS = ("history", "reconcile-interval", "consumer-grace", "operation-timeout")
_LEVELS = ("debug", "info", "warning", "error")
_FORMATS = ("auto", "journal", "text", "json")


def default_settings(root: Path | None = None) -> Settings:
    """The embedded default: folders for volumes without a size, images for those with one. With `root`, all of it,
    sockets too, lies below that folder and Docker is left alone."""
    state = root / "lib" if root else Path("/var/lib/volumed")
    run = root / "run" if root else Path("/run/volumed")
    return Settings(
        state_dir=state,
        runtime_dir=run,
        node=socket.gethostname(),
        default_backends=("local", "sized"),
        admin=AdminSettings(socket=run / "admin.sock"),
        csi=CsiSettings(socket=run / "csi" / "csi.sock", target_roots=(root,) if root else DEFAULT_TARGET_ROOTS),
        docker=DockerSettings(socket=run / "docker.sock", enabled=root is None) if root else DockerSettings(),
        backends={
            "local": BackendSettings(driver="directory", options={"path": str(state / "volumes")}),
            "sized": BackendSettings(driver="image", options={"path": str(state / "images")}),
        },
    )


def load(path: Path) -> Settings:
    """Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", subject=str(path)) from None
    return parse(text, source=str(path))


def parse(text: str, *, source: str) -> Settings:
    """Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is no TOML: {error}", subject=source) from None
    return _Reader(source, key_lines(text)).settings(document)


class _Reader:
    def __init__(self, source: str, lines: dict[tuple[str, ...], int]) -> None:
        self._source = source
        self._lines = lines

    def settings(self, document: dict[str, Any]) -> Settings:
        backends = {name: self._backend(name, table) for name, table in self._table(document, "backends").items()}
        classes = {name: self._class(name, table, backends) for name, table in self._table(document, "classes").items()}
        keys = {name: self._key(name, table) for name, table in self._table(document, "keys").items()}
        for kind, tables in (("backends", backends), ("classes", classes)):
            for name, settings in tables.items():
                if settings.encrypt and settings.encrypt not in keys:
                    where, hint = (kind, name, "encrypt"), _nearest(settings.encrypt, keys)
                    raise self._wrong(where, f"there is no key {settings.encrypt!r}", hint)
        known = dict(document, backends={}, classes={}, keys={})
        for key in _DURATIONS:
            if key in known:
                known[key] = self._duration(known[key], key)
        self._check_keys(Settings, known, ())
        known.setdefault("node", socket.gethostname())
        read = self._convert(Settings, known)
        self._check(read, backends)
        found = {"backends": backends, "classes": classes, "keys": keys}
        return msgspec.structs.replace(read, **found, source=self._source, lines=self._lines)

    def _backend(self, name: str, table: object) -> BackendSettings:
        path = ("backends", name)
        if not _BACKEND_NAME.fullmatch(name):
            raise self._wrong(path, f"{name!r} is no backend name", "use a-z, 0-9 and -, at most 63 characters")
        if not isinstance(table, dict):
            raise self._wrong(path, "must be a table", f"write [backends.{name}]")
        if not isinstance(table.get("driver"), str):
            raise self._wrong(path, f"backend {name} names no driver", 'add driver = "directory"')
        workers = table.get("workers", 16)
        if not isinstance(workers, int) or not 1 <= workers <= 256:
            raise self._wrong((*path, "workers"), "must be a number from 1 to 256", "")
        disabled = table.get("disabled-capabilities", [])
        if not isinstance(disabled, list) or not all(isinstance(word, str) for word in disabled):
            raise self._wrong((*path, "disabled-capabilities"), "must be a list of words", "")
        encrypt = table.get("encrypt", "")
        if not isinstance(encrypt, str):
            raise self._wrong((*path, "encrypt"), "must be the name of a key", "write [keys.NAME]")
        ours = {"driver", "workers", "disabled-capabilities", "encrypt"}
        return BackendSettings(
            driver=cast(str, table["driver"]),
            workers=workers,
            disabled_capabilities=tuple(cast("list[str]", disabled)),
            encrypt=encrypt,
            options={key: value for key, value in table.items() if key not in ours},
        )

    def _key(self, name: str, table: object) -> KeySettings:
        path = ("keys", name)
        if not _BACKEND_NAME.fullmatch(name):
            raise self._wrong(path, f"{name!r} is no name of a key", "use a-z, 0-9 and -, at most 63 characters")
        if not isinstance(table, dict):
            raise self._wrong(path, "must be a table", f"write [keys.{name}]")
        self._check_keys(KeySettings, table, path)
        read = self._convert(KeySettings, table, path)
        if bool(read.key) is bool(read.command):
            raise self._wrong(path, "says where the key lies, or which command prints it", "give `key` or `command`")
        for key, references in (("key", (read.key,) if read.key else ()), ("old", read.old)):
            for reference in references:
                try:
                    check_reference(reference)
                except ValueError as error:  # never repeats what was given: it may be the key itself
                    raise self._wrong((*path, key), str(error), "") from None
        return read

    def _class(self, name: str, table: object, backends: Mapping[str, object]) -> ClassSettings:
        path = ("classes", name)
        if not _BACKEND_NAME.fullmatch(name):
            raise self._wrong(path, f"{name!r} is no class name", "use a-z, 0-9 and -, at most 63 characters")
        if not isinstance(table, dict):
            raise self._wrong(path, "must be a table", f"write [classes.{name}]")
        self._check_keys(ClassSettings, table, path)
        read = self._convert(ClassSettings, table, path)
        if not read.backends:
            raise self._wrong((*path, "backends"), "names no backend", "")
        for key, given, known in (
            ("backends", read.backends, tuple(backends)),
            ("requires", read.requires, tuple(map(str, Capability))),
            ("fs", (read.fs,) if read.fs else (), filesystems.NAMES),
        ):
            for word in given:
                if word not in known:
                    raise self._wrong((*path, key), f"there is no {word!r}", _nearest(word, known))
        if read.size:
            try:
                parse_size(read.size)
            except InvalidRequest as error:
                raise self._wrong((*path, "size"), error.text, error.hint) from None
        return read

    def _table(self, document: Mapping[str, Any], key: str) -> dict[str, Any]:
        table = document.get(key, {})
        if not isinstance(table, dict):
            raise self._wrong((key,), "must be a table", f"write [{key}.NAME]")
        return table

    def _duration(self, value: object, key: str) -> float:
        try:
            seconds = parse_duration(str(value))
        except InvalidRequest as error:
            raise self._wrong((key,), error.text, error.hint) from None
        if seconds <= 0:
            raise self._wrong((key,), "must be more than zero", "")
        return seconds

    def _check_keys(self, kind: type[msgspec.Struct], table: Mapping[str, Any], path: tuple[str, ...]) -> None:
        """Every key, at every depth, before any value: a typo is the commonest mistake and deserves the best answer."""
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        for key in ("source", "lines"):
            fields.pop(key, None)
        for key, value in table.items():
            if key not in fields:
                raise self._wrong((*path, key), f"there is no key {key!r}", _nearest(key, fields))
            below = fields[key]
            if isinstance(below, type) and issubclass(below, msgspec.Struct):
                if not isinstance(value, dict):
                    raise self._wrong((*path, key), "must be a table", f"write [{'.'.join((*path, key))}]")
                self._check_keys(below, value, (*path, key))

    def _convert(self, kind: type[T], table: Mapping[str, Any], below: tuple[str, ...] = ()) -> T:
        try:
            return msgspec.convert(table, kind, dec_hook=_path)
        except msgspec.ValidationError as error:
            text, _, where = str(error).partition(" - at `$")
            path = tuple(part for part in re.split(r"[.\[\]`]+", where) if part and part != "...")
            raise self._wrong((*below, *path), text, "") from None

    def _check(self, settings: Settings, backends: Mapping[str, BackendSettings]) -> None:
        for name in settings.default_backends:
            if name not in backends:
                raise self._wrong(("default-backends",), f"there is no backend {name!r}", _nearest(name, backends))
        if len(set(settings.default_backends)) < len(settings.default_backends):
            raise self._wrong(("default-backends",), "names a backend twice", "")
        for path, value, allowed in (
            (("log", "level"), settings.log.level, _LEVELS),
            (("log", "format"), settings.log.format, _FORMATS),
            (("csi", "role"), settings.csi.role, ROLES),
        ):
            if value not in allowed:
                raise self._wrong(path, f"{value!r} is not possible", f"choose {', '.join(allowed)}")
        if not _DRIVER_NAME.fullmatch(settings.csi.driver_name):
            raise self._wrong(
                ("csi", "driver-name"),
                f"{settings.csi.driver_name!r} is no driver name",
                "use the form of a domain name",
            )
        if not 0 <= settings.csi.max_volumes <= MAX_VOLUMES:
            raise self._wrong(("csi", "max-volumes"), f"must be a number from 0 to {MAX_VOLUMES}", "")

    def _wrong(self, path: tuple[str, ...], text: str, hint: str) -> ConfigError:
        settings = Settings(source=self._source, lines=self._lines)
        where = settings.locate(*path)
        key = ".".join(path)
        return ConfigError(f"{key}: {text}" if key and key not in text else text, subject=where, hint=hint)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(known)) or 'none'}"


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        if not value.startswith("/"):
            raise ValueError(f"{value!r} must be an absolute path")
        return Path(value)
    raise TypeError(f"expected {kind.__name__}")


_HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?")
_KEY = re.compile(r"""\s*((?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+))*)\s*=""")


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Where each table and key is written. tomllib does not tell; this knows the plain forms that a settings file has,
    and only words an error message."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            table = _parts(header[1])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, *_parts(key[1])), number)
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
