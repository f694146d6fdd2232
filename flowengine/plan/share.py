"""Rates for everyone now: promised floors, classes, fair shares, completion, money.

Goal: the objectives in their order, each stage keeping what the stages before it proved.

Plan: up to `exact_groups` groups each objective is a stage of its own (see `fair`). Above, one program does
all of it: each tenant's total has a concave utility in pieces, the same ladder of levels for all tenants of a
class, taken from how water filling spreads them; classes lie a factor apart; nearly complete datasets and
cheap routes break ties. That is the idea of geometric and equi-depth binning (Namyar et al., NSDI 2024,
"Solving max-min fair resource allocations quickly on large graphs"). Warm, it starts from the last plan's
basis and ends in time, halfway if need be. When the effort is spent, water filling goes on from the last feasible point.

Invariants: the result is within every capacity and ceiling up to the solver's tolerance, whatever happened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flowengine.plan import greedy
from flowengine.plan.admission import Promises
from flowengine.plan.demands import Priority
from flowengine.plan.fair import SLACK, completion_values, fill_class, floors, lessened
from flowengine.plan.network import FloatArray, sum_by
from flowengine.plan.program import MAX_PRICING_ROUNDS, Bins, FlowProgram
from flowengine.plan.solver import EffortSpent, Infeasible
from flowengine.plan.warm import restore
from flowengine.plan.work import CLASSES, Work

__all__ = ["Shares", "share_out"]

SHORTFALL_COST = 1e9
NEW_ROUTE_PRICE = 0.05
NEW_ROUTE_HOPS = 0.5
MONEY_WEIGHT = 1e3
HOP_WEIGHT = 1e-3
LADDER_QUANTILES = np.array([0.02, 0.08, 0.16, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.98])
PIECES = len(LADDER_QUANTILES) + 1
PIECE_RATIO = (2.5, 2.0, 1.6)
"""How much more a piece is worth than the next one, by how many classes there are: with three, more than this
would spread the objective over more decades than the solver's tolerances bear."""
CLASS_GAP = 1.5
STARVING_WORTH = 1.1
WARM_ROUNDS = 1
WARM_POLISH = 700
"""So often, and with so many iterations, a warm plan that reached its optimum over known routes looks for better ones."""
MANY_UNITS = 1000
"""Of so many units each has so few routes that better ones are worth little, and looking for them doubles the time."""
LEAST_LEVEL = 0.01
COMPLETION_WORTH = 0.01
PRICE_WORTH = 0.01
HOP_WORTH = 1e-5
OPEN_END = 1e6
LARGEST_POWER = 24


@dataclass(slots=True)
class Shares:
    """The outcome of all stages.

    Attributes:
        rates: Gbit/s on each column.
        method: How it was found, as Plan.method.
        notes: For each unit, limits that held it back and what more of each would give.
        totals: Gbit/s of each unit.
        program: The last program, for its basis.
        ladders: Levels at which the worth of a rate changes, for each class.
    """

    rates: FloatArray
    method: str
    notes: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    totals: FloatArray = field(default_factory=lambda: np.zeros(0))
    program: FlowProgram | None = None
    ladders: dict[Priority, FloatArray] = field(default_factory=dict)


def share_out(work: Work, promises: Promises) -> Shares:
    """Rates for all groups that take part."""
    notes: dict[int, list[tuple[int, float]]] = {}
    exact = work.real <= work.limits.exact_groups
    shares = Shares(np.zeros(len(work.columns)), "exact" if exact else "binned", notes)
    if not (work.unit >= 0).any():
        return shares
    try:
        if exact:
            _exactly(work, promises, shares)
        else:
            _binned(work, promises, shares)
    except (EffortSpent, Infeasible):
        shares.method = "greedy"
    if shares.program is not None:
        shares.rates = shares.program.rates if len(shares.program.rates) else shares.rates
    if promises.unproven:
        shares.method = "greedy"
    if shares.method == "partial":
        shares.rates = _halfway(work, promises, shares)
    elif shares.method == "greedy" or len(work.spare):
        shares.rates = _greedily(work, promises, shares.rates)
    if shares.method == "greedy":
        shares.program = None
    shares.totals = _totals(work, shares.rates)
    return shares


def _left_gigabits(work: Work) -> dict[str, float]:
    """What each named dataset still lacks, over all its demands."""
    left: dict[str, float] = {}
    for demand in work.demands:
        if demand.dataset:
            left[demand.dataset] = left.get(demand.dataset, 0.0) + demand.remaining_bytes * 8e-9
    return left


def _stable_values(work: Work) -> FloatArray:
    """Worth of a unit of rate by powers of two of what datasets lack: they stay the same from plan to plan."""
    left = _left_gigabits(work)
    lacks = np.array([left.get(g.head.dataset, g.gigabits) for g in work.groups[: work.real]])
    power = np.clip(np.floor(np.log2(np.maximum(lacks, 1.0))), 0, LARGEST_POWER)
    return np.append(4.0 - 3.0 * power / LARGEST_POWER, np.ones(len(work.groups) - work.real))


def _loyalty(work: Work, price_weight: float, hop_weight: float) -> FloatArray | None:
    """A discount for routes that carried traffic, so that flows do not flap between equals."""
    if not len(work.known):
        return None
    price = work.columns.price()[: len(work.known)]
    discount = -(price * NEW_ROUTE_PRICE * price_weight + NEW_ROUTE_HOPS * hop_weight)
    return np.where(work.known > 0, discount, 0.0)


def _exactly(work: Work, promises: Promises, shares: Shares) -> None:
    program = shares.program = FlowProgram(
        work.columns, work.pricer, work.capacity, work.ceiling, work.unit, work.unit_weight, work.effort
    )
    program.solve(method="dual")
    _hold_promises(work, promises, program)
    settled = np.zeros(len(work.groups), dtype=bool)
    for klass in range(len(CLASSES)):
        members = work.members(klass)
        if not len(members):
            continue
        share = work.limits.starvation_share
        least = floors(program, members, work.weight, work.capacity, share, settled)
        program.set_floors(members, np.maximum(program.floor[members], least * (1 - SLACK)))
        fill_class(program, np.unique(work.unit[members]), shares.notes)
        settled[members] = True
    values = completion_values(work.groups, _left_gigabits(work))
    for klass in range(len(CLASSES)):
        members = work.members(klass)
        if not len(members):
            continue
        value = np.zeros(len(work.groups))
        value[members] = values[members]
        program.solve(value=value)
        program.set_floors(members, lessened(program.group_rates()[members]))
        # The groups' floors say it all from here; two sets of bounds would only quarrel about the last bit.
        units = np.unique(work.unit[members])
        program.set_unit_floors(units, np.zeros(len(units)))
    program.solve(
        price_weight=MONEY_WEIGHT, hop_weight=HOP_WEIGHT, extra=_loyalty(work, MONEY_WEIGHT, HOP_WEIGHT)
    )


def _hold_promises(work: Work, promises: Promises, program: FlowProgram) -> None:
    """Set promised floors; where links no longer allow them, as little less as can be."""
    promised = np.flatnonzero((promises.floor > 0) & (work.unit >= 0))
    if not len(promised):
        return
    program.set_floors(promised, promises.floor[promised] * (1 - SLACK))
    program.allow_shortfall(promised, np.full(len(promised), math.inf))
    cost = np.zeros(len(work.groups))
    cost[promised] = 1.0
    program.solve(shortfall=cost, method="dual")
    reached = np.maximum(
        program.floor[promised] - np.maximum(program.short[promised], 0.0) * (1 + SLACK) - SLACK, 0.0
    )
    program.set_floors(promised, reached)
    program.allow_shortfall(promised, np.zeros(len(promised)))


def _binned(work: Work, promises: Promises, shares: Shares) -> None:
    """One program for everything, on the last plan's ladders, or on those of a guess when there was none."""
    ladders = _last_ladders(work)
    warm = ladders is not None
    if ladders is None:
        ladders = _ladders(work, _guessed_totals(work))
    values = _stable_values(work)
    loyalty = _loyalty(work, PRICE_WORTH, HOP_WORTH)
    program = FlowProgram(
        work.columns, work.pricer, work.capacity, work.ceiling, work.unit, work.unit_weight, work.effort,
        _bins(work, ladders), boxed=warm,
    )  # fmt: skip
    program.set_unit_floors(np.arange(len(work.units)), np.zeros(len(work.units)))
    cost = _binned_floors(work, promises, program)
    program.solve(
        value=values * COMPLETION_WORTH, shortfall=cost, price_weight=PRICE_WORTH, hop_weight=HOP_WORTH,
        extra=loyalty, method="dual" if warm else "interior",
        first_basis=restore(work, program) if warm else None,
        rounds=(WARM_ROUNDS if len(work.units) <= MANY_UNITS else 0) if warm else MAX_PRICING_ROUNDS,
        at_most=work.limits.warm_effort if warm else None, polish=WARM_POLISH if warm else None,
    )  # fmt: skip
    shares.program = program
    shares.ladders = ladders
    if not program.finished:
        shares.method = "partial"
    weights = -program.duals[: program.resource_rows]
    tight = np.argsort(-weights, kind="stable")[:3]
    for unit in range(len(work.units)):
        shares.notes[unit] = [(int(r), math.nan) for r in tight if weights[r] > 0]


def _totals(work: Work, rates: FloatArray) -> FloatArray:
    rate = sum_by(work.columns.group()[: len(rates)], rates, len(work.groups))
    inside = work.unit >= 0
    return sum_by(work.unit[inside], rate[inside], len(work.units))


def _guessed_totals(work: Work) -> FloatArray:
    """What water filling would give each unit, each group asking with its part of the unit's weight."""
    inside = work.unit >= 0
    whole = sum_by(work.unit[inside], work.weight[inside], len(work.units))
    weight = work.weight.copy()
    # A unit of nothing but shells weighs nothing.
    part = np.divide(work.unit_weight, whole, out=np.zeros(len(whole)), where=whole > 0)
    weight[inside] *= part[work.unit[inside]]
    order = [work.members(k) for k in range(len(CLASSES))]
    return _totals(work, greedy.fill(work.columns, work.capacity, work.ceiling, weight, order))


def _ladders(work: Work, totals: FloatArray) -> dict[Priority, FloatArray]:
    """For each class the levels at which a tenant's next Gbit/s is worth less: quantiles of the levels now."""
    level = totals / work.unit_weight
    ladders = {}
    for priority in CLASSES:
        inside = np.array([p == priority for p, _ in work.units], dtype=bool)
        if inside.any():
            edges = np.quantile(level[inside], LADDER_QUANTILES)
            ladders[priority] = np.maximum.accumulate(np.maximum(edges, LEAST_LEVEL))
    return ladders


def _last_ladders(work: Work) -> dict[Priority, FloatArray] | None:
    """The last plan's ladders, when it had one for every class that is here now."""
    if work.previous is None:
        return None
    found = {Priority(name): np.array(edges) for name, edges in work.previous.basis.ladders}
    return found if {p for p, _ in work.units} <= found.keys() else None


def _slopes(work: Work) -> tuple[FloatArray, dict[Priority, float]]:
    """Worth of each piece, and the factor of each class: its last piece is worth more than all of the next class."""
    present = [c for c in reversed(CLASSES) if any(p == c for p, _ in work.units)]
    ratio = PIECE_RATIO[len(present) - 1]
    slopes: FloatArray = np.power(ratio, np.arange(PIECES - 1, -1, -1, dtype=np.float64))
    gap = CLASS_GAP * float(slopes[0])
    return slopes, {priority: gap**i for i, priority in enumerate(present)}


def _bins(work: Work, ladders: dict[Priority, FloatArray]) -> Bins:
    widths = [
        np.append(np.diff(ladders[priority], prepend=0.0), OPEN_END) * weight
        for (priority, _), weight in zip(work.units, work.unit_weight.tolist(), strict=True)
    ]
    slopes, factors = _slopes(work)
    worth = [factors[priority] * slopes for priority, _ in work.units]
    return Bins(np.repeat(np.arange(len(work.units)), PIECES), np.concatenate(widths), np.concatenate(worth))


def _binned_floors(work: Work, promises: Promises, program: FlowProgram) -> FloatArray:
    """Set floors that may be missed, and return what missing each costs: promises most, then class by class.

    A starving group's floor is worth a little more than any share of its class and less than any share of the
    class above.
    """
    program.rates = np.zeros(len(work.columns))
    cost = np.zeros(len(work.groups))
    members = np.flatnonzero((promises.floor <= 0) & (work.unit >= 0) & (work.ceiling > 0))
    if len(members):
        share = work.limits.starvation_share
        nobody = np.zeros(len(work.groups), dtype=bool)
        least = floors(program, members, work.weight, work.capacity, share, nobody)
        # Powers of two stay the same while capacities waver.
        with np.errstate(divide="ignore"):
            least = np.where(least > 0, 2.0 ** np.floor(np.log2(least)), 0.0)
        program.set_floors(members, least * (1 - SLACK))
        slopes, factors = _slopes(work)
        factor = np.array([factors.get(c, 0.0) for c in CLASSES])
        cost[members] = factor[work.klass[members]] * slopes[0] * STARVING_WORTH
    promised = np.flatnonzero((promises.floor > 0) & (work.unit >= 0))
    program.set_floors(promised, promises.floor[promised] * (1 - SLACK))
    cost[promised] = SHORTFALL_COST
    held = np.append(members, promised)
    program.allow_shortfall(held, np.full(len(held), math.inf))
    return cost


def _halfway(work: Work, promises: Promises, shares: Shares) -> FloatArray:
    """Rates where the solver was stopped: its point or the last plan's, pressed into the limits and filled up.

    What is worth more of the two by the program's own utilities is taken; promises come first in both.
    """
    assert shares.program is not None
    bins = shares.program.bins
    promised = np.flatnonzero(promises.floor > 0)
    others = [np.setdiff1d(np.flatnonzero(work.klass == k), promised) for k in range(len(CLASSES))]
    points = [shares.program.rates, work.known]
    found = []
    for point in points:
        rates = np.append(point, np.zeros(len(work.columns) - len(point)))
        fitted = greedy.press(work.columns, work.capacity, work.ceiling, [promised, *others], rates)
        found.append(_greedily(work, promises, _affordable(work, fitted)))
    return max(found, key=lambda rates: _worth(work, bins, rates))


def _affordable(work: Work, rates: FloatArray) -> FloatArray:
    """The rates, less of dear routes where a group's money would not last for all that remains."""
    group, price, count = work.columns.group(), work.columns.price(), len(work.groups)
    mean = np.array(
        [
            math.inf if g.cost_limit_usd is None else g.cost_limit_usd / max(g.gigabits, 1e-9)
            for g in work.groups
        ]
    )
    over = np.where(np.isfinite(mean[group]), price - mean[group], 0.0) * rates
    dear = sum_by(group, np.maximum(over, 0.0), count)
    spared = sum_by(group, np.maximum(-over, 0.0), count)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(dear > spared, spared / dear, 1.0)
    return np.where(over > 0, rates * part[group], rates)


def _worth(work: Work, bins: Bins, rates: FloatArray) -> float:
    """What the units' totals are worth by their ladders."""
    totals = _totals(work, rates)[bins.unit].reshape(-1, PIECES)
    width = bins.width.reshape(-1, PIECES)
    filled = np.clip(totals - (np.cumsum(width, axis=1) - width), 0.0, width)
    return float((filled * bins.slope.reshape(-1, PIECES)).sum())


def _greedily(work: Work, promises: Promises, rates: FloatArray) -> FloatArray:
    usable = np.ones(len(work.columns), dtype=bool)
    group = work.columns.group()
    for i, g in enumerate(work.groups):
        if g.cost_limit_usd is not None:
            usable[group == i] &= work.columns.price()[group == i] <= g.cost_limit_usd / g.gigabits
    promised = np.flatnonzero(promises.floor > 0)
    if len(promised):
        rates = greedy.fill(
            work.columns, work.capacity, np.minimum(promises.floor, work.ceiling), promises.floor, [promised], rates,
            usable,
        )  # fmt: skip
    order = [np.flatnonzero((work.klass == k) & (work.ceiling > 0)) for k in range(len(CLASSES))]
    if len(work.spare):
        order = [o[~np.isin(o, work.spare)] for o in order] + [work.spare]
    return greedy.fill(work.columns, work.capacity, work.ceiling, work.weight, order, rates, usable)
