"""The tasks that this agent holds: it claimed them, dials the peer, and keeps their leases.

Goal
    A task runs from its claim to its end, or to the end of its lease, whatever happens to the coordinator, the peer
    or this process meanwhile.
Plan
    A claimed task is journalled, then run by the engine while its reporter keeps the lease. After a restart what is
    journalled and whose lease runs is simply run again under the same grant: the engine continues from its staging.
Invariants
    - Nothing is sent or written for a task after its lease ended or another claim superseded it.
    - A task leaves the journal only after its last report is in it.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Final

import trio

from flowengine.api.agents import TaskGrant, TaskRoute, check_required
from flowengine.errors import FlowError, TemporaryError
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.routes import RoutedPeer
from flowengine.trust.grant import Grant
from flowengine_agent.engine import Finished, drive
from flowengine_agent.logs import Log
from flowengine_agent.relaying import RouteGate, routed_peer, usable_ways
from flowengine_agent.reporting import REPORT_EVERY_S, FinalState, TaskReporter
from flowengine_agent.site import Site, decode_grant

__all__ = ["HeldTasks"]

_NOT_WANTED: Final = frozenset({"fence-superseded", "grant-superseded", "not-found"})
"""Reasons with which nobody wants to hear of a task's fence any more."""
_NEEDS_NEW_GRANT: Final = frozenset(
    {"grant-replayed", "grant-expired", "busy", "policy-window", "policy-offline"}
)
_TELL_S: Final = 5.0
"""How long a task stays, at least, to have its last report taken before that is left to the journal."""
_ASK_AGAIN_S: Final = 1.0
"""How often a source that has sent everything asks whether the target's word has arrived."""
_TARGET_TELLS_S: Final = 90.0
"""How long it asks. A target that was killed before it journalled its word never tells: a new claim goes over it."""


class _Run:
    """One held task while it runs."""

    def __init__(self, site: Site, granted: TaskGrant, lease_until: float) -> None:
        self.site = site
        self.granted = granted
        self.scope = trio.CancelScope()
        self.directive = ""
        self.reason = ""
        self.lease_end = trio.current_time() + lease_until - time.time()
        self.grant: Grant | None = None
        self.peer: RoutedPeer | None = None
        self.ended = trio.Event()
        self.reporter = TaskReporter(
            site.link,
            site.journal,
            site=site.name,
            task=granted.task,
            fence=granted.fence,
            every_s=min(REPORT_EVERY_S, granted.lease_s / 2),
            refused=self.stop,
            new_grant=self._new_grant,
            extended=self._extended,
        )

    def stop(self, directive: str, reason: str) -> None:
        """Stop the engine: "pause" and "stop" by the coordinator, "release" by this agent itself."""
        if not self.directive:
            self.directive, self.reason = directive, reason
            self.scope.cancel()

    def _new_grant(self, text: str) -> None:
        if self.peer is None:
            return
        try:
            document = decode_grant(text)
            self.grant = self.site.trust.admit(document, dials=True)
            self.peer.document = document
            self.peer.gate = RouteGate(self.site, self.grant)
        except FlowError as error:
            self.site.log.warning("a new grant is of no use", task=self.granted.task, why=error.message)

    def _extended(self, sent_at: float, lease_s: int) -> None:
        self.lease_end = sent_at + lease_s
        left = self.lease_end - trio.current_time()
        self.site.journal.extend(self.granted.task, self.granted.fence, time.time() + left)

    async def keep_lease(self) -> None:
        """Stop the engine when the lease ends."""
        while (end := self.lease_end) > trio.current_time():  # noqa: ASYNC110 - reports move the end on
            await trio.sleep_until(end)
        self.stop("release", "lease-ended")


class HeldTasks:
    """Runs what was claimed.

    Args:
        changed: called when a task ended: there is room for another.
    """

    def __init__(self, site: Site, nursery: trio.Nursery, changed: Callable[[], None]) -> None:
        self._site = site
        self._nursery = nursery
        self._changed = changed
        self._runs: dict[str, _Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def holding(self) -> dict[str, int]:
        """Fences of the tasks that run, by task."""
        return {task: run.granted.fence for task, run in self._runs.items()}

    def start(self, granted: TaskGrant, lease_until: float, *, resumed: bool = False) -> None:
        """Run a task until it ends.

        Args:
            lease_until: Unix seconds by this host's clock.
        """
        before = self._runs.get(granted.task)
        if before is not None:
            if before.granted.fence >= granted.fence:
                return
            before.stop("stop", "grant-superseded")
        if not resumed:
            self._site.journal.hold(granted, lease_until)
        run = _Run(self._site, granted, lease_until)
        self._runs[granted.task] = run
        self._nursery.start_soon(self._run, run, before)

    def tell(self, task: str, fence: int, directive: str, reason: str) -> None:
        """The coordinator wants a task paused or stopped."""
        run = self._runs.get(task)
        if run is not None and run.granted.fence == fence:
            run.stop(directive, reason)

    def follow(self, task: str, fence: int, routes: list[TaskRoute]) -> None:
        """The routes of a task are these from now on, also in the session that runs."""
        run = self._runs.get(task)
        if run is None or run.granted.fence != fence:
            return
        ways = usable_ways(self._site, run.granted, routes)
        if not ways:
            self._site.log.warning(
                "no route is left by the plan; the task keeps those that it has", task=task
            )
            return
        run.granted.routes = routes
        self._site.log.info("routes", task=task, ways=[" > ".join(way.sites) for way in ways])
        if run.peer is not None:
            run.peer.use(ways)

    def drop_revoked(self) -> None:
        """Leave peers whose certificates were revoked while a session with them was open."""
        for run in self._runs.values():
            if run.peer is not None:
                run.peer.drop_revoked()
            if run.peer is not None and run.peer.serial in self._site.trust.revoked:
                self._site.log.warning(
                    "session ended",
                    reason="certificate-revoked",
                    task=run.granted.task,
                    serial=run.peer.serial,
                )
                run.stop("release", "certificate-revoked")

    async def drain(self, grace_s: float) -> None:
        """Let what is nearly done end, give the rest back, and wait until all has been told."""
        with trio.move_on_after(grace_s):
            await self._all_ended()
        for run in self._runs.values():
            run.stop("release", "draining")
        await self._all_ended()

    async def _all_ended(self) -> None:
        while self._runs:
            await next(iter(self._runs.values())).ended.wait()

    async def _run(self, run: _Run, before: _Run | None) -> None:
        site, granted = self._site, run.granted
        log = site.log.bind(task=granted.task, transfer=granted.transfer, fence=granted.fence)
        try:
            if before is not None:
                await before.ended.wait()
            log.info(
                "task begins",
                role=granted.role,
                source=f"{granted.source.site}:{granted.source.path}",
                target=f"{granted.target.site}:{granted.target.path}",
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.reporter.run)
                nursery.start_soon(run.keep_lease)
                await self._drive(run, log)
                # Until the last word was taken; where the coordinator is away it waits in the journal.
                if run.reporter.concluded:
                    with trio.move_on_after(max(_TELL_S, run.lease_end - trio.current_time())):
                        await run.reporter.told.wait()
                nursery.cancel_scope.cancel()
        finally:
            site.journal.let_go(granted.task, granted.fence)
            if self._runs.get(granted.task) is run:
                del self._runs[granted.task]
            run.ended.set()
            self._changed()

    async def _drive(self, run: _Run, log: Log) -> None:
        """Run the engine and file the last report."""
        site, granted, reporter = self._site, run.granted, run.reporter
        finished: Finished | None = None
        error: FlowError | None = None
        with run.scope:
            try:
                check_required(granted)
                document = decode_grant(granted.grant)
                run.grant = site.trust.admit(document, dials=True)
                run.peer = routed_peer(site, granted, run.grant, document)
                finished = await drive(site, granted, run.grant, run.peer, reporter)
            except FlowError as raised:
                error = raised
            except BaseExceptionGroup as group:
                error = first_flow_error(group) or _bug(group, log)
                if error is None:
                    raise
            except Exception as bug:  # whatever is wrong with one task must not end the others
                error = _internal(bug, log)
        if finished is not None:
            await self._finished(run, finished)
        elif run.directive:
            log.info("task given back", why=run.reason or run.directive)
            if run.reason not in _NOT_WANTED:
                error = TemporaryError(f"the task was given back: {run.reason}", reason=run.reason)
                reporter.finish("released", error=error)
        else:
            assert error is not None
            # A grant that was used up by an earlier life of this process, or ended: a new claim brings another.
            state: FinalState = "released" if error.reason in _NEEDS_NEW_GRANT else "failed"
            log.warning("task " + state, reason=error.reason, why=error.message)
            reporter.finish(state, error=error)

    async def _finished(self, run: _Run, finished: Finished) -> None:
        site, reporter = self._site, run.reporter
        assert run.grant is not None
        if run.granted.role == "source":
            site.ledger.spend(run.grant)
            await self._wait_for_target(run)
            return
        reporter.finish(
            "done",
            version_id=finished.version_id.hex(),
            receipt=base64.b64encode(finished.receipt).decode("ascii"),
        )
        site.ledger.spend(run.grant)  # behind the journal: an end that was told is never run again

    async def _wait_for_target(self, run: _Run) -> None:
        """All is sent and the target says that it is durable: keep the lease until the coordinator knows."""
        run.scope = trio.CancelScope(deadline=trio.current_time() + _TARGET_TELLS_S)
        run.reporter.standing.wait = "target-report: the target's agent has not told the coordinator yet"
        with run.scope:
            while not run.directive:
                run.reporter.changed()
                await trio.sleep(_ASK_AGAIN_S)
        if run.directive in ("", "pause"):
            run.reporter.finish(
                "released",
                error=TemporaryError(
                    "the target's agent has not told the coordinator that everything landed",
                    hint="the next claim goes over what is there",
                    reason="stalled",
                ),
            )


def _bug(group: BaseExceptionGroup[BaseException], log: Log) -> FlowError | None:
    """An error for the programming errors in a group; None where it is only about being cancelled, or ending."""
    _, rest = group.split(trio.Cancelled)
    return _internal(rest, log) if isinstance(rest, ExceptionGroup) else None


def _internal(bug: Exception, log: Log) -> FlowError:
    log.error("internal error, please report it", exc_info=bug)
    return FlowError(
        f"an internal error of this agent: {bug!r}"[:500],
        hint="look at the agent's log, and please report it",
    )
