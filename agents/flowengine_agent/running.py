"""Transfers under way, decided again while they run: stopped within seconds when this site's policy no longer permits.

Goal
    A permit is a lease: what ends it ends the transfer here, whatever coordinator and peer say or do not say.
Plan
    Every session that sends, passes on or receives is watched. Once a second, and at once when bundle, label, fact or
    approval changed, each is decided again by what is known now. A denial stops it in the way that its rules say:
    `stop-now` cuts its connections, `finish-file` lets objects come to their end of which something has landed, `drain` lets the
    session come to its end; none is begun anew. A site that has not heard from the coordinator for the policy's
    `max_offline` cuts what it watches and begins nothing.
Invariants
    - Nothing goes on for longer than a round after it was denied here, but for what its stop mode lets land.
    - A stop takes effect first and is recorded then: unlike a permit, it needs no record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

import trio

from flowengine.errors import Denied, FlowError, TemporaryError
from flowengine.policy.asking import Judged
from flowengine.policy.duties import Instant, StopMode, Terms, stop_mode, window_at
from flowengine.policy.merge import merge
from flowengine.policy.reasons import reasons
from flowengine.policy.zones import system_zone
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.session import Session
from flowengine_agent.recording import Owed

__all__ = ["End", "Running", "Watch", "policy_stopped", "stopped_by", "terms_of"]

ROUND_S: Final = 1.0
"""How often everything under way is decided again, for what only time changes."""
STOPPED: Final = "policy-stopped"

End = Literal["source", "relay", "target"]
Review = Callable[[], Sequence[Judged]]
"""Decides a use again with what is known now; records nothing."""


@dataclass(eq=False)
class Watch:
    """One session under way.

    Attributes:
        task, transfer: what it carries.
        end: what this site is in it.
        terms: the duties that hold for it now.
        mode: how it was stopped; empty while it was not.
        error: why.
        session: while there is one; halted by `finish-file`.
        on_account: whether what lands in it is kept account of.
        data: what it carries, as `site:/path`.
        denied: the decision that it is stopped by; None where it was stopped by something else.
        owed: the duties that this site took on for it.
        bug: what went wrong here as it was decided again or stopped, and should not have.
    """

    task: str
    transfer: str
    end: End
    review: Review
    terms: Terms
    max_offline_s: float | None
    mode: StopMode | Literal[""] = ""
    error: FlowError | None = None
    session: Session | None = None
    on_account: bool = False
    data: str = ""
    denied: Judged | None = None
    owed: Sequence[Owed] = ()
    bug: Exception | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def stop(self, mode: StopMode, error: FlowError) -> None:
        """Stop it; a stricter mode may follow a milder one."""
        if self.mode == "stop-now" or (self.mode == mode):
            return
        self.mode, self.error = mode, error
        if mode == "stop-now":
            self.scope.cancel()
        elif mode == "finish-file" and self.session is not None:
            try:
                self.session.halt(error.message)
            except Exception as bug:
                # Whatever is wrong with the milder way: what policy ends must end, and nothing else with it.
                self.bug = bug
                self.stop("stop-now", error)

    def check(self) -> None:
        """Raise why it was stopped, if it was.

        Raises:
            FlowError: it was.
        """
        if self.error is not None:
            raise self.error


class Running:
    """Everything under way at this site.

    Args:
        silent_s: for how long the coordinator was not heard.
        now: between which Unix seconds it is.
        stopped: told of a session that was stopped, and which change led to it.
    """

    def __init__(
        self,
        *,
        silent_s: Callable[[], float],
        now: Callable[[], Instant],
        stopped: Callable[[Watch, str], Awaitable[None]],
    ) -> None:
        self._silent_s = silent_s
        self._now = now
        self._stopped = stopped
        self._watches: set[Watch] = set()
        self._wake = trio.Event()
        self._cause = ""

    def __len__(self) -> int:
        return len(self._watches)

    def recheck(self, cause: str) -> None:
        """Decide everything again now: `cause` changed ("bundle", "label", "fact", "approval")."""
        self._cause = cause
        self._wake.set()

    @contextlib.contextmanager
    def watch(
        self,
        task: str,
        transfer: str,
        end: End,
        review: Review,
        judged: Sequence[Judged],
        *,
        max_offline_s: float | None = None,
        data: str = "",
        owed: Sequence[Owed] = (),
    ) -> Iterator[Watch]:
        """Watch a session for the length of the block; `stop-now` ends the block with its reason.

        After a milder stop the caller asks `Watch.check` where not everything came through.

        Raises:
            FlowError: it may not run now, or was stopped (reasons "policy-stopped", "policy-window", "policy-offline").
        """
        watch = Watch(task, transfer, end, review, terms_of(judged), max_offline_s, data=data, owed=owed)
        error = self._hindered(watch)
        if error is not None:
            raise error
        self._watches.add(watch)
        try:
            with watch.scope:
                yield watch
        except (FlowError, BaseExceptionGroup) as raised:
            # What was cut complains of it: the stop is the reason.
            if watch.mode != "stop-now" or watch.error is None or not _is_ours(raised):
                raise
            raise watch.error from raised
        finally:
            self._watches.discard(watch)
        if watch.mode == "stop-now":
            watch.check()

    def is_watched(self, task: str) -> bool:
        """Whether a session of a task is under way here."""
        return any(watch.task == task for watch in self._watches)

    async def run(self) -> None:
        """Decide again until cancelled."""
        while True:
            with trio.move_on_after(ROUND_S):
                await self._wake.wait()
            self._wake = trio.Event()
            cause, self._cause = self._cause or "time", ""
            for watch in list(self._watches):
                mode, error = self._look(watch)
                if error is not None and watch.mode not in ("stop-now", mode):
                    watch.stop(mode, error)  # first: what is said of it may take its time
                    await self._stopped(watch, cause)

    async def look_at_end(self, watch: Watch) -> None:
        """Decide once more on a session that came to its end: a mild stop may have come since the last round.

        What such a stop lets land has landed by now. A denial that stops at once is left to who publishes.
        """
        if watch.mode:
            return
        mode, error = self._look(watch)
        if error is not None and mode != "stop-now":
            watch.stop(mode, error)
            await self._stopped(watch, "time")

    def _look(self, watch: Watch) -> tuple[StopMode, FlowError | None]:
        """How a watched session is to stop, and why; no error where it may go on."""
        try:
            return self._judge(watch)
        except FlowError as error:
            return "stop-now", stopped_by(error)
        except Exception as bug:
            # What cannot be decided is not permitted, and the others are looked at all the same.
            watch.bug = bug
            return "stop-now", undecided(bug)

    def _judge(self, watch: Watch) -> tuple[StopMode, FlowError | None]:
        judged = watch.review()
        denied = next((one for one in judged if not one.decision.permit), None)
        if denied is not None:
            mode = stop_mode(denied.decision, watch.terms)
            watch.denied = denied
            return mode, policy_stopped(denied, mode)
        watch.terms = terms_of(judged)
        return "stop-now", self._hindered(watch)

    def _hindered(self, watch: Watch) -> FlowError | None:
        """What keeps a permitted session from running at this moment."""
        silent, most = self._silent_s(), watch.max_offline_s
        if most is not None and silent > most:
            return TemporaryError(
                f"this site has not heard from the coordinator for {silent:.0f} s, and its policies permit "
                f"{most:.0f} s: a change of them could not have reached it",
                hint="it goes on, decided anew, when the coordinator answers",
                reason="policy-offline",
            )
        names = {window.rpartition(" ")[0] for window in watch.terms.windows}
        zones = {name: zone for name in names if (zone := system_zone(name)) is not None}
        now = self._now()
        for at in dict.fromkeys((int(now.early), int(now.late))):  # whichever it is
            window = window_at(watch.terms.windows, at, zones)
            if not window.open:
                return window_closed(watch.terms.windows, window.until)
        return None


def _is_ours(raised: BaseException) -> bool:
    return isinstance(raised, FlowError) or first_flow_error(raised) is not None


def terms_of(judged: Sequence[Judged]) -> Terms:
    """The duties of several decisions on one transfer, read as one; those of one site merge without collision."""
    if len(judged) == 1:
        return Terms.of(judged[0].decision.duties)
    merged = merge([duty for one in judged for duty in one.decision.duties])
    return Terms.of(merged.duties if merged.collision is None else judged[0].decision.duties)


def window_closed(windows: Sequence[str], until: int | None) -> TemporaryError:
    """The error of a transfer outside of its windows."""
    opens = "" if until is None else f"; it opens at {datetime.fromtimestamp(until, UTC).isoformat()}"
    return TemporaryError(
        f"policy permits this transfer only {' and '.join(windows)}{opens}",
        hint="it goes on by itself then",
        reason="policy-window",
        opens=until,
    )


def undecided(bug: Exception) -> FlowError:
    """The error of a transfer of which this site could not find out whether it is permitted still."""
    return FlowError(
        f"this site could not decide again whether policy permits this transfer: {bug!r}"[:500],
        hint="look at the agent's log, and please report it",
    )


def policy_stopped(denied: Judged, mode: StopMode = "stop-now") -> Denied:
    """The error of a transfer that was permitted and is no longer."""
    found = reasons(denied.decision)
    why = ", ".join(found.because) or found.kind
    missing = f"; missing: {', '.join(found.missing)}" if found.missing else ""
    return Denied(
        f"policy no longer permits to {denied.decision.use} this data at {denied.place.name}: {found.kind}, {why}"
        + missing,
        hint="flow why names each rule; what had arrived is in quarantine at the target and will be destroyed",
        reason=STOPPED,
        use=denied.decision.use,
        site=denied.place.name,
        because=list(found.because),
        mode=mode,
    )


def stopped_by(error: FlowError) -> Denied:
    """The same, where it could not even be decided."""
    return Denied(error.message, hint=error.hint, reason=STOPPED, because=[error.reason])
