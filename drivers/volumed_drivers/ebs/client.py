"""Amazon EC2 as the `ebs` driver needs it: one door to its API, the instance's own metadata, and look-ups that many
callers share.

Throttled calls are repeated by boto3 ("adaptive": a token bucket on our side, with jitter). What EC2 bills a caller's
patience for most is Describe: so whoever asks while a call is on its way shares the next one, and no more than three
arrive there in any second, however many wait and however long a call is on its way.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from volumed import context
from volumed.driver.secret import Secret, read_secret
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    DeadlineExceeded,
    InUse,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    VolumedError,
)

METADATA = "http://169.254.169.254"
DESCRIBES_PER_SECOND = 3
_FILTER_VALUES = 200  # of one filter, says EC2
_PAUSES = (0.25, 2.0)  # seconds between two looks at a slow change: the first, and the longest
_ANSWER = 100.0  # seconds for an answer of EC2, boto3's repetitions included

_MUCH_LATER = 900.0

T = TypeVar("T")
Item = dict[str, Any]  # as boto3 gives it

# What EC2 says, and what that is for whoever asked. https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
_DENIED = ("UnauthorizedOperation", "AuthFailure", "Blocked", "OptInRequired", "InvalidClientTokenId")
_THROTTLED = ("RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled")
_AWAY = (
    "InternalError",
    "InternalFailure",
    "Unavailable",
    "ServiceUnavailable",
    "SnapshotCreationPerVolumeRateExceeded",
)
_FULL = ("AttachmentLimitExceeded", "InstanceLimitExceeded", "ResourceLimitExceeded", "ResourceCountExceeded")
_LATER = (
    "VolumeModificationRateExceeded",
    "IncorrectModificationState",
    "ConcurrentSnapshotLimitExceeded",
    "SnapshotCreationPerVolumeRateExceeded",
)
_KINDS: tuple[tuple[Callable[[str], bool], type[VolumedError], str], ...] = (
    (lambda code: code in _DENIED, PermissionDenied, "give the key, or the instance's role, what the README lists"),
    (lambda code: code in _THROTTLED, BackendUnavailable, "too many calls are made with this account; try again later"),
    (lambda code: code in _AWAY, BackendUnavailable, "try again later"),
    (lambda code: code in _LATER, PreconditionFailed, "try again later"),
    (lambda code: code in _FULL, CapacityExhausted, "detach something, or use another instance"),
    (lambda code: code.endswith(("LimitExceeded", "InsufficientVolumeCapacity")), CapacityExhausted, "raise the quota"),
    (lambda code: code == "InvalidVolume.ZoneMismatch", PreconditionFailed, "use a backend of the instance's zone"),
    (lambda code: code == "IdempotentParameterMismatch", AlreadyExists, ""),
    (lambda code: code.endswith(("NotFound", "Malformed")), NotFound, ""),
    (lambda code: code in ("VolumeInUse", "InvalidSnapshot.InUse"), InUse, "detach it first"),
    (lambda code: code.startswith(("InvalidParameter", "MissingParameter", "UnknownVolumeType")), InvalidRequest, ""),
)


def code_of(error: BaseException) -> str:
    """EC2's code of an error that came through `Ec2.call`, or nothing."""
    return str(getattr(error, "ec2_code", ""))


class Ec2:
    """One account and region."""

    def __init__(
        self, *, subject: str, region: str, endpoint: str, metadata: str, keys: tuple[Secret, Secret] | None
    ) -> None:
        """`keys`: where the access key and its secret lie; None: what boto3 finds, the instance's role for one."""
        self._subject, self._region, self._endpoint = subject, region, endpoint
        self._metadata_url, self._keys = metadata, keys
        self._making = threading.Lock()
        self._client: Any = None
        self._made_of: tuple[str, ...] = ()
        self._gate = Gate(DESCRIBES_PER_SECOND, 1.0)
        self._turn = threading.local()

    @functools.cached_property
    def metadata(self) -> Metadata:
        return Metadata(self._metadata_url, self._subject)

    @functools.cached_property
    def region(self) -> str:
        return self._region or self.metadata.read("placement/region")

    def call(self, operation: str, **parameters: Any) -> Item:
        """One call of the API. Raises our errors, with EC2's code in `ec2_code`."""
        client = self._connected()
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError  # noqa: PLC0415
        from botocore.parsers import ResponseParserError  # noqa: PLC0415

        try:
            answer: Item = getattr(client, operation)(**parameters)
        except ClientError as error:
            raise self._translated(operation, error.response.get("Error", {})) from None
        except NoCredentialsError:
            raise ConfigError(
                "no credentials for EC2 were found",
                subject=self._subject,
                hint="give the instance a role, or set access-key and secret-key",
            ) from None
        except (BotoCoreError, ResponseParserError) as error:
            raise BackendUnavailable(f"EC2 does not answer: {error}", subject=self._subject) from None
        return answer

    def describe(self, operation: str, items: str, **parameters: Any) -> list[Item]:
        """All pages of a Describe call."""
        found: list[Item] = []
        while True:
            try:
                answer = self.call(operation, **parameters)
            finally:
                self._leave_gate()
            found += answer[items]
            if not answer.get("NextToken"):
                return found
            parameters["NextToken"] = answer["NextToken"]

    def _enter_gate(self, event_name: str, **_: Any) -> None:
        """Before each attempt, of which boto3 may make several for one call."""
        if event_name.rpartition(".")[2].startswith("Describe"):
            self._leave_gate()
            self._gate.enter(context.remaining(_ANSWER), subject=self._subject)
            self._turn.held = True

    def _leave_gate(self) -> None:
        if getattr(self._turn, "held", False):
            self._turn.held = False
            self._gate.leave()

    def _translated(self, operation: str, told: Mapping[str, Any]) -> VolumedError:
        code, text = told.get("Code", ""), told.get("Message", "")
        found = ((kind, hint) for fits, kind, hint in _KINDS if fits(code))
        kind, hint = next(found, (BackendError, ""))
        error = kind(f"EC2 refused {operation}: {text} ({code})", subject=self._subject, hint=hint)
        if code in _LATER:
            error.retry_after = _MUCH_LATER
        error.ec2_code = code  # type: ignore[attr-defined]
        return error

    def _connected(self) -> Any:
        """The client; a new one when the keys were changed."""
        read = tuple(read_secret(key, subject=self._subject) for key in self._keys or ())
        with self._making:
            if self._client is None or read != self._made_of:
                self._client, self._made_of = self._connect(read), read
            return self._client

    def _connect(self, keys: Sequence[str]) -> Any:
        try:
            from botocore.config import Config  # noqa: PLC0415 (34 MiB that nobody without this driver pays)
        except ImportError:
            raise ConfigError(
                "boto3 is not installed", subject=self._subject, hint="install it: pip install 'volumed[ebs]'"
            ) from None
        access, secret = keys or (None, None)
        with _sessions:
            session = _session()
            if self._metadata_url != METADATA:
                session.set_config_variable("ec2_metadata_service_endpoint", self._metadata_url)
            client = session.create_client(
                "ec2",
                region_name=self.region,
                endpoint_url=self._endpoint or None,
                aws_access_key_id=access,
                aws_secret_access_key=secret,
                config=Config(
                    retries={"mode": "adaptive", "total_max_attempts": 6},
                    connect_timeout=5,
                    read_timeout=20,
                    max_pool_connections=50,
                    user_agent_extra="volumed",
                ),
            )
            client.meta.events.register("before-send.ec2", self._enter_gate)
            return client


_sessions = threading.Lock()


@functools.cache
def _session() -> Any:
    """botocore's own, which keeps what it read of EC2's definition: 0.5 s, once. Not to be used by two threads."""
    from botocore.session import Session  # noqa: PLC0415

    return Session()


class Metadata:
    """The instance's metadata service, version 2: a token first. Read once: an instance does not change its place.
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html"""

    def __init__(self, url: str, subject: str) -> None:
        self._at = urlsplit(url)
        self._subject = subject
        self._known: dict[str, str] = {}

    def read(self, name: str) -> str:
        """Raises BackendUnavailable: this machine is no instance, or may not ask."""
        if name not in self._known:
            try:
                token = self._ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
                held = {"X-aws-ec2-metadata-token": token}
                self._known[name] = self._ask("GET", f"/latest/meta-data/{name}", held)
            except (OSError, http.client.HTTPException) as error:
                raise BackendUnavailable(
                    f"the metadata service of the instance does not tell {name}: {error}",
                    subject=self._subject,
                    hint="is this an EC2 instance? From a container it needs a hop limit of 2",
                ) from None
        return self._known[name]

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        connection = http.client.HTTPConnection(self._at.hostname or "", self._at.port or 80, timeout=2)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode().strip()
        finally:
            connection.close()
        if answer.status != http.client.OK or not text:
            raise http.client.HTTPException(f"{method} {path}: status {answer.status}")
        return text


class Gate:
    """At most `count` calls arrive on the other side in any `seconds`. When one arrives nobody knows, but by its answer
    it has: so its turn is another's so many seconds after that, and delays on the way change nothing."""

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._turns: queue.SimpleQueue[float] = queue.SimpleQueue()  # from when on each can be taken, the first first
        for _ in range(count):
            self._turns.put(time.monotonic())

    def enter(self, patience: float, *, subject: str) -> None:
        """Waits for a turn; whoever has one calls `leave` when it was answered. Raises DeadlineExceeded."""
        try:
            free_at = self._turns.get(timeout=patience)
        except queue.Empty:
            raise DeadlineExceeded("EC2 did not answer in time", subject=subject) from None
        time.sleep(max(0.0, free_at - time.monotonic()))

    def leave(self) -> None:
        self._turns.put(time.monotonic() + self._seconds)


class Lookups(Generic[T]):
    """`ask` for one thing; whoever asks while a call is on its way shares the next one, as fresh as one of his own."""

    def __init__(self, fetch: Callable[[Sequence[str]], Mapping[str, T]], missing: T, subject: str) -> None:
        """`fetch`: all of these in one call; what it does not tell is `missing`."""
        self._fetch, self._missing, self._subject = fetch, missing, subject
        self._lock = threading.Lock()
        self._asked: dict[str, Future[T]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ec2-look")

    def ask(self, key: str) -> T:
        with self._lock:
            if not self._asked:
                self._worker.submit(self._serve)
            answer = self._asked.setdefault(key, Future())
        try:
            return answer.result(context.remaining(_ANSWER))
        except FutureTimeout:
            raise DeadlineExceeded("EC2 did not answer in time", subject=self._subject) from None

    def _serve(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, {}
        keys = list(asked)
        for start in range(0, len(keys), _FILTER_VALUES):
            some = keys[start : start + _FILTER_VALUES]
            try:
                found = self._fetch(some)
            except BaseException as error:
                for key in some:
                    asked[key].set_exception(error)
            else:
                for key in some:
                    asked[key].set_result(found.get(key, self._missing))


class Waited(NamedTuple):
    """How long a slow change may take, and what is said when it takes longer."""

    seconds: float
    text: str
    hint: str = ""


def until(look: Callable[[], T | None], waited: Waited, *, subject: str, at_once: bool = True) -> T:
    """What `look` finds in the end: tried again and again, each time a little later, so that callers spread.
    `at_once`: False where EC2 was only just asked, and a first look would be wasted.
    Raises DeadlineExceeded with what `waited` says, and what `look` raises otherwise."""
    ends = time.monotonic() + context.remaining(waited.seconds)
    pause, longest = _PAUSES
    while True:
        if at_once:
            with contextlib.suppress(DeadlineExceeded):
                found = look()
                if found is not None:
                    return found
        at_once = True
        left = ends - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(waited.text, subject=subject, hint=waited.hint)
        time.sleep(min(left, pause * random.uniform(0.8, 1.2)))  # noqa: S311 (no secret)
        pause = min(longest, pause * 1.3)
