"""What the duties of a permit mean for a transfer: when it may run, how it stops, what becomes of what landed.

Goal
    Every agent and the coordinator read the same duties in the same way, and act at the same instant.
Plan
    `Terms` is one decision's merged duties, read once. The functions below answer what follows from them at a moment:
    whether a window is open, how a transfer stops that is no longer permitted, when what landed has to go.
Invariants
    - What cannot be told is taken in the strict way: no stop mode said means `stop-now`, an unknown time zone is a
      closed window, a clock that may be anywhere between two times is early for keeping and late for deleting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import Final, Literal

from flowengine.policy.evaluate import Decision
from flowengine.policy.merge import open_intervals
from flowengine.policy.model import FALSE, Duty

__all__ = [
    "AGENT_CAN",
    "NOT_AT",
    "STOP_MODES",
    "Clock",
    "Deletion",
    "Instant",
    "StopMode",
    "Terms",
    "Window",
    "deletion",
    "disagreement",
    "dump_duties",
    "load_duties",
    "stop_mode",
    "strictest",
    "window_at",
]

AGENT_CAN: Final = frozenset(
    {
        "approve",  # signed yeses are checked at the source before the first byte, and while it runs
        "count",  # reserved and counted at the source and at the coordinator; the larger figure holds
        "delete",  # timers at the target, with quarantine first
        "encrypt.end-to-end",
        "encrypt.flight",
        "encrypt.rest",  # sealed objects where data is held; see NOT_AT
        "isolate",  # no chunk index, no look at what else lies there; there are no shared dictionaries and no caches
        "legal_hold",  # suspends deletion, and what would overwrite or delete
        "log",  # every decision and duty is in the site's evidence
        "onward",  # what landed is no source again, or under the same duties
        "proof.certificate",
        "proof.receipt",  # a certificate says more
        "quarantine",
        "rate_max",  # at the source, over all sessions of the transfer
        "retain",  # nothing here deletes or overwrites it before its time
        "spill",  # see NOT_AT
        "stop",
        "suite.aes-256-gcm",
        "window",
    }
)
"""What an agent of this version really does; what is not here denies (docs/reference/duties.md)."""
NOT_AT: Final[Mapping[str, frozenset[str]]] = {
    "release": frozenset({"encrypt.rest"}),
    "hold": frozenset({"spill"}),
    "land": frozenset({"encrypt.rest", "spill"}),
    "process": frozenset({"encrypt.rest", "spill"}),
}
"""What it cannot do for a use. A relay keeps nothing on a disk, and a source stages nothing; where data lands, it is on
a disk, in staging first, so that `spill` cannot be promised there. What is stored sealed cannot be read where it is: so
it can be held, and not land; and what a source has of its own it has as it is."""

StopMode = Literal["stop-now", "finish-file", "drain"]
STOP_MODES: Final[tuple[StopMode, ...]] = ("stop-now", "finish-file", "drain")
"""What becomes of a transfer that is no longer permitted, strictest first."""
_SEARCH_DAYS: Final = 8


def strictest(modes: Iterable[str]) -> StopMode:
    """The strictest of stop modes; none said is `stop-now`.

    >>> strictest(["drain", "finish-file"]), strictest([])
    ('finish-file', 'stop-now')
    """
    given = set(modes)
    return next((mode for mode in STOP_MODES if mode in given), "stop-now")


@dataclass(frozen=True, slots=True)
class Terms:
    """One permit's duties, read.

    Attributes:
        duties: as merged.
        stop: how the transfer stops when it is no longer permitted; "" where no duty says so.
        quarantine: whether what has landed of it goes to quarantine too; None where no duty says so.
        windows: daily windows, as `merge.open_intervals` takes them; the transfer runs while all are open.
        rate_bits_per_s: most that may leave the source for the transfer.
        delete_by: instant (Unix seconds) by which what landed must be gone.
        delete_after_s: the same, counted from when it landed.
        retain_s: how long it must be kept from when it landed.
        holds: legal cases that suspend a deletion.
        proof: proof of deletion that is owed: "certificate", "receipt" or "none".
        onward: "forbid" (no source of another transfer), "same-duties" or "".
        isolate: what must not be shared with other data: chunks, dictionary, caches.
        spill: "memory-only", "encrypted-disk" or "".
        at_rest: whether what is stored must be sealed.
        suites: permitted suites in flight, strongest first; empty: any.
        counts: counters, as the duty `count` names them.
        evidence: "full", "summary", "digest" or "".
    """

    duties: tuple[Duty, ...] = ()
    stop: str = ""
    quarantine: bool | None = None
    windows: tuple[str, ...] = ()
    rate_bits_per_s: int | None = None
    delete_by: int | None = None
    delete_after_s: int | None = None
    retain_s: int | None = None
    holds: tuple[str, ...] = ()
    proof: str = "none"
    onward: str = ""
    isolate: frozenset[str] = frozenset()
    spill: str = ""
    at_rest: bool = False
    suites: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    evidence: str = ""

    @classmethod
    def of(cls, duties: Sequence[Duty]) -> Terms:
        """Read merged duties (one of each type)."""
        by_type = {duty.type: duty for duty in duties}

        def get(kind: str, name: str = "value") -> object:
            duty = by_type.get(kind)
            return None if duty is None else duty.get(name)

        def texts(kind: str, name: str = "value") -> tuple[str, ...]:
            found = get(kind, name)
            return tuple(map(str, found)) if isinstance(found, tuple) else ()

        def number(kind: str) -> int | None:
            found = get(kind)
            return found if isinstance(found, int) else None

        quarantine = get("quarantine")
        proofs = [str(get(kind, "proof")) for kind in ("delete_by", "delete_after") if get(kind, "proof")]
        return cls(
            duties=tuple(duties),
            stop=str(get("stop") or ""),
            quarantine=quarantine if isinstance(quarantine, bool) else None,
            windows=texts("window", "windows"),
            rate_bits_per_s=number("rate_max"),
            delete_by=number("delete_by"),
            delete_after_s=number("delete_after"),
            retain_s=number("retain"),
            holds=texts("legal_hold"),
            proof=min(proofs, key=("certificate", "receipt", "none").index, default="none"),
            onward=str(get("onward") or ""),
            isolate=frozenset(texts("isolate")),
            spill=str(get("spill") or ""),
            at_rest="rest" in texts("encrypt", "at"),
            suites=texts("encrypt", "suite"),
            counts=texts("count", "entries"),
            evidence=str(get("log", "evidence") or ""),
        )

    @property
    def binds_what_landed(self) -> bool:
        """Whether anything of it outlives the transfer at the target."""
        return bool(
            self.delete_by is not None
            or self.delete_after_s is not None
            or self.retain_s is not None
            or self.holds
            or self.onward
            or self.isolate
            or self.at_rest
        )

    def due(self, landed: int) -> int | None:
        """When what landed at a time has to be gone; None for never."""
        ends = [] if self.delete_by is None else [self.delete_by]
        ends += [] if self.delete_after_s is None else [landed + self.delete_after_s]
        return min(ends, default=None)

    def takes_landed(self, mode: StopMode) -> bool:
        """Whether a stop takes away what has landed of the transfer, and not only what was under way.

        A duty `quarantine = true` says so for every mode, `false` for none. Without one, `stop-now` does: nothing
        permits the data to be there any more; what `finish-file` and `drain` let land was lawful when it landed.
        """
        return self.quarantine if self.quarantine is not None else mode == "stop-now"


def stop_mode(denied: Decision, before: Terms) -> StopMode:
    """How a transfer stops that was permitted under `before` and is denied now.

    The strictest of what the rules say that deny now; where only a permit was lost, what the duty `stop` of that
    permit said; else at once.
    """
    forbids = [rule.rule.stop for trace in denied.traces if trace.scope != FALSE for rule in trace.forbids]
    if forbids:
        return strictest([*forbids, before.stop] if before.stop else forbids)
    return strictest([before.stop] if before.stop else [])


# --- windows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """Whether a transfer may run now, and when that changes (None: not within eight days)."""

    open: bool
    until: int | None = None


def window_at(windows: Sequence[str], now: int, zones: Mapping[str, tzinfo]) -> Window:
    """Whether all windows are open at a time; a window of a zone that is not known is closed.

    >>> from datetime import timezone
    >>> window_at(["UTC 20:00-06:00"], 12 * 3600, {"UTC": timezone.utc})
    Window(open=False, until=72000)
    """
    if not windows:
        return Window(True)
    if any(window.rpartition(" ")[0] not in zones for window in windows):
        return Window(False)
    end = now + _SEARCH_DAYS * 86_400
    for begins, ends in _joined(open_intervals(windows, now, zones, _SEARCH_DAYS)):
        if begins <= now < ends:
            return Window(True, ends if ends < end else None)
        if begins > now:
            return Window(False, begins)
    return Window(False)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, with those that touch made one: two halves of a day are no closing at noon."""
    found: list[tuple[int, int]] = []
    for begins, ends in sorted(spans):
        if found and begins <= found[-1][1]:
            found[-1] = (found[-1][0], max(ends, found[-1][1]))
        else:
            found.append((begins, ends))
    return found


# --- a clock that may be wrong ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Instant:
    """What is known of the time: it is not before `early` and not behind `late` (Unix seconds)."""

    early: float
    late: float


@dataclass(frozen=True, slots=True)
class Clock:
    """The time as a wall clock says it, checked against one that nobody sets.

    A wall clock that is set back or forward keeps both readings possible until somebody trusted tells the time
    (`agree`). So nothing is kept for longer because a clock was set back, and nothing is destroyed for good
    because one was set forward.

    Args:
        wall, steady: both clocks at the last reading that was agreed.
        boot: which run of the steady clock; another one counts for nothing.
    """

    wall: float
    steady: float
    boot: str

    def read(self, wall: float, steady: float, boot: str, tolerance_s: float = 5.0) -> Instant:
        """The time now.

        >>> clock = Clock(1000.0, 10.0, "b")
        >>> clock.read(1060.0, 70.0, "b"), clock.read(500.0, 70.0, "b"), clock.read(9000.0, 70.0, "b")
        (Instant(early=1060.0, late=1060.0), Instant(early=500.0, late=1060.0), Instant(early=1060.0, late=9000.0))
        """
        if boot != self.boot:  # how long the host was off, only the wall clock tells; it was not set back
            return Instant(self.wall, max(wall, self.wall)) if wall < self.wall else Instant(wall, wall)
        expected = self.wall + max(0.0, steady - self.steady)
        if abs(wall - expected) <= tolerance_s:
            return Instant(wall, wall)
        return Instant(min(wall, expected), max(wall, expected))

    def agree(self, wall: float, steady: float, boot: str) -> Clock:
        """The clock after somebody trusted confirmed the wall clock, or it ran on without a jump."""
        return Clock(wall, steady, boot)


def disagreement(theirs: float, sent: float, received: float) -> float:
    """By how much another clock is surely ahead of this one (negative: behind), from one exchange; 0 where they may agree.

    Args:
        theirs: what the other clock said when it answered.
        sent, received: what this one said when it asked and when the answer came.

    >>> disagreement(100.0, 99.0, 101.0), disagreement(110.0, 99.0, 101.0), disagreement(90.0, 99.0, 101.0)
    (0.0, 9.0, -9.0)
    """
    if theirs > received:
        return theirs - received
    return min(0.0, theirs - sent)


# --- deletion ---------------------------------------------------------------------------------------------------

Deletion = Literal["keep", "hide", "delete", "held"]


def deletion(terms: Terms, landed: int, now: Instant, *, released: frozenset[str] = frozenset()) -> Deletion:
    """What is to be done now with what landed under these terms.

    Args:
        landed: when it was complete, Unix seconds.
        released: legal cases that are closed.

    Returns:
        "keep"; "hide": it may be due, by a clock that cannot be trusted now: out of sight, and no more than that;
        "delete": it is due; "held": it is due, and a legal hold keeps it: out of sight, until the hold ends.
    """
    due = terms.due(landed)
    if due is None or now.late < due:
        return "keep"
    if set(terms.holds) - released:
        return "held"
    if terms.retain_s is not None and now.early < landed + terms.retain_s:
        return "hide"
    return "delete" if now.early >= due else "hide"


# --- as JSON ----------------------------------------------------------------------------------------------------


def dump_duties(duties: Sequence[Duty]) -> list[list[object]]:
    """Duties as JSON-able values: [type, [[name, value], ...], [origins]]."""
    return [[duty.type, [[key, value] for key, value in duty.params], list(duty.origins)] for duty in duties]


def load_duties(data: Sequence[Sequence[object]]) -> tuple[Duty, ...]:
    """Duties from what `dump_duties` gave.

    Raises:
        ValueError: it is something else.
    """
    found: list[Duty] = []
    for item in data:
        try:
            kind, params, origins = item
            pairs = tuple((str(key), _frozen(value)) for key, value in params)  # type: ignore[attr-defined]
            found.append(Duty(str(kind), pairs, tuple(map(str, origins))))  # type: ignore[call-overload]
        except TypeError as error:
            raise ValueError(f"no duty: {item!r}") from error
    return tuple(found)


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
