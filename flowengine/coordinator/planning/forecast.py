"""What the planner's answer means for one request: ways, times, money, and words for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flowengine.api.plans import Plan
from flowengine.api.transfers import Decision, TransferRequest, Way
from flowengine.coordinator.actions.transfers import no_meeting
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.planning.outcome import (
    PlannedRoute,
    by_group,
    clock,
    guessed_links,
    known_obstacles,
    only,
    routes_of,
    ways_of,
)
from flowengine.coordinator.planning.picture import Picture
from flowengine.coordinator.planning.problem import meets
from flowengine.errors import FlowError
from flowengine.plan import Demand, Overlay, describe
from flowengine.plan.explain import describe_obstacle
from flowengine.plan.model import Allocation, DemandPlan
from flowengine.plan.model import Plan as Made
from flowengine.plan.pace import UNLEARNED, Pace, expect_s
from flowengine.units import format_bytes, format_duration

__all__ = ["Solved", "forecast", "refusal"]

SPREADS: Final = 1.6449
"""Normal quantile of the span that is told: nine of ten fall inside."""

_Times = tuple[float, float, float]
"""Earliest, expected and latest, in Unix seconds."""


@dataclass(slots=True)
class Solved:
    """The planner's answer to a request beside all that moves already.

    Attributes:
        mine: the request's demands, one for each target.
        paces: what is learned of how long targets take, by site.
        promises: the counter of promises when the picture was taken.
        feeds: targets that other targets serve, each with its feeder, by position.
    """

    picture: Picture
    overlay: Overlay
    mine: tuple[Demand, ...]
    plan: Made
    paces: dict[str, Pace]
    promises: int
    feeds: Mapping[int, int]


@dataclass(slots=True)
class _ToTarget:
    """What is told of one target; `times` is None where nobody knows how much it is."""

    ways: list[Way]
    usd: float
    binds: list[str]
    words: str
    times: _Times | None


def forecast(
    solved: Solved,
    request: TransferRequest,
    decisions: list[Decision],
    size: int | None,
    objects: int | None,
) -> Plan:
    """The plan as users see it; it has no id yet.

    Args:
        size, objects: bytes and objects that go to each target; None where nobody knows.
    """
    now = solved.picture.now
    groups = by_group(solved.plan)
    carried = ways_of(solved.overlay, solved.mine, solved.plan, {})
    guessed = guessed_links(solved.overlay)
    found = {entry.id: known_obstacles(entry, guessed) for entry in solved.plan.demands}
    entries = [found[demand.id] for demand in solved.mine]
    told = [
        _to_target(solved, number, entry, groups.get(entry.group, []), carried[entry.id], size, objects)
        for number, entry in enumerate(entries)
    ]
    ways = [way for one in told for way in one.ways]
    plan = Plan(
        permitted=True,
        decisions=decisions,
        routes=[way.sites for way in ways]
        or [
            [request.source.site, target.site]
            for target in request.targets
            if not meets(solved.picture, request.source.site, target.site)
        ],
        ways=ways,
        size_bytes=size,
        objects=objects,
        rate_bits_per_s=min(carried[entry.id] for entry in entries) or None,
        usd=round(sum(one.usd for one in told), 6) if size is not None else None,
        promise=_promise([entry.promise for entry in entries]),
        binds=list(dict.fromkeys(text for one in told for text in one.binds)),
    )
    times = {number: one.times for number, one in enumerate(told) if one.times is not None}
    if times and all(expected < float("inf") for _, expected, _ in times.values()):
        ends = [_end(times, solved.feeds, number, now) for number in times]
        earliest, expected, latest = (max(end[at] for end in ends) for at in range(3))
        plan.duration_s = round(expected - now, 3)
        plan.earliest, plan.expected = moment(earliest), moment(expected)
        plan.latest = optional_moment(latest if latest < float("inf") else None)
    possible = [entry.earliest_s for entry in entries if entry.earliest_s]
    if plan.promise == "refused" and possible:
        start = max(solved.paces.get(one.targets[0].site, UNLEARNED).start_s for one in solved.mine)
        plan.earliest_possible = moment(max(possible) + start)
    plan.text = _text([one.words for one in told], plan)
    return plan


def _to_target(
    solved: Solved,
    number: int,
    entry: DemandPlan,
    allocations: list[Allocation],
    carried: float,
    size: int | None,
    objects: int | None,
) -> _ToTarget:
    """What is told of the target at a position; `carried` is what its ways carry, in bits a second."""
    demand = solved.mine[number]
    source, target = demand.sources[0].site, demand.targets[0].site
    links = {(link.source, link.target): link for link in solved.overlay.links}
    found = routes_of(allocations, entry)
    total = sum(way.rate_bits_per_s for way in found)
    ways, usd = [], 0.0
    for way in found:
        hops = zip(way.sites, way.sites[1:], strict=False)
        cost = sum(links[hop].usd_per_gb or 0.0 for hop in hops if hop in links)
        ways.append(Way(sites=way.sites, rate_bits_per_s=way.rate_bits_per_s, usd_per_gb=cost))
        usd += cost * (size or 0) / 1e9 * way.rate_bits_per_s / max(total, 1)
    times = None
    if size is not None:
        straight = links.get((source, target))
        spread = straight.estimate.spread if straight is not None and carried else 0.0
        pace = solved.paces.get(target, UNLEARNED)
        times = _span(entry, pace, objects or 1, size, carried, spread, solved.picture.now)
    binds = [
        describe_obstacle(obstacle, entry, clock)
        for obstacle in entry.obstacles
        if obstacle.kind != "ceiling"
    ]
    prefix = f"to {target}: " if len(solved.mine) > 1 else ""
    if not found and meets(solved.picture, source, target):
        return _ToTarget(ways, usd, binds, prefix + no_meeting(source, target), times)
    fed = f"from {source} once it is complete there, " if number in solved.feeds else ""
    lines = describe(only(solved.plan, entry, allocations), demand.id, clock)
    words = prefix + fed + _line(entry, lines, source, target, carried, found)
    return _ToTarget(ways, usd, binds, words, times)


def _promise(promises: Sequence[str]) -> str:
    for word in ("refused", "best-effort", "late"):
        if word in promises:
            return "best-effort" if word == "late" else word
    return "admitted" if "admitted" in promises or "kept" in promises else "none"


def _span(
    entry: DemandPlan, pace: Pace, objects: int, size: int, way: float, link_spread: float, now: float
) -> tuple[float, float, float]:
    """Earliest, expected and latest end: the pace of the ends on what the ways carry, and the links' own spread."""
    if entry.promise == "refused" or (not entry.rate_bits_per_s and entry.eta.expected_s is None):
        never = float("inf")
        return never, never, never
    took = expect_s(pace, objects, size, way or None)
    expected = now + took
    if not entry.rate_bits_per_s and entry.eta.expected_s is not None:
        expected = entry.eta.expected_s + took  # its turn comes first
    on_way = 8 * size / way / took if way else 0.0
    near = SPREADS * min((pace.spread**2 + (link_spread * min(on_way, 1.0)) ** 2) ** 0.5, 2.0)
    length = expected - now
    return now + length / (1 + near), expected, now + length * (1 + near)


def _end(
    times: Mapping[int, tuple[float, float, float]], feeds: Mapping[int, int], number: int, now: float
) -> tuple[float, float, float]:
    """Earliest, expected and latest end of a target, which begins when its feeder is done."""
    earliest, expected, latest = times[number]
    if number not in feeds:
        return earliest, expected, latest
    before = _end(times, feeds, feeds[number], now)
    return earliest + before[0] - now, expected + before[1] - now, latest + before[2] - now


def _line(
    entry: DemandPlan, lines: list[str], source: str, target: str, way: float, found: Sequence[PlannedRoute]
) -> str:
    if entry.promise == "refused" or not found:
        return lines[0]
    straight = len(found) == 1 and found[0].sites == [source, target]
    if straight:
        return "straight" + ("" if way else "; nothing is known yet of the link")
    return f"over {len(found)} ways at once" if len(found) > 1 else "over " + " > ".join(found[0].sites)


def _text(words: list[str], plan: Plan) -> str:
    text = "; ".join(dict.fromkeys(words))
    if plan.rate_bits_per_s and plan.promise != "refused":
        text += f", at up to {format_bytes(plan.rate_bits_per_s / 8)}/s"
    if plan.duration_s is not None and plan.promise != "refused":
        text += f": about {format_duration(plan.duration_s)}"
    if plan.promise == "refused" and plan.earliest_possible is not None:
        text += f"; the earliest that can be promised is {clock(plan.earliest_possible.timestamp())}"
    return text


def refusal(request: TransferRequest, shown: Plan) -> FlowError:
    """Why a deadline cannot be met, when it could be, and what stands in the way."""
    assert request.deadline is not None
    due = clock(request.deadline.timestamp())
    when = shown.earliest_possible
    earliest = (
        f"the earliest possible is {clock(when.timestamp())}"
        if when
        else "no later time can be promised either"
    )
    way = "; ".join(shown.binds) or "the ends need longer for it than there is"
    return FlowError(
        f"the transfer cannot be there by {due}: {earliest}. What stands in the way: {way}",
        hint="ask for a later time, for a higher priority, or for it without a promise (--best-effort)",
        reason="deadline",
        deadline=due,
        earliest=when.isoformat() if when else None,
        binds=shown.binds,
    )
