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

from flowengine.plan import Demand, Overlay, Plan, describe
from flowengine.plan.demands import Priority
from flowengine.plan.explain import describe_obstacle
from flowengine.plan.model import DemandPlan, Eta

__all__ = ["LEASE_TERM_S", "HeldLease", "PlannedRoute", "TaskPlan", "leases_of", "plans_of"]

LEASE_TERM_S: Final = 300.0
LEAST_LEASE_BITS_PER_S: Final = 100_000
ROOM: Final = 1.25
LEAST_SHARE: Final = 0.01
"""A route that carries less of a task's rate is not worth its connections."""
SAME: Final = 0.05
"""A rate that differs by less from what was told stays as it was told."""
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


def routes_of(plan: Plan, entry: DemandPlan, last: Sequence[PlannedRoute] = ()) -> list[PlannedRoute]:
    """A demand's routes with its part of the group's rate; rates that hardly changed stay as they were."""
    allocations = [a for a in plan.allocations if a.group == entry.group]
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
    plan: Plan, number: int, last: Mapping[str, TaskPlan], counted: Mapping[str, bool]
) -> dict[str, TaskPlan]:
    """What the plan means for each task.

    Args:
        last: what was told of it before.
        counted: whether what is left of it is known.
    """
    found: dict[str, TaskPlan] = {}
    for entry in plan.demands:
        before = last.get(entry.id)
        routes = routes_of(plan, entry, before.routes if before is not None else ())
        eta = entry.eta if counted.get(entry.id) else Eta(earliest_s=None, expected_s=None, latest_s=None)
        lines = describe(plan, entry.id, clock)
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
        )
    return found


def _rank(demand: Demand) -> int:
    return 3 if demand.promised else _CLASS_RANK[demand.priority]


def leases_of(
    overlay: Overlay, demands: Sequence[Demand], plans: Mapping[str, TaskPlan], now: float, number: int
) -> list[HeldLease]:
    """The leases that hold the plan; see the module's text for who has one."""
    links = {(link.source, link.target): link for link in overlay.links}
    by_id = {demand.id: demand for demand in demands}
    # Everybody who uses a link, a site's way out or a tenant's share: who is alone there needs no lease for it.
    users: dict[tuple[str, ...], dict[str, float]] = {}
    for task, plan in plans.items():
        if task not in by_id:
            continue
        for route in plan.routes:
            for hop in zip(route.sites, route.sites[1:], strict=False):
                for key in (("link", *hop), ("out", hop[0]), ("in", hop[1])):
                    there = users.setdefault(key, {})
                    there[task] = there.get(task, 0.0) + route.rate_bits_per_s
            if by_id[task].tenant:
                there = users.setdefault(("tenant", by_id[task].tenant), {})
                there[task] = there.get(task, 0.0) + route.rate_bits_per_s
    site_caps = {site.name: bool(site.caps_out or site.caps_in) for site in overlay.sites}
    tenant_caps = {tenant.name: bool(tenant.caps) for tenant in overlay.tenants}
    sums: dict[tuple[str, str, str], tuple[float, bool]] = {}
    for task, plan in plans.items():
        demand = by_id.get(task)
        if demand is None:
            continue
        capped_tenant = tenant_caps.get(demand.tenant, False) and len(users[("tenant", demand.tenant)]) > 1
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
                if not link.estimate.measured and not link.caps and not near and not capped_tenant:
                    others = [one for one in others if _rank(one) > _rank(demand)]
                if not others and not near and not capped_tenant:
                    continue
                top = all(_rank(one) <= _rank(demand) for one in others)
                estimated = not link.caps and not near and not capped_tenant
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
