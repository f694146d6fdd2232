"""The API to `await`, under asyncio and trio; the synchronous one runs this one."""

from __future__ import annotations

import base64
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Generic, Literal, TypeVar

import anyio
import msgspec

from flowengine.api import resources as api
from flowengine.client.access import Access
from flowengine.client.requests import Deadline, Place, parse_place, transfer_request
from flowengine.client.transport import EventStream, Transport
from flowengine.errors import Denied, FlowError, IntegrityError, TemporaryError

__all__ = ["ENDED", "AsyncClient", "AsyncTransfer", "Batches", "failure_of"]

T = TypeVar("T")

ENDED: Final = frozenset({"completed", "terminated", "quarantined", "purged"})
LONG_POLL_S: Final = 20.0
"""How long one question waits for news at the coordinator."""
PAGE: Final = 200
EARLY_PAUSE_S: Final = 0.05
LATE_PAUSE_S: Final = 1.0


def failure_of(record: api.Transfer) -> FlowError | None:
    """Why a transfer that has ended is not complete; None for one that is."""
    if record.state == "completed":
        return None
    hint = next((task.hint for task in record.tasks if task.hint), "")
    kind = {"denied": Denied, "integrity": IntegrityError}.get(record.reason, FlowError)
    return kind(
        f"transfer {record.id} is {record.state}: {record.message or record.reason}",
        hint=hint or f"flow transfer show {record.id} has the details",
        reason=record.reason,
        transfer=record.id,
        state=record.state,
    )


class Batches(AsyncIterator[T], Generic[T]):
    """Items that come in batches. May be left at any point: nothing stays open.

    Args:
        fetch: the next batch; None at the end.
    """

    def __init__(self, fetch: Callable[[], Awaitable[list[T] | None]]) -> None:
        self._fetch = fetch
        self._items: list[T] = []
        self._at = 0

    def __aiter__(self) -> Batches[T]:
        return self

    async def __anext__(self) -> T:
        while self._at >= len(self._items):
            batch = await self.next_batch()
            if batch is None:
                raise StopAsyncIteration
            self._items, self._at = batch, 0
        self._at += 1
        return self._items[self._at - 1]

    async def next_batch(self) -> list[T] | None:
        """What came next, all at once; None at the end."""
        return await self._fetch()


class AsyncTransfer:
    """One transfer: watch it, use what has landed, steer it. Forgetting it leaves the transfer running.

    Attributes:
        record: the transfer as it was last seen.
    """

    def __init__(self, transport: Transport, record: api.Transfer) -> None:
        self._transport = transport
        self.record = record

    def __repr__(self) -> str:
        return f"<transfer {self.id}: {self.state}>"

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> api.TransferState:
        """The state as last seen."""
        return self.record.state

    @property
    def ended(self) -> bool:
        """Whether it had ended when it was last seen."""
        return self.record.state in ENDED

    async def refresh(self, wait_s: float = 0.0) -> api.Transfer:
        """The transfer as it is now; with `wait_s`, as soon as it has ended, at latest after so long."""
        params = {"wait_s": wait_s} if wait_s else None
        self.record = await self._transport.request(
            "GET", f"/v1/transfers/{self.id}", api.Transfer, params=params, timeout_s=wait_s + 30
        )
        return self.record

    async def wait(self, timeout_s: float | None = None) -> api.Transfer:
        """The transfer once it is complete: every object verified and durable at every target.

        Cancelling the wait leaves the transfer running.

        Raises:
            FlowError: it ended otherwise; its reason says how.
            TemporaryError: it still runs after `timeout_s` (reason "timeout").
        """
        with anyio.move_on_after(timeout_s):
            async for _ in self.updates(LONG_POLL_S):
                pass
        if not self.ended:
            raise TemporaryError(
                f"transfer {self.id} has not ended within {timeout_s:g} s; it goes on",
                hint="wait again, or ask why()",
                reason="timeout",
            )
        if (failure := failure_of(self.record)) is not None:
            raise failure
        return self.record

    def updates(self, every_s: float = 1.0) -> Batches[api.Transfer]:
        """The transfer about every `every_s` seconds, and at once when it ended: that is the last one."""
        last = False
        pause_s = EARLY_PAUSE_S

        async def fetch() -> list[api.Transfer] | None:
            nonlocal last, pause_s
            if last:
                return None
            began = anyio.current_time()
            record = await self.refresh(wait_s=every_s)
            last = record.state in ENDED
            early = anyio.current_time() - began < every_s / 2
            if early and not last:  # the coordinator is stopping, or does not wait
                await anyio.sleep(min(pause_s, every_s))
                pause_s = min(2 * pause_s, LATE_PAUSE_S)
            return [record]

        return Batches(fetch)

    def landed(self, after: int = 0) -> Batches[api.LandedObject]:
        """Each object as it becomes durable at a target, until the transfer has ended.

        What was there before and did not change counts as landed by an earlier transfer and is not named.

        Args:
            after: begin behind the object with this `seq`, to go on where an earlier loop stopped.

        Raises (while iterating, after the last object):
            FlowError: the transfer did not complete; what was named has landed nevertheless.
        """
        cursor = after

        async def fetch() -> list[api.LandedObject] | None:
            nonlocal cursor
            pause_s = EARLY_PAUSE_S
            while True:
                began = anyio.current_time()
                ended = self.ended  # known before asking: then nothing can land after this page
                items, _ = await self._transport.page(
                    f"/v1/transfers/{self.id}/landed",
                    api.LandedObject,
                    {"after": cursor, "wait_s": 0 if ended else LONG_POLL_S},
                    timeout_s=LONG_POLL_S + 30,
                )
                if items:
                    cursor = items[-1].seq
                    return items
                if ended:
                    if (failure := failure_of(self.record)) is not None:
                        raise failure
                    return None
                await self.refresh()
                if not self.ended and anyio.current_time() - began < LONG_POLL_S / 2:
                    await anyio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LATE_PAUSE_S)

        return Batches(fetch)

    async def why(self) -> api.Why:
        """One line on what it waits for, or what makes it no faster."""
        return await self._transport.request("GET", f"/v1/transfers/{self.id}/why", api.Why)

    async def receipts(self) -> list[api.DeliveryReceipt]:
        """What the targets signed for so far: one receipt for each at which everything landed."""
        return await self._transport.all_of(f"/v1/transfers/{self.id}/receipts", api.DeliveryReceipt)

    async def cancel(self) -> api.Transfer:
        """End it. What has landed stays."""
        return await self._steer("cancel")

    async def pause(self) -> api.Transfer:
        """Stop moving until `resume`; nothing that was done is lost."""
        return await self._steer("pause")

    async def resume(self) -> api.Transfer:
        """Go on after `pause`."""
        return await self._steer("resume")

    async def retry(self) -> api.Transfer:
        """Try again what ended incomplete: only what is missing moves."""
        return await self._steer("retry")

    async def _steer(self, verb: Literal["pause", "resume", "cancel", "retry"]) -> api.Transfer:
        self.record = await self._transport.request(
            "POST", f"/v1/transfers/{self.id}/{verb}", api.Transfer, key=uuid.uuid4().hex
        )
        return self.record


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
        priority: api.Priority = "normal",
        deadline: Deadline = None,
        best_effort: bool = False,
        cost_limit_usd: float | None = None,
        size_bytes: int | None = None,
        plan: str = "",
        comment: str = "",
        options: api.TransferOptions | None = None,
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
        priority: api.Priority = "normal",
        deadline: Deadline = None,
        best_effort: bool = False,
        cost_limit_usd: float | None = None,
        size_bytes: int | None = None,
        plan: str = "",
        comment: str = "",
        options: api.TransferOptions | None = None,
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
        priority: api.Priority = "normal",
        comment: str = "",
        options: api.TransferOptions | None = None,
    ) -> AsyncTransfer:
        """Start to compare targets with the source, reading every byte on both sides; nothing changes."""
        request = transfer_request(
            source, targets, mode="verify", now=datetime.now(UTC), labels=labels, contracts=contracts, purpose=purpose,
            priority=priority, comment=comment, options=options,
        )  # fmt: skip
        return await self.submit(request)

    async def submit(self, request: api.TransferRequest, *, key: str = "") -> AsyncTransfer:
        """Start a transfer from a request. The same `key` again, within a day, gives the same transfer."""
        record = await self._transport.request(
            "POST", "/v1/transfers", api.Transfer, body=request, key=key or uuid.uuid4().hex
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
        priority: api.Priority = "normal",
        deadline: Deadline = None,
        best_effort: bool = False,
        cost_limit_usd: float | None = None,
        options: api.TransferOptions | None = None,
        size_bytes: int | None = None,
        objects: int | None = None,
    ) -> api.Plan:
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
        body = api.PlanRequest(request=request, size_bytes=size_bytes, objects=objects)
        return await self._transport.request("POST", "/v1/plans", api.Plan, body=body, key=uuid.uuid4().hex)

    async def planned(self, plan_id: str) -> api.Plan:
        """A plan that was made before, by its id."""
        return await self._transport.request("GET", f"/v1/plans/{plan_id}", api.Plan)

    async def transfer(self, transfer_id: str) -> AsyncTransfer:
        """A transfer by its id."""
        record = await self._transport.request("GET", f"/v1/transfers/{transfer_id}", api.Transfer)
        return AsyncTransfer(self._transport, record)

    def transfers(
        self,
        *,
        state: api.TransferState | None = None,
        site: str | None = None,
        user: str | None = None,
        tenant: str | None = None,
    ) -> Batches[api.Transfer]:
        """Transfers that this user may see, as the coordinator orders them: the newest first."""
        given = {"state": state, "site": site, "user": user, "tenant": tenant, "limit": PAGE}
        params = {name: value for name, value in given.items() if value is not None}
        after: str | None = ""

        async def fetch() -> list[api.Transfer] | None:
            nonlocal after
            if after is None:
                return None
            items, following = await self._transport.page("/v1/transfers", api.Transfer, params, after)
            after = following or None
            return items

        return Batches(fetch)

    def events(
        self, *, after: int | None = None, transfer: str = "", site: str = "", types: Iterable[str] = ()
    ) -> EventStream[api.Event]:
        """What happens, as it happens; comes back by itself after a broken connection, without a gap.

        Use it as `async with client.events() as events` to end the stream at the end of the block.

        Args:
            after: begin behind the event with this `seq`; 0 for all that are kept, None for only new ones.
            types: only these; "transfer" stands for all that begin with "transfer.".
        """
        given = {"transfer": transfer, "site": site, "types": ",".join(types)}
        params = {name: value for name, value in given.items() if value}
        return self._transport.events(
            "/v1/events", api.Event, params=params, after="" if after is None else str(after)
        )

    # --- sites ---

    async def ls(self, place: Place) -> api.Listing:
        """A folder at a site as its agent sees it now."""
        at = parse_place(place)
        return await self._transport.request(
            "GET", f"/v1/sites/{at.site}/files", api.Listing, params={"path": at.path}
        )

    async def sites(self) -> list[api.Site]:
        """All sites."""
        return await self._transport.all_of("/v1/sites", api.Site)

    async def site(self, name: str) -> api.Site:
        """One site."""
        return await self._transport.request("GET", f"/v1/sites/{name}", api.Site)

    async def add_site(self, request: api.SiteRequest) -> api.Site:
        """Enter a new site; its agent joins with a `join_token`."""
        return await self._create("/v1/sites", request, api.Site)

    async def change_site(self, name: str, request: api.SiteRequest) -> api.Site:
        """Change what is given in `request`: facts, bounds, whether it drains."""
        return await self._transport.request("PATCH", f"/v1/sites/{name}", api.Site, body=request)

    async def remove_site(self, name: str) -> None:
        """Revoke the site's certificate and forget its rights. Its data stays where it is."""
        await self._transport.request("DELETE", f"/v1/sites/{name}", type(None))

    async def join_token(self, site: str, valid_s: int = 900) -> api.JoinToken:
        """A one-time token with which the agent of `site` enrols."""
        return await self._create(
            "/v1/join-tokens", api.JoinTokenRequest(site=site, valid_s=valid_s), api.JoinToken
        )

    async def links(self) -> list[api.Link]:
        """All links between sites."""
        return await self._transport.all_of("/v1/links", api.Link)

    async def set_link(self, source: str, target: str, request: api.LinkRequest) -> api.Link:
        """Declare what a link can do and costs."""
        return await self._transport.request("PUT", f"/v1/links/{source}/{target}", api.Link, body=request)

    async def remove_link(self, source: str, target: str) -> None:
        """Forget what was declared and measured of a link."""
        await self._transport.request("DELETE", f"/v1/links/{source}/{target}", type(None))

    async def link(self, source: str, target: str) -> api.Link:
        """What is known of one link."""
        return await self._transport.request("GET", f"/v1/links/{source}/{target}", api.Link)

    async def link_looks(self, source: str, target: str, limit: int = 100) -> list[api.LinkLook]:
        """What was measured of a link of late, the newest first."""
        page = await self._transport.request(
            "GET", f"/v1/links/{source}/{target}/looks?limit={limit}", api.Page
        )
        return [msgspec.convert(item, api.LinkLook, strict=False) for item in page.items]

    async def probe_link(self, source: str, target: str, request: api.ProbeRequest | None = None) -> api.Link:
        """Measure a link now, by a burst that the target's agent throws away."""
        body = request or api.ProbeRequest()
        return await self._transport.request(
            "POST", f"/v1/links/{source}/{target}/probe", api.Link, body=body
        )

    async def maintenance(self) -> list[api.Maintenance]:
        """When sites and links are not to be used."""
        return await self._transport.all_of("/v1/maintenance", api.Maintenance)

    async def add_maintenance(self, request: api.MaintenanceRequest) -> api.Maintenance:
        """Keep transfers off a site or link for a time."""
        return await self._create("/v1/maintenance", request, api.Maintenance)

    async def remove_maintenance(self, maintenance_id: str) -> None:
        """Let a site or link be used again."""
        await self._transport.request("DELETE", f"/v1/maintenance/{maintenance_id}", type(None))

    # --- limits ---

    async def limits(self) -> list[api.Limit]:
        """All bandwidth limits."""
        return await self._transport.all_of("/v1/limits", api.Limit)

    async def set_limit(
        self, scope: str, rate_bits_per_s: int | None, windows: Iterable[api.LimitWindow] = ()
    ) -> api.Limit:
        """Limit a scope ("link:a>b", "site:a", "tenant:t", "transfer:ID", "read:a:/root", "write:a:/root"), also for what
        runs now.

        Args:
            rate_bits_per_s: outside all windows; None for no limit then.
            windows: other rates for hours of the day.
        """
        body = api.LimitRequest(rate_bits_per_s=rate_bits_per_s, windows=list(windows))
        return await self._transport.request("PUT", f"/v1/limits/{_quote(scope)}", api.Limit, body=body)

    async def remove_limit(self, scope: str) -> None:
        """Take a limit away."""
        await self._transport.request("DELETE", f"/v1/limits/{_quote(scope)}", type(None))

    # --- policy ---

    async def bundles(self) -> list[api.PolicyBundle]:
        """Policy bundles that are or were in force, the newest first."""
        return await self._transport.all_of("/v1/policies", api.PolicyBundle)

    async def activate_bundle(self, content: bytes) -> api.PolicyBundle:
        """Put a signed bundle in force, at the coordinator and at all agents."""
        return await self._create("/v1/policies", api.PolicyBundleUpload(content=content), api.PolicyBundle)

    async def bundle(self, version: int) -> api.PolicyBundleContent:
        """A bundle's file, whole."""
        path, parts = f"/v1/policies/{version}", bytearray()
        while True:
            found = await self._transport.request(
                "GET", path, api.PolicyBundleContent, params={"offset": len(parts)}
            )
            parts += found.content
            if len(parts) >= found.size_bytes or not found.content:
                return msgspec.structs.replace(found, content=bytes(parts), offset=0)

    async def labels(self, site: str | None = None) -> list[api.LabelInfo]:
        """Label statements of data owners, in the order in which they came."""
        return await self._transport.all_of(
            "/v1/labels", api.LabelInfo, {} if site is None else {"site": site}
        )

    async def set_label(self, document: bytes) -> api.LabelInfo:
        """Hand a data owner's signed statement to all agents."""
        return await self._create("/v1/labels", api.LabelUpload(document=document), api.LabelInfo)

    async def agreements(self) -> list[api.AgreementInfo]:
        """What authorities say was agreed, in the order in which it came."""
        return await self._transport.all_of("/v1/agreements", api.AgreementInfo)

    async def set_agreement(self, document: bytes) -> api.AgreementInfo:
        """Hand an authority's signed agreement to all agents."""
        return await self._create("/v1/agreements", api.AgreementUpload(document=document), api.AgreementInfo)

    async def approvals(self) -> list[api.ApprovalRequest]:
        """What people have to approve, and who has; the newest first."""
        return await self._transport.all_of("/v1/approvals", api.ApprovalRequest)

    async def approve(self, handle: str, document: bytes) -> api.ApprovalRequest:
        """Give a signed approval (`flowengine.trust.approval`)."""
        body = api.ApprovalGiven(document=document)
        return await self._transport.request(
            "POST", f"/v1/approvals/{_quote(handle)}", api.ApprovalRequest, body=body
        )

    async def withdraw_approval(self, handle: str, who: str) -> api.ApprovalRequest:
        """Take an approval back: what runs on it is stopped."""
        return await self._transport.request(
            "DELETE", f"/v1/approvals/{_quote(handle)}/{_quote(who)}", api.ApprovalRequest
        )

    # --- people ---

    async def me(self) -> api.User:
        """Who asks."""
        return await self._transport.request("GET", "/v1/me", api.User)

    async def health(self) -> api.Health:
        """The coordinator's state and version."""
        return await self._transport.request("GET", "/v1/health", api.Health)

    # --- evidence ---

    async def checkpoints(self, site: str = "") -> list[api.EvidenceCheckpoint]:
        """Signed heads of the sites' chains of evidence that the coordinator holds, newest first."""
        params = {"agent": f"site:{site}"} if site else None
        return await self._transport.all_of("/v1/evidence/checkpoints", api.EvidenceCheckpoint, params)

    async def evidence(self) -> list[api.EvidenceRecord]:
        """The coordinator's own chain of evidence."""
        return await self._transport.all_of("/v1/evidence/records", api.EvidenceRecord)

    async def evidence_bundle(self, digest: str) -> api.EvidenceBundle:
        """The policies that decisions in the coordinator's chain name."""
        path, parts = f"/v1/evidence/bundles/{digest}", bytearray()
        while True:
            found = await self._transport.request(
                "GET", path, api.EvidenceBundle, params={"offset": len(parts)}
            )
            part = base64.b64decode(found.content)
            parts += part
            if len(parts) >= found.size_bytes or not part:
                whole = base64.b64encode(parts).decode("ascii")
                return msgspec.structs.replace(found, content=whole, offset=0)

    async def users(self) -> list[api.User]:
        """All users."""
        return await self._transport.all_of("/v1/users", api.User)

    async def add_user(self, request: api.UserRequest) -> api.User:
        """Enter a user."""
        return await self._create("/v1/users", request, api.User)

    async def change_user(self, name: str, request: api.UserRequest) -> api.User:
        """Change role, tenant, or whether the user may come in."""
        return await self._transport.request("PATCH", f"/v1/users/{name}", api.User, body=request)

    async def tokens(self) -> list[api.Token]:
        """API tokens, without their secrets."""
        return await self._transport.all_of("/v1/tokens", api.Token)

    async def add_token(self, request: api.TokenRequest) -> api.Token:
        """Make an API token; its secret is in the answer and nowhere else."""
        return await self._create("/v1/tokens", request, api.Token)

    async def remove_token(self, token_id: str) -> None:
        """Make a token worthless."""
        await self._transport.request("DELETE", f"/v1/tokens/{token_id}", type(None))

    async def tenants(self) -> list[api.Tenant]:
        """All tenants and what they use now."""
        return await self._transport.all_of("/v1/tenants", api.Tenant)

    async def add_tenant(self, request: api.TenantRequest) -> api.Tenant:
        """Enter a tenant."""
        return await self._create("/v1/tenants", request, api.Tenant)

    async def change_tenant(self, name: str, request: api.TenantRequest) -> api.Tenant:
        """Change a tenant's weight and bounds."""
        return await self._transport.request("PATCH", f"/v1/tenants/{name}", api.Tenant, body=request)

    async def _create(
        self,
        path: str,
        body: api.SiteRequest
        | api.JoinTokenRequest
        | api.MaintenanceRequest
        | api.UserRequest
        | api.TokenRequest
        | api.TenantRequest
        | api.PolicyBundleUpload
        | api.LabelUpload
        | api.AgreementUpload,
        kind: type[T],
    ) -> T:
        return await self._transport.request("POST", path, kind, body=body, key=uuid.uuid4().hex)


def _quote(scope: str) -> str:
    from urllib.parse import quote

    return quote(scope, safe="")
