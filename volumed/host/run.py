"""The one door to child processes.

A list for argv and never a shell, a fixed locale, a minimal environment, stdin closed, a deadline always, and the
whole process group killed at it. What a child printed is kept for the error, secrets blanked.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from volumed import context
from volumed.driver import Completed
from volumed.errors import CommandFailed, DeadlineExceeded
from volumed.host import left

_log = logging.getLogger(__name__)

ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
MAX_SHOWN = 2000


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60.0,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    secrets: Sequence[str] = (),
    check: bool = True,
) -> Completed:
    """See `volumed.driver.Host.run`."""
    words = [str(word) for word in argv]
    shown = _blank(shlex.join(words), secrets)
    _log.debug("run: %s", shown)
    if tuple(words) in left.hanging():
        raise DeadlineExceeded(f"`{shown}` was started before and still hangs in the kernel")
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **(env or {})},
            start_new_session=True,
            encoding="utf-8",
            errors="backslashreplace",
        )
    except FileNotFoundError:
        raise CommandFailed(
            f"{words[0]} is not installed", returncode=127, hint=f"install the package that brings {words[0]}"
        ) from None
    except OSError as error:
        raise CommandFailed(f"{words[0]} cannot be run: {error.strerror}", returncode=126) from None
    with child:
        try:
            stdout, stderr = child.communicate(stdin, timeout=context.remaining(timeout))
        except subprocess.TimeoutExpired:
            left.kill(child, tuple(words))
            raise DeadlineExceeded(f"`{shown}` did not end in time and was killed") from None
        except BaseException:
            left.kill(child, tuple(words))
            raise
    stderr = _blank(stderr, secrets)
    if check and child.returncode != 0:
        reason = stderr.strip()[-MAX_SHOWN:] or "it said nothing"
        raise CommandFailed(
            f"`{shown}` failed with status {child.returncode}: {reason}", returncode=child.returncode, stderr=stderr
        )
    return Completed(child.returncode, _blank(stdout, secrets), stderr)


def _blank(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text
