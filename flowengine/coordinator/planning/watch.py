"""What goes over the links now, against what was believed and planned: pure.

A link's rate is the sum over all transfers and relays that report of it. It is exact where some transfer on it was
held back by links only; else the link carries this or more. What comes near a limit is held back by that, whatever a
sender felt: a limit that is held elsewhere feels like a full link to it, and so does a target that has many small
objects to make. A planned way over which nothing comes while its task
moves elsewhere, or does not move at all, is taken for dead for a while; so is one over a relay at which two ends that cannot
be dialled did not meet, where they have another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from flowengine.coordinator.planning.outcome import TaskPlan
from flowengine.coordinator.planning.picture import Picture, TaskFacts
from flowengine.coordinator.planning.problem import meets
from flowengine.plan.links import PRIOR, LinkState, observe

__all__ = ["DEAD_FOR_S", "Watch"]

LOOK_EVERY_S: Final = 1.5
SILENT_S: Final = 4.0
"""A way that was told for so long and carries nothing is dead."""
DEAD_FOR_S: Final = 60.0
KEEP_EVERY_S: Final = 10.0
NEAR: Final = 0.7
"""What moves with so much of a limit's rate may be held back by it."""
FADES_S: Final = 5.0
"""For so long after a limit was lifted what is reported may still be what it let through."""
MANY_PER_S: Final = 500.0
"""Who moves so many objects a second is held back by them, or soon will be."""
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


def _by_objects(task: TaskFacts, rate_bits_per_s: float) -> bool:
    """Whether a task moves so many objects that their making, at the target, may be what holds it back."""
    done = task.counters.objects_done - task.counters.objects_unchanged
    size = task.counters.bytes_done - task.counters.bytes_unchanged
    return done > 0 and rate_bits_per_s / 8 * done >= MANY_PER_S * max(size, 1)


@dataclass(slots=True)
class Watch:
    """The leader's memory of links; another leader begins with what the database has."""

    looked: dict[tuple[str, str], float] = field(default_factory=dict)
    kept: dict[tuple[str, str], float] = field(default_factory=dict)
    told_since: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)
    dead: dict[tuple[str, str], float] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    planned_with: dict[tuple[str, str], float] = field(default_factory=dict)
    limited: dict[tuple[str, ...], tuple[float, float]] = field(default_factory=dict)
    """The lowest limit that bore on a link or a task of late, and until when that counts."""

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
                own = (f"tenant:{task.tenant}", f"transfer:{task.transfer}")
                free = task.link_bound and not _by_objects(task, rate)
                free = free and not self._held_back(picture, own, rate)
                bound[key] = bound.get(key, False) or free
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
            source, target = key
            scopes = (f"link:{source}>{target}", f"site:{source}", f"read:{source}:", f"write:{target}:")
            bound[key] = bound[key] and not self._held_back(picture, scopes, rate)
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

    def _held_back(self, picture: Picture, scopes: tuple[str, ...], rate: float) -> bool:
        """Whether limits of these scopes, or of scopes below those that end with a colon, may have kept the rate down."""
        known = [
            float(limit.now_bits_per_s)
            for limit in picture.limits
            if limit.now_bits_per_s is not None
            and any(limit.scope == one or (one[-1] == ":" and limit.scope.startswith(one)) for one in scopes)
        ]
        lowest, until = min(known, default=float("inf")), picture.now + FADES_S
        before = self.limited.get(scopes)
        if before is not None and before[1] > picture.now and before[0] < lowest:
            lowest, until = before
        if lowest < float("inf"):
            self.limited[scopes] = (lowest, until)
        else:
            self.limited.pop(scopes, None)
        return rate >= NEAR * lowest

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
        found += self._missed(picture, plans)
        self.told_since = used
        self.dead = {key: until for key, until in self.dead.items() if until > now}
        return found

    def _missed(self, picture: Picture, plans: Mapping[str, TaskPlan]) -> list[tuple[str, str]]:
        """Links to the relays of ways by which an attempt has failed to bring two ends together."""
        before, self.attempts = self.attempts, {task.id: task.attempts for task in picture.tasks}
        found = []
        for task in picture.tasks:
            plan = plans.get(task.id)
            if plan is None or task.attempts <= before.get(task.id, task.attempts):
                continue
            if not meets(picture, task.source, task.target):
                continue
            used = {route.sites[1] for route in plan.routes}
            permitted = picture.permitted.get(task.transfer, frozenset())
            others = {
                relay
                for relay in permitted - used
                if (task.source, relay) not in self.dead and (relay, task.target) not in self.dead
            }
            if not others:
                continue
            for relay in used:
                hops = [(task.source, relay), (relay, task.target)]
                found += hops
                self.dead |= dict.fromkeys(hops, picture.now + DEAD_FOR_S)
        return found
