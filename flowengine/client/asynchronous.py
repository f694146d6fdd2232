"""The API to `await`, under asyncio and trio; the synchronous one runs this one."""

from __future__ import annotations

import base64
import random
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Literal, TypeVar

import msgspec

from flowengine.api.events import Event, Health
from flowengine.api.evidence import EvidenceBundle, EvidenceCheckpoint, EvidenceRecord
from flowengine.api.links import (
    Limit,
    LimitRequest,
    LimitWindow,
    Link,
    LinkLook,
    LinkRequest,
    Maintenance,
    MaintenanceRequest,
    ProbeRequest,
)
from flowengine.api.people import Tenant, TenantRequest, Token, TokenRequest, User, UserRequest
from flowengine.api.plans import Plan, PlanRequest
from flowengine.api.policies import (
    AgreementInfo,
    AgreementUpload,
    ApprovalGiven,
    ApprovalRequest,
    LabelInfo,
    LabelUpload,
    PolicyBundle,
    PolicyBundleContent,
    PolicyBundleUpload,
)
from flowengine.api.schema import Page, Request
from flowengine.api.sites import JoinToken, JoinTokenRequest, Listing, Site, SiteRequest
from flowengine.api.transfers import (
    Priority,
    Transfer,
    TransferOptions,
    TransferRequest,
    TransferState,
)
from flowengine.client.access import Access
from flowengine.client.batches import Batches
from flowengine.client.requests import Deadline, Place, parse_place, transfer_request
from flowengine.client.transfers import AsyncTransfer
from flowengine.client.transport import EventStream, Transport

__all__ = ["AsyncClient"]

T = TypeVar("T")

PAGE: Final = 200
"""How many a listing asks for at a time."""


class AsyncClient:
    """A coordinator, seen by one user. Made by `async with flowengine.connect(…) as client`.

    Every method asks again for a while when the coordinator cannot be reached or says that it is busy; what creates
    something carries a key, so that asking twice makes one. All errors are `FlowError`s with the coordinator's reason.
    """

    def __init__(
        self,
        access: Access,
        *,
        retry_for_s: float = 30.0,
        note: Callable[[str], object] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.url = access.url
        self._transport = Transport(access, retry_for_s=retry_for_s, note=note, rng=rng)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Transfers go on."""
        await self._transport.aclose()

    # --- transfers ---

    async def copy(
        self,
        source: Place,
        targets: Place | Sequence[Place],
        *,
        labels: Iterable[str] = (),
        contracts: Iterable[str] = (),
        purpose: str = "",
        priority: Priority = "normal",
        deadline: Deadline = None,
        best_effort: bool = False,
        cost_limit_usd: float | None = None,
        size_bytes: int | None = None,
        plan: str = "",
        comment: str = "",
        options: TransferOptions | None = None,
    ) -> AsyncTransfer:
        """Start to copy a path of one site to others, straight from site to site.

        Returns as soon as the coordinator has taken it; `wait` and `landed` of what is returned follow it.

        Args:
            source: "site:/path"; as in rsync, a slash at the end means what is in the folder.
            targets: where to, one or several.
            labels: what the data is, for policies; can only add to what the owner declared.
            contracts: ids of contracts that it is under, likewise.
            purpose: what it is for.
            priority: low, normal, high or urgent.
            deadline: when it must be there, or within how long; refused when that cannot be kept.
            best_effort: take it on even so, without a promise.
            cost_limit_usd: most that moving it may cost, by what is declared of links.
            size_bytes: how much it is, where that is known; spares the count that a deadline needs.
            plan: the id of a plan (`plan`), whose ways are used exactly.

        Raises:
            Denied: policy forbids it; the context holds the decisions.
            FlowError: the deadline cannot be kept (reason "deadline"); the context has the earliest possible time.
        """
        request = transfer_request(
            source, targets, mode="copy", now=datetime.now(UTC), labels=labels, contracts=contracts, purpose=purpose,
            priority=priority, deadline=deadline, best_effort=best_effort,
            cost_limit_usd=cost_limit_usd, size_bytes=size_bytes, plan=plan, comment=comment, options=options,
        )  # fmt: skip
        return await self.submit(request)

    async def sync(
        self,
        source: Place,
        targets: Place | Sequence[Place],
        *,
        delete: bool | None = None,
        labels: Iterable[str] = (),
        contracts: Iterable[str] = (),
        purpose: str = "",
        priority: Priority = "normal",
        deadline: Deadline = None,
        best_effort: bool = False,
        cost_limit_usd: float | None = None,
        size_bytes: int | None = None,
        plan: str = "",
        comment: str = "",
        options: TransferOptions | None = None,
    ) -> AsyncTransfer:
        """Start to make targets hold what the source holds; with `delete` nothing else. Otherwise as `copy`."""
        request = transfer_request(
            source, targets, mode="sync", now=datetime.now(UTC), labels=labels, contracts=contracts, purpose=purpose,
            priority=priority, deadline=deadline, best_effort=best_effort,
            cost_limit_usd=cost_limit_usd, size_bytes=size_bytes, plan=plan, comment=comment, options=options, delete=delete,
        )  # fmt: skip
        return await self.submit(request)

    async def verify(
        self,
        source: Place,
        targets: Place | Sequence[Place],
        *,
        labels: Iterable[str] = (),
        contracts: Iterable[str] = (),
        purpose: str = "",
        priority: Priority = "normal",
        comment: str = "",
        options: TransferOptions | None = None,
    ) -> AsyncTransfer:
        """Start to compare targets with the source, reading every byte on both sides; nothing changes."""
        request = transfer_request(
            source, targets, mode="verify", now=datetime.now(UTC), labels=labels, contracts=contracts, purpose=purpose,
            priority=priority, comment=comment, options=options,
        )  # fmt: skip
        return await self.submit(request)

    async def submit(self, request: TransferRequest, *, key: str = "") -> AsyncTransfer:
        """Start a transfer from a request. The same `key` again, within a day, gives the same transfer."""
        record = await self._transport.request(
            "POST", "/v1/transfers", Transfer, body=request, key=key or uuid.uuid4().hex
        )
        return AsyncTransfer(self._transport, record)

    async def plan(
        self,
        source: Place,
        targets: Place | Sequence[Place],
        *,
        mode: Literal["copy", "sync", "verify"] = "copy",
        labels: Iterable[str] = (),
        contracts: Iterable[str] = (),
        purpose: str = "",
        priority: Priority = "normal",
        deadline: Deadline = None,
        best_effort: bool = False,
        cost_limit_usd: float | None = None,
        options: TransferOptions | None = None,
        size_bytes: int | None = None,
        objects: int | None = None,
    ) -> Plan:
        """What such a transfer would be: verdict of policy, ways, time, money, and what binds. Nothing moves.

        Args:
            size_bytes, objects: how much it is; without them the source's agent counts what lies there. What a dry run
                found counts what the targets have already.
        """
        request = transfer_request(
            source, targets, mode=mode, now=datetime.now(UTC), labels=labels, contracts=contracts, purpose=purpose,
            priority=priority, deadline=deadline, best_effort=best_effort, cost_limit_usd=cost_limit_usd,
            options=options,
        )  # fmt: skip
        body = PlanRequest(request=request, size_bytes=size_bytes, objects=objects)
        return await self._transport.request("POST", "/v1/plans", Plan, body=body, key=uuid.uuid4().hex)

    async def planned(self, plan_id: str) -> Plan:
        """A plan that was made before, by its id."""
        return await self._transport.request("GET", f"/v1/plans/{plan_id}", Plan)

    async def transfer(self, transfer_id: str) -> AsyncTransfer:
        """A transfer by its id."""
        record = await self._transport.request("GET", f"/v1/transfers/{transfer_id}", Transfer)
        return AsyncTransfer(self._transport, record)

    def transfers(
        self,
        *,
        state: TransferState | None = None,
        site: str | None = None,
        user: str | None = None,
        tenant: str | None = None,
    ) -> Batches[Transfer]:
        """Transfers that this user may see, as the coordinator orders them: the newest first."""
        given = {"state": state, "site": site, "user": user, "tenant": tenant, "limit": PAGE}
        params = {name: value for name, value in given.items() if value is not None}
        after: str | None = ""

        async def fetch() -> list[Transfer] | None:
            nonlocal after
            if after is None:
                return None
            items, following = await self._transport.page("/v1/transfers", Transfer, params, after)
            after = following or None
            return items

        return Batches(fetch)

    def events(
        self, *, after: int | None = None, transfer: str = "", site: str = "", types: Iterable[str] = ()
    ) -> EventStream[Event]:
        """What happens, as it happens; comes back by itself after a broken connection, without a gap.

        Use it as `async with client.events() as events` to end the stream at the end of the block.

        Args:
            after: begin behind the event with this `seq`; 0 for all that are kept, None for only new ones.
            types: only these; "transfer" stands for all that begin with "transfer.".

        Raises (while iterating):
            UsageError: there is no such type.
        """
        given = {"transfer": transfer, "site": site, "types": ",".join(types)}
        params = {name: value for name, value in given.items() if value}
        return self._transport.events(
            "/v1/events", Event, params=params, after="" if after is None else str(after)
        )

    # --- sites ---

    async def ls(self, place: Place) -> Listing:
        """A folder at a site as its agent sees it now."""
        at = parse_place(place)
        return await self._transport.request(
            "GET", f"/v1/sites/{at.site}/files", Listing, params={"path": at.path}
        )

    async def sites(self) -> list[Site]:
        """All sites."""
        return await self._transport.all_of("/v1/sites", Site)

    async def site(self, name: str) -> Site:
        """One site."""
        return await self._transport.request("GET", f"/v1/sites/{name}", Site)

    async def add_site(self, request: SiteRequest) -> Site:
        """Enter a new site; its agent joins with a `join_token`."""
        return await self._create("/v1/sites", request, Site)

    async def change_site(self, name: str, request: SiteRequest) -> Site:
        """Change what is given in `request`: facts, bounds, whether it drains."""
        return await self._transport.request("PATCH", f"/v1/sites/{name}", Site, body=request)

    async def remove_site(self, name: str) -> None:
        """Revoke the site's certificate and forget its rights. Its data stays where it is."""
        await self._transport.request("DELETE", f"/v1/sites/{name}", type(None))

    async def join_token(self, site: str, valid_s: int = 900) -> JoinToken:
        """A one-time token with which the agent of `site` enrols."""
        return await self._create("/v1/join-tokens", JoinTokenRequest(site=site, valid_s=valid_s), JoinToken)

    async def links(self) -> list[Link]:
        """All links between sites."""
        return await self._transport.all_of("/v1/links", Link)

    async def set_link(self, source: str, target: str, request: LinkRequest) -> Link:
        """Declare what a link can do and costs."""
        return await self._transport.request("PUT", f"/v1/links/{source}/{target}", Link, body=request)

    async def remove_link(self, source: str, target: str) -> None:
        """Forget what was declared and measured of a link."""
        await self._transport.request("DELETE", f"/v1/links/{source}/{target}", type(None))

    async def link(self, source: str, target: str) -> Link:
        """What is known of one link."""
        return await self._transport.request("GET", f"/v1/links/{source}/{target}", Link)

    async def link_looks(self, source: str, target: str, limit: int = 100) -> list[LinkLook]:
        """What was measured of a link of late, the newest first."""
        page = await self._transport.request("GET", f"/v1/links/{source}/{target}/looks?limit={limit}", Page)
        return [msgspec.convert(item, LinkLook, strict=False) for item in page.items]

    async def probe_link(self, source: str, target: str, request: ProbeRequest | None = None) -> Link:
        """Measure a link now, by a burst that the target's agent throws away."""
        body = request or ProbeRequest()
        return await self._transport.request("POST", f"/v1/links/{source}/{target}/probe", Link, body=body)

    async def maintenance(self) -> list[Maintenance]:
        """When sites and links are not to be used."""
        return await self._transport.all_of("/v1/maintenance", Maintenance)

    async def add_maintenance(self, request: MaintenanceRequest) -> Maintenance:
        """Keep transfers off a site or link for a time."""
        return await self._create("/v1/maintenance", request, Maintenance)

    async def remove_maintenance(self, maintenance_id: str) -> None:
        """Let a site or link be used again."""
        await self._transport.request("DELETE", f"/v1/maintenance/{maintenance_id}", type(None))

    # --- limits ---

    async def limits(self) -> list[Limit]:
        """All bandwidth limits."""
        return await self._transport.all_of("/v1/limits", Limit)

    async def set_limit(
        self, scope: str, rate_bits_per_s: int | None, windows: Iterable[LimitWindow] = ()
    ) -> Limit:
        """Limit a scope ("link:a>b", "site:a", "tenant:t", "transfer:ID", "read:a:/root", "write:a:/root"), also for what
        runs now.

        Args:
            rate_bits_per_s: outside all windows; None for no limit then.
            windows: other rates for hours of the day.
        """
        body = LimitRequest(rate_bits_per_s=rate_bits_per_s, windows=list(windows))
        return await self._transport.request("PUT", f"/v1/limits/{_quote(scope)}", Limit, body=body)

    async def remove_limit(self, scope: str) -> None:
        """Take a limit away."""
        await self._transport.request("DELETE", f"/v1/limits/{_quote(scope)}", type(None))

    # --- policy ---

    async def bundles(self) -> list[PolicyBundle]:
        """Policy bundles that are or were in force, the newest first."""
        return await self._transport.all_of("/v1/policies", PolicyBundle)

    async def activate_bundle(self, content: bytes) -> PolicyBundle:
        """Put a signed bundle in force, at the coordinator and at all agents."""
        return await self._create("/v1/policies", PolicyBundleUpload(content=content), PolicyBundle)

    async def bundle(self, version: int) -> PolicyBundleContent:
        """A bundle's file, whole."""
        path, parts = f"/v1/policies/{version}", bytearray()
        while True:
            found = await self._transport.request(
                "GET", path, PolicyBundleContent, params={"offset": len(parts)}
            )
            parts += found.content
            if len(parts) >= found.size_bytes or not found.content:
                return msgspec.structs.replace(found, content=bytes(parts), offset=0)

    async def labels(self, site: str | None = None) -> list[LabelInfo]:
        """Label statements of data owners, in the order in which they came."""
        return await self._transport.all_of("/v1/labels", LabelInfo, {} if site is None else {"site": site})

    async def set_label(self, document: bytes) -> LabelInfo:
        """Hand a data owner's signed statement to all agents."""
        return await self._create("/v1/labels", LabelUpload(document=document), LabelInfo)

    async def agreements(self) -> list[AgreementInfo]:
        """What authorities say was agreed, in the order in which it came."""
        return await self._transport.all_of("/v1/agreements", AgreementInfo)

    async def set_agreement(self, document: bytes) -> AgreementInfo:
        """Hand an authority's signed agreement to all agents."""
        return await self._create("/v1/agreements", AgreementUpload(document=document), AgreementInfo)

    async def approvals(self) -> list[ApprovalRequest]:
        """What people have to approve, and who has; the newest first."""
        return await self._transport.all_of("/v1/approvals", ApprovalRequest)

    async def approve(self, handle: str, document: bytes) -> ApprovalRequest:
        """Give a signed approval (`flowengine.trust.approval`)."""
        body = ApprovalGiven(document=document)
        return await self._transport.request(
            "POST", f"/v1/approvals/{_quote(handle)}", ApprovalRequest, body=body
        )

    async def withdraw_approval(self, handle: str, who: str) -> ApprovalRequest:
        """Take an approval back: what runs on it is stopped."""
        return await self._transport.request(
            "DELETE", f"/v1/approvals/{_quote(handle)}/{_quote(who)}", ApprovalRequest
        )

    # --- people ---

    async def me(self) -> User:
        """Who asks."""
        return await self._transport.request("GET", "/v1/me", User)

    async def health(self) -> Health:
        """The coordinator's state and version."""
        return await self._transport.request("GET", "/v1/health", Health)

    # --- evidence ---

    async def checkpoints(self, site: str = "") -> list[EvidenceCheckpoint]:
        """Signed heads of the sites' chains of evidence that the coordinator holds, newest first."""
        params = {"agent": f"site:{site}"} if site else None
        return await self._transport.all_of("/v1/evidence/checkpoints", EvidenceCheckpoint, params)

    async def evidence(self) -> list[EvidenceRecord]:
        """The coordinator's own chain of evidence."""
        return await self._transport.all_of("/v1/evidence/records", EvidenceRecord)

    async def evidence_bundle(self, digest: str) -> EvidenceBundle:
        """The policies that decisions in the coordinator's chain name."""
        path, parts = f"/v1/evidence/bundles/{digest}", bytearray()
        while True:
            found = await self._transport.request("GET", path, EvidenceBundle, params={"offset": len(parts)})
            part = base64.b64decode(found.content)
            parts += part
            if len(parts) >= found.size_bytes or not part:
                whole = base64.b64encode(parts).decode("ascii")
                return msgspec.structs.replace(found, content=whole, offset=0)

    async def users(self) -> list[User]:
        """All users."""
        return await self._transport.all_of("/v1/users", User)

    async def add_user(self, request: UserRequest) -> User:
        """Enter a user."""
        return await self._create("/v1/users", request, User)

    async def change_user(self, name: str, request: UserRequest) -> User:
        """Change role, tenant, or whether the user may come in."""
        return await self._transport.request("PATCH", f"/v1/users/{name}", User, body=request)

    async def tokens(self) -> list[Token]:
        """API tokens, without their secrets."""
        return await self._transport.all_of("/v1/tokens", Token)

    async def add_token(self, request: TokenRequest) -> Token:
        """Make an API token; its secret is in the answer and nowhere else."""
        return await self._create("/v1/tokens", request, Token)

    async def remove_token(self, token_id: str) -> None:
        """Make a token worthless."""
        await self._transport.request("DELETE", f"/v1/tokens/{token_id}", type(None))

    async def tenants(self) -> list[Tenant]:
        """All tenants and what they use now."""
        return await self._transport.all_of("/v1/tenants", Tenant)

    async def add_tenant(self, request: TenantRequest) -> Tenant:
        """Enter a tenant."""
        return await self._create("/v1/tenants", request, Tenant)

    async def change_tenant(self, name: str, request: TenantRequest) -> Tenant:
        """Change a tenant's weight and bounds."""
        return await self._transport.request("PATCH", f"/v1/tenants/{name}", Tenant, body=request)

    async def _create(
        self,
        path: str,
        body: Request,
        kind: type[T],
    ) -> T:
        return await self._transport.request("POST", path, kind, body=body, key=uuid.uuid4().hex)


def _quote(scope: str) -> str:
    from urllib.parse import quote

    return quote(scope, safe="")
