"""Transfers: what is asked for, the tasks that carry it out, how far they are, and what landed."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from flowengine.api.schema import Name, Request, Resource, SitePath, Size, Text, Word

__all__ = [
    "ENDED",
    "PRIORITIES",
    "Counters",
    "Decision",
    "DeliveryReceipt",
    "Disposal",
    "Endpoint",
    "LandedObject",
    "Priority",
    "Task",
    "TaskState",
    "Transfer",
    "TransferOptions",
    "TransferRequest",
    "TransferState",
    "Wait",
    "Way",
    "Why",
]

TransferState: TypeAlias = Literal[
    "requested", "started", "suspended", "completed", "terminated", "quarantined", "purged"
]
"""The states of the Dataspace Protocol's transfer process, and what becomes of data that may no longer stay."""
ENDED: Final[frozenset[TransferState]] = frozenset({"completed", "terminated", "quarantined", "purged"})
"""States from which nothing moves by itself."""
TaskState: TypeAlias = Literal["waiting", "running", "done", "failed", "cancelled"]
Priority: TypeAlias = Literal["low", "normal", "high", "urgent"]
PRIORITIES: Final[tuple[Priority, ...]] = ("low", "normal", "high", "urgent")


class Endpoint(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A path at a site, below one of its roots. As with rsync, `/data/` is what is in it, `/data` the folder itself."""

    site: Name
    path: SitePath


class TransferOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to move; the meaning of each is that of the option of `flow cp` with its name."""

    delete: bool = False
    dry_run: bool = False
    publish: Literal["object", "atomic"] = "object"
    xattrs: bool = False
    owner: bool = False
    links: Literal["keep", "inside"] = "keep"
    filters: Annotated[list[tuple[bool, Word]], Meta(max_length=1000)] = []
    profile: Word | None = None
    streams: Annotated[int, Meta(ge=0, le=64)] = 0
    reread: bool = False


class TransferRequest(Request):
    """Move one path of one site to one or several targets.

    A `deadline` that cannot be met is refused, unless `best_effort` is set. `size_bytes` and `objects` say what is
    expected to move to each target, where that is known. `plan` is the id of a stored plan: exactly its ways are used.
    """

    source: Endpoint
    targets: Annotated[list[Endpoint], Meta(min_length=1, max_length=100)]
    mode: Literal["copy", "sync", "verify"] = "copy"
    labels: Annotated[list[Word], Meta(max_length=100)] = []
    contracts: Annotated[list[Word], Meta(max_length=100)] = []
    purpose: Word = ""
    priority: Priority = "normal"
    deadline: datetime | None = None
    best_effort: bool = False
    cost_limit_usd: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    size_bytes: Size | None = None
    objects: Size | None = None
    plan: Annotated[str, Meta(pattern=r"^(p-[0-9a-z]{4,32})?$")] = ""
    comment: Text = ""
    options: TransferOptions = msgspec.field(default_factory=TransferOptions)


class Counters(Resource):
    """How far it is; over all targets of a transfer, or of one task."""

    objects: int = 0
    size_bytes: int = 0
    scan_done: bool = False
    objects_done: int = 0
    bytes_done: int = 0
    objects_unchanged: int = 0
    objects_failed: int = 0
    objects_deleted: int = 0
    bytes_sent: int = 0
    bytes_reused: int = 0
    bytes_unchanged: int = 0


class Wait(Resource):
    """What somebody waits for, by name: since when, and what would end it."""

    name: str
    text: str
    since: datetime
    ends_when: str


class Decision(Resource):
    """What policy says to one use of the data at one site."""

    use: str
    site: Name
    verdict: Literal["permit", "deny", "none"]
    rule: str = ""
    text: str = ""
    policy_digest: str = ""
    duties: list[str] = []


class Disposal(Resource):
    """What became of data at a target that may not stay there.

    Attributes:
        state: "quarantined": nobody can read it; "purged": destroyed, with a certificate; "none": nothing was there.
        cause: "policy-stopped", "delete-by", "delete-after", "cancelled" or "operator".
        name: of the quarantine, at the target.
        objects, size_bytes: that had landed and were taken; `missing` were no longer there.
        staged_bytes: of what was under way.
        certificate: base64 of the signed delete certificate (docs/spec/certificates.md).
    """

    state: Literal["none", "quarantined", "purged"]
    cause: str = ""
    why: str = ""
    name: str = ""
    objects: int = 0
    size_bytes: int = 0
    missing: int = 0
    staged_bytes: int = 0
    at: datetime | None = None
    certificate: str = ""


class Way(Resource):
    """One way from the source to a target, and what the plan gives to it."""

    sites: list[Name]
    rate_bits_per_s: int
    usd_per_gb: float | None = None


class Task(Resource):
    """One range of a transfer's work: from the source to one target. `fence` grows with every claim.

    `source` is from where the target is served: the transfer's source, or what landed at another target, by the task that
    `fed_by` names.
    """

    id: str
    transfer: str
    source: Endpoint
    target: Endpoint
    state: TaskState
    holder: str = ""
    fence: int = 0
    attempts: int = 0
    lease_until: datetime | None = None
    route: list[Name] = []
    ways: list[Way] = []
    promise: str = "none"
    binds: str = ""
    earliest: datetime | None = None
    expected: datetime | None = None
    latest: datetime | None = None
    counters: Counters = msgspec.field(default_factory=Counters)
    rate_bits_per_s: float = 0.0
    bottleneck: str = ""
    wait: Wait | None = None
    reason: str = ""
    message: str = ""
    hint: str = ""
    version_id: str = ""
    disposal: Disposal | None = None
    fed_by: str = ""


class Transfer(Resource):
    """What a user asked to move, with its state and the reason of the last change."""

    id: str
    request: TransferRequest
    state: TransferState
    reason: str
    message: str
    since: datetime
    created: datetime
    user: str
    tenant: str
    counters: Counters = msgspec.field(default_factory=Counters)
    tasks: list[Task] = []
    decisions: list[Decision] = []
    ended: datetime | None = None
    eta: datetime | None = None
    eta_earliest: datetime | None = None
    eta_latest: datetime | None = None
    promised: bool = False


class Why(Resource):
    """One line on what a transfer waits for or what makes it no faster, and the facts behind the line."""

    transfer: str
    state: TransferState
    line: str
    waits: list[Wait] = []
    bottlenecks: dict[str, str] = {}
    plan: dict[str, list[str]] = {}


class LandedObject(Resource):
    """An object that is durable at a target. `seq` is the cursor within the transfer."""

    seq: int
    target: Name
    path: str
    size_bytes: int


class DeliveryReceipt(Resource):
    """A target's signed word on what landed; `receipt` is base64 (docs/spec/trust.md)."""

    task: str
    site: Name
    receipt: str
