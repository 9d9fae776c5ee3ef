"""The admin API's bodies, as OpenAPI shows them. Answers are read from the ledger's records by attribute."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from volumed.core.imports import Outcome
from volumed.core.planning import CreateVolume
from volumed.errors import InvalidRequest, VolumedError
from volumed.model import AccessMode, Engine, Ownership, SnapshotState, VolumeMode, VolumeState
from volumed.units import MAX_SIZE, parse_size


def _size(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_size(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
    return value


Size = Annotated[
    int,
    BeforeValidator(_size, json_schema_input_type=int | str),
    Field(ge=1, le=MAX_SIZE, description="Bytes, or text as 20g and 512MiB"),
]


class Body(BaseModel):
    """What is sent to us: a key that is not known is a mistake and not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class View(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class OwnershipModel(Body):
    model_config = ConfigDict(extra="forbid", frozen=True, from_attributes=True)

    uid: int | None = Field(default=None, ge=0, le=2**32 - 2)
    gid: int | None = Field(default=None, ge=0, le=2**32 - 2)
    mode: int | None = Field(default=None, ge=0, le=0o7777, description="Permission bits, as a number")


class CreateBody(Body):
    name: str
    backend: str = ""
    size: Size | None = None
    mode: VolumeMode = VolumeMode.FILESYSTEM
    filesystem: str = ""
    mkfs_options: tuple[str, ...] = ()
    mount_options: tuple[str, ...] = ()
    ownership: OwnershipModel = OwnershipModel()
    source: str = Field(default="", description="VOLUME to clone it, VOLUME@SNAPSHOT for a snapshot's data")
    labels: dict[str, str] = {}
    options: dict[str, str] = Field(default={}, description="The driver's own")
    class_name: str = Field(default="", description="To choose a backend from, with what a volume is there")
    encryption: str = Field(default="", description="The name of the key, of the settings, to encrypt it with")

    def request(self) -> CreateVolume:
        fields = dict(self)
        fields["ownership"] = Ownership(**self.ownership.model_dump())
        return CreateVolume(**fields)


class ExpandBody(Body):
    size: Size


class SnapshotBody(Body):
    name: str = Field(default="", description="Left out: named after the time")


class DoctorBody(Body):
    fix: list[str] = Field(default=[], description="Ids of findings to fix; empty: all that destroy nothing")
    destroy: list[str] = Field(default=[], description="Ids of findings whose fix deletes data")


class ConsumerView(View):
    id: str
    name: str
    image: str
    pid: int
    target: str
    readonly: bool
    kind: str = Field(description="container, pod, allocation, ...")
    details: dict[str, str] = Field(description="What else its engine said")


class BindingView(View):
    volume: str
    claim: str = Field(description="The PersistentVolumeClaim that the volume was made for, as namespace/name")
    volume_id: str
    node: str
    engine: Engine
    mount_id: str
    since: datetime
    count: int
    consumers: list[ConsumerView]
    path: str = Field(description="Where an orchestrator has it; empty: the engine uses the volume's own mount")
    staging: bool = Field(description="Held by the orchestrator itself, for whoever comes")
    access: AccessMode | None
    readonly: bool


class HistoricBindingView(View):
    volume: str
    volume_id: str
    node: str
    engine: Engine
    mount_id: str
    since: datetime
    until: datetime
    reason: str
    consumers: list[ConsumerView]


class SnapshotView(View):
    id: str
    name: str
    volume_id: str
    state: SnapshotState
    created: datetime
    size: int | None


class UsageView(View):
    used: int | None = Field(description="Bytes; null when it cannot be told without mounting the volume")
    total: int | None = Field(description="Bytes; null for a volume without a size")
    at: datetime


class VolumeView(View):
    id: str
    name: str
    backend: str
    state: VolumeState
    created: datetime
    size: int | None
    mode: VolumeMode
    filesystem: str | None
    mkfs_options: list[str]
    mount_options: list[str]
    ownership: OwnershipModel
    options: dict[str, str]
    labels: dict[str, str]
    source: str
    class_name: str
    encryption: str = Field(description="The name of its key; empty: it is not encrypted")


class VolumeDetail(VolumeView):
    path: str | None = Field(description="Where it is mounted on this node")
    usage: UsageView | None = Field(description="As it was last seen")
    snapshots: list[SnapshotView]
    bindings: list[BindingView]


class VolumePage(View):
    volumes: list[VolumeView]
    next: str | None = Field(description="`after` of the next page")


class RemovalView(View):
    volume: VolumeView
    used: int | None


class ImportBody(Body):
    backend: str
    reference: str = Field(min_length=1, max_length=4096, description="As /v1/backends/NAME/importable lists it")
    name: str = Field(description="Of the volume that it becomes")
    block: bool = Field(default=False, description="A raw device, whatever lies on it")
    labels: dict[str, str] = {}


class RebuildBody(Body):
    dry_run: bool = Field(default=True, description="Say what would be put into the ledger")


class RebuildLineView(View):
    backend: str
    outcome: Outcome
    id: str
    name: str
    text: str


class TakeoverBody(Body):
    node: str = Field(default="", description="Take it from this one; empty: from whichever others have it")
    operator_word: bool = Field(
        default=False, description="You have made sure that the old holder can write no more: its machine has no power"
    )
    dry_run: bool = Field(default=False, description="Say who holds it and what would be done")


class HolderView(View):
    id: str = Field(description="As the storage names it")
    node: str = Field(description="Empty where it is not known")
    ours: bool = Field(description="It is the node that answers")
    text: str


class TakeoverView(View):
    volume: VolumeView
    holders: list[HolderView] | None = Field(description="By the storage's word; null where it cannot tell")
    uses: list[str] = Field(description="Of other nodes, by the ledger")
    proof: str = Field(description="Why nothing of theirs can reach the volume any more")
    action: str
    done: bool


class CapacityView(View):
    """Bytes, as they were last measured."""

    total: int
    available: int
    at: datetime


class BackendView(View):
    name: str
    driver: str
    default: bool
    ok: bool
    error: str
    since: datetime | None = Field(description="When it became well, or ill with this error")
    checked: datetime | None
    capacity: CapacityView | None = Field(description="null where the driver cannot tell")
    capabilities: list[str]
    volumes: int


class BackendDetail(BackendView):
    lacking: dict[str, str] = Field(description="What the driver can do and this storage cannot, with the reason")
    disabled: list[str]
    facts: dict[str, str]
    topology: dict[str, str] = Field(description="Where a node must be to reach its volumes; empty: anywhere")


class ClassMemberView(View):
    name: str
    driver: str
    refusal: str = Field(description="Why a volume as the class describes it could not be made there now")
    capacity: CapacityView | None


class ClassView(View):
    name: str
    backends: list[ClassMemberView]
    requires: list[str]
    topology: dict[str, str]
    size: int | None
    filesystem: str
    mkfs_options: list[str]
    mount_options: list[str]
    encryption: str = Field(description="The name of a key")
    options: dict[str, str]
    volumes: int


class OptionView(View):
    key: str
    type: str
    default: str | None
    required: bool
    description: str


class DriverView(View):
    name: str
    distribution: str
    description: str
    error: str = Field(description="Why it cannot be loaded")


class DriverDetail(DriverView):
    capabilities: list[str]
    backend_options: list[OptionView]
    volume_options: list[OptionView]


class FindingView(View):
    id: str
    kind: str
    subject: str
    text: str
    action: str
    destroys: bool
    fixed: bool
    error: str


class VersionView(View):
    version: str
    node: str
    python: str
    kernel: str


class ErrorView(View):
    """Every answer with a status of 400 or more."""

    code: str
    message: str
    subject: str = ""
    hint: str = ""
    retry_after: float | None = Field(default=None, description="Seconds; null when a retry cannot help")
    request_id: str

    @classmethod
    def of(cls, error: VolumedError, *, request_id: str) -> ErrorView:
        return cls(
            code=error.code,
            message=error.text,
            subject=error.subject,
            hint=error.hint,
            retry_after=error.retry_after,
            request_id=request_id,
        )
