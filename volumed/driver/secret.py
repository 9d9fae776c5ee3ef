"""Credentials: told where they lie, never what they are.

`file:/etc/volumed/ceph.key`, `env:AWS_SECRET_ACCESS_KEY` or `credential:ceph` (systemd.exec(5), LoadCredential=). What
is read is blanked in every log line and error from then on (`volumed.redact`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from volumed import redact
from volumed.errors import ConfigError

_SOURCES = ("file:/", "env:", "credential:")


def _checked(reference: str) -> str:
    """Never repeats what was given: somebody may have written the secret itself."""
    if not reference.startswith(_SOURCES) or reference.endswith(":"):
        raise ValueError("say where the secret lies: file:/PATH, env:NAME or credential:NAME")
    return reference


# For a field of an Options model; `read_secret` gives what it stands for.
Secret = Annotated[str, AfterValidator(_checked)]


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
        text = os.environ.get(reference.partition(":")[2], "")
        if not text:
            raise ConfigError(f"{reference} is not set", subject=subject)
    else:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not text"
            raise ConfigError(f"the secret in {path} cannot be read: {reason}", subject=subject) from None
        if not text:
            raise ConfigError(f"the secret in {path} is empty", subject=subject)
    redact.register(text)
    return text
