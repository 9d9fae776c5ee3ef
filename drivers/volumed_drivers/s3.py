"""A bucket, or a prefix of one, per volume on any S3 (ECS, RADOS Gateway, AWS), mounted by s3fs.

BUCKET/BASE/volumed.json    the mark, written last: what has none was not finished
BUCKET/BASE/data/           the root of the tree, an object with owner and mode; below it what containers see

BUCKET is PREFIX<volume id> and BASE empty; or, with the option `bucket`, BASE is PREFIX<volume id>. s3fs serves
BUCKET/BASE at a private place, its folder `data` is bound to where it is wanted, and the private mount is gone again:
s3fs cannot change owner and mode of the root that it mounts, but of every folder below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from volumed.driver import (
    Capability,
    CreatedVolume,
    Facts,
    FilesystemDriver,
    Found,
    Host,
    Options,
    Probe,
    Secret,
    SupportsExpand,
    VolumeSpec,
)
from volumed.errors import BackendError, ConfigError, DeadlineExceeded, MountFailed, NotFound, NotSupported
from volumed.model import Handle, VolumeId
from volumed.testing import crash
from volumed_drivers.fuse import FuseClient, check_options, client_name, write_private
from volumed_drivers.radosgw import RadosGateway
from volumed_drivers.s3_client import S3, Access

_VOLUME_ID = re.compile(r"v[0-9a-f]{32}")
_MARK, _TREE = "volumed.json", "data/"
MOUNT_TIMEOUT, FINISH_TIMEOUT = 45.0, 20.0
# s3fs's own patience with a request; its retries add up to less than MOUNT_TIMEOUT.
_PATIENCE = ("retries=2", "connect_timeout=5", "readwrite_timeout=20")


def _is_endpoint(text: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+/?", text):
        raise ValueError("write it as https://s3.example.org or http://10.0.0.1:9020")
    return text.rstrip("/")


def _is_prefix(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9./-]{0,28}", text):
        raise ValueError("at most 29 lower-case letters, digits, dots, dashes and slashes")
    return text


class S3Options(Options):
    endpoint: Annotated[str, AfterValidator(_is_endpoint)] | None = Field(
        default=None, description="Address of the server; default: AWS in the region"
    )
    region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]+$", description="That requests are signed for")
    access_key: Secret = Field(description="Where the access key lies: file:/PATH, env:NAME or credential:NAME")
    secret_key: Secret = Field(description="Where the secret key lies")
    bucket: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$",
        description="One that is there, for all volumes; default: each volume has a bucket of its own",
    )
    prefix: Annotated[str, AfterValidator(_is_prefix)] = Field(
        default="volumed-", description="Of the volumes' buckets, or of their keys in the one bucket"
    )
    path_style: bool | None = Field(
        default=None, description="The bucket stands in the path, not in the host name; default: yes with an endpoint"
    )
    tls_ca: Path | None = Field(default=None, description="File with the CA of the server's certificate")
    advisory_size: bool = Field(
        default=False, description="Take a size where none can be enforced: it is kept and shown, and bounds nothing"
    )
    cache_time: int = Field(
        default=10, ge=0, le=3600, description="Seconds for which a node may not see what others have changed"
    )
    work_path: Path = Field(
        default=Path("/var/tmp"),  # noqa: S108 (s3fs makes its files there without names)
        description="Folder for files that are open: as much room as they have bytes",
    )


class S3Driver(FilesystemDriver, SupportsExpand):
    BackendOptions = S3Options
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.SIZE, Capability.MULTI_NODE})
    remote: ClassVar[bool] = True
    # s3fs could keep xattrs, but then `cp -p` loses modes: it sets them by an ACL, which s3fs keeps and ignores.
    cannot_hold: ClassVar[frozenset[str]] = frozenset(
        {"hardlinks", "devices", "xattrs", "trusted-xattrs", "capabilities", "acls", "flags", "sparse", "locks"}
        | {"atomic-rename", "long-paths", "longest-paths", "control-characters"}
    )

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, S3Options)
        self._options = options
        self._subject = f"backend {backend}"
        path_style = options.endpoint is not None if options.path_style is None else options.path_style
        access = Access(
            endpoint=options.endpoint,
            region=options.region,
            path_style=path_style,
            tls_ca=str(options.tls_ca) if options.tls_ca else None,
            access_key=options.access_key,
            secret_key=options.secret_key,
        )
        self._s3 = S3(access, subject=self._subject)
        self._gateway = RadosGateway(self._s3, subject=self._subject)
        self._quota_user = ""  # empty: sizes are not enforced
        self._no_quotas = ""  # why; empty as well: nobody has told yet

    def probe(self) -> Probe:
        self._check_options()
        client = self.host.run(["s3fs", "--version"], timeout=10.0).stdout.partition(" (")[0].rpartition(" ")[2]
        if self._options.bucket is None:
            user, _ = self._s3.buckets()
            reason = self._look_for_quotas(user)
        else:
            if not self._s3.bucket_exists(self._options.bucket):
                raise ConfigError(
                    f"there is no bucket {self._options.bucket}", subject=self._subject, hint="make it, or leave it out"
                )
            reason = "the volumes share a bucket"
        lacking: dict[Capability, str] = {}
        if reason and not self._options.advisory_size:
            text = f"no size can be enforced: {reason}; leave the size out, or set advisory-size"
            lacking = {Capability.SIZE: text, Capability.EXPAND: text}
        facts = {
            "endpoint": self._options.endpoint or f"AWS, {self._options.region}",
            "volumes": f"prefixes in bucket {self._options.bucket}" if self._options.bucket else "buckets",
            "client": f"s3fs {client}",
            "sizes": "enforced" if not reason else "advisory" if self._options.advisory_size else "refused",
            "cannot-hold": ", ".join(sorted(self.cannot_hold)),
        }
        return Probe(lacking=lacking, facts=facts)

    def _check_options(self) -> None:
        for path in (self._options.tls_ca, self._options.work_path):
            if path is not None and not path.exists():
                raise ConfigError(f"{path} does not exist", subject=self._subject)
        if self._options.bucket is None and "/" in self._options.prefix:
            raise ConfigError("a prefix of buckets has no slash", subject=self._subject, hint="or name one bucket")

    def _look_for_quotas(self, user: str) -> str:
        """Why there are none; empty when there are. Without an answer what was known holds."""
        if self._options.endpoint is None:
            return "AWS has no quotas for buckets"
        try:
            self._gateway.check()
            self._quota_user, self._no_quotas = user, ""
        except NotSupported as error:
            self._quota_user, self._no_quotas = "", error.text
        except BackendError as error:
            if not self._quota_user and not self._no_quotas:
                return f"the server did not answer whether it has quotas for buckets, and is asked again ({error.text})"
        return self._no_quotas

    def _place(self, handle: str) -> tuple[str, str]:
        """Bucket, and what all keys of the volume begin with."""
        if not _VOLUME_ID.fullmatch(handle):
            raise NotFound(f"{handle[:60]!r} is no volume of this driver", subject=self._subject)
        if self._options.bucket is None:
            return f"{self._options.prefix}{handle}", ""
        return self._options.bucket, f"{self._options.prefix}{handle}/"

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        bucket, base = self._place(spec.id)
        if spec.size is not None and not self._quota_user and not self._options.advisory_size:
            raise NotSupported(
                "a size cannot be enforced here", subject=self._subject, hint="leave the size out, or set advisory-size"
            )
        if self._options.bucket is None:
            self._s3.create_bucket(bucket)
            crash.point("s3.create.bucket")
        there = self._read_mark(bucket, base)
        if there is not None:
            return CreatedVolume(Handle(spec.id), _size(there))
        size = spec.size
        if size is not None and self._quota_user:
            size = self._gateway.bound(bucket, size, user=self._quota_user)
            crash.point("s3.create.bounded")
        # Without a mark nobody had it: whatever root an earlier try has left is written over by the same.
        root = {"mode": str(0o40755), "uid": "0", "gid": "0"}
        self._s3.write(bucket, base + _TREE, b"", ContentType="application/x-directory", Metadata=root)
        crash.point("s3.create.tree")
        self._write_mark(bucket, base, {"volume": spec.id, "size": size, "mark": dict(spec.mark)})
        return CreatedVolume(Handle(spec.id), size)

    def _write_mark(self, bucket: str, base: str, mark: dict[str, object]) -> None:
        self._s3.write(bucket, base + _MARK, json.dumps(mark).encode(), ContentType="application/json")

    def _read_mark(self, bucket: str, base: str) -> dict[str, object] | None:
        try:
            data = self._s3.read(bucket, base + _MARK)
            read = json.loads(data) if data is not None else None
        except ValueError:
            return {}
        return read if isinstance(read, dict) else None

    def delete(self, handle: Handle) -> None:
        bucket, base = self._place(handle)
        for helper in self.host.helpers(f"s3-{handle}-"):
            if not helper.running:
                self.host.stop_helper(helper.name)
        marks = self._s3.remove_below(bucket, base, sparing=base + _MARK)
        crash.point("s3.delete.tree")
        self._s3.remove(bucket, marks)
        if self._options.bucket is None:
            crash.point("s3.delete.emptied")
            self._s3.delete_bucket(bucket)

    def inspect(self, handle: Handle) -> Facts:
        bucket, base = self._place(handle)
        if self._quota_user:
            usage = self._gateway.usage(bucket)
            return Facts(size=usage.limit, used=usage.used)
        return Facts(size=_size(self._present(bucket, base)), used=None)

    def _present(self, bucket: str, base: str) -> dict[str, object]:
        mark = self._read_mark(bucket, base)
        if mark is None:
            raise NotFound(f"{bucket}/{base}{_MARK} is gone", subject=self._subject, hint="put it back from a backup")
        return mark

    def list(self) -> Iterable[Found]:
        if self._options.bucket is None:
            _, names = self._s3.buckets()
        else:
            folder = self._options.prefix.rpartition("/")[0]
            names = self._s3.folders(self._options.bucket, f"{folder}/" if folder else "")
        prefix = self._options.prefix.rpartition("/")[2]
        starts = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(self._found, [name for name in starts if _VOLUME_ID.fullmatch(name)])

    def _found(self, volume_id: str) -> Found:
        mark = self._read_mark(*self._place(volume_id))
        words = mark.get("mark") if mark else None
        kept = {str(key): str(value) for key, value in words.items()} if isinstance(words, dict) else {}
        return Found(Handle(volume_id), VolumeId(volume_id), kept, whole=mark is not None)

    def find(self, volume_id: VolumeId) -> Handle | None:
        bucket, base = self._place(volume_id)
        if not base:
            return Handle(volume_id) if self._s3.bucket_exists(bucket) else None
        try:
            return Handle(volume_id) if self._s3.any_below(bucket, base) else None
        except NotFound as error:
            raise ConfigError(error.text, subject=self._subject, hint="put the bucket back") from None

    def expand(self, handle: Handle, size: int) -> int:
        bucket, base = self._place(handle)
        mark = self._present(bucket, base)
        there = self.inspect(handle).size
        if there is not None and there >= size:
            return there
        if self._quota_user:
            size = self._gateway.bound(bucket, size, user=self._quota_user)
        self._write_mark(bucket, base, {**mark, "size": size})
        return size

    # Mounting
    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        check_options(options, subject=self._subject)
        bucket, base = self._place(handle)
        self._present(bucket, base)
        name = client_name("s3", handle, target)
        root = self.host.private_folder(name) / "root"
        client = FuseClient(self.host, name, root, subject=self._subject)
        if client.running() or self.host.is_mountpoint(root):
            client.end(timeout=5.0)  # left half started by a daemon that was killed
        root.mkdir(exist_ok=True)
        words = [*self._client_options(bucket, base), *options, *(["ro"] if readonly else [])]
        try:
            self._start(client, f"{bucket}:/{base.rstrip('/')}", root, words)
            self._bind(client, root / "data", target)
            self.host.unmount_network(root)
        finally:
            if not self.host.is_mountpoint(root):
                root.rmdir()
                root.parent.rmdir()

    def _start(self, client: FuseClient, source: str, root: Path, words: Sequence[str]) -> None:
        keys = root.with_name("keys")
        write_private(keys, ":".join(self._s3.keys()))
        try:
            argv: list[str | Path] = ["s3fs", source, root, "-f", "-o", ",".join([f"passwd_file={keys}", *words])]
            ca = {"CURL_CA_BUNDLE": str(self._options.tls_ca)} if self._options.tls_ca else None
            client.start(argv, env=ca, timeout=MOUNT_TIMEOUT)
        finally:
            keys.unlink()  # s3fs has read it before it mounts

    def _client_options(self, bucket: str, base: str) -> Iterable[str]:
        options = self._options
        yield f"url={options.endpoint or f'https://s3.{options.region}.amazonaws.com'}"
        yield f"endpoint={options.region}"
        if self._s3.access.path_style:
            yield "use_path_request_style"
        yield f"fsname={self._source(bucket, base)}"
        yield f"tmpdir={options.work_path}"
        yield from _PATIENCE
        yield f"stat_cache_expire={options.cache_time}"
        yield "enable_noobj_cache"
        yield "notsup_compat_dir"  # else several questions for each name that is not there
        yield "attr_timeout=0"  # s3fs answers fchmod(2) of a new file with what was before, and the kernel kept that
        yield "use_wtf8"  # names that are not UTF-8
        yield "allow_other"  # s3fs checks permissions by itself

    @staticmethod
    def _source(bucket: str, base: str) -> str:
        """As the mount table shows it."""
        return f"s3:{bucket}/{base}"

    def _bind(self, client: FuseClient, tree: Path, target: Path) -> None:
        """It asks the server, and tells as well whether the client can serve at all: one that the server
        refuses mounts first, and dies then."""
        try:
            self.host.bind_network(tree, target, timeout=MOUNT_TIMEOUT)
        except MountFailed:
            raise client.failure() from None
        except DeadlineExceeded:
            client.end(timeout=2.0)
            raise DeadlineExceeded(
                "mounting got no answer from the server in time", subject=self._subject, hint="is it up?"
            ) from None

    def unmount(self, handle: Handle, target: Path) -> None:
        """All that was written is at the server when its file is closed: nothing is lost with the client."""
        self.host.unmount_network(target)
        name = client_name("s3", handle, target)
        if self.host.helper(name) is not None:
            FuseClient(self.host, name, target, subject=self._subject).finish(timeout=FINISH_TIMEOUT)

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        entry = next((entry for entry in reversed(self.host.mounts()) if entry.target == target), None)
        return entry is not None and (entry.source, entry.root) == (self._source(*self._place(handle)), "/data")


def _size(mark: dict[str, object]) -> int | None:
    size = mark.get("size")
    return size if isinstance(size, int) else None
