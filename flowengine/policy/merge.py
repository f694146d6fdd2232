"""Merging duties: a lattice in which every type has a strictest common demand, or a collision.

Goal: duties of rules that know nothing of each other become one list that satisfies all, or the two that cannot
both be met are named. Invariant: more duties never turn a collision into none; the guarantee that removing facts
turns no deny into a permit rests on it. So a legal hold suspends a deletion (and says so) but does not undo the
collision of a deletion with a duty to retain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

from flowengine.policy.model import Duty
from flowengine.policy.obligations import OBLIGATIONS, SUITES, Parameter, required_capabilities

__all__ = ["Collision", "Merged", "merge", "missing_capabilities", "open_intervals", "timed_collision"]

_COARSER: Final = ("all", "century", "decade", "year", "quarter", "month", "week", "day", "hour")
_ACTS: Final = ("drop", "tokenise", "mask", "generalise", "keep")
_DAYS_AHEAD: Final = 8
"""How far windows are laid out to see whether they ever meet: each opens daily, so a week and a change of clocks."""


@dataclass(frozen=True, slots=True)
class Collision:
    """Two rules whose duties cannot both be met."""

    what: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} and {self.second} cannot both be met: {self.what}"


@dataclass(frozen=True, slots=True)
class Merged:
    """Duties of several rules as one list, by type.

    Args:
        duties: One of each type.
        collision: Why there is no such list.
        notes: What people have to know, like a deletion that waits.
        timed: Whether `timed_collision` still has to be asked.
        needs: What an agent has to be able to do, of each group one.
    """

    duties: tuple[Duty, ...]
    collision: Collision | None = None
    notes: tuple[str, ...] = ()
    timed: bool = False
    needs: tuple[tuple[str, ...], ...] = ()


def merge(duties: Sequence[Duty]) -> Merged:
    """The strictest common demand of duties, or the first collision. Order and repetition do not matter."""
    by_type: dict[str, list[Duty]] = {}
    for duty in duties:
        by_type.setdefault(duty.type, []).append(duty)
    merged: dict[str, Duty] = {}
    for name in sorted(by_type):
        group = by_type[name]
        result = group[0] if len(group) == 1 else _merge_type(name, group)
        if isinstance(result, Collision):
            return Merged((), result)
        merged[name] = result
    if collision := _relabel_collision(merged.get("relabel"), by_type.get("relabel", [])):
        return Merged((), collision)
    notes = []
    deletions = [merged[name] for name in ("delete_by", "delete_after") if name in merged]
    if "legal_hold" in merged:
        for duty in deletions:
            asked, held = ", ".join(duty.origins), ", ".join(merged["legal_hold"].origins)
            notes.append(f"deletion asked for by {asked} waits until the legal hold of {held} ends")
    windows = merged.get("window")
    timed = bool("delete_by" in merged or (deletions and "retain" in merged))
    timed = timed or (windows is not None and len(windows.get("windows")) > 1)  # type: ignore[arg-type]
    needs = dict.fromkeys(group for duty in merged.values() for group in required_capabilities(duty))
    return Merged(tuple(merged.values()), notes=tuple(notes), timed=timed, needs=tuple(needs))


def _merge_type(name: str, group: list[Duty]) -> Duty | Collision:
    origins = tuple(sorted({origin for duty in group for origin in duty.origins}))
    if name == "columns":
        return _merge_columns(group, origins)
    params: dict[str, object] = {}
    for key in sorted({key for duty in group for key, _ in duty.params}):
        given = [(duty, duty.get(key)) for duty in group if duty.get(key) is not None]
        parameter = OBLIGATIONS[name].get(key) or Parameter("set", "union")
        value = given[0][1]
        for duty, other in given[1:]:
            joined = _join(parameter, value, other)
            if joined is None:
                clash = next(
                    (first for first, mine in given if _join(parameter, mine, other) is None), given[0][0]
                )
                return Collision(f"{name} {key}: nothing satisfies both", clash.origins[0], duty.origins[0])
            value = joined
        params[key] = value
    return Duty(name, tuple(sorted(params.items())), origins)


def _join(parameter: Parameter, one: object, two: object) -> object:
    """The strictest of two values, None where nothing satisfies both."""
    how = parameter.merge
    if how == "any":
        return bool(one) or bool(two)
    if how == "strongest":
        return min(one, two, key=lambda word: parameter.words.index(str(word)))
    if how == "equal":
        return one if one == two else None
    if how in ("min", "max"):
        assert isinstance(one, int)
        assert isinstance(two, int)
        return min(one, two) if how == "min" else max(one, two)
    assert isinstance(one, tuple)
    assert isinstance(two, tuple)
    if how == "union":
        return tuple(sorted({*one, *two}))
    common = set(one) & set(two)
    if not common:
        return None
    order = SUITES["any-approved"] if parameter.kind == "suite" else sorted(common)
    return tuple(item for item in order if item in common)


def _merge_columns(group: list[Duty], origins: tuple[str, ...]) -> Duty | Collision:
    acts: dict[str, tuple[int, str, str]] = {}
    keys: dict[str, str] = {}
    for duty in group:
        if key := duty.get("key"):
            keys.setdefault(str(key), duty.origins[0])
        for rank, act in enumerate(_ACTS):
            for item in duty.get(act) or ():  # type: ignore[attr-defined]
                column, how = item if act == "generalise" else (item, "")
                before = acts.get(column)
                if before is None or rank < before[0]:
                    acts[column] = (rank, how, duty.origins[0])
                elif rank == before[0] and how != before[1]:
                    coarser = _coarser(before[1], how)
                    if coarser is None:
                        what = f"columns: {column} generalised to {before[1]!r} and to {how!r}"
                        return Collision(what, before[2], duty.origins[0])
                    acts[column] = (rank, coarser, before[2])
    if len(keys) > 1:
        (one, first), (two, second) = list(keys.items())[:2]
        return Collision(f"columns: tokens under key {one!r} and key {two!r}", first, second)
    params: dict[str, object] = {"key": next(iter(keys))} if keys else {}
    for rank, act in enumerate(_ACTS):
        found = sorted((column, how) for column, (at, how, _) in acts.items() if at == rank)
        if found:
            params[act] = tuple(found) if act == "generalise" else tuple(column for column, _ in found)
    return Duty("columns", tuple(sorted(params.items())), origins)


def _coarser(one: str, two: str) -> str | None:
    if one.isdigit() and two.isdigit():
        return min(one, two, key=int)
    if one in _COARSER and two in _COARSER:
        return min(one, two, key=_COARSER.index)
    return None


def _relabel_collision(relabel: Duty | None, group: list[Duty]) -> Collision | None:
    if relabel is None:
        return None
    both = set(relabel.get("remove") or ()) & set(relabel.get("add") or ())  # type: ignore[call-overload]
    for label in sorted(both):
        first = next(duty for duty in group if label in (duty.get("remove") or ()))  # type: ignore[operator]
        second = next(duty for duty in group if label in (duty.get("add") or ()))  # type: ignore[operator]
        return Collision(f"relabel: {label!r} is removed and added", first.origins[0], second.origins[0])
    return None


def timed_collision(merged: Merged, now: int | None, zones: Mapping[str, tzinfo]) -> Collision | None:
    """The collision that shows only at a time: a deletion already due, or before a duty to keep ends; windows."""
    if not merged.timed:
        return None
    by_type = {duty.type: duty for duty in merged.duties}
    if now is None:
        first = merged.duties[0].origins[0]
        return Collision("duties with dates cannot be compared without a trusted clock", first, first)
    deletions: list[tuple[int, Duty]] = []
    if duty := by_type.get("delete_by"):
        due = duty.get("value")
        assert isinstance(due, int)
        if due <= now:
            return Collision("delete_by: the date has passed", duty.origins[0], duty.origins[0])
        deletions.append((due, duty))
    if duty := by_type.get("delete_after"):
        after = duty.get("value")
        assert isinstance(after, int)
        deletions.append((now + after, duty))
    if deletions and (retain := by_type.get("retain")):
        due, duty = min(deletions, key=lambda pair: pair[0])
        keep = retain.get("value")
        assert isinstance(keep, int)
        if due < now + keep:
            return Collision(
                "deletion comes before the duty to retain ends", duty.origins[0], retain.origins[0]
            )
    if duty := by_type.get("window"):
        windows = duty.get("windows")
        assert isinstance(windows, tuple)
        if not open_intervals(windows, now, zones):
            return Collision("window: the windows never meet", duty.origins[0], duty.origins[-1])
    return None


def open_intervals(
    windows: Sequence[str], start: int, zones: Mapping[str, tzinfo], days: int = _DAYS_AHEAD
) -> list[tuple[int, int]]:
    """When all daily windows are open, as instants from `start` on; changes of clocks are followed.

    Args:
        windows: Like `Europe/Berlin 20:00-06:00`; local times, an end before the start is the next day.
        start: Seconds since 1970.
        zones: Zones by name.
        days: How many days to lay out.
    """
    common: list[tuple[int, int]] = [(start, start + days * 86400)]
    for window in windows:
        zone_name, _, hours = window.rpartition(" ")
        zone = zones[zone_name]
        opens, closes = ([int(part) for part in clock.split(":")] for clock in hours.split("-"))
        first = datetime.fromtimestamp(start, zone).date() - timedelta(days=1)
        spans = []
        for offset in range(days + 2):
            day = first + timedelta(days=offset)
            end_day = day if closes > opens else day + timedelta(days=1)
            begin = datetime(day.year, day.month, day.day, opens[0], opens[1], tzinfo=zone)
            end = datetime(end_day.year, end_day.month, end_day.day, closes[0], closes[1], tzinfo=zone)
            spans.append((int(begin.astimezone(UTC).timestamp()), int(end.astimezone(UTC).timestamp())))
        common = [(max(a, c), min(b, d)) for a, b in common for c, d in spans if max(a, c) < min(b, d)]
    return common


def missing_capabilities(duties: Sequence[Duty], can: frozenset[str]) -> list[str]:
    """What an agent would need for the duties and cannot do, as words joined by `or` where one of several would do."""
    missing: list[str] = []
    for duty in duties:
        missing += [
            " or ".join(group) for group in required_capabilities(duty) if not can.intersection(group)
        ]
    return list(dict.fromkeys(missing))
