"""What goes over the links now, against what was believed and planned: pure.

A link's rate is the sum over all transfers and relays that report of it. It is exact where some transfer on it was
held back by links only; else the link carries this or more. A planned way over which nothing comes while its task
moves elsewhere, or does not move at all, is taken for dead for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from flowengine.coordinator.planning.outcome import TaskPlan
from flowengine.coordinator.planning.picture import Picture, meets
from flowengine.plan.links import PRIOR, LinkState, observe

__all__ = ["DEAD_FOR_S", "Watch"]

LOOK_EVERY_S: Final = 1.5
SILENT_S: Final = 4.0
"""A way that was told for so long and carries nothing is dead."""
DEAD_FOR_S: Final = 60.0
KEEP_EVERY_S: Final = 10.0
DIFFERENT: Final = 0.1
"""A link that is believed to carry so much more or less than at the last plan asks for another."""


@dataclass(frozen=True, slots=True)
class Look:
    """One observation that is to be kept."""

    source: str
    target: str
    state: LinkState
    rate_bits_per_s: float
    at_least: bool


@dataclass(slots=True)
class Watch:
    """The leader's memory of links; another leader begins with what the database has."""

    looked: dict[tuple[str, str], float] = field(default_factory=dict)
    kept: dict[tuple[str, str], float] = field(default_factory=dict)
    told_since: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)
    dead: dict[tuple[str, str], float] = field(default_factory=dict)
    planned_with: dict[tuple[str, str], float] = field(default_factory=dict)

    def look(self, picture: Picture) -> list[Look]:
        """Take what was reported into the picture's beliefs; what is worth keeping comes back."""
        now = picture.now
        sums: dict[tuple[str, str], float] = {}
        bound: dict[tuple[str, str], bool] = {}
        reported: dict[tuple[str, str], float] = {}
        for task in picture.tasks:
            for source, target, rate in task.moved(now):
                key = (source, target)
                sums[key] = sums.get(key, 0.0) + rate
                bound[key] = bound.get(key, False) or task.link_bound
                reported[key] = max(reported.get(key, 0.0), task.reported)
        for site in picture.sites.values():
            for hop in site.relayed:
                key = (hop.sender, hop.receiver)
                if key in sums or not hop.rate_bits_per_s:
                    continue  # an end's own report is newer
                sums[key] = sums.get(key, 0.0) + hop.rate_bits_per_s
                bound.setdefault(key, False)
                reported[key] = now
        found = []
        for key, rate in sorted(sums.items()):
            if reported[key] <= self.looked.get(key, 0.0) or now - self.looked.get(key, 0.0) < LOOK_EVERY_S:
                continue
            self.looked[key] = now
            before = picture.known.get(key, PRIOR)
            state = observe(before, rate, now, "transfers", at_least=not bound[key])
            if state is before:
                continue
            picture.known[key] = state
            first = not before.measured
            moved = abs(state.rate_bits_per_s - before.rate_bits_per_s) > DIFFERENT * before.rate_bits_per_s
            if first or moved or now - self.kept.get(key, 0.0) >= KEEP_EVERY_S:
                self.kept[key] = now
                found.append(Look(*key, state, rate, not bound[key]))
        return found

    def differs(self, picture: Picture) -> bool:
        """Whether a link that the last plan used is now believed to carry another rate."""
        return any(
            abs(picture.known[key].rate_bits_per_s - rate) > DIFFERENT * rate
            for key, rate in self.planned_with.items()
            if key in picture.known
        )

    def bury(self, picture: Picture, plans: Mapping[str, TaskPlan]) -> list[tuple[str, str]]:
        """Links newly taken for dead: of ways that were told long enough ago and carry nothing."""
        now = picture.now
        used: dict[tuple[str, tuple[str, ...]], float] = {}
        found = []
        for task in picture.tasks:
            plan = plans.get(task.id)
            moves = {(a, b): rate for a, b, rate in task.moved(now)}
            if plan is None or task.state != "running" or not task.flows or not moves:
                continue
            for route in plan.routes:
                way = tuple(route.sites)
                if len(way) < 3 or not route.rate_bits_per_s:
                    continue
                since = self.told_since.get((task.id, way), now)
                used[(task.id, way)] = since
                first, last = (way[0], way[1]), (way[-2], way[-1])
                if moves.get(first) or moves.get(last):
                    used[(task.id, way)] = now
                elif now - since >= SILENT_S and not (
                    meets(picture, task.source, task.target) and not any(moves.values())
                ):  # where there is no straight way, one that is silent is given up for another that moves
                    for hop in (first, last):
                        if hop not in self.dead:
                            found.append(hop)
                        self.dead[hop] = now + DEAD_FOR_S
        self.told_since = used
        self.dead = {key: until for key, until in self.dead.items() if until > now}
        return found
