"""The planner's workbench: one plan's inputs in compiled form, with the routes it begins from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flowengine.plan.demands import Demand, Group, Priority, group_demands
from flowengine.plan.model import Limits, Plan
from flowengine.plan.network import BoolArray, FloatArray, IntArray, Network
from flowengine.plan.program import Pricer
from flowengine.plan.routes import Branch, Columns
from flowengine.plan.solver import Effort
from flowengine.plan.topology import Overlay

__all__ = ["CLASSES", "Work", "prepare"]

CLASSES = tuple(Priority)
CONGESTED_ROUNDS = 1
LEAST_CEILING_GBIT = 1e-3
"""Even the last bytes of a demand are worth 1 Mbit/s: less would be lost as the solver's dust."""


@dataclass(slots=True)
class Work:
    """Everything that the stages of one plan share.

    Attributes:
        capacity: Gbit/s of each resource now.
        ceiling: Most that each group can use now; 0 for those that may not move now.
        klass: Position of each group's class in CLASSES.
        unit: Unit of fairness of each group, -1 for groups without any route.
        units: Class and tenant of each unit.
        known: Previous rates of the first columns, in Gbit/s.
        basic: Columns that were basic in the last plan's program.
        spare: Groups beyond what the program may hold.
        real: Groups from here on are shells of groups that are gone, see Basis.split.
    """

    network: Network
    demands: tuple[Demand, ...]
    groups: list[Group]
    coarseness: int
    columns: Columns
    pricer: Pricer
    capacity: FloatArray
    ceiling: FloatArray
    klass: IntArray
    weight: FloatArray
    limits: Limits
    effort: Effort
    now_s: float
    previous: Plan | None
    unit: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    units: list[tuple[Priority, str]] = field(default_factory=list)
    unit_weight: FloatArray = field(default_factory=lambda: np.zeros(0))
    known: FloatArray = field(default_factory=lambda: np.zeros(0))
    basic: list[int] = field(default_factory=list)
    spare: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    real: int = 0

    def members(self, klass: int) -> IntArray:
        """Groups of a class that take part."""
        return np.flatnonzero((self.klass == klass) & (self.unit >= 0) & (self.ceiling > 0))

    def unit_name(self, unit: int) -> str:
        """A name that survives from plan to plan."""
        priority, tenant = self.units[unit]
        return f"{priority.value} {tenant}"

    def set_units(self) -> None:
        """Number the pairs of class and tenant that have a route and something to move now."""
        routed = np.zeros(len(self.groups), dtype=bool)
        routed[self.columns.group()] = True
        routed[: self.real] &= self.ceiling[: self.real] > 0
        routed[self.spare] = False
        numbers: dict[tuple[Priority, str], int] = {}
        unit = np.full(len(self.groups), -1, dtype=np.int64)
        for i in np.flatnonzero(routed).tolist():
            head = self.groups[i].head
            unit[i] = numbers.setdefault((head.priority, head.tenant), len(numbers))
        self.unit, self.units = unit, list(numbers)
        tenant_weight = self.network.tenant_weight
        self.unit_weight = np.array([tenant_weight[self.network.tenants[t]] for _, t in numbers])


def prepare(
    overlay: Overlay,
    demands: tuple[Demand, ...],
    previous: Plan | None,
    now_s: float,
    limits: Limits,
    effort: Effort,
) -> Work:
    """Compile the inputs, take over the last plan's routes and find the first routes of everyone else."""
    groups, coarseness = group_demands(demands, limits.max_groups, now_s)
    real = len(groups)
    if previous is not None and real > limits.exact_groups:
        groups = groups + _shells(previous, groups)
    network = Network(overlay, tuple(sorted({g.head.tenant for g in groups})))
    capacity = network.capacity_at(now_s)
    barred: BoolArray = network.draining_at(now_s)
    if len(network.links):
        barred = barred | (capacity[network.link_resources].min(axis=1) <= 0)
    columns = Columns(network, groups)
    ceiling = np.array(
        [
            min(max(g.gigabits / limits.quantum_s, LEAST_CEILING_GBIT), g.max_rate_gbit)
            if g.gigabits
            else 0.0
            for g in groups
        ]
    )
    released = np.array(
        [g.head.not_before_s is None or g.head.not_before_s <= now_s for g in groups], dtype=bool
    )
    order = {priority: i for i, priority in enumerate(CLASSES)}
    work = Work(
        network=network, demands=demands, groups=groups, coarseness=coarseness, columns=columns,
        pricer=Pricer(network, groups, limits.max_relays, barred), capacity=capacity,
        ceiling=np.where(released, ceiling, 0.0),
        klass=np.array([order[g.head.priority] for g in groups], dtype=np.int64),
        weight=np.array([g.weight for g in groups]), limits=limits, effort=effort, now_s=now_s, previous=previous, real=real,
    )  # fmt: skip
    if real > limits.max_groups:
        # Too many even when grouped coarsely: the last of the lowest class are served from what is left.
        ranked = np.lexsort((np.arange(real), work.klass[:real]))
        work.spare = np.sort(ranked[limits.max_groups :])
    if previous is not None:
        _take_over(work, previous)
    _seed(work, np.array([True] * len(groups)) if previous is None else _without_route(work))
    work.set_units()
    return work


def _shells(previous: Plan, groups: list[Group]) -> list[Group]:
    """Groups without bytes in place of those that are gone but that the last basis cannot do without."""
    here = {group.id for group in groups}
    ends = {name: branches[0] for name, branches, _ in previous.basis.routes if len(branches) == 1}
    return [
        Group(
            Demand(
                id=name, sources=(ends[name][0],), targets=(ends[name][1],), remaining_bytes=0,
                priority=Priority(priority), tenant=tenant,
            ),
            None,
        )
        for name, priority, tenant in previous.basis.split
        if name not in here and name in ends
    ]  # fmt: skip


def _without_route(work: Work) -> BoolArray:
    lacks = np.ones(len(work.groups), dtype=bool)
    # A known route over something dead is none.
    lacks[work.columns.group()[work.columns.bottleneck(work.capacity) > 0]] = False
    lacks[work.real :] = False
    return lacks


def _take_over(work: Work, previous: Plan) -> None:
    """The last plan's routes that still exist and are allowed become the first columns, at their old rates."""
    network, columns = work.network, work.columns
    number = {group.id: i for i, group in enumerate(work.groups)}
    rates = {(a.group, tuple(r.links for r in a.routes)): a.rate_bits_per_s for a in previous.allocations}
    known: list[float] = []
    for name, route, basic in previous.basis.routes:
        group = number.get(name)
        if group is None:
            continue
        branches = _still_valid(network, work.groups[group], route, work.limits)
        if branches is None:
            continue
        column = columns.add(group, branches)
        if column is None:
            continue
        if basic:
            work.basic.append(column)
        known.append(rates.get((name, tuple(b[2] for b in route)), 0) * 1e-9)
    work.known = np.array(known)


def _still_valid(
    network: Network, group: Group, route: tuple[tuple[object, object, tuple[str, ...]], ...], limits: Limits
) -> tuple[Branch, ...] | None:
    head = group.head
    links_ok, relays_ok = network.masks(head.allowed)
    relays = (
        limits.max_relays
        if head.allowed.max_relays is None
        else min(head.allowed.max_relays, limits.max_relays)
    )
    feeders = [*head.sources, *(head.targets if len(head.targets) > 1 else ())]
    branches: list[Branch] = []
    for feeder, target, names in route:
        places = [p for p in feeders if p == feeder], [p for p in head.targets if p == target]
        passes_on = bool(places[0]) and bool(places[1]) and places[0][0] not in head.sources
        if passes_on and not head.allowed.may_feed(places[0][0].site, places[1][0].site):
            return None
        links = [network.links.get(name, -1) for name in names]
        if (
            not places[0]
            or not places[1]
            or min(links) < 0
            or not links_ok[links].all()
            or len(links) > relays + 1
        ):
            return None
        if not relays_ok[network.link_source[links[1:]]].all():
            return None
        if head.cost_limit_usd is not None and np.isnan(network.price[links]).any():
            return None
        ends = [network.sites.get(places[0][0].site), *network.link_target[links].tolist()]
        starts = network.link_source[links].tolist()
        if ends[:-1] != starts or ends[-1] != network.sites.get(places[1][0].site):
            return None
        branches.append((places[0][0], places[1][0], tuple(links)))
    return tuple(branches) if {b[1] for b in branches} == set(head.targets) else None


def _seed(work: Work, wanted: BoolArray) -> None:
    """First routes: the shortest, the widest, the cheapest, then some around what those would fill."""
    network, columns, pricer = work.network, work.columns, work.pricer
    if not wanted.any() or not len(network.links):
        return
    worth = np.where(wanted, math.inf, 0.0)
    free = np.zeros(network.resource_count)
    width = np.maximum(work.capacity[: len(network.links)], 1e-9)
    pricer.offer(columns, free, np.ones(len(width)), worth)
    pricer.offer(columns, free, 1.0 / width, worth)
    pricer.offer(columns, free, network.assumed_price + 1e-3, worth)
    for _ in range(CONGESTED_ROUNDS):
        load = columns.usage(np.ones(len(columns)))
        with np.errstate(divide="ignore", invalid="ignore"):
            crowd = np.where((work.capacity > 0) & (load > 0), load / work.capacity, 0.0)
        pricer.offer(columns, crowd, np.full(len(width), 1e-6), worth)
