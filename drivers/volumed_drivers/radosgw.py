"""What Ceph's RADOS Gateway can do beyond S3: a quota for each bucket, by its admin operations API.

The same user signs, and needs the capability `buckets=*` (radosgw-admin caps add --uid=... --caps='buckets=*').
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import urlencode

from volumed.errors import BackendError, BackendUnavailable, NotFound, NotSupported
from volumed.units import KIB
from volumed_drivers.s3_client import READ_TIMEOUT, S3

# Of a gateway with too much to do, or of a proxy before one that does not answer.
_NOT_NOW = (
    *(HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY),
    *(HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT),
)


class Usage(NamedTuple):
    """Bytes."""

    limit: int | None
    used: int


class RadosGateway:
    def __init__(self, s3: S3, *, subject: str) -> None:
        self._s3 = s3
        self._subject = subject

    def check(self) -> None:
        """Raises NotSupported, saying why no quota can be set; BackendUnavailable where that was not told."""
        status, body = self._ask("GET", {"bucket": "volumed-there-is-no-such-bucket", "stats": "true"})
        if status == HTTPStatus.NOT_FOUND and body.get("Code") == "NoSuchBucket":
            return  # in JSON: a server without this API speaks of a bucket `admin`, and in XML
        if status == HTTPStatus.FORBIDDEN and body:
            raise NotSupported("its user lacks the capability buckets=* at the RADOS Gateway", subject=self._subject)
        if status in _NOT_NOW:
            raise BackendUnavailable(f"asking the RADOS Gateway: status {status}", subject=self._subject)
        raise NotSupported("its server has no quotas for buckets", subject=self._subject)

    def usage(self, bucket: str) -> Usage:
        """Raises NotFound."""
        status, body = self._ask("GET", {"bucket": bucket, "stats": "true"})
        if status == HTTPStatus.NOT_FOUND and body.get("Code") == "NoSuchBucket":
            raise NotFound(f"bucket {bucket} is gone", subject=self._subject)
        if status != HTTPStatus.OK or "bucket_quota" not in body:
            raise BackendError(f"the use of bucket {bucket} was not told: status {status}", subject=self._subject)
        quota = body["bucket_quota"]
        limit = quota["max_size"] if quota["enabled"] and quota["max_size"] > 0 else None
        return Usage(limit, sum(each.get("size_actual", 0) for each in body.get("usage", {}).values()))

    def bound(self, bucket: str, size: int, *, user: str) -> int:
        """The limit it has now: whole KiB. In the query: the gateway takes no signed body here (it answers 501)."""
        kib = -(-size // KIB)
        words = {"quota": "", "uid": user, "bucket": bucket, "enabled": "true", "max-size-kb": kib, "max-objects": -1}
        status, body = self._ask("PUT", words)
        if status != HTTPStatus.OK:
            reason = body.get("Code", f"status {status}")
            raise BackendError(f"the quota of bucket {bucket} cannot be set: {reason}", subject=self._subject)
        return kib * KIB

    def _ask(self, method: str, words: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._s3.told("asking the RADOS Gateway"):
            from botocore.auth import S3SigV4Auth  # noqa: PLC0415
            from botocore.awsrequest import AWSRequest  # noqa: PLC0415
            from botocore.credentials import Credentials  # noqa: PLC0415
            from botocore.httpsession import URLLib3Session  # noqa: PLC0415

            access = self._s3.access
            request = AWSRequest(method, f"{access.endpoint}/admin/bucket?{urlencode(words)}")
            S3SigV4Auth(Credentials(*self._s3.keys()), "s3", access.region).add_auth(request)
            verify: Any = access.tls_ca or True  # a file's name is an answer as well
            session = URLLib3Session(verify=verify, timeout=READ_TIMEOUT)
            answer = session.send(request.prepare())
        try:
            body = json.loads(answer.text)
        except ValueError:
            body = {}
        return answer.status_code, body if isinstance(body, dict) else {}
