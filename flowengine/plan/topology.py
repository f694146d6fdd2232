"""The overlay as values: sites, links, storage endpoints, tenants, and what limits them when.

Nothing here computes a plan. Rates are bits a second, times are POSIX seconds, money is US dollars a
gigabyte (10^9 bytes). A window carries its time zone as an object, because reading the zone database is I/O
and belongs to whoever reads the configuration.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo

import msgspec

__all__ = [
    "Cap",
    "Endpoint",
    "Estimate",
    "Link",
    "Maintenance",
    "Overlay",
    "Site",
    "Tenant",
    "Window",
    "cap_at",
    "window_edges",
]

DAY_MINUTES = 24 * 60


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of wall-clock time that comes back every day, or on some weekdays.

    An instant is inside when the clock on the wall of `zone` then shows a time in [start, end). So an hour
    that the clocks skip is not there, and an hour that they repeat is there twice.

    Args:
        zone: The time zone, e.g. `zoneinfo.ZoneInfo("Asia/Shanghai")`.
        start_minute: Minutes after local midnight at which it opens.
        end_minute: Minutes after local midnight at which it closes; not later than the start means next day.
        weekdays: Days on which it opens, Monday is 0; empty means every day.
    """

    zone: tzinfo
    start_minute: int = 0
    end_minute: int = DAY_MINUTES
    weekdays: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not (0 <= self.start_minute < DAY_MINUTES and 0 <= self.end_minute <= DAY_MINUTES):
            raise ValueError(
                f"a window runs between minutes 0 and 1440 of a day, not {self.start_minute} to {self.end_minute}"
            )

    def contains(self, at_s: float) -> bool:
        """Whether the window is open at an instant."""
        local = datetime.fromtimestamp(at_s, UTC).astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        if self.start_minute < self.end_minute:
            return self._opens_on(local.weekday()) and self.start_minute <= minute < self.end_minute
        if minute >= self.start_minute:
            return self._opens_on(local.weekday())
        return minute < self.end_minute and self._opens_on((local.weekday() - 1) % 7)

    def _opens_on(self, weekday: int) -> bool:
        return not self.weekdays or weekday in self.weekdays


class Cap(msgspec.Struct, frozen=True, kw_only=True):
    """A limit that holds always, or while its window is open."""

    rate_bits_per_s: float
    window: Window | None = None


class Maintenance(msgspec.Struct, frozen=True, kw_only=True):
    """A time without service. From `drain_s` before the start no new route is led through."""

    start_s: float
    end_s: float
    drain_s: float = 0.0


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a link is believed to carry.

    Args:
        rate_bits_per_s: The expected rate.
        spread: Relative standard deviation of the rate; 0.1 means give or take ten percent.
        age_s: Seconds since the last measurement behind it.
        measured: False for a prior that no probe and no transfer has confirmed.
    """

    rate_bits_per_s: float
    spread: float = 0.0
    age_s: float = 0.0
    measured: bool = True


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """A place with storage and compute; its caps bound all that enters and leaves it, relayed bytes too."""

    name: str
    caps_in: tuple[Cap, ...] = ()
    caps_out: tuple[Cap, ...] = ()
    maintenance: tuple[Maintenance, ...] = ()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A storage system at a site, with its own limits for reading and writing."""

    name: str
    site: str
    caps_read: tuple[Cap, ...] = ()
    caps_write: tuple[Cap, ...] = ()


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A directed path between two sites.

    Args:
        usd_per_gb: Price of moving 10^9 bytes; None when nobody knows it, which is not free.
        name: Tells parallel links apart; empty means `source→target`.
    """

    source: str
    target: str
    estimate: Estimate
    rtt_ms: float = 0.0
    loss: float = 0.0
    usd_per_gb: float | None = None
    caps: tuple[Cap, ...] = ()
    maintenance: tuple[Maintenance, ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        """The link's unique name."""
        return self.name or f"{self.source}→{self.target}"


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Whose share it is; twice the weight is twice the share where two compete."""

    name: str
    weight: float = 1.0
    caps: tuple[Cap, ...] = ()


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """The graph that plans are made on. A tenant that is not listed has weight 1 and no cap."""

    sites: tuple[Site, ...]
    links: tuple[Link, ...]
    endpoints: tuple[Endpoint, ...] = ()
    tenants: tuple[Tenant, ...] = ()


def cap_at(caps: tuple[Cap, ...], at_s: float) -> float:
    """The tightest of the caps that hold at an instant, infinity when none does.

    >>> cap_at((Cap(rate_bits_per_s=5e9), Cap(rate_bits_per_s=2e9)), 0.0)
    2000000000.0
    """
    rates = [c.rate_bits_per_s for c in caps if c.window is None or c.window.contains(at_s)]
    return min(rates, default=float("inf"))


def window_edges(window: Window, start_s: float, end_s: float) -> list[float]:
    """Every instant in (start, end) at which the window opens or closes, ascending.

    Daylight saving is computed: both readings of an ambiguous local time are looked at, and so is every
    instant at which the zone's offset changes.
    """
    zone = window.zone
    day = datetime.fromtimestamp(start_s, UTC).astimezone(zone).date() - timedelta(days=1)
    candidates: set[float] = set()
    while True:
        midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
        if midnight.timestamp() > end_s:
            break
        following = day + timedelta(days=1)
        next_midnight = datetime(following.year, following.month, following.day, tzinfo=zone)
        if midnight.utcoffset() != next_midnight.utcoffset():
            candidates.add(_offset_change(zone, midnight.timestamp(), next_midnight.timestamp()))
        for minute in (0, window.start_minute, window.end_minute % DAY_MINUTES):
            local = midnight + timedelta(minutes=minute)
            candidates.update((local.timestamp(), local.replace(fold=1).timestamp()))
        day = following
    edges = []
    inside = window.contains(start_s)
    for instant in sorted(candidates):
        if start_s < instant < end_s and window.contains(instant) != inside:
            inside = not inside
            edges.append(instant)
    return edges


def _offset_change(zone: tzinfo, before_s: float, after_s: float) -> float:
    """The first whole second at which the zone has the offset it has at `after_s`."""

    def offset(at_s: float) -> timedelta | None:
        return datetime.fromtimestamp(at_s, UTC).astimezone(zone).utcoffset()

    low, high, wanted = int(before_s), int(after_s), offset(after_s)
    while high - low > 1:
        middle = (low + high) // 2
        if offset(middle) == wanted:
            high = middle
        else:
            low = middle
    return float(high)
