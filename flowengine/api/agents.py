"""What an agent and the coordinator tell each other over HTTP /v1/agent, beside the public resources.

An agent is known by its TLS client certificate. Unknown fields are ignored on both sides, so that agent and
coordinator may be of different versions; what a receiver *must* understand is named in `required`, and refused with
the reason "incompatible" where it does not.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from flowengine.api.links import Limit
from flowengine.api.schema import Name
from flowengine.api.sites import Root, SitePolicy
from flowengine.api.transfers import Counters, Disposal, Endpoint, LandedObject, TransferOptions
from flowengine.errors import ProtocolError

__all__ = [
    "AgentLabels", "Answer", "Claim", "Claimed", "Command", "Disposed", "DrainCommand", "Enrolled", "Greeting", "Heartbeat",
    "HeartbeatReply", "HopTraffic", "Join", "Lease", "LeasesCommand", "LimitsCommand", "LookCommand", "MeasureCommand", "Meeting", "MeetingsCommand",
    "PoliciesCommand",    "ProbeCommand", "QuarantineCommand", "RelayState", "RelayedTask", "Renewal", "Report", "ReportReply",
    "RevocationsCommand", "RoutesCommand", "Taken", "TaskCommand", "TaskGrant", "TaskRoute", "Told", "WorkCommand",
    "check_required",
]  # fmt: skip


class Told(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one side tells the other. `required` names what the receiver must understand (`check_required`)."""

    required: list[str] = []


def check_required(said: Told, known: Collection[str] = ()) -> None:
    """Refuse a message that names something in `required` which this side does not know.

    Raises:
        ProtocolError: it does (reason "incompatible"); nothing of the message may be obeyed.
    """
    unknown = sorted(set(said.required) - set(known))
    if unknown:
        raise ProtocolError(
            f"the other side requires {', '.join(unknown)[:200]}, which this side does not know",
            hint="update flowengine on this side",
            reason="incompatible",
        )


class Join(Told):
    """First contact: the one-time token and a certificate request (PEM) for the agent's own key. Site names come from the token."""

    token: str
    request_pem: str
    software: str = ""


class Renewal(Told):
    """A new certificate request with the same identity key, over a connection with the current certificate."""

    request_pem: str


class Enrolled(Told):
    """The certificate and what to trust from now on.

    Attributes:
        certificate_pem: the site's chain, leaf first.
        ca_pem: trust anchors.
        grant_keys: public Ed25519 keys (raw, hex) by key id that sign grants.
    """

    site: Name
    certificate_pem: str
    ca_pem: str
    grant_keys: dict[str, str]


class HopTraffic(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What went over one link for one task since the sender began to count, and how fast it goes now.

    Attributes:
        sender, receiver: the two sites of the link.
        size_bytes: sealed bytes.
        streams: data connections that are open.
    """

    sender: Name
    receiver: Name
    size_bytes: int
    rate_bits_per_s: float = 0.0
    streams: int = 0


class RelayedTask(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A task whose streams a relay passes on, on each of the two links of one of its routes."""

    task: str
    transfer: str
    hops: list[HopTraffic]


class RelayState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """That a site relays, and how loaded it is.

    Attributes:
        streams, max_streams: data connections that it passes on, and how many it may.
        rate_bits_per_s: what it passes on now.
        max_bits_per_s: what it passes on at most; None: as much as goes.
    """

    streams: int
    max_streams: int
    rate_bits_per_s: float = 0.0
    max_bits_per_s: int | None = None
    tasks: list[RelayedTask] = []


class Heartbeat(Told):
    """Sent every 10 s, and at once when something in it changed.

    Attributes:
        boot: random id of this process's run.
        addresses: where the data port answers; empty: outbound only.
        seen_fence: highest fencing token ever seen, so that a restored coordinator does not fall behind.
        now: the agent's clock.
        holding: tasks that it believes to hold, with their fences.
        relay: where the site relays for others; None where it does not.
        can: duties that it carries out (docs/spec/policy.md); None: it does not say.
        policy: which policies it decides by.
    """

    boot: str
    software: str
    addresses: list[str]
    roots: list[Root]
    seen_fence: int
    now: datetime
    draining: bool = False
    free_slots: int = 0
    holding: dict[str, int] = {}
    relay: RelayState | None = None
    can: list[str] | None = None
    policy: SitePolicy | None = None


class HeartbeatReply(Told):
    """What the agent must hold to.

    Attributes:
        revoked: serials (hex) of certificates that are revoked and not yet expired; the whole list.
        limits: all limits that concern this site.
        bundle: version of the policy bundle in force; fetched by GET /v1/agent/policy.
        labels: serial of the last label statement; fetched by GET /v1/agent/labels.
    """

    now: datetime
    epoch: int
    grant_keys: dict[str, str]
    revoked: list[str] = []
    limits: list[Limit] = []
    draining: bool = False
    renew: bool = False
    bundle: int = 0
    labels: int = 0


class Claim(Told):
    """Ask for work: at most `count` tasks that this site drives (it dials)."""

    boot: str
    count: int


class TaskRoute(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One way between the two ends of a task; several are used at once, the first carries the control connection.

    Attributes:
        sites: in the order in which they are dialled: this agent, relays, the other end.
        address: where the second of them is dialled.
        grant: base64 of the signed relay grant that all sites of the route check; empty on a route without relays.
        rate_bits_per_s: what the plan gives to it; None: as much as goes.
    """

    sites: list[Name]
    address: str
    grant: str = ""
    rate_bits_per_s: int | None = None


class Lease(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The right to send for a task over one link, out of this site, until a time: a part of the plan.

    Attributes:
        next: the site at the other end of the link.
        number: rises with every plan; a lower one than was seen is old.
    """

    task: str
    transfer: str
    next: Name
    rate_bits_per_s: int
    until: datetime
    number: int


class Meeting(msgspec.Struct, kw_only=True):
    """A relay at which this site is to wait for the other end of a task: neither of both can be dialled.

    Attributes:
        relay: the site at which to wait; where it is dialled stands in the grant.
        grant: base64 of the signed relay grant that all sites of the route check.
    """

    task: str
    fence: int
    relay: Name
    grant: str


class TaskGrant(Told):
    """A task that the agent holds until `lease_until`, with the grant that proves it to the peer.

    Attributes:
        grant: base64 of the signed grant (`flowengine.trust`).
        role: what this agent is: "target" pulls, "source" pushes.
        peer_address: where to dial; the peer's agent listens there.
        lease_s: term; report within half of it.
        mode: copy, sync or verify.
        routes: the ways to the peer; empty: straight to `peer_address`.
    """

    task: str
    transfer: str
    fence: int
    role: Literal["target", "source"]
    mode: Literal["copy", "sync", "verify"]
    source: Endpoint
    target: Endpoint
    peer_address: str
    grant: str
    lease_s: int
    options: TransferOptions
    tenant: str = ""
    priority: str = "normal"
    routes: list[TaskRoute] = []


class Claimed(Told):
    """The tasks that were given; none when there is nothing to do."""

    tasks: list[TaskGrant]


class Report(Told):
    """How a task stands. The holder reports every few seconds; the target also reports what landed.

    Attributes:
        seq: counts this agent's reports on the task's fence: one that was sent twice is taken once.
        state: "running", or how it ended.
        landed: objects durable since the last report, in order (seq ignored).
        receipt: base64 of the signed receipt, with state "done".
        not_before: with state "released": when the task may be claimed again, where that is known.
        stages: busy share of each stage since the last report, 0 to 1.
        hops: what went over each of this site's links since the claim.
    """

    fence: int
    seq: int
    state: Literal["running", "done", "failed", "released"]
    counters: Counters
    landed: list[LandedObject] = []
    rate_bits_per_s: float = 0.0
    bottleneck: str = ""
    stages: dict[str, float] = {}
    reason: str = ""
    message: str = ""
    hint: str = ""
    retryable: bool = False
    version_id: str = ""
    receipt: str = ""
    wait: str = ""
    not_before: datetime | None = None
    hops: list[HopTraffic] = []


class ReportReply(Told):
    """Whether to go on; a new grant when the old one nears its end."""

    directive: Literal["go", "pause", "stop"]
    lease_s: int
    reason: str = ""
    grant: str = ""


class Greeting(msgspec.Struct, kw_only=True, tag="hello"):
    """First event of a stream: the coordinator's epoch; a heartbeat should follow at once."""

    epoch: int


class WorkCommand(msgspec.Struct, kw_only=True, tag="work"):
    """There may be work: claim."""


class TaskCommand(msgspec.Struct, kw_only=True, tag="task"):
    """A held task must pause, stop, or be given back; the sooner the better (the next report would tell as well)."""

    task: str
    fence: int
    directive: Literal["pause", "stop"]
    reason: str = ""


class LimitsCommand(msgspec.Struct, kw_only=True, tag="limits"):
    """All limits that concern this site, as they are now."""

    limits: list[Limit]


class RoutesCommand(msgspec.Struct, kw_only=True, tag="routes"):
    """The routes of a held task, as they are from now on."""

    task: str
    fence: int
    routes: list[TaskRoute]


class LeasesCommand(msgspec.Struct, kw_only=True, tag="leases"):
    """All leases on links out of this site, as they are now."""

    leases: list[Lease]


class MeetingsCommand(msgspec.Struct, kw_only=True, tag="meetings"):
    """All relays at which this site is to wait now."""

    meetings: list[Meeting]


class RevocationsCommand(msgspec.Struct, kw_only=True, tag="revocations"):
    """All revoked serials."""

    revoked: list[str]


class PoliciesCommand(msgspec.Struct, kw_only=True, tag="policies"):
    """The version of the bundle in force, and the serial of the last label statement: fetch what is not there yet."""

    bundle: int
    labels: int


class DrainCommand(msgspec.Struct, kw_only=True, tag="drain"):
    """Take no new work (`on`), or take it again."""

    on: bool


class QuarantineCommand(msgspec.Struct, kw_only=True, tag="quarantine"):
    """A transfer to this site is not permitted any more: what arrived of it goes to quarantine.

    Answered by a `Disposed`; the site finds by itself how much of it has to go.
    """

    task: str
    why: str


class LookCommand(msgspec.Struct, kw_only=True, tag="look"):
    """A user wants to see a folder: answer within `within_s` by POST /v1/agent/answers/{id}.

    Attributes:
        requester, tenant: for whom; a site that maps accounts looks with the rights of theirs.
    """

    id: str
    path: str
    within_s: float
    requester: str = ""
    tenant: str = ""


class MeasureCommand(msgspec.Struct, kw_only=True, tag="measure"):
    """A user wants to know how much lies below a path: count, and answer within `within_s` as to a look.

    Attributes:
        requester, tenant: as of `LookCommand`.
    """

    id: str
    path: str
    within_s: float
    requester: str = ""
    tenant: str = ""


class ProbeCommand(msgspec.Struct, kw_only=True, tag="probe"):
    """Measure the link to a site: send it a burst, and answer within `within_s` as to a look.

    Attributes:
        address: where that site's agent answers.
        grant: base64 of a signed grant of the mode "probe".
        size_bytes, seconds: most that the burst may send, and how long.
    """

    id: str
    site: Name
    address: str
    grant: str
    size_bytes: int
    seconds: float
    within_s: float


Command: TypeAlias = (
    Greeting
    | WorkCommand
    | TaskCommand
    | RoutesCommand
    | LeasesCommand
    | MeetingsCommand
    | LimitsCommand
    | RevocationsCommand
    | PoliciesCommand
    | DrainCommand
    | QuarantineCommand
    | LookCommand
    | MeasureCommand
    | ProbeCommand
)


class Disposed(Told):
    """What became of data that may not stay at a site; sent until it was taken, by POST /v1/agent/disposals."""

    task: str
    disposal: Disposal


class Checkpointed(Told):
    """The newest checkpoint of the site's chain of evidence, or one that a peer showed, by POST /v1/agent/checkpoints;
    `document` is base64.
    """

    document: Annotated[str, Meta(max_length=8192)]


class Taken(Told):
    """The coordinator took note."""


class AgentLabels(Told):
    """Label statements by serial, with the documents as they were signed (base64); `last` when there are no more."""

    statements: list[tuple[int, bytes]]
    last: bool


class Answer(Told):
    """Answer to a `LookCommand`, `MeasureCommand` or `ProbeCommand`: what was found, or a reason why not.

    Attributes:
        entries: of a look: (name, kind, size_bytes, mtime_ns).
        complete: whether that is all; False also where a count ran out of time.
        objects, size_bytes: of a count.
        rate_bits_per_s, rtt_ms, loss: of a probe; None where it could not tell.
    """

    entries: list[tuple[str, str, int, int]] = []
    complete: bool = True
    objects: int = 0
    size_bytes: int = 0
    rate_bits_per_s: float | None = None
    rtt_ms: float | None = None
    loss: float | None = None
    reason: str = ""
    message: str = ""
