"""Who runs what next: priority class, then the tenant with the least served share, then age; within all bounds.

Goal
    Nobody starves, no bound is passed, and what waits can be told why.
Plan
    `Board` is what is known of queue and sites at one moment. `hindrance` names the first thing that keeps a task
    from running; `choose` takes, again and again, the oldest unhindered task of the tenant that was served least.
    Served is what ran lately: bytes, plus a fixed cost for each task, so that a million empty files are not free.
Invariants
    - One writer per overlapping target path: whoever runs comes first, then the older. A reader waits for a writer
      that runs or is older. Nobody who runs ever waits, all others wait only for older ones or for who runs: so no
      two can wait for each other.
    - A paused task holds nobody up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from flowengine.coordinator.rules.feeding import Feeder, waits_for
from flowengine.coordinator.rules.paths import overlap

__all__ = [
    "TASK_COST_BYTES",
    "Board",
    "Hindrance",
    "Place",
    "Share",
    "Work",
    "Writers",
    "choose",
    "hindrance",
]

TASK_COST_BYTES: Final = 8 << 20
"""What a task costs beside its bytes, in the account of a tenant's share."""


@dataclass(frozen=True, slots=True)
class Work:
    """A task as the queue sees it; `seq` is its age, `ready_at` the end of its pause after a failed attempt."""

    id: str
    seq: int
    transfer: str
    tenant: str
    priority: int
    source_site: str
    source_path: str
    target_site: str
    target_path: str
    driver: str
    writes: bool = True
    paused: bool = False
    ready_at: float = 0.0
    last_reason: str = ""
    fed_by: str = ""


@dataclass(slots=True)
class Place:
    """A site's bounds and what it runs now, as source and target together."""

    name: str
    state: str
    since: float
    max_tasks: int
    running: int = 0
    outbound: bool = False
    """Its agent cannot be dialled."""
    stopping: bool = False
    """Where it drains: its agent does so by itself, since it is being stopped; no operator asked for it."""


@dataclass(slots=True)
class Share:
    """A tenant's weight, bounds and what it was served of late."""

    tenant: str
    weight: float
    max_running: int | None = None
    running: int = 0
    served_bytes: int = 0
    served_tasks: int = 0
    left_today_bytes: int | None = None

    @property
    def served(self) -> float:
        """Cost of what was served, by weight: the least is next."""
        return (self.served_bytes + TASK_COST_BYTES * self.served_tasks) / self.weight


@dataclass(frozen=True, slots=True)
class Hindrance:
    """What keeps a task from running: a name, words, what ends it, and since when where that is known."""

    name: str
    text: str
    ends_when: str
    since: float | None = None


class Writers:
    """Which tasks write where: finds the oldest that overlaps a path, in steps of the path's depth."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], Work] = {}
        self._below: dict[tuple[str, str], Work] = {}

    def add(self, work: Work) -> None:
        """Enter a task that writes to its target path."""
        _older(self._at, (work.target_site, work.target_path), work)
        for above in _ancestors(work.target_path):
            _older(self._below, (work.target_site, above), work)

    def oldest(self, site: str, path: str) -> Work | None:
        """The oldest task that writes to `path`, above it or below it."""
        found = [self._below.get((site, path)), self._at.get((site, path))]
        found += [self._at.get((site, above)) for above in _ancestors(path)]
        return min((work for work in found if work is not None), key=lambda work: work.seq, default=None)


def _ancestors(path: str) -> list[str]:
    """The folders above a clean path.

    >>> _ancestors("/a/b/c"), _ancestors("/")
    (['/', '/a', '/a/b'], [])
    """
    if path == "/":
        return []
    parts = path[1:].split("/")
    return ["/", *("/" + "/".join(parts[:count]) for count in range(1, len(parts)))]


def _older(index: dict[tuple[str, str], Work], key: tuple[str, str], work: Work) -> None:
    known = index.get(key)
    if known is None or work.seq < known.seq:
        index[key] = work


@dataclass(slots=True)
class Board:
    """Queue, sites and tenants at one moment.

    Attributes:
        waiting: tasks that wait, those in question and all older ones that write where they read or write.
        running: tasks that run at the sites in question.
        routed: waiting tasks between sites that cannot be dialled, for which a way over a relay is planned.
        feeders: tasks that are not done and whose targets are to serve one of `waiting`, by id.
    """

    now: float
    waiting: list[Work]
    running: list[Work]
    places: Mapping[str, Place]
    shares: Mapping[str, Share]
    routed: frozenset[str] = frozenset()
    feeders: Mapping[str, Feeder] = field(default_factory=dict)
    _running_writers: Writers = field(default_factory=Writers, init=False)
    _waiting_writers: Writers = field(default_factory=Writers, init=False)

    def __post_init__(self) -> None:
        for work in self.running:
            if work.writes:
                self._running_writers.add(work)
        for work in self.waiting:
            if work.writes and not work.paused:
                self._waiting_writers.add(work)

    def writer_before(self, work: Work, site: str, path: str) -> Work | None:
        """Who writes at a path and comes before `work`: one that runs, or an older one."""
        runs = self._running_writers.oldest(site, path)
        if runs is not None and runs.id != work.id:
            return runs
        waits = self._waiting_writers.oldest(site, path)
        return waits if waits is not None and waits.seq < work.seq else None

    def meets(self, work: Work) -> bool:
        """Whether neither end can be dialled, so that only a relay can lead from one to the other."""
        ends = (self.places.get(work.source_site), self.places.get(work.target_site))
        return work.source_site != work.target_site and all(end is not None and end.outbound for end in ends)

    def begin(self, work: Work) -> None:
        """Enter that a task runs from now on."""
        self.running.append(work)
        if work.writes:
            self._running_writers.add(work)
        for site in {work.source_site, work.target_site}:
            self.places[site].running += 1
        share = self.shares[work.tenant]
        share.running += 1
        share.served_tasks += 1


STANDS_STILL: Final = frozenset({"paused", "site-revoked", "draining", "agent-offline"})
"""Hindrances that somebody has to end, nobody knows when: ways, rates and times of a plan say nothing meanwhile."""


def hindrance(board: Board, work: Work) -> Hindrance | None:
    """What keeps a waiting task from running now; None where nothing does."""
    if work.paused:
        return Hindrance("paused", "a user paused it", f"flow transfer resume {work.transfer}")
    for site in dict.fromkeys((work.source_site, work.target_site)):
        found = _place_hindrance(board.places.get(site), site)
        if found is not None:
            return found
    feeder = board.feeders.get(work.fed_by)
    if feeder is not None:
        return Hindrance(*waits_for(work.target_site, feeder.target_site, feeder.target_path))
    if work.ready_at > board.now:
        if work.last_reason == "policy-window":
            opens = datetime.fromtimestamp(work.ready_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
            return Hindrance(
                "policy-window",
                "policy permits this transfer only at other times",
                f"the window opens at {opens}",
            )
        why = f" after {work.last_reason!r}" if work.last_reason else ""
        return Hindrance("retry", f"the last attempt failed{why}", f"in {work.ready_at - board.now:.0f} s")
    if board.meets(work) and work.id not in board.routed:
        return Hindrance(
            "no-route",
            f"neither {work.source_site} nor {work.target_site} can be dialled, and no way over a relay is planned",
            "a relay that policy permits is online, or one of the two listens",
        )
    found = _path_hindrance(board, work)
    if found is not None:
        return found
    for site in dict.fromkeys((work.source_site, work.target_site)):
        place = board.places[site]
        if place.running >= place.max_tasks:
            text = f"site {site} runs {place.running} of at most {place.max_tasks} tasks"
            return Hindrance("slots", text, "one of them ends")
    share = board.shares[work.tenant]
    if share.max_running is not None and share.running >= share.max_running:
        text = f"tenant {share.tenant} runs {share.running} of at most {share.max_running} tasks"
        return Hindrance("tenant-limit", text, "one of them ends")
    if share.left_today_bytes is not None and share.left_today_bytes <= 0:
        return Hindrance(
            "tenant-quota", f"tenant {share.tenant} has moved all that it may today", "at midnight UTC"
        )
    return None


def waiting_for(board: Board, work: Work) -> Hindrance:
    """What a waiting task waits for: what hinders it, or the agent that may begin it."""
    return hindrance(board, work) or Hindrance(
        "no-agent-claimed-yet", f"the agent of site {work.driver} may begin it", "that agent claims it"
    )


def _place_hindrance(place: Place | None, site: str) -> Hindrance | None:
    if place is None:
        return Hindrance("agent-offline", f"site {site} is not known any more", "it is enrolled again")
    if place.state == "revoked":
        return Hindrance("site-revoked", f"site {site} was removed", "it is enrolled again", place.since)
    if place.state == "draining":
        if place.stopping:
            text = f"the agent of site {site} is being stopped and takes no new work"
            return Hindrance("draining", text, "it is started again", place.since)
        text = f"site {site} is draining: it finishes what it carries and takes no new work"
        return Hindrance("draining", text, f"an operator says flow site drain {site} --off", place.since)
    if place.state != "online":
        what = "has not joined yet" if place.state == "expected" else "does not answer"
        return Hindrance(
            "agent-offline", f"the agent of site {site} {what}", "the agent connects again", place.since
        )
    return None


def _path_hindrance(board: Board, work: Work) -> Hindrance | None:
    if work.writes:
        other = board.writer_before(work, work.target_site, work.target_path)
        if other is not None:
            text = (
                f"transfer {other.transfer} writes to {other.target_site}:{other.target_path}, which overlaps"
            )
            return Hindrance("target-path", text, f"{other.transfer} ends")
    other = board.writer_before(work, work.source_site, work.source_path)
    if other is not None and other.transfer != work.transfer:
        text = (
            f"transfer {other.transfer} writes to {other.target_site}:{other.target_path}, which is read here"
        )
        return Hindrance("source-path", text, f"{other.transfer} ends")
    return None


def choose(board: Board, driver: str, count: int) -> list[Work]:
    """Up to `count` waiting tasks that `driver` may begin now, in order; the board counts them as running.

    Cost: grows with the tasks that are looked at; those of a tenant behind its first unhindered one are not.
    """
    queues: dict[tuple[int, str], list[Work]] = {}
    for work in sorted(board.waiting, key=lambda work: work.seq, reverse=True):
        if work.driver == driver:
            queues.setdefault((work.priority, work.tenant), []).append(work)
    chosen: list[Work] = []
    for priority in sorted({priority for priority, _ in queues}, reverse=True):
        tenants = {tenant for level, tenant in queues if level == priority}
        while tenants and len(chosen) < count:
            tenant = min(tenants, key=lambda name: (board.shares[name].served, name))
            following = _next(board, queues[priority, tenant])
            if following is None:
                tenants.remove(tenant)
                continue
            board.begin(following)
            chosen.append(following)
    return chosen


def _next(board: Board, queue: list[Work]) -> Work | None:
    """Take the oldest unhindered task; hindered ones before it are out for this round."""
    while queue:
        work = queue.pop()
        if hindrance(board, work) is None:
            return work
    return None


def first_overlap(paths: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """The first two (site, clean path) of a request that overlap."""
    seen: list[tuple[str, str]] = []
    for site, path in paths:
        for other_site, other in seen:
            if site == other_site and overlap(path, other):
                return (other_site, other), (site, path)
        seen.append((site, path))
    return None
