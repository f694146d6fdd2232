"""The flow program: rates on routes within every limit, with routes found as they are needed.

Goal: one linear program that all stages of a plan share, each setting its own objective and floors.

Plan: one row for each resource (usage within capacity), for each group (its rate between floor and
ceiling), for each unit of fairness (its groups' rates together, less weight times level) and for each group
with a money limit (the mean price of what it moves). Columns are the level, a shortfall for each promised
group, then routes. After each solve the duals price the resources; a route that is worth more than it costs
under these prices enters, and the program is solved again, until none does: then the optimum over known
routes is the optimum over all routes (Desrosiers and Lübbecke 2005, "A primer in column generation").

Invariants: a column once added stays; floors never exceed what an earlier solve proved possible.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowengine.plan.demands import Allowed, Group
from flowengine.plan.network import BoolArray, FloatArray, IntArray, Network, sum_by
from flowengine.plan.routes import Columns, Searcher
from flowengine.plan.solver import Effort, Solver

__all__ = ["Bins", "FlowProgram", "Pricer"]

LEVEL = 0
ENTER = 1e-6
MAX_PRICING_ROUNDS = 60
BOX = 1.001
"""A bound of a variable lies so much above what a row allows: it never holds, so it never takes the row's price."""


class Pricer:
    """Finds, for many groups at once, routes that are worth having under given resource prices."""

    def __init__(self, network: Network, groups: Sequence[Group], max_relays: int, barred: BoolArray) -> None:
        self.network = network
        self.groups = groups
        self.searcher = Searcher(network)
        self.max_relays = max_relays
        self.barred = barred
        self.tenant: IntArray = np.array(
            [network.tenant_base + network.tenants[g.head.tenant] for g in groups], dtype=np.int64
        )
        self._families: dict[tuple[Allowed, bool], list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            self._families[group.head.allowed, group.cost_limit_usd is not None].append(i)
        self._plain = np.array(
            [len(g.head.sources) == 1 and len(g.head.targets) == 1 for g in groups], dtype=bool
        )
        sites = network.sites
        self._from: IntArray = np.array(
            [sites.get(g.head.sources[0].site, -1) for g in groups], dtype=np.int64
        )
        self._to: IntArray = np.array([sites.get(g.head.targets[0].site, -1) for g in groups], dtype=np.int64)
        self._plain &= (self._from >= 0) & (self._to >= 0) & (self._from != self._to)
        self._read: IntArray = np.array([_endpoint(network, g, "read") for g in groups], dtype=np.int64)
        self._write: IntArray = np.array([_endpoint(network, g, "write") for g in groups], dtype=np.int64)

    def offer(
        self,
        columns: Columns,
        weights: FloatArray,
        link_costs: FloatArray,
        worth: FloatArray,
        money: FloatArray | None = None,
        barred: BoolArray | None = None,
    ) -> int:
        """Add every group's lightest route that weighs less than it is worth; how many were new.

        Args:
            columns: Where new routes go.
            weights: Price of each resource, 0 or more.
            link_costs: What the objective itself charges for each link.
            worth: What a unit of rate is worth to each group; routes are sought only where it is positive.
            money: Price of a dollar for each group with a money limit, 0 elsewhere.
            barred: Links not to take, where not those that are barred now.
        """
        network = self.network
        per_link = (
            weights[network.link_resources].sum(axis=1) + link_costs if len(network.links) else link_costs
        )
        per_link = np.where(self.barred if barred is None else barred, math.inf, per_link)
        padded = np.append(weights, 0.0)
        before = len(columns)
        unpriced = np.where(np.isnan(network.price), math.inf, 0.0)
        for (allowed, limited), family in self._families.items():
            interested = np.array(family)[worth[family] > ENTER]
            if not len(interested):
                continue
            spends = money[interested] > 0 if money is not None else np.zeros(len(interested), dtype=bool)
            # Who has a money limit cannot use a link whose price nobody knows.
            usable = per_link + unpriced if limited else per_link
            self._offer_family(columns, usable, padded, worth, allowed, interested[~spends])
            for i in interested[spends]:
                dearer = usable + (money[i] if money is not None else 0.0) * network.assumed_price
                self._offer_family(columns, dearer, padded, worth, allowed, np.array([i]))
        return len(columns) - before

    def _offer_family(
        self,
        columns: Columns,
        per_link: FloatArray,
        weights: FloatArray,
        worth: FloatArray,
        allowed: Allowed,
        family: IntArray,
    ) -> None:
        network, groups = self.network, self.groups
        plain = family[self._plain[family]]
        others = [int(i) for i in family[~self._plain[family]]]
        feeders = set(self._from[plain].tolist())
        for i in others:
            head = groups[i].head
            places = head.sources + (head.targets if len(head.targets) > 1 else ())
            feeders.update(network.sites[p.site] for p in places if p.site in network.sites)
        if not feeders:
            return
        search = self.searcher.search(per_link, sorted(feeders), allowed, self.max_relays)
        rows = np.zeros(len(network.sites), dtype=np.int64)
        rows[list(search.rows)] = list(search.rows.values())
        weight = search.distance[-1][self._to[plain], rows[self._from[plain]]]
        weight = (
            weight + weights[self.tenant[plain]] + weights[self._read[plain]] + weights[self._write[plain]]
        )
        for i in plain[weight < worth[plain] * (1 - ENTER) - ENTER].tolist():
            head = groups[i].head
            route = search.route(int(self._from[i]), int(self._to[i]))
            columns.add(i, ((head.sources[0], head.targets[0], route),))
        for i in others:
            total, branches = self.searcher.cheapest(search, groups[i], weights)
            if branches and total + weights[self.tenant[i]] < worth[i] * (1 - ENTER) - ENTER:
                columns.add(i, branches)


def _endpoint(network: Network, group: Group, side: str) -> int:
    """The resource of the first source's or target's endpoint; one past the last resource when it has none."""
    place = group.head.sources[0] if side == "read" else group.head.targets[0]
    base = network.read_base if side == "read" else network.write_base
    return (network.place_resources(place, base) or [network.resource_count])[0]


class Bins(NamedTuple):
    """Pieces of concave utilities of units: the first Gbit/s are worth most."""

    unit: IntArray
    width: FloatArray
    slope: FloatArray


NO_BINS = Bins(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))


class FlowProgram:
    """Rates now, for all groups together.

    Args:
        columns: Routes known so far; more are added while solving.
        pricer: Finds further routes; None keeps to the known ones.
        capacity: Of each resource, in Gbit/s.
        ceiling: Most that each group can use.
        unit: The unit of fairness of each group.
        unit_weight: Weight of each unit.
        effort: Iterations that may be spent.
        bins: Utilities of units, for stages that maximise them.
        boxed: Give each variable an upper bound, a little above what its group's row lets it have: then every
            basis is a place where the dual simplex can begin, with new routes among the variables and the work
            stopped at any step. Interior and primal solves are slower with them.
    """

    def __init__(
        self,
        columns: Columns,
        pricer: Pricer | None,
        capacity: FloatArray,
        ceiling: FloatArray,
        unit: IntArray,
        unit_weight: FloatArray,
        effort: Effort,
        bins: Bins | None = None,
        boxed: bool = False,
    ) -> None:
        bins = NO_BINS if bins is None else bins
        self.bins = bins
        self.columns, self.pricer, self.ceiling, self.unit = columns, pricer, ceiling, unit
        self.unit_weight, self.effort = unit_weight, effort
        groups = columns.groups
        self.resource_rows = columns.network.resource_count
        self.group_rows = self.resource_rows + np.arange(len(groups))
        self.unit_rows = self.resource_rows + len(groups) + np.arange(len(unit_weight))
        self.limited = np.array(
            [i for i, g in enumerate(groups) if g.cost_limit_usd is not None], dtype=np.int64
        )
        self.mean_price = np.array(
            [(groups[i].cost_limit_usd or 0.0) / groups[i].gigabits for i in self.limited]
        )
        money_base = self.resource_rows + len(groups) + len(unit_weight)
        self.money_row = np.full(len(groups), -1, dtype=np.int64)
        self.money_row[self.limited] = money_base + np.arange(len(self.limited))
        self.floor = np.zeros(len(groups))
        self.unit_floor = np.full(len(unit_weight), -math.inf)
        nothing = np.full(len(self.limited), -math.inf)
        self.solver = Solver(
            np.concatenate([np.full(self.resource_rows, -math.inf), self.floor, self.unit_floor, nothing]),
            np.concatenate(
                [capacity, ceiling, np.full(len(unit_weight), math.inf), np.zeros(len(self.limited))]
            ),
            effort,
        )  # fmt: skip
        self.level_in = np.zeros(len(unit_weight), dtype=bool)
        self._added = 0
        self._boxed, self._capacity = boxed, capacity
        self.first = 1 + len(groups) + len(bins.unit)
        self.solver.add_columns(
            np.zeros(self.first), np.zeros(self.first),
            np.concatenate([[0.0 if boxed else math.inf], np.zeros(len(groups)), bins.width]),
            np.concatenate([[0], np.arange(len(groups) + len(bins.unit))]),
            np.concatenate([self.group_rows, self.unit_rows[bins.unit]]),
            np.concatenate([np.ones(len(groups)), -np.ones(len(bins.unit))]),
        )  # fmt: skip
        self.finished = False
        self.rates = np.zeros(0)
        self.duals = np.zeros(self.solver.row_count)

    def _add_new(
        self, value: FloatArray, price_weight: float, hop_weight: float, extra: FloatArray | None
    ) -> None:
        """Hand columns that the solver does not know yet to it, at the stage's cost."""
        columns, start = self.columns, self._added
        count = len(columns) - start
        if not count:
            return
        group = columns.group(start)
        at, resources, counts = columns.incidence(start)
        every = np.arange(count)
        price = columns.price(start)
        parts = [(at, resources, counts), (every, self.group_rows[group], np.ones(count))]
        in_unit = self.unit[group] >= 0
        parts.append((every[in_unit], self.unit_rows[self.unit[group][in_unit]], np.ones(int(in_unit.sum()))))
        spends = self.money_row[group] >= 0
        if spends.any():
            mean = np.zeros(len(columns.groups))
            mean[self.limited] = self.mean_price
            over = price[spends] - mean[group[spends]]
            parts.append((every[spends], self.money_row[group[spends]], over))
        col = np.concatenate([p[0] for p in parts])
        row = np.concatenate([p[1] for p in parts])
        values = np.concatenate([p[2] for p in parts])
        order = np.lexsort((row, col))
        starts = np.searchsorted(col[order], np.arange(count))
        costs = price * price_weight + columns.hops(start) * hop_weight - value[group]
        if extra is not None:
            known = extra[start : start + count]
            costs[: len(known)] += known
        most = np.full(count, math.inf)
        if self._boxed:
            most = np.minimum(self.ceiling[group], columns.bottleneck(self._capacity)[start:]) * BOX
        self.solver.add_columns(costs, np.zeros(count), most, starts, row[order], values[order])
        self._added = len(columns)

    def solve(
        self,
        *,
        level: bool = False,
        shortfall: FloatArray | None = None,
        value: FloatArray | None = None,
        price_weight: float = 0.0,
        hop_weight: float = 0.0,
        extra: FloatArray | None = None,
        method: str = "primal",
        first_basis: tuple[IntArray, IntArray] | None = None,
        rounds: int = MAX_PRICING_ROUNDS,
        at_most: int | None = None,
        polish: int | None = None,
    ) -> FloatArray:
        """Rates of all columns at the optimum over all routes, for one stage's objective.

        Args:
            level: Maximise the level.
            shortfall: Cost of each group's shortfall.
            value: Worth of a unit of rate to each group.
            price_weight: Cost of a dollar a second.
            hop_weight: Cost of a link used.
            extra: Added to the costs of the first columns.
            method: How to begin, as `Solver.run` takes it.
            first_basis: Where to start from, as `Solver.start_from` takes it.
            rounds: How often routes are looked for.
            at_most: Iterations after which to stop; `finished` tells, and rates are then within no bounds.
            polish: The same for what comes after the first optimum, where rates keep to the bounds wherever it stops.
        """
        network = self.columns.network
        groups = len(self.columns.groups)
        value = np.zeros(groups) if value is None else value
        short = np.zeros(groups) if shortfall is None else shortfall
        self._add_new(value, price_weight, hop_weight, extra)
        column_costs = self.columns.price() * price_weight + self.columns.hops() * hop_weight
        column_costs -= value[self.columns.group()]
        if extra is not None:
            column_costs[: len(extra)] += extra
        self.solver.set_costs(
            np.concatenate([[-1.0 if level else 0.0], short, -self.bins.slope, column_costs])
        )
        if first_basis is not None:
            self.solver.start_from(*first_basis)
        link_costs = network.assumed_price * price_weight + hop_weight
        self.finished = False
        while True:
            point, self.duals = self.solver.run(method, polish if self.finished else at_most)
            optimal, self.finished = self.solver.finished, self.finished or self.solver.finished
            method = "primal"
            self.level, self.short = float(point[LEVEL]), point[1 : 1 + groups]
            self.rates = point[self.first :]
            rounds -= 1
            if rounds < 0 or not optimal or self.pricer is None or not self._price(value, link_costs):
                break
            self._add_new(value, price_weight, hop_weight, None)
        return self.rates

    def _price(self, value: FloatArray, link_costs: FloatArray) -> int:
        assert self.pricer is not None
        weights = np.maximum(-self.duals[: self.resource_rows], 0.0)
        worth = value + self.duals[self.group_rows]
        in_unit = self.unit >= 0
        worth[in_unit] += self.duals[self.unit_rows][self.unit[in_unit]]
        money = None
        if len(self.limited):
            money = np.zeros(len(worth))
            money[self.limited] = np.maximum(-self.duals[self.money_row[self.limited]], 0.0)
            worth[self.limited] += money[self.limited] * self.mean_price
        return self.pricer.offer(self.columns, weights, link_costs, worth, money)

    def group_rates(self) -> FloatArray:
        """Each group's rate at the last optimum."""
        return sum_by(self.columns.group()[: len(self.rates)], self.rates, len(self.columns.groups))

    def set_floors(self, groups: IntArray, floors: FloatArray) -> None:
        """Least rates of some groups from now on."""
        self.floor[groups] = np.minimum(floors, self.ceiling[groups])
        self.solver.set_row_bounds(self.group_rows[groups], self.floor[groups], self.ceiling[groups])

    def set_unit_floors(self, units: IntArray, floors: FloatArray) -> None:
        """Least totals of some units from now on."""
        self.unit_floor[units] = floors
        self.solver.set_row_bounds(self.unit_rows[units], floors, np.full(len(units), math.inf))

    def join_level(self, units: IntArray) -> None:
        """From now on these units get at least weight times level."""
        for unit in units.tolist():
            self.solver.set_coefficient(int(self.unit_rows[unit]), LEVEL, -float(self.unit_weight[unit]))
        self.set_unit_floors(units, np.zeros(len(units)))
        self.level_in[units] = True

    def leave_level(self, units: IntArray, floors: FloatArray) -> None:
        """From now on these units get at least their floors, whatever the level."""
        for unit in units.tolist():
            self.solver.set_coefficient(int(self.unit_rows[unit]), LEVEL, 0.0)
        self.set_unit_floors(units, floors)
        self.level_in[units] = False

    def allow_shortfall(self, groups: IntArray, most: FloatArray) -> None:
        """How far the rate of some groups may stay below their floors."""
        if self._boxed:
            most = np.minimum(most, self.floor[groups] * BOX)
        self.solver.set_column_bounds(1 + groups, np.zeros(len(groups)), most)
