"""Reports on tasks: numbered, journalled before they are sent, sent again until they are taken.

Goal
    The coordinator hears in order, once each, what became of a task, however often either side dies.
Plan
    One `TaskReporter` per task and fence. It has one report on its way at a time; what happens meanwhile goes into
    the next. While the coordinator is away the same report is sent again, with the same number.
Invariants
    - A number is used for one text only; it is in the journal before it is on the wire.
    - The last report of a fence has a final state, and nothing is reported after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

import msgspec
import trio

from flowengine.api.agents import HopTraffic, Report, ReportReply
from flowengine.api.transfers import Counters, LandedObject
from flowengine.errors import FlowError
from flowengine_agent.coordinator_link import CoordinatorLink
from flowengine_agent.journal import Journal, Pending

__all__ = ["REPORT_EVERY_S", "FinalState", "Standing", "TaskReporter", "deliver", "tell_left_over"]

REPORT_EVERY_S: Final = 2.0
_GATHER_S: Final = 0.1
"""What landed waits so long for more, unless the task ends: a short task sends one report and not three."""
_LOOK_AGAIN_S: Final = 60.0
_FIRST_PAUSE_S: Final = 0.25
_LAST_PAUSE_S: Final = 5.0
FinalState: TypeAlias = Literal["done", "failed", "released"]


@dataclass
class Standing:
    """How a task stands; the engine's observers write it, the reporter reads it."""

    counters: Counters = field(default_factory=Counters)
    rate_bits_per_s: float = 0.0
    bottleneck: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    hops: list[HopTraffic] = field(default_factory=list)
    wait: str = ""


class TaskReporter:
    """Tells the coordinator how one task stands, until it ends.

    Args:
        site: this agent's name, for landed objects.
        lease_s: term of the lease; None for the side that does not hold it.
        refused: called once when the coordinator wants the task stopped: with the directive ("pause", "stop"), the
            reason. Reason "fence-superseded": somebody else has the task.
        new_grant: called with a new grant for the task.
        extended: called with the moment (trio's clock) until which the lease now runs.
    """

    def __init__(
        self,
        link: CoordinatorLink,
        journal: Journal,
        *,
        site: str,
        task: str,
        fence: int,
        every_s: float,
        refused: Callable[[str, str], None],
        new_grant: Callable[[str], None] = lambda grant: None,
        extended: Callable[[float, int], None] = lambda sent_at, lease_s: None,
    ) -> None:
        self._link = link
        self._journal = journal
        self._site = site
        self._task = task
        self._fence = fence
        self._every_s = every_s
        self._refused = refused
        self._new_grant = new_grant
        self._extended = extended
        journal.adopt_landed(task, fence)
        self._seq = journal.last_seq(task, fence)
        self._wake = trio.Event()
        self._due = trio.current_time() + min(_GATHER_S, every_s)
        self._final = journal.conclusion(task, fence)
        if self._final is not None:
            self._due = 0.0
        self._token = trio.lowlevel.current_trio_token()
        self.standing = Standing()
        self.told = trio.Event()
        """Set when the final report was taken, or none is wanted any more."""

    @property
    def concluded(self) -> bool:
        """Whether the task ended here."""
        return self._final is not None

    def changed(self) -> None:
        """Report soon; from any thread."""
        try:
            self._token.run_sync_soon(self._hasten, _GATHER_S)
        except trio.RunFinishedError:
            pass

    def _hasten(self, within_s: float) -> None:
        due = trio.current_time() + within_s
        if due < self._due:
            self._due = due
            self._wake.set()

    def landed(self, rows: list[tuple[str, int]]) -> None:
        """Objects (path, size) are durable; journalled now, reported soon. From any thread."""
        self._journal.add_landed(self._task, self._fence, rows)
        self.changed()

    def finish(
        self,
        state: FinalState,
        *,
        error: FlowError | None = None,
        version_id: str = "",
        receipt: str = "",
    ) -> None:
        """The task ended here; journalled at once, so that it is told even if this process dies now."""
        self._final = Report(
            fence=self._fence,
            seq=0,
            state=state,
            counters=self.standing.counters,
            bottleneck=self.standing.bottleneck,
            version_id=version_id,
            receipt=receipt,
            reason=error.reason if error else "",
            message=error.message if error else "",
            hint=error.hint if error else "",
            retryable=error.retryable if error else False,
            not_before=_not_before(error),
            hops=self.standing.hops,
        )
        self._journal.conclude(self._task, self._final, time.time())
        self._hasten(0)

    async def run(self) -> None:
        """Send reports until the final one was taken, or the coordinator does not want them any more."""
        try:
            await self._report()
        finally:
            self.told.set()

    async def _report(self) -> None:
        for pending in self._journal.pending(self._task, self._fence):
            if not await self._send(pending):
                return
        while True:
            await self._until_due()
            self._due = trio.current_time() + self._every_s
            final = self._final  # asked for first: what landed before the end is among the rows
            rows = self._journal.next_landed(self._task, self._fence)
            more = bool(rows) and self._journal.has_landed(self._task, self._fence, rows[-1][0])
            if not await self._send(self._file(rows, None if more else final)):
                return
            if more or (final is None and self._final is not None):
                self._due = 0.0
            elif final is not None:
                self._journal.told(self._task, self._fence)
                return

    async def _until_due(self) -> None:
        while trio.current_time() < self._due:
            self._wake = trio.Event()
            with trio.move_on_at(self._due):
                await self._wake.wait()

    def _file(self, rows: list[tuple[int, str, int]], final: Report | None) -> Pending:
        self._seq += 1
        standing = self.standing
        landed = [
            LandedObject(seq=0, target=self._site, path=path, size_bytes=size) for _, path, size in rows
        ]
        if final is not None:
            report = msgspec.structs.replace(final, seq=self._seq, landed=landed)
        else:
            report = Report(
                fence=self._fence,
                seq=self._seq,
                state="running",
                counters=standing.counters,
                landed=landed,
                rate_bits_per_s=standing.rate_bits_per_s,
                bottleneck=standing.bottleneck,
                stages=standing.stages,
                wait=standing.wait,
                hops=standing.hops,
            )
        return self._journal.file_report(self._task, report, time.time(), rows[-1][0] if rows else 0)

    async def _send(self, pending: Pending) -> bool:
        """Have a report taken, however long that takes; False when nothing more is to be reported."""
        pause = _FIRST_PAUSE_S
        while True:
            sent_at = trio.current_time()
            try:
                reply = await deliver(self._link, pending)
            except FlowError as error:
                if not error.retryable:
                    self._journal.put_back(pending)
                    self._journal.told(self._task, self._fence)
                    self._refused("stop", error.reason)
                    return False
                await trio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE_S)
                continue
            self._journal.taken(pending.id)
            if reply.lease_s:
                self._extended(sent_at, reply.lease_s)
            if reply.grant:
                self._new_grant(reply.grant)
            if reply.directive != "go" and pending.report.state == "running":
                self._refused(reply.directive, reply.reason)
            return True


def _not_before(error: FlowError | None) -> datetime | None:
    """When a task that waits for its window may be claimed again: as this site knows, or soon where a peer said so."""
    if error is None or error.reason != "policy-window":
        return None
    opens = error.context.get("opens")
    return datetime.fromtimestamp(opens if isinstance(opens, int) else time.time() + _LOOK_AGAIN_S, UTC)


async def deliver(link: CoordinatorLink, pending: Pending) -> ReportReply:
    """Send one report once; errors as of `CoordinatorLink.post`."""
    return await link.post(f"/v1/agent/tasks/{pending.task}/reports", pending.report, ReportReply)


async def tell_left_over(link: CoordinatorLink, journal: Journal, site: str, running: set[str]) -> None:
    """Tell what an earlier life of this agent could not, of tasks that do not run any more; until all of it is told."""
    for task, fence in journal.untold():
        if task in running:
            continue
        if journal.conclusion(task, fence) is None:
            # It did not end: whoever holds the task now tells of it; this was never taken and never will be.
            for pending in journal.pending(task, fence):
                try:
                    await deliver(link, pending)
                    journal.taken(pending.id)
                except FlowError as error:
                    if error.retryable:
                        return
                    journal.put_back(pending)
            continue
        reporter = TaskReporter(
            link, journal, site=site, task=task, fence=fence, every_s=REPORT_EVERY_S, refused=lambda *_: None
        )
        await reporter.run()
