"""Whether a plan keeps to every limit, checked from the overlay and the demands alone."""

from __future__ import annotations

import itertools
import random
from zoneinfo import ZoneInfo

import msgspec
from plan_oracle import random_case

from flowengine.plan import Cap, Limits, Maintenance, Place, Window
from flowengine.plan.topology import cap_at

START = 1_774_742_400.0  # 2026-03-29 00:00Z, the night on which Berlin's clocks skip an hour
ZONES = ("Europe/Berlin", "Asia/Shanghai", "America/New_York", "UTC")


def rich_case(seed):
    """A random case with windows, maintenance, deadlines, releases and several targets; and a moment."""
    overlay, demands = random_case(seed)
    rng = random.Random(seed * 7 + 1)
    now = START + rng.randrange(0, 86400)

    def windowed(caps):
        if rng.random() > 0.25:
            return caps
        start, end = rng.randrange(0, 1440, 30), rng.randrange(0, 1440, 30)
        window = Window(
            zone=ZoneInfo(rng.choice(ZONES)),
            start_minute=start,
            end_minute=end,
            weekdays=frozenset(rng.sample(range(7), rng.randint(0, 4))),
        )
        return (*caps, Cap(rate_bits_per_s=rng.randint(0, 5) * 1e9, window=window))

    def down():
        if rng.random() > 0.1:
            return ()
        start = now + rng.randrange(-3600, 7200)
        return (Maintenance(start_s=start, end_s=start + 3600, drain_s=rng.choice([0.0, 1800.0])),)

    new = msgspec.structs.replace
    overlay = new(
        overlay,
        sites=tuple(
            new(s, caps_in=windowed(s.caps_in), caps_out=windowed(s.caps_out), maintenance=down())
            for s in overlay.sites
        ),
        links=tuple(new(x, caps=windowed(x.caps), maintenance=down()) for x in overlay.links),
        tenants=tuple(new(t, caps=windowed(t.caps)) for t in overlay.tenants),
    )
    names = [s.name for s in overlay.sites]
    changed = []
    for demand in demands:
        others = [n for n in names if n not in {p.site for p in (*demand.sources, *demand.targets)}]
        targets = demand.targets
        if others and rng.random() < 0.2:
            targets += tuple(Place(n) for n in rng.sample(others, rng.randint(1, len(others))))
        deadline = now + rng.choice([60, 600, 7200, 40000]) if rng.random() < 0.4 else None
        between = list(itertools.permutations(names, 2))
        feeds = frozenset(rng.sample(between, rng.randint(0, len(between)))) if rng.random() < 0.3 else None
        changed.append(
            new(
                demand,
                targets=targets,
                deadline_s=deadline,
                promised=deadline is not None and rng.random() < 0.4,
                best_effort=rng.random() < 0.3,
                not_before_s=now + rng.choice([-10, 300]) if rng.random() < 0.15 else None,
                allowed=new(demand.allowed, feeds=feeds),
                source_once=rng.random() < 0.7,
            )
        )
    return overlay, tuple(changed), now


def check_plan(overlay, demands, made, now, limits=Limits()):  # noqa: B008
    """Assert that every allocation is allowed, possible, and within all limits together, to the bit."""
    assert made.valid_until_s > now
    links = {x.label: x for x in overlay.links}
    used = {}

    def use(key, rate):
        used[key] = used.get(key, 0) + rate

    of_group = {}
    for demand, entry in zip(demands, made.demands, strict=True):
        assert demand.id == entry.id
        of_group.setdefault(entry.group, []).append((demand, entry))
    total, spent = {}, {}
    for allocation in made.allocations:
        rate = allocation.rate_bits_per_s
        assert rate > 0
        members = of_group[allocation.group]
        demand = members[0][0]
        total[allocation.group] = total.get(allocation.group, 0) + rate
        reached = set(demand.sources)
        waiting = list(allocation.routes)
        while waiting:
            ready = [r for r in waiting if r.source in reached]
            assert ready, "a branch starts where no byte comes"
            for route in ready:
                assert route.target in demand.targets
                assert route.target not in reached, "a target gets its bytes twice"
                reached.add(route.target)
                waiting.remove(route)
        assert set(demand.targets) <= reached
        use(("tenant", demand.tenant), rate)
        for route in allocation.routes:
            check_route(route, demand, links, limits)
            use(("read", route.source), rate)
            use(("write", route.target), rate)
            for name in route.links:
                link = links[name]
                use(("link", name), rate)
                use(("out", link.source), rate)
                use(("in", link.target), rate)
                if demand.cost_limit_usd is not None:
                    spent[allocation.group] = spent.get(allocation.group, 0.0) + rate / 8e9 * link.usd_per_gb
    check_demands(of_group, total, spent, now)
    moments = [now, (now + made.valid_until_s) / 2, made.valid_until_s - 1e-3]
    for moment in moments:
        check_limits(overlay, used, moment)


def check_route(route, demand, links, limits):
    hops = [links[name] for name in route.links]
    assert [route.source.site, *[x.target for x in hops]] == list(route.sites)
    assert all(a.target == b.source for a, b in itertools.pairwise(hops))
    assert route.sites[-1] == route.target.site
    assert len(set(route.sites)) == len(route.sites)
    relays = route.sites[1:-1]
    most = limits.max_relays if demand.allowed.max_relays is None else demand.allowed.max_relays
    assert len(relays) <= min(most, limits.max_relays)
    assert demand.allowed.relays is None or set(relays) <= demand.allowed.relays
    assert demand.allowed.links is None or set(route.links) <= demand.allowed.links
    if route.source not in demand.sources:
        assert demand.allowed.feeds is None or (route.source.site, route.target.site) in demand.allowed.feeds


def check_demands(of_group, total, spent, now):
    for group, members in of_group.items():
        given = sum(entry.rate_bits_per_s for _, entry in members)
        assert given <= total.get(group, 0)
        for demand, entry in members:
            if demand.not_before_s is not None and demand.not_before_s > now:
                assert entry.rate_bits_per_s == 0
            if demand.max_rate_bits_per_s is not None and len(members) == 1:
                assert entry.rate_bits_per_s <= demand.max_rate_bits_per_s
            if entry.state == "refused":
                assert entry.rate_bits_per_s == 0
                assert demand.deadline_s is not None
                assert not demand.promised
                assert not demand.best_effort
            if demand.cost_limit_usd is not None and given and len(members) == 1:
                allowed = demand.cost_limit_usd / (demand.remaining_bytes / 1e9) * given / 8e9
                assert spent.get(group, 0.0) <= allowed * (1 + 1e-5) + 1e-6


def check_limits(overlay, used, moment):
    def within(key, caps, rate=float("inf")):
        assert used.get(key, 0) <= min(rate, cap_at(caps, moment)), (key, moment)

    def down(times):
        return any(m.start_s <= moment < m.end_s for m in times)

    for link in overlay.links:
        within(
            ("link", link.label), link.caps, 0.0 if down(link.maintenance) else link.estimate.rate_bits_per_s
        )
    for site in overlay.sites:
        service = 0.0 if down(site.maintenance) else float("inf")
        within(("out", site.name), site.caps_out, service)
        within(("in", site.name), site.caps_in, service)
    for endpoint in overlay.endpoints:
        within(("read", Place(endpoint.site, endpoint.name)), endpoint.caps_read)
        within(("write", Place(endpoint.site, endpoint.name)), endpoint.caps_write)
    for tenant in overlay.tenants:
        within(("tenant", tenant.name), tenant.caps)
