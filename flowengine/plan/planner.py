"""`plan`: routes and rates for all demands, as a pure function.

Goal: equal inputs, equal bytes; every allocation within every limit, exactly, in whole bits a second.

Plan: compile (`work`), decide on deadlines (`admission`), share (`share`), keep the last plan when the new one
is hardly better, round down to whole bits within every limit, and report (`report`).

Invariants: no clock, file, environment or global is read; the effort is counted in iterations.
"""

from __future__ import annotations

import numpy as np

from flowengine.plan.admission import Promises, decide
from flowengine.plan.demands import Demand
from flowengine.plan.model import DemandPlan, Limits, Plan
from flowengine.plan.network import FloatArray, sum_by
from flowengine.plan.report import Outcome, report
from flowengine.plan.share import Shares, share_out
from flowengine.plan.solver import Effort
from flowengine.plan.topology import Overlay
from flowengine.plan.work import Work, prepare

__all__ = ["DEFAULT_EFFORT", "admit", "plan"]

DEFAULT_EFFORT = 400_000
LEAST_RATE_GBIT = 1e-5
ROUNDING = 1e-12


def plan(
    overlay: Overlay,
    demands: tuple[Demand, ...],
    previous: Plan | None,
    now_s: float,
    effort: int = DEFAULT_EFFORT,
    limits: Limits | None = None,
) -> Plan:
    """Routes, rates, promises, expectations and reasons for all demands.

    Args:
        overlay: Sites, links and their limits.
        demands: What is still to be moved, earlier submissions first.
        previous: The last plan, to change smoothly from and to start the solver at.
        now_s: POSIX time.
        effort: Most simplex iterations; when they are spent the plan goes on greedily and says so.
        limits: Bounds and knobs.

    Raises:
        UsageError: The overlay or a demand contradicts itself.
    """
    limits = limits or Limits()
    spent = Effort(effort)
    work = prepare(overlay, demands, previous, now_s, limits, spent)
    promises = decide(work)
    for group, verdict in promises.verdict.items():
        if verdict == "refused":
            work.ceiling[group] = 0.0
    if "refused" in promises.verdict.values():
        work.set_units()
    shares = share_out(work, promises)
    rates = _feasible(work, shares.rates)
    steady = _keep_last(work, promises, shares, rates)
    if steady is not None:
        rates, shares.method = steady, "steady"
    return report(Outcome(work, promises, shares, _whole_bits(work, rates)))


def admit(
    overlay: Overlay,
    demands: tuple[Demand, ...],
    candidate: Demand,
    now_s: float,
    effort: int = DEFAULT_EFFORT,
    limits: Limits | None = None,
) -> DemandPlan:
    """The verdict on one new demand's deadline beside all promises that `demands` carry.

    Only demands that are promised bind it; others make room.
    """
    bound = tuple(d for d in demands if d.promised and d.id != candidate.id)
    return plan(overlay, (*bound, candidate), None, now_s, effort, limits).of(candidate.id)


def _feasible(work: Work, rates: FloatArray) -> FloatArray:
    """The rates, less what the solver's tolerance let them be too high, without dust."""
    rates = np.where(rates < LEAST_RATE_GBIT, 0.0, rates)
    rates = np.append(rates, np.zeros(len(work.columns) - len(rates)))
    if not len(rates):
        return rates
    at, resources, _ = work.columns.incidence()
    usage = work.columns.usage(rates)
    with np.errstate(divide="ignore", invalid="ignore"):
        fits = np.where(usage > work.capacity, work.capacity / usage, 1.0)
    scale = np.ones(len(rates))
    np.minimum.at(scale, at, fits[resources])
    group = work.columns.group()
    total = sum_by(group, rates, len(work.groups))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.minimum(scale, np.where(total > work.ceiling, work.ceiling / total, 1.0)[group])
    return np.asarray(rates * scale, dtype=float)


def _keep_last(work: Work, promises: Promises, shares: Shares, rates: FloatArray) -> FloatArray | None:
    """The last plan's rates when they still fit and nobody would gain enough from new ones."""
    count = len(work.known)
    if not count or not work.known.any() or not (work.unit >= 0).any():
        return None
    last = np.append(work.known, np.zeros(len(work.columns) - count))
    if (work.columns.usage(last) > work.capacity * (1 + ROUNDING)).any():
        return None
    group = work.columns.group()
    old = sum_by(group, last, len(work.groups))
    new = sum_by(group, rates, len(work.groups))
    gain = 1 + work.limits.steady_gain
    floors = promises.floor * (1 - 1e-6)
    if (old > work.ceiling * (1 + ROUNDING)).any() or (old < np.minimum(floors, new)).any():
        return None
    # Nobody who would now be served may stay without, no tenant may miss a gain, no unit a lot of money.
    if ((new > 0) & (old < new * 0.5)).any():
        return None
    inside = work.unit >= 0
    before = sum_by(work.unit[inside], old[inside], len(work.units))
    if (shares.totals > before * gain).any():
        return None
    if _money(work, last) > _money(work, rates) * gain + 1e-9:
        return None
    return last


def _money(work: Work, rates: FloatArray) -> float:
    return float(work.columns.price() @ rates)


def _whole_bits(work: Work, rates: FloatArray) -> FloatArray:
    """Whole bits a second, never more than before rounding."""
    del work
    return np.floor(rates * 1e9 * (1 - ROUNDING))
