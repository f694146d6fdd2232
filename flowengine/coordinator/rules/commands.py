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
    Lease,
    LeasesCommand,
    LimitsCommand,
    LookCommand,
    MeasureCommand,
    Meeting,
    MeetingsCommand,
    PoliciesCommand,
    ProbeCommand,
    QuarantineCommand,
    RevocationsCommand,
    RoutesCommand,
    TaskCommand,
    TaskRoute,
    WorkCommand,
)
from flowengine.api.links import Limit

__all__ = ["NOTHING_TOLD", "AgentView", "Asked", "Directive", "commands"]


@dataclass(frozen=True, slots=True)
class Directive:
    """What is to become of a held task."""

    fence: int
    directive: Literal["pause", "stop"]
    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """Something that somebody waits for an answer to: a look, a count, or a probe, for how many seconds yet.

    Attributes:
        body: JSON of what else its command says: for whom, or of a probe.
    """

    kind: str
    path: str
    body: str
    within_s: float

    def command(self, id_: str) -> Command:
        """As the agent is asked."""
        said = msgspec.json.decode(self.body)
        if self.kind == "measure":
            return MeasureCommand(id=id_, path=self.path, within_s=self.within_s, **said)
        if self.kind == "probe":
            return ProbeCommand(id=id_, within_s=self.within_s, **said)
        return LookCommand(id=id_, path=self.path, within_s=self.within_s, **said)


@dataclass(frozen=True, slots=True)
class AgentView:
    """What concerns an agent at one moment.

    Attributes:
        claimable: tasks that it could begin now.
        limits: JSON of the limits that concern it.
        quarantines: tasks to it that policy ended, with the reason, until it tells what became of what had arrived.
        policies: version of the bundle in force, serial of the last label statement.
        looks: what users wait for an answer to.
        routes: of held tasks: the fence, and JSON of the routes.
        leases: JSON of the leases on links out of the site.
        meetings: JSON of the relays at which the site is to wait.
    """

    claimable: frozenset[str] = frozenset()
    limits: bytes = b"[]"
    revoked: tuple[str, ...] = ()
    draining: bool = False
    directives: Mapping[str, Directive] = field(default_factory=dict)
    quarantines: Mapping[str, str] = field(default_factory=dict)
    policies: tuple[int, int] = (0, 0)
    looks: Mapping[str, Asked] = field(default_factory=dict)
    routes: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)
    leases: bytes = b"[]"
    meetings: bytes = b"[]"


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
    found += [asked.command(look) for look, asked in now.looks.items() if look not in told.looks]
    for task, (fence, routes) in now.routes.items():
        if told.routes.get(task) != (fence, routes):
            ways = msgspec.json.decode(routes, type=list[TaskRoute])
            found.append(RoutesCommand(task=task, fence=fence, routes=ways))
    if now.leases != told.leases:
        found.append(LeasesCommand(leases=msgspec.json.decode(now.leases, type=list[Lease])))
    if now.meetings != told.meetings:
        found.append(MeetingsCommand(meetings=msgspec.json.decode(now.meetings, type=list[Meeting])))
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
