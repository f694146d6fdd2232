"""Condition lines: `operand op operand`, parsed and type-checked against the declarations.

There are no functions but declared counters, no loops, and on purpose no test for "is known": with one, a file
could permit because a fact is missing, and removing facts could turn a deny into a permit.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

from flowengine.errors import UsageError
from flowengine.policy.countries import COUNTRIES, NOT_COUNTRIES
from flowengine.policy.model import Attribute, Line, ListRef, Literal, NamedList, Reference
from flowengine.policy.problems import closest
from flowengine.policy.vocabulary import COUNTERS
from flowengine.units import parse_bytes, parse_duration_s, parse_rate_bits_per_s

__all__ = [
    "OPERATORS",
    "LineError",
    "Scope",
    "as_instant",
    "instant",
    "parse_line",
    "parse_quantity",
    "window_error",
]

OPERATORS: Final = (
    "includes any of", "includes all of", "subset of", "includes", "excludes", "is not", "not in", "not before",
    "is", "in", "<=", ">=", "<", ">", "before", "after",
)  # fmt: skip
"""Longest first, as they are looked for."""

_OTHER_WORDS: Final = {
    "==": "is", "=": "is", "!=": "is not", "equals": "is", "contains": "includes", "has": "includes",
    "contains any of": "includes any of", "includes any": "includes any of", "includes all": "includes all of",
    "subset": "subset of", "isnt": "is not", "not includes": "excludes", "one of": "in",
}  # fmt: skip
_LEFT: Final = re.compile(r"\s*([A-Za-z_][\w]*(?:\.\w+)+)\s*(\(([^)]*)\))?\s*")
_NUMBER: Final = re.compile(r"[0-9][0-9_]*(?:\.[0-9]+)?(?:\s*[A-Za-z%/]+)?")
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:Z|[+-]\d\d:\d\d)?)?")
_TEXT: Final = re.compile(r"'([^']*)'")
_WINDOW: Final = re.compile(r"calendar_(?:year|month|day)|rolling_12_months|rolling_[1-9][0-9]{0,3}_days")
_TO: Final = re.compile(r"recipient|covered_person|any|(?:outside|inside):([A-Z]{2})")

_SIDES: Final = {
    "is": ("text flag number time", "same"), "is not": ("text flag number time", "same"),
    "in": ("text", "many"), "not in": ("text", "many"),
    "includes": ("set", "text"), "excludes": ("set", "text"),
    "includes any of": ("set", "many"), "includes all of": ("set", "many"), "subset of": ("set", "many"),
    "<": ("number", "same"), "<=": ("number", "same"), ">": ("number", "same"), ">=": ("number", "same"),
    "before": ("time", "same"), "after": ("time", "same"), "not before": ("time", "same"),
}  # fmt: skip


class LineError(ValueError):
    """A line that cannot be read: what is wrong and what was probably meant."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Scope:
    """What a line may name: attributes, lists, labels (None: any label), the policy's zone."""

    attributes: Mapping[str, Attribute]
    find_list: Callable[[str], NamedList | None]
    list_names: Callable[[], list[str]]
    labels: frozenset[str] | None
    zone: str


def instant(text: str) -> int:
    """Seconds since 1970 of a TOML date or date-time; a date is its midnight in UTC, so is a time without zone.

    >>> instant("1970-01-02"), instant("1970-01-01T01:00:00+01:00")
    (86400, 0)
    """
    if re.fullmatch(r".{10}[T ]\d\d:\d\d(Z|[+-]\d\d:\d\d)?", text):
        text = text[:16] + ":00" + text[16:]
    return as_instant(tomllib.loads(f"x = {text}")["x"])


def as_instant(value: object) -> int:
    """Seconds since 1970 of a date or datetime object."""
    if isinstance(value, datetime):
        return int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
    if isinstance(value, date):
        return int(datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp())
    raise TypeError(f"not a date: {value!r}")


def parse_quantity(text: str) -> tuple[int, str]:
    """A number and its unit: bytes, seconds, rate, percent or nothing ('', a plain number).

    >>> parse_quantity("500 GiB"), parse_quantity("100_000"), parse_quantity("2 days")
    ((536870912000, 'bytes'), (100000, ''), (172800, 'seconds'))
    """
    text = text.strip()
    if re.fullmatch(r"[0-9][0-9_]*", text):
        return int(text.replace("_", "")), ""
    if text.endswith("%"):
        return int(text[:-1]), "percent"
    unit = text.lstrip("0123456789_. ").lower()
    try:
        if unit.endswith(("/s", "ps")):
            return int(parse_rate_bits_per_s(text)), "rate"
        if unit in ("month", "months", "year", "years"):
            days = {"m": 30, "y": 365}[unit[0]]
            return int(text[: -len(unit)].strip().replace("_", "")) * days * 86400, "seconds"
        if unit[-1:] == "b":
            return parse_bytes(text), "bytes"
        return int(parse_duration_s(text)), "seconds"
    except (UsageError, ValueError):
        known = ["KiB", "MiB", "GiB", "TiB", "PiB", "kB", "MB", "GB", "TB", "min", "hours", "days", "weeks"]
        number = text[: len(text) - len(unit)].strip() or "1"
        hint = closest(text[len(text) - len(unit) :], known).replace("mean '", f"mean '{number} ")
        raise LineError(
            f"{text!r} has an unknown unit", hint or "units: GiB, TiB, GB, s, min, hours, days, Gbit/s, %"
        ) from None


def window_error(window: str) -> str:
    """What is wrong with a counter's window, empty if nothing."""
    if _WINDOW.fullmatch(window):
        return ""
    forms = ["calendar_year", "calendar_month", "calendar_day", "rolling_12_months", "rolling_30_days"]
    return f"{window!r} is no window; " + (closest(window, forms) or "use " + ", ".join(forms))


def parse_line(text: str, scope: Scope) -> Line:
    """Read one condition line.

    Raises:
        LineError: It is not `operand op operand`, names what is not declared, or compares unlike things.
    """
    match = _LEFT.match(text)
    if match is None:
        example = "site.country in @eea"
        hint = (
            "put the fact on the left"
            if text.lstrip()[:1] in "'@0123456789"
            else f"write it like {example!r}"
        )
        raise LineError(f"{text!r} does not begin with a declared attribute", hint)
    left = _reference(match[1], match[3], scope)
    rest = text[match.end() :].strip()
    if re.fullmatch(r"is\s+(not\s+)?(known|unknown|missing|set|given)|exists", rest):
        raise LineError(
            f"{text!r} asks whether a fact is known, which a condition cannot do",
            "an unknown fact already keeps permits from firing and makes forbids fire",
        )
    op = next(
        (op for op in OPERATORS if rest == op or rest.startswith(op + (" " if op[-1].isalpha() else ""))), ""
    )
    if not op or rest == op:
        _no_operator(text, rest, op)
    right = _right(rest[len(op) :].strip(), scope, text)
    _check_types(left, op, right, scope)
    return Line(" ".join(text.split()), left, op, right)


def _no_operator(text: str, rest: str, op: str) -> None:
    if op:
        raise LineError(f"{text!r} ends after {op!r}", "a line is: operand, operator, operand")
    for other, meant in sorted(_OTHER_WORDS.items(), key=lambda pair: -len(pair[0])):
        if rest.startswith(other):
            raise LineError(f"{text!r} has no operator {other!r}", f"did you mean {meant!r}?")
    word = rest.split(" ")[0] if rest else ""
    hint = closest(word, OPERATORS) or "operators: " + ", ".join(OPERATORS)
    raise LineError(f"{text!r} has no known operator" + (f" at {word!r}" if word else ""), hint)


def _reference(name: str, arguments: str | None, scope: Scope) -> Reference:
    if arguments is not None or name in COUNTERS:
        return _counter(name, arguments or "", scope)
    attribute = scope.attributes.get(name)
    if attribute is None:
        hint = closest(name, [*scope.attributes, *COUNTERS])
        if not hint:
            last = name.rsplit(".", 1)[-1]
            same = [known for known in scope.attributes if known.rsplit(".", 1)[-1] == last]
            hint = f"did you mean {same[0]!r}?" if same else "declare it in attributes.toml"
        raise LineError(f"{name!r} is not a declared attribute", hint)
    return Reference(name, attribute, name)


def _counter(name: str, arguments: str, scope: Scope) -> Reference:
    counter = COUNTERS.get(name)
    if counter is None:
        raise LineError(
            f"{name!r} is not a declared counter",
            closest(name, COUNTERS) or "counters: " + ", ".join(COUNTERS),
        )
    given = _TEXT.findall(arguments)
    if len(given) != len(counter.parameters) or _TEXT.sub("", arguments).strip(", "):
        raise LineError(
            f"{name} takes {len(counter.parameters)} texts: {', '.join(counter.parameters)}",
            "write it like " + f"{name}({', '.join(repr(p) for p in counter.parameters)})",
        )
    for parameter, value in zip(counter.parameters, given, strict=True):
        if parameter == "window" and (wrong := window_error(value)):
            raise LineError(wrong)
        if parameter == "to":
            match = _TO.fullmatch(value)
            if match is None or (match[1] and match[1] not in COUNTRIES):
                raise LineError(
                    f"{value!r} is no direction of a counter",
                    "use 'recipient', 'covered_person', 'any', 'outside:CN' or 'inside:CN'",
                )
        if parameter == "label" and value != "any":
            _check_text(value, "label", scope)
    shown = f"{name}({','.join(repr(value) for value in given)})"
    calendar = any(value.startswith("calendar") for value in given)
    zone = scope.zone if calendar else "UTC"
    key = shown if zone == "UTC" else f"{shown}@{zone}"
    attribute = Attribute(key, "number", counter.en, counter.zh, counter.by, unit=counter.unit)
    return Reference(key, attribute, shown, counter, tuple(given), zone)


def _right(text: str, scope: Scope, line: str) -> Reference | Literal | ListRef:
    if match := _TEXT.fullmatch(text):
        return Literal(match[1], text, "text")
    if text.startswith("@"):
        if scope.find_list(text[1:]) is None:
            near = closest(text[1:], scope.list_names()).replace("mean '", "mean '@")
            raise LineError(f"the list {text} does not exist", near or "add it under lists/ or in [lists]")
        return ListRef(text[1:], text)
    if text in ("true", "false"):
        return Literal(text == "true", text, "flag")
    if _DATE.fullmatch(text):
        try:
            return Literal(instant(text), text, "time")
        except (ValueError, TypeError):
            raise LineError(f"{text!r} is no date", "write it like 2026-12-31") from None
    if _NUMBER.fullmatch(text):
        number, unit = parse_quantity(text)
        return Literal(number, text, "number", unit)
    if (match := _LEFT.fullmatch(text)) is not None:
        return _reference(match[1], match[3], scope)
    if text.startswith('"') or re.fullmatch(r"[\w:. -]+", text):
        bare = text.strip('"')
        if text.lower() in ("true", "false"):
            raise LineError(f"{line!r}: {text} is not a flag", f"did you mean {text.lower()}?")
        is_list = scope.find_list(bare) is not None
        hint = f"did you mean @{bare}?" if is_list else f"texts stand in single quotes: '{bare}'"
        raise LineError(f"{line!r}: cannot read {text!r}", hint)
    raise LineError(f"{line!r}: cannot read {text!r}", "texts stand in single quotes, lists begin with @")


def _check_text(value: str, domain: str, scope: Scope) -> None:
    if domain == "country" and value not in COUNTRIES:
        hint = NOT_COUNTRIES.get(value.upper()) or closest(value, COUNTRIES)
        raise LineError(f"{value!r} is no ISO 3166-1 country code", hint or "codes are like 'DE'")
    if domain == "label" and scope.labels is not None and value not in scope.labels:
        raise LineError(
            f"the label {value!r} is not declared", closest(value, scope.labels) or "see labels.toml"
        )


def _check_types(left: Reference, op: str, right: Reference | Literal | ListRef, scope: Scope) -> None:
    lefts, kind = _SIDES[op]
    mine = left.attribute.type
    if mine not in lefts.split():
        instead = {
            ("set", "is"): "includes", ("set", "in"): "includes any of", ("text", "includes"): "is",
            ("set", "not in"): "excludes", ("text", "includes any of"): "in", ("time", "<"): "before",
            ("time", ">"): "after", ("text", "subset of"): "in", ("set", "is not"): "excludes",
        }.get((mine, op))  # fmt: skip
        hint = f"did you mean {instead!r}?" if instead else f"{op!r} is for: {lefts}"
        raise LineError(f"{left.shown} is a {mine}, which {op!r} cannot compare", hint)
    if isinstance(right, ListRef):
        if kind != "many":
            raise LineError(f"{op!r} cannot take a list", "did you mean 'in' or 'includes any of'?")
        named = scope.find_list(right.name)
        domain = left.attribute.domain
        if (
            named is not None
            and domain == "country"
            and named.domain != "country"
            and not named.members <= COUNTRIES
        ):
            odd = sorted(named.members - COUNTRIES)[0]
            raise LineError(f"{right.shown} holds {odd!r}, which is no country, beside {left.shown}")
        if named is not None and domain == "label" and scope.labels is not None:
            for member in sorted(named.members - scope.labels):
                raise LineError(
                    f"{right.shown} holds the label {member!r}, which is not declared",
                    closest(member, scope.labels),
                )
        return
    theirs = right.attribute.type if isinstance(right, Reference) else right.type
    wanted = {"many": "set", "text": "text", "same": mine}[kind]
    if theirs != wanted:
        hint = (
            "put a list on the right: @name"
            if kind == "many"
            else f"{left.shown} needs a {wanted} on the right"
        )
        raise LineError(f"{op!r} compares {left.shown} with a {theirs}", hint)
    if isinstance(right, Literal) and isinstance(right.value, str):
        _check_text(right.value, left.attribute.domain, scope)
    if mine == "number":
        unit = right.attribute.unit if isinstance(right, Reference) else right.unit
        mine_unit = left.attribute.unit
        plain = mine_unit in ("count", "bits", "percent") and unit == ""
        if unit != mine_unit and not plain:
            examples = {"bytes": "500 GiB", "seconds": "180 days", "rate": "4 Gbit/s", "percent": "50 %"}
            hint = f"write it like {examples[mine_unit]}" if mine_unit in examples else "write a plain number"
            raise LineError(f"{left.shown} is in {mine_unit}, not {unit or 'a plain number'}", hint)
