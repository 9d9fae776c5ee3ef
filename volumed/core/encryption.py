"""Encryption at rest, over any block driver: a LUKS2 layer between a volume's device and what lies on it.

Which key a volume has is a name in the settings; the key itself is read when it is needed, and kept nowhere. A header
may still have an older key of that name, after the settings were given a new one or a snapshot of before was restored:
each is tried, and `rekey` leaves the newest alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from volumed import redact
from volumed.config import KeySettings
from volumed.core.options import nearest
from volumed.driver import Host
from volumed.driver.secret import read_secret
from volumed.errors import ConfigError, InvalidRequest, PermissionDenied
from volumed.host import luks
from volumed.model import Volume
from volumed.testing import crash

KEY_TIMEOUT = 30.0
# Characters: 128 bits as hexadecimal digits. Keys are not stretched (`volumed.host.luks`), so none may be a password.
SHORTEST_KEY = 32
_NODE = re.compile(r"volumed-(v[0-9a-f]{32})-crypt")


def overhead(volume: Volume) -> int:
    """Bytes of its device that are not the volume's to use."""
    return luks.OVERHEAD if volume.encryption else 0


class Encryption:
    def __init__(self, keys: Mapping[str, KeySettings], host: Host) -> None:
        self._keys = keys
        self._host = host

    def check_name(self, name: str) -> None:
        """Raises InvalidRequest for a key that the settings do not have, naming the nearest."""
        if name not in self._keys:
            raise InvalidRequest(f"there is no key {name[:60]!r}", hint=nearest(name[:60], self._keys))

    # Devices. A volume that is not encrypted passes through each of these
    @staticmethod
    def _name(volume: Volume) -> str:
        return f"volumed-{volume.stored_as}-crypt"

    def node(self, volume: Volume, device: Path | None) -> Path | None:
        """What is seen of the volume where its storage shows `device`; None while it is not open."""
        return luks.node(self._name(volume)) if volume.encryption else device

    def opened(self, volume: Volume, device: Path) -> Path:
        """The volume's content. Raises PermissionDenied when no key fits, IntegrityError without a header."""
        if not volume.encryption:
            return device
        there = self.node(volume, device)
        if there is not None:
            return there
        name = self._name(volume)
        if not any(luks.open_device(self._host, device, name, key) for key in self._each_key(volume)):
            raise self._no_key(volume)
        crash.point("encryption.opened")
        return luks.MAPPER / name

    def close(self, volume: Volume) -> None:
        """Raises InUse."""
        if volume.encryption:
            luks.close(self._host, self._name(volume))

    def resize(self, volume: Volume, device: Path) -> None:
        """As large as its device is now, where it is open."""
        if volume.encryption and luks.node(self._name(volume)) is not None:
            luks.resize(self._host, self._name(volume), self._fitting(volume, device))

    def format(self, volume: Volume, device: Path) -> None:
        """On a new volume."""
        if volume.encryption:
            luks.format_device(self._host, device, self._current(volume))
            crash.point("encryption.formatted")

    def rekey(self, volume: Volume, device: Path, *, origin: Volume | None = None) -> None:
        """The volume's own newest key opens it, and no other that is known; `origin`: what it is a copy of. First the
        new one is added and seen to fit, then the others go: cut short anywhere, one of them still opens it."""
        if not volume.encryption:
            return
        current = self._current(volume)
        others = [key for key in dict.fromkeys(self._known(volume, origin)) if key != current]
        if not luks.fits(self._host, device, current):
            fitting = next((key for key in others if luks.fits(self._host, device, key)), None)
            if fitting is None:
                raise self._no_key(volume)
            luks.add_key(self._host, device, known=fitting, new=current)
            crash.point("encryption.added")
            if not luks.fits(self._host, device, current):
                raise self._no_key(volume)
        for key in others:
            if luks.fits(self._host, device, key):
                luks.remove_key(self._host, device, key)
                crash.point("encryption.removed")

    # What a crash or a hand left
    @staticmethod
    def nodes() -> dict[str, Path]:
        """Every opened device of ours on this node, by what storage calls the volume."""
        found = luks.MAPPER.iterdir() if luks.MAPPER.is_dir() else iter(())
        return {match[1]: path for path in found if (match := _NODE.fullmatch(path.name))}

    def close_node(self, path: Path) -> None:
        luks.close(self._host, path.name)

    # Keys
    def _current(self, volume: Volume) -> str:
        """What it shall be opened by from now on. Raises ConfigError for one that could be guessed."""
        key = next(self._each_key(volume))
        if len(key) < SHORTEST_KEY:
            raise ConfigError(
                f"the key {volume.encryption!r} is shorter than {SHORTEST_KEY} characters",
                subject=f"volume {volume.name}",
                hint="make one that nobody can guess: openssl rand -hex 32",
            )
        return key

    def _known(self, volume: Volume, origin: Volume | None) -> Iterator[str]:
        yield from self._each_key(volume)
        if origin is not None and origin.encryption:
            yield from self._each_key(origin)

    def _fitting(self, volume: Volume, device: Path) -> str:
        for key in self._each_key(volume):
            if luks.fits(self._host, device, key):
                return key
        raise self._no_key(volume)

    def _each_key(self, volume: Volume) -> Iterator[str]:
        """The newest first. Raises ConfigError."""
        subject = f"volume {volume.name}"
        settings = self._keys.get(volume.encryption)
        if settings is None:
            raise ConfigError(
                f"is encrypted with the key {volume.encryption!r}, which the settings do not have",
                subject=subject,
                hint=f"write [keys.{volume.encryption}] into volumed.toml again",
            )
        if settings.key:
            yield read_secret(settings.key, subject=subject)
        if settings.command:
            yield self._told(settings.command, volume)
        for reference in settings.old:
            yield read_secret(reference, subject=subject)
        if settings.old_command:
            yield self._told(settings.old_command, volume)

    def _told(self, command: tuple[str, ...], volume: Volume) -> str:
        """By a program: what it prints is the key."""
        words = [word.replace("{id}", volume.id).replace("{name}", volume.name) for word in command]
        key = self._host.run(words, timeout=KEY_TIMEOUT).stdout.strip()
        if len(key) < redact.SHORTEST:
            raise ConfigError(f"{words[0]} told no key", subject=f"volume {volume.name}")
        redact.register(key)
        return key

    @staticmethod
    def _no_key(volume: Volume) -> PermissionDenied:
        return PermissionDenied(
            f"no key of the name {volume.encryption!r} opens it",
            subject=f"volume {volume.name}",
            hint=f"give the key that it was made with, as `old` of [keys.{volume.encryption}]",
        )
