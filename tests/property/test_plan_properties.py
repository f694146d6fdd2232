"""Plans against a brute-force oracle, and against every limit, on random small cases."""

from __future__ import annotations

import pytest
from plan_oracle import Oracle, random_case

from flowengine.plan import Limits, plan

NO_FLOORS = Limits(starvation_share=0.0)


def unit_totals(made, demands):
    totals = {}
    for demand, entry in zip(demands, made.demands, strict=True):
        unit = demand.priority, demand.tenant
        totals[unit] = totals.get(unit, 0.0) + entry.rate_bits_per_s / 1e9
    return totals


def check_against_oracle(seed):
    overlay, demands = random_case(seed)
    made = plan(overlay, demands, None, 0.0, limits=NO_FLOORS)
    assert made.method == "exact", f"seed {seed}: {made.method}"
    oracle = Oracle(overlay, demands, NO_FLOORS.max_relays)
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
    for seed in range(150):
        check_against_oracle(seed)


@pytest.mark.full
def test_many_small_plans_are_what_brute_force_finds():
    for seed in range(1000, 3000):
        check_against_oracle(seed)
