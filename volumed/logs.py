"""Logs: to the journal with fields, to a terminal as text, or as JSON lines; each line with its request's id."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime

from volumed import context
from volumed.redact import blank

JOURNAL = "/run/systemd/journal/socket"
FIELDS = ("volume", "backend", "event", "operation", "endpoint", "engine", "container")
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def configure(*, level: str, format: str) -> None:
    """`format`: auto, journal, text or json. auto: the journal when standard error is one, else text."""
    if format == "auto":
        format = "journal" if _stderr_is_journal() else "text"
    handler: logging.Handler
    if format == "journal":
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # The SDKs tell whole requests and answers when debugging, and with them what a secret is made into.
    for noisy in ("uvicorn", "asyncio", "boto3", "botocore", "urllib3", "s3transfer"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _stderr_is_journal() -> bool:
    """systemd.exec(5): JOURNAL_STREAM holds device and inode of the stream that goes to the journal."""
    expected = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return expected == f"{status.st_dev}:{status.st_ino}"


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    found = {key: blank(str(value)) for key in FIELDS if (value := getattr(record, key, None))}
    return {"request": context.request_id.get(), **found}


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        line = blank(f"{time} {record.levelname.lower():7} [{context.request_id.get()}] {record.getMessage()}")
        # A name with a newline in it must not forge a line; a traceback is ours and keeps its own.
        line = line.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        return blank(line + ("\n" + self.formatException(record.exc_info) if record.exc_info else ""))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({key: blank(value) for key, value in line.items()})


class JournalHandler(logging.Handler):
    """The journal's own protocol: one datagram an entry, `KEY=value` lines, and a length before what has newlines
    (systemd's "Native Journal Protocol")."""

    def __init__(self, address: str = JOURNAL) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._address = address

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        entry = {
            "MESSAGE": blank(message),
            "PRIORITY": str(_PRIORITY.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": "volumed",
            "CODE_MODULE": record.name,
            **{f"VOLUMED_{key.upper()}": value for key, value in fields_of(record).items()},
        }
        try:
            self._socket.sendto(b"".join(_field(key, value) for key, value in entry.items()), self._address)
        except OSError:  # the journal is restarting: the daemon must not fall with it
            sys.stderr.write(blank(message) + "\n")


def _field(key: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")[:60_000]
    if b"\n" not in data:
        return key.encode() + b"=" + data + b"\n"
    return key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
