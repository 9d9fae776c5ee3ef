"""EC2 for tests: moto, behind a layer that has EC2's own manners.

moto answers at once, forgives everything and forgets tokens; EC2 does not. The layer delays transitions, throttles,
answers look-ups with what was true a moment ago, and refuses what EC2 refuses. Whoever gives it `Hardware` sees disks
come, go and grow as the calls say.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import re
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

ZONES = ("eu-west-1a", "eu-west-1b")
REGION = "eu-west-1"
KEYS = {"AKIAVOLUMEDTESTS": "a-secret-of-the-tests", "ASIAVOLUMEDROLE": "a-secret-of-the-role"}
TOKEN = "a-token-of-the-metadata-service"
_NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"


class Hardware:
    """What a real machine would see; by itself nothing."""

    def made(self, disk: str, size: int, snapshot: str) -> None: ...
    def deleted(self, disk: str) -> None: ...
    def attached(self, disk: str, machine: str, name: str) -> None: ...
    def detached(self, disk: str, machine: str, *, force: bool) -> None: ...
    def grown(self, disk: str, size: int) -> None: ...
    def stored(self, disk: str, snapshot: str) -> None: ...


@dataclass
class Manners:
    """How this EC2 behaves. Seconds, and a share of calls."""

    delay: float = 0.0  # of each transition
    stale: float = 0.0  # for so long after a change look-ups may show what was before
    stale_share: float = 0.5  # of the look-ups
    throttled: float = 0.0  # of all calls
    between_modifications: float = 6 * 3600
    most_attached: int = 28


@dataclass
class _Change:
    """Of one disk or snapshot; `before`: as it was shown until then, None when it was not there."""

    at: float
    before: ET.Element | None


class Refused(Exception):
    def __init__(self, code: str, text: str, status: str = "400 Bad Request") -> None:
        super().__init__(text)
        self.code, self.text, self.status = code, text, status


Answer = tuple[str, list[tuple[str, str]], bytes]


@dataclass
class Layer:
    """A WSGI application around moto's."""

    app: Callable[..., Any]
    manners: Manners = field(default_factory=Manners)
    hardware: Hardware = field(default_factory=Hardware)
    instance: str = ""  # the one whose metadata is told
    zone: str = ZONES[0]

    def __post_init__(self) -> None:
        self.calls: list[tuple[float, str]] = []
        self._random = random.Random(1)
        self._lock = threading.RLock()
        self._tokens: dict[str, tuple[str, Answer]] = {}
        self._born: dict[str, float] = {}
        self._moving: dict[str, tuple[float, str]] = {}  # attaching or detaching, until when
        self._modified: dict[str, float] = {}
        self._changes: dict[str, _Change] = {}
        self._credentials: tuple[str, str] = ("", "")
        self._timers: list[threading.Timer] = []

    # The door
    def __call__(self, env: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        body = env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0))
        if env["PATH_INFO"].startswith("/latest/"):
            status, headers, data = self._metadata(env)
        elif "/ec2/" not in env.get("HTTP_AUTHORIZATION", ""):
            status, headers, data = self._pass(env, body)
        else:
            query = dict(urllib.parse.parse_qsl(body.decode("latin1")))
            try:
                status, headers, data = self._ec2(env, body, query)
            except Refused as error:
                status, headers, data = error.status, [("Content-Type", "text/xml")], _refusal(error)
        rest = [(key, value) for key, value in headers if key.lower() != "content-length"]
        start(status, [*rest, ("Content-Length", str(len(data)))])
        return [data]

    def _pass(self, env: dict[str, Any], body: bytes) -> Answer:
        inner = dict(env) | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        told: dict[str, Any] = {}
        data = b"".join(self.app(inner, lambda status, headers, _=None: told.update(status=status, headers=headers)))
        return told["status"], told["headers"], data

    def _ask(self, env: dict[str, Any], **query: str) -> ET.Element:
        """A call of the layer's own, as the caller."""
        text = urllib.parse.urlencode(query | {"Version": "2016-11-15"})
        return _parsed(self._pass(env, text.encode())[2])

    def _metadata(self, env: dict[str, Any]) -> Answer:
        """Version 2: nothing without a token."""
        path, role = env["PATH_INFO"].removeprefix("/latest/"), "iam/security-credentials/"
        if path == "api/token" and env["REQUEST_METHOD"] == "PUT":
            return "200 OK", [], TOKEN.encode()
        if env.get("HTTP_X_AWS_EC2_METADATA_TOKEN") != TOKEN:
            return "401 Unauthorized", [], b""
        key = list(KEYS)[1]
        known = {
            "instance-id": self.instance,
            "placement/availability-zone": self.zone,
            "placement/region": REGION,
            role: "volumed",
            f"{role}volumed": json.dumps(
                {"Code": "Success", "AccessKeyId": key, "SecretAccessKey": KEYS[key], "Token": "t"}
                | {"Expiration": "2100-01-01T00:00:00Z", "LastUpdated": "2020-01-01T00:00:00Z", "Type": "AWS-HMAC"}
            ),
        }
        told = known.get(path.removeprefix("meta-data/"))
        return ("200 OK", [], told.encode()) if told else ("404 Not Found", [], b"")

    def _ec2(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        action = query.get("Action", "")
        if not any(f"Credential={key}/" in env["HTTP_AUTHORIZATION"] for key in KEYS):
            raise Refused("AuthFailure", "AWS was not able to validate the provided access credentials", "401 X")
        with self._lock:
            self.calls.append((time.monotonic(), action))
            if self._random.random() < self.manners.throttled:
                raise Refused("RequestLimitExceeded", "Request limit exceeded.", "503 Service Unavailable")
            rule = getattr(self, f"_on_{action}", None)
            if rule is not None:
                answer: Answer = rule(env, body, query)
                return answer
            answer = self._pass(env, body)
            if action in ("DescribeVolumes", "DescribeSnapshots", "DescribeVolumesModifications"):
                answer = answer[0], answer[1], self._shown(action, answer[2], query)
            return answer

    def _later(self, then: Callable[[], None]) -> None:
        if not self.manners.delay:
            then()
            return
        timer = threading.Timer(self.manners.delay, then)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()

    # What EC2 refuses and moto does not
    def _disk(self, env: dict[str, Any], disk: str) -> ET.Element:
        told = self._ask(env, **{"Action": "DescribeVolumes", "VolumeId.1": disk}).find("volumeSet/item")
        if told is None:
            raise Refused("InvalidVolume.NotFound", f"The volume '{disk}' does not exist.")
        return told

    def _changing(self, name: str, before: ET.Element | None) -> None:
        self._changes[name] = _Change(time.monotonic(), copy.deepcopy(before))

    def _made_by_now(self, name: str) -> bool:
        return time.monotonic() - self._born.get(name, 0.0) >= self.manners.delay

    def _on_CreateVolume(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        token, asked = query.get("ClientToken", ""), repr(sorted(query.items()))
        if token in self._tokens:
            if self._tokens[token][0] != asked:
                raise Refused("IdempotentParameterMismatch", "The token was used with other parameters")
            return self._tokens[token][1]
        if query["AvailabilityZone"] not in ZONES:
            raise Refused("InvalidZone.NotFound", f"The zone '{query['AvailabilityZone']}' does not exist.")
        snapshot = query.get("SnapshotId", "")
        if snapshot and not self._made_by_now(snapshot):
            raise Refused("IncorrectState", f"Snapshot {snapshot} is pending")
        status, headers, data = self._pass(env, body)
        told = _parsed(data)
        disk = _text(told, "volumeId")
        self._born[disk] = time.monotonic()
        self._changing(disk, None)
        self.hardware.made(disk, int(_text(told, "size")), snapshot)
        _set(told, "status", "creating")
        answer = status, headers, _written(told)
        self._tokens[token] = (asked, answer)
        return answer

    def _on_DeleteVolume(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        disk = self._disk(env, query["VolumeId"])
        if disk.find("attachmentSet/item") is not None or query["VolumeId"] in self._moving:
            raise Refused("VolumeInUse", f"Volume {query['VolumeId']} is currently attached")
        self._changing(query["VolumeId"], disk)
        self.hardware.deleted(query["VolumeId"])
        return self._pass(env, body)

    def _on_AttachVolume(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        name, machine, device = query["VolumeId"], query["InstanceId"], query["Device"]
        disk = self._disk(env, name)
        if not self._made_by_now(name):
            raise Refused("IncorrectState", f"{name} is not 'available'.")
        if disk.find("attachmentSet/item") is not None:
            raise Refused("VolumeInUse", f"{name} is already attached to an instance")
        instance = self._ask(env, **{"Action": "DescribeInstances", "InstanceId.1": machine})
        zone = instance.find(".//placement/availabilityZone")
        if zone is None:
            raise Refused("InvalidInstanceID.NotFound", f"The instance ID '{machine}' does not exist")
        if zone.text != _text(disk, "availabilityZone"):
            raise Refused("InvalidVolume.ZoneMismatch", f"The volume '{name}' is not in the zone of '{machine}'")
        names = [each.text for each in instance.iterfind(".//blockDeviceMapping/item/deviceName")]
        if device in names:
            raise Refused("InvalidParameterValue", f"Invalid value '{device}' for unixDevice. It is already in use")
        if len(names) >= self.manners.most_attached:
            raise Refused("AttachmentLimitExceeded", f"Maximum number of attachments reached for '{machine}'")
        self._changing(name, disk)
        self._moving[name] = (time.monotonic() + self.manners.delay, "attaching")
        answer = self._pass(env, body)

        def arrive() -> None:
            self.hardware.attached(name, machine, device)
            with self._lock:
                self._moving.pop(name, None)

        self._later(arrive)
        return answer

    def _on_DetachVolume(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        name, machine = query["VolumeId"], query["InstanceId"]
        disk = self._disk(env, name)
        if _text(disk, "attachmentSet/item/instanceId") != machine:
            raise Refused("IncorrectState", f"Volume '{name}' is in the 'available' state.")
        if name not in self._moving:
            self._changing(name, disk)
        self._moving[name] = (time.monotonic() + self.manners.delay, "detaching")
        force = query.get("Force") == "true"
        answer: list[Answer] = []

        def leave() -> None:
            self.hardware.detached(name, machine, force=force)
            with self._lock:
                if self._moving.pop(name, None) is not None:
                    answer.append(self._pass(env, body))

        self._later(leave)
        if answer:
            return answer[0]
        told = ET.Element("DetachVolumeResponse")
        for tag, text in (("volumeId", name), ("instanceId", machine), ("status", "detaching")):
            ET.SubElement(told, tag).text = text
        return "200 OK", [("Content-Type", "text/xml")], _written(told)

    def _on_ModifyVolume(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        name, now = query["VolumeId"], time.monotonic()
        disk = self._disk(env, name)
        size = int(query.get("Size", _text(disk, "size")))
        if size < int(_text(disk, "size")):
            raise Refused("InvalidParameterValue", "New size cannot be smaller than existing size")
        last = self._modified.get(name)
        if last is not None and now - last < self.manners.between_modifications:
            raise Refused("VolumeModificationRateExceeded", "You've reached the maximum modification rate per volume.")
        self._modified[name] = now
        self._changing(name, disk)
        answer = self._pass(env, body)
        self._later(lambda: self.hardware.grown(name, size))
        return answer

    def _on_CreateSnapshot(self, env: dict[str, Any], body: bytes, query: dict[str, str]) -> Answer:
        status, headers, data = self._pass(env, body)
        told = _parsed(data)
        if status.startswith("200"):
            snapshot = _text(told, "snapshotId")
            self._born[snapshot] = time.monotonic()
            self._changing(snapshot, None)
            self.hardware.stored(query["VolumeId"], snapshot)
            _set(told, "status", "pending")
        return status, headers, _written(told)

    # What look-ups show
    def _shown(self, action: str, data: bytes, query: dict[str, str]) -> bytes:
        told = _parsed(data)
        for items in (told.find("volumeSet"), told.find("snapshotSet"), told.find("volumeModificationSet")):
            if items is None:
                continue
            for item in list(items):
                self._in_transition(action, item)
                name = _text(item, "snapshotId" if action == "DescribeSnapshots" else "volumeId")
                if self._is_stale(name) and action != "DescribeVolumesModifications":
                    before = self._changes[name].before
                    items.remove(item)
                    if before is not None:
                        items.append(copy.deepcopy(before))
            if action == "DescribeVolumes":
                self._add_deleted(items, set(query.values()))
        return _written(told)

    def _is_stale(self, name: str) -> bool:
        """Some of EC2's machines know already, others not."""
        change = self._changes.get(name)
        recent = change is not None and time.monotonic() - change.at < self.manners.stale
        return recent and self._random.random() < self.manners.stale_share

    def _add_deleted(self, items: ET.Element, values: set[str]) -> None:
        shown = {_text(item, "volumeId") for item in items}
        for name, change in self._changes.items():
            if name in shown or change.before is None or not self._is_stale(name):
                continue
            tags = {tag.text or "" for tag in change.before.iterfind("tagSet/item/value")}
            if values & (tags | {name}):
                items.append(copy.deepcopy(change.before))

    def _in_transition(self, action: str, item: ET.Element) -> None:
        if action == "DescribeSnapshots":
            if not self._made_by_now(_text(item, "snapshotId")):
                _set(item, "status", "pending")
                _set(item, "progress", "43%")
            return
        name = _text(item, "volumeId")
        if action == "DescribeVolumes":
            if not self._made_by_now(name):
                _set(item, "status", "creating")
            if name in self._moving:
                _set(item, "status", "in-use")
                _set(item, "attachmentSet/item/status", self._moving[name][1])
        changed = self._modified.get(name)
        if changed is not None and time.monotonic() - changed < self.manners.delay:
            if action == "DescribeVolumesModifications":
                _set(item, "modificationState", "modifying")
            elif (before := self._changes[name].before) is not None:
                _set(item, "size", _text(before, "size"))
        elif changed is not None and action == "DescribeVolumesModifications":
            _set(item, "modificationState", "optimizing")


def _refusal(error: Refused) -> bytes:
    told = ET.Element("Response")
    inner = ET.SubElement(ET.SubElement(told, "Errors"), "Error")
    ET.SubElement(inner, "Code").text, ET.SubElement(inner, "Message").text = error.code, error.text
    ET.SubElement(told, "RequestID").text = "of-the-tests"
    return ET.tostring(told)


def _parsed(data: bytes) -> ET.Element:
    return ET.fromstring(re.sub(rb' xmlns="[^"]*"', b"", data))


def _written(told: ET.Element) -> bytes:
    told.set("xmlns", _NAMESPACE)
    return ET.tostring(told)


def _text(item: ET.Element, path: str) -> str:
    return item.findtext(path) or ""


def _set(item: ET.Element, path: str, text: str) -> None:
    found = item.find(path)
    if found is not None:
        found.text = text


@dataclass
class Ec2Server:
    url: str
    layer: Layer
    client: Any  # boto3's, for what a test does by hand

    def instance(self, zone: str = ZONES[0]) -> str:
        made = self.client.run_instances(
            ImageId="ami-12c6146b", MinCount=1, MaxCount=1, Placement={"AvailabilityZone": zone}
        )
        return str(made["Instances"][0]["InstanceId"])

    def count(self, prefix: str) -> int:
        return sum(action.startswith(prefix) for _, action in self.layer.calls)


@contextlib.contextmanager
def ec2_server(hardware: Hardware | None = None) -> Iterator[Ec2Server]:
    """An account with one instance, which is this machine."""
    import boto3  # noqa: PLC0415
    from moto.ec2.models import ec2_backends  # noqa: PLC0415
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415
    from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: PLC0415

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None: ...

    for account in ec2_backends.values():
        account.reset()
    layer = Layer(DomainDispatcherApplication(create_backend_app), hardware=hardware or Hardware())
    server = make_server("127.0.0.1", 0, layer, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    key, secret = next(iter(KEYS.items()))
    client = boto3.client(
        "ec2", region_name=REGION, endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret
    )
    made = Ec2Server(url, layer, client)
    layer.instance = made.instance()
    layer.calls.clear()
    try:
        yield made
    finally:
        layer.stop()
        server.shutdown()
        thread.join(10)
        server.server_close()
