"""What a plan says: routes, rates, promises, expectations and reasons, as values with fixed bytes.

Rates are whole bits a second, times POSIX seconds. `Plan.to_bytes` of equal plans is equal, and a plan read
back with `Plan.from_bytes` continues where the written one stood.
"""

from __future__ import annotations

import msgspec

from flowengine.errors import UsageError
from flowengine.plan.demands import Place

__all__ = ["Allocation", "Basis", "DemandPlan", "Eta", "Limits", "Obstacle", "Plan", "Route"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and knobs of the planner.

    Args:
        max_relays: Most sites in between on a route.
        max_groups: Most groups that the program plans for; the rest is served from what is left.
        exact_groups: Up to so many groups fairness is exact; above, tenants are levelled in a dozen steps.
        max_slots: Most stretches of time that the deadline schedule tells apart.
        max_schedule: Most variables of the deadline schedule; fewer slots are told apart when it would be more.
        starvation_share: Part of an equal split that no demand goes below inside its class.
        quantum_s: A demand is given no more than finishes it in so many seconds.
        term_s: Longest time that a plan is good for.
        deadline_margin: A new deadline is admitted for so much more than its bytes.
        steady_gain: A plan that gives no tenant so much more than the last one did is not worth changing.
        warm_effort: Above `exact_groups` groups a plan that has a last one to begin from stops after so many
            iterations; the next plan goes on from there.
        earliest_for: For so many refused demands the earliest possible time is computed.
    """

    max_relays: int = 2
    max_groups: int = 5000
    exact_groups: int = 300
    max_slots: int = 48
    max_schedule: int = 60_000
    starvation_share: float = 0.05
    quantum_s: float = 1.0
    term_s: float = 300.0
    deadline_margin: float = 0.02
    steady_gain: float = 0.03
    warm_effort: int = 2500
    earliest_for: int = 8


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Hops from a place that has the bytes to one that gets them."""

    source: Place
    target: Place
    sites: tuple[str, ...]
    links: tuple[str, ...]


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """A rate on a route, for a group of demands.

    Several routes mean a tree: each byte goes over all of them once, a target feeding the next.
    """

    group: str
    routes: tuple[Route, ...]
    rate_bits_per_s: int
    valid_from_s: float
    valid_until_s: float


class Eta(msgspec.Struct, frozen=True, kw_only=True):
    """When the last byte lands: expected, and between what; None where nothing can be said."""

    earliest_s: float | None
    expected_s: float | None
    latest_s: float | None


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """A limit that keeps a demand from more.

    Args:
        kind: link, out, in, read, write, tenant, or one of: deadline-work, ceiling, no-route, not-yet, effort.
        by: Who else uses it, with their rates, the largest first.
        gain: What one more bit a second of this limit would add to the tenant's total, about; None unknown.
        from_s: When the limit binds, where that is not now.
    """

    kind: str
    name: str
    capacity_bits_per_s: int = 0
    used_bits_per_s: int = 0
    by: tuple[tuple[str, int], ...] = ()
    gain: float | None = None
    from_s: float | None = None
    until_s: float | None = None


class DemandPlan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a plan means for one demand.

    Args:
        state: running, waiting (no rate now), refused (its deadline cannot be met), done (nothing to move).
        promise: none, kept, admitted (new with this plan), late (promised, and cannot be kept any more),
            refused, or best-effort (the deadline cannot be met, the user goes on without).
        earliest_s: The earliest deadline that could be promised, for a refused one.
    """

    id: str
    group: str
    state: str
    rate_bits_per_s: int
    promise: str
    eta: Eta
    earliest_s: float | None = None
    deadline_s: float | None = None
    obstacles: tuple[Obstacle, ...] = ()


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """Where the next plan's solver starts: by names, so that it survives changes of everything.

    A status is L (at its lower bound), B (basic) or U (at its upper bound).

    Args:
        routes: Known routes of each group: group, places and link names of each branch, whether basic.
        rows: Names of limits, groups and units whose rows are not basic, with their status first.
        pieces: Statuses of each unit's pieces of utility.
        short: Groups whose shortfall is basic or at its upper bound, with their status first.
        ladders: For each class, the levels at which the worth of a rate changes.
        split: Groups with more than one basic variable, each with class and tenant: when such a group is gone,
            the next plan keeps an empty shell of it, or the basis would not be one.
    """

    routes: tuple[tuple[str, tuple[tuple[Place, Place, tuple[str, ...]], ...], bool], ...] = ()
    rows: tuple[str, ...] = ()
    pieces: tuple[tuple[str, str], ...] = ()
    short: tuple[str, ...] = ()
    ladders: tuple[tuple[str, tuple[float, ...]], ...] = ()
    split: tuple[tuple[str, str, str], ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Routes and rates for all demands, and why.

    Args:
        valid_until_s: When some limit changes or the term ends; plan again before.
        method: exact, binned (tenants levelled in a dozen steps), partial (binned, stopped on the way there; the next
            plan goes on), steady (the last plan kept), or greedy (the effort was spent before an optimum was reached).
        effort_spent: Simplex iterations used.
        coarseness: How coarsely demands were grouped; 0 is exact.
        moved_share: Share of the traffic that runs on other routes than under the last plan.
    """

    made_at_s: float
    valid_until_s: float
    method: str
    effort_spent: int
    coarseness: int
    moved_share: float
    allocations: tuple[Allocation, ...]
    demands: tuple[DemandPlan, ...]
    basis: Basis = Basis()

    def to_bytes(self) -> bytes:
        """The plan as JSON, always the same bytes for the same plan."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """The plan behind `to_bytes`.

        Raises:
            UsageError: The bytes are not a plan.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise UsageError(f"these bytes are not a plan: {error}", hint="plan again without it") from None

    def of(self, demand: str) -> DemandPlan:
        """What the plan says about one demand.

        Raises:
            KeyError: The plan does not know it.
        """
        for entry in self.demands:
            if entry.id == demand:
                return entry
        raise KeyError(demand)
