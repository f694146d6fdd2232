"""Which deadlines are promised, and what that asks for now.

Goal: least rates for promised groups; a verdict for every new deadline.

Plan: an even pace is tried first, against the least capacity that any limit has until the last deadline: if
all deadlines can be met at an even pace, they can be met, and the cheap test is enough. Otherwise the schedule
over slots decides (see `deadlines`). New deadlines are tried all together, then one by one in the order in
which they were asked. For one that is refused, the earliest possible deadline is found by bisection over
schedules, and the limits whose prices stand against it are named.

Invariants: a promise made earlier is never given up for a new one; without proof nothing is promised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flowengine.plan.deadlines import NO_SHORTFALL, Schedule, Slots, cut_slots
from flowengine.plan.model import Obstacle
from flowengine.plan.network import FloatArray, IntArray
from flowengine.plan.program import FlowProgram
from flowengine.plan.solver import EffortSpent
from flowengine.plan.work import Work

__all__ = ["Promises", "decide"]

BISECTIONS = 12
FARTHEST_S = 92 * 86400.0
ONE_BY_ONE = 64
ONE_BY_ONE_WORK = 10_000
"""New deadlines tried one by one, and that number times deadlines in all, at most."""
LARGE = 400
AIM_EARLY = 0.002
LEAST_NEED = 1e-3


@dataclass(slots=True)
class Promises:
    """Verdicts on deadlines.

    Attributes:
        floor: Least rate now of each group, in Gbit/s.
        verdict: For groups with a deadline: kept, late, admitted, refused or best-effort.
        earliest_s: Earliest possible deadline of refused groups, where computed.
        obstacles: What stands in the way of refused groups.
        unproven: The effort was spent before all verdicts were reached.
        until_s: How long the floors keep all promises.
    """

    floor: FloatArray
    verdict: dict[int, str] = field(default_factory=dict)
    earliest_s: dict[int, float] = field(default_factory=dict)
    obstacles: dict[int, list[Obstacle]] = field(default_factory=dict)
    unproven: bool = False
    until_s: float = math.inf


def decide(work: Work) -> Promises:
    """Verdicts and floors for all groups with a deadline."""
    promises = Promises(np.zeros(len(work.groups)))
    members = np.array([i for i, g in enumerate(work.groups) if g.deadline_s is not None], dtype=np.int64)
    if not len(members):
        return promises
    members = members[~np.isin(members, work.spare)]
    deadline = np.array(
        [max(work.groups[i].deadline_s or 0.0, work.now_s + work.limits.quantum_s) for i in members]
    )
    promised = np.array([work.groups[i].head.promised for i in members], dtype=bool)
    # Aim a little early, so that rounding and the last step of a pace never make a promise late.
    aimed = deadline - np.where(promised, AIM_EARLY * (deadline - work.now_s), 0.0)
    margin = np.where(promised, 1.0, 1.0 + work.limits.deadline_margin)
    # The last bytes of a promise must not drown in the tolerances.
    need = np.array([max(work.groups[i].gigabits, LEAST_NEED) for i in members]) * margin
    try:
        if _at_even_pace(work, promises, members, aimed, need, margin):
            for i, old in zip(members.tolist(), promised.tolist(), strict=True):
                promises.verdict[i] = "kept" if old else "admitted"
            return promises
        _by_schedule(work, promises, members, aimed, need, promised)
        if "late" in promises.verdict.values():
            promises = Promises(np.zeros(len(work.groups)))
            _by_schedule(work, promises, members, deadline, need, promised)
    except EffortSpent:
        promises.unproven = True
        pace = need / margin / np.maximum(deadline - work.now_s, work.limits.quantum_s)
        for i, old, rate in zip(members.tolist(), promised.tolist(), pace.tolist(), strict=True):
            if i not in promises.verdict:
                promises.verdict[i] = "kept" if old else "refused"
                promises.floor[i] = min(rate, work.ceiling[i]) if old else 0.0
                if not old:
                    promises.obstacles[i] = [Obstacle(kind="effort", name="the planner's effort")]
    for i, verdict in promises.verdict.items():
        if verdict == "refused" and work.groups[i].head.best_effort:
            promises.verdict[i] = "best-effort"
    return promises


def _at_even_pace(
    work: Work,
    promises: Promises,
    members: IntArray,
    deadline: FloatArray,
    need: FloatArray,
    margin: FloatArray,
) -> bool:
    """Whether everyone can go at an even pace all the time; sets the floors if so."""
    pace = need / (deadline - work.now_s)
    if (pace > work.ceiling[members]).any() or (work.unit[members] < 0).any():
        return False
    end = float(deadline.max())
    edges = work.network.edges(work.now_s, end)
    least = work.capacity.copy()
    for edge in edges:
        np.minimum(least, work.network.planned_capacity_at(edge), out=least)
    nobody = np.full(len(work.groups), -1, dtype=np.int64)
    program = FlowProgram(work.columns, work.pricer, least, work.ceiling, nobody, np.zeros(0), work.effort)
    program.set_floors(members, pace)
    program.allow_shortfall(members, np.full(len(members), math.inf))
    cost = np.zeros(len(work.groups))
    cost[members] = 1.0
    program.solve(shortfall=cost, method="interior" if len(members) > LARGE else "dual")
    if program.short.sum() > NO_SHORTFALL:
        return False
    promises.floor[members] = pace / margin
    return True


def _by_schedule(
    work: Work,
    promises: Promises,
    members: IntArray,
    deadline: FloatArray,
    need: FloatArray,
    promised: FloatArray,
) -> None:
    candidates = np.flatnonzero(~promised.astype(bool))
    slots = _slots(work, members, deadline.tolist())
    asked = need.copy()
    asked[candidates] = 0.0
    schedule = Schedule(work.columns, work.pricer, slots, members, asked, deadline, work.effort)
    base = schedule.solve().copy()
    for local in np.flatnonzero(promised).tolist():
        promises.verdict[int(members[local])] = "late" if base[local] > NO_SHORTFALL else "kept"
    promises.floor[members] = np.minimum(schedule.rates_now(), work.ceiling[members])
    allowed = float(base.sum()) + NO_SHORTFALL
    refused: list[int] = []
    for local in candidates.tolist():
        schedule.require(local, float(need[local]))
    if len(candidates) and schedule.solve().sum() > allowed:
        if len(candidates) > 1:
            for local in candidates.tolist():
                schedule.require(local, 0.0)
        for position, local in enumerate(candidates.tolist()):
            group = int(members[local])
            if position >= min(ONE_BY_ONE, max(1, ONE_BY_ONE_WORK // len(members))):
                refused.append(local)
                schedule.require(local, 0.0)
                promises.obstacles[group] = [Obstacle(kind="effort", name="too many new deadlines at once")]
                continue
            schedule.require(local, float(need[local]))
            if schedule.solve().sum() > allowed:
                promises.obstacles[group] = _obstacles(work, schedule, local)
                schedule.require(local, 0.0)
                refused.append(local)
        schedule.solve()
    for local in candidates.tolist():
        promises.verdict[int(members[local])] = "refused" if local in refused else "admitted"
    promises.floor[members] = np.minimum(schedule.rates_now(), work.ceiling[members])
    promises.until_s = float(slots.bounds[1])
    held = np.array([local for local in range(len(members)) if local not in refused], dtype=np.int64)
    for local in refused[: work.limits.earliest_for]:
        found = _earliest(work, members, deadline, need, held, local, allowed)
        if found is not None:
            promises.earliest_s[int(members[local])] = found


def _slots(work: Work, members: IntArray, instants: list[float]) -> Slots:
    releases = [work.groups[i].head.not_before_s for i in members]
    instants = instants + [t for t in releases if t is not None]
    columns = max(len(work.columns), len(members))
    most = min(work.limits.max_slots, max(2, work.limits.max_schedule // columns))
    return cut_slots(work.network, work.now_s, instants, most)


def _earliest(
    work: Work,
    members: IntArray,
    deadline: FloatArray,
    need: FloatArray,
    held: IntArray,
    local: int,
    allowed: float,
) -> float | None:
    """The earliest deadline of one refused member beside all that are held; None when there is none in three months."""
    chosen = np.append(held, local)

    def possible(at_s: float) -> bool:
        due = np.append(deadline[held], at_s)
        slots = _slots(work, members[chosen], due.tolist())
        schedule = Schedule(work.columns, work.pricer, slots, members[chosen], need[chosen], due, work.effort)
        return bool(schedule.solve().sum() <= allowed)

    low = float(deadline[local]) - work.now_s
    high = 2 * low
    if (
        not (work.columns.group() == members[local]).any()
        and not work.network.edges(work.now_s, work.now_s + FARTHEST_S)[:1]
    ):
        return None
    while not possible(work.now_s + high):
        low, high = high, 4 * high
        if high > FARTHEST_S:
            return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if possible(work.now_s + middle):
            high = middle
        else:
            low = middle
    return math.ceil(work.now_s + high)


def _obstacles(work: Work, schedule: Schedule, local: int) -> list[Obstacle]:
    found = []
    for slot, index, flow in schedule.obstacles(local):
        limit = work.network.resources[index]
        length = float(schedule.slots.lengths[slot])
        users = [
            (work.groups[int(schedule.members[i])].id, int(flow[i] / length * 1e9))
            for i in np.argsort(-flow, kind="stable")[:5].tolist()
            if flow[i] > NO_SHORTFALL and i != local
        ]
        found.append(
            Obstacle(
                kind=limit.kind,
                name=limit.name,
                capacity_bits_per_s=int(schedule.slots.capacity[slot][index] * 1e9),
                used_bits_per_s=int(flow.sum() / length * 1e9),
                by=tuple(users),
                from_s=float(schedule.slots.bounds[slot]),
                until_s=float(schedule.slots.bounds[slot + 1]),
            )
        )
    return found
