"""What the planner looks at: everything that bears on routes and rates, read in one transaction.

`Picture` is plain values; `problem.py` makes of it what `flowengine.plan` takes. Nothing here decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import msgspec
from sqlalchemy import Connection, select

from flowengine.api.agents import HopTraffic, RelayState
from flowengine.api.links import Limit
from flowengine.api.plans import Plan as StoredPlan
from flowengine.api.transfers import Counters, TransferRequest
from flowengine.coordinator.database.catalogue import decode_addresses, list_limits
from flowengine.coordinator.database.tables import (
    AnyRow,
    link_states,
    links,
    maintenance,
    plans,
    sites,
    tasks,
    tenants,
    transfers,
)
from flowengine.coordinator.database.transfers import decode_request
from flowengine.coordinator.decisions import Decider
from flowengine.plan.links import LinkState

__all__ = [
    "Picture",
    "SiteFacts",
    "TaskFacts",
    "read_picture",
    "read_world",
]  # fmt: skip

UNKNOWN_BYTES: Final = 4 << 30
"""What is assumed to be left of a task that nobody has counted yet."""
LEAST_BYTES: Final = 1 << 16
STALE_S: Final = 8.0
"""What was reported longer ago says nothing of now."""
SILENT_S: Final = 15.0
"""A site that was not heard for so long has left out a heartbeat, and may be marked offline soon."""

_flows = msgspec.json.Decoder(list[HopTraffic])
_counters = msgspec.json.Decoder(Counters)
_plan = msgspec.json.Decoder(StoredPlan)
_relay = msgspec.json.Decoder(RelayState)


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """A site as far as routes go: whether it takes part, can be dialled, and passes on for others."""

    name: str
    online: bool
    reachable: bool
    relays: bool
    relayed: tuple[HopTraffic, ...] = ()
    relays_bits_per_s: int | None = None
    """Most that it passes on for others, as its operator says."""
    outbound: bool = False
    """It was seen and cannot be dialled; one that was never seen may be."""
    heard: float | None = None
    """When its agent was heard last; None: never, or by nobody who noted it."""
    away: bool = False
    """It is marked offline, or has not joined yet."""

    @property
    def drains(self) -> bool:
        """Whether it is heard and begins nothing new."""
        return not self.online and not self.away

    def silent(self, now: float) -> bool:
        """Whether it surely moves nothing, for all that was heard."""
        return self.away or (self.heard is not None and now - self.heard > SILENT_S)


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """A task that waits or runs."""

    id: str
    transfer: str
    tenant: str
    priority: int
    source: str
    target: str
    state: str
    paused: bool
    fence: int
    counters: Counters
    rate_bits_per_s: float
    flows: tuple[HopTraffic, ...]
    link_bound: bool
    reported: float
    claimed: float
    deadline: float | None
    promised: bool
    size_bytes: int | None
    cost_limit_usd: float | None
    plan: str
    user: str = ""
    request: str = ""
    attempts: int = 0
    source_path: str = "/"
    target_path: str = "/"
    fed_by: str = ""

    @property
    def left_bytes(self) -> int:
        """What is still to be moved, as far as anybody can tell."""
        done, seen = self.counters.bytes_done, self.counters.size_bytes
        if self.counters.scan_done:
            whole = seen
        elif self.size_bytes is not None:
            whole = max(self.size_bytes, seen)
        else:
            whole = seen + UNKNOWN_BYTES
        return max(LEAST_BYTES, whole - done)

    @property
    def counted(self) -> bool:
        """Whether what is left is known rather than assumed."""
        return self.counters.scan_done or self.size_bytes is not None

    def moved(self, now: float) -> list[tuple[str, str, float]]:
        """(source, target, rate) of each link that it uses, as reported of late."""
        if self.state != "running" or now - self.reported > STALE_S:
            return []
        if self.flows:
            return [(hop.sender, hop.receiver, hop.rate_bits_per_s) for hop in self.flows]
        return [(self.source, self.target, self.rate_bits_per_s)]


@dataclass(slots=True)
class Picture:
    """Everything at one moment."""

    now: float
    sites: Mapping[str, SiteFacts]
    declared: Mapping[tuple[str, str], AnyRow]
    known: dict[tuple[str, str], LinkState]
    measured: Mapping[tuple[str, str], AnyRow]
    limits: list[Limit]
    weights: Mapping[str, float]
    maintenance: list[AnyRow]
    rows: Mapping[str, AnyRow] = field(default_factory=dict)
    """The sites' rows, for whoever signs and decides."""
    tasks: list[TaskFacts] = field(default_factory=list)
    chosen: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Links of the stored plans that transfers must follow, by the plan's id."""
    permitted: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Sites that policy lets pass on the data of a transfer."""
    shut: frozenset[tuple[str, str]] = frozenset()
    """Links that are taken for dead, for now."""


def _site(row: AnyRow) -> SiteFacts:
    relay = _relay.decode(row.relay) if row.relay else None
    reachable = bool(decode_addresses(row.addresses))
    return SiteFacts(
        row.name,
        row.state == "online",
        reachable,
        relay is not None and relay.max_streams > 0 and reachable and row.state == "online",
        tuple(hop for task in relay.tasks for hop in task.hops) if relay is not None else (),
        relays_bits_per_s=relay.max_bits_per_s if relay is not None else None,
        outbound=row.last_seen is not None and not reachable,
        heard=row.last_seen,
        away=row.state not in ("online", "draining"),
    )


def read_world(connection: Connection, now: float) -> Picture:
    """Sites, links, limits and all else but tasks."""
    found = connection.execute(select(sites).where(sites.c.state != "revoked")).all()
    states = {(row.source, row.target): row for row in connection.execute(select(link_states))}
    return Picture(
        now=now,
        sites={row.name: _site(row) for row in found},
        rows={row.name: row for row in found},
        declared={(row.source, row.target): row for row in connection.execute(select(links))},
        known={key: link_state(row) for key, row in states.items() if row.rate_bits_per_s},
        measured=states,
        limits=list_limits(connection, now),
        weights={
            row.name: row.weight for row in connection.execute(select(tenants.c.name, tenants.c.weight))
        },
        maintenance=list(connection.execute(select(maintenance).where(maintenance.c.ends > now))),
    )


def link_state(row: AnyRow) -> LinkState:
    """What a row of link_states remembers."""
    return LinkState(rate_bits_per_s=row.rate_bits_per_s, variance=row.variance, measured_s=row.measured)


def read_picture(connection: Connection, now: float, decider: Decider) -> Picture:
    """Everything, with all tasks that wait or run, and what policy leaves to them."""
    picture = read_world(connection, now)
    query = (
        select(
            tasks,
            transfers.c.deadline,
            transfers.c.promised,
            transfers.c.size_bytes,
            transfers.c.cost_limit_usd,
            transfers.c.plan,
            transfers.c.user,
            transfers.c.request,
        )
        .join(transfers, transfers.c.id == tasks.c.transfer)
        .where(tasks.c.state.in_(["waiting", "running"]))
        .order_by(tasks.c.seq)
    )
    picture.tasks = [_task(row) for row in connection.execute(query)]
    names = {task.plan for task in picture.tasks if task.plan}
    if names:
        kept = connection.execute(select(plans.c.id, plans.c.body).where(plans.c.id.in_(names)))
        picture.chosen = {row.id: links_of_plan(_plan.decode(row.body)) for row in kept}
    permitted: dict[str, frozenset[str]] = {}
    for task in picture.tasks:
        if task.transfer not in permitted:
            request = decode_request(task.request)
            permitted[task.transfer] = relays_for(connection, picture, decider, request, task.user)
    picture.permitted = permitted
    return picture


def relays_for(
    connection: Connection, picture: Picture, decider: Decider, request: TransferRequest, user: str
) -> frozenset[str]:
    """Sites that relay, and that policy lets pass this data on."""
    relays = [site.name for site in picture.sites.values() if site.relays]
    ends = {request.source.site, *(target.site for target in request.targets)}
    if not relays or not ends <= picture.rows.keys():
        return frozenset()
    return frozenset(decider.may_relay(connection, request, picture.rows, user, picture.now, relays))


def links_of_plan(plan: StoredPlan) -> frozenset[str]:
    """The links that a stored plan uses, as the planner names them."""
    ways = [way.sites for way in plan.ways]
    ways += [[feed.source, feed.target] for feed in plan.feeds]  # where its feeder cannot serve it
    return frozenset(f"{one}→{other}" for way in ways for one, other in pairwise(way))


def _task(row: AnyRow) -> TaskFacts:
    return TaskFacts(
        id=row.id,
        transfer=row.transfer,
        tenant=row.tenant,
        priority=row.priority,
        source=row.source_site,
        target=row.target_site,
        state=row.state,
        paused=row.paused,
        fence=row.fence,
        counters=_counters.decode(row.counters),
        rate_bits_per_s=row.rate_bits_per_s,
        flows=tuple(_flows.decode(row.flows)),
        link_bound=row.link_bound,
        reported=row.reported or 0.0,
        claimed=row.claimed or 0.0,
        deadline=row.deadline,
        promised=row.promised,
        size_bytes=row.size_bytes,
        cost_limit_usd=row.cost_limit_usd,
        plan=row.plan,
        user=row.user,
        request=row.request,
        attempts=row.attempts,
        source_path=row.source_path,
        target_path=row.target_path,
        fed_by=row.fed_by,
    )
