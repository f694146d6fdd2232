"""What a plan promises, in cases small enough to work out by hand."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from flowengine.errors import UsageError
from flowengine.plan import (
    Allowed,
    Cap,
    Demand,
    Endpoint,
    Estimate,
    Limits,
    Link,
    Maintenance,
    Overlay,
    Place,
    Plan,
    Priority,
    Site,
    Tenant,
    admit,
    describe,
    feeds_of,
    plan,
)

GBIT = 10**9
GB = 10**9
NOW = 1_000_000.0
HOUR = 3600.0


def link(source, target, gbit, **fields):
    return Link(source=source, target=target, estimate=Estimate(rate_bits_per_s=gbit * 1e9), **fields)


def net(*links, **fields):
    names = sorted({x.source for x in links} | {x.target for x in links})
    sites = fields.pop("sites", tuple(Site(name=n) for n in names))
    return Overlay(sites=sites, links=links, **fields)


def want(name, sources, targets, gigabytes=10_000, **fields):
    return Demand(
        id=name,
        sources=tuple(Place(s) for s in sources.split()),
        targets=tuple(Place(t) for t in targets.split()),
        remaining_bytes=gigabytes * GB,
        **fields,
    )


def gbit(made, name):
    return pytest.approx(made.of(name).rate_bits_per_s / GBIT, rel=1e-4, abs=1e-4)


def ways(made, name):
    group = made.of(name).group
    mine = [a for a in made.allocations if a.group == group]
    return {tuple(r.sites for r in a.routes): round(a.rate_bits_per_s / GBIT, 4) for a in mine}


PLAIN = Limits(starvation_share=0.0)


def test_a_relay_adds_to_the_direct_path():
    made = plan(
        net(link("a", "b", 1), link("a", "r", 2), link("r", "b", 3)), (want("x", "a", "b"),), None, NOW
    )
    assert gbit(made, "x") == 3.0
    assert set(ways(made, "x")) == {(("a", "b"),), (("a", "r", "b"),)}


def test_policy_takes_relays_and_links_out_of_the_graph():
    overlay = net(link("a", "b", 1), link("a", "r", 2), link("r", "b", 3), link("a", "b", 4, name="private"))
    no_relay = want("x", "a", "b", allowed=Allowed(relays=frozenset(), links=frozenset({"a→b"})))
    made = plan(overlay, (no_relay,), None, NOW)
    assert ways(made, "x") == {(("a", "b"),): 1.0}
    nothing = plan(overlay, (want("x", "a", "b", allowed=Allowed(links=frozenset())),), None, NOW)
    assert nothing.of("x").state == "waiting"
    assert describe(nothing, "x")[1].startswith("policy and links leave no route")


def test_classes_are_served_in_order_and_scavenger_takes_what_is_left():
    overlay = net(link("a", "b", 10))
    demands = (
        want("s", "a", "b", priority=Priority.SCAVENGER),
        want("n", "a", "b", priority=Priority.NORMAL, max_rate_bits_per_s=3e9),
        want("u", "a", "b", priority=Priority.URGENT, max_rate_bits_per_s=5e9),
    )
    made = plan(overlay, demands, None, NOW, limits=PLAIN)
    assert (gbit(made, "u"), gbit(made, "n"), gbit(made, "s")) == (5.0, 3.0, 2.0)


@pytest.mark.parametrize("exact_groups", [300, 0])
def test_tenants_share_by_weight_however_many_demands_they_have(exact_groups):
    overlay = net(link("a", "b", 9), tenants=(Tenant(name="heavy", weight=2.0),))
    demands = (
        want("h", "a", "b", tenant="heavy"),
        *(want(f"l{i}", "a", "b", tenant="light", dataset=f"d{i}") for i in range(4)),
    )
    made = plan(overlay, demands, None, NOW, limits=Limits(starvation_share=0.0, exact_groups=exact_groups))
    assert made.of("h").rate_bits_per_s / GBIT == pytest.approx(6.0, rel=1e-3)
    assert sum(made.of(f"l{i}").rate_bits_per_s for i in range(4)) / GBIT == pytest.approx(3.0, rel=1e-3)


def test_inside_a_tenant_the_nearly_complete_dataset_ends_first_and_none_starves():
    overlay = net(link("a", "b", 10), link("c", "b", 10), sites=(Site(name="a"), Site(name="c"), Site(
        name="b", caps_in=(Cap(rate_bits_per_s=10e9),))))  # fmt: skip
    demands = (want("big", "a", "b", 9000, dataset="big"), want("small", "c", "b", 90, dataset="small"))
    made = plan(overlay, demands, None, NOW)
    assert gbit(made, "small") == 10 - 0.05 * 5
    assert gbit(made, "big") == 0.05 * 5


def test_of_equal_routes_the_cheap_one_then_the_short_one():
    overlay = net(
        link("a", "r", 5, usd_per_gb=0.01),
        link("r", "b", 5, usd_per_gb=0.01),
        link("a", "b", 5, usd_per_gb=0.09),
    )
    demand = want("x", "a", "b", max_rate_bits_per_s=4e9)
    assert set(ways(plan(overlay, (demand,), None, NOW), "x")) == {(("a", "r", "b"),)}
    same = net(*(msgspec.structs.replace(x, usd_per_gb=0.0) for x in overlay.links))
    assert set(ways(plan(same, (demand,), None, NOW), "x")) == {(("a", "b"),)}


def test_a_money_limit_bounds_the_mean_price_and_bars_unknown_prices():
    overlay = net(
        link("a", "b", 1, usd_per_gb=0.02), link("a", "r", 9, usd_per_gb=0.02), link("r", "b", 9, usd_per_gb=0.02),
        link("a", "b", 9, name="unpriced"),
    )  # fmt: skip
    made = plan(overlay, (want("x", "a", "b", 1000, cost_limit_usd=30.0),), None, NOW)
    # Half at 0.02 and half at 0.04 dollars a GB is 0.03.
    assert gbit(made, "x") == 2.0


def test_caps_of_sites_endpoints_and_tenants_hold_together():
    overlay = Overlay(
        sites=(Site(name="a", caps_out=(Cap(rate_bits_per_s=6e9),)), Site(name="b"), Site(name="c")),
        links=(link("a", "b", 10), link("a", "c", 10)),
        endpoints=(Endpoint(name="tape", site="b", caps_write=(Cap(rate_bits_per_s=1e9),)),),
        tenants=(Tenant(name="t", caps=(Cap(rate_bits_per_s=2e9),)),),
    )
    tape = msgspec.structs.replace(want("tape", "a", "b"), targets=(Place("b", "tape"),))
    made = plan(overlay, (tape, want("t", "a", "c", tenant="t"), want("o", "a", "c", tenant="o")), None, NOW)
    assert gbit(made, "tape") == 1.0
    assert gbit(made, "t") == 2.0
    assert gbit(made, "o") == 3.0


def test_several_sources_are_read_at_once():
    made = plan(net(link("a", "t", 2), link("b", "t", 3)), (want("x", "a b", "t"),), None, NOW)
    assert ways(made, "x") == {(("a", "t"),): 2.0, (("b", "t"),): 3.0}


def test_one_to_many_crosses_the_dear_link_once_per_byte():
    dear = {"usd_per_gb": 0.1}
    near = [link(a, b, 10, usd_per_gb=0.0) for a in "xyz" for b in "xyz" if a != b]
    overlay = net(link("s", "x", 5, **dear), link("s", "y", 5, **dear), link("s", "z", 5, **dear), *near)
    made = plan(overlay, (want("d", "s", "x y z"),), None, NOW)
    allocations = made.allocations
    assert allocations
    for allocation in allocations:
        assert sum(route.source.site == "s" for route in allocation.routes) == 1
        assert {route.target.site for route in allocation.routes} == {"x", "y", "z"}
    # Three links of 5 Gbit/s out of the source, each byte once over one of them; targets pass on 2 x 5 each.
    assert gbit(made, "d") == 15.0


def test_a_target_that_may_not_feed_others_is_a_leaf():
    overlay = net(link("s", "x", 5), link("s", "y", 5), link("x", "y", 9), link("y", "x", 9))
    demand = want("d", "s", "x y", allowed=Allowed(feeds=frozenset({("y", "x")})))
    made = plan(overlay, (demand,), None, NOW)
    assert {r.source.site for a in made.allocations for r in a.routes} == {"s", "y"}


def test_a_tree_tells_who_serves_whom_and_what_it_follows():
    overlay = net(
        link("s", "x", 5), link("s", "y", 5), link("x", "r", 9), link("r", "y", 9), link("x", "z", 9)
    )
    demand = want("d", "s", "x y z", allowed=Allowed(feeds=frozenset({("x", "y"), ("x", "z")})))
    made = plan(overlay, (demand,), None, NOW)
    feeds = {feed.target.site: feed for feed in feeds_of(made, "d")}
    assert (feeds["x"].feeder.site, feeds["x"].after, feeds["x"].sites) == ("s", None, ("s", "x"))
    assert (feeds["y"].feeder.site, feeds["y"].after, feeds["y"].sites) == ("x", 0, ("x", "r", "y"))
    assert (feeds["z"].feeder.site, feeds["z"].after) == ("x", 0)
    assert {round(feed.rate_bits_per_s / GBIT, 3) for feed in feeds.values()} == {5.0}
    told = describe(made, "d")[1]
    assert "x → r → y as it lands there" in told
    assert told.endswith("the source sends each byte once")
    # x has everything: it is a source now, and the dear one is not asked again.
    dear = net(link("s", "y", 5, usd_per_gb=0.09), link("x", "y", 5, usd_per_gb=0.0))
    rest = want("d", "s x", "y", max_rate_bits_per_s=3e9)
    (feed,) = feeds_of(plan(dear, (rest,), None, NOW), "d")
    assert (feed.feeder.site, feed.after) == ("x", None)


def test_a_deadline_that_cannot_be_met_is_refused_with_the_earliest_and_the_reason():
    overlay = net(link("gui", "lin", 10))
    first = want("t-17", "gui", "lin", 18_000, deadline_s=NOW + 5 * HOUR, promised=True)  # 8 of 10 Gbit/s
    late = want("t-18", "gui", "lin", 9_000, deadline_s=NOW + 5 * HOUR)
    made = plan(overlay, (first, late), None, NOW, limits=Limits(deadline_margin=0.0))
    entry = made.of("t-18")
    assert (entry.state, entry.promise, entry.rate_bits_per_s) == ("refused", "refused", 0)
    # 27,000 GB at 10 Gbit/s take 6 hours, and the first may end when it was promised.
    assert entry.earliest_s == pytest.approx(NOW + 6 * HOUR, rel=0, abs=60)
    obstacle = entry.obstacles[0]
    assert (obstacle.kind, obstacle.name) == ("link", "gui→lin")
    assert obstacle.by[0][0] == "t-17"
    words = describe(made, "t-18")
    assert words[0].startswith(
        "cannot be there by 1970-01-12 18:46Z: the earliest possible is 1970-01-12 19:4"
    )
    assert "link gui→lin is full" in words[1]
    assert "t-17" in words[1]
    assert made.of("t-17").promise == "kept"


def test_what_was_named_the_earliest_is_admitted_and_a_minute_less_is_not():
    overlay = net(link("gui", "lin", 10))
    first = want("t-17", "gui", "lin", 18_000, deadline_s=NOW + 5 * HOUR, promised=True)
    late = want("t-18", "gui", "lin", 9_000, deadline_s=NOW + 5 * HOUR)
    earliest = admit(overlay, (first,), late, NOW).earliest_s
    assert earliest is not None
    for due, verdict in ((earliest, "admitted"), (earliest - 60, "refused")):
        assert admit(overlay, (first,), msgspec.structs.replace(late, deadline_s=due), NOW).promise == verdict


def test_best_effort_goes_on_without_a_promise():
    demand = want("x", "a", "b", 9000, deadline_s=NOW + HOUR, best_effort=True)
    made = plan(net(link("a", "b", 10)), (demand,), None, NOW)
    assert made.of("x").promise == "best-effort"
    assert gbit(made, "x") == 10.0


def test_a_promise_holds_against_urgent_demands_and_a_night_window_counts():
    overlay = net(link("a", "b", 10))
    promised = want(
        "p", "a", "b", 9000, priority=Priority.SCAVENGER, deadline_s=NOW + 4 * HOUR, promised=True
    )  # fmt: skip
    made = plan(overlay, (want("u", "a", "b", priority=Priority.URGENT), promised), None, NOW, limits=PLAIN)
    assert made.of("p").rate_bits_per_s / GBIT == pytest.approx(5.0, rel=0.01)
    assert made.of("u").rate_bits_per_s / GBIT == pytest.approx(5.0, rel=0.01)
    # The same with the link closed for the second half: now everything has to move before.
    down = Maintenance(start_s=NOW + 2 * HOUR, end_s=NOW + 9 * HOUR)
    closed = net(link("a", "b", 10, maintenance=(down,)))
    made = plan(closed, (want("u", "a", "b", priority=Priority.URGENT), promised), None, NOW, limits=PLAIN)
    assert made.of("p").promise == "kept"
    assert made.of("p").rate_bits_per_s / GBIT == pytest.approx(10.0, rel=0.01)


def test_a_promise_that_links_no_longer_allow_is_called_late():
    demand = want("p", "a", "b", 9000, deadline_s=NOW + HOUR, promised=True)
    made = plan(net(link("a", "b", 10)), (demand,), None, NOW)
    assert made.of("p").promise == "late"
    assert gbit(made, "p") == 10.0
    assert "it will be late" in describe(made, "p")[0]


def test_before_maintenance_running_routes_stay_and_new_ones_go_around():
    down = Maintenance(start_s=NOW + 600, end_s=NOW + 1200, drain_s=300)
    overlay = net(link("a", "b", 10, maintenance=(down,)), link("a", "r", 2), link("r", "b", 2))
    old = want("old", "a", "b", tenant="o", max_rate_bits_per_s=4e9)
    before = plan(overlay, (old,), None, NOW)
    assert before.valid_until_s == NOW + 300
    draining = plan(overlay, (old, want("new", "a", "b", tenant="n")), before, NOW + 400)
    assert (("a", "b"),) in ways(draining, "old")
    assert set(ways(draining, "new")) == {(("a", "r", "b"),)}
    during = plan(overlay, (old,), draining, NOW + 700)
    assert set(ways(during, "old")) == {(("a", "r", "b"),)}
    after = plan(overlay, (old,), during, NOW + 1200)
    assert gbit(after, "old") == 4.0
    alone = plan(net(link("a", "b", 10, maintenance=(down,))), (old,), None, NOW + 700)
    assert "is closed until" in describe(alone, "old")[1]


def test_the_expected_end_has_the_spread_of_the_links():
    estimate = Estimate(rate_bits_per_s=8e9, spread=0.1)
    overlay = net(Link(source="a", target="b", estimate=estimate))
    eta = plan(overlay, (want("x", "a", "b", 3600),), None, NOW).of("x").eta
    assert eta.expected_s == pytest.approx(NOW + HOUR, rel=0, abs=1)
    assert eta.earliest_s == pytest.approx(NOW + HOUR / 1.2, rel=0, abs=1)
    assert eta.latest_s == pytest.approx(NOW + HOUR / 0.8, rel=0, abs=1)


def test_who_waits_is_told_for_whom_and_about_how_long():
    overlay = net(link("a", "b", 8))
    demands = (want("u", "a", "b", 3600, priority=Priority.URGENT), want("n", "a", "b", 3600))
    made = plan(overlay, demands, None, NOW)
    entry = made.of("n")
    assert entry.state == "waiting"
    assert entry.eta.expected_s == pytest.approx(NOW + 2 * HOUR, rel=0, abs=1)
    assert describe(made, "n")[1].startswith(
        "link a→b is full: 8 Gbit/s of 8 Gbit/s go elsewhere (8 Gbit/s to u)"
    )


def test_what_raising_a_limit_would_give_is_said():
    made = plan(net(link("a", "b", 8)), (want("x", "a", "b"),), None, NOW)
    assert made.of("x").obstacles[0].gain == pytest.approx(1.0)
    assert "1 Gbit/s more of it would give your tenant about 1 Gbit/s more" in describe(made, "x")[2]


def test_small_changes_do_not_move_flows():
    routes = [link("a", r, 5) for r in "rst"] + [link(r, "b", 5) for r in "rst"]
    demands = tuple(want(f"d{i}", "a", "b", tenant=f"t{i}", max_rate_bits_per_s=3e9) for i in range(3))
    made = plan(net(*routes), demands, None, NOW)
    for step, factor in enumerate((1.01, 0.99, 1.02, 0.98)):
        changed = [
            msgspec.structs.replace(x, estimate=Estimate(rate_bits_per_s=5e9 * factor))
            if x.source == "a"
            else x
            for x in routes
        ]
        again = plan(net(*changed), demands, made, NOW + step)
        assert again.moved_share < 0.02
        assert [a.routes for a in again.allocations] == [a.routes for a in made.allocations]
        made = again
    assert plan(net(*changed), demands, made, NOW + 9).method == "steady"


def test_a_dead_link_moves_its_flows_at_once():
    before = net(link("a", "b", 5), link("a", "r", 5), link("r", "b", 5))
    demand = want("x", "a", "b", max_rate_bits_per_s=4e9)
    made = plan(before, (demand,), None, NOW)
    dead = net(link("a", "b", 0), link("a", "r", 5), link("r", "b", 5))
    again = plan(dead, (demand,), made, NOW + 1)
    assert ways(again, "x") == {(("a", "r", "b"),): 4.0}
    assert again.moved_share == 1.0


def test_without_effort_the_plan_is_greedy_and_says_so():
    overlay = net(link("a", "b", 1), link("a", "r", 2), link("r", "b", 3))
    made = plan(
        overlay, (want("x", "a", "b"), want("y", "a", "b", deadline_s=NOW + HOUR)), None, NOW, effort=0
    )
    assert made.method == "greedy"
    assert gbit(made, "x") == 3.0
    assert made.of("y").promise == "refused"
    assert describe(made, "x")[-1].endswith("this is a greedy one")


def test_equal_demands_are_one_group_and_smaller_ones_end_first():
    overlay = net(link("a", "b", 10))
    demands = tuple(want(f"d{i}", "a", "b", 100 * (i + 1)) for i in range(3))
    made = plan(overlay, demands, None, NOW)
    assert {e.group for e in made.demands} == {"d0"}
    rates = [e.rate_bits_per_s for e in made.demands]
    assert sum(rates) == pytest.approx(10e9, rel=1e-4)
    assert rates[0] > 0.8 * sum(rates)
    assert rates[2] > 0
    due = tuple(msgspec.structs.replace(d, deadline_s=NOW + HOUR) for d in demands)
    ends = {round(d.remaining_bytes / e.rate_bits_per_s, 3) for d, e in zip(
        due, plan(overlay, due, None, NOW).demands, strict=True)}  # fmt: skip
    assert len(ends) == 1


def test_the_last_bytes_of_a_demand_still_move():
    made = plan(
        net(link("a", "b", 1)), (msgspec.structs.replace(want("x", "a", "b"), remaining_bytes=3),), None, NOW
    )
    assert made.of("x").rate_bits_per_s > 0
    done = plan(
        net(link("a", "b", 1)), (msgspec.structs.replace(want("x", "a", "b"), remaining_bytes=0),), None, NOW
    )
    assert done.of("x").state == "done"


def test_a_plan_survives_its_bytes():
    made = plan(net(link("a", "b", 1)), (want("x", "a", "b"),), None, NOW)
    assert Plan.from_bytes(made.to_bytes()) == made
    with pytest.raises(UsageError, match="not a plan"):
        Plan.from_bytes(b"{}")


@pytest.mark.parametrize(
    ("overlay", "demand", "message"),
    [
        (Overlay(sites=(Site(name="a"),), links=(link("a", "b", 1),)), None, "a→b names site 'b'"),
        (Overlay(sites=(Site(name="a"), Site(name="a")), links=()), None, "more than one site 'a'"),
        (net(link("a", "b", 1), link("a", "b", 2)), None, "more than one link 'a→b'"),
        (net(link("a", "b", 1)), want("x", "", "b"), "no source or no target"),
        (net(link("a", "b", 1)), want("x", "a", "b", -1), "-1000000000 bytes"),
        (net(link("a", "b", 1)), want("x", "a", "b", weight=0.0), "weight 0.0"),
    ],
)
def test_nonsense_is_refused_by_name(overlay, demand, message):
    with pytest.raises(UsageError, match=message):
        plan(overlay, (demand,) if demand else (), None, NOW)


@pytest.mark.slow
def test_the_solver_prints_nothing():
    code = (
        "from flowengine.plan import *\n"
        "l = Link(source='a', target='b', estimate=Estimate(rate_bits_per_s=1e9))\n"
        "d = Demand(id='x', sources=(Place('a'),), targets=(Place('b'),), remaining_bytes=10**9)\n"
        "for k in (300, 0):\n"
        "    m = plan(Overlay(sites=(Site(name='a'), Site(name='b')), links=(l,)), (d,), None, 0.0,\n"
        "             limits=Limits(exact_groups=k))\n"
        "    assert m.of('x').rate_bits_per_s\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
