"""LUKS2 on a block device, through cryptsetup(8): a key goes to its standard input, never into argv.

Discards pass through (`--allow-discards`): thin storage gets its space back, and whoever sees the storage learns which
blocks are unused.
"""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

from volumed.driver import Completed, Host
from volumed.errors import CommandFailed, IntegrityError, InUse
from volumed.units import MIB

OVERHEAD = 16 * MIB  # of a device: the header with its key slots (cryptsetup-luksFormat(8))
MAPPER = Path("/dev/mapper")
TIMEOUT = 120.0
_WRONG_KEY, _BUSY = 2, 5  # exit statuses of cryptsetup(8)
# Stretching serves what people can remember. Keys here are long and random, which `volumed.core.encryption` sees to:
# the least that LUKS2 takes keeps a mount short, and 64 of them at once from needing gigabytes. Said outright, or
# cryptsetup measures the machine first, for seconds where it is busy.
_STRETCHING = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


def node(name: str) -> Path | None:
    """The opened device of that name, or None."""
    path = MAPPER / name
    return path if path.exists() else None


def format_device(host: Host, device: Path, key: str) -> None:
    """A new header with one key: whatever lay on the device cannot be read any more."""
    host.run(
        ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", *_STRETCHING, "--key-file=-", device],
        stdin=key,
        secrets=[key],
        timeout=TIMEOUT,
    )


def fits(host: Host, device: Path, key: str) -> bool:
    """Whether the key opens it. Raises IntegrityError where there is no header."""
    return _tried(host, ["open", "--test-passphrase", "--key-file=-", device], device, key)


def open_device(host: Host, device: Path, name: str, key: str) -> bool:
    """Whether the key opened it: then it is at `node(name)`."""
    return _tried(host, ["open", "--type", "luks2", "--allow-discards", "--key-file=-", device, name], device, key)


def _tried(host: Host, words: list[str | Path], device: Path, key: str) -> bool:
    told = host.run(["cryptsetup", *words], stdin=key, secrets=[key], timeout=TIMEOUT, check=False)
    if told.returncode == _WRONG_KEY:
        return False
    if told.returncode != 0:
        raise _failed(told, device)
    return True


def _failed(told: Completed, device: Path) -> CommandFailed | IntegrityError:
    said = told.stderr.strip() or "it said nothing"
    if "not a valid LUKS" in said:
        return IntegrityError(
            "bears no LUKS header: it was overwritten, or never encrypted",
            subject=str(device),
            hint="nothing was changed. Put the header back: cryptsetup luksHeaderRestore",
        )
    return CommandFailed(f"cryptsetup failed with status {told.returncode}: {said}", returncode=told.returncode)


def close(host: Host, name: str) -> None:
    """Not open is success. Raises InUse while it is held."""
    opened = node(name)
    if opened is None:
        return
    told = host.run(["cryptsetup", "close", name], timeout=TIMEOUT, check=False)
    if node(name) is None:
        return
    if told.returncode == _BUSY:
        host.check_unheld(opened)  # says by whom
        raise InUse("is held by", holders=["a mount or a process that has it open"], subject=str(opened))
    raise _failed(told, opened)


def resize(host: Host, name: str, key: str) -> None:
    """As large as the device below, while it is open."""
    host.run(["cryptsetup", "resize", "--key-file=-", name], stdin=key, secrets=[key], timeout=TIMEOUT)


def add_key(host: Host, device: Path, *, known: str, new: str) -> None:
    """In a free slot. The new one goes by a file that root alone sees, in memory: standard input has the known one."""
    file = host.private_folder("keys") / uuid4().hex
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(new)
        host.run(
            ["cryptsetup", "luksAddKey", "--batch-mode", *_STRETCHING, "--key-file=-", device, file],
            stdin=known,
            secrets=[known, new],
            timeout=TIMEOUT,
        )
    finally:
        file.unlink()


def remove_key(host: Host, device: Path, key: str) -> None:
    """The slot that this key opens. The caller has seen that another key opens the device."""
    host.run(
        ["cryptsetup", "luksRemoveKey", "--batch-mode", "--key-file=-", device],
        stdin=key,
        secrets=[key],
        timeout=TIMEOUT,
    )
