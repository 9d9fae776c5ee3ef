"""Credentials: told where they lie, never what they are.

`file:/etc/volumed/ceph.key`, `env:AWS_SECRET_ACCESS_KEY` or `credential:ceph` (systemd.exec(5), LoadCredential=). What
is read is blanked in every log line and error from then on (`volumed.redact`).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from volumed import redact
from volumed.errors import ConfigError

_SOURCES = ("file:/", "env:", "credential:")
_LONGEST = 1 << 16


def check_reference(reference: str) -> str:
    """Never repeats what was given: somebody may have written the secret itself."""
    if not reference.startswith(_SOURCES) or reference.endswith(":"):
        raise ValueError("say where the secret lies: file:/PATH, env:NAME or credential:NAME")
    return reference


# For a field of an Options model; `read_secret` gives what it stands for.
Secret = Annotated[str, AfterValidator(check_reference)]


def secret_path(reference: Secret) -> Path | None:
    """The file it lies in; None for one in the environment."""
    kind, _, name = reference.partition(":")
    if kind == "file":
        return Path(name)
    if kind == "credential":
        folder = os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials/volumed.service")
        return Path(folder) / Path(name).name
    return None


def read_secret(reference: Secret, *, subject: str) -> str:
    """Read anew each time, so that a rotated one is taken up. Raises ConfigError, which names the place."""
    path = secret_path(reference)
    if path is None:
        text, place = os.environ.get(reference.partition(":")[2], "").strip(), reference
    else:
        text, place = _read(path, subject).strip(), f"the secret in {path}"
    if not text:
        raise ConfigError(f"{place} is empty" if path else f"{place} is not set", subject=subject)
    if len(text) < redact.SHORTEST:
        raise ConfigError(f"{place} has fewer than {redact.SHORTEST} characters", subject=subject)
    redact.register(text)
    return text


def _read(path: Path, subject: str) -> str:
    """A pipe would be waited for, and a device read for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"the secret in {path} cannot be read: it is no file", subject=subject)
            data = opened.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise ConfigError(f"the secret in {path} has more than {_LONGEST} bytes", subject=subject)
        return data.decode()
    except OSError as error:
        raise ConfigError(f"the secret in {path} cannot be read: {error.strerror}", subject=subject) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the secret in {path} cannot be read: it is not text", subject=subject) from None
