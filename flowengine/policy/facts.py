"""From statements to facts: who may say what, until when, and what contradictions leave unknown.

A statement is heard if its source is of a kind entitled to the attribute, it has not expired and is not from the
future. Statements that contradict each other leave the fact unknown. A site's own word is different: it may only
narrow what others say, so a certificate it disowns is gone and a foreign law it admits to counts.

The guarantee that removing facts turns no deny into a permit speaks of known facts. Here, before that, a
contradiction is a reason to know less: whoever withholds one of two statements changes what is known. So
statements travel signed, in sets, and a decision's record names the ones it used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from flowengine.policy.model import Attribute, PolicySet, Value

__all__ = [
    "MAX_CLOCK_ERROR_MS",
    "Resolved",
    "Statement",
    "clock_statement",
    "has_key",
    "inherit_labels",
    "resolve",
]

MAX_CLOCK_ERROR_MS: Final = 1000
"""A clock that may be further off than this is no clock: everything about time is then unknown."""


@dataclass(frozen=True, slots=True)
class Statement:
    """Somebody's word: attribute, value, source as `kind` or `kind:name`, since when, until when."""

    attribute: str
    value: Value
    by: str
    as_of: int
    until: int | None = None

    @property
    def kind(self) -> str:
        """The kind of its source."""
        return self.by.split(":", 1)[0]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Known facts, the statements they rest on, and why others are not known."""

    facts: Mapping[str, Value]
    used: Mapping[str, tuple[Statement, ...]]
    unknown: Mapping[str, str]


def resolve(policies: PolicySet, statements: Iterable[Statement], now: int) -> Resolved:
    """The facts that statements establish at a time.

    Args:
        policies: The declarations, with who may assert what; labels are closed by its rules.
        statements: All that is at hand, of any source.
        now: Seconds since 1970; statements that expired or are from the future are not heard.
    """
    by_attribute: dict[str, list[Statement]] = {}
    unknown: dict[str, str] = {}
    for statement in statements:
        attribute = policies.attributes.get(statement.attribute) or _counter(statement.attribute)
        if attribute is None:
            unknown[statement.attribute] = "not a declared attribute"
        elif statement.kind not in attribute.by:
            unknown.setdefault(statement.attribute, f"{statement.by} is not entitled to say it")
        elif statement.until is not None and statement.until <= now:
            unknown.setdefault(statement.attribute, f"the word of {statement.by} has expired")
        elif statement.as_of > now:
            unknown.setdefault(statement.attribute, f"the word of {statement.by} is from the future")
        elif not _fits(attribute, statement.value):
            unknown.setdefault(
                statement.attribute, f"{statement.by} says something that is no {attribute.type}"
            )
        else:
            by_attribute.setdefault(statement.attribute, []).append(statement)
    facts: dict[str, Value] = {}
    used: dict[str, tuple[Statement, ...]] = {}
    for name, heard in by_attribute.items():
        attribute = policies.attributes.get(name) or _counter(name)
        assert attribute is not None
        value, why = _settle(attribute, heard)
        if value is None:
            unknown[name] = why
            continue
        unknown.pop(name, None)
        if name in ("data.labels", "data.source_labels") and isinstance(value, frozenset):
            value = policies.close_labels(value)
        facts[name] = value
        used[name] = tuple(heard)
    return Resolved(facts, used, unknown)


def _counter(name: str) -> Attribute | None:
    if name.startswith("ledger.") and "(" in name:
        return Attribute(name, "number", "", "", ("ledger",))
    if name.startswith("approvals.") and "(" in name:
        return Attribute(name, "number", "", "", ("approval",))
    return None


def _fits(attribute: Attribute, value: Value) -> bool:
    expected = {"text": str, "set": frozenset, "number": int, "time": int, "flag": bool}[attribute.type]
    return isinstance(value, expected) and (expected is bool) == isinstance(value, bool)


def _settle(attribute: Attribute, heard: list[Statement]) -> tuple[Value | None, str]:
    """One value for several statements, None and why where they leave it open."""
    others = [statement for statement in heard if statement.kind != "site"]
    own = [statement for statement in heard if statement.kind == "site"]
    if not others:
        return None, "only the site itself says so"
    value = others[0].value
    for statement in others[1:]:
        if statement.value != value:
            return None, f"{others[0].by} and {statement.by} contradict each other"
    for statement in own:
        if statement.value == value:
            continue
        if (
            attribute.narrow == "intersect"
            and isinstance(value, frozenset)
            and isinstance(statement.value, frozenset)
        ):
            value = value & statement.value
        elif (
            attribute.narrow == "union"
            and isinstance(value, frozenset)
            and isinstance(statement.value, frozenset)
        ):
            value = value | statement.value
        else:
            return None, f"{others[0].by} and {statement.by} contradict each other"
    return value, ""


def clock_statement(now: int, error_ms: int, limit_ms: int = MAX_CLOCK_ERROR_MS) -> list[Statement]:
    """The time as a statement, nothing where the clock may be further off than the limit."""
    if error_ms > limit_ms:
        return []
    return [Statement("time.now", now, "clock", now)]


def has_key(use: str, end_to_end: bool, recompresses: bool = False) -> bool:
    """Whether a site has the key, derived from what it does.

    A hop of end-to-end sealed data and a holder of ciphertext have none; a relay that recompresses or deduplicates
    has it, whatever it is called, and then has to be asked about `process`.
    """
    return recompresses or not (use == "hold" or (use == "relay" and end_to_end))


def inherit_labels(policies: PolicySet, parts: Iterable[frozenset[str]]) -> frozenset[str]:
    """Labels of what is made of, or shared by, several things: all of theirs and what those combine to."""
    return policies.close_labels(frozenset().union(*parts))
