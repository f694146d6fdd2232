"""A second opinion on small plans: all routes listed, a simplex of its own, fairness by its definition.

Shares no code with the planner beyond the data classes, and no solver with it: a dense tableau with Bland's
rule in two phases, slow and plain.
"""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np

from flowengine.plan import (
    Allowed,
    Cap,
    Demand,
    Endpoint,
    Estimate,
    Link,
    Overlay,
    Place,
    Priority,
    Site,
    Tenant,
)

EPSILON = 1e-9


def maximise(cost, upper_rows, upper, lower_rows=(), lower=()):
    """Largest cost·x over x >= 0, upper_rows x <= upper, lower_rows x >= lower; None when there is no such x."""
    rows = [*[list(r) for r in upper_rows], *[[-v for v in r] for r in lower_rows]]
    bound = [*upper, *[-v for v in lower]]
    n, m = len(cost), len(rows)
    table = np.zeros((m, n + m + 1))
    for i in range(m):
        table[i, :n], table[i, n + i], table[i, -1] = rows[i], 1.0, bound[i]
    basis = [n + i for i in range(m)]
    if min(bound, default=0.0) < 0:
        # Phase one: one artificial column that enters at the worst row.
        table = np.insert(table, n + m, -1.0, axis=1)
        worst = int(np.argmin(table[:, -1]))
        _pivot(table, basis, worst, n + m)
        goal = np.zeros(n + m + 1)
        goal[n + m] = -1.0
        _climb(table, basis, goal)
        value = sum(table[i, -1] for i in range(m) if basis[i] == n + m)
        if value > 1e-7:
            return None
        for i in range(m):
            if basis[i] == n + m:
                options = [j for j in range(n + m) if abs(table[i, j]) > 1e-7]
                if options:
                    _pivot(table, basis, i, options[0])
        table = np.delete(table, n + m, axis=1)
        keep = [i for i in range(m) if basis[i] != n + m]
        table, basis = table[keep], [basis[i] for i in keep]
    goal = np.zeros(n + m)
    goal[:n] = cost
    _climb(table, basis, goal)
    x = np.zeros(n + m)
    for i, j in enumerate(basis):
        x[j] = table[i, -1]
    return float(np.dot(cost, x[:n])), x[:n]


def _pivot(table, basis, row, column):
    table[row] /= table[row, column]
    for i in range(len(table)):
        if i != row and table[i, column] != 0.0:
            table[i] -= table[i, column] * table[row]
    basis[row] = column


def _climb(table, basis, goal):
    while True:
        prices = goal[basis] @ table[:, :-1]
        gains = goal - prices
        entering = next((j for j in range(len(goal)) if gains[j] > 1e-8), None)
        if entering is None:
            return
        ratios = [
            (table[i, -1] / table[i, entering], basis[i], i)
            for i in range(len(table))
            if table[i, entering] > EPSILON
        ]
        assert ratios, "the program has no bound"
        least = min(r[0] for r in ratios)
        row = min((b, i) for r, b, i in ratios if r <= least + 1e-12)[1]
        _pivot(table, basis, row, entering)


def routes(overlay, demand, max_relays):
    """Every loop-free allowed route of a demand with one target, as links."""
    limit = max_relays if demand.allowed.max_relays is None else min(max_relays, demand.allowed.max_relays)
    links = [x for x in overlay.links if demand.allowed.links is None or x.label in demand.allowed.links]
    if demand.cost_limit_usd is not None:
        links = [x for x in links if x.usd_per_gb is not None]
    target = demand.targets[0].site
    found = []

    def walk(at, path, seen):
        for link in links:
            if link.source != at or link.target in seen:
                continue
            if link.target == target:
                found.append((place, (*path, link)))
            elif len(path) < limit and (
                demand.allowed.relays is None or link.target in demand.allowed.relays
            ):
                walk(link.target, (*path, link), seen | {link.target})

    for place in demand.sources:
        if place.site != target:
            walk(place.site, (), {place.site})
    return found


def columns(overlay, demand, max_relays):
    """Every way to serve all targets: links with repeats, places read from, places written to.

    One target has routes. Several have trees over the source and the targets, each branch being any route; where the source
    shall send each byte once, only those that leave it as few times as any can.
    """
    new = msgspec.structs.replace
    targets = demand.targets
    if len(targets) == 1:
        return [(r, (p,), targets) for p, r in routes(overlay, demand, max_relays)]
    open_links = tuple(x for x in overlay.links if _open(overlay, x))
    overlay = new(overlay, links=open_links)
    branches = {}
    for target in targets:
        branches[None, target] = routes(overlay, new(demand, targets=(target,)), max_relays)
        for feeder in targets:
            pair = feeder.site, target.site
            if feeder != target and (demand.allowed.feeds is None or pair in demand.allowed.feeds):
                one = new(demand, sources=(feeder,), targets=(target,))
                branches[feeder, target] = routes(overlay, one, max_relays)
    trees = []
    for parents in itertools.product((None, *targets), repeat=len(targets)):
        parent = dict(zip(targets, parents, strict=True))
        if all((p, t) in branches and branches[p, t] for t, p in parent.items()) and _rooted(parent):
            trees.append(parent)
    if demand.source_once and trees:
        fewest = min(sum(p is None for p in tree.values()) for tree in trees)
        trees = [tree for tree in trees if sum(p is None for p in tree.values()) == fewest]
    found = []
    for tree in trees:
        for chosen in itertools.product(*(branches[p, t] for t, p in tree.items())):
            links = tuple(link for _, route in chosen for link in route)
            found.append((links, tuple(place for place, _ in chosen), targets))
    return found


def _open(overlay, link):
    sites = {s.name: s for s in overlay.sites}
    caps = (*link.caps, *sites[link.source].caps_out, *sites[link.target].caps_in)
    return min([link.estimate.rate_bits_per_s, *(c.rate_bits_per_s for c in caps)]) > 0


def _rooted(parent):
    for target in parent:
        seen = set()
        while target is not None:
            if target in seen:
                return False
            seen.add(target)
            target = parent[target]
    return True


class Oracle:
    """The program over all routes, with rows for every limit; rates in Gbit/s, no windows."""

    def __init__(self, overlay, demands, max_relays, quantum_s=1.0):
        self.overlay, self.demands = overlay, demands
        self.columns = [(i, *way) for i, d in enumerate(demands) for way in columns(overlay, d, max_relays)]
        self.rows, self.bounds = [], []
        n = len(self.columns)

        def limit(bound, uses):
            self.rows.append([uses(i, r, p, w) for i, r, p, w in self.columns])
            self.bounds.append(bound)

        for link in overlay.links:
            rate = min([link.estimate.rate_bits_per_s, *(c.rate_bits_per_s for c in link.caps)])
            limit(rate / 1e9, lambda i, r, p, w, link=link: float(r.count(link)))
        for site in overlay.sites:
            for cap in site.caps_out:
                limit(
                    cap.rate_bits_per_s / 1e9,
                    lambda i, r, p, w, s=site: float(sum(x.source == s.name for x in r)),
                )
            for cap in site.caps_in:
                limit(
                    cap.rate_bits_per_s / 1e9,
                    lambda i, r, p, w, s=site: float(sum(x.target == s.name for x in r)),
                )
        for endpoint in overlay.endpoints:
            where = Place(endpoint.site, endpoint.name)
            for cap in endpoint.caps_read:
                limit(cap.rate_bits_per_s / 1e9, lambda i, r, p, w, at=where: float(p.count(at)))
            for cap in endpoint.caps_write:
                limit(cap.rate_bits_per_s / 1e9, lambda i, r, p, w, at=where: float(w.count(at)))
        for tenant in overlay.tenants:
            for cap in tenant.caps:
                limit(
                    cap.rate_bits_per_s / 1e9, lambda i, r, p, w, t=tenant: float(demands[i].tenant == t.name)
                )
        for k, demand in enumerate(demands):
            most = demand.remaining_bytes * 8e-9 / quantum_s
            if demand.max_rate_bits_per_s is not None:
                most = min(most, demand.max_rate_bits_per_s / 1e9)
            limit(most, lambda i, r, p, w, k=k: float(i == k))
            if demand.cost_limit_usd is not None:
                mean = demand.cost_limit_usd / (demand.remaining_bytes / 1e9)
                limit(
                    0.0,
                    lambda i, r, p, w, k=k, mean=mean: (
                        (sum(x.usd_per_gb for x in r) - mean) if i == k else 0.0
                    ),
                )
        self.zero = [0.0] * n

    def totals(self):
        """Each (class, tenant)'s total by the definition of lexicographic max-min."""
        weight = {t.name: t.weight for t in self.overlay.tenants}
        fixed = {}
        if not self.columns:
            return fixed
        routed = {i for i, *_ in self.columns}
        for priority in Priority:
            units = sorted(
                {d.tenant for i, d in enumerate(self.demands) if d.priority == priority and i in routed}
            )
            active = set(units)
            while active:
                # One more variable, the level.
                rows = [[*r, 0.0] for r in self.rows]
                lower = [[*self._unit(u), 0.0] for u in fixed]
                lower += [[*self._unit((priority, t)), -weight.get(t, 1.0)] for t in sorted(active)]
                least = [max(v - 1e-7, 0.0) for v in fixed.values()] + [0.0] * len(active)
                level, _ = maximise([*self.zero, 1.0], rows, self.bounds, lower, least)
                stuck = set()
                for tenant in sorted(active):
                    others = [self._unit(u) for u in fixed] + [
                        self._unit((priority, t)) for t in sorted(active)
                    ]
                    floor = [max(v - 1e-7, 0.0) for v in fixed.values()]
                    floor += [max(level * weight.get(t, 1.0) - 1e-7, 0.0) for t in sorted(active)]
                    most, _ = maximise(self._unit((priority, tenant)), self.rows, self.bounds, others, floor)
                    if most <= level * weight.get(tenant, 1.0) + 1e-5:
                        stuck.add(tenant)
                assert stuck, "somebody is always stuck"
                for tenant in stuck:
                    fixed[priority, tenant] = level * weight.get(tenant, 1.0)
                active -= stuck
        return fixed

    def _unit(self, unit):
        return [float((self.demands[i].priority, self.demands[i].tenant) == unit) for i, *_ in self.columns]

    def cheapest(self, rates):
        """Least dollars a second at which demands can have these rates in Gbit/s; unknown prices at the dearest."""
        known = [x.usd_per_gb for x in self.overlay.links if x.usd_per_gb is not None]
        dearest = max(known, default=0.0)
        cost = [
            sum(dearest if x.usd_per_gb is None else x.usd_per_gb for x in r) / 8
            for _, r, _, _ in self.columns
        ]
        lower = [[float(i == k) for i, *_ in self.columns] for k in range(len(rates))]
        found = maximise(
            [-c for c in cost], self.rows, self.bounds, lower, [max(r - 1e-6, 0.0) for r in rates]
        )
        return None if found is None else -found[0]


def random_case(seed, *, sites_up_to=6):
    """An overlay and demands, all from one seed."""
    rng = random.Random(seed)
    names = [f"s{i}" for i in range(rng.randint(2, sites_up_to))]

    def caps(chance):
        return (Cap(rate_bits_per_s=rng.randint(1, 12) * 1e9),) if rng.random() < chance else ()

    sites = tuple(Site(name=n, caps_in=caps(0.3), caps_out=caps(0.3)) for n in names)
    links = [
        Link(
            source=a,
            target=b,
            estimate=Estimate(rate_bits_per_s=rng.randint(0, 10) * 1e9, spread=rng.choice([0.0, 0.1])),
            usd_per_gb=rng.choice([None, 0.0, 0.01, 0.02, 0.09]),
            caps=caps(0.1),
        )
        for a, b in itertools.permutations(names, 2)
        if rng.random() < 0.55
    ]
    if links and rng.random() < 0.3:
        twin = rng.choice(links)
        links.append(
            Link(
                source=twin.source, target=twin.target, name="second", estimate=Estimate(rate_bits_per_s=2e9)
            )
        )
    endpoints = tuple(
        Endpoint(name="disk", site=n, caps_read=caps(0.5), caps_write=caps(0.5)) for n in names[:2]
    )
    tenants = tuple(Tenant(name=t, weight=rng.choice([1.0, 2.0, 0.5]), caps=caps(0.2)) for t in "ab")
    demands = []
    for k in range(rng.randint(1, 5)):
        source, target = rng.sample(names, 2)
        extra = [n for n in names if n not in (source, target)]
        sources = [Place(source, "disk" if rng.random() < 0.3 else "")]
        if extra and rng.random() < 0.25:
            sources.append(Place(rng.choice(extra)))
        allowed = Allowed(
            relays=frozenset(rng.sample(names, rng.randint(0, len(names)))) if rng.random() < 0.4 else None,
            links=frozenset(x.label for x in links if rng.random() < 0.8) if rng.random() < 0.3 else None,
            max_relays=rng.choice([None, None, 0, 1]),
        )
        gigabytes = rng.choice([1, 10, 100, 1000])
        demands.append(
            Demand(
                id=f"d{k}",
                sources=tuple(sources),
                targets=(Place(target, "disk" if rng.random() < 0.3 else ""),),
                remaining_bytes=gigabytes * 10**9,
                priority=rng.choice(list(Priority)),
                tenant=rng.choice("abc"),
                weight=rng.choice([1.0, 3.0]),
                cost_limit_usd=gigabytes * rng.choice([0.0, 0.01, 0.03]) if rng.random() < 0.2 else None,
                max_rate_bits_per_s=rng.choice([None, None, 3e9]),
                dataset=rng.choice(["", "x", "y"]),
                allowed=allowed,
            )
        )
    return Overlay(sites=sites, links=tuple(links), endpoints=endpoints, tenants=tenants), tuple(demands)


def tree_case(seed):
    """A small case in which most demands have several targets that may feed each other, or some of each other."""
    overlay, demands = random_case(seed, sites_up_to=5)
    rng = random.Random(seed * 11 + 3)
    names = [s.name for s in overlay.sites]
    between = list(itertools.permutations(names, 2))
    changed = []
    for demand in demands[:2]:
        others = [n for n in names if n not in {p.site for p in (*demand.sources, *demand.targets)}]
        more = rng.sample(others, min(len(others), rng.randint(1, 2)))
        feeds = frozenset(rng.sample(between, rng.randint(0, len(between)))) if rng.random() < 0.5 else None
        changed.append(
            msgspec.structs.replace(
                demand,
                targets=demand.targets + tuple(Place(n) for n in more),
                source_once=rng.random() < 0.7,
                allowed=msgspec.structs.replace(demand.allowed, feeds=feeds),
            )
        )
    return overlay, tuple(changed)
