"""The planner on a measured grid of clouds against a maximum flow written apart."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

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
def test_plans_of_five_thousand_demands_stay_quick_and_small(bench):
    for record in bench.run_scale():
        assert record["first_cpu_s"] < 20
        assert record["links_changed"] == 1.0 or record["warm_cpu_s_median"] < 2
        assert record["peak_mib"] < 500
