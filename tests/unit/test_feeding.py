"""Which targets are better served by another target: by the real planner, on pictures of three and four sites."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from flowengine.api.links import Limit
from flowengine.api.transfers import Endpoint, TransferOptions, TransferRequest
from flowengine.coordinator.planning.feeding import better_fed, possible_pairs
from flowengine.coordinator.planning.picture import Picture, SiteFacts
from flowengine.coordinator.rules.feeding import may_be_fed, source_of
from flowengine.plan import Demand, Overlay, Plan, plan
from flowengine.plan.links import LinkState

NOW = 1_790_000_000.0
MBIT = 1_000_000
Rates = dict[tuple[str, str], int]


def request(*targets: str, **more: Any) -> TransferRequest:
    ends = [Endpoint(site=name, path="/data/y") for name in targets]
    return TransferRequest(source=Endpoint(site="a", path="/data/x"), targets=ends, **more)


def feeds(
    measured: Rates, *targets: str, uplink: int = 0, usd: dict[tuple[str, str], float] | None = None
) -> dict[str, str]:
    """Who serves whom, by site, by what was measured, and what site a may send in all."""
    way_out = Limit(
        scope="site:a",
        rate_bits_per_s=uplink,
        windows=[],
        now_bits_per_s=uplink,
        changed=datetime.fromtimestamp(NOW, UTC),
        changed_by="admin",
    )
    limits = [way_out] if uplink else []
    known = {
        pair: LinkState(rate_bits_per_s=float(rate), variance=0.01, measured_s=NOW)
        for pair, rate in measured.items()
    }
    prices = {
        pair: SimpleNamespace(capacity_bits_per_s=None, rtt_ms=None, loss=None, cost_per_gb=cost)
        for pair, cost in (usd or {}).items()
    }
    sites = {name: SiteFacts(name, True, True, False) for name in ("a", *targets)}
    picture = Picture(NOW, sites, prices, known, {}, limits, {}, [])  # type: ignore[arg-type]
    asked = request(*targets)

    async def solve(overlay: Overlay, demands: tuple[Demand, ...], last: Plan | None, now_s: float) -> Plan:
        return plan(overlay, demands, last, now_s)

    pairs = possible_pairs(picture, asked)
    found = asyncio.run(better_fed(solve, picture, asked, pairs, frozenset())) if pairs else {}
    return {targets[one]: targets[other] for one, other in found.items()}


def test_a_narrow_way_out_of_the_source_is_used_once() -> None:
    assert feeds({("b", "c"): 1000 * MBIT}, "b", "c", uplink=40 * MBIT) == {"c": "b"}
    both = {("b", "c"): 1000 * MBIT, ("b", "d"): 1000 * MBIT}
    assert feeds(both, "b", "c", "d", uplink=40 * MBIT) == {"c": "b", "d": "b"}


def test_a_link_that_is_known_to_be_slow_is_left() -> None:
    known = {("a", "b"): 1000 * MBIT, ("a", "c"): 50 * MBIT, ("b", "c"): 1000 * MBIT}
    assert feeds(known, "b", "c") == {"c": "b"}


def test_where_it_is_no_better_the_source_serves_all() -> None:
    even = dict.fromkeys([("a", "b"), ("a", "c"), ("b", "c")], 1000 * MBIT)
    assert feeds(even, "b", "c") == {}
    assert (
        feeds({("b", "c"): 30 * MBIT}, "b", "c", uplink=40 * MBIT) == {}
    )  # later than twice over the way out


def test_a_guess_feeds_nobody() -> None:
    assert feeds({}, "b", "c", uplink=40 * MBIT) == {}
    assert feeds({("a", "b"): 10_000 * MBIT, ("b", "c"): 10_000 * MBIT}, "b", "c") == {}


def test_what_costs_less_is_taken_where_it_is_no_later() -> None:
    dear = {("a", "b"): 0.1, ("a", "c"): 0.1}
    known = {("a", "b"): 1000 * MBIT, ("a", "c"): 500 * MBIT, ("b", "c"): 1001 * MBIT}
    assert feeds(known, "b", "c", usd=dear) == {"c": "b"}


@pytest.mark.parametrize(
    "wrong",
    [
        request("b"),
        request("b", "b"),
        request("a", "b"),
        request("b", "c", mode="sync"),
        request("b", "c", options=TransferOptions(delete=True)),
        request("b", "c", options=TransferOptions(dry_run=True)),
    ],
)
def test_only_plain_copies_to_several_sites_are_looked_at(wrong: TransferRequest) -> None:
    assert may_be_fed(request("b", "c"))
    assert not may_be_fed(wrong)


def test_the_place_that_is_read_says_whether_it_was_the_contents_of_a_folder() -> None:
    asked = request("b", "c")
    assert source_of("", asked) == asked.source
    assert source_of("t-1.2", asked) == Endpoint(site="c", path="/data/y")
    asked.source.path = "/data/x/"
    assert source_of("t-1.2", asked) == Endpoint(site="c", path="/data/y/")
