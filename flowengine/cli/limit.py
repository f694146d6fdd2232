"""`flow limit`: bandwidth limits, changed while transfers run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click

from flowengine.cli.federation import json_option, note, open_client, plain, print_table, show_time
from flowengine.cli.groups import Group
from flowengine.errors import Exit, UsageError

if TYPE_CHECKING:
    from flowengine.api.links import LimitWindow

__all__ = ["limit", "parse_window"]

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOURS: Final = re.compile(r"(\d{1,2}:\d\d)-(\d{1,2}:\d\d)")
_SCOPE: Final = re.compile(
    r"link:[a-z0-9-]+>[a-z0-9-]+|site:[a-z0-9-]+|tenant:[a-z0-9-]+|transfer:t-[0-9a-z]+|(?:read|write):[a-z0-9-]+:/.*"
)


@click.group(cls=Group)
def limit() -> None:
    """Bandwidth limits per link, site, storage, tenant or transfer, with other rates for hours of the day.

    They act over all transfers, and at once on those that run.
    """


def show_rate(bits_per_s: int | None) -> str:
    """A rate as it is written in commands.

    >>> show_rate(200_000_000), show_rate(None), show_rate(0)
    ('200 Mbit/s', 'no limit', 'nothing')
    """
    if bits_per_s is None:
        return "no limit"
    if bits_per_s == 0:
        return "nothing"
    for unit, size in (("Tbit/s", 10**12), ("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:g} {unit}"
    return f"{bits_per_s} bit/s"


def parse_rate(text: str) -> int | None:
    """Bits a second; None for "none".

    >>> parse_rate("200Mbit/s"), parse_rate("none"), parse_rate("0")
    (200000000, None, 0)
    """
    from flowengine.units import parse_rate_bits_per_s

    if text in ("none", "unlimited"):
        return None
    if text == "0":
        return 0
    return round(parse_rate_bits_per_s(text))


def parse_window(text: str) -> LimitWindow:
    """A window from "mon-fri 08:00-18:00 Europe/Berlin=50Mbit/s"; days and zone may be left out.

    >>> window = parse_window("mon-fri 08:00-18:00 Europe/Berlin=50Mbit/s")
    >>> window.days, window.start, window.end, window.zone, window.rate_bits_per_s
    (['mon', 'tue', 'wed', 'thu', 'fri'], '08:00', '18:00', 'Europe/Berlin', 50000000)
    """
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    from flowengine.api.links import LimitWindow

    when, mark, rate = text.rpartition("=")
    bits = parse_rate(rate.strip()) if mark else None
    if not mark or bits is None:
        raise _bad_window(text, "it needs =RATE at its end")
    days: list[Any] = []
    hours: tuple[str, str] | None = None
    zone = "UTC"
    for word in when.split():
        match = _HOURS.fullmatch(word)
        if match:
            hours = (match[1].rjust(5, "0"), match[2].rjust(5, "0"))
        elif word.lower()[:3] in _DAYS:
            days = _days(word.lower(), text)
        else:
            try:
                zone = ZoneInfo(word).key
            except (ZoneInfoNotFoundError, ValueError, OSError):
                raise _bad_window(text, f"{word!r} is neither days, hours nor a time zone") from None
    if hours is None:
        raise _bad_window(text, "it names no hours")
    return LimitWindow(rate_bits_per_s=bits, start=hours[0], end=hours[1], days=days, zone=zone)


def _bad_window(text: str, why: str) -> UsageError:
    return UsageError(
        f"--window {text!r}: {why}", hint="write it like 'mon-fri 08:00-18:00 Europe/Berlin=50Mbit/s'"
    )


def _days(word: str, text: str) -> list[str]:
    found: list[str] = []
    for part in word.split(","):
        first, dash, last = part.partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise _bad_window(text, f"{part!r} are no days; they are {' '.join(_DAYS)}")
        at, end = _DAYS.index(first), _DAYS.index(last if dash else first)
        found += [_DAYS[(at + step) % 7] for step in range((end - at) % 7 + 1)]
    return [day for day in _DAYS if day in found]


def _scope(text: str) -> str:
    if _SCOPE.fullmatch(text) is None:
        raise UsageError(
            f"{text!r} is no scope of a limit",
            hint="write 'link:A>B' (quoted), site:A, tenant:T, transfer:ID, read:A:/ROOT or write:A:/ROOT",
        )
    return text


@limit.command("ls")
@json_option
def ls(as_json: bool) -> int:
    """List all limits and what holds now."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        limits = client.limits()
    if as_json:
        print_json({"limits": plain(limits)})
        return Exit.DONE
    rows = [
        (
            limit.scope,
            show_rate(limit.now_bits_per_s),
            show_rate(limit.rate_bits_per_s),
            "; ".join(_show_window(window) for window in limit.windows) or "-",
            f"{limit.changed_by}, {show_time(limit.changed)}",
        )
        for limit in limits
    ]
    print_table(("SCOPE", "NOW", "ELSE", "WINDOWS", "SET BY"), rows)
    return Exit.DONE


def _show_window(window: LimitWindow) -> str:
    days = ",".join(window.days)
    return f"{f'{days} ' if days else ''}{window.start}-{window.end} {window.zone}={show_rate(window.rate_bits_per_s)}"


@limit.command("set")
@click.argument("scope")
@click.argument("rate")
@click.option(
    "--window",
    "windows",
    multiple=True,
    metavar="WHEN=RATE",
    help="Another rate for some hours; may be repeated.",
)
@json_option
def set_(scope: str, rate: str, windows: tuple[str, ...], as_json: bool) -> int:
    """Limit SCOPE to RATE: flow limit set 'link:a>b' 200Mbit/s --window 'mon-fri 08:00-18:00 Europe/Berlin=50Mbit/s'.

    SCOPE is link:A>B, site:A (what leaves it), tenant:T, transfer:ID, read:A:/ROOT or write:A:/ROOT (what is read from,
    or written to, a root that site A offers). RATE is like 200Mbit/s, 0 for nothing, or none for no limit outside the
    windows.
    """
    from flowengine.cli.output import print_json

    bits, hours = parse_rate(rate), [parse_window(text) for text in windows]
    with open_client() as client:
        made = client.set_limit(_scope(scope), bits, hours)
    if as_json:
        print_json(plain(made))
    else:
        note(f"{made.scope}: now {show_rate(made.now_bits_per_s)}")
    return Exit.DONE


@limit.command("rm")
@click.argument("scope")
def rm(scope: str) -> int:
    """Take the limit of SCOPE away."""
    with open_client() as client:
        client.remove_limit(_scope(scope))
    note(f"{scope}: no limit")
    return Exit.DONE
