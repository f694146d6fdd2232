"""Plans in words: what each demand gets, what keeps it from more, when it ends.

Pure text from a plan's own data; nothing is computed anew. Times are written by a function that the caller
gives, because only it knows the reader's time zone.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from flowengine.plan.model import Allocation, DemandPlan, Eta, Obstacle, Plan
from flowengine.units import format_duration

__all__ = ["describe", "describe_obstacle", "format_bits", "utc"]

UNITS = ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"))


def utc(at_s: float) -> str:
    """An instant in UTC, to the minute.

    >>> utc(0.0)
    '1970-01-01 00:00Z'
    """
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%MZ")


def format_bits(bits_per_s: float) -> str:
    """A rate as planners talk about it.

    >>> format_bits(4e9), format_bits(2.5e6), format_bits(0)
    ('4 Gbit/s', '2.5 Mbit/s', '0 bit/s')
    """
    for size, unit in UNITS:
        if bits_per_s >= size * 0.9995:
            return f"{bits_per_s / size:.3g} {unit}"
    return f"{bits_per_s:.0f} bit/s"


def describe(plan: Plan, demand: str, clock: Callable[[float], str] = utc) -> list[str]:
    """Sentences about one demand, the most important first.

    Args:
        plan: The plan.
        demand: The demand's id.
        clock: Writes an instant.

    Raises:
        KeyError: The plan does not know the demand.
    """
    entry = plan.of(demand)
    lines = [_headline(entry, clock)]
    allocations = [a for a in plan.allocations if a.group == entry.group] if entry.rate_bits_per_s else []
    total = sum(a.rate_bits_per_s for a in allocations) or 1
    for allocation in sorted(allocations, key=lambda a: -a.rate_bits_per_s):
        share = allocation.rate_bits_per_s / total
        lines.append(f"{format_bits(entry.rate_bits_per_s * share)} {_way(allocation)}")
    lines += [describe_obstacle(obstacle, entry, clock) for obstacle in entry.obstacles]
    if entry.state in ("running", "waiting") and entry.eta.expected_s is not None:
        lines.append(_expectation(entry.eta, plan.made_at_s, clock))
    if plan.method == "greedy":
        lines.append("the planner's effort was spent before the best plan was found: this is a greedy one")
    return lines


def _headline(entry: DemandPlan, clock: Callable[[float], str]) -> str:
    due = f" by {clock(entry.deadline_s)}" if entry.deadline_s is not None else ""
    if entry.state == "done":
        return "nothing is left to move"
    if entry.promise == "refused":
        if entry.earliest_s is not None:
            return f"cannot be there{due}: the earliest possible is {clock(entry.earliest_s)}"
        return f"cannot be there{due}"
    promise = {
        "kept": f"promised{due}, and on time",
        "admitted": f"promised{due}",
        "late": f"promised{due}, but links now carry less than was promised on: it will be late",
        "best-effort": f"wanted{due}, which cannot be promised; it goes as fast as it can",
    }.get(entry.promise, "")
    rate = f"gets {format_bits(entry.rate_bits_per_s)}" if entry.rate_bits_per_s else "waits"
    return f"{rate}, {promise}" if promise else rate


def _way(allocation: Allocation) -> str:
    if len(allocation.routes) == 1:
        sites = allocation.routes[0].sites
        return f"over {' → '.join(sites)}" + (" (relayed)" if len(sites) > 2 else "")
    served = {route.target.site for route in allocation.routes}
    ways = [
        " → ".join(route.sites) + (" as it lands there" if route.source.site in served else "")
        for route in allocation.routes
    ]
    own = [route for route in allocation.routes if route.source.site not in served]
    times = "once" if len(own) == 1 else f"{len(own)} times"
    return f"as a tree: {', '.join(ways)}; the source sends each byte {times}"


def _expectation(eta: Eta, now_s: float, clock: Callable[[float], str]) -> str:
    assert eta.expected_s is not None
    text = (
        f"expected to end in {format_duration(max(eta.expected_s - now_s, 0.0))}, at {clock(eta.expected_s)}"
    )
    if eta.earliest_s is not None and eta.latest_s is not None and eta.latest_s > eta.earliest_s:
        return f"{text} (between {clock(eta.earliest_s)} and {clock(eta.latest_s)})"
    if eta.earliest_s is not None and eta.latest_s is None:
        return f"{text} (not before {clock(eta.earliest_s)}; how late cannot be said)"
    return text


def describe_obstacle(obstacle: Obstacle, entry: DemandPlan, clock: Callable[[float], str] = utc) -> str:
    """One limit in words, with who uses it and what raising it would give."""
    until = f" until {clock(obstacle.until_s)}" if obstacle.until_s is not None else ""
    if obstacle.kind == "ceiling":
        return "it gets all that it can use"
    if obstacle.kind == "not-yet":
        return f"it waits{until}, as asked"
    if obstacle.kind == "no-route":
        return "policy and links leave no route: allow a relay or add a link"
    if obstacle.kind == "effort":
        return f"no proof in time ({obstacle.name}): ask again, alone or with more effort"
    name = _limit(obstacle)
    if not obstacle.capacity_bits_per_s:
        return f"{name} is closed{until}"
    others = [(who, rate) for who, rate in obstacle.by if who not in (entry.id, entry.group)]
    taken = sum(rate for _, rate in others)
    span = (
        f" between {clock(obstacle.from_s)} and {clock(obstacle.until_s or 0.0)}" if obstacle.from_s else ""
    )
    text = f"{name} is full{span}: "
    if others:
        users = ", ".join(f"{format_bits(rate)} to {who}" for who, rate in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        text += f"{format_bits(taken)} of {format_bits(obstacle.capacity_bits_per_s)} go elsewhere ({users}{more})"
    else:
        text += f"all {format_bits(obstacle.capacity_bits_per_s)} are yours"
    if entry.rate_bits_per_s:
        text += f"; you get {format_bits(entry.rate_bits_per_s)}"
    if obstacle.gain:
        text += f"; 1 Gbit/s more of it would give your tenant about {format_bits(obstacle.gain * 1e9)} more"
    return text


def _storage(obstacle: Obstacle) -> str:
    """A storage endpoint by site and name, as site:/path where its name is a path."""
    return obstacle.name.replace("//", ":/", 1)


def _limit(obstacle: Obstacle) -> str:
    return {
        "link": f"link {obstacle.name}",
        "out": f"what may leave site {obstacle.name}",
        "in": f"what may enter site {obstacle.name}",
        "read": f"reading from {_storage(obstacle)}",
        "write": f"writing to {_storage(obstacle)}",
        "tenant": f"the cap of tenant {obstacle.name}",
    }.get(obstacle.kind, obstacle.name)
