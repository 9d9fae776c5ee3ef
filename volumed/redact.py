"""Secrets that this process knows, and texts without them. Every log line and every error passes through here."""

from __future__ import annotations

import base64
import html
import json
import threading
import urllib.parse
from collections.abc import Iterator

_MASK = "***"
SHORTEST = 4  # anything shorter would blank half of every sentence
_guard = threading.Lock()
_known: tuple[str, ...] = ()  # the longest first: one may be part of another


def register(secret: str) -> None:
    """From now on no text that passes `blank` shows it, nor as a program may print it: escaped, encoded, in lines."""
    global _known  # noqa: PLW0603 (replaced as a whole, so that nobody ever reads half of it)
    if len(secret) < SHORTEST:
        return
    with _guard:
        if secret not in _known:
            forms = {form for form in _forms(secret) if len(form) >= SHORTEST}
            _known = tuple(sorted({*_known, *forms}, key=len, reverse=True))


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield repr(secret)[1:-1]
    yield json.dumps(secret)[1:-1]
    yield html.escape(secret)
    yield html.escape(secret, quote=False)
    yield urllib.parse.quote(secret, safe="")
    yield urllib.parse.quote_plus(secret)
    yield base64.b64encode(secret.encode()).decode().rstrip("=")
    if "\n" in secret:  # a key in PEM, of which a program quotes a line
        yield from (line.strip() for line in secret.splitlines() if "-----" not in line)


def blank(text: str) -> str:
    for secret in _known:
        if secret in text:
            text = text.replace(secret, _MASK)
    return text
