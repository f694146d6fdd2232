"""The HTTP interface as a table: each route's method, path, types, who may use it, and how it can be answered.

The server dispatches by this table, the OpenAPI document and docs/reference/http-api.md are made from it; so what is
documented is what is served. No I/O here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from flowengine.api import agents, resources
from flowengine.api.resources import Name, SitePath, TransferState
from flowengine.policy.bundle import MAX_BUNDLE_BYTES

__all__ = ["MAX_BODY_BYTES", "PATH_TYPES", "ROUTES", "Route", "statuses"]

Limit_: Final = Annotated[int, Meta(ge=1, le=1000, description="How many at most.")]
Cursor: Final = Annotated[
    str, Meta(max_length=200, description="`next` of the page before; empty for the first page.")
]

MAX_BODY_BYTES: Final = 1 << 20
_BUNDLE_BODY_BYTES: Final = MAX_BUNDLE_BYTES * 4 // 3 + 4096
"""A bundle in base64, and what stands around it."""

ADMIN: Final = frozenset({"admin"})
OPERATOR: Final = frozenset({"admin", "operator"})
ASKING: Final = frozenset({"admin", "operator", "user"})
READING: Final = frozenset({"admin", "operator", "user", "auditor"})
SEEING: Final = frozenset({"admin", "operator", "auditor"})


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


class PageQuery(msgspec.Struct, forbid_unknown_fields=True):
    """A page of a listing."""

    limit: Limit_ = 100  # type: ignore[valid-type]
    after: Cursor = ""  # type: ignore[valid-type]


class TransfersQuery(PageQuery):
    """A page of transfers, newest first."""

    state: Annotated[TransferState, Meta(description="Only those in this state.")] | None = None
    site: Annotated[Name, Meta(description="Only those from or to this site.")] | None = None
    user: Annotated[Name, Meta(description="Only this user's.")] | None = None
    tenant: Annotated[Name, Meta(description="Only this tenant's.")] | None = None


class TransferQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whether to wait for the end."""

    wait_s: Annotated[
        float, Meta(ge=0, le=60, description="Answer as soon as it ended, or after so long.")
    ] = 0.0


class LandedQuery(PageQuery):
    """Objects that landed after the cursor; waits for the first where there is none."""

    wait_s: Annotated[float, Meta(ge=0, le=60, description="How long to wait for something new.")] = 0.0


class EventsQuery(PageQuery):
    """Events after the cursor that pass all filters."""

    transfer: Annotated[str, Meta(max_length=64, description="Only this transfer's.")] = ""
    site: Annotated[Name, Meta(description="Only this site's.")] | None = None
    types: Annotated[
        str, Meta(max_length=400, description="Only types that begin with one of these, by commas.")
    ] = ""


class LabelsQuery(PageQuery):
    """Label statements in the order in which they came."""

    site: Annotated[Name, Meta(description="Only those on this site's data.")] | None = None


class AgentLabelsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """From where on."""

    after: Annotated[int, Meta(ge=0, le=2**62, description="Serial of the last one that is there.")] = 0


class PartQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which part of a file."""

    offset: Annotated[int, Meta(ge=0, le=2**40, description="Where the part begins.")] = 0


class AgentPartQuery(PartQuery):
    """Which part of which bundle."""

    version: Annotated[
        int, Meta(ge=0, le=2**62, description="Of this version; 0: of that which is in force.")
    ] = 0


class FilesQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which folder."""

    path: Annotated[SitePath, Meta(description="The folder, below one of the site's roots.")]


class CheckpointsQuery(PageQuery):
    """A page of checkpoints, newest first."""

    agent: (
        Annotated[str, Meta(pattern=r"^site:[a-z0-9-]{1,63}$", description="Only those of this agent.")]
        | None
    ) = None


TransferId: Final = Annotated[str, Meta(pattern=r"^t-[0-9a-z]{4,32}$")]
PATH_TYPES: Final[dict[str, object]] = {
    "site": Name,
    "source": Name,
    "target": Name,
    "user": Name,
    "tenant": Name,
    "transfer": TransferId,
    "task": Annotated[str, Meta(pattern=r"^t-[0-9a-z]{4,32}\.[0-9]{1,3}$")],
    "handle": Annotated[str, Meta(pattern=r"^ap-[0-9a-f]{16}$")],
    "approver": Annotated[str, Meta(pattern=r"^[^/\\x00]{1,200}$")],
    "token": Annotated[str, Meta(pattern=r"^[0-9a-f]{8}$")],
    "version": Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,17}$")],
    "answer": Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")],
    "digest": Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")],
    "plan": Annotated[str, Meta(pattern=r"^p-[0-9a-z]{4,32}$")],
    "maintenance": Annotated[str, Meta(pattern=r"^m-[0-9a-f]{12}$")],
    "scope": Annotated[
        str,
        Meta(
            pattern=r"^(link:[a-z0-9-]{1,63}>[a-z0-9-]{1,63}|site:[a-z0-9-]{1,63}|tenant:[a-z0-9-]{1,63}|transfer:t-[0-9a-z]{4,32}|(read|write):[a-z0-9-]{1,63}:/[^\x00]{0,300})$"
        ),
    ],
}
"""What a name in braces may be; a path that is not so is "usage"."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to ask.

    Attributes:
        name: of the handler, and the OpenAPI operationId.
        who: roles of users, "agent" for a TLS client certificate, "any" without authentication.
        request: what the body is decoded as, strictly; None: no body.
        response: what is answered with `status`; None: nothing.
        items: what a `Page` that is answered holds.
        also: reasons beyond those that every route of its kind can have.
        media: of the answer.
        creates: takes `Idempotency-Key`.
        max_body_bytes: most that is read of a request; above `MAX_BODY_BYTES` one at a time.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    name: str
    summary: str
    who: frozenset[str] | Literal["agent", "any"]
    request: type | None = None
    response: type | None = None
    items: type | None = None
    query: type = NoQuery
    status: int = 200
    also: tuple[str, ...] = ()
    media: str = "application/json"
    streams: bool = False
    creates: bool = False
    max_body_bytes: int = MAX_BODY_BYTES

    @property
    def parameters(self) -> list[str]:
        """The names in braces."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


_r, _a = resources, agents
_GONE: Final = ("conflict",)

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/v1/health", "health", "The coordinator's state", "any", response=_r.Health),
    Route(
        "GET",
        "/v1/ca",
        "ca",
        "The federation's CA certificate, PEM",
        "any",
        response=str,
        media="application/x-pem-file",
    ),
    Route("GET", "/v1/openapi.json", "openapi", "This interface as OpenAPI 3.1", "any", response=dict),
    Route("GET", "/v1/me", "me", "Who the token stands for", READING, response=_r.User),
    # evidence
    Route(
        "GET",
        "/v1/evidence/checkpoints",
        "list_checkpoints",
        "Checkpoints of the sites' chains of evidence, newest first",
        SEEING,
        response=_r.Page,
        items=_r.EvidenceCheckpoint,
        query=CheckpointsQuery,
    ),
    Route(
        "GET",
        "/v1/evidence/records",
        "list_evidence",
        "The coordinator's own chain of evidence",
        SEEING,
        response=_r.Page,
        items=_r.EvidenceRecord,
        query=PageQuery,
    ),
    Route(
        "GET",
        "/v1/evidence/bundles/{digest}",
        "get_evidence_bundle",
        "Policies that decisions of the coordinator name",
        SEEING,
        response=_r.EvidenceBundle,
        query=PartQuery,
    ),
    # sites
    Route(
        "GET",
        "/v1/sites",
        "list_sites",
        "All sites",
        READING,
        response=_r.Page,
        items=_r.Site,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/sites",
        "create_site",
        "Expect a new site",
        OPERATOR,
        _r.SiteRequest,
        _r.Site,
        status=201,
        also=_GONE,
        creates=True,
    ),
    Route("GET", "/v1/sites/{site}", "get_site", "One site", READING, response=_r.Site),
    Route(
        "PATCH",
        "/v1/sites/{site}",
        "change_site",
        "Change facts or bounds, drain",
        OPERATOR,
        _r.SiteRequest,
        _r.Site,
        also=_GONE,
    ),
    Route(
        "DELETE",
        "/v1/sites/{site}",
        "remove_site",
        "Revoke its certificate and forget its right",
        OPERATOR,
        status=204,
    ),
    Route(
        "GET",
        "/v1/sites/{site}/files",
        "list_files",
        "A folder as the site's agent sees it now",
        ASKING,
        response=_r.Listing,
        query=FilesQuery,
        also=("agent-offline", "stalled", "peer", "policy-denied"),
    ),
    Route(
        "POST",
        "/v1/join-tokens",
        "create_join_token",
        "A one-time token with which an agent enrols",
        OPERATOR,
        _r.JoinTokenRequest,
        _r.JoinToken,
        status=201,
        also=("conflict", "not-found"),
        creates=True,
    ),
    # links and limits
    Route(
        "GET",
        "/v1/links",
        "list_links",
        "All links",
        READING,
        response=_r.Page,
        items=_r.Link,
        query=PageQuery,
    ),
    Route(
        "GET",
        "/v1/links/{source}/{target}",
        "get_link",
        "What is known of a link",
        READING,
        response=_r.Link,
    ),
    Route(
        "GET",
        "/v1/links/{source}/{target}/looks",
        "list_link_looks",
        "What was measured of a link, the newest first",
        READING,
        response=_r.Page,
        items=_r.LinkLook,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/links/{source}/{target}/probe",
        "probe_link",
        "Measure a link now, by a burst",
        OPERATOR,
        _r.ProbeRequest,
        _r.Link,
        also=("no-route", "busy", "agent-offline", "stalled", "peer"),
    ),
    Route(
        "PUT",
        "/v1/links/{source}/{target}",
        "put_link",
        "Declare a link",
        OPERATOR,
        _r.LinkRequest,
        _r.Link,
    ),
    Route(
        "DELETE",
        "/v1/links/{source}/{target}",
        "remove_link",
        "Forget what was declared and measured",
        OPERATOR,
        status=204,
    ),
    Route(
        "GET",
        "/v1/maintenance",
        "list_maintenance",
        "When sites and links are not to be used",
        READING,
        response=_r.Page,
        items=_r.Maintenance,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/maintenance",
        "create_maintenance",
        "Keep transfers off a site or link for a time",
        OPERATOR,
        _r.MaintenanceRequest,
        _r.Maintenance,
        status=201,
        also=("not-found",),
        creates=True,
    ),
    Route(
        "DELETE",
        "/v1/maintenance/{maintenance}",
        "remove_maintenance",
        "Let a site or link be used again",
        OPERATOR,
        status=204,
    ),
    Route(
        "GET",
        "/v1/limits",
        "list_limits",
        "All bandwidth limits",
        READING,
        response=_r.Page,
        items=_r.Limit,
        query=PageQuery,
    ),
    Route(
        "PUT",
        "/v1/limits/{scope}",
        "put_limit",
        "Set a bandwidth limit; it acts at once",
        OPERATOR,
        _r.LimitRequest,
        _r.Limit,
    ),
    Route("DELETE", "/v1/limits/{scope}", "remove_limit", "Lift a limit", OPERATOR, status=204),
    # transfers
    Route(
        "GET",
        "/v1/transfers",
        "list_transfers",
        "Transfers, newest first",
        READING,
        response=_r.Page,
        items=_r.Transfer,
        query=TransfersQuery,
    ),
    Route(
        "POST",
        "/v1/transfers",
        "create_transfer",
        "Ask for a transfer",
        ASKING,
        _r.TransferRequest,
        _r.Transfer,
        status=201,
        also=("not-found", "conflict", "no-route", "quota", "deadline", "busy", "policy-approval"),
        creates=True,
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}",
        "get_transfer",
        "One transfer and its tasks",
        READING,
        response=_r.Transfer,
        query=TransferQuery,
    ),
    *(
        Route(
            "POST",
            f"/v1/transfers/{{transfer}}/{verb}",
            f"{verb}_transfer",
            text,
            ASKING,
            response=_r.Transfer,
            also=("conflict",),
        )
        for verb, text in (
            ("pause", "Stop moving, keep what landed"),
            ("resume", "Go on"),
            ("cancel", "End it; what landed stays"),
            ("retry", "Run again what failed or was cancelled"),
        )
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}/why",
        "why_transfer",
        "What it waits for, or what makes it no faster",
        READING,
        response=_r.Why,
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}/landed",
        "list_landed",
        "Objects as they become durable at the targets",
        READING,
        response=_r.Page,
        items=_r.LandedObject,
        query=LandedQuery,
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}/receipts",
        "list_receipts",
        "What the targets signed for",
        READING,
        response=_r.Page,
        items=_r.DeliveryReceipt,
        query=PageQuery,
        also=("not-found",),
    ),
    Route(
        "POST",
        "/v1/plans",
        "create_plan",
        "Verdict, ways, time and money; nothing moves",
        ASKING,
        _r.PlanRequest,
        _r.Plan,
        also=("not-found",),
    ),
    Route("GET", "/v1/plans/{plan}", "get_plan", "A stored plan", READING, response=_r.Plan),
    Route(
        "GET",
        "/v1/events",
        "list_events",
        "What happened, as pages or as an event stream",
        READING,
        response=_r.Page,
        items=_r.Event,
        query=EventsQuery,
        streams=True,
    ),
    # policy
    Route(
        "GET",
        "/v1/policies",
        "list_bundles",
        "Policy bundles that are or were in force, newest first",
        READING,
        response=_r.Page,
        items=_r.PolicyBundle,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/policies",
        "activate_bundle",
        "Put a signed bundle in force, here and at all agents",
        OPERATOR,
        _r.PolicyBundleUpload,
        _r.PolicyBundle,
        status=201,
        also=("conflict", "policy-invalid"),
        creates=True,
        max_body_bytes=_BUNDLE_BODY_BYTES,
    ),
    Route(
        "GET",
        "/v1/policies/{version}",
        "get_bundle",
        "A part of a bundle's file",
        SEEING,
        response=_r.PolicyBundleContent,
        query=PartQuery,
    ),
    Route(
        "GET",
        "/v1/labels",
        "list_labels",
        "Label statements of data owners",
        READING,
        response=_r.Page,
        items=_r.LabelInfo,
        query=LabelsQuery,
    ),
    Route(
        "POST",
        "/v1/labels",
        "set_label",
        "Hand a data owner's signed statement to all agents",
        ASKING,
        _r.LabelUpload,
        _r.LabelInfo,
        status=201,
        also=("conflict", "label-forged", "label-unknown-owner"),
        creates=True,
    ),
    Route(
        "GET",
        "/v1/agreements",
        "list_agreements",
        "Agreements that authorities signed",
        READING,
        response=_r.Page,
        items=_r.AgreementInfo,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/agreements",
        "set_agreement",
        "Hand an authority's signed agreement to all agents",
        OPERATOR,
        _r.AgreementUpload,
        _r.AgreementInfo,
        status=201,
        also=("conflict", "agreement-forged", "agreement-unknown-authority"),
        creates=True,
    ),
    # people
    Route(
        "GET",
        "/v1/users",
        "list_users",
        "All users",
        SEEING,
        response=_r.Page,
        items=_r.User,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/users",
        "create_user",
        "Make a user",
        ADMIN,
        _r.UserRequest,
        _r.User,
        status=201,
        also=("conflict", "not-found"),
        creates=True,
    ),
    Route(
        "PATCH",
        "/v1/users/{user}",
        "change_user",
        "Change role, tenant, or disable",
        ADMIN,
        _r.UserRequest,
        _r.User,
        also=_GONE,
    ),
    Route(
        "GET",
        "/v1/tokens",
        "list_tokens",
        "Own API tokens; all for admins and auditors",
        READING,
        response=_r.Page,
        items=_r.Token,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/tokens",
        "create_token",
        "A new API token; its secret is shown once",
        READING,
        _r.TokenRequest,
        _r.Token,
        status=201,
        also=("not-found",),
        creates=True,
    ),
    Route("DELETE", "/v1/tokens/{token}", "remove_token", "Revoke a token", READING, status=204),
    Route(
        "GET",
        "/v1/tenants",
        "list_tenants",
        "All tenants",
        SEEING,
        response=_r.Page,
        items=_r.Tenant,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/tenants",
        "create_tenant",
        "Make a tenant",
        ADMIN,
        _r.TenantRequest,
        _r.Tenant,
        status=201,
        also=_GONE,
        creates=True,
    ),
    Route(
        "PATCH",
        "/v1/tenants/{tenant}",
        "change_tenant",
        "Change share and bounds",
        ADMIN,
        _r.TenantRequest,
        _r.Tenant,
        also=_GONE,
    ),
    # approvals
    Route(
        "GET",
        "/v1/approvals",
        "list_approvals",
        "What people have to approve, and who has; newest first",
        READING,
        response=_r.Page,
        items=_r.ApprovalRequest,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/approvals/{handle}",
        "approve",
        "Give a signed approval",
        ASKING,
        _r.ApprovalGiven,
        _r.ApprovalRequest,
        also=("conflict", "approval-forged"),
    ),
    Route(
        "DELETE",
        "/v1/approvals/{handle}/{approver}",
        "withdraw_approval",
        "Take an approval back; what runs on it is stopped",
        ASKING,
        response=_r.ApprovalRequest,
    ),
    # agents
    Route(
        "POST",
        "/v1/agent/join",
        "join",
        "Enrol with a join token",
        "any",
        _a.Join,
        _a.Enrolled,
        also=("authentication", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/renew",
        "renew",
        "A new certificate for the same key",
        "agent",
        _a.Renewal,
        _a.Enrolled,
        also=("incompatible",),
    ),
    Route(
        "GET",
        "/v1/agent/events",
        "agent_events",
        "Commands, as an event stream",
        "agent",
        response=dict,
        media="text/event-stream",
        streams=True,
    ),
    Route(
        "POST",
        "/v1/agent/heartbeat",
        "heartbeat",
        "An agent's state",
        "agent",
        _a.Heartbeat,
        _a.HeartbeatReply,
        also=("incompatible",),
    ),
    Route(
        "GET",
        "/v1/agent/policy",
        "agent_policy",
        "A part of the policy bundle in force, or of an older one",
        "agent",
        response=_r.PolicyBundleContent,
        query=AgentPartQuery,
        also=("not-found",),
    ),
    Route(
        "GET",
        "/v1/agent/labels",
        "agent_labels",
        "Label statements",
        "agent",
        response=_a.AgentLabels,
        query=AgentLabelsQuery,
    ),
    Route(
        "POST",
        "/v1/agent/claim",
        "claim",
        "Ask for work",
        "agent",
        _a.Claim,
        _a.Claimed,
        also=("incompatible",),
    ),
    Route(
        "POST",
        "/v1/agent/tasks/{task}/reports",
        "report",
        "How a task stands",
        "agent",
        _a.Report,
        _a.ReportReply,
        also=("fence-superseded", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/checkpoints",
        "checkpoint",
        "A checkpoint of the site's chain of evidence",
        "agent",
        _a.Checkpointed,
        _a.Taken,
        also=("evidence", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/disposals",
        "dispose",
        "What became of data that may not stay",
        "agent",
        _a.Disposed,
        _a.Taken,
        also=("not-found", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/answers/{answer}",
        "answer",
        "Answer to a look command",
        "agent",
        _a.Answer,
        status=204,
        also=("incompatible",),
    ),
)


def statuses(route: Route) -> dict[int, tuple[str, ...]]:
    """Every status that an error of this route can have, with its reasons; 500 is none: it would be a bug."""
    from flowengine.api.problems import STATUSES

    reasons = ["usage", "temporary", *route.also]
    if route.who != "any":
        reasons += ["authentication", "denied"]
    if route.parameters:
        reasons.append("not-found")
    if route.request is not None:
        reasons += ["too-large", "wrong-media-type"]
    if route.creates:
        reasons.append("conflict")
    found: dict[int, list[str]] = {}
    for reason in dict.fromkeys(reasons):
        found.setdefault(STATUSES[reason], []).append(reason)
    return {status: tuple(found[status]) for status in sorted(found)}
