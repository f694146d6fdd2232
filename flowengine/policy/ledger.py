"""Counters: how much went where, over calendar and rolling windows, with reservations.

Goal: a threshold that counts over transfers holds even when many are planned at once. Plan: a transfer reserves
when it is planned, commits when it has landed, and releases when it is cancelled; reservations count like what
has landed until they expire. Persons add up: without exact distinct counts the sum is an upper bound, and an upper
bound fails closed. Counters are facts like any other: a counter that cannot be told is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from typing import Final

from flowengine.errors import UsageError
from flowengine.policy.model import PolicySet, Reference, Value, leaves

__all__ = ["Entry", "Ledger", "Movement", "counter_facts", "counters_of", "window_start"]

_AMOUNTS: Final = {
    "ledger.persons_after": "persons",
    "ledger.bytes_after": "size_bytes",
    "ledger.transfers_after": "transfers",
}


@dataclass(frozen=True, slots=True)
class Movement:
    """What a transfer would add.

    Args:
        transfer: Its id; one transfer counts once, however often it is asked about.
        controller: Who sends.
        party: The recipient, or the group it belongs to.
        country: Where it goes; None where that is not known, which then counts as outside everywhere.
        labels: Labels of the data, closed.
        persons: Persons in the data, None where that is not known.
        size_bytes: Bytes.
    """

    transfer: str
    controller: str
    party: str
    country: str | None
    labels: frozenset[str]
    persons: int | None
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A movement with its time; `expires` while it is only reserved."""

    movement: Movement
    at: int
    expires: int | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """Entries of one controller's books; every change gives a new ledger."""

    entries: tuple[Entry, ...] = ()

    def reserve(self, movement: Movement, now: int, expires: int) -> Ledger:
        """Count a planned transfer until it commits, is released or the reservation expires."""
        kept = self.release(movement.transfer).entries
        if any(entry.movement.transfer == movement.transfer for entry in kept):
            return self
        return Ledger((*kept, Entry(movement, now, expires)))

    def commit(self, transfer: str, now: int) -> Ledger:
        """Count a transfer for good, from now on.

        Raises:
            UsageError: It holds no reservation: it expired, and the decision has to be made anew.
        """
        found = [entry for entry in self.entries if entry.movement.transfer == transfer]
        if not found or (found[0].expires is not None and found[0].expires <= now):
            raise UsageError(
                f"transfer {transfer!r} holds no reservation in the counters", hint="reserve and decide again"
            )
        if found[0].expires is None:
            return self
        kept = self.release(transfer).entries
        return Ledger((*kept, replace(found[0], at=now, expires=None)))

    def release(self, transfer: str) -> Ledger:
        """Forget a reservation; what has landed stays."""
        return Ledger(
            tuple(
                entry
                for entry in self.entries
                if entry.movement.transfer != transfer or entry.expires is None
            )
        )

    def after(self, reference: Reference, movement: Movement, now: int, zone: tzinfo) -> int | None:
        """A counter's value with a transfer included, None where it cannot be told."""
        assert reference.counter is not None
        label, to, window = reference.arguments
        amount = _AMOUNTS[reference.counter.name]
        own = _amount(movement, amount) if _counts(movement, movement, label, to) else 0
        if own is None:
            return None
        start = window_start(window, now, zone)
        total = own
        for entry in self.entries:
            if entry.movement.transfer == movement.transfer or entry.at < start:
                continue
            if entry.expires is not None and entry.expires <= now:
                continue
            if not _counts(entry.movement, movement, label, to):
                continue
            value = _amount(entry.movement, amount)
            if value is None:
                return None
            total += value
        return total


def _amount(movement: Movement, amount: str) -> int | None:
    if amount == "transfers":
        return 1
    return movement.persons if amount == "persons" else movement.size_bytes


def _counts(entry: Movement, asked: Movement, label: str, to: str) -> bool:
    """Whether a movement counts for the key (controller, recipient or direction, label) of the one asked about."""
    if entry.controller != asked.controller or (label != "any" and label not in entry.labels):
        return False
    if to in ("recipient", "covered_person"):
        return entry.party == asked.party
    if to == "any":
        return True
    direction, _, country = to.partition(":")
    outside = entry.country is None or entry.country != country
    return outside if direction == "outside" else entry.country is None or not outside


def window_start(window: str, now: int, zone: tzinfo) -> int:
    """Since when a window counts; calendar windows begin at midnight in the law's zone, rolling ones do not reset.

    >>> from datetime import timezone
    >>> window_start("calendar_year", 86400 * 400, timezone.utc) // 86400
    365
    """
    if window.startswith("rolling_") and window.endswith("_days"):
        return now - int(window.split("_")[1]) * 86400
    here = datetime.fromtimestamp(now, zone)
    if window == "rolling_12_months":
        day = min(here.day, 28) if here.month == 2 else here.day
        return int(here.replace(year=here.year - 1, day=day).timestamp())
    start = here.replace(hour=0, minute=0, second=0, microsecond=0)
    if window != "calendar_day":
        start = start.replace(day=1)
    return int((start.replace(month=1) if window == "calendar_year" else start).timestamp())


def counters_of(policies: PolicySet) -> list[Reference]:
    """Every counter over the ledger that the policies use."""
    found: dict[str, Reference] = {}
    for policy in policies.policies:
        parts = [*policy.scope, *(part for rule in policy.rules for part in (*rule.when, *rule.unless))]
        for line in (line for part in parts for line in leaves(part)):
            for reference in line.references():
                if reference.counter is not None and reference.counter.name in _AMOUNTS:
                    found[reference.name] = reference
    return list(found.values())


def counter_facts(
    references: Iterable[Reference], ledger: Ledger, movement: Movement, now: int, zones: Mapping[str, tzinfo]
) -> dict[str, Value]:
    """The counters as facts for one transfer; those that cannot be told are left out."""
    facts: dict[str, Value] = {}
    for reference in references:
        value = ledger.after(reference, movement, now, zones[reference.zone])
        if value is not None:
            facts[reference.name] = value
    return facts
