"""What the planner looks at: everything that bears on routes and rates, read in one transaction.

`Picture` is plain values; `overlay_of` and `demands_of` turn it into what `flowengine.plan` takes. Nothing here decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy import Connection, select

from flowengine.api.agents import HopTraffic, RelayState
from flowengine.api.links import Limit
from flowengine.api.plans import Plan as StoredPlan
from flowengine.api.transfers import Counters, TransferRequest
from flowengine.coordinator.database.catalogue import decode_addresses, decode_roots, list_limits
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
from flowengine.coordinator.rules.paths import clean, offering_root
from flowengine.plan import (
    Allowed,
    Cap,
    Demand,
    Endpoint,
    Link,
    Maintenance,
    Overlay,
    Place,
    Priority,
    Site,
    Tenant,
    Window,
)
from flowengine.plan.links import PRIOR, LinkState, estimate

__all__ = [
    "Picture",
    "SiteFacts",
    "TaskFacts",
    "allowed_of",
    "demands_of",
    "is_sighted",
    "meets",
    "overlay_of",
    "place_of",
    "read_picture",
    "read_world",
    "sighted_links",
]  # fmt: skip

UNKNOWN_BYTES: Final = 4 << 30
"""What is assumed to be left of a task that nobody has counted yet."""
LEAST_BYTES: Final = 1 << 16
CLASSES: Final = (
    (Priority.SCAVENGER, 1.0),
    (Priority.NORMAL, 1.0),
    (Priority.NORMAL, 4.0),
    (Priority.URGENT, 1.0),
)
"""Class and weight of the priorities low, normal, high and urgent: high has four times the share of normal in its
tenant's part, urgent goes before everybody, low takes what is left."""
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
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


# --- as the planner takes it ----------------------------------------------------------------------------------------


def _caps(limit: Limit | None) -> tuple[Cap, ...]:
    """A limit as caps. Its own rate holds outside of its windows, so it is split at their edges by the planner."""
    if limit is None:
        return ()
    caps = [
        Cap(
            rate_bits_per_s=window.rate_bits_per_s,
            window=Window(
                zone=ZoneInfo(window.zone),
                start_minute=_minute(window.start),
                end_minute=_minute(window.end),
                weekdays=frozenset(DAYS.index(day) for day in window.days),
            ),
        )
        for window in limit.windows
    ]
    if limit.rate_bits_per_s is not None:
        # Outside all windows, or where no window allows more: a window's rate replaces the constant one.
        more = [cap for cap in caps if cap.rate_bits_per_s > limit.rate_bits_per_s]
        if not more:
            caps.append(Cap(rate_bits_per_s=limit.rate_bits_per_s))
        else:
            caps.append(Cap(rate_bits_per_s=limit.rate_bits_per_s, window=_outside(more)))
    return tuple(caps)


class _Outside(Window, frozen=True, kw_only=True):
    """The time outside of some windows."""

    inside: tuple[Window, ...] = ()

    def contains(self, at_s: float) -> bool:
        return not any(window.contains(at_s) for window in self.inside)


def _outside(caps: Iterable[Cap]) -> Window:
    inside = tuple(cap.window for cap in caps if cap.window is not None)
    return _Outside(zone=inside[0].zone, inside=inside)


def _minute(text: str) -> int:
    return int(text[:2]) * 60 + int(text[3:])


def _times(picture: Picture, scope: str) -> tuple[Maintenance, ...]:
    return tuple(
        Maintenance(start_s=row.starts, end_s=row.ends, drain_s=row.drain_s)
        for row in picture.maintenance
        if row.scope == scope
    )


def overlay_of(picture: Picture, pairs: Iterable[tuple[str, str]]) -> Overlay:
    """Sites and links that routes between these pairs may use.

    The straight link of a pair is always there, by a prior where nobody has seen it, unless neither site can be
    dialled. A way over a relay is there when both of its links were measured or declared: what nobody knows anything of
    is no alternative. Only where there is no straight link it is, by a prior as well.
    """
    wanted = list(dict.fromkeys(pairs))
    relays = [site.name for site in picture.sites.values() if site.relays]
    straight = {pair for pair in wanted if not meets(picture, *pair)}
    blind = _blind_hops(picture, wanted)
    candidates = set(straight)
    for source, target in wanted:
        for relay in relays:
            candidates |= {(source, relay), (relay, target)}
        candidates |= {(one, other) for one in relays for other in relays}
    found = [
        _link(picture, key)
        for key in sorted(candidates)
        if key[0] != key[1]
        and (key in straight or (key not in picture.shut and (key in blind or is_sighted(picture, *key))))
    ]
    by_scope = {limit.scope: limit for limit in picture.limits}
    relayed = _relay_caps(picture, wanted)
    names = sorted(
        {name for link in found for name in (link.source, link.target)} | {n for p in wanted for n in p}
    )
    return Overlay(
        sites=tuple(
            Site(
                name=name,
                caps_in=relayed.get((name, "in"), ()),
                caps_out=(*_caps(by_scope.get(f"site:{name}")), *relayed.get((name, "out"), ())),
                maintenance=_times(picture, f"site:{name}"),
            )
            for name in names
        ),
        links=tuple(
            msgspec.structs.replace(
                link,
                caps=_caps(by_scope.get(f"link:{link.source}>{link.target}")),
                maintenance=_times(picture, f"link:{link.source}>{link.target}"),
            )
            for link in found
        ),
        endpoints=_endpoints(picture, names),
        tenants=tuple(
            Tenant(name=name, weight=weight, caps=_caps(by_scope.get(f"tenant:{name}")))
            for name, weight in sorted(picture.weights.items())
        ),
    )


def _relay_caps(picture: Picture, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[Cap, ...]]:
    """What sites let pass for others, by site and side, as caps of all that leaves or enters there.

    Where a relay is a source of none of the pairs, all that leaves it was passed on; where it is a target of none, all
    that enters is. Where it is both, the plan knows no bound, and the relay itself holds it.
    """
    sources, targets = {source for source, _ in pairs}, {target for _, target in pairs}
    found: dict[tuple[str, str], tuple[Cap, ...]] = {}
    for site in picture.sites.values():
        if site.relays and site.relays_bits_per_s is not None:
            caps = (Cap(rate_bits_per_s=site.relays_bits_per_s),)
            if site.name not in sources:
                found[site.name, "out"] = caps
            elif site.name not in targets:
                found[site.name, "in"] = caps
    return found


def _limited_roots(picture: Picture) -> set[tuple[str, str]]:
    """(site, root) of storage that has a limit."""
    scopes = (
        limit.scope.split(":", 2) for limit in picture.limits if limit.scope.startswith(("read:", "write:"))
    )
    return {(site, root) for _, site, root in scopes}


def _endpoints(picture: Picture, names: Sequence[str]) -> tuple[Endpoint, ...]:
    by_scope = {limit.scope: limit for limit in picture.limits}
    return tuple(
        Endpoint(
            name=root,
            site=site,
            caps_read=_caps(by_scope.get(f"read:{site}:{root}")),
            caps_write=_caps(by_scope.get(f"write:{site}:{root}")),
        )
        for site, root in sorted(_limited_roots(picture))
        if site in names
    )


def place_of(picture: Picture, site: str, path: str, *, writing: bool) -> Place:
    """Where bytes are read or written, with the storage where that has a limit."""
    limited = {root for where, root in _limited_roots(picture) if where == site}
    if not limited or site not in picture.rows:
        return Place(site)
    root = offering_root(decode_roots(picture.rows[site].roots), clean(path), writing)
    return Place(site, root.name) if root is not None and root.name in limited else Place(site)


def meets(picture: Picture, source: str, target: str) -> bool:
    """Whether neither of two sites can be dialled, so that only a relay can lead from one to the other."""
    ends = (picture.sites.get(source), picture.sites.get(target))
    return source != target and all(end is not None and end.outbound for end in ends)


def is_sighted(picture: Picture, source: str, target: str) -> bool:
    """Whether somebody measured or declared what the link between two sites carries."""
    return (source, target) in picture.known or _capacity(picture, (source, target)) is not None


def _blind_hops(picture: Picture, pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Links to and from relays that are planned on unseen, since some pair has no other way."""
    relays = [site.name for site in picture.sites.values() if site.relays]
    hops = {
        hop
        for source, target in pairs
        if meets(picture, source, target)
        for relay in relays
        for hop in ((source, relay), (relay, target))
    }
    return {hop for hop in hops if hop not in picture.known and _capacity(picture, hop) is None}


def _capacity(picture: Picture, key: tuple[str, str]) -> float | None:
    row = picture.declared.get(key)
    return None if row is None else row.capacity_bits_per_s


def _link(picture: Picture, key: tuple[str, str]) -> Link:
    declared, measured = picture.declared.get(key), picture.measured.get(key)
    rtt = next(
        (row.rtt_ms for row in (measured, declared) if row is not None and row.rtt_ms is not None), 0.0
    )
    loss = next((row.loss for row in (measured, declared) if row is not None and row.loss is not None), 0.0)
    return Link(
        source=key[0],
        target=key[1],
        estimate=estimate(picture.known.get(key, PRIOR), picture.now, _capacity(picture, key)),
        rtt_ms=rtt,
        loss=loss,
        usd_per_gb=declared.cost_per_gb if declared is not None else 0.0,
    )


def sighted_links(
    picture: Picture, overlay: Overlay, pairs: Iterable[tuple[str, str]]
) -> frozenset[str] | None:
    """The links of `overlay_of` these pairs that are there for everybody; None where all are.

    A guess that some pair has to rely on is no reason for another one to leave its straight way; and what is taken for
    dead is there only where it is a pair's own straight way.
    """
    apart = _blind_hops(picture, pairs) | picture.shut
    if not apart:
        return None
    return frozenset(link.label for link in overlay.links if (link.source, link.target) not in apart)


def allowed_of(
    picture: Picture,
    pair: tuple[str, str],
    relays: frozenset[str],
    plan: str,
    sighted: frozenset[str] | None,
) -> Allowed:
    """What policy leaves between two sites, and the stored plan (or "") that the user chose."""
    links = picture.chosen.get(plan) if plan else None
    if links is None and sighted is not None:
        hops = {pair}
        if meets(picture, *pair):
            hops = {hop for relay in relays for hop in ((pair[0], relay), (relay, pair[1]))} - picture.shut
        links = sighted | {"→".join(hop) for hop in hops}
    return Allowed(relays=relays, links=links)


def _silent_tasks(picture: Picture) -> frozenset[str]:
    """Tasks that nothing is heard of, though others are, or that a draining site does not begin.

    What is kept for them would carry nothing. Where nobody is heard it was the coordinator that was away.
    """
    found = frozenset(
        task.id
        for task in picture.tasks
        if any(
            end is not None and (end.silent(picture.now) or (end.drains and task.state == "waiting"))
            for end in (picture.sites.get(task.source), picture.sites.get(task.target))
        )
        or (task.state == "running" and picture.now - max(task.reported, task.claimed) > STALE_S)
    )
    return found if len(found) < len(picture.tasks) else frozenset()


def demands_of(picture: Picture, sighted: frozenset[str] | None = None) -> tuple[Demand, ...]:
    """Everything that is to be moved, earlier submissions first; who is silent takes what others leave.

    Args:
        sighted: as of `sighted_links`.
    """
    by_scope = {limit.scope: limit for limit in picture.limits}
    found = []
    under_way = {task.id for task in picture.tasks}
    silent = _silent_tasks(picture)
    for task in picture.tasks:
        if task.paused or task.fed_by in under_way:  # it can begin when the other one is done
            continue
        priority, weight = CLASSES[0 if task.id in silent and not task.promised else task.priority]
        limit = by_scope.get(f"transfer:{task.transfer}")
        found.append(
            Demand(
                id=task.id,
                sources=(place_of(picture, task.source, task.source_path, writing=False),),
                targets=(place_of(picture, task.target, task.target_path, writing=True),),
                remaining_bytes=task.left_bytes,
                priority=priority,
                tenant=task.tenant,
                weight=weight,
                deadline_s=task.deadline
                if task.deadline is not None and task.deadline > picture.now
                else None,
                promised=task.promised,
                best_effort=not task.promised,
                cost_limit_usd=task.cost_limit_usd,
                dataset=task.transfer,
                max_rate_bits_per_s=limit.now_bits_per_s if limit is not None else None,
                allowed=allowed_of(
                    picture,
                    (task.source, task.target),
                    picture.permitted.get(task.transfer, frozenset()),
                    task.plan,
                    sighted,
                ),
            )
        )
    return tuple(found)
