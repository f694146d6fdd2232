"""The API for plain Python and notebooks: the same methods, run on a thread with an event loop of its own."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar

from flowengine.api.events import Health
from flowengine.api.evidence import EvidenceBundle, EvidenceCheckpoint, EvidenceRecord
from flowengine.api.links import (
    Limit,
    LimitWindow,
    Link,
    LinkLook,
    LinkRequest,
    Maintenance,
    MaintenanceRequest,
    ProbeRequest,
)
from flowengine.api.people import Tenant, TenantRequest, Token, TokenRequest, User, UserRequest
from flowengine.api.plans import Plan
from flowengine.api.policies import (
    AgreementInfo,
    ApprovalRequest,
    LabelInfo,
    PolicyBundle,
    PolicyBundleContent,
)
from flowengine.api.sites import JoinToken, Listing, Site, SiteRequest
from flowengine.api.transfers import (
    DeliveryReceipt,
    LandedObject,
    Priority,
    TransferOptions,
    TransferRequest,
    TransferState,
    Why,
)
from flowengine.api.transfers import Transfer as TransferRecord
from flowengine.client.access import Access, find_access
from flowengine.client.asynchronous import AsyncClient
from flowengine.client.blocking import Events, Items, LoopThread
from flowengine.client.requests import Deadline, Place
from flowengine.client.transfers import AsyncTransfer
from flowengine.errors import UsageError

__all__ = ["Client", "Transfer", "connect"]

P = ParamSpec("P")
T = TypeVar("T")


def connect(
    url: str | None = None,
    token: str | None = None,
    *,
    ca_pem: str | None = None,
    ca_file: str | Path | None = None,
    retry_for_s: float = 30.0,
    note: Callable[[str], object] | None = None,
) -> Client:
    """A client of the coordinator: use it as it is, `with` it, or `async with` it for the methods to await.

    What is not given comes from FLOW_COORDINATOR, FLOW_TOKEN or FLOW_TOKEN_FILE, FLOW_CA_FILE, then from what
    `flow login` stored. No connection is made before the first question.

    Args:
        url: the coordinator's address, "https://host:port".
        token: an API token.
        ca_pem: the federation's CA, as text; or `ca_file`, where it stands.
        retry_for_s: how long an unreachable or busy coordinator is asked again.
        note: told with a line for people when asking again begins.

    Raises:
        AuthenticationError: no coordinator is known here.
    """
    if ca_file is not None:
        try:
            ca_pem = Path(ca_file).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot read ca_file {ca_file}: {error.strerror}") from None
    return Client(find_access(url, token, ca_pem), retry_for_s=retry_for_s, note=note)


class Transfer:
    """One transfer: watch it, use what has landed, steer it. Forgetting it leaves the transfer running."""

    def __init__(self, client: Client, inner: AsyncTransfer) -> None:
        self._client = client
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def record(self) -> TransferRecord:
        """The transfer as it was last seen."""
        return self._inner.record

    @property
    def state(self) -> TransferState:
        """The state as last seen."""
        return self._inner.state

    @property
    def ended(self) -> bool:
        """Whether it had ended when it was last seen."""
        return self._inner.ended

    def refresh(self, wait_s: float = 0.0) -> TransferRecord:
        """The transfer as it is now; with `wait_s`, as soon as it has ended, at latest after so long."""
        return self._client._run(self._inner.refresh, wait_s)

    def wait(self, timeout_s: float | None = None) -> TransferRecord:
        """The transfer once it is complete; Ctrl-C leaves it running.

        Raises:
            FlowError: it ended otherwise; its reason says how.
            TemporaryError: it still runs after `timeout_s` (reason "timeout").
        """
        return self._client._run(self._inner.wait, timeout_s)

    def updates(self, every_s: float = 1.0) -> Iterator[TransferRecord]:
        """The transfer about every `every_s` seconds, and at once when it ended: that is the last one."""
        return Items(self._client._run, self._inner.updates(every_s))

    def landed(self, after: int = 0) -> Iterator[LandedObject]:
        """Each object as it becomes durable at a target, until the transfer has ended.

        Raises (while iterating, after the last object):
            FlowError: the transfer did not complete; what was named has landed nevertheless.
        """
        return Items(self._client._run, self._inner.landed(after))

    def why(self) -> Why:
        """One line on what it waits for, or what makes it no faster."""
        return self._client._run(self._inner.why)

    def receipts(self) -> list[DeliveryReceipt]:
        """What the targets signed for so far: one receipt for each at which everything landed."""
        return self._client._run(self._inner.receipts)

    def cancel(self) -> TransferRecord:
        """End it. What has landed stays."""
        return self._client._run(self._inner.cancel)

    def pause(self) -> TransferRecord:
        """Stop moving until `resume`; nothing that was done is lost."""
        return self._client._run(self._inner.pause)

    def resume(self) -> TransferRecord:
        """Go on after `pause`."""
        return self._client._run(self._inner.resume)

    def retry(self) -> TransferRecord:
        """Try again what ended incomplete: only what is missing moves."""
        return self._client._run(self._inner.retry)


class Client:
    """A coordinator, seen by one user. Made by `connect`; what its methods mean stands at `AsyncClient`.

    May be used by several threads. Also works where an event loop already runs, as in a notebook, and then blocks it.
    """

    def __init__(
        self, access: Access, *, retry_for_s: float = 30.0, note: Callable[[str], object] | None = None
    ) -> None:
        self.url = access.url
        self._access, self._retry_for_s, self._note = access, retry_for_s, note
        self._lock = threading.Lock()
        self._loop: LoopThread | None = None
        self._async: AsyncClient | None = None
        self._entered: list[AsyncClient] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<client of {self.url}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncClient:
        client = self._make()
        self._entered.append(client)
        return client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._entered.pop().aclose()

    def _make(self) -> AsyncClient:
        return AsyncClient(self._access, retry_for_s=self._retry_for_s, note=self._note)

    def close(self) -> None:
        """Close all connections. Transfers go on."""
        with self._lock:
            loop, client, self._closed = self._loop, self._async, True
            self._loop = self._async = None
        if loop is not None and client is not None:
            loop.call(client.aclose)
            loop.close()

    def _inner(self) -> tuple[LoopThread, AsyncClient]:
        with self._lock:
            if self._closed:
                raise UsageError("this client was closed", hint="make a new one with flowengine.connect()")
            if self._loop is None or self._async is None:
                self._loop, self._async = LoopThread(), self._make()
            return self._loop, self._async

    @property
    def _api(self) -> AsyncClient:
        return self._inner()[1]

    def _run(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._inner()[0].call(function, *args, **kwargs)

    # --- transfers ---

    def copy(
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
    ) -> Transfer:
        """Start to copy a path of one site to others, straight from site to site."""
        inner = self._run(
            self._api.copy, source, targets, labels=labels, contracts=contracts, purpose=purpose, priority=priority,
            deadline=deadline, best_effort=best_effort,
            cost_limit_usd=cost_limit_usd, size_bytes=size_bytes, plan=plan, comment=comment, options=options,
        )  # fmt: skip
        return Transfer(self, inner)

    def sync(
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
    ) -> Transfer:
        """Start to make targets hold what the source holds; with `delete` nothing else."""
        inner = self._run(
            self._api.sync, source, targets, delete=delete, labels=labels, contracts=contracts, purpose=purpose, priority=priority,
            deadline=deadline, best_effort=best_effort,
            cost_limit_usd=cost_limit_usd, size_bytes=size_bytes, plan=plan, comment=comment, options=options,
        )  # fmt: skip
        return Transfer(self, inner)

    def verify(
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
    ) -> Transfer:
        """Start to compare targets with the source, reading every byte on both sides; nothing changes."""
        inner = self._run(
            self._api.verify, source, targets, labels=labels, contracts=contracts, purpose=purpose, priority=priority,
            comment=comment, options=options,
        )  # fmt: skip
        return Transfer(self, inner)

    def submit(self, request: TransferRequest, *, key: str = "") -> Transfer:
        """Start a transfer from a request. The same `key` again, within a day, gives the same transfer."""
        return Transfer(self, self._run(self._api.submit, request, key=key))

    def plan(
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
        """What such a transfer would be: verdict of policy, ways, time, money, and what binds. Nothing moves."""
        return self._run(
            self._api.plan, source, targets, mode=mode, labels=labels, contracts=contracts, purpose=purpose, priority=priority,
            deadline=deadline, best_effort=best_effort, cost_limit_usd=cost_limit_usd, options=options,
            size_bytes=size_bytes, objects=objects,
        )  # fmt: skip

    def planned(self, plan_id: str) -> Plan:
        """A plan that was made before, by its id."""
        return self._run(self._api.planned, plan_id)

    def transfer(self, transfer_id: str) -> Transfer:
        """A transfer by its id."""
        return Transfer(self, self._run(self._api.transfer, transfer_id))

    def transfers(
        self,
        *,
        state: TransferState | None = None,
        site: str | None = None,
        user: str | None = None,
        tenant: str | None = None,
    ) -> Iterator[TransferRecord]:
        """Transfers that this user may see, the newest first."""
        return Items(self._run, self._api.transfers(state=state, site=site, user=user, tenant=tenant))

    def events(
        self, *, after: int | None = None, transfer: str = "", site: str = "", types: Iterable[str] = ()
    ) -> Events:
        """What happens, as it happens; a context manager that ends the stream."""
        return Events(self._run, self._api.events(after=after, transfer=transfer, site=site, types=types))

    # --- sites, links, limits ---

    def ls(self, place: Place) -> Listing:
        """A folder at a site as its agent sees it now."""
        return self._run(self._api.ls, place)

    def sites(self) -> list[Site]:
        """All sites."""
        return self._run(self._api.sites)

    def site(self, name: str) -> Site:
        """One site."""
        return self._run(self._api.site, name)

    def add_site(self, request: SiteRequest) -> Site:
        """Enter a new site; its agent joins with a `join_token`."""
        return self._run(self._api.add_site, request)

    def change_site(self, name: str, request: SiteRequest) -> Site:
        """Change what is given in `request`: facts, bounds, whether it drains."""
        return self._run(self._api.change_site, name, request)

    def remove_site(self, name: str) -> None:
        """Revoke the site's certificate and forget its rights. Its data stays where it is."""
        self._run(self._api.remove_site, name)

    def join_token(self, site: str, valid_s: int = 900) -> JoinToken:
        """A one-time token with which the agent of `site` enrols."""
        return self._run(self._api.join_token, site, valid_s)

    def links(self) -> list[Link]:
        """All links between sites."""
        return self._run(self._api.links)

    def set_link(self, source: str, target: str, request: LinkRequest) -> Link:
        """Declare what a link can do and costs."""
        return self._run(self._api.set_link, source, target, request)

    def remove_link(self, source: str, target: str) -> None:
        """Forget what was declared and measured of a link."""
        self._run(self._api.remove_link, source, target)

    def link(self, source: str, target: str) -> Link:
        """What is known of one link."""
        return self._run(self._api.link, source, target)

    def link_looks(self, source: str, target: str, limit: int = 100) -> list[LinkLook]:
        """What was measured of a link of late, the newest first."""
        return self._run(self._api.link_looks, source, target, limit)

    def probe_link(self, source: str, target: str, request: ProbeRequest | None = None) -> Link:
        """Measure a link now, by a burst that the target's agent throws away."""
        return self._run(self._api.probe_link, source, target, request)

    def maintenance(self) -> list[Maintenance]:
        """When sites and links are not to be used."""
        return self._run(self._api.maintenance)

    def add_maintenance(self, request: MaintenanceRequest) -> Maintenance:
        """Keep transfers off a site or link for a time."""
        return self._run(self._api.add_maintenance, request)

    def remove_maintenance(self, maintenance_id: str) -> None:
        """Let a site or link be used again."""
        self._run(self._api.remove_maintenance, maintenance_id)

    def limits(self) -> list[Limit]:
        """All bandwidth limits."""
        return self._run(self._api.limits)

    def set_limit(
        self, scope: str, rate_bits_per_s: int | None, windows: Iterable[LimitWindow] = ()
    ) -> Limit:
        """Limit a scope ("link:a>b", "site:a", "tenant:t", "transfer:ID"), also for what runs now."""
        return self._run(self._api.set_limit, scope, rate_bits_per_s, windows)

    def remove_limit(self, scope: str) -> None:
        """Take a limit away."""
        self._run(self._api.remove_limit, scope)

    # --- policy ---

    def bundles(self) -> list[PolicyBundle]:
        """Policy bundles that are or were in force, the newest first."""
        return self._run(self._api.bundles)

    def activate_bundle(self, content: bytes) -> PolicyBundle:
        """Put a signed bundle in force, at the coordinator and at all agents."""
        return self._run(self._api.activate_bundle, content)

    def bundle(self, version: int) -> PolicyBundleContent:
        """A bundle's file."""
        return self._run(self._api.bundle, version)

    def labels(self, site: str | None = None) -> list[LabelInfo]:
        """Label statements of data owners, in the order in which they came."""
        return self._run(self._api.labels, site)

    def set_label(self, document: bytes) -> LabelInfo:
        """Hand a data owner's signed statement to all agents."""
        return self._run(self._api.set_label, document)

    def agreements(self) -> list[AgreementInfo]:
        """What authorities say was agreed, in the order in which it came."""
        return self._run(self._api.agreements)

    def set_agreement(self, document: bytes) -> AgreementInfo:
        """Hand an authority's signed agreement to all agents."""
        return self._run(self._api.set_agreement, document)

    def approvals(self) -> list[ApprovalRequest]:
        """What people have to approve, and who has; the newest first."""
        return self._run(self._api.approvals)

    def approve(self, handle: str, document: bytes) -> ApprovalRequest:
        """Give a signed approval (`flowengine.trust.approval`)."""
        return self._run(self._api.approve, handle, document)

    def withdraw_approval(self, handle: str, who: str) -> ApprovalRequest:
        """Take an approval back: what runs on it is stopped."""
        return self._run(self._api.withdraw_approval, handle, who)

    # --- people ---

    def me(self) -> User:
        """Who asks."""
        return self._run(self._api.me)

    def health(self) -> Health:
        """The coordinator's state and version."""
        return self._run(self._api.health)

    def checkpoints(self, site: str = "") -> list[EvidenceCheckpoint]:
        """Signed heads of the sites' chains of evidence that the coordinator holds, newest first."""
        return self._run(self._api.checkpoints, site)

    def evidence(self) -> list[EvidenceRecord]:
        """The coordinator's own chain of evidence."""
        return self._run(self._api.evidence)

    def evidence_bundle(self, digest: str) -> EvidenceBundle:
        """The policies that decisions in the coordinator's chain name."""
        return self._run(self._api.evidence_bundle, digest)

    def users(self) -> list[User]:
        """All users."""
        return self._run(self._api.users)

    def add_user(self, request: UserRequest) -> User:
        """Enter a user."""
        return self._run(self._api.add_user, request)

    def change_user(self, name: str, request: UserRequest) -> User:
        """Change role, tenant, or whether the user may come in."""
        return self._run(self._api.change_user, name, request)

    def tokens(self) -> list[Token]:
        """API tokens, without their secrets."""
        return self._run(self._api.tokens)

    def add_token(self, request: TokenRequest) -> Token:
        """Make an API token; its secret is in the answer and nowhere else."""
        return self._run(self._api.add_token, request)

    def remove_token(self, token_id: str) -> None:
        """Make a token worthless."""
        self._run(self._api.remove_token, token_id)

    def tenants(self) -> list[Tenant]:
        """All tenants and what they use now."""
        return self._run(self._api.tenants)

    def add_tenant(self, request: TenantRequest) -> Tenant:
        """Enter a tenant."""
        return self._run(self._api.add_tenant, request)

    def change_tenant(self, name: str, request: TenantRequest) -> Tenant:
        """Change a tenant's weight and bounds."""
        return self._run(self._api.change_tenant, name, request)
