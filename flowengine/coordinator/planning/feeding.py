"""Which targets of a copy are better served by another target than by the source.

Goal
    A source's narrow or dear link carries each byte once where that brings everything everywhere sooner, or as soon and
    cheaper.
Plan
    The planner is asked for a tree over all targets at once, on what is known of sites, links and limits. Its feeds are
    carried out one after the other, while its rates are those of streams that follow each other; so two more plans tell
    what the tree takes in truth, and what it takes where the source serves each. Without a link between two targets that
    somebody measured or declared nothing is asked.
Invariants
    - A guess feeds nobody: neither a link between targets, nor one from the source that is only thought to be narrow.
    - Policy is asked first for each pair: data may leave at the first and land at the second.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

import msgspec

from flowengine.api.transfers import TransferRequest
from flowengine.coordinator.planning.outcome import guessed_links
from flowengine.coordinator.planning.picture import UNKNOWN_BYTES, Picture
from flowengine.coordinator.planning.problem import CLASSES, is_sighted, meets, overlay_of, place_of
from flowengine.plan import Allowed, Demand, Overlay, Plan, Tenant, feeds_of

__all__ = ["better_fed", "possible_pairs"]

TREE: Final = "-1"
"""Name of the demand for all targets at once; that for one target has its position."""
SOONER: Final = 0.9
"""A tree has to end in this part of the time that the source would need, or to be cheaper."""

Pair = tuple[str, str]
Solve = Callable[[Overlay, tuple[Demand, ...], Plan | None, float], Awaitable[Plan]]
"""See `flowengine.plan.plan`."""


def possible_pairs(picture: Picture, request: TransferRequest) -> list[tuple[int, int]]:
    """Positions of targets of which the first could serve the second: both are there, and their link is known."""
    sites = [target.site for target in request.targets]
    there = [site in picture.sites and picture.sites[site].online for site in sites]
    return [
        (one, other)
        for one in range(len(sites))
        for other in range(len(sites))
        if one != other
        and there[one]
        and there[other]
        and is_sighted(picture, sites[one], sites[other])
        and not meets(picture, sites[one], sites[other])
    ]


async def better_fed(
    solve: Solve,
    picture: Picture,
    request: TransferRequest,
    pairs: Collection[tuple[int, int]],
    relays: frozenset[str],
) -> dict[int, int]:
    """Targets that others should serve, each with its feeder, by position; empty where the source serves all.

    Args:
        solve: the planner.
        pairs: of `possible_pairs`, those that policy permits.
        relays: sites that may pass the data on.

    Raises:
        FlowError: the planner could not be asked.
    """
    sites = [target.site for target in request.targets]
    source = request.source.site
    between = [(sites[one], sites[other]) for one, other in pairs]
    overlay = overlay_of(picture, [*((source, site) for site in sites), *between])
    # Each demand is a tenant's own: they share evenly, where one tenant's would follow each other.
    own = tuple(Tenant(name=str(index)) for index in range(-1, len(sites)))
    overlay = msgspec.structs.replace(overlay, tenants=own)
    tree = _demand(picture, request, TREE, -1, range(len(sites)), relays, frozenset(between))
    made = await solve(overlay, (tree,), None, picture.now)
    feeder_of = {
        sites.index(feed.target.site): sites.index(feed.feeder.site)
        for feed in feeds_of(made, TREE)
        if feed.feeder.site != source
    }
    if not feeder_of:
        return {}
    straight = tuple(
        _demand(picture, request, str(index), -1, [index], relays) for index in range(len(sites))
    )
    direct = await solve(overlay, straight, None, picture.now)
    feeder_of = {
        target: feeder for target, feeder in feeder_of.items() if not _is_guess(direct, overlay, target)
    }
    followed = tuple(
        _demand(picture, request, str(index), feeder_of.get(index, -1), [index], relays)
        for index in range(len(sites))
    )
    fed = await solve(overlay, followed, None, picture.now)
    direct_s, fed_s = _seconds(direct, {}, len(sites)), _seconds(fed, feeder_of, len(sites))
    if fed_s < direct_s * SOONER or (fed_s <= direct_s and _usd(fed, overlay) < _usd(direct, overlay)):
        return feeder_of
    return {}


def _demand(
    picture: Picture,
    request: TransferRequest,
    name: str,
    feeder: int,
    targets: Collection[int],
    relays: frozenset[str],
    feeds: frozenset[Pair] = frozenset(),
) -> Demand:
    """The bytes of a request to some of its targets, from its source (-1) or another of its targets."""
    begin = request.source if feeder < 0 else request.targets[feeder]
    priority, weight = CLASSES[("low", "normal", "high", "urgent").index(request.priority)]
    ends = [request.targets[index] for index in targets]
    return Demand(
        id=name,
        sources=(place_of(picture, begin.site, begin.path, writing=False),),
        targets=tuple(place_of(picture, end.site, end.path, writing=True) for end in ends),
        remaining_bytes=UNKNOWN_BYTES,
        priority=priority,
        weight=weight,
        tenant=name,
        dataset=name,
        allowed=Allowed(relays=relays, feeds=feeds),
    )


def _is_guess(plan: Plan, overlay: Overlay, target: int) -> bool:
    """Whether a link that is only guessed is what keeps a target from more."""
    guessed = guessed_links(overlay)
    return any(one.kind == "link" and one.name in guessed for one in plan.of(str(target)).obstacles)


def _seconds(plan: Plan, feeder_of: Mapping[int, int], count: int) -> float:
    """Seconds until the last byte is at the last target, each beginning when its feeder is done."""

    def ends(index: int) -> float:
        rate = plan.of(str(index)).rate_bits_per_s
        took = 8 * UNKNOWN_BYTES / rate if rate else float("inf")
        return took + (ends(feeder_of[index]) if index in feeder_of else 0.0)

    return max(ends(index) for index in range(count))


def _usd(plan: Plan, overlay: Overlay) -> float:
    """What a gigabyte costs that goes to every target as planned."""
    price = {(link.source, link.target): link.usd_per_gb for link in overlay.links}
    total = 0.0
    for entry in plan.demands:
        parts = [one for one in plan.allocations if one.group == entry.group]
        whole = sum(one.rate_bits_per_s for one in parts)
        for one in parts:
            hops = [hop for route in one.routes for hop in zip(route.sites, route.sites[1:], strict=False)]
            total += sum(price.get(hop) or 0.0 for hop in hops) * one.rate_bits_per_s / max(whole, 1)
    return total
