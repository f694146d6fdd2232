"""Transfers under way, decided again while they run: stopped within seconds when this site's policy no longer permits.

Goal
    A permit is a lease: what ends it ends the transfer here, whatever coordinator and peer say or do not say.
Plan
    Every session that sends, passes on or receives is watched. Once a second, and at once when bundle, label, fact or
    approval changed, each is decided again by what is known now. A denial stops it in the way that its rules say:
    `stop-now` cuts its connections, `finish-file` lets what was offered land and offers nothing more, `drain` lets the
    session come to its end; none is begun anew. A site that has not heard from the coordinator for the policy's
    `max_offline` cuts what it watches and begins nothing.
Invariants
    - Nothing goes on for longer than a round after it was denied here, but for what its stop mode lets land.
    - A decision that changed is recorded before it takes effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

import trio

from flowengine.errors import Denied, FlowError, TemporaryError
from flowengine.policy.asking import Judged
from flowengine.policy.duties import StopMode, Terms, stop_mode, window_at
from flowengine.policy.merge import merge
from flowengine.policy.reasons import reasons
from flowengine.policy.zones import system_zone
from flowengine.transfer.session import Session

__all__ = ["Running", "Watch", "policy_stopped"]

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
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def stop(self, mode: StopMode, error: FlowError) -> None:
        """Stop it; a stricter mode may follow a milder one."""
        if self.mode == "stop-now" or (self.mode == mode):
            return
        self.mode, self.error = mode, error
        if mode == "stop-now":
            self.scope.cancel()
        elif mode == "finish-file" and self.session is not None:
            self.session.halt(error.message)

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
        now: Unix seconds.
        changed: told of a watch that is being stopped, before it takes effect.
    """

    def __init__(
        self,
        *,
        silent_s: Callable[[], float],
        now: Callable[[], float],
        changed: Callable[[Watch, str], None] = lambda watch, cause: None,
    ) -> None:
        self._silent_s = silent_s
        self._now = now
        self._changed = changed
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
    ) -> Iterator[Watch]:
        """Watch a session for the length of the block; a stop ends the block with its reason.

        Raises:
            FlowError: it may not run now, or was stopped (reasons "policy-stopped", "policy-window", "policy-offline").
        """
        watch = Watch(task, transfer, end, review, terms_of(judged), max_offline_s)
        self._check_offline(watch)
        self._check_window(watch)
        watch.check()
        self._watches.add(watch)
        try:
            with watch.scope:
                yield watch
        finally:
            self._watches.discard(watch)
        watch.check()

    async def run(self) -> None:
        """Decide again until cancelled."""
        while True:
            with trio.move_on_after(ROUND_S):
                await self._wake.wait()
            self._wake = trio.Event()
            cause, self._cause = self._cause or "time", ""
            for watch in list(self._watches):
                self._look(watch, cause)

    def _look(self, watch: Watch, cause: str) -> None:
        if watch.mode == "stop-now":
            return
        try:
            judged = watch.review()
        except FlowError as error:
            self._stop(watch, "stop-now", stopped_by(error), cause)
            return
        denied = next((one for one in judged if not one.decision.permit), None)
        if denied is not None:
            self._stop(watch, stop_mode(denied.decision, watch.terms), policy_stopped(denied), cause)
            return
        watch.terms = terms_of(judged)
        before = watch.mode
        self._check_offline(watch)
        self._check_window(watch)
        if watch.mode != before:
            self._changed(watch, cause)

    def _stop(self, watch: Watch, mode: StopMode, error: FlowError, cause: str) -> None:
        before = watch.mode
        if before in ("stop-now", mode):
            return
        self._changed_before(watch, mode, error, cause)
        watch.stop(mode, error)

    def _changed_before(self, watch: Watch, mode: StopMode, error: FlowError, cause: str) -> None:
        shown = Watch(watch.task, watch.transfer, watch.end, watch.review, watch.terms, None, mode, error)
        self._changed(shown, cause)

    def _check_offline(self, watch: Watch) -> None:
        silent, most = self._silent_s(), watch.max_offline_s
        if most is not None and silent > most:
            watch.stop(
                "stop-now",
                TemporaryError(
                    f"this site has not heard from the coordinator for {silent:.0f} s, and its policies permit "
                    f"{most:.0f} s: a change of them could not have reached it",
                    hint="it goes on, decided anew, when the coordinator answers",
                    reason="policy-offline",
                ),
            )

    def _check_window(self, watch: Watch) -> None:
        names = {window.rpartition(" ")[0] for window in watch.terms.windows}
        zones = {name: zone for name in names if (zone := system_zone(name)) is not None}
        window = window_at(watch.terms.windows, int(self._now()), zones)
        if not window.open:
            watch.stop("stop-now", window_closed(watch.terms.windows, window.until))


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
    )


def policy_stopped(denied: Judged) -> Denied:
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
    )


def stopped_by(error: FlowError) -> Denied:
    """The same, where it could not even be decided."""
    return Denied(error.message, hint=error.hint, reason=STOPPED, because=[error.reason])
