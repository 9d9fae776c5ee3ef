"""Every error that volumed expects. Anything else that is raised is a bug and is answered as INTERNAL.

An error says what failed (its text), on which volume, backend or path (`subject`), what to do now (`hint`)
and whether trying again can help (`retry_after`). How it travels (HTTP, gRPC, exit code) is decided in
`volumed.frontends.statuses` from its `code` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from volumed.redact import blank


class VolumedError(Exception):
    """Base of all expected errors.

    retry_after: None when a retry cannot help, otherwise the seconds to wait before one (0: at once).
    """

    code: ClassVar[str] = "internal"
    retry_after: float | None = None

    def __init__(self, text: str, *, subject: str = "", hint: str = "", retry_after: float | None = None) -> None:
        self.text, self.subject, self.hint = blank(text), blank(subject), blank(hint)
        super().__init__(self.text)
        if retry_after is not None:
            self.retry_after = retry_after

    def __str__(self) -> str:
        parts = [f"{self.subject}: {self.text}" if self.subject else self.text]
        if self.hint:
            parts.append(self.hint)
        return ". ".join(part.rstrip(".") for part in parts)


class InvalidRequest(VolumedError):
    """What was asked for makes no sense, whoever asks and whenever."""

    code = "invalid_request"


class OutOfRange(InvalidRequest):
    """A number is outside what the backend can do (size, count, length)."""

    code = "out_of_range"


class NotFound(VolumedError):
    code = "not_found"


class AlreadyExists(VolumedError):
    """The name is taken by something that differs from what was asked for."""

    code = "already_exists"


class InUse(VolumedError):
    """Somebody holds it. `holders` names each of them for people."""

    code = "in_use"

    def __init__(self, text: str, *, holders: Sequence[str] = (), subject: str = "", hint: str = "") -> None:
        listed = f"{text}: {', '.join(holders)}" if holders else text
        super().__init__(listed, subject=subject, hint=hint)
        self.holders = tuple(map(blank, holders))


class PreconditionFailed(VolumedError):
    """Something else must come first: staging before publishing, a mode that allows it."""

    code = "precondition_failed"


class OperationPending(VolumedError):
    """Another change to the same volume is running, or this one goes on past the caller's deadline."""

    code = "operation_pending"
    retry_after = 1.0


class NotSupported(VolumedError):
    """The backend lacks a capability."""

    code = "not_supported"


class CapacityExhausted(VolumedError):
    code = "capacity_exhausted"


class PermissionDenied(VolumedError):
    code = "permission_denied"


class BackendError(VolumedError):
    """The storage refused or failed."""

    code = "backend_error"


class BackendUnavailable(BackendError):
    """The storage does not answer, or its queue is full."""

    code = "backend_unavailable"
    retry_after = 5.0


class DeadlineExceeded(BackendError):
    """No answer in time: the outcome is unknown. Look first, then act."""

    code = "deadline_exceeded"
    retry_after = 5.0


class HostError(VolumedError):
    """This machine's kernel or tools failed."""

    code = "host_error"


class CommandFailed(HostError):
    """A child process ended with an error. `stderr` is what it said, secrets removed."""

    code = "command_failed"

    def __init__(self, text: str, *, returncode: int, stderr: str = "", subject: str = "", hint: str = "") -> None:
        super().__init__(text, subject=subject, hint=hint)
        self.returncode = returncode
        self.stderr = blank(stderr)


class MountFailed(HostError):
    """mount(2) or umount(2) failed. `errno` is the kernel's."""

    code = "mount_failed"

    def __init__(self, text: str, *, errno: int = 0, subject: str = "", hint: str = "") -> None:
        super().__init__(text, subject=subject, hint=hint)
        self.errno = errno


class IntegrityError(VolumedError):
    """Data, or the ledger, is not what it must be. Nothing goes on by itself from here."""

    code = "integrity_error"


class ConfigError(VolumedError):
    code = "config_error"


class DriverLoadError(VolumedError):
    code = "driver_load_error"
