"""Buckets and objects by boto3, for the driver `s3`: deadlines on every call, and errors in our words."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from volumed import context
from volumed.driver import Secret
from volumed.driver.secret import read_secret
from volumed.errors import (
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    DeadlineExceeded,
    InUse,
    NotFound,
    PermissionDenied,
    VolumedError,
)

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import ObjectIdentifierTypeDef

CONNECT_TIMEOUT, READ_TIMEOUT, ATTEMPTS = 5, 10, 2
_GONE = frozenset({"NoSuchBucket", "NoSuchKey", "NoSuchUpload", "NotFound", "404"})
_FULL = frozenset({"QuotaExceeded", "TooManyBuckets", "EntityTooLarge", "InsufficientStorage"})
_REFUSED = {
    "InvalidAccessKeyId": "the access key is unknown there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "AccessDenied": "the user of this access key may not do that",
    "403": "the user of this access key may not do that",
    "ExpiredToken": "the credentials have expired",
}
# What XML 1.0 cannot say, not even escaped: such a key cannot be in the list of a DeleteObjects.
_NO_XML = re.compile("[\x00-\x1f\x7f\ufffe\uffff]")


class Access(NamedTuple):
    """How a server is reached. `region` is what requests are signed for."""

    endpoint: str | None
    region: str
    path_style: bool
    tls_ca: str | None
    access_key: Secret
    secret_key: Secret


class Version(NamedTuple):
    """Of an object, or of the mark that it was deleted."""

    key: str
    id: str


class S3:
    """One server, as one user. Credentials are read again for each call, so a rotated key is taken up."""

    def __init__(self, access: Access, *, subject: str) -> None:
        self.access = access
        self._subject = subject
        self._lock = threading.Lock()
        self._made: tuple[tuple[str, str], S3Client] | None = None

    def keys(self) -> tuple[str, str]:
        """Access key and secret key. Raises ConfigError."""
        return (
            read_secret(self.access.access_key, subject=self._subject),
            read_secret(self.access.secret_key, subject=self._subject),
        )

    def client(self) -> S3Client:
        keys = self.keys()
        with self._lock:
            if self._made is None or self._made[0] != keys:
                self._made = keys, self._connect(*keys)
            return self._made[1]

    def _connect(self, access_key: str, secret_key: str) -> S3Client:
        try:
            import boto3  # noqa: PLC0415 (34 MiB that only a backend of this kind needs)
            from botocore.config import Config  # noqa: PLC0415
        except ImportError:
            raise ConfigError(
                "boto3 is not installed", subject=self._subject, hint="install volumed with the extra s3: volumed[s3]"
            ) from None
        session = boto3.session.Session(aws_access_key_id=access_key, aws_secret_access_key=secret_key)
        client: S3Client = session.client(
            "s3",
            endpoint_url=self.access.endpoint,
            region_name=self.access.region,
            verify=self.access.tls_ca,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                max_pool_connections=32,
                s3={"addressing_style": "path" if self.access.path_style else "virtual"},
                # Newer checksums are unknown to ECS, older gateways and others.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
        return client

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[S3Client]:
        """A client; what its calls raise, in our words. `what` was to be done."""
        client = self.client()
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            yield client
        except ClientError as error:
            raise refused(error, what, self._subject) from None
        except BotoCoreError as error:
            raise unanswered(error, what, self._subject) from None

    # Buckets
    def create_bucket(self, name: str) -> None:
        """Ours already is success."""
        place: dict[str, Any] = {}
        if self.access.endpoint is None and self.access.region != "us-east-1":
            place = {"CreateBucketConfiguration": {"LocationConstraint": self.access.region}}
        with self.told(f"making bucket {name}") as client:
            try:
                client.create_bucket(Bucket=name, **place)
            except client.exceptions.BucketAlreadyOwnedByYou:
                return

    def delete_bucket(self, name: str) -> None:
        with contextlib.suppress(NotFound), self.told(f"removing bucket {name}") as client:
            client.delete_bucket(Bucket=name)

    def bucket_exists(self, name: str) -> bool:
        try:
            with self.told(f"looking at bucket {name}") as client:
                client.head_bucket(Bucket=name)
        except NotFound:
            return False
        return True

    def buckets(self) -> tuple[str, list[str]]:
        """The user's id, and the names of all buckets that are the user's."""
        names: list[str] = []
        more: dict[str, Any] = {}
        with self.told("listing buckets") as client:
            while True:
                page = client.list_buckets(**more)
                names += [bucket["Name"] for bucket in page.get("Buckets", [])]
                if not page.get("ContinuationToken"):
                    return page.get("Owner", {}).get("ID", ""), names
                more = {"ContinuationToken": page["ContinuationToken"]}

    # Objects
    def read(self, bucket: str, key: str) -> bytes | None:
        """None when there is no such object."""
        try:
            with self.told(f"reading {bucket}/{key}") as client:
                return client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except NotFound:
            return None

    def write(self, bucket: str, key: str, data: bytes, **more: Any) -> None:
        with self.told(f"writing {bucket}/{key}") as client:
            client.put_object(Bucket=bucket, Key=key, Body=data, **more)

    def any_below(self, bucket: str, prefix: str) -> bool:
        with self.told(f"listing {bucket}/{prefix}") as client:
            return bool(client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents"))

    def folders(self, bucket: str, prefix: str) -> list[str]:
        """What stands between `prefix` and the next slash, of every key."""
        with self.told(f"listing {bucket}/{prefix}") as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
            found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])]
        return [name.removeprefix(prefix).rstrip("/") for name in found]

    def remove_below(self, bucket: str, prefix: str, *, sparing: str) -> list[Version]:
        """Every object but one, in all its versions, and every upload that was never finished; the versions of the one
        that was spared. No such bucket is success. Raises DeadlineExceeded with the work half done; the same again
        goes on."""
        spared: list[Version] = []
        with contextlib.suppress(NotFound), self.told(f"removing {bucket}/{prefix}*") as client:
            uploads = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
            for upload in [each for page in uploads for each in page.get("Uploads", [])]:
                with contextlib.suppress(client.exceptions.NoSuchUpload):
                    client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
                listed = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
                found = [Version(each["Key"], each["VersionId"]) for each in listed]
                self._remove(client, bucket, [each for each in found if each.key != sparing])
                spared += [each for each in found if each.key == sparing]
                if context.remaining(1.0) == 0:
                    raise DeadlineExceeded(f"{bucket}/{prefix} holds more than could be removed in time")
        return spared

    def remove(self, bucket: str, versions: list[Version]) -> None:
        """Gone already is success."""
        with contextlib.suppress(NotFound), self.told(f"removing objects of bucket {bucket}") as client:
            self._remove(client, bucket, versions)

    def _remove(self, client: S3Client, bucket: str, versions: list[Version]) -> None:
        for key, version in versions:
            if _NO_XML.search(key):
                client.delete_object(Bucket=bucket, Key=key, VersionId=version)
        rest: list[ObjectIdentifierTypeDef] = [
            {"Key": key, "VersionId": version} for key, version in versions if not _NO_XML.search(key)
        ]
        if not rest:
            return
        errors = client.delete_objects(Bucket=bucket, Delete={"Objects": rest, "Quiet": True}).get("Errors")
        if errors:
            first = errors[0]
            text = f"{len(errors)} objects of bucket {bucket} cannot be removed, {first.get('Key')} among them"
            reason = first.get("Message") or first.get("Code") or "no reason given"
            raise BackendError(
                f"{text}: {reason}", subject=self._subject, hint="is the bucket locked, or its policy against it?"
            )


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """S3's older answer to the question whether a list of what to delete came over whole; many servers demand it."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def refused(error: ClientError, what: str, subject: str) -> VolumedError:
    """The server answered, and with an error."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    message = str(error.response.get("Error", {}).get("Message", "")) or code
    answer = error.response.get("ResponseMetadata", {})
    if code == "RequestTimeTooSkewed":
        date = answer.get("HTTPHeaders", {}).get("date")
        clock = f" (there it is {date})" if date else ""
        text = f"{what}: the clock of this machine and the server's{clock} differ too much"
        return BackendError(text, subject=subject, hint="set this machine's clock by NTP")
    if code in _REFUSED:
        return PermissionDenied(f"{what}: {_REFUSED[code]} ({code})", subject=subject)
    if code == "BucketAlreadyExists":
        return InUse(f"{what}: somebody else has a bucket of this name", subject=subject)
    kind: type[VolumedError] = BackendError
    if code in _GONE:
        kind = NotFound
    elif code in _FULL:
        kind = CapacityExhausted
    elif answer.get("HTTPStatusCode", 0) >= HTTPStatus.INTERNAL_SERVER_ERROR or code == "SlowDown":
        kind = BackendUnavailable
    return kind(f"{what}: {message}", subject=subject)


def unanswered(error: BotoCoreError, what: str, subject: str) -> VolumedError:
    """No answer came, or none that can be trusted."""
    from botocore import exceptions  # noqa: PLC0415

    if isinstance(error, exceptions.SSLError):
        return ConfigError(f"{what}: {error}", subject=subject, hint="tls-ca names the file with the server's CA")
    if isinstance(error, exceptions.ReadTimeoutError | exceptions.ConnectTimeoutError):
        return DeadlineExceeded(f"{what}: the server does not answer: {error}", subject=subject)
    return BackendUnavailable(f"{what}: {error}", subject=subject)
