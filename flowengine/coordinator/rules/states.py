"""A transfer's state, derived from its tasks and what users asked; and what a report does to a task.

States are those of the Dataspace Protocol's transfer process. The state is a function of what is known now, never
of the order in which it became known, so that two coordinators and a restart come to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flowengine.api.transfers import ENDED

__all__ = [
    "MAX_ATTEMPTS",
    "OFFLINE_SUSPENDS_S",
    "POLICY_ENDS",
    "UNHEARD",
    "TaskFacts",
    "Verdict",
    "backoff_s",
    "derive",
    "dialer",
]

MAX_ATTEMPTS: Final = 100
FIRST_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 60.0
UNHEARD: Final = "policy-unheard"
"""Reason of a task that policy ended while the agent that would say so was cut off."""
POLICY_ENDS: Final = (
    "policy-stopped",
    UNHEARD,
    "policy-denied",
    "policy-expired",
    "policy-missing",
    "release-stripped",
)
"""Reasons of a failed task with which what arrived of it may not stay at the target."""
OFFLINE_SUSPENDS_S: Final = 60.0
"""A transfer whose every task has waited this long for an agent is suspended."""


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What a transfer's state depends on in a task."""

    state: str
    attempts: int = 0
    reason: str = ""
    message: str = ""
    wait_name: str = ""
    wait_since: float = 0.0
    target: str = ""
    disposal: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """State, stable reason, words."""

    state: str
    reason: str
    message: str

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ENDED


def derive(tasks: Sequence[TaskFacts], *, paused: bool, cancelled: bool, begun: bool, now: float) -> Verdict:
    """The state of a transfer.

    Args:
        begun: whether a task of it ever ran.
    """
    states = {task.state for task in tasks}
    failed = [task for task in tasks if task.state == "failed"]
    gone = [task for task in tasks if task.disposal in ("quarantined", "purged")]
    if gone and not states & {"running", "waiting"}:
        return _disposed(tasks, gone)
    if states == {"done"}:
        return Verdict("completed", "done", "all is verified and durable at every target")
    if cancelled:
        return Verdict("terminated", "cancelled", "cancelled by a user; what landed stays")
    if failed and not states & {"running", "waiting"}:
        first = failed[0]
        where = f"{first.target}: " if first.target and len(tasks) > 1 else ""
        return Verdict("terminated", first.reason or "failed", where + (first.message or "a task failed"))
    if not states - {"done", "failed", "cancelled"}:
        return Verdict("terminated", "cancelled", "cancelled by a user; what landed stays")
    if paused:
        return Verdict("suspended", "paused", "paused by a user")
    if "running" in states:
        return Verdict("started", "running", "")
    waiting = [task for task in tasks if task.state == "waiting"]
    if all(
        task.wait_name == "agent-offline" and now - task.wait_since > OFFLINE_SUSPENDS_S for task in waiting
    ):
        return Verdict("suspended", "agent-offline", "no agent that could go on has answered for a minute")
    if all(task.reason == "policy-window" for task in waiting):
        state = "suspended" if begun else "requested"
        return Verdict(state, "policy-window", waiting[0].message or "policy permits it at other times only")
    if all(task.reason == "disk-full" for task in waiting):
        return Verdict("suspended", "disk-full", waiting[0].message or "the target's disk is full")
    if any(task.attempts and task.reason for task in waiting):
        first = next(task for task in waiting if task.attempts and task.reason)
        return Verdict("started" if begun else "requested", "retrying", first.message)
    return Verdict(
        "started" if begun else "requested", "waiting" if begun else "queued", "waits for its turn"
    )


def _disposed(tasks: Sequence[TaskFacts], gone: Sequence[TaskFacts]) -> Verdict:
    """The state of a transfer of which something may not stay where it arrived."""
    state = "purged" if all(task.disposal == "purged" for task in gone) else "quarantined"
    first = gone[0]
    where = ", ".join(sorted({task.target for task in gone if task.target}))
    place = f" at {where}" if where and len(tasks) > 1 else ""
    became = "was destroyed, with a certificate" if state == "purged" else "is in quarantine"
    if first.state == "done":
        return Verdict(state, first.reason or "delete-by", f"what had landed{place} {became}")
    why = f": {first.message}" if first.message else ""
    return Verdict(state, first.reason or "policy-stopped", f"what had arrived{place} {became}{why}")


def backoff_s(attempts: int) -> float:
    """How long to wait after so many failed attempts in a row.

    >>> [backoff_s(n) for n in (1, 2, 3, 7, 100)]
    [1.0, 2.0, 4.0, 60.0, 60.0]
    """
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(max(attempts, 1) - 1, 30))


def dialer(
    source: str, source_addresses: Sequence[str] | None, target: str, target_addresses: Sequence[str] | None
) -> Literal["source", "target"] | None:
    """Who dials on the one hop: the target where the source can be reached, else the source where the target can.

    Addresses are None for a site whose agent was never seen; it is taken to be reachable until it says otherwise.
    None where neither can be reached.

    >>> dialer("a", ["h:1"], "b", []), dialer("a", [], "b", ["h:2"]), dialer("a", [], "b", [])
    ('target', 'source', None)
    """
    if source == target or source_addresses is None or source_addresses:
        return "target"
    if target_addresses is None or target_addresses:
        return "source"
    return None
