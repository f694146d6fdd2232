"""The planner's parts by themselves: windows over clock changes, trees, searches, groups, the greedy fill."""

from __future__ import annotations

import itertools
import math
import random
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from flowengine.plan import Allowed, Cap, Demand, Estimate, Link, Overlay, Place, Site, Window, routes
from flowengine.plan.demands import group_demands
from flowengine.plan.greedy import fill
from flowengine.plan.network import Network
from flowengine.plan.routes import Columns, Searcher, cheapest_tree
from flowengine.plan.solver import Effort, EffortSpent, Infeasible, Solver
from flowengine.plan.topology import cap_at, window_edges

BERLIN = ZoneInfo("Europe/Berlin")


def instant(text, zone=BERLIN):
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def at(hours_minutes):
    hours, minutes = hours_minutes.split(":")
    return int(hours) * 60 + int(minutes)


@pytest.mark.parametrize(
    ("start", "end", "weekdays", "day"),
    [
        ("02:30", "05:00", (), "2026-03-28"),  # opens in the hour that is skipped
        ("01:00", "02:15", (), "2026-10-24"),  # closes in the hour that comes twice
        ("02:15", "02:45", (), "2026-10-24"),  # is there twice
        ("22:00", "06:00", (4,), "2026-03-27"),  # a Friday night
        ("00:00", "24:00", (5, 6), "2026-03-27"),
        ("08:00", "18:00", (), "2026-06-01"),
    ],
)
def test_edges_of_a_window_are_where_the_wall_clock_says(start, end, weekdays, day):
    window = Window(zone=BERLIN, start_minute=at(start), end_minute=at(end), weekdays=frozenset(weekdays))
    begin = instant(f"{day} 12:00")
    minutes = [begin + 60 * k for k in range(3 * 24 * 60)]
    inside = [window.contains(m) for m in minutes]
    expected = [m for m, before, now in zip(minutes[1:], inside, inside[1:], strict=False) if before != now]
    assert window_edges(window, begin, minutes[-1] + 1) == expected
    assert expected


def test_a_window_that_no_clock_shows_is_refused():
    with pytest.raises(ValueError, match="minutes 0 and 1440"):
        Window(zone=UTC, start_minute=1440)


def test_the_tightest_cap_that_holds_now_counts():
    day = Window(zone=ZoneInfo("Asia/Shanghai"), start_minute=at("08:00"), end_minute=at("18:00"))
    caps = (Cap(rate_bits_per_s=5e9), Cap(rate_bits_per_s=2e9, window=day))
    noon = instant("2026-03-02 12:00", ZoneInfo("Asia/Shanghai"))
    assert cap_at(caps, noon) == 2e9
    assert cap_at(caps, noon + 8 * 3600) == 5e9
    assert cap_at((), noon) == math.inf


def trees(nodes, edges):
    """Every spanning arborescence from 0, by brute force."""
    options = [[a for (a, b) in edges if b == node] for node in range(1, nodes)]
    for parents in itertools.product(*options):
        chosen = dict(enumerate(parents, start=1))
        reached = {0}
        for _ in range(nodes):
            reached |= {n for n, p in chosen.items() if p in reached}
        if len(reached) == nodes:
            yield chosen


def test_the_cheapest_tree_is_the_cheapest_of_all():
    for seed in range(300):
        rng = random.Random(seed)
        nodes = rng.randint(2, 5)
        edges = {
            (a, b): rng.randint(1, 9)
            for a in range(nodes)
            for b in range(1, nodes)
            if a != b and rng.random() < 0.7
        }
        costs = [sum(edges[p, n] for n, p in tree.items()) for tree in trees(nodes, edges)]
        found = cheapest_tree(nodes, edges)
        if not costs:
            assert found is None, seed
        else:
            assert found is not None, seed
            assert sum(edges[p, n] for n, p in found.items()) == min(costs), seed
            assert found in list(trees(nodes, edges)), seed


def small_network(seed):
    rng = random.Random(seed)
    names = [f"s{i}" for i in range(6)]
    links = tuple(
        Link(source=a, target=b, estimate=Estimate(rate_bits_per_s=1e9))
        for a, b in itertools.permutations(names, 2)
        if rng.random() < 0.5
    )
    return Network(Overlay(sites=tuple(Site(name=n) for n in names), links=links)), rng


def test_searched_routes_are_the_lightest_of_all(monkeypatch):
    for seed in range(40):
        network, rng = small_network(seed)
        weights = np.array([rng.choice([0.0, 1.0, 2.0, 5.0]) for _ in network.links])
        relays = frozenset(rng.sample(sorted(network.sites), 4))
        allowed = Allowed(relays=relays)
        found = []
        for least in (0, 1_000_000):  # link by link of each site, and all links of all sites at once
            monkeypatch.setattr(routes, "_RANK_AT_ONCE", least)
            found.append(Searcher(network).search(weights, list(range(6)), allowed, 2))
        search = found[0]
        for one, other in zip(search.distance, found[1].distance, strict=True):
            assert one.tobytes() == other.tobytes()
        for source, target in itertools.permutations(range(6), 2):
            best = math.inf
            for count in range(3):
                for middle in itertools.permutations(
                    [s for s in range(6) if s not in (source, target)], count
                ):
                    if not {f"s{m}" for m in middle} <= relays:
                        continue
                    hops = list(itertools.pairwise((source, *middle, target)))
                    numbers = [network.links.get(f"s{a}→s{b}") for a, b in hops]
                    if None not in numbers:
                        best = min(best, float(weights[numbers].sum()))
            assert search.weight(source, target) == pytest.approx(best, abs=1e-6), seed
            if best < math.inf:
                route = list(search.route(source, target))
                assert weights[route].sum() == pytest.approx(best, abs=1e-6)
                sites = [source, *network.link_target[route].tolist()]
                assert len(set(sites)) == len(sites)


def demands(count, **fields):
    return tuple(
        Demand(id=f"d{i}", sources=(Place("a"),), targets=(Place("b"),), remaining_bytes=10**9, **fields)
        for i in range(count)
    )


def test_demands_group_exactly_or_by_stricter_deadlines():
    equal = demands(100)
    groups, coarseness = group_demands(equal, 10, 0.0)
    assert (len(groups), coarseness) == (1, 0)
    assert groups[0].gigabits == pytest.approx(800.0)
    spread = tuple(
        Demand(
            id=f"d{i}",
            sources=(Place("a"),),
            targets=(Place("b"),),
            remaining_bytes=1,
            deadline_s=86400.0 + i * 10,
        )
        for i in range(100)
    )
    groups, coarseness = group_demands(spread, 10, 0.0)
    assert (len(groups), coarseness) == (4, 1)
    assert all(g.deadline_s <= spread[m].deadline_s for g in groups for m in g.members)
    assert sorted(m for g in groups for m in g.members) == list(range(100))


def test_greedy_filling_is_fair_on_one_link_and_keeps_what_was_given():
    overlay = Overlay(
        sites=(Site(name="a"), Site(name="b")),
        links=(Link(source="a", target="b", estimate=Estimate(rate_bits_per_s=9e9)),),
    )
    network = Network(overlay, ("",))
    groups, _ = group_demands(tuple(d for k in (1.0, 2.0) for d in demands(1, weight=k)), 10, 0.0)
    columns = Columns(network, groups)
    for group in range(2):
        columns.add(group, ((Place("a"), Place("b"), (0,)),))
    capacity, both = network.capacity_at(0.0), np.array([0, 1])
    weight = np.array([1.0, 2.0])
    rates = fill(columns, capacity, np.array([50.0, 50.0]), weight, [both])
    assert rates == pytest.approx([3.0, 6.0])
    rates = fill(columns, capacity, np.array([50.0, 2.0]), weight, [both])
    assert rates == pytest.approx([7.0, 2.0])
    rates = fill(columns, capacity, np.array([50.0, 50.0]), weight, [both[1:]], np.array([5.0, 0.0]))
    assert rates == pytest.approx([5.0, 4.0])


def test_the_solver_counts_its_effort_and_stops():
    effort = Effort(5)
    solver = Solver(np.array([1.0]), np.array([2.0]), effort)
    solver.add_columns(
        np.array([-1.0]), np.zeros(1), np.array([math.inf]), np.array([0]), np.array([0]), np.ones(1)
    )
    values, _ = solver.run("dual")
    assert values[0] == pytest.approx(2.0)
    assert effort.spent >= 1
    solver.set_row_bounds(np.array([0]), np.array([3.0]), np.array([4.0]))
    solver.set_column_bounds(np.array([0]), np.zeros(1), np.ones(1))
    with pytest.raises(Infeasible):
        solver.run("dual")
    effort.left = 0
    with pytest.raises(EffortSpent):
        solver.run("dual")
