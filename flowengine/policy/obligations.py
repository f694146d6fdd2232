"""Obligation types: what parameters they take, how values merge, what an agent must be able to do.

A type unknown here is refused when a file is read; an agent that lacks a capability named here denies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Final

from flowengine.policy.conditions import LineError, as_instant, instant, parse_quantity, window_error
from flowengine.policy.countries import COUNTRIES
from flowengine.policy.model import Duty
from flowengine.policy.problems import closest

__all__ = ["CAPABILITIES", "OBLIGATIONS", "SUITES", "Parameter", "parse_duty", "required_capabilities"]

SUITES: Final[Mapping[str, tuple[str, ...]]] = {
    "any-approved": ("aes-256-gcm-fips", "aes-256-gcm", "sm4-gcm"),
    "international": ("aes-256-gcm-fips", "aes-256-gcm"),
    "fips": ("aes-256-gcm-fips",),
    "national": ("sm4-gcm",),
}
"""What a rule may ask for and the suites that satisfy it, strongest first."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: `kind` says how it is read, `merge` how two values become one, `words` its choices.

    Merges: union, any (a flag), min, max, strongest (the first of `words`), intersect, equal, columns.
    """

    kind: str
    merge: str
    words: tuple[str, ...] = ()


_PROOF: Final = Parameter("choice", "strongest", ("certificate", "receipt", "none"))
OBLIGATIONS: Final[Mapping[str, Mapping[str, Parameter]]] = {
    "encrypt": {
        "at": Parameter("set", "union", ("flight", "rest")),
        "end_to_end": Parameter("flag", "any"),
        "suite": Parameter("suite", "intersect", tuple(SUITES)),
        "keys_in": Parameter("countries", "intersect"),
    },
    "spill": {"value": Parameter("choice", "strongest", ("memory-only", "encrypted-disk"))},
    "log": {
        "evidence": Parameter("choice", "strongest", ("full", "summary", "digest")),
        "keep": Parameter("duration", "max"),
        "stays_in": Parameter("countries", "intersect"),
    },
    "count": {
        "ledger": Parameter("choice", "equal", ("persons", "bytes", "transfers")),
        "label": Parameter("text", "equal"),
        "to": Parameter("text", "equal"),
        "window": Parameter("counter window", "equal"),
    },
    "delete_by": {"value": Parameter("date", "min"), "proof": _PROOF},
    "delete_after": {"value": Parameter("duration", "min"), "proof": _PROOF},
    "retain": {"value": Parameter("duration", "max")},
    "legal_hold": {"value": Parameter("set", "union")},
    "onward": {"value": Parameter("choice", "strongest", ("forbid", "same-duties"))},
    "columns": {
        "drop": Parameter("set", "columns"),
        "tokenise": Parameter("set", "columns"),
        "mask": Parameter("set", "columns"),
        "generalise": Parameter("map", "columns"),
        "keep": Parameter("set", "columns"),
        "key": Parameter("text", "equal"),
    },
    "rows": {"keep": Parameter("set", "union")},
    "suppress": {
        "k": Parameter("number", "max"),
        "on": Parameter("set", "union"),
        "complementary": Parameter("flag", "any"),
    },
    "aggregate_only": {"by": Parameter("set", "intersect"), "min_group": Parameter("number", "max")},
    "relabel": {"remove": Parameter("set", "union"), "add": Parameter("set", "union")},
    "window": {"tz": Parameter("zone", "equal"), "from": Parameter("clock", "equal"), "to": Parameter("clock", "equal")},
    "rate_max": {"value": Parameter("rate", "min")},
    "approve": {
        "from": Parameter("set", "union"),
        "people": Parameter("number", "max"),
        "not": Parameter("choice", "strongest", ("requester",)),
        "valid": Parameter("duration", "min"),
    },
    "notify": {"value": Parameter("set", "union"), "within": Parameter("duration", "min")},
    "review_by": {"value": Parameter("duration", "min")},
    "place_copies": {
        "at_least": Parameter("number", "max"),
        "sites": Parameter("number", "max"),
        "same_country": Parameter("flag", "any"),
    },
    "isolate": {"value": Parameter("set", "union", ("chunks", "dictionary", "caches"))},
    "purge": {"value": Parameter("set", "union", ("copies", "chunks", "caches", "logs")), "proof": _PROOF},
    "stop": {"value": Parameter("choice", "strongest", ("stop-now", "finish-file", "drain"))},
    "quarantine": {"value": Parameter("flag", "any")},
}  # fmt: skip
"""Every obligation type with its parameters; `value` is the main one of `{type = value, other = ...}`."""

_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "encrypt": ("at",), "log": ("evidence",), "count": ("ledger", "window"), "rows": ("keep",), "suppress": ("k",),
    "aggregate_only": ("by", "min_group"), "window": ("tz", "from", "to"), "approve": ("from", "people"),
    "place_copies": ("at_least",),
}  # fmt: skip

CAPABILITIES: Final = frozenset(
    [name for name in OBLIGATIONS if name not in ("encrypt", "columns", "delete_by", "delete_after")]
    + ["encrypt.flight", "encrypt.rest", "encrypt.end-to-end", "delete", "proof.certificate", "proof.receipt"]
    + [f"columns.{act}" for act in ("drop", "tokenise", "mask", "generalise")]
    + [f"suite.{suite}" for suite in SUITES["any-approved"]]
)
"""Words with which an agent says what it can do."""

_CLOCK: Final = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")


@dataclass(frozen=True)
class DutyScope:
    """What a duty may name: countries of a list (None: no such list), zones, the policy's zone."""

    find_countries: Callable[[str], frozenset[str] | None]
    list_names: Callable[[], list[str]]
    has_zone: Callable[[str], bool]
    zone: str


def parse_duty(entry: Mapping[str, object], origin: str, scope: DutyScope) -> Duty:
    """Read one `then` entry; its first key is the type.

    Raises:
        LineError: Unknown type or parameter, or a value of the wrong kind.
    """
    if not entry:
        raise LineError("an empty obligation", "write it like {log = {evidence = 'full'}}")
    name = next(iter(entry))
    if name not in OBLIGATIONS:
        raise LineError(f"{name!r} is no obligation", closest(name, OBLIGATIONS) or "see docs/spec/policy.md")
    declared = OBLIGATIONS[name]
    main = entry[name]
    if isinstance(main, dict) and "value" not in declared:
        given = {**main, **{key: value for key, value in entry.items() if key != name}}
    elif "value" in declared:
        given = {"value": main, **{key: value for key, value in entry.items() if key != name}}
    else:
        raise LineError(
            f"{name} takes a table, not {main!r}", f"write {name} = {{{next(iter(declared))} = ...}}"
        )
    params: dict[str, object] = {}
    for key, value in given.items():
        if key not in declared:
            raise LineError(
                f"{name} has no parameter {key!r}", closest(key, declared) or f"it has: {', '.join(declared)}"
            )
        params[key] = _value(name, key, declared[key], value, scope)
    for key in _REQUIRED.get(name, ()):
        if key not in params:
            raise LineError(f"{name} needs {key!r}", f"add {key} = ...")
    return Duty(name, tuple(sorted(_compact(name, params, scope).items())), (origin,))


def _compact(name: str, params: dict[str, object], scope: DutyScope) -> dict[str, object]:
    """Duties of which several live side by side become one parameter that is a set."""
    if name == "count":
        window = str(params["window"])
        zone = scope.zone if window.startswith("calendar") else "UTC"
        label, to = params.get("label", "any"), params.get("to", "recipient")
        return {"entries": (f"{params['ledger']} of {label} to {to} in {window}" + f"@{zone}",)}
    if name == "window":
        if params["from"] == params["to"]:
            raise LineError("the window is empty: it ends when it begins", "give two times of day")
        return {"windows": (f"{params['tz']} {params['from']}-{params['to']}",)}
    if name == "columns":
        seen: dict[str, str] = {}
        for act in ("drop", "tokenise", "mask", "generalise", "keep"):
            for item in params.get(act, ()):  # type: ignore[attr-defined]
                column = item[0] if act == "generalise" else item
                if column in seen:
                    raise LineError(
                        f"column {column!r} is under {seen[column]!r} and {act!r}", "name it once"
                    )
                seen[column] = act
    return params


def _value(duty: str, key: str, parameter: Parameter, value: object, scope: DutyScope) -> object:
    where = f"{duty}: {key}" if key != "value" else duty
    kind = parameter.kind
    if kind == "flag":
        if isinstance(value, bool):
            return value
        raise LineError(f"{where} is true or false, not {value!r}", "write true or false without quotes")
    if kind == "number":
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise LineError(f"{where} is a number, not {value!r}", "write it without quotes")
    if kind in ("set", "countries"):
        return _set(where, parameter, value, scope)
    if kind == "map":
        if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
            return tuple(sorted(value.items()))
        raise LineError(f"{where} is a table of columns", "write it like {birth_date = 'year'}")
    if kind == "date" and isinstance(value, (date, datetime)):
        return as_instant(value)
    if not isinstance(value, str):
        raise LineError(f"{where} is a text, not {value!r}", "put it in quotes")
    return _text(where, parameter, value, scope)


def _set(where: str, parameter: Parameter, value: object, scope: DutyScope) -> tuple[str, ...]:
    if parameter.kind == "countries" and isinstance(value, str) and value.startswith("@"):
        found = scope.find_countries(value[1:])
        if found is None:
            raise LineError(
                f"{where}: the list {value} does not exist", closest(value[1:], scope.list_names())
            )
        return tuple(sorted(found))
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
        raise LineError(f"{where} is a text or a list of texts, not {value!r}", "write it like ['a', 'b']")
    known = tuple(sorted(COUNTRIES)) if parameter.kind == "countries" else parameter.words
    for item in items:
        if known and item not in known:
            raise LineError(
                f"{where} cannot be {item!r}", closest(item, known) or f"use {', '.join(known[:6])}"
            )
    return tuple(sorted(set(items)))


def _text(where: str, parameter: Parameter, value: str, scope: DutyScope) -> object:
    kind, words = parameter.kind, parameter.words
    if kind in ("choice", "suite"):
        if value not in words:
            raise LineError(
                f"{where} cannot be {value!r}", closest(value, words) or f"use {', '.join(words)}"
            )
        return SUITES[value] if kind == "suite" else value
    if kind in ("duration", "rate"):
        wanted = "seconds" if kind == "duration" else "rate"
        example = "180 days" if kind == "duration" else "4 Gbit/s"
        if not value[:1].isdigit():
            raise LineError(f"{where} is a {kind}, not {value!r}", f"write it like {example!r}")
        number, unit = parse_quantity(value)
        if unit != wanted:
            raise LineError(f"{where} is a {kind}, not {value!r}", f"write it like {example!r}")
        return number
    if kind == "date":
        try:
            return instant(value)
        except ValueError:
            raise LineError(f"{where} is a date, not {value!r}", "write it like '2027-12-31'") from None
    if kind == "zone" and not scope.has_zone(value):
        raise LineError(f"{where}: {value!r} is no IANA time zone", "write it like 'Europe/Berlin'")
    if kind == "clock" and not _CLOCK.fullmatch(value):
        raise LineError(f"{where} is a time of day, not {value!r}", "write it like '20:00'")
    if kind == "counter window" and (wrong := window_error(value)):
        raise LineError(f"{where}: {wrong}")
    return value


def required_capabilities(duty: Duty) -> list[tuple[str, ...]]:
    """What an agent needs for a duty: of each group of words, one."""
    groups: list[tuple[str, ...]] = []
    if duty.type == "encrypt":
        groups += [(f"encrypt.{place}",) for place in duty.get("at") or ()]  # type: ignore[attr-defined]
        if duty.get("end_to_end"):
            groups.append(("encrypt.end-to-end",))
        if suites := duty.get("suite"):
            groups.append(tuple(f"suite.{suite}" for suite in suites))  # type: ignore[attr-defined]
    elif duty.type == "columns":
        acts = [act for act in ("drop", "tokenise", "mask", "generalise") if duty.get(act)]
        groups += [(f"columns.{act}",) for act in acts]
    elif duty.type in ("delete_by", "delete_after"):
        groups.append(("delete",))
    else:
        groups.append((duty.type,))
    if (proof := duty.get("proof")) in ("certificate", "receipt"):
        groups.append((f"proof.{proof}",))
    return groups
