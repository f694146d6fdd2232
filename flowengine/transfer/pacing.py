"""Rates that are held: token buckets, one below the other, and limits that change with the time of day.

Goal
    What a transfer sends stays within 5 % of its limit over 5 seconds, at any rate, by any number of threads.
Plan
    `TokenBucket` is the rule, without a clock. `Limits` are named buckets that many transfers share (a link's, a
    site's, a tenant's); a `Pacer` is what one transfer's lanes ask: it has a bucket of its own below the named ones, and
    takes from all of them at once or waits. `RateSchedule` says which rate holds at which time of day.
Invariants
    - A bucket gives as long as it is above zero and may go below by one portion, so the sum over time is exact
      whatever the portions are; what is saved up is at most `BURST_S` of the rate.
    - A rate that is set holds from that moment, for those who wait as well.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

import msgspec

from flowengine.errors import UsageError
from flowengine.units import parse_rate_bits_per_s

__all__ = ["BURST_S", "AskingPacer", "Limits", "Pacer", "RateSchedule", "TokenBucket", "parse_schedule"]

BURST_S: Final = 0.1
"""Seconds of the rate that an idle bucket saves up: enough to make good for a thread that woke late."""
_PORTION_S: Final = 0.02
_LEAST_PORTION_BYTES: Final = 4096
_NEVER_S: Final = 3600.0
_MINUTES: Final = 24 * 60


class TokenBucket:
    """The pure rule. Rates are bytes per second; None is no limit.

    >>> bucket = TokenBucket(1000.0, now=0.0)
    >>> bucket.take(600, now=0.0)
    >>> bucket.wait_s(now=0.0)  # 100 were saved up, so 500 are owed
    0.5
    >>> bucket.wait_s(now=0.5)
    0.0
    """

    __slots__ = ("__weakref__", "_at", "_tokens", "rate")

    def __init__(self, rate: float | None, now: float) -> None:
        self.rate = rate
        self._at = now
        self._tokens = BURST_S * rate if rate else 0.0

    def _fill(self, now: float) -> None:
        if self.rate is not None:
            self._tokens = min(self._tokens + (now - self._at) * self.rate, BURST_S * self.rate)
        self._at = now

    def set_rate(self, rate: float | None, now: float) -> None:
        """Change the rate; what is owed is paid at the new one."""
        self._fill(now)
        if self.rate is None or rate is None:
            self._tokens = 0.0  # nothing was counted without a limit
        self.rate = rate

    def wait_s(self, now: float) -> float:
        """How long until it gives again; 0 when it does now."""
        self._fill(now)
        if self.rate is None or self._tokens >= 0:
            return 0.0
        return -self._tokens / self.rate

    def take(self, size_bytes: int, now: float) -> None:
        """Take, below zero if need be; ask `wait_s` first."""
        self._fill(now)
        if self.rate is not None:
            self._tokens -= size_bytes


class Limits:
    """Named rates over all transfers of a process; may be changed at any time, from any thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        # A name without a limit, that no pacer asks, is forgotten by itself.
        self._buckets: WeakValueDictionary[str, TokenBucket] = WeakValueDictionary()
        self._limited: dict[str, TokenBucket] = {}

    def set_rate(self, name: str, bits_per_s: float | None) -> None:
        """Let all transfers below a name together send so much from now on; None lifts the limit.

        Raises:
            ValueError: the rate is not above zero.
        """
        bucket = self._bucket(name)
        self._set(bucket, bits_per_s)
        if bits_per_s is None:
            self._limited.pop(name, None)
        else:
            self._limited[name] = bucket

    def rate(self, name: str) -> float | None:
        """Bits per second that are allowed now."""
        rate = self._bucket(name).rate
        return None if rate is None else rate * 8

    def pacer(self, *names: str) -> Pacer:
        """What one transfer asks: buckets of its own, below the named ones."""
        own, asked = (TokenBucket(None, self._clock()) for _ in range(2))
        return Pacer(self, [own, asked, *map(self._bucket, names)])

    def _bucket(self, name: str) -> TokenBucket:
        with self._condition:
            bucket = self._buckets.get(name)
            if bucket is None:
                bucket = self._buckets[name] = TokenBucket(None, self._clock())
            return bucket

    def _set(self, bucket: TokenBucket, bits_per_s: float | None) -> None:
        if bits_per_s is not None and not bits_per_s > 0:
            raise ValueError(f"a rate is above zero, not {bits_per_s}")
        with self._condition:
            bucket.set_rate(None if bits_per_s is None else bits_per_s / 8, self._clock())
            self._condition.notify_all()


class Pacer:
    """The rates that one transfer is bound by. Used by all its lanes; see `Limits.pacer`."""

    def __init__(self, limits: Limits, buckets: list[TokenBucket]) -> None:
        self._limits = limits
        self._buckets = buckets
        self._closed = False
        self._parts: list[Pacer] = []

    @property
    def limited(self) -> bool:
        """Whether there is any limit now."""
        return any(bucket.rate is not None for bucket in self._buckets)

    def over(self, *names: str) -> Pacer:
        """The same rates, and the named ones besides: for those of its lanes that go over one link."""
        made = Pacer(self._limits, [*self._buckets, *map(self._limits._bucket, names)])
        made._closed = self._closed
        self._parts.append(made)
        return made

    def set_rate(self, bits_per_s: float | None) -> None:
        """Limit this transfer alone; None lifts the limit. Raises `ValueError` unless above zero."""
        self._limits._set(self._buckets[0], bits_per_s)

    def set_asked_rate(self, bits_per_s: float | None) -> None:
        """The same for what the other side asks; both hold."""
        self._limits._set(self._buckets[1], bits_per_s)

    def portion(self, size_bytes: int) -> int:
        """How much of so many bytes to send at once, so that a slow rate is even and not one frame a minute."""
        rates = self._rates()
        return (
            min(size_bytes, max(_LEAST_PORTION_BYTES, int(min(rates) * _PORTION_S))) if rates else size_bytes
        )

    @property
    def rate_bits_per_s(self) -> float | None:
        """The least of its rates now; None where there is no limit."""
        return 8 * min(rates) if (rates := self._rates()) else None

    def take(self, size_bytes: int) -> None:
        """Wait until so many bytes may be sent, and count them. Returns at once when closed."""
        with self._limits._condition:
            while (wait := self._try(size_bytes)) > 0:
                self._limits._condition.wait(min(wait, _NEVER_S))

    def take_nowait(self, size_bytes: int) -> float:
        """Count so many bytes if they may be sent now and give 0; else how many seconds to wait before asking again."""
        with self._limits._condition:
            return self._try(size_bytes)

    def _try(self, size_bytes: int) -> float:
        now = self._limits._clock()
        wait = 0.0 if self._closed else max(bucket.wait_s(now) for bucket in self._buckets)
        if wait <= 0 and not self._closed:
            for bucket in self._buckets:
                bucket.take(size_bytes, now)
        return wait

    def _rates(self) -> list[float]:
        return [bucket.rate for bucket in self._buckets if bucket.rate is not None]

    def spend(self, size_bytes: int) -> None:
        """The same where there is any limit; costs next to nothing where there is none."""
        if self.limited:
            self.take(size_bytes)

    def close(self) -> None:
        """Hold nobody back any more: the transfer is over."""
        with self._limits._condition:
            self._closed = True
            for part in self._parts:
                part._closed = True
            self._limits._condition.notify_all()


class AskingPacer(Pacer):
    """What lanes ask in a process that another one lends its limits: rates of the transfer's own, then that process.

    Args:
        session: of the transfer, with its own rates.
        ask: has so many bytes counted in the other process; returns when they may be sent, or what it is given besides
            says that nobody waits any more.
        rate: bytes per second that hold there; None while there is no limit, and nobody is asked.
    """

    def __init__(self, session: Pacer, ask: Callable[[int, Callable[[], bool]], None]) -> None:
        super().__init__(session._limits, session._buckets)
        session._parts.append(self)
        self._ask = ask
        self.rate: float | None = None

    @property
    def limited(self) -> bool:
        """As of `Pacer`."""
        return self.rate is not None or super().limited

    def take(self, size_bytes: int) -> None:
        """As of `Pacer`."""
        super().take(size_bytes)
        if self.rate is not None and not self._closed:
            self._ask(size_bytes, lambda: self._closed)

    def _rates(self) -> list[float]:
        return [*super()._rates(), *([self.rate] if self.rate is not None else [])]


class RateSchedule(msgspec.Struct, frozen=True):
    """Rates by time of day.

    Attributes:
        spans: (first minute, minute behind the last one, bits per second or None); one that ends before it begins goes
            over midnight. The first that fits holds.
        otherwise: bits per second at all other times; None is no limit.
    """

    spans: tuple[tuple[int, int, float | None], ...] = ()
    otherwise: float | None = None

    def rate_at(self, minute: int) -> float | None:
        """Bits per second in a minute of the day, counted from midnight.

        >>> parse_schedule("22:00-06:00=off,else=8Mbit/s").rate_at(5 * 60 + 59) is None
        True
        """
        for begin, end, rate in self.spans:
            inside = begin <= minute < end if begin < end else minute >= begin or minute < end
            if inside:
                return rate
        return self.otherwise


_SPAN: Final = re.compile(r"(\d{1,2}):(\d\d)-(\d{1,2}):(\d\d)")


def parse_schedule(text: str) -> RateSchedule:
    """A rate, or rates by time of day: `200Mbit/s`, `off`, `08:00-18:00=200Mbit/s,else=1Gbit/s`.

    >>> parse_schedule("08:00-18:00=200Mbit/s,else=1Gbit/s").rate_at(12 * 60)
    200000000.0

    Raises:
        UsageError: it is none of these.
    """
    if "=" not in text:
        return RateSchedule((), _rate(text))
    spans: list[tuple[int, int, float | None]] = []
    otherwise: float | None = None
    for part in text.split(","):
        when, mark, rate = (word.strip() for word in part.partition("="))
        if not mark:
            raise _unclear(text, f"{part.strip()!r} has no =RATE")
        if when == "else":
            otherwise = _rate(rate)
            continue
        match = _SPAN.fullmatch(when)
        if match is None:
            raise _unclear(text, f"{when!r} is no span of time")
        hour, minute, to_hour, to_minute = map(int, match.groups())
        begin, end = hour * 60 + minute, to_hour * 60 + to_minute
        if max(minute, to_minute) > 59 or begin >= _MINUTES or end > _MINUTES or begin == end:
            raise _unclear(text, f"{when!r} is no span of a day")
        spans.append((begin, end, _rate(rate)))
    return RateSchedule(tuple(spans), otherwise)


def _rate(text: str) -> float | None:
    if text.strip() == "off":
        return None
    rate = parse_rate_bits_per_s(text)
    if rate <= 0:
        raise UsageError(f"a limit of {text.strip()!r} would send nothing", hint="write off for no limit")
    return rate


def _unclear(text: str, why: str) -> UsageError:
    return UsageError(
        f"the limit {text!r} cannot be read: {why}",
        hint='write a rate like 200Mbit/s, or "08:00-18:00=200Mbit/s,else=1Gbit/s"; off is no limit',
    )
