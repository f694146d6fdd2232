"""The resources of the public API: sites, links, limits, transfers and their tasks, events, users, tokens.

What a client sends is checked strictly (an unknown field is a typing error that must not be obeyed in part); what the
coordinator answers may gain fields, so clients ignore those that they do not know.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from flowengine.units import NAME_PATTERN

__all__ = [
    "PRIORITIES",
    "AgreementInfo",
    "AgreementUpload",
    "ApprovalGiven",
    "ApprovalRequest",
    "Certificate",
    "Counters",
    "Decision",
    "Disposal",
    "Endpoint",
    "Event",
    "Fact",
    "GivenApproval",
    "Health",
    "JoinToken",
    "JoinTokenRequest",
    "LabelInfo",
    "LabelUpload",
    "LandedObject",
    "Limit",
    "LimitRequest",
    "LimitWindow",
    "Link",
    "LinkLook",
    "LinkRequest",
    "Listing",
    "ListingEntry",
    "Maintenance",
    "MaintenanceRequest",
    "Name",
    "Page",
    "Plan",
    "PlanRequest",
    "PolicyBundle",
    "PolicyBundleContent",
    "PolicyBundleUpload",
    "ProbeRequest",
    "Problem",
    "Root",
    "Site",
    "SitePolicy",
    "SiteRequest",
    "Task",
    "Tenant",
    "TenantRequest",
    "Token",
    "TokenRequest",
    "Transfer",
    "TransferOptions",
    "TransferRequest",
    "User",
    "UserRequest",
    "Wait",
    "Way",
    "Why",
]  # fmt: skip

Name: TypeAlias = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""Name of a site, tenant or user: as a DNS label."""
SitePath: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$")]
Text: TypeAlias = Annotated[str, Meta(max_length=1000)]
Word: TypeAlias = Annotated[str, Meta(max_length=128)]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Rate: TypeAlias = Annotated[int, Meta(ge=1, le=10**15)]
Role: TypeAlias = Literal["admin", "operator", "user", "auditor"]
TransferState: TypeAlias = Literal[
    "requested", "started", "suspended", "completed", "terminated", "quarantined", "purged"
]
"""The states of the Dataspace Protocol's transfer process, and what becomes of data that may no longer stay."""
TaskState: TypeAlias = Literal["waiting", "running", "done", "failed", "cancelled"]
Priority: TypeAlias = Literal["low", "normal", "high", "urgent"]
PRIORITIES: Final[tuple[Priority, ...]] = ("low", "normal", "high", "urgent")


class _Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Something that a client sends."""


class _Resource(msgspec.Struct, kw_only=True):
    """Something that the coordinator answers."""


class Problem(_Resource):
    """An error as RFC 9457 problem details. `reason` is the stable word of docs/reference/reasons.md."""

    title: str
    status: int
    reason: str
    detail: str
    hint: str = ""
    type: str = "about:blank"
    instance: str = ""
    retryable: bool = False
    context: dict[str, Any] = {}


class Page(_Resource):
    """What every listing has: `next` is the cursor of the next page, empty on the last."""

    items: list[Any]
    next: str = ""


class Health(_Resource):
    """The coordinator's state: its version, database, clock, and whether it leads the planning."""

    status: Literal["ok", "starting", "stopping"]
    version: str
    api: Literal["v1"]
    database: Literal["sqlite", "postgresql"]
    leader: bool
    epoch: int
    now: datetime


class Fact(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An attribute's value, who says so, and as of when. Attributes are those that policies name."""

    value: bool | int | str | list[str]
    source: Word
    as_of: datetime


class Root(_Resource):
    """A folder that a site offers: its name in paths, and what may be done below it."""

    name: SitePath
    access: Literal["read", "write", "read-write"]
    budget_bytes: Size | None = None
    used_bytes: Size | None = None
    free_bytes: Size | None = None


class Certificate(_Resource):
    """A site's current certificate; `key_sha256` names its identity key (SHA-256 of the SubjectPublicKeyInfo)."""

    serial: str
    key_sha256: str
    not_before: datetime
    not_after: datetime


class SitePolicy(_Resource):
    """The policies that a site's agent decides by, as it says itself.

    Attributes:
        version, digest: of the bundle in force there; 0 and empty without one.
        takes: whether the site trusts anybody to sign bundles.
        problem: why it has not the newest.
        labels: serial up to which it has read label statements.
        required: whether nothing moves there without a bundle.
    """

    version: int = 0
    digest: str = ""
    takes: bool = False
    problem: str = ""
    labels: int = 0
    required: bool = False


class Site(_Resource):
    """A place with storage: what it offers, how to reach it, what is known about it.

    `addresses` are where its agent's data port answers ("host:port"); empty for one that only dials out.
    """

    name: Name
    state: Literal["expected", "online", "offline", "draining", "revoked"]
    since: datetime
    facts: dict[str, Fact] = {}
    roots: list[Root] = []
    addresses: list[str] = []
    software: str = ""
    last_seen: datetime | None = None
    certificate: Certificate | None = None
    max_tasks: int = 4
    running_tasks: int = 0
    can: list[str] | None = None
    policy: SitePolicy = msgspec.field(default_factory=SitePolicy)


class SiteRequest(_Request):
    """A new site, or changes to one: what is left out stays. Facts replace those of the same name; null removes one."""

    name: Name | None = None
    facts: dict[Word, Fact | None] = {}
    max_tasks: Annotated[int, Meta(ge=1, le=1000)] | None = None
    draining: bool | None = None


class JoinTokenRequest(_Request):
    """A one-time token with which the agent of `site` enrols."""

    site: Name
    valid_s: Annotated[int, Meta(ge=60, le=86400)] = 900


class JoinToken(_Resource):
    """Shown once: carries the coordinator's address and the CA's fingerprint."""

    token: str
    site: Name
    expires: datetime


class Endpoint(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A path at a site, below one of its roots. As with rsync, `/data/` is what is in it, `/data` the folder itself."""

    site: Name
    path: SitePath


class Link(_Resource):
    """A directed path between two sites: what an operator declared, and what was measured.

    `rate_bits_per_s` is what it is believed to carry, give or take `spread` (relative standard deviation), by looks of
    which the last was at `measured`; null while nobody has looked. What was measured beats what was declared.
    """

    source: Name
    target: Name
    capacity_bits_per_s: Rate | None = None
    rtt_ms: float | None = None
    loss: float | None = None
    cost_per_gb: float = 0.0
    as_of: datetime | None = None
    source_of_values: Word = ""
    rate_bits_per_s: float | None = None
    spread: float | None = None
    measured: datetime | None = None


class LinkLook(_Resource):
    """One look at a link: a probe, or what all transfers together moved over it. `at_least`: something else held
    them back.
    """

    at: datetime
    kind: Literal["probe", "transfers"]
    rate_bits_per_s: float | None = None
    rtt_ms: float | None = None
    loss: float | None = None
    at_least: bool = False


class LinkRequest(_Request):
    """What is declared about a link."""

    capacity_bits_per_s: Rate | None = None
    rtt_ms: Annotated[float, Meta(ge=0, le=100000)] | None = None
    loss: Annotated[float, Meta(ge=0, le=1)] | None = None
    cost_per_gb: Annotated[float, Meta(ge=0)] = 0.0


class ProbeRequest(_Request):
    """Measure a link by a burst of at most so many bytes and seconds."""

    size_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 32)] = 64 << 20
    seconds: Annotated[float, Meta(gt=0, le=30)] = 2.0


class MaintenanceRequest(_Request):
    """A time in which a site ("site:A") or link ("link:A>B") is not to be used; from `drain_s` before its start no new
    route is led over it.
    """

    scope: Annotated[str, Meta(pattern=r"^(link:[a-z0-9-]{1,63}>[a-z0-9-]{1,63}|site:[a-z0-9-]{1,63})$")]
    starts: datetime
    ends: datetime
    drain_s: Annotated[float, Meta(ge=0, le=7 * 86400)] = 600.0
    comment: Text = ""


class Maintenance(_Resource):
    """A time in which a site or link is not used."""

    id: str
    scope: str
    starts: datetime
    ends: datetime
    drain_s: float
    comment: str = ""
    created_by: str = ""


class LimitWindow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rate for some hours: `days` of "mon tue wed thu fri sat sun", `start` and `end` as HH:MM in `zone`."""

    rate_bits_per_s: Annotated[int, Meta(ge=0, le=10**15)]
    start: Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
    end: Annotated[str, Meta(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$")]
    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = []
    zone: Word = "UTC"


class LimitRequest(_Request):
    """Bandwidth for a scope; `rate_bits_per_s` holds outside all windows (null: no limit)."""

    rate_bits_per_s: Annotated[int, Meta(ge=0, le=10**15)] | None = None
    windows: Annotated[list[LimitWindow], Meta(max_length=50)] = []


class Limit(_Resource):
    """A bandwidth limit.

    `scope` is "link:A>B", "site:A" (what leaves it), "tenant:T", "transfer:ID", or "read:A:/ROOT" and "write:A:/ROOT": what
    is read from and written to one root that a site offers.
    """

    scope: str
    rate_bits_per_s: int | None
    windows: list[LimitWindow]
    now_bits_per_s: int | None
    changed: datetime
    changed_by: str


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


class TransferRequest(_Request):
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


class Counters(_Resource):
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


class Wait(_Resource):
    """What somebody waits for, by name: since when, and what would end it."""

    name: str
    text: str
    since: datetime
    ends_when: str


class Decision(_Resource):
    """What policy says to one use of the data at one site."""

    use: str
    site: Name
    verdict: Literal["permit", "deny", "none"]
    rule: str = ""
    text: str = ""
    policy_digest: str = ""
    duties: list[str] = []


class GivenApproval(_Resource):
    """One person's yes."""

    who: str
    given: datetime
    until: datetime


class ApprovalRequest(_Resource):
    """What people have to approve before it may move, and who has.

    Attributes:
        handle: names just this question.
        dataset, duties_digest: digests that an approval is bound to.
        duties: what the recipient takes on, each as JSON.
        groups: whose approval counts; `people`: how many at least, where a duty says so.
        rules: what would permit it.
    """

    handle: str
    created: datetime
    source: Name
    path: str
    recipient: Name
    requester: Name
    dataset: str
    duties_digest: str
    purpose: str = ""
    duties: list[str] = []
    groups: list[str] = []
    people: int = 0
    rules: str = ""
    given: list[GivenApproval] = []


class ApprovalGiven(_Request):
    """A signed approval (docs/spec/certificates.md), made by `flow approve`."""

    document: bytes


class Disposal(_Resource):
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


class Way(_Resource):
    """One way from the source to a target, and what the plan gives to it."""

    sites: list[Name]
    rate_bits_per_s: int
    usd_per_gb: float | None = None


class Task(_Resource):
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


class Transfer(_Resource):
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


class Why(_Resource):
    """One line on what a transfer waits for or what makes it no faster, and the facts behind the line."""

    transfer: str
    state: TransferState
    line: str
    waits: list[Wait] = []
    bottlenecks: dict[str, str] = {}
    plan: dict[str, list[str]] = {}


class PlanRequest(_Request):
    """Ask what a transfer would be: nothing moves. `size_bytes` and `objects` spare the count where they are known."""

    request: TransferRequest
    size_bytes: Size | None = None
    objects: Size | None = None


class Feed(_Resource):
    """A target that another target serves, once that has everything; `source` would serve it otherwise."""

    target: Name
    feeder: Name
    source: Name


class Plan(_Resource):
    """What a transfer would be: verdict of policy, ways, time, money, and what binds. A plan that is permitted is kept
    until `expires`; a transfer that names its `id` goes exactly these ways.

    `promise` is what a deadline would get: "none" without one, "admitted", "refused" (with `earliest_possible`) or
    "best-effort".
    """

    permitted: bool
    decisions: list[Decision]
    id: str = ""
    made: datetime | None = None
    expires: datetime | None = None
    routes: list[list[Name]] = []
    ways: list[Way] = []
    size_bytes: int | None = None
    objects: int | None = None
    rate_bits_per_s: float | None = None
    duration_s: float | None = None
    earliest: datetime | None = None
    expected: datetime | None = None
    latest: datetime | None = None
    usd: float | None = None
    promise: str = "none"
    earliest_possible: datetime | None = None
    binds: list[str] = []
    text: str = ""
    feeds: list[Feed] = []


class LandedObject(_Resource):
    """An object that is durable at a target. `seq` is the cursor within the transfer."""

    seq: int
    target: Name
    path: str
    size_bytes: int


class DeliveryReceipt(_Resource):
    """A target's signed word on what landed; `receipt` is base64 (docs/spec/trust.md)."""

    task: str
    site: Name
    receipt: str


class EvidenceCheckpoint(_Resource):
    """A signed head of a chain of evidence that the coordinator holds.

    `agent` is `site:NAME`; `chain` the hash of its first record; `seq` and `hash` name the record that is signed for;
    `time` is the agent's; `document` is base64 (docs/spec/evidence.md).
    """

    agent: str
    chain: str
    seq: int
    hash: str
    time: str
    received: datetime
    document: str


class EvidenceRecord(_Resource):
    """A record of the coordinator's own chain: its number, and the line as it was hashed."""

    seq: int
    line: str


class EvidenceBundle(_Resource):
    """Policies that decisions of the coordinator name: a part of the bundle (base64) from `offset` on, of `size_bytes`."""

    digest: str
    content: str
    offset: int = 0
    size_bytes: int = 0


class ListingEntry(_Resource):
    """One entry of a folder at a site."""

    name: str
    kind: Literal["file", "directory", "link", "other"]
    size_bytes: int
    mtime: datetime


class Listing(_Resource):
    """A folder at a site as its agent sees it now."""

    site: Name
    path: str
    entries: list[ListingEntry]
    complete: bool = True


class Event(_Resource):
    """Something that happened; `seq` is the cursor of the stream (the SSE id)."""

    seq: int
    at: datetime
    type: str
    transfer: str = ""
    site: str = ""
    user: str = ""
    data: dict[str, Any] = {}


class PolicyBundleUpload(_Request):
    """A signed bundle (base64 of its file) that is to be in force from now on, here and at all agents."""

    content: bytes


class PolicyBundle(_Resource):
    """A policy bundle that is or was in force; the highest version is."""

    version: int
    digest: str
    not_after: datetime
    activated: datetime
    activated_by: Name
    signed_by: list[tuple[str, str]]
    policies: list[str]
    in_force: bool


class PolicyBundleContent(_Resource):
    """A part of a bundle's file (base64) from `offset` on; the file has `size_bytes`."""

    version: int
    digest: str
    content: bytes
    offset: int = 0
    size_bytes: int = 0


class LabelUpload(_Request):
    """A label statement as its owner signed it (base64)."""

    document: bytes


class LabelInfo(_Resource):
    """A label statement: what an owner says of the data below a root of a site. `serial` orders statements here."""

    serial: int
    owner: str
    site: Name
    path: str
    number: int
    labels: list[str]
    contracts: list[str]
    facts: dict[str, Any]
    issued: datetime
    expires: datetime | None
    withdrawn: bool
    added: datetime
    added_by: str


class AgreementUpload(_Request):
    """An agreement as its authority signed it (base64)."""

    document: bytes


class AgreementInfo(_Resource):
    """What an authority says was agreed for data below roots of sites that go to recipients. `serial` orders them here."""

    serial: int
    authority: str
    id: str
    number: int
    roots: list[str]
    recipients: list[str]
    facts: dict[str, Any]
    issued: datetime
    expires: datetime | None
    withdrawn: bool
    added: datetime
    added_by: str


class TenantRequest(_Request):
    """A party with its share: weight in the fair queue, and bounds (null: none)."""

    name: Name | None = None
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    max_running: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    max_queued: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    max_bytes_per_day: Size | None = None


class Tenant(_Resource):
    """A party with its share and what it uses now."""

    name: Name
    weight: float
    max_running: int | None
    max_queued: int | None
    max_bytes_per_day: int | None
    running: int = 0
    queued: int = 0
    bytes_today: int = 0


class UserRequest(_Request):
    """A new user, or changes to one."""

    name: Name | None = None
    role: Role = "user"
    tenant: Name = "default"
    disabled: bool = False


class User(_Resource):
    """Who may ask for what."""

    name: Name
    role: Role
    tenant: Name
    disabled: bool
    created: datetime


class TokenRequest(_Request):
    """A new API token for a user (admins: for any)."""

    user: Name | None = None
    valid_s: Annotated[int, Meta(ge=60, le=366 * 86400)] = 90 * 86400
    comment: Text = ""


class Token(_Resource):
    """An API token; `secret` is there once, when it was made."""

    id: str
    user: Name
    created: datetime
    expires: datetime
    comment: str = ""
    last_used: datetime | None = None
    secret: str = ""
