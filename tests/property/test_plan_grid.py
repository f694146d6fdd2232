"""The planner on a measured grid of clouds against a maximum flow written apart."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

MOST_EFFORT = 2500 + 700 + 100
PATH = Path(__file__).resolve().parents[2] / "perf" / "plan_bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("plan_bench_under_test", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def check_pairs(bench, count, seed):
    from flowengine.plan import Limits, plan

    rows = bench.read_grid()
    overlay = bench.grid_overlay(rows)
    assert (len(overlay.sites), len(overlay.links)) == (63, 3907)
    prices = {(s, t): p for s, t, _, p in rows}
    for source, target in random.Random(seed).sample(sorted(prices), count):
        for factor in (None, 1.2):
            price = prices[source, target]
            if factor is not None and price != price:
                continue
            allowed = None if factor is None else factor * price
            money = None if allowed is None else allowed * bench.PLENTY / 1e9
            demand = bench.demand(0, source, target, cost_limit_usd=money)
            made = plan(overlay, (demand,), None, 0.0, limits=Limits(max_relays=1))
            bound = bench.flow_bound(rows, source, target, allowed)
            assert 0.98 * bound <= bench.total_gbit(made) <= bound * (1 + 1e-6), (source, target, factor)


@pytest.mark.slow
def test_random_pairs_reach_the_bound(bench):
    check_pairs(bench, 15, 7)


@pytest.mark.full
def test_five_hundred_pairs_reach_the_bound(bench):
    check_pairs(bench, 500, 8)


@pytest.mark.full
def test_plans_of_five_thousand_demands_stay_quick_and_small():
    # In a process of its own: this one may have grown by other tests.
    command = [sys.executable, "-m", "perf.plan_bench", "scale", "--inside"]
    done = subprocess.run(command, cwd=PATH.parents[1], check=True, capture_output=True, text=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records
    for record in records:
        assert record["first_cpu_s"] < 20
        assert record["warm_cpu_s_worst"] < 4, "two seconds on a machine that does nothing else"
        assert record["warm_effort_most"] <= MOST_EFFORT
        assert record["peak_mib"] < 500
        # Classes in their order: what is given up for speed is not taken from the urgent.
        assert record["warm_of_fresh_urgent"] > 0.98
        assert record["warm_gbit_per_s"] > 0.94 * record["fresh_gbit_per_s"]


@pytest.mark.slow
def test_a_plan_that_was_stopped_goes_on_in_the_next_one(bench):
    from flowengine.plan import Limits, plan

    overlay = bench.random_overlay(30, 4)
    demands = bench.random_demands(400, 30, 8, 4)
    usual, hasty = Limits(), Limits(warm_effort=120)
    made = plan(overlay, demands, None, 0.0, limits=usual)
    overlay, demands = bench.later(overlay, demands, made, 5.0, 5, 1.0)
    whole = plan(overlay, demands, made, 5.0, limits=usual)
    assert whole.method == "binned"
    first = made = plan(overlay, demands, made, 5.0, limits=hasty)
    assert first.method == "partial"
    assert first.effort_spent < whole.effort_spent
    assert bench.total_gbit(first) > 0.8 * bench.total_gbit(whole)
    for _ in range(20):
        made = plan(overlay, demands, made, 5.0, limits=hasty)
        if made.method != "partial":
            break
    assert made.method in ("binned", "steady")
    assert bench.total_gbit(made) == pytest.approx(bench.total_gbit(whole), rel=0.05)
