"""The file of `flow plan simulate`: a federation and a day of demands as TOML. See docs/reference/simulate-file.md.

Reads zones by name, so this is where the time zone database is touched.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from flowengine.errors import NotFound, UsageError
from flowengine.plan import (
    Allowed,
    Cap,
    Demand,
    Endpoint,
    Estimate,
    Limits,
    Link,
    Maintenance,
    Overlay,
    Place,
    Priority,
    Site,
    Tenant,
    Window,
)
from flowengine.units import parse_bytes, parse_duration_s, parse_rate_bits_per_s

__all__ = ["Scenario", "parse_link_option", "parse_scenario", "read_scenario"]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_DEMANDS = 100_000


class Scenario(NamedTuple):
    """What a file describes."""

    overlay: Overlay
    arrivals: list[tuple[float, Demand]]
    start_s: float
    end_s: float
    step_s: float
    limits: Limits


class _Table:
    """One table of the file; knows where it is, and which keys were never read."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise UsageError(f"{where} is not a table", hint="see docs/reference/simulate-file.md")
        self.data: dict[str, Any] = dict(data)
        self.where = where

    def take(self, key: str, default: Any = None, *, kind: type | tuple[type, ...] = str) -> Any:
        """The value of a key; a missing one without default is an error."""
        if key not in self.data:
            if default is None:
                raise UsageError(f"{self.where} lacks {key!r}", hint="see docs/reference/simulate-file.md")
            return default
        value = self.data.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(
                f"{key!r} of {self.where} is {value!r}", hint="see docs/reference/simulate-file.md"
            )
        return value

    def maybe(self, key: str, read: Callable[[Any], Any], kind: type | tuple[type, ...] = str) -> Any:
        """The value of a key as `read` understands it, None where it is missing."""
        return read(self.take(key, kind=kind)) if key in self.data else None

    def tables(self, key: str) -> list[_Table]:
        """All tables of an array of tables."""
        found = self.data.pop(key, [])
        if not isinstance(found, list):
            raise UsageError(f"{key!r} of {self.where} is not [[{key}]]", hint="write it with two brackets")
        return [_Table(item, f"{key} {i + 1} of {self.where}") for i, item in enumerate(found)]

    def end(self) -> None:
        """Refuse keys that nobody read: a misspelt limit would be a limit that does not hold."""
        if self.data:
            name = sorted(self.data)[0]
            raise UsageError(
                f"{self.where} has a key {name!r} that means nothing here",
                hint="see docs/reference/simulate-file.md",
            )


def read_scenario(path: Path) -> Scenario:
    """The scenario in a file.

    Raises:
        NotFound: There is no such file.
        UsageError: It is not a scenario; the message says where.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"there is no file {path}", hint="name a TOML file with sites, links and demands"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}", hint="mend the file") from None
    return parse_scenario(data, str(path))


def parse_scenario(data: dict[str, Any], name: str) -> Scenario:
    """The scenario in parsed TOML."""
    top = _Table(data, name)
    frame = _Table(top.take("simulation", {}, kind=dict), f"simulation of {name}")
    start_s = _instant(frame.take("start", datetime(2026, 1, 1, tzinfo=UTC), kind=datetime), frame)
    end_s = start_s + parse_duration_s(frame.take("length", "24h"))
    step_s = parse_duration_s(frame.take("step", "1min"))
    limits = Limits(max_relays=frame.take("max_relays", 2, kind=int))
    rng = random.Random(frame.take("seed", 1, kind=int))  # noqa: S311 - a scenario, not a secret
    frame.end()
    sites = tuple(_site(table) for table in top.tables("site"))
    links = tuple(link for table in top.tables("link") for link in _links(table))
    endpoints = tuple(_endpoint(table) for table in top.tables("endpoint"))
    tenants = tuple(_tenant(table) for table in top.tables("tenant"))
    arrivals: list[tuple[float, Demand]] = []
    for table in top.tables("demand"):
        arrivals += _demands(table, start_s, rng)
        if len(arrivals) > MAX_DEMANDS:
            raise UsageError(f"{name} has more than {MAX_DEMANDS} demands", hint="simulate a shorter time")
    top.end()
    ids = [d.id for _, d in arrivals]
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UsageError(f"{name} has more than one demand {twice!r}", hint="give each [[demand]] its own id")
    overlay = Overlay(sites=sites, links=links, endpoints=endpoints, tenants=tenants)
    return Scenario(overlay, arrivals, start_s, end_s, step_s, limits)


def parse_link_option(text: str) -> list[Link]:
    """Links in both directions from FROM:TO:RATE, named apart from any that are there.

    >>> [x.label for x in parse_link_option("gui:lin:10Gbit/s")]
    ['gui→lin (added)', 'lin→gui (added)']
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"{text!r} is not a link", hint="write FROM:TO:RATE, e.g. gui:lin:10Gbit/s")
    source, target, rate = parts
    estimate = Estimate(rate_bits_per_s=parse_rate_bits_per_s(rate), measured=False)
    return [
        Link(source=a, target=b, estimate=estimate, name=f"{a}→{b} (added)", usd_per_gb=0.0)
        for a, b in ((source, target), (target, source))
    ]


def _instant(value: datetime, table: _Table) -> float:
    if value.tzinfo is None:
        raise UsageError(
            f"{table.where} has a time without zone: {value}", hint="write it with Z or an offset"
        )
    return value.timestamp()


def _caps(table: _Table, key: str) -> tuple[Cap, ...]:
    plain = table.maybe(key, parse_rate_bits_per_s)
    caps = [] if plain is None else [Cap(rate_bits_per_s=plain)]
    for entry in table.tables(f"{key}_window"):
        caps.append(Cap(rate_bits_per_s=parse_rate_bits_per_s(entry.take("rate")), window=_window(entry)))
        entry.end()
    return tuple(caps)


def _window(table: _Table) -> Window:
    zone_name = table.take("zone")
    try:
        zone = ZoneInfo(zone_name)
    except (OSError, ValueError, ZoneInfoNotFoundError):
        raise UsageError(
            f"{table.where} names zone {zone_name!r}, which is not known",
            hint="use an IANA name like Asia/Shanghai",
        ) from None
    days = table.take("weekdays", list(DAYS), kind=list)
    unknown = [d for d in days if d not in DAYS]
    if unknown:
        raise UsageError(f"{table.where} has weekday {unknown[0]!r}", hint=f"use {', '.join(DAYS)}")
    start, end = (
        _minute(table.take(key, default), table) for key, default in (("from", "00:00"), ("until", "24:00"))
    )
    weekdays = frozenset() if len(days) == len(DAYS) else frozenset(DAYS.index(d) for d in days)
    return Window(zone=zone, start_minute=start, end_minute=end, weekdays=weekdays)


def _minute(text: str, table: _Table) -> int:
    hours, _, minutes = text.partition(":")
    if not (
        hours.isdigit() and minutes.isdigit() and len(minutes) == 2 and int(minutes) < 60 and int(hours) <= 24
    ):
        raise UsageError(f"{table.where} has the time of day {text!r}", hint="write it like 08:30")
    return int(hours) * 60 + int(minutes)


def _maintenance(table: _Table) -> tuple[Maintenance, ...]:
    found = []
    for entry in table.tables("maintenance"):
        start = _instant(entry.take("start", kind=datetime), entry)
        length = parse_duration_s(entry.take("length"))
        drain = parse_duration_s(entry.take("drain", "0s"))
        found.append(Maintenance(start_s=start, end_s=start + length, drain_s=drain))
        entry.end()
    return tuple(found)


def _site(table: _Table) -> Site:
    name = table.take("name")
    site = Site(
        name=name, caps_in=_caps(table, "in"), caps_out=_caps(table, "out"), maintenance=_maintenance(table)
    )
    table.end()
    return site


def _links(table: _Table) -> list[Link]:
    source, target = table.take("from"), table.take("to")
    estimate = Estimate(
        rate_bits_per_s=parse_rate_bits_per_s(table.take("rate")),
        spread=float(table.take("spread", 0.1, kind=(int, float))),
    )
    price = table.maybe("usd_per_gb", float, kind=(int, float))
    caps, maintenance = _caps(table, "cap"), _maintenance(table)
    name = table.take("name", "")
    both = table.take("both", True, kind=bool)
    table.end()
    directions = [(source, target), (target, source)] if both else [(source, target)]
    return [
        Link(
            source=a,
            target=b,
            estimate=estimate,
            usd_per_gb=price,
            caps=caps,
            maintenance=maintenance,
            name=name and (f"{name} {a}→{b}" if both else name),
        )
        for a, b in directions
    ]


def _endpoint(table: _Table) -> Endpoint:
    endpoint = Endpoint(
        name=table.take("name"),
        site=table.take("site"),
        caps_read=_caps(table, "read"),
        caps_write=_caps(table, "write"),
    )
    table.end()
    return endpoint


def _tenant(table: _Table) -> Tenant:
    weight = float(table.take("weight", 1.0, kind=(int, float)))
    tenant = Tenant(name=table.take("name"), weight=weight, caps=_caps(table, "cap"))
    table.end()
    return tenant


def _places(value: str | list[str]) -> tuple[Place, ...]:
    names = [value] if isinstance(value, str) else value
    return tuple(Place(*name.split("/", 1)) for name in names)


def _names(value: list[str]) -> frozenset[str]:
    return frozenset(value)


def _demands(table: _Table, start_s: float, rng: random.Random) -> list[tuple[float, Demand]]:
    """One demand, or `count` of them, `every` so often, give or take `jitter`."""
    name = table.take("id")
    count = table.take("count", 1, kind=int)
    at_s = start_s + parse_duration_s(table.take("at", "0s"))
    every_s = parse_duration_s(table.take("every", "0s"))
    jitter_s = parse_duration_s(table.take("jitter", "0s"))
    within_s = table.maybe("within", parse_duration_s)
    priority = table.take("priority", "normal")
    if priority not in list(Priority):
        raise UsageError(f"{table.where} has priority {priority!r}", hint="use urgent, normal or scavenger")
    allowed = Allowed(
        relays=table.maybe("relays", _names, kind=list), links=table.maybe("links", _names, kind=list)
    )
    template = Demand(
        id=name,
        sources=_places(table.take("from", kind=(str, list))),
        targets=_places(table.take("to", kind=(str, list))),
        remaining_bytes=parse_bytes(table.take("size")),
        priority=Priority(priority),
        tenant=table.take("tenant", ""),
        weight=float(table.take("weight", 1.0, kind=(int, float))),
        cost_limit_usd=table.maybe("cost_limit_usd", float, kind=(int, float)),
        dataset=table.take("dataset", ""),
        max_rate_bits_per_s=table.maybe("max_rate", parse_rate_bits_per_s),
        allowed=allowed,
    )
    table.end()
    found = []
    for k in range(count):
        arrival = at_s + k * every_s + rng.uniform(0.0, jitter_s)
        fields = {f: getattr(template, f) for f in template.__struct_fields__}
        fields["id"] = name if count == 1 else f"{name}-{k + 1}"
        fields["deadline_s"] = None if within_s is None else arrival + within_s
        found.append((arrival, Demand(**fields)))
    return found
