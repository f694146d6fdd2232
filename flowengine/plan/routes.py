"""Candidate routes: the cheapest under any prices of resources, for many demands at once.

Goal: what column generation asks for, "which route would now be worth having", in a few array operations.

Plan: for all sources of demands with one allowed set, relax all links at once, hop by hop: after k rounds
`distance[k][s, v]` is the least weight from s to v over at most k links (Bellman and Ford, cut off at the hop
limit). A route is read back by asking at each site which incoming link gave the distance. A demand with
several targets gets a tree over its source and its targets, each branch being such a route: the cheapest
arborescence (Chu and Liu 1965, Edmonds 1967), with as few branches out of the source as there can be, so that
the source sends each byte once.

Invariants: weights are positive, so the cheapest walk visits no site twice; equal weights give equal routes
(the first link in overlay order wins); no route uses a link or relay outside the demand's allowed set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowengine.plan.demands import Allowed, Group, Place
from flowengine.plan.network import FloatArray, IntArray, Network, sum_by

__all__ = ["Branch", "Columns", "Search", "Searcher", "cheapest_tree"]

HOP_WEIGHT = 1e-9
Branch = tuple[Place, Place, tuple[int, ...]]
_RANK_AT_ONCE = 20_000
"""From so many distances of one rank on it is quicker to look at one link of each site at a time."""


class Columns:
    """All routes and trees known to a plan, as sparse columns over resources; grows, never shrinks."""

    def __init__(self, network: Network, groups: Sequence[Group]) -> None:
        self.network = network
        self.groups = groups
        self.branches: list[tuple[Branch, ...]] = []
        self.index: dict[tuple[int, tuple[Branch, ...]], int] = {}
        self._group: list[int] = []
        self._price: list[float] = []
        self._hops: list[int] = []
        self._resources: list[IntArray] = []
        self._counts: list[FloatArray] = []
        self._packed: tuple[IntArray, IntArray, FloatArray] | None = None

    def __len__(self) -> int:
        return len(self.branches)

    def add(self, group: int, branches: tuple[Branch, ...]) -> int | None:
        """The new column's index, None when the column is known already."""
        key = (group, branches)
        if key in self.index:
            return None
        network = self.network
        used: list[int] = []
        price, hops = 0.0, 0
        for feeder, target, links in branches:
            for link in links:
                used.extend(network.link_resources[link].tolist())
                price += float(network.assumed_price[link])
            hops += len(links)
            used += network.place_resources(feeder, network.read_base)
            used += network.place_resources(target, network.write_base)
        used.append(network.tenant_base + network.tenants[self.groups[group].head.tenant])
        if len(branches) == 1:
            resources, counts = np.array(sorted(used)), np.ones(len(used))
        else:
            resources, tally = np.unique(np.array(used), return_counts=True)
            counts = tally.astype(float)
            counts[resources >= network.tenant_base] = 1.0
        column = self.index[key] = len(self.branches)
        self.branches.append(branches)
        self._group.append(group)
        self._price.append(price)
        self._hops.append(hops)
        self._resources.append(resources)
        self._counts.append(counts)
        self._packed = None
        return column

    def group(self, start: int = 0) -> IntArray:
        """The group of each column."""
        return np.array(self._group[start:], dtype=np.int64)

    def price(self, start: int = 0) -> FloatArray:
        """Dollars a gigabit, unknown prices taken as the dearest known."""
        return np.array(self._price[start:], dtype=float)

    def hops(self, start: int = 0) -> FloatArray:
        """Links used."""
        return np.array(self._hops[start:], dtype=float)

    def incidence(self, start: int = 0) -> tuple[IntArray, IntArray, FloatArray]:
        """Column numbers (from 0 at `start`), resources and counts of all non-zeros, column by column."""
        if start == 0 and self._packed is not None:
            return self._packed
        resources = self._resources[start:]
        if not resources:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)
        lengths = [len(r) for r in resources]
        packed = (
            np.repeat(np.arange(len(resources)), lengths),
            np.concatenate(resources),
            np.concatenate(self._counts[start:]),
        )
        if start == 0:
            self._packed = packed
        return packed

    def usage(self, rates: FloatArray) -> FloatArray:
        """How much of each resource the rates take."""
        columns, resources, counts = self.incidence()
        return sum_by(resources, rates[columns] * counts, self.network.resource_count)

    def bottleneck(self, capacity: FloatArray) -> FloatArray:
        """What each column could carry alone within `capacity`."""
        columns, resources, counts = self.incidence()
        narrowest = np.full(len(self), math.inf)
        np.minimum.at(narrowest, columns, capacity[resources] / counts)
        return narrowest


@dataclass(frozen=True, slots=True)
class Search:
    """Distances from some sites under some weights, and the routes behind them.

    Attributes:
        rows: The number of each source.
        distance: Least weights over at most 0, 1, 2… links, sites by sources.
    """

    searcher: Searcher
    weights: FloatArray
    relay_weights: FloatArray
    rows: dict[int, int]
    distance: tuple[FloatArray, ...]

    def weight(self, source: int, target: int) -> float:
        """Least weight from a source to a target, infinity when there is no route."""
        return float(self.distance[-1][target, self.rows[source]])

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """The links of the lightest route, in order. Only call it when `weight` is finite."""
        row = self.rows[source]
        links: list[int] = []
        at = target
        level = len(self.distance) - 1
        while at != source:
            reached = self.distance[level][at, row]
            while level > 1 and self.distance[level - 1][at, row] == reached:
                level -= 1
            into = self.searcher.links_into(at)
            weights = self.weights if level == 1 else self.relay_weights
            before = self.distance[level - 1][self.searcher.network.link_source[into], row] + weights[into]
            link = int(into[int(np.argmin(before))])
            links.append(link)
            at = int(self.searcher.network.link_source[link])
            level -= 1
        return tuple(reversed(links))


class Searcher:
    """Finds lightest routes in one network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._order: IntArray = np.argsort(network.link_target, kind="stable")
        targets = network.link_target[self._order]
        self._heads, self._starts = np.unique(targets, return_index=True)
        self._ends = np.append(self._starts[1:], len(targets))[: len(self._starts)]
        self._into = {
            int(site): self._order[start:end]
            for site, start, end in zip(self._heads, self._starts, self._ends, strict=True)
        }
        self._sources = network.link_source[self._order]
        counts = self._ends - self._starts
        # Sites with many links first, so that those that have a link of some rank are the first so many.
        by_degree = np.argsort(-counts, kind="stable")
        self._ranked_heads = self._heads[by_degree]
        self._ranks = [
            self._starts[by_degree[: np.count_nonzero(counts > rank)]] + rank
            for rank in range(int(counts.max(initial=0)))
        ]

    def links_into(self, site: int) -> IntArray:
        """Links that end at a site, in overlay order."""
        return self._into[site]

    def search(
        self, weights: FloatArray, sources: Sequence[int], allowed: Allowed, max_relays: int
    ) -> Search:
        """Lightest routes from each source to every site.

        Args:
            weights: A positive weight for each link; infinity bars it.
            sources: Site indices, each once.
            allowed: Links and relays that may be used.
            max_relays: Most sites in between.
        """
        network = self.network
        links, relays = network.masks(allowed)
        limit = max_relays if allowed.max_relays is None else min(max_relays, allowed.max_relays)
        weights = np.where(links, weights + HOP_WEIGHT, math.inf)
        relay_weights = np.where(relays[network.link_source], weights, math.inf) if len(weights) else weights
        # Sites by sources: what a link gathers is one run of memory.
        first = np.full((len(network.sites), len(sources)), math.inf)
        first[np.array(sources, dtype=np.int64), np.arange(len(sources))] = 0.0
        distance = [first]
        rows = {site: row for row, site in enumerate(sources)}
        if len(weights):
            row_of = np.full(len(network.sites), -1, dtype=np.int64)
            row_of[list(rows)] = list(rows.values())
            direct = first.copy()
            mine = np.flatnonzero(row_of[network.link_source] >= 0)
            np.minimum.at(
                direct, (network.link_target[mine], row_of[network.link_source[mine]]), weights[mine]
            )  # fmt: skip
            distance.append(direct)
        ordered = relay_weights[self._order]
        for _ in range(limit if len(weights) else 0):
            distance.append(self._one_link_further(distance[-1], ordered))
        return Search(self, weights, relay_weights, rows, tuple(distance))

    def _one_link_further(self, distance: FloatArray, weights: FloatArray) -> FloatArray:
        """Least distances over one link more.

        Args:
            distance: Of sites by sources.
            weights: Of the links, in order of their targets.
        """
        nearest = distance.copy()
        if len(weights) * distance.shape[1] < _RANK_AT_ONCE * len(self._ranks):
            reached = distance[self._sources]
            reached += weights[:, None]
            least = np.minimum.reduceat(reached, self._starts, axis=0)
            nearest[self._heads] = np.minimum(nearest[self._heads], least)
            return nearest
        # The same, link by link of each site: what is at hand at a time stays in the cache.
        least = distance[self._ranked_heads]
        for links in self._ranks:
            reached = distance[self._sources[links]]
            reached += weights[links][:, None]
            np.minimum(least[: len(links)], reached, out=least[: len(links)])
        nearest[self._ranked_heads] = least
        return nearest

    def cheapest(self, search: Search, group: Group, weights: FloatArray) -> tuple[float, tuple[Branch, ...]]:
        """The lightest column for a group and its weight; infinity and nothing when there is none.

        Args:
            search: Distances from at least all of the group's feeders.
            weights: A weight for each resource; of these only the endpoints' are used here.
        """
        network, head = self.network, group.head
        if len(head.targets) == 1:
            return self._step(search, head.sources, head.targets[0], weights)
        nodes = len(head.targets) + 1
        steps: dict[tuple[int, int], tuple[float, tuple[Branch, ...]]] = {}
        for i, target in enumerate(head.targets, start=1):
            steps[0, i] = self._step(search, head.sources, target, weights)
            for j, feeder in enumerate(head.targets, start=1):
                if head.allowed.may_feed(feeder.site, target.site) and feeder.site in network.sites:
                    steps[j, i] = self._step(search, (feeder,), target, weights)
        edges = {pair: step[0] for pair, step in steps.items() if math.isfinite(step[0])}
        heavy = 1.0 + sum(edges.values()) if head.source_once else 0.0
        parents = cheapest_tree(nodes, {(a, b): w + heavy * (a == 0) for (a, b), w in edges.items()})
        if parents is None:
            return math.inf, ()
        chosen = [(parent, child) for child, parent in sorted(parents.items())]
        return sum(edges[pair] for pair in chosen), tuple(b for pair in chosen for b in steps[pair][1])

    def _step(
        self, search: Search, feeders: Sequence[Place], target: Place, weights: FloatArray
    ) -> tuple[float, tuple[Branch, ...]]:
        network = self.network
        best: tuple[float, Place | None] = (math.inf, None)
        goal = network.sites.get(target.site)
        writing = sum(float(weights[r]) for r in network.place_resources(target, network.write_base))
        for feeder in feeders:
            origin = network.sites.get(feeder.site)
            if origin is None or goal is None or origin == goal:
                continue
            weight = search.weight(origin, goal) + writing
            weight += sum(float(weights[r]) for r in network.place_resources(feeder, network.read_base))
            if weight < best[0]:
                best = (weight, feeder)
        if best[1] is None or goal is None:
            return math.inf, ()
        return best[0], ((best[1], target, search.route(network.sites[best[1].site], goal)),)


def cheapest_tree(nodes: int, edges: dict[tuple[int, int], float]) -> dict[int, int] | None:
    """Parent of every node but the root 0 in the lightest arborescence, None when there is none.

    Chu-Liu/Edmonds: everyone takes its lightest incoming edge; a cycle is contracted and solved again.

    >>> cheapest_tree(3, {(0, 1): 9.0, (0, 2): 1.0, (2, 1): 2.0})
    {1: 2, 2: 0}
    """
    parents: dict[int, int] = {}
    for node in range(1, nodes):
        incoming = [(w, a) for (a, b), w in sorted(edges.items()) if b == node]
        if not incoming:
            return None
        parents[node] = min(incoming)[1]
    cycle = _cycle(parents)
    if cycle is None:
        return parents
    inside = set(cycle)
    # The contracted node takes the highest number, the others close ranks.
    outside = [n for n in range(nodes) if n not in inside]
    number = {n: i for i, n in enumerate(outside)}
    merged = len(outside)
    lighter: dict[tuple[int, int], float] = {}
    origin: dict[tuple[int, int], tuple[int, int]] = {}
    for (a, b), w in sorted(edges.items()):
        if a in inside and b in inside:
            continue
        cost = w - edges[parents[b], b] if b in inside else w
        pair = (number.get(a, merged), number.get(b, merged))
        if pair not in lighter or cost < lighter[pair]:
            lighter[pair], origin[pair] = cost, (a, b)
    solved = cheapest_tree(merged + 1, lighter)
    if solved is None:
        return None
    result = {n: parents[n] for n in cycle}
    for child, parent in solved.items():
        a, b = origin[parent, child]
        result[b] = a
    return dict(sorted(result.items()))


def _cycle(parents: dict[int, int]) -> list[int] | None:
    settled: set[int] = {0}
    for start in parents:
        path: list[int] = []
        node = start
        while node not in settled and node not in path:
            path.append(node)
            node = parents[node]
        if node in path:
            return path[path.index(node) :]
        settled.update(path)
    return None
