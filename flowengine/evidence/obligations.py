"""Which duties of a permit an agent keeps records of, and whether a chain has all that it owes.

Goal
    Nobody can say that data moved under duties without having said, duty by duty, that they were taken on and done.
Plan
    A permit and the duties that come with it are recorded together, in one write: each duty *accepted* by whoever
    carries it out. What is done while data move (`SETTLED_BY_MOVING`) is recorded as *fulfilled* or *failed* in the
    write that says what moved (`chunk-root`); what outlives the move is settled when it is done, or as it fails.
Invariants
    - `owed` is asked both by who records and by who verifies: there is one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flowengine.evidence.chain import Record

__all__ = ["SETTLED_AT_ONCE", "SETTLED_BY_MOVING", "Finder", "duty_id", "owed", "owed_by"]

_ALWAYS: Final = frozenset({"encrypt", "log", "stop", "window"})
_CARRIED: Final[Mapping[str, frozenset[str]]] = {
    "release": _ALWAYS | {"approve", "count", "rate_max", "spill"},
    "relay": _ALWAYS | {"spill"},
    "land": _ALWAYS
    | {"delete_after", "delete_by", "isolate", "legal_hold", "onward", "quarantine", "retain"},
}
_FOR_OTHERS: Final = frozenset({"approve", "count", "rate_max", "window"})
"""What a source does of the duties that are demanded at the sites behind it."""

SETTLED_BY_MOVING: Final = frozenset(
    {"count", "encrypt", "isolate", "log", "onward", "rate_max", "spill", "window"}
)
"""Duties that are done when the data have moved; the others wait for their time, or for a stop."""
SETTLED_AT_ONCE: Final = frozenset({"approve"})
"""Duties that are done before the first byte, or there is no permit."""
_POINTS: Final[Mapping[str, str]] = {"left": "release", "passed": "relay", "landed": "land"}


def owed(point: str, kind: str, *, own: bool) -> bool:
    """Whether an agent carries out a type of duty of a permit.

    Args:
        point: at which it decided: "release", "relay" or "land".
        kind: type of the duty.
        own: whether the permit is for its own site, and not for one behind it.
    """
    return kind in (
        _CARRIED.get(point, frozenset()) if own else _FOR_OTHERS & _CARRIED.get(point, frozenset())
    )


def duty_id(index: int) -> str:
    """How a record names a duty of its decision.

    >>> duty_id(0)
    'o1'
    """
    return f"o{index + 1}"


@dataclass
class _Open:
    """What is accepted and not settled, of one task at one point, by type of duty."""

    since: dict[str, int] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)


class Finder:
    """Looks through the records of one chain, in their order, for duties that nothing is said of.

    Args:
        add: told of each finding: record and sentence.
    """

    def __init__(self, add: Callable[[int, str], None]) -> None:
        self._add = add
        self._tasks: dict[tuple[str, str], _Open] = {}
        self._approvals: dict[str, set[str]] = {}
        self._points: dict[str, str] = {}
        self.states = {"accepted": 0, "fulfilled": 0, "failed": 0}
        """How many records of obligations there are, by what they say."""

    def look(self, records: Sequence[Record]) -> None:
        """Look at all of them."""
        for group, behind in _groups(records):
            if group[0].kind == "decision":
                self._look_at_permits(group, behind)
            for record in group:
                self._look_at(record)

    def _look_at_permits(self, group: Sequence[Record], behind: Record | None) -> None:
        decisions = [record for record in group if record.kind == "decision"]
        for record in decisions:
            self._points[str(record.get("decision_id"))] = str(record.get("point"))
        if any(record.get("decision") != "permit" for record in decisions):
            return  # of several decisions on one route each has to permit
        said = {
            (str(record.get("decision_id")), str(record.get("id")))
            for record in group
            if record.kind == "obligation" and record.get("state") == "accepted"
        }
        for record in decisions:
            if record.get("phase") != "before-first-byte":
                continue
            lacking = [
                f"{name} ({kind})" for name, kind in owed_by(record)
                if (str(record.get("decision_id")), name) not in said
            ]  # fmt: skip
            if lacking and behind is not None and behind.kind != "recovery":
                self._add(
                    record.seq,
                    f"record {record.seq} permits under duties of which no record says that they were taken on: "
                    + ", ".join(lacking),
                )

    def _look_at(self, record: Record) -> None:
        task = str(record.get("task"))
        if record.kind == "approval" and record.get("state") == "used":
            self._approvals.setdefault(str(record.get("transfer")), set()).add(str(record.get("id")))
        elif record.kind == "obligation":
            self._look_at_obligation(record, task)
        elif record.kind == "chunk-root":
            point = _POINTS.get(str(record.get("direction")), "")
            self._look_at_move(record, self._tasks.get((task, point)) or _Open())

    def _look_at_obligation(self, record: Record, task: str) -> None:
        duty, state = record.get("duty"), str(record.get("state"))
        kind = str(duty.get("type")) if isinstance(duty, dict) else ""
        if state not in self.states:
            self._add(
                record.seq, f"record {record.seq} says {state[:20]!r} of a duty, which is no state of one"
            )
            return
        self.states[state] += 1
        found = self._tasks.setdefault((task, self._points.get(str(record.get("decision_id")), "")), _Open())
        if state == "accepted":
            found.since[kind] = record.seq
        else:
            found.settled[kind] = record.seq
        if kind == "approve" and state == "fulfilled" and isinstance(duty, dict):
            people = duty.get("people")
            given = len(self._approvals.get(str(record.get("transfer")), ()))
            if isinstance(people, int) and given < people:
                self._add(
                    record.seq,
                    f"record {record.seq} says that {people} people approved, and {given} approvals are on record",
                )

    def _look_at_move(self, record: Record, found: _Open) -> None:
        lacking = sorted(
            kind for kind, since in found.since.items()
            if kind in SETTLED_BY_MOVING | SETTLED_AT_ONCE and found.settled.get(kind, 0) < since
        )  # fmt: skip
        if lacking:
            self._add(
                record.seq,
                f"record {record.seq} says that data moved, and no record says what became of the duties "
                + ", ".join(lacking),
            )


def owed_by(record: Record) -> Iterator[tuple[str, str]]:
    """Name and type of each duty that a recorded permit lays upon who recorded it."""
    ask, duties = record.get("ask"), record.get("duties")
    site = ask.get("site") if isinstance(ask, dict) else None
    own = record.agent == f"site:{site}"
    for index, duty in enumerate(duties if isinstance(duties, list) else ()):
        kind = str(duty.get("type")) if isinstance(duty, dict) else ""
        if owed(str(record.get("point")), kind, own=own):
            yield duty_id(index), kind


def _groups(records: Sequence[Record]) -> Iterator[tuple[list[Record], Record | None]]:
    """Decisions of one task at one point with what was recorded along with them, and every other record by itself.

    Each comes with the record behind it; None for the last.
    """
    at = 0
    while at < len(records):
        end = at + 1
        first = records[at]
        if first.kind == "decision":
            while end < len(records) and _belongs(records[end], first):
                end += 1
        yield list(records[at:end]), records[end] if end < len(records) else None
        at = end


def _belongs(record: Record, first: Record) -> bool:
    if record.kind == "decision":
        return (record.get("task"), record.get("point")) == (first.get("task"), first.get("point"))
    return record.get("transfer") == first.get("transfer") and record.kind in (
        "obligation", "approval", "break-glass",
    )  # fmt: skip
