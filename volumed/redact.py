"""Secrets that this process knows, and texts without them. Every log line and every error passes through here."""

from __future__ import annotations

_MASK = "***"
_SHORTEST = 4  # anything shorter would blank half of every sentence
_secrets: set[str] = set()


def register(secret: str) -> None:
    """From now on no text that passes `blank` shows it."""
    if len(secret) >= _SHORTEST:
        _secrets.add(secret)


def blank(text: str) -> str:
    # The longest first: one may be part of another.
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, _MASK)
    return text
