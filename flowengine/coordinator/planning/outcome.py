"""From a plan to what each task and each sender is told: routes, leases, and the reasons in words. Pure.

Goal
    Promises and shares are held where they must be, and no link is kept below what it could carry by an estimate that
    was too low.
Plan
    A rate of the plan becomes a lease where somebody else needs what it would take beyond it. A task that is alone on
    every full limit of its way has no lease there: it takes what the link gives, and so the estimate learns. Where
    several share a link that is only an estimate, those of the highest rank may go a quarter beyond their part, and
    all others get just theirs.
Invariants
    - What a limit of an operator bounds is never leased beyond it.
    - A lease is never below `LEAST_LEASE`: a session that may send nothing at all would look dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from flowengine.api.agents import TaskRoute
from flowengine.plan import Demand, Overlay, Plan, describe
from flowengine.plan.demands import Priority
from flowengine.plan.explain import describe_obstacle
from flowengine.plan.links import MOST_SPREAD
from flowengine.plan.model import Allocation, Basis, DemandPlan, Eta
from flowengine.plan.topology import cap_at

__all__ = [
    "LEASE_TERM_S", "HeldLease", "PlannedRoute", "TaskPlan", "Told", "by_group", "clock", "guessed_links", "known_obstacles",
    "leases_of", "only", "plans_of",
    "routes_of", "ways_of",
]  # fmt: skip

LEASE_TERM_S: Final = 300.0
LEAST_LEASE_BITS_PER_S: Final = 100_000
ROOM: Final = 1.25
LEAST_SHARE: Final = 0.01
"""A route that carries less of a task's rate is not worth its connections."""
NEARLY: Final = 0.999
SAME: Final = 0.05
"""A rate that differs by less from what was told stays as it was told."""
_SHARED: Final = frozenset({"link", "out", "in", "read", "write", "tenant"})
"""Kinds of limits that several demands share."""
_CLASS_RANK: Final = {Priority.URGENT: 2, Priority.NORMAL: 1, Priority.SCAVENGER: 0}


class PlannedRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A way from source to target, and the task's rate on it."""

    sites: list[str]
    rate_bits_per_s: int


class TaskPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan means for one task.

    Attributes:
        number: of the plan.
        routes: the widest first; those that carry next to nothing are left out.
        earliest, expected, latest: when the last byte lands, POSIX seconds; None where nobody can tell.
        promise: none, kept, admitted, late, refused or best-effort.
        lines: everything in words.
        binds: what keeps it from more, in words; empty where nothing does.
        counted: whether what is left is known; else times are guesses.
    """

    number: int
    made: float
    routes: list[PlannedRoute]
    rate_bits_per_s: int
    earliest: float | None
    expected: float | None
    latest: float | None
    promise: str
    lines: list[str]
    binds: str
    counted: bool
    way_bits_per_s: float = 0.0
    """What its ways carry for it, ends aside; 0 where only guessed."""


class Told(msgspec.Struct, kw_only=True):
    """A task's row of task_plans: the plan for it, and the routes that its driver was told under a fence.

    Attributes:
        signed: when the relay grants of the routes were made.
    """

    plan: TaskPlan
    fence: int = 0
    signed: float = 0.0
    routes: list[TaskRoute] = []


class HeldLease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as it is kept."""

    task: str
    transfer: str
    site: str
    next: str
    rate_bits_per_s: int
    until: float
    number: int


def clock(at_s: float) -> str:
    """An instant to the second, as plans tell it."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def guessed_links(overlay: Overlay) -> frozenset[str]:
    """Links of which nobody knows what they carry: the plan's guess of them explains nothing."""
    return frozenset(
        link.label
        for link in overlay.links
        if not link.caps and not link.estimate.measured and link.estimate.spread >= MOST_SPREAD
    )


def known_obstacles(entry: DemandPlan, guessed: frozenset[str]) -> DemandPlan:
    """The entry without the links that are only guessed among what binds it."""
    kept = tuple(
        o for o in entry.obstacles if not (o.kind == "link" and o.name in guessed and o.capacity_bits_per_s)
    )
    return msgspec.structs.replace(entry, obstacles=kept)


def only(plan: Plan, entry: DemandPlan, allocations: Sequence[Allocation]) -> Plan:
    """The part of a plan that concerns one demand."""
    return msgspec.structs.replace(plan, demands=(entry,), allocations=tuple(allocations), basis=Basis())


def by_group(plan: Plan) -> dict[str, list[Allocation]]:
    """Allocations of each group."""
    found: dict[str, list[Allocation]] = {}
    for allocation in plan.allocations:
        found.setdefault(allocation.group, []).append(allocation)
    return found


def routes_of(
    allocations: Sequence[Allocation], entry: DemandPlan, last: Sequence[PlannedRoute] = ()
) -> list[PlannedRoute]:
    """A demand's routes with its part of the group's rate; rates that hardly changed stay as they were."""
    total = sum(a.rate_bits_per_s for a in allocations)
    if not total or not entry.rate_bits_per_s:
        return []
    rates: dict[tuple[str, ...], float] = {}
    for allocation in allocations:
        sites = allocation.routes[0].sites
        part = allocation.rate_bits_per_s * entry.rate_bits_per_s / total
        rates[sites] = rates.get(sites, 0.0) + part
    most = max(rates.values())
    kept = [(sites, rate) for sites, rate in rates.items() if rate >= most * LEAST_SHARE]
    before = {tuple(route.sites): route.rate_bits_per_s for route in last}
    found = []
    for sites, rate in sorted(kept, key=lambda way: (len(way[0]), -way[1])):
        old = before.get(sites, 0)
        same = old and abs(rate - old) <= SAME * old and rate >= old * 0.999
        found.append(PlannedRoute(sites=list(sites), rate_bits_per_s=old if same else round(rate)))
    return found


def plans_of(
    plan: Plan,
    number: int,
    last: Mapping[str, TaskPlan],
    counted: Mapping[str, bool],
    ways: Mapping[str, float],
    guessed: frozenset[str] = frozenset(),
) -> dict[str, TaskPlan]:
    """What the plan means for each task.

    Args:
        last: what was told of it before.
        counted: whether what is left of it is known.
        ways: what the network would give it (`ways_of`).
        guessed: links that explain nothing (`guessed_links`).
    """
    found: dict[str, TaskPlan] = {}
    groups = by_group(plan)
    for whole in plan.demands:
        entry = known_obstacles(whole, guessed)
        before = last.get(entry.id)
        allocations = groups.get(entry.group, [])
        routes = routes_of(allocations, entry, before.routes if before is not None else ())
        eta = entry.eta if counted.get(entry.id) else Eta(earliest_s=None, expected_s=None, latest_s=None)
        lines = describe(only(plan, entry, allocations), entry.id, clock)
        binding = [o for o in entry.obstacles if o.kind not in ("ceiling",)]
        found[entry.id] = TaskPlan(
            number=number,
            made=plan.made_at_s,
            routes=routes,
            rate_bits_per_s=entry.rate_bits_per_s,
            earliest=eta.earliest_s,
            expected=eta.expected_s,
            latest=eta.latest_s,
            promise=entry.promise,
            lines=lines,
            binds="; ".join(describe_obstacle(o, entry, clock) for o in binding),
            counted=counted.get(entry.id, False),
            way_bits_per_s=ways.get(entry.id, 0.0),
        )
    return found


def ways_of(
    overlay: Overlay, demands: Sequence[Demand], plan: Plan, last: Mapping[str, TaskPlan]
) -> dict[str, float]:
    """What the network alone would give each demand, where somebody measured, declared or limited it.

    The planner gives a small demand no more than ends it in a second; so a demand that has all that it can use counts
    with the narrowest point of its straight way, and one that is held back with what it gets.
    """
    links = {(link.source, link.target): link for link in overlay.links}
    sites = {site.name: site for site in overlay.sites}
    tenants = {tenant.name: tenant for tenant in overlay.tenants}
    entries = {entry.id: entry for entry in plan.demands}
    found: dict[str, float] = {}
    for demand in demands:
        entry = entries[demand.id]
        held_back = bool(entry.obstacles) and entry.obstacles[0].kind in _SHARED
        link = links.get((demand.sources[0].site, demand.targets[0].site))
        bounds = [demand.max_rate_bits_per_s or float("inf")]
        if link is not None:
            bounds.append(cap_at(link.caps, plan.made_at_s))
            if link.estimate.measured or link.estimate.spread < MOST_SPREAD:
                bounds.append(link.estimate.rate_bits_per_s)
        source = sites.get(demand.sources[0].site)
        if source is not None:
            bounds.append(cap_at(source.caps_out, plan.made_at_s))
        for place, caps in (
            (demand.sources[0], "caps_read"),
            (demand.targets[0], "caps_write"),
        ):
            bounds += [
                cap_at(getattr(one, caps), plan.made_at_s)
                for one in overlay.endpoints
                if (one.site, one.name) == (place.site, place.endpoint)
            ]
        if demand.tenant in tenants:
            bounds.append(cap_at(tenants[demand.tenant].caps, plan.made_at_s))
        alone = min(bounds)
        rate = float(entry.rate_bits_per_s) if held_back and entry.rate_bits_per_s else alone
        if alone * NEARLY <= rate < alone:
            rate = alone  # the solver's margin, and nobody else
        before = last.get(demand.id)
        if rate == float("inf"):
            rate = before.way_bits_per_s if before is not None else 0.0
        found[demand.id] = rate
    return found


def _rank(demand: Demand) -> int:
    return 3 if demand.promised else _CLASS_RANK[demand.priority]


def _with_ways(plan: TaskPlan, demand: Demand, overlay: Overlay) -> TaskPlan:
    """A plan whose task gets nothing for now, with all that it could still be sending on at a rate of nothing.

    Such a task runs on until it is told: without a lease it would take what was planned for others.
    """
    if plan.routes:
        return plan
    source = demand.sources[0].site
    ways = [
        PlannedRoute(sites=[source, link.target], rate_bits_per_s=0)
        for link in overlay.links
        if link.source == source
    ]
    return msgspec.structs.replace(plan, routes=ways)


def _users_of(plans: Mapping[str, TaskPlan], by_id: Mapping[str, Demand]) -> dict[tuple[str, ...], set[str]]:
    """Tasks that use a link, a site's way out or in, storage with a limit, or a tenant's share.

    Who is alone there needs no lease for it.
    """
    users: dict[tuple[str, ...], set[str]] = {}
    for task, plan in plans.items():
        source, target = by_id[task].sources[0], by_id[task].targets[0]
        for route in plan.routes:
            keys: list[tuple[str, ...]] = [
                ("tenant", by_id[task].tenant),
                ("read", source.site, source.endpoint),
                ("write", target.site, target.endpoint),
            ]
            for hop in zip(route.sites, route.sites[1:], strict=False):
                keys += (("link", *hop), ("out", hop[0]), ("in", hop[1]))
            for key in keys:
                if key[-1]:  # storage without a limit has no endpoint
                    users.setdefault(key, set()).add(task)
    return users


def leases_of(
    overlay: Overlay, demands: Sequence[Demand], plans: Mapping[str, TaskPlan], now: float, number: int
) -> list[HeldLease]:
    """The leases that hold the plan; see the module's text for who has one."""
    links = {(link.source, link.target): link for link in overlay.links}
    by_id = {demand.id: demand for demand in demands}
    plans = {task: _with_ways(plan, by_id[task], overlay) for task, plan in plans.items() if task in by_id}
    users = _users_of(plans, by_id)
    site_caps = {site.name: bool(site.caps_out or site.caps_in) for site in overlay.sites}
    tenant_caps = {tenant.name: bool(tenant.caps) for tenant in overlay.tenants}
    sums: dict[tuple[str, str, str], tuple[float, bool]] = {}
    for task, plan in plans.items():
        demand = by_id[task]
        source, target = demand.sources[0], demand.targets[0]
        capped = tenant_caps.get(demand.tenant, False) and len(users.get(("tenant", demand.tenant), ())) > 1
        # Storage has an endpoint in a demand only where it has a limit.
        for stored in (("read", source.site, source.endpoint), ("write", target.site, target.endpoint)):
            capped = capped or len(users.get(stored, ())) > 1
        for route in plan.routes:
            for hop in zip(route.sites, route.sites[1:], strict=False):
                link = links.get(hop)
                if link is None:
                    continue
                others = [by_id[name] for name in users[("link", *hop)] if name != task]
                near = [
                    by_id[name]
                    for key in (("out", hop[0]), ("in", hop[1]))
                    if site_caps.get(key[1])
                    for name in users[key]
                    if name != task
                ]
                if not link.estimate.measured and not link.caps and not near and not capped:
                    others = [one for one in others if _rank(one) > _rank(demand)]
                if not others and not near and not capped:
                    continue
                top = all(_rank(one) <= _rank(demand) for one in others)
                estimated = not link.caps and not near and not capped
                key = (task, hop[0], hop[1])
                rate, loose = sums.get(key, (0.0, True))
                sums[key] = rate + route.rate_bits_per_s, loose and top and estimated
    return [
        HeldLease(
            task=task,
            transfer=task.rpartition(".")[0],
            site=site,
            next=following,
            rate_bits_per_s=max(LEAST_LEASE_BITS_PER_S, round(rate * (ROOM if loose else 1.0))),
            until=now + LEASE_TERM_S,
            number=number,
        )
        for (task, site, following), (rate, loose) in sorted(sums.items())
    ]
