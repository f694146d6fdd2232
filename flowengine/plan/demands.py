"""What is to be moved, for whom, by when, over what is allowed; and how equal demands become one group.

Goal: at most `max_groups` things to plan for, however many demands wait.

Plan: demands that no plan could tell apart (same places, same allowed set, class, tenant, weight, deadline)
form a group. When that still leaves too many, deadlines are read earlier than they are, on a coarser and
coarser grid, and weights are rounded to powers of two: a promise can only become stricter by it.

Invariants: every demand is in exactly one group; a group's bytes are the sum of its members'; a group's
deadline is never later than a member's.
"""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from flowengine.errors import UsageError

__all__ = ["ANYWHERE", "Allowed", "Demand", "Group", "Place", "Priority", "group_demands"]


class Priority(StrEnum):
    """Classes, the first served first; scavenger takes only what is left."""

    URGENT = "urgent"
    NORMAL = "normal"
    SCAVENGER = "scavenger"


class Place(msgspec.Struct, frozen=True):
    """Where bytes are read or written: a site, and one of its storage endpoints when that matters."""

    site: str
    endpoint: str = ""


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """What policy leaves of the overlay for a demand. None means no restriction.

    Args:
        relays: Sites that may pass its frames on.
        links: Names of the links it may use.
        feeds: Pairs of target sites of which the first may serve the second with what landed there: policy lets it land
            at the first, and go on from there to the second.
        max_relays: Most sites in between on one route; None means the planner's limit.
    """

    relays: frozenset[str] | None = None
    links: frozenset[str] | None = None
    feeds: frozenset[tuple[str, str]] | None = None
    max_relays: int | None = None

    def may_feed(self, site: str, other: str) -> bool:
        """Whether a target at `site` may serve one at `other`."""
        return site != other and (self.feeds is None or (site, other) in self.feeds)


ANYWHERE = Allowed()


class Demand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Bytes still to move.

    Args:
        sources: Places that hold the bytes; several are read from at once.
        targets: Places that must get all of them; several are served by trees.
        deadline_s: When all bytes must have landed.
        promised: The deadline was admitted earlier and binds the planner.
        best_effort: If the deadline cannot be met, go on without a promise.
        cost_limit_usd: Most that moving what remains may cost.
        dataset: What becomes useful when this and its kin have landed; empty means itself.
        not_before_s: Nothing moves earlier.
        max_rate_bits_per_s: Most that it may take, e.g. what its agent can do.
        source_once: With several targets, the source sends each byte as few times as can be, once where
            targets may feed each other; otherwise the source serves whom it serves fastest.
    """

    id: str
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]
    remaining_bytes: int
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    weight: float = 1.0
    deadline_s: float | None = None
    promised: bool = False
    best_effort: bool = False
    cost_limit_usd: float | None = None
    dataset: str = ""
    not_before_s: float | None = None
    max_rate_bits_per_s: float | None = None
    allowed: Allowed = ANYWHERE
    source_once: bool = True


class Group:
    """Demands that are planned as one.

    Attributes:
        head: A member that stands for all of them.
        members: Positions in the demand sequence, ascending.
        gigabits: What remains, summed.
        deadline_s: The group's deadline, not later than any member's.
        weight: Weight inside the tenant's share, summed.
    """

    __slots__ = (
        "cost_limit_usd",
        "deadline_s",
        "gigabits",
        "head",
        "id",
        "max_rate_gbit",
        "members",
        "weight",
    )

    def __init__(self, head: Demand, deadline_s: float | None) -> None:
        self.id = head.id
        self.head = head
        self.members: list[int] = []
        self.gigabits = 0.0
        self.weight = 0.0
        self.deadline_s = deadline_s
        self.cost_limit_usd: float | None = None
        self.max_rate_gbit = 0.0

    def add(self, position: int, demand: Demand) -> None:
        """Take in one more member."""
        self.members.append(position)
        self.gigabits += demand.remaining_bytes * 8e-9
        self.weight += demand.weight
        if demand.cost_limit_usd is not None:
            self.cost_limit_usd = (self.cost_limit_usd or 0.0) + demand.cost_limit_usd
        rate = demand.max_rate_bits_per_s
        self.max_rate_gbit += math.inf if rate is None else rate * 1e-9


def check_demand(demand: Demand) -> None:
    """Raises UsageError when a demand makes no sense by itself."""
    if not demand.sources or not demand.targets:
        raise UsageError(
            f"demand {demand.id!r} has no source or no target", hint="name at least one site for each"
        )
    if demand.remaining_bytes < 0:
        raise UsageError(
            f"demand {demand.id!r} has {demand.remaining_bytes} bytes to move", hint="use 0 or more"
        )
    if not (demand.weight > 0 and math.isfinite(demand.weight)):
        raise UsageError(f"demand {demand.id!r} has weight {demand.weight}", hint="use a number above 0")


def group_demands(demands: tuple[Demand, ...], max_groups: int, now_s: float) -> tuple[list[Group], int]:
    """Groups in the order of their first members, and how coarse the grouping had to be (0 is exact).

    Demands with nothing to move are left out. When even the coarsest grouping exceeds `max_groups`, all
    groups come back; the caller plans the first of them and serves the rest from what is left.
    """
    groups: list[Group] = []
    steps = ((0.0, False), (300.0, False), (3600.0, True), (86400.0, True))
    for coarseness, (grid_s, round_weight) in enumerate(steps):
        groups = _grouped(demands, grid_s, round_weight, now_s)
        if len(groups) <= max_groups:
            return groups, coarseness
    return groups, 4


def _grouped(demands: tuple[Demand, ...], grid_s: float, round_weight: bool, now_s: float) -> list[Group]:
    table: dict[tuple[object, ...], Group] = {}
    for position, demand in enumerate(demands):
        if not demand.remaining_bytes:
            continue
        deadline = demand.deadline_s
        if deadline is not None and grid_s and deadline - now_s > 4 * grid_s:
            deadline = math.floor(deadline / grid_s) * grid_s
        weight = 2.0 ** round(math.log2(demand.weight)) if round_weight else demand.weight
        key = (
            demand.sources, demand.targets, demand.priority, demand.tenant, weight, deadline, demand.promised,
            demand.best_effort, demand.cost_limit_usd is not None, demand.not_before_s, demand.max_rate_bits_per_s,
            demand.allowed, demand.source_once,
        )  # fmt: skip
        group = table.get(key)
        if group is None:
            check_demand(demand)
            group = table[key] = Group(demand, deadline)
        group.add(position, demand)
    return list(table.values())
