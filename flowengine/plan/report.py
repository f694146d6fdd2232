"""From rates on columns to a Plan: allocations, expectations, reasons, and the basis for the next one.

Goal: nothing in a plan needs the solver's arrays to be understood.

Plan: per group, the rate and the resource that is full on its main route; per demand, its part of the group's
rate (nearly complete datasets first, with a floor; equal finishing where a deadline binds all). The expected
end follows the group's rate through the coming changes of limits; its spread is that of the links used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flowengine.plan.admission import Promises
from flowengine.plan.model import Allocation, DemandPlan, Eta, Obstacle, Plan, Route
from flowengine.plan.network import FloatArray, IntArray, sum_by
from flowengine.plan.routes import Branch, Columns
from flowengine.plan.share import Shares
from flowengine.plan.warm import remember
from flowengine.plan.work import Work

__all__ = ["Outcome", "report"]

FULL = 1e-4
FULL_SLACK_GBIT = 5e-6
FULL_SHARE = 0.01
OUTLOOK_S = 7 * 86400.0
OUTLOOK_SLOTS = 24
SPREADS = 2.0
MOST_USERS = 5
MEMBER_FLOOR = 0.1
NEVER = Eta(earliest_s=None, expected_s=None, latest_s=None)


@dataclass(slots=True)
class Outcome:
    """What the stages reached; `bits` are the final rates of all columns in whole bits a second."""

    work: Work
    promises: Promises
    shares: Shares
    bits: FloatArray


def report(outcome: Outcome) -> Plan:
    """The plan as values."""
    work, bits = outcome.work, outcome.bits
    edges = work.network.edges(work.now_s, work.now_s + OUTLOOK_S)
    waits = (g.head.not_before_s for g in work.groups)
    releases = [t for t in waits if t is not None and t > work.now_s]
    valid_until = min([work.now_s + work.limits.term_s, outcome.promises.until_s, *edges[:1], *releases])
    rate = sum_by(work.columns.group(), bits, len(work.groups))
    allocations = tuple(
        Allocation(
            group=work.groups[group].id,
            routes=tuple(_route(work, branch) for branch in work.columns.branches[column]),
            rate_bits_per_s=int(bits[column]),
            valid_from_s=work.now_s,
            valid_until_s=valid_until,
        )
        for column, group in enumerate(work.columns.group().tolist())
        if bits[column] > 0
    )
    etas = _expectations(outcome, rate, edges[:OUTLOOK_SLOTS])
    obstacles = _obstacles(outcome, rate, edges)
    spent = outcome.work.effort.spent
    return Plan(
        made_at_s=work.now_s,
        valid_until_s=valid_until,
        method=outcome.shares.method,
        effort_spent=spent,
        coarseness=work.coarseness,
        moved_share=_moved(work, bits),
        allocations=allocations,
        demands=_demand_plans(outcome, rate, etas, obstacles),
        basis=remember(work, outcome.shares.program, bits, outcome.shares.ladders),
    )


def _route(work: Work, branch: Branch) -> Route:
    network = work.network
    names = [link.label for link in (network.overlay.links[i] for i in branch[2])]
    sites = [network.overlay.links[branch[2][0]].source] + [
        network.overlay.links[i].target for i in branch[2]
    ]
    return Route(source=branch[0], target=branch[1], sites=tuple(sites), links=tuple(names))


def _moved(work: Work, bits: FloatArray) -> float:
    """Part of what both plans move that has changed its route."""
    if not len(work.known):
        return 0.0
    old = np.append(work.known * 1e9, np.zeros(len(bits) - len(work.known)))
    group, count = work.columns.group(), len(work.groups)
    before = sum_by(group, old, count)
    after = sum_by(group, bits, count)
    same = sum_by(group, np.minimum(old, bits), count)
    both = np.minimum(before, after)
    return round(float((both - same).sum() / both.sum()), 6) if both.sum() > 0 else 0.0


def _expectations(outcome: Outcome, rate: FloatArray, edges: list[float]) -> list[Eta]:
    work, bits = outcome.work, outcome.bits
    network, columns = work.network, work.columns
    gigabits = np.array([g.gigabits for g in work.groups])
    at, resources, counts = columns.incidence()
    usage = columns.usage(bits * 1e-9)
    bounds = np.array([work.now_s, *edges])
    speed = np.zeros((len(bounds), len(work.groups)))
    for slot, start in enumerate(bounds.tolist()):
        capacity = work.capacity if slot == 0 else network.capacity_at(start)
        # A route goes on at its rate, less when something on it shrinks below what is used now.
        with np.errstate(divide="ignore", invalid="ignore"):
            fits = np.where(usage > 0, np.minimum(capacity / usage, 1.0), 1.0)
        scale = np.ones(len(columns))
        np.minimum.at(scale, at, fits[resources])
        speed[slot] = sum_by(columns.group(), bits * 1e-9 * scale, len(gigabits))
    done = _through(bounds, speed, gigabits)
    alone = columns.bottleneck(work.capacity)
    best = np.zeros(len(gigabits))
    np.maximum.at(best, columns.group(), alone)
    with np.errstate(divide="ignore", invalid="ignore"):
        solo = work.now_s + gigabits / np.minimum(best, work.ceiling)
    queued = _queued(outcome, gigabits, counts)
    spread = _spreads(work, bits, rate)
    etas = []
    for group in range(len(gigabits)):
        if math.isfinite(done[group]):
            length = done[group] - work.now_s
            near = SPREADS * spread[group]
            earliest, expected = work.now_s + length / (1 + near), float(done[group])
            etas.append(
                Eta(
                    earliest_s=round(float(earliest), 3),
                    expected_s=round(expected, 3),
                    latest_s=round(float(work.now_s + length / (1 - near)), 3) if near < 0.9 else None,
                )
            )
        elif math.isfinite(queued[group]):
            etas.append(
                Eta(
                    earliest_s=round(float(solo[group]), 3),
                    expected_s=round(float(queued[group]), 3),
                    latest_s=None,
                )
            )
        else:
            etas.append(NEVER)
    return etas


def _through(bounds: FloatArray, speed: FloatArray, gigabits: FloatArray) -> FloatArray:
    """When each group has moved all, going through the slots at its speed in each; infinity when never."""
    left, done = gigabits.copy(), np.full(len(gigabits), math.inf)
    for slot in range(len(bounds)):
        length = bounds[slot + 1] - bounds[slot] if slot + 1 < len(bounds) else math.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            takes = np.where(speed[slot] > 0, left / speed[slot], math.inf)
        ends = np.isinf(done) & (takes <= length) & np.isfinite(takes)
        done[ends] = bounds[slot] + takes[ends]
        if math.isfinite(length):
            left = np.maximum(left - speed[slot] * length, 0.0)
    return done


def _queued(outcome: Outcome, gigabits: FloatArray, counts: FloatArray) -> FloatArray:
    """For groups without a rate: when their first route's fullest resource has served all that is before them."""
    work = outcome.work
    columns = work.columns
    at, resources, _ = columns.incidence()
    group = columns.group()
    rate = sum_by(group, outcome.bits, len(gigabits))
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(rate[group] > 0, outcome.bits / rate[group], 0.0)
    waiting = columns.usage(part * gigabits[group])
    with np.errstate(divide="ignore", invalid="ignore"):
        takes = (waiting[resources] + gigabits[group[at]] * counts) / work.capacity[resources]
    slowest = np.zeros(len(columns))
    np.maximum.at(slowest, at, np.where(np.isnan(takes), math.inf, takes))
    best = np.full(len(gigabits), math.inf)
    np.minimum.at(best, group, slowest)
    return np.where(work.ceiling > 0, work.now_s + best, math.inf)


def _spreads(work: Work, bits: FloatArray, rate: FloatArray) -> FloatArray:
    """Relative spread of each group's rate: of its routes' most uncertain links, weighted by rate."""
    columns, links = work.columns, len(work.network.links)
    at, resources, _ = columns.incidence()
    link = resources < links
    worst = np.zeros(len(columns))
    np.maximum.at(worst, at[link], work.network.spread[resources[link]])
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sum_by(columns.group(), worst * bits, len(rate)) / rate
    return np.nan_to_num(mean)


def _obstacles(outcome: Outcome, rate: FloatArray, edges: list[float]) -> list[tuple[Obstacle, ...]]:
    work, bits = outcome.work, outcome.bits
    columns = work.columns
    at, resources, _ = columns.incidence()
    usage = columns.usage(bits * 1e-9)
    # The stages leave an absolute slack below each limit, which is much of a small one.
    slack = np.minimum(FULL_SLACK_GBIT, FULL_SHARE * work.capacity)
    full = np.isfinite(work.capacity) & (usage >= work.capacity * (1 - FULL) - slack)
    users = _users(columns, [g.id for g in work.groups], bits, np.flatnonzero(full))
    main = _main_columns(columns, bits, len(work.groups))
    notes = {
        (u, r): gain for u, found in outcome.shares.notes.items() for r, gain in found if math.isfinite(gain)
    }
    starts = np.searchsorted(at, np.arange(len(columns) + 1))
    closed = _closed(work, np.flatnonzero(main[: work.real] < 0), edges)
    found: list[tuple[Obstacle, ...]] = []
    for group, g in enumerate(work.groups[: work.real]):
        if group in outcome.promises.obstacles:
            found.append(tuple(outcome.promises.obstacles[group]))
        elif g.head.not_before_s is not None and g.head.not_before_s > work.now_s:
            found.append((Obstacle(kind="not-yet", name="not before", until_s=g.head.not_before_s),))
        elif main[group] < 0:
            found.append(closed[group])
        elif rate[group] * 1e-9 >= work.ceiling[group] * (1 - FULL):
            found.append(
                (Obstacle(kind="ceiling", name="what it can use", capacity_bits_per_s=int(rate[group])),)
            )
        else:
            span = slice(starts[main[group]], starts[main[group] + 1])
            tight = [r for r in resources[span].tolist() if full[r]]
            tight.sort(key=lambda r: (-notes.get((int(work.unit[group]), r), 0.0), r))
            found.append(
                tuple(
                    Obstacle(
                        kind=work.network.resources[r].kind, name=work.network.resources[r].name,
                        capacity_bits_per_s=int(work.capacity[r] * 1e9), used_bits_per_s=int(usage[r] * 1e9),
                        by=users[r], gain=_rounded(notes.get((int(work.unit[group]), r))),
                    )
                    for r in tight[:2]
                )
            )  # fmt: skip
    return found


def _rounded(gain: float | None) -> float | None:
    return None if gain is None else round(gain, 6)


def _users(
    columns: Columns, names: list[str], bits: FloatArray, wanted: IntArray
) -> dict[int, tuple[tuple[str, int], ...]]:
    """The largest users of each wanted resource."""
    at, resources, counts = columns.incidence()
    inside = np.isin(resources, wanted) & (bits[at] > 0)
    group = columns.group()[at[inside]]
    flows: dict[int, dict[int, float]] = {int(r): {} for r in wanted}
    for r, i, flow in zip(
        resources[inside].tolist(), group.tolist(), (bits[at] * counts)[inside].tolist(), strict=True
    ):
        flows[r][i] = flows[r].get(i, 0.0) + flow
    return {
        r: tuple(
            (names[i], int(f)) for i, f in sorted(who.items(), key=lambda kv: (-kv[1], kv[0]))[:MOST_USERS]
        )
        for r, who in flows.items()
    }


def _main_columns(columns: Columns, bits: FloatArray, groups: int) -> IntArray:
    """The column of each group with the highest rate, its first one when it has none, -1 without columns."""
    main = np.full(groups, -1, dtype=np.int64)
    if len(columns):
        group = columns.group()
        ranked = np.lexsort((np.arange(len(columns)), -bits, group))
        first = ranked[np.append(True, np.diff(group[ranked]) > 0)]
        main[group[first]] = first
    return main


def _closed(work: Work, lost: IntArray, edges: list[float]) -> dict[int, tuple[Obstacle, ...]]:
    """Why some groups have no route at all: something is closed for now, or there is none."""
    scratch = Columns(work.network, work.groups)
    links = len(work.network.links)
    if links and len(lost):
        worth = np.zeros(len(work.groups))
        worth[lost] = math.inf
        free, open_all = np.zeros(work.network.resource_count), np.zeros(links, dtype=bool)
        work.pricer.offer(scratch, free, work.pricer.barred.astype(float) + 1e-3, worth, barred=open_all)
    until = edges[0] if edges else None
    nowhere = (Obstacle(kind="no-route", name="no allowed route"),)
    found: dict[int, tuple[Obstacle, ...]] = dict.fromkeys(lost.tolist(), nowhere)
    at, resources, _ = scratch.incidence()
    for column, group in enumerate(scratch.group().tolist()):
        used = resources[at == column].tolist()
        shut = [r for r in used if work.capacity[r] <= 0 or (r < links and work.pricer.barred[r])]
        names = [work.network.resources[r] for r in shut[:2]]
        found[group] = tuple(Obstacle(kind=r.kind, name=r.name, until_s=until) for r in names)
    return found


def _demand_plans(
    outcome: Outcome, rate: FloatArray, etas: list[Eta], obstacles: list[tuple[Obstacle, ...]]
) -> tuple[DemandPlan, ...]:
    work, verdicts = outcome.work, outcome.promises.verdict
    plans: list[DemandPlan | None] = [None] * len(work.demands)
    for group, g in enumerate(work.groups[: work.real]):
        verdict = verdicts.get(group, "none")
        rates = _members_rates(work, g.members, int(rate[group]), g.deadline_s is not None)
        for member, own in zip(g.members, rates, strict=True):
            demand = work.demands[member]
            eta = etas[group]
            if len(g.members) > 1 and own > 0 and g.deadline_s is None:
                eta = _scaled(
                    eta, work.now_s, g.gigabits / max(rate[group], 1) / (demand.remaining_bytes * 8e-9 / own)
                )
            plans[member] = DemandPlan(
                id=demand.id, group=g.id, state="refused" if verdict == "refused" else "running" if own else "waiting",
                rate_bits_per_s=own, promise=verdict, eta=NEVER if verdict == "refused" else eta,
                earliest_s=outcome.promises.earliest_s.get(group), deadline_s=demand.deadline_s,
                obstacles=obstacles[group],
            )  # fmt: skip
    for position, demand in enumerate(work.demands):
        if plans[position] is None:
            now = Eta(earliest_s=work.now_s, expected_s=work.now_s, latest_s=work.now_s)
            plans[position] = DemandPlan(
                id=demand.id, group=demand.id, state="done", rate_bits_per_s=0, promise="none", eta=now,
                deadline_s=demand.deadline_s,
            )  # fmt: skip
    return tuple(p for p in plans if p is not None)


def _scaled(eta: Eta, now_s: float, faster: float) -> Eta:
    def at(instant: float | None) -> float | None:
        return None if instant is None else round(float(now_s + (instant - now_s) / faster), 3)

    return Eta(earliest_s=at(eta.earliest_s), expected_s=at(eta.expected_s), latest_s=at(eta.latest_s))


def _members_rates(work: Work, members: list[int], rate: int, together: bool) -> list[int]:
    """The group's rate dealt out: by what remains when all must end together, else the smallest datasets first."""
    if len(members) == 1:
        return [rate]
    remaining = [work.demands[m].remaining_bytes for m in members]
    total = sum(remaining)
    if together:
        return [rate * r // total for r in remaining]
    least = int(rate * MEMBER_FLOOR) // len(members)
    dealt = [least] * len(members)
    left = rate - least * len(members)
    for i in sorted(range(len(members)), key=lambda i: (remaining[i], i)):
        more = min(left, max(int(remaining[i] * 8 / work.limits.quantum_s) - least, 0))
        dealt[i] += more
        left -= more
    return dealt
