"""A picture as the planner takes it: the overlay of sites and links, and what is to be moved over it. Nothing here decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from flowengine.api.links import Limit
from flowengine.coordinator.database.catalogue import decode_roots
from flowengine.coordinator.planning.picture import STALE_S, Picture
from flowengine.coordinator.rules.paths import clean, offering_root
from flowengine.plan import (
    Allowed,
    Cap,
    Demand,
    Endpoint,
    Link,
    Maintenance,
    Overlay,
    Place,
    Priority,
    Site,
    Tenant,
    Window,
)
from flowengine.plan.links import PRIOR, estimate

__all__ = ["allowed_of", "demands_of", "is_sighted", "meets", "overlay_of", "place_of", "sighted_links"]

CLASSES: Final = (
    (Priority.SCAVENGER, 1.0),
    (Priority.NORMAL, 1.0),
    (Priority.NORMAL, 4.0),
    (Priority.URGENT, 1.0),
)
"""Class and weight of the priorities low, normal, high and urgent: high has four times the share of normal in its
tenant's part, urgent goes before everybody, low takes what is left."""
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _caps(limit: Limit | None) -> tuple[Cap, ...]:
    """A limit as caps. Its own rate holds outside of its windows, so it is split at their edges by the planner."""
    if limit is None:
        return ()
    caps = [
        Cap(
            rate_bits_per_s=window.rate_bits_per_s,
            window=Window(
                zone=ZoneInfo(window.zone),
                start_minute=_minute(window.start),
                end_minute=_minute(window.end),
                weekdays=frozenset(DAYS.index(day) for day in window.days),
            ),
        )
        for window in limit.windows
    ]
    if limit.rate_bits_per_s is not None:
        # Outside all windows, or where no window allows more: a window's rate replaces the constant one.
        more = [cap for cap in caps if cap.rate_bits_per_s > limit.rate_bits_per_s]
        if not more:
            caps.append(Cap(rate_bits_per_s=limit.rate_bits_per_s))
        else:
            caps.append(Cap(rate_bits_per_s=limit.rate_bits_per_s, window=_outside(more)))
    return tuple(caps)


class _Outside(Window, frozen=True, kw_only=True):
    """The time outside of some windows."""

    inside: tuple[Window, ...] = ()

    def contains(self, at_s: float) -> bool:
        return not any(window.contains(at_s) for window in self.inside)


def _outside(caps: Iterable[Cap]) -> Window:
    inside = tuple(cap.window for cap in caps if cap.window is not None)
    return _Outside(zone=inside[0].zone, inside=inside)


def _minute(text: str) -> int:
    return int(text[:2]) * 60 + int(text[3:])


def _times(picture: Picture, scope: str) -> tuple[Maintenance, ...]:
    return tuple(
        Maintenance(start_s=row.starts, end_s=row.ends, drain_s=row.drain_s)
        for row in picture.maintenance
        if row.scope == scope
    )


def overlay_of(picture: Picture, pairs: Iterable[tuple[str, str]]) -> Overlay:
    """Sites and links that routes between these pairs may use.

    The straight link of a pair is always there, by a prior where nobody has seen it, unless neither site can be
    dialled. A way over a relay is there when both of its links were measured or declared: what nobody knows anything of
    is no alternative. Only where there is no straight link it is, by a prior as well.
    """
    wanted = list(dict.fromkeys(pairs))
    relays = [site.name for site in picture.sites.values() if site.relays]
    straight = {pair for pair in wanted if not meets(picture, *pair)}
    blind = _blind_hops(picture, wanted)
    candidates = set(straight)
    for source, target in wanted:
        for relay in relays:
            candidates |= {(source, relay), (relay, target)}
        candidates |= {(one, other) for one in relays for other in relays}
    found = [
        _link(picture, key)
        for key in sorted(candidates)
        if key[0] != key[1]
        and (key in straight or (key not in picture.shut and (key in blind or is_sighted(picture, *key))))
    ]
    by_scope = {limit.scope: limit for limit in picture.limits}
    relayed = _relay_caps(picture, wanted)
    names = sorted(
        {name for link in found for name in (link.source, link.target)} | {n for p in wanted for n in p}
    )
    return Overlay(
        sites=tuple(
            Site(
                name=name,
                caps_in=relayed.get((name, "in"), ()),
                caps_out=(*_caps(by_scope.get(f"site:{name}")), *relayed.get((name, "out"), ())),
                maintenance=_times(picture, f"site:{name}"),
            )
            for name in names
        ),
        links=tuple(
            msgspec.structs.replace(
                link,
                caps=_caps(by_scope.get(f"link:{link.source}>{link.target}")),
                maintenance=_times(picture, f"link:{link.source}>{link.target}"),
            )
            for link in found
        ),
        endpoints=_endpoints(picture, names),
        tenants=tuple(
            Tenant(name=name, weight=weight, caps=_caps(by_scope.get(f"tenant:{name}")))
            for name, weight in sorted(picture.weights.items())
        ),
    )


def _relay_caps(picture: Picture, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[Cap, ...]]:
    """What sites let pass for others, by site and side, as caps of all that leaves or enters there.

    Where a relay is a source of none of the pairs, all that leaves it was passed on; where it is a target of none, all
    that enters is. Where it is both, the plan knows no bound, and the relay itself holds it.
    """
    sources, targets = {source for source, _ in pairs}, {target for _, target in pairs}
    found: dict[tuple[str, str], tuple[Cap, ...]] = {}
    for site in picture.sites.values():
        if site.relays and site.relays_bits_per_s is not None:
            caps = (Cap(rate_bits_per_s=site.relays_bits_per_s),)
            if site.name not in sources:
                found[site.name, "out"] = caps
            elif site.name not in targets:
                found[site.name, "in"] = caps
    return found


def _limited_roots(picture: Picture) -> set[tuple[str, str]]:
    """(site, root) of storage that has a limit."""
    scopes = (
        limit.scope.split(":", 2) for limit in picture.limits if limit.scope.startswith(("read:", "write:"))
    )
    return {(site, root) for _, site, root in scopes}


def _endpoints(picture: Picture, names: Sequence[str]) -> tuple[Endpoint, ...]:
    by_scope = {limit.scope: limit for limit in picture.limits}
    return tuple(
        Endpoint(
            name=root,
            site=site,
            caps_read=_caps(by_scope.get(f"read:{site}:{root}")),
            caps_write=_caps(by_scope.get(f"write:{site}:{root}")),
        )
        for site, root in sorted(_limited_roots(picture))
        if site in names
    )


def place_of(picture: Picture, site: str, path: str, *, writing: bool) -> Place:
    """Where bytes are read or written, with the storage where that has a limit."""
    limited = {root for where, root in _limited_roots(picture) if where == site}
    if not limited or site not in picture.rows:
        return Place(site)
    root = offering_root(decode_roots(picture.rows[site].roots), clean(path), writing)
    return Place(site, root.name) if root is not None and root.name in limited else Place(site)


def meets(picture: Picture, source: str, target: str) -> bool:
    """Whether neither of two sites can be dialled, so that only a relay can lead from one to the other."""
    ends = (picture.sites.get(source), picture.sites.get(target))
    return source != target and all(end is not None and end.outbound for end in ends)


def is_sighted(picture: Picture, source: str, target: str) -> bool:
    """Whether somebody measured or declared what the link between two sites carries."""
    return (source, target) in picture.known or _capacity(picture, (source, target)) is not None


def _blind_hops(picture: Picture, pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Links to and from relays that are planned on unseen, since some pair has no other way."""
    relays = [site.name for site in picture.sites.values() if site.relays]
    hops = {
        hop
        for source, target in pairs
        if meets(picture, source, target)
        for relay in relays
        for hop in ((source, relay), (relay, target))
    }
    return {hop for hop in hops if hop not in picture.known and _capacity(picture, hop) is None}


def _capacity(picture: Picture, key: tuple[str, str]) -> float | None:
    row = picture.declared.get(key)
    return None if row is None else row.capacity_bits_per_s


def _link(picture: Picture, key: tuple[str, str]) -> Link:
    declared, measured = picture.declared.get(key), picture.measured.get(key)
    rtt = next(
        (row.rtt_ms for row in (measured, declared) if row is not None and row.rtt_ms is not None), 0.0
    )
    loss = next((row.loss for row in (measured, declared) if row is not None and row.loss is not None), 0.0)
    return Link(
        source=key[0],
        target=key[1],
        estimate=estimate(picture.known.get(key, PRIOR), picture.now, _capacity(picture, key)),
        rtt_ms=rtt,
        loss=loss,
        usd_per_gb=declared.cost_per_gb if declared is not None else 0.0,
    )


def sighted_links(
    picture: Picture, overlay: Overlay, pairs: Iterable[tuple[str, str]]
) -> frozenset[str] | None:
    """The links of `overlay_of` these pairs that are there for everybody; None where all are.

    A guess that some pair has to rely on is no reason for another one to leave its straight way; and what is taken for
    dead is there only where it is a pair's own straight way.
    """
    apart = _blind_hops(picture, pairs) | picture.shut
    if not apart:
        return None
    return frozenset(link.label for link in overlay.links if (link.source, link.target) not in apart)


def allowed_of(
    picture: Picture,
    pair: tuple[str, str],
    relays: frozenset[str],
    plan: str,
    sighted: frozenset[str] | None,
) -> Allowed:
    """What policy leaves between two sites, and the stored plan (or "") that the user chose."""
    links = picture.chosen.get(plan) if plan else None
    if links is None and sighted is not None:
        hops = {pair}
        if meets(picture, *pair):
            hops = {hop for relay in relays for hop in ((pair[0], relay), (relay, pair[1]))} - picture.shut
        links = sighted | {"→".join(hop) for hop in hops}
    return Allowed(relays=relays, links=links)


def _silent_tasks(picture: Picture) -> frozenset[str]:
    """Tasks that nothing is heard of, though others are, or that a draining site does not begin.

    What is kept for them would carry nothing. Where nobody is heard it was the coordinator that was away.
    """
    found = frozenset(
        task.id
        for task in picture.tasks
        if any(
            end is not None and (end.silent(picture.now) or (end.drains and task.state == "waiting"))
            for end in (picture.sites.get(task.source), picture.sites.get(task.target))
        )
        or (task.state == "running" and picture.now - max(task.reported, task.claimed) > STALE_S)
    )
    return found if len(found) < len(picture.tasks) else frozenset()


def demands_of(picture: Picture, sighted: frozenset[str] | None = None) -> tuple[Demand, ...]:
    """Everything that is to be moved, earlier submissions first; who is silent takes what others leave.

    Args:
        sighted: as of `sighted_links`.
    """
    by_scope = {limit.scope: limit for limit in picture.limits}
    found = []
    under_way = {task.id for task in picture.tasks}
    silent = _silent_tasks(picture)
    for task in picture.tasks:
        if task.paused or task.fed_by in under_way:  # it can begin when the other one is done
            continue
        priority, weight = CLASSES[0 if task.id in silent and not task.promised else task.priority]
        limit = by_scope.get(f"transfer:{task.transfer}")
        found.append(
            Demand(
                id=task.id,
                sources=(place_of(picture, task.source, task.source_path, writing=False),),
                targets=(place_of(picture, task.target, task.target_path, writing=True),),
                remaining_bytes=task.left_bytes,
                priority=priority,
                tenant=task.tenant,
                weight=weight,
                deadline_s=task.deadline
                if task.deadline is not None and task.deadline > picture.now
                else None,
                promised=task.promised,
                best_effort=not task.promised,
                cost_limit_usd=task.cost_limit_usd,
                dataset=task.transfer,
                max_rate_bits_per_s=limit.now_bits_per_s if limit is not None else None,
                allowed=allowed_of(
                    picture,
                    (task.source, task.target),
                    picture.permitted.get(task.transfer, frozenset()),
                    task.plan,
                    sighted,
                ),
            )
        )
    return tuple(found)
