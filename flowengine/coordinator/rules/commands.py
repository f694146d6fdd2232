"""What an agent must be told: the difference between what it was told and what is.

Because it is a difference of states, not a queue of messages, nothing is lost when a stream breaks or a coordinator
dies: the next stream begins with all that holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from flowengine.api.agents import (
    Command,
    DrainCommand,
    LimitsCommand,
    LookCommand,
    PoliciesCommand,
    QuarantineCommand,
    RevocationsCommand,
    TaskCommand,
    WorkCommand,
)
from flowengine.api.resources import Limit

__all__ = ["NOTHING_TOLD", "AgentView", "Directive", "commands"]


@dataclass(frozen=True, slots=True)
class Directive:
    """What is to become of a held task."""

    fence: int
    directive: Literal["pause", "stop"]
    reason: str


@dataclass(frozen=True, slots=True)
class AgentView:
    """What concerns an agent at one moment.

    Attributes:
        claimable: tasks that it could begin now.
        limits: JSON of the limits that concern it.
        quarantines: tasks to it that policy ended, with the reason, until it tells what became of what had arrived.
        looks: listings that users wait for: path, and for how many seconds yet.
        policies: version of the bundle in force, serial of the last label statement.
    """

    claimable: frozenset[str] = frozenset()
    limits: bytes = b"[]"
    revoked: tuple[str, ...] = ()
    draining: bool = False
    directives: Mapping[str, Directive] = field(default_factory=dict)
    quarantines: Mapping[str, str] = field(default_factory=dict)
    looks: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    policies: tuple[int, int] = (0, 0)


NOTHING_TOLD = AgentView()


def commands(told: AgentView, now: AgentView) -> list[Command]:
    """The commands that bring an agent from what it was told to what is.

    >>> commands(NOTHING_TOLD, AgentView(claimable=frozenset({"t-1.1"})))
    [WorkCommand()]
    """
    found: list[Command] = []
    for task, directive in now.directives.items():
        if told.directives.get(task) != directive:
            found.append(
                TaskCommand(
                    task=task,
                    fence=directive.fence,
                    directive=directive.directive,
                    reason=directive.reason,
                )
            )
    for look, (path, within_s) in now.looks.items():
        if look not in told.looks:
            found.append(LookCommand(id=look, path=path, within_s=within_s))
    for task, why in now.quarantines.items():
        if task not in told.quarantines:
            found.append(QuarantineCommand(task=task, why=why))
    if now.revoked != told.revoked:
        found.append(RevocationsCommand(revoked=list(now.revoked)))
    if now.policies != told.policies:
        bundle, labels = now.policies
        found.append(PoliciesCommand(bundle=bundle, labels=labels))
    if now.limits != told.limits:
        found.append(LimitsCommand(limits=msgspec.json.decode(now.limits, type=list[Limit])))
    if now.draining != told.draining:
        found.append(DrainCommand(on=now.draining))
    if now.claimable - told.claimable:
        found.append(WorkCommand())
    return found
