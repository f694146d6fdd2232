"""Counters as facts: what a transfer would add to them, and what whoever counts says they come to.

Goal
    A threshold over many transfers binds each of them, at the coordinator and at the exporting site alike.
Plan
    From the facts of a decision on the receiving site comes the `Movement` that the transfer would be. The values of
    all counters that the policies use come from a ledger (`policy.ledger`); where two count, the larger one holds.
Invariants
    - A counter that one of those who count cannot tell is unknown, whatever the other says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flowengine.policy.asking import Judged
from flowengine.policy.facts import Statement
from flowengine.policy.ledger import Ledger, Movement, counter_facts, counters_of
from flowengine.policy.model import PolicySet, Value

__all__ = ["counters", "larger", "movement_of"]


def movement_of(transfer: str, source: str, judged: Judged, size_bytes: int | None = None) -> Movement:
    """What a transfer would add, by the facts of the decision on its target.

    The controller is the data's, else the source site's operator, else that site; the party the recipient's group, else
    the organisation, else the target's operator, else the site.
    """
    facts = judged.known.facts

    def text(*names: str) -> str | None:
        return next((str(facts[name]) for name in names if isinstance(facts.get(name), str)), None)

    labels = facts.get("data.labels")
    persons = facts.get("data.persons")
    return Movement(
        transfer=transfer,
        controller=text("data.controller") or f"site:{source}",
        party=text("recipient.group", "recipient.org", "site.operator") or f"site:{judged.place.name}",
        country=text("site.country"),
        labels=labels if isinstance(labels, frozenset) else frozenset(),
        persons=persons if isinstance(persons, int) and not isinstance(persons, bool) else None,
        size_bytes=size_bytes,
    )


def counters(policies: PolicySet, ledger: Ledger, movement: Movement, now: int) -> dict[str, Value]:
    """All counters that the policies use, with a movement included; those that cannot be told are left out."""
    return counter_facts(counters_of(policies), ledger, movement, now, policies.zones)


def larger(counts: Iterable[Mapping[str, Value]], now: int) -> list[Statement]:
    """The counters as facts: of several who count, the larger figure; only those that all of them can tell.

    >>> [(s.attribute, s.value) for s in larger([{"c": 3, "d": 1}, {"c": 5}], 0)]
    [('c', 5)]
    """
    tables = list(counts)
    if not tables:
        return []
    names = set(tables[0]).intersection(*tables[1:])
    found = []
    for name in sorted(names):
        values = [value for table in tables if isinstance(value := table[name], int)]
        found.append(Statement(name, max(values), "ledger:larger", now))
    return found
