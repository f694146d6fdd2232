"""A federation's day, played through the planner: what links carry, when demands end, which deadlines hold.

Goal: answer "what would a second link bring" before anybody buys one.

Plan: from event to event. At an arrival, an end, or a change of limits, everything that is there is planned;
until the next event bytes move at the plan's rates. Links carry exactly their estimates: what is simulated is
the planner, not the weather. A deadline that cannot be met is counted as refused, and its bytes go on without a
promise.

Invariants: equal inputs give equal results; time only advances; no demand moves more than it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from flowengine.plan.demands import Demand
from flowengine.plan.model import DemandPlan, Limits, Plan
from flowengine.plan.network import Network
from flowengine.plan.planner import DEFAULT_EFFORT, plan
from flowengine.plan.topology import Overlay

__all__ = ["DemandOutcome", "LinkOutcome", "Result", "simulate"]

FULL = 0.99
MAX_PLANS = 100_000


class DemandOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one demand fared; `done_s` is None when the simulation ended first.

    Args:
        deadline: none, met, missed, refused, or open (admitted, and not due when the simulation ended).
    """

    id: str
    tenant: str
    size_bytes: int
    moved_bytes: int
    arrived_s: float
    done_s: float | None
    deadline_s: float | None
    deadline: str
    usd: float


class LinkOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one link carried; utilisation is of what it could carry at each moment."""

    name: str
    moved_bytes: int
    mean_utilisation: float
    peak_utilisation: float
    full_s: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The whole simulation.

    Args:
        fairness: Jain's index of tenants' mean rates per weight while they had demands; 1 is equal.
        moved_share: Mean share of the traffic that a new plan led elsewhere.
        series: Moments, and each link's utilisation from then on.
    """

    start_s: float
    end_s: float
    plans: int
    moved_bytes: int
    usd: float
    fairness: float
    moved_share: float
    demands: tuple[DemandOutcome, ...]
    links: tuple[LinkOutcome, ...]
    series: tuple[tuple[float, tuple[float, ...]], ...]

    def deadlines(self) -> dict[str, int]:
        """How many deadlines ended how."""
        counts = dict.fromkeys(("met", "missed", "refused", "open"), 0)
        for demand in self.demands:
            if demand.deadline != "none":
                counts[demand.deadline] += 1
        return counts

    def completion_s(self, quantile: float) -> float | None:
        """The time from arrival to end that this part of all ended demands did not exceed."""
        times = sorted(d.done_s - d.arrived_s for d in self.demands if d.done_s is not None)
        return times[min(int(quantile * len(times)), len(times) - 1)] if times else None


class _State:
    """What changes while the simulation runs."""

    def __init__(self, overlay: Overlay, arrivals: Sequence[tuple[float, Demand]]) -> None:
        self.overlay = overlay
        self.waiting = sorted(arrivals, key=lambda pair: (pair[0], pair[1].id))
        self.arrived = {d.id: t for t, d in arrivals}
        self.all = {d.id: d for _, d in arrivals}
        self.active: dict[str, Demand] = {}
        self.left = {d.id: float(d.remaining_bytes) for _, d in arrivals}
        self.usd = dict.fromkeys(self.all, 0.0)
        self.done: dict[str, float] = {}
        self.verdict: dict[str, str] = {}
        self.network = Network(overlay)
        self.moved = [0.0] * len(overlay.links)
        self.could = [0.0] * len(overlay.links)
        self.peak = [0.0] * len(overlay.links)
        self.full = [0.0] * len(overlay.links)
        self.series: list[tuple[float, tuple[float, ...]]] = []
        self.churn: list[float] = []
        self.tenant_bytes: dict[str, float] = {}
        self.tenant_time: dict[str, float] = {}

    def admit_until(self, now_s: float) -> None:
        """Let in what has arrived."""
        while self.waiting and self.waiting[0][0] <= now_s:
            _, demand = self.waiting.pop(0)
            self.active[demand.id] = msgspec.structs.replace(demand, best_effort=True)

    def learn(self, made: Plan) -> None:
        """Remember what was promised."""
        for entry in made.demands:
            if entry.promise == "admitted":
                self.active[entry.id] = msgspec.structs.replace(self.active[entry.id], promised=True)
                self.verdict[entry.id] = "open"
            elif entry.promise in ("best-effort", "refused"):
                self.active[entry.id] = msgspec.structs.replace(self.active[entry.id], deadline_s=None)
                self.verdict[entry.id] = "refused"

    def advance(self, made: Plan, start_s: float, end_s: float) -> None:
        """Move bytes at the plan's rates; demands that end on the way stop."""
        entries = {entry.id: entry for entry in made.demands}
        seconds: dict[str, float] = {}
        group_rate: dict[str, int] = {}
        for entry in made.demands:
            group_rate[entry.group] = group_rate.get(entry.group, 0) + entry.rate_bits_per_s
        for name, demand in list(self.active.items()):
            seconds[name] = self._move(name, demand, entries[name], start_s, end_s)
        self._account(made, entries, group_rate, seconds, start_s, end_s)

    def idle(self, start_s: float, end_s: float) -> None:
        """Nothing is there to move."""
        capacity = self.network.capacity_at(start_s)[: len(self.could)] * 1e9
        self.series.append((start_s, (0.0,) * len(self.could)))
        for link in range(len(self.could)):
            self.could[link] += float(capacity[link]) / 8 * (end_s - start_s)

    def first_end(self, made: Plan, now_s: float) -> float:
        """When the first demand ends at the plan's rates."""
        rates = {entry.id: entry.rate_bits_per_s / 8 for entry in made.demands}
        ends = (now_s + self.left[name] / rates[name] for name in self.active if rates[name])
        return min(ends, default=math.inf)

    def _move(self, name: str, demand: Demand, entry: DemandPlan, start_s: float, end_s: float) -> float:
        length = end_s - start_s
        rate = entry.rate_bits_per_s / 8
        lasts = min(length, self.left[name] / rate) if rate else 0.0
        self.left[name] -= rate * lasts
        tenant = demand.tenant
        self.tenant_bytes[tenant] = self.tenant_bytes.get(tenant, 0.0) + rate * lasts
        self.tenant_time[tenant] = self.tenant_time.get(tenant, 0.0) + (lasts if rate else length)
        if self.left[name] < 1.0:
            self.done[name] = start_s + lasts
            del self.active[name]
        else:
            left = math.ceil(self.left[name])
            self.active[name] = msgspec.structs.replace(demand, remaining_bytes=left)
        return lasts

    def _account(
        self,
        made: Plan,
        entries: Mapping[str, DemandPlan],
        group_rate: Mapping[str, int],
        seconds: Mapping[str, float],
        start_s: float,
        end_s: float,
    ) -> None:
        members: dict[str, list[str]] = {}
        for name in seconds:
            members.setdefault(entries[name].group, []).append(name)
        rate = [0.0] * len(self.overlay.links)
        price = self.network.assumed_price
        for allocation in made.allocations:
            names = members.get(allocation.group, [])
            for name in names:
                share = entries[name].rate_bits_per_s / max(group_rate[allocation.group], 1)
                bits = allocation.rate_bits_per_s * share
                for route in allocation.routes:
                    for label in route.links:
                        link = self.network.links[label]
                        rate[link] += bits
                        self.moved[link] += bits / 8 * seconds[name]
                        self.usd[name] += bits * 1e-9 * seconds[name] * float(price[link])
        capacity = self.network.capacity_at(start_s)[: len(rate)] * 1e9
        use = [r / c if c > 0 else 0.0 for r, c in zip(rate, capacity.tolist(), strict=True)]
        self.series.append((start_s, tuple(round(u, 4) for u in use)))
        for link, part in enumerate(use):
            self.could[link] += float(capacity[link]) / 8 * (end_s - start_s)
            self.peak[link] = max(self.peak[link], part)
            self.full[link] += (end_s - start_s) if part >= FULL else 0.0


def simulate(
    overlay: Overlay,
    arrivals: Sequence[tuple[float, Demand]],
    start_s: float,
    end_s: float,
    *,
    step_s: float = 60.0,
    effort: int = DEFAULT_EFFORT,
    limits: Limits | None = None,
) -> Result:
    """Play all demands through the planner.

    Args:
        overlay: The federation.
        arrivals: When each demand is submitted; ids must differ.
        start_s: Where time begins.
        end_s: Where it ends, whatever is left.
        step_s: Least time between two plans; events inside wait for the next one.
        effort: For each plan.
        limits: For each plan.
    """
    state = _State(overlay, arrivals)
    limits = msgspec.structs.replace(limits or Limits(), term_s=end_s - start_s)
    previous: Plan | None = None
    now, plans = start_s, 0
    while now < end_s and plans < MAX_PLANS:
        state.admit_until(now)
        arrival = state.waiting[0][0] if state.waiting else end_s
        if not state.active:
            stop = min(max(arrival, now), end_s)
            state.idle(now, stop)
        else:
            made = plan(overlay, tuple(state.active.values()), previous, now, effort, limits)
            plans += 1
            if previous is not None:
                state.churn.append(made.moved_share)
            state.learn(made)
            soonest = max(min(arrival, state.first_end(made, now)), now + step_s)
            stop = min(soonest, made.valid_until_s, end_s)
            state.advance(made, now, stop)
            previous = made
        now = stop
    return _result(state, start_s, end_s, plans)


def _result(state: _State, start_s: float, end_s: float, plans: int) -> Result:
    overlay = state.overlay
    weights = {tenant.name: tenant.weight for tenant in overlay.tenants}
    rates = [
        moved / state.tenant_time[tenant] / weights.get(tenant, 1.0)
        for tenant, moved in sorted(state.tenant_bytes.items())
        if state.tenant_time[tenant] > 0
    ]
    squares = sum(r * r for r in rates)
    demands = tuple(_demand_outcome(state, name, end_s) for name in state.all)
    return Result(
        start_s=start_s,
        end_s=end_s,
        plans=plans,
        moved_bytes=sum(d.moved_bytes for d in demands),
        usd=sum(d.usd for d in demands),
        fairness=sum(rates) ** 2 / (len(rates) * squares) if squares else 1.0,
        moved_share=sum(state.churn) / len(state.churn) if state.churn else 0.0,
        demands=demands,
        links=tuple(
            LinkOutcome(
                name=link.label,
                moved_bytes=int(state.moved[i]),
                mean_utilisation=state.moved[i] / state.could[i] if state.could[i] else 0.0,
                peak_utilisation=state.peak[i],
                full_s=state.full[i],
            )
            for i, link in enumerate(overlay.links)
        ),
        series=tuple(state.series),
    )


def _demand_outcome(state: _State, name: str, end_s: float) -> DemandOutcome:
    demand, done = state.all[name], state.done.get(name)
    verdict = "none"
    if demand.deadline_s is not None:
        verdict = state.verdict.get(name, "refused" if done is None else "met")
        if verdict == "open":
            if done is not None:
                # A second of grace: bytes are whole, rates are rounded down.
                verdict = "met" if done <= demand.deadline_s + 1.0 else "missed"
            elif demand.deadline_s <= end_s:
                verdict = "missed"
    return DemandOutcome(
        id=name,
        tenant=demand.tenant,
        size_bytes=demand.remaining_bytes,
        moved_bytes=int(demand.remaining_bytes - state.left[name]),
        arrived_s=state.arrived[name],
        done_s=None if done is None else round(done, 3),
        deadline_s=demand.deadline_s,
        deadline=verdict,
        usd=round(state.usd[name], 6),
    )
