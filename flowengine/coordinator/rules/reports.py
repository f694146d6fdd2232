"""What an agent's report does to a task.

Invariants
    - Only the target's word ends a task as done; a report with an old fence changes nothing.
    - A report that comes twice is taken once; the answer is the same.
    - Whoever lost the task is told so at its next report: it must stop writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowengine.coordinator.rules.states import MAX_ATTEMPTS, backoff_s

__all__ = ["Effect", "Held", "take"]


@dataclass(frozen=True, slots=True)
class Held:
    """A task as the reports' rules see it."""

    state: str
    fence: int
    holder: str
    driver: str
    source_site: str
    target_site: str
    attempts: int
    holder_seq: int
    peer_seq: int
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """What follows from a report.

    Attributes:
        kind: "superseded" (the reporter lost the task), "ignored" (nothing changes), "adopted" (a claim that this
            database forgot goes on) or "taken".
        state: the task's state from now on.
        counts: whether the report's counters and landed objects are to be taken.
        renews: whether the lease begins anew.
        attempts: failed attempts from now on.
        ready_at: when it may be claimed again.
    """

    kind: Literal["superseded", "ignored", "adopted", "taken"]
    directive: Literal["go", "pause", "stop"] = "go"
    state: str = "running"
    counts: bool = False
    renews: bool = False
    attempts: int = 0
    ready_at: float = 0.0
    reason: str = ""


def take(
    task: Held, site: str, fence: int, seq: int, state: str, retryable: bool, now: float, peer_counts: bool
) -> Effect:
    """The effect of a report.

    Args:
        site: who reports; it is the task's source or target.
        peer_counts: whether the target reported counters under this fence before.
    """
    ended = state != "running"
    if fence > task.fence:
        # A claim that this database does not know: it was restored from a backup older than the claim. Only the
        # site that claims this task can have got it.
        if site != task.driver or task.state not in ("waiting", "running"):
            return Effect("superseded", "stop", task.state)
        task = Held(
            "running",
            fence,
            site,
            task.driver,
            task.source_site,
            task.target_site,
            task.attempts,
            -1,
            -1,
            task.paused,
        )
        found = _take(task, site, seq, state, retryable, now, False)
        return Effect(
            "adopted",
            found.directive,
            found.state,
            found.counts,
            found.renews,
            found.attempts,
            found.ready_at,
            found.reason,
        )
    if fence < task.fence:
        return Effect("superseded", "stop", task.state)
    if task.state in ("done", "failed", "cancelled"):
        return Effect("ignored", "stop", task.state, reason=task.state)
    verified = state == "done" and site == task.target_site  # true whoever holds it: nothing is left to move
    if task.state == "waiting" and task.holder != site and not verified:
        # It was given back or failed under this fence: who still runs must stop, who also says so is heard.
        return Effect("ignored" if ended else "superseded", "stop", task.state)
    return _take(task, site, seq, state, retryable, now, peer_counts)


def _take(
    task: Held, site: str, seq: int, state: str, retryable: bool, now: float, peer_counts: bool
) -> Effect:
    is_target, is_holder = site == task.target_site, site == task.holder
    last_seq = task.holder_seq if is_holder else task.peer_seq
    directive: Literal["go", "pause"] = "pause" if task.paused else "go"
    if seq <= last_seq:
        return Effect("ignored", directive, task.state, attempts=task.attempts)
    counts = is_target or not peer_counts
    if state == "running" or (state == "done" and not is_target):
        # The source's "done" is its own end only: the target's word is still to come, or the lease ends.
        goes_on = "running" if is_holder else task.state
        renews = is_holder and state == "running"
        return Effect("taken", directive, goes_on, counts, renews, task.attempts)
    if state == "done":
        return Effect("taken", "stop", "done", True, False, task.attempts, reason="done")
    if state == "released":
        # Not at once: an agent whose clock makes every grant look expired would claim and give back without end.
        ready_at = now + backoff_s(1)
        return Effect("taken", "stop", "waiting", counts, False, task.attempts, ready_at, "released")
    attempts = task.attempts + 1
    if retryable and attempts < MAX_ATTEMPTS:
        return Effect("taken", "stop", "waiting", counts, False, attempts, now + backoff_s(attempts))
    return Effect("taken", "stop", "failed", counts, False, attempts)
