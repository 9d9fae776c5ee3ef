"""volumectl's exit status for each error code of the API; documented in the README."""

from __future__ import annotations

EXIT_CODES: dict[str, int] = {
    "internal": 1,
    "invalid_request": 2,  # as click's own for a wrong command line
    "out_of_range": 2,
    "not_found": 3,
    "already_exists": 4,
    "in_use": 5,
    "operation_pending": 6,
    "not_supported": 7,
    "capacity_exhausted": 8,
    "permission_denied": 9,
    "backend_error": 10,
    "backend_unavailable": 11,
    "deadline_exceeded": 12,
    "host_error": 13,
    "command_failed": 13,
    "mount_failed": 13,
    "integrity_error": 14,
    "config_error": 15,
    "driver_load_error": 15,
    "unreachable": 16,  # no daemon answers
    "findings": 17,  # `doctor` found something that is not fixed
    "precondition_failed": 18,
}
