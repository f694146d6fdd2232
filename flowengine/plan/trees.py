"""Who serves whom when one demand has several targets: a plan's trees in the form in which they are carried out.

Goal
    What a coordinator needs to start: for each target the site that it reads from, the way, and what it must wait for.
Plan
    The planner may split a demand over several trees, which only a swarm of chunks could carry out. Whole transfers follow
    one tree; of the planner's the one with most rate is taken. Its rate is the planner's, so it keeps to all limits, and
    what the other trees would have carried is free until the next plan, which prefers routes that are in use.
Invariants
    Every target is served exactly once; who serves comes before whom it serves.
"""

from __future__ import annotations

import msgspec

from flowengine.plan.demands import Place
from flowengine.plan.model import Plan, Route

__all__ = ["Feed", "feeds_of"]


class Feed(msgspec.Struct, frozen=True, kw_only=True):
    """One target's supply.

    Attributes:
        target: who gets the bytes.
        feeder: who serves them: a source, or another target of the demand.
        after: the feed that brings them to the feeder, as a position in the whole sequence; None where the feeder is a source.
            What has landed there by then may go on at once, the rest follows as it lands.
        sites: the way from feeder to target.
        rate_bits_per_s: what is planned for it; never more than the feed that it follows.
    """

    target: Place
    feeder: Place
    after: int | None
    sites: tuple[str, ...]
    rate_bits_per_s: int


def feeds_of(plan: Plan, demand: str) -> tuple[Feed, ...]:
    """How each target of a demand is served, sources' own first; empty while nothing moves.

    Raises:
        KeyError: The plan does not know the demand.
    """
    entry = plan.of(demand)
    allocations = [a for a in plan.allocations if a.group == entry.group]
    total = sum(a.rate_bits_per_s for a in allocations)
    if not entry.rate_bits_per_s or not total:
        return ()
    best = max(allocations, key=lambda a: (a.rate_bits_per_s, [route.sites for route in a.routes]))
    rate = best.rate_bits_per_s * entry.rate_bits_per_s // total
    waiting: list[Route] = list(best.routes)
    targets = {route.target for route in waiting}
    place: dict[Place, int] = {}
    feeds: list[Feed] = []
    while waiting:
        ready = [r for r in waiting if r.source not in targets or r.source in place]
        assert ready, "a tree has a root"
        for route in ready:
            place[route.target] = len(feeds)
            feeds.append(
                Feed(
                    target=route.target,
                    feeder=route.source,
                    after=place[route.source] if route.source in targets else None,
                    sites=route.sites,
                    rate_bits_per_s=rate,
                )
            )
            waiting.remove(route)
    return tuple(feeds)
