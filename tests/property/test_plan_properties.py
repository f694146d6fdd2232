"""Plans against a brute-force oracle, and against every limit, on random small cases."""

from __future__ import annotations

import random

import msgspec
import pytest
from plan_check import check_plan, rich_case
from plan_oracle import Oracle, random_case, tree_case

from flowengine.plan import DEFAULT_EFFORT, Estimate, Limits, Plan, feeds_of, plan

NO_FLOORS = Limits(starvation_share=0.0)


def unit_totals(made, demands):
    totals = {}
    for demand, entry in zip(demands, made.demands, strict=True):
        unit = demand.priority, demand.tenant
        totals[unit] = totals.get(unit, 0.0) + entry.rate_bits_per_s / 1e9
    return totals


def check_against_oracle(seed, case=random_case, limits=NO_FLOORS):
    overlay, demands = case(seed)
    made = plan(overlay, demands, None, 0.0, limits=limits)
    assert made.method == "exact", f"seed {seed}: {made.method}"
    oracle = Oracle(overlay, demands, limits.max_relays)
    expected = oracle.totals()
    got = unit_totals(made, demands)
    for unit, total in expected.items():
        assert got.get(unit, 0.0) == pytest.approx(total, rel=2e-4, abs=2e-4), f"seed {seed}: {unit}"
    price = {x.label: x.usd_per_gb for x in overlay.links}
    dearest = max((p for p in price.values() if p is not None), default=0.0)
    spent = sum(
        a.rate_bits_per_s / 8e9 * (dearest if price[name] is None else price[name])
        for a in made.allocations
        for route in a.routes
        for name in route.links
    )
    least = oracle.cheapest([e.rate_bits_per_s / 1e9 for e in made.demands])
    assert least is not None, f"seed {seed}: the oracle cannot reach these rates"
    assert spent <= least * (1 + 1e-3) + 1e-3, f"seed {seed}: {spent} dollars a second where {least} do"


@pytest.mark.slow
def test_small_plans_are_what_brute_force_finds():
    for seed in range(100):
        check_against_oracle(seed)


ONE_RELAY = Limits(starvation_share=0.0, max_relays=1)


@pytest.mark.slow
def test_small_trees_are_what_brute_force_finds():
    for seed in range(40):
        check_against_oracle(seed, tree_case, ONE_RELAY)


@pytest.mark.full
def test_many_small_trees_are_what_brute_force_finds():
    for seed in range(1000, 1500):
        check_against_oracle(seed, tree_case, ONE_RELAY)


@pytest.mark.slow
def test_feeds_serve_every_target_once_by_those_who_may():
    served = 0
    for seed in range(60):
        overlay, demands = tree_case(seed)
        made = plan(overlay, demands, None, 0.0, limits=ONE_RELAY)
        for demand in demands:
            feeds = feeds_of(made, demand.id)
            rate = made.of(demand.id).rate_bits_per_s
            assert bool(feeds) == bool(rate)
            if not feeds:
                continue
            served += 1
            assert sorted(f.target.site for f in feeds) == sorted(t.site for t in demand.targets)
            for place, feed in enumerate(feeds):
                assert 0 < feed.rate_bits_per_s <= rate
                assert (feed.sites[0], feed.sites[-1]) == (feed.feeder.site, feed.target.site)
                if feed.after is None:
                    assert feed.feeder in demand.sources
                else:
                    assert feed.after < place
                    assert feeds[feed.after].target == feed.feeder
                    assert demand.allowed.may_feed(feed.feeder.site, feed.target.site)
    assert served > 20


@pytest.mark.full
def test_many_small_plans_are_what_brute_force_finds():
    for seed in range(1000, 3000):
        check_against_oracle(seed)


def check_rich_case(seed):
    """Plan, plan again after things have changed, in a mode and with an effort that the seed chooses."""
    overlay, demands, now = rich_case(seed)
    few = 2 if seed % 4 == 0 else 2500
    limits = Limits(exact_groups=0, warm_effort=few) if seed % 3 == 0 else Limits()
    effort = 30 if seed % 5 == 0 else DEFAULT_EFFORT
    try:
        made = plan(overlay, demands, None, now, effort, limits)
        check_plan(overlay, demands, made, now, limits)
        overlay, demands, now = later(overlay, demands, made, now, seed)
        again = plan(overlay, demands, made, now, effort, limits)
        check_plan(overlay, demands, again, now, limits)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def later(overlay, demands, made, now, seed):
    """The same world after a while: bytes have moved, a link has changed, a demand has gone."""
    rng = random.Random(seed)
    seconds = rng.choice([5, 300, 5000])
    left = []
    for demand, entry in zip(demands, made.demands, strict=True):
        moved = int(entry.rate_bits_per_s / 8 * seconds)
        promised = demand.promised or entry.promise == "admitted"
        remaining = max(demand.remaining_bytes - moved, 0)
        left.append(msgspec.structs.replace(demand, remaining_bytes=remaining, promised=promised))
    if len(left) > 1 and rng.random() < 0.5:
        left.pop(rng.randrange(len(left)))
    links = list(overlay.links)
    if links and rng.random() < 0.6:
        at = rng.randrange(len(links))
        links[at] = msgspec.structs.replace(
            links[at], estimate=Estimate(rate_bits_per_s=rng.randint(0, 10) * 1e9)
        )
    return msgspec.structs.replace(overlay, links=tuple(links)), tuple(left), now + seconds


@pytest.mark.slow
def test_allocations_keep_to_every_limit():
    for seed in range(35):
        check_rich_case(seed)


@pytest.mark.full
def test_allocations_keep_to_every_limit_in_ten_thousand_cases():
    for seed in range(10_000, 20_000):
        check_rich_case(seed)


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes():
    for seed in range(5):
        overlay, demands, now = rich_case(seed)
        first = plan(overlay, demands, None, now)
        assert plan(overlay, demands, None, now).to_bytes() == first.to_bytes()
        again = plan(overlay, demands, first, now + 5).to_bytes()
        assert plan(overlay, demands, Plan.from_bytes(first.to_bytes()), now + 5).to_bytes() == again
