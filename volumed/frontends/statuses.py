"""How an error travels: one table from its code to each protocol's own number."""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

from volumed.errors import VolumedError


class Status(NamedTuple):
    http: HTTPStatus
    grpc: str  # the name of the code, google.rpc.Code


STATUSES: dict[str, Status] = {
    "internal": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"),
    "invalid_request": Status(HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT"),
    "out_of_range": Status(HTTPStatus.BAD_REQUEST, "OUT_OF_RANGE"),
    "not_found": Status(HTTPStatus.NOT_FOUND, "NOT_FOUND"),
    "already_exists": Status(HTTPStatus.CONFLICT, "ALREADY_EXISTS"),
    "in_use": Status(HTTPStatus.CONFLICT, "FAILED_PRECONDITION"),
    "precondition_failed": Status(HTTPStatus.CONFLICT, "FAILED_PRECONDITION"),
    "operation_pending": Status(HTTPStatus.CONFLICT, "ABORTED"),
    "not_supported": Status(HTTPStatus.UNPROCESSABLE_ENTITY, "INVALID_ARGUMENT"),
    "capacity_exhausted": Status(HTTPStatus.INSUFFICIENT_STORAGE, "RESOURCE_EXHAUSTED"),
    "permission_denied": Status(HTTPStatus.FORBIDDEN, "PERMISSION_DENIED"),
    "backend_error": Status(HTTPStatus.BAD_GATEWAY, "INTERNAL"),
    "backend_unavailable": Status(HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE"),
    "deadline_exceeded": Status(HTTPStatus.GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
    "host_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"),
    "command_failed": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"),
    "mount_failed": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"),
    "integrity_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "DATA_LOSS"),
    "config_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "FAILED_PRECONDITION"),
    "driver_load_error": Status(HTTPStatus.INTERNAL_SERVER_ERROR, "FAILED_PRECONDITION"),
}


def status_of(error: VolumedError) -> Status:
    return STATUSES[error.code]
