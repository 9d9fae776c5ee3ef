"""How an error travels: one table from its code to each protocol's own number."""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

from volumed.errors import VolumedError


class Status(NamedTuple):
    http: HTTPStatus
    grpc: str  # the name of the code, google.rpc.Code
    exit_code: int  # of volumectl


STATUSES: dict[str, Status] = {
    "internal": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL", 1),
    "invalid_request": Status(HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT", 2),
    "out_of_range": Status(HTTPStatus.BAD_REQUEST, "OUT_OF_RANGE", 2),
    "not_found": Status(HTTPStatus.NOT_FOUND, "NOT_FOUND", 3),
    "already_exists": Status(HTTPStatus.CONFLICT, "ALREADY_EXISTS", 4),
    "in_use": Status(HTTPStatus.CONFLICT, "FAILED_PRECONDITION", 5),
    "operation_pending": Status(HTTPStatus.CONFLICT, "ABORTED", 6),
    "not_supported": Status(HTTPStatus.UNPROCESSABLE_ENTITY, "INVALID_ARGUMENT", 7),
    "capacity_exhausted": Status(HTTPStatus.INSUFFICIENT_STORAGE, "RESOURCE_EXHAUSTED", 8),
    "permission_denied": Status(HTTPStatus.FORBIDDEN, "PERMISSION_DENIED", 9),
    "backend_error": Status(HTTPStatus.BAD_GATEWAY, "INTERNAL", 10),
    "backend_unavailable": Status(HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE", 11),
    "deadline_exceeded": Status(HTTPStatus.GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED", 12),
    "host_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL", 13),
    "command_failed": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL", 13),
    "mount_failed": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL", 13),
    "integrity_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "DATA_LOSS", 14),
    "config_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "FAILED_PRECONDITION", 15),
    "driver_load_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "FAILED_PRECONDITION", 15),
}


def status_of(error: VolumedError) -> Status:
    return STATUSES[error.code]
