"""Token buckets against a clock of our own; limits by name; schedules."""

from __future__ import annotations

import random

import pytest

from flowengine.errors import UsageError
from flowengine.transfer.pacing import BURST_S, Limits, TokenBucket, parse_schedule


def sent_by(bucket: TokenBucket, seconds: float, portions: random.Random, begin: float = 0.0) -> int:
    """Bytes that one thread gets through a bucket that wakes it up to 5 ms late."""
    now, total = begin, 0
    while now < begin + seconds:
        wait = bucket.wait_s(now)
        if wait > 0:
            now += wait + portions.uniform(0, 0.005)
            continue
        size = portions.randrange(1, 1 << 20)
        bucket.take(size, now)
        total += size
    return total


@pytest.mark.parametrize("rate", [1e6, 25e6, 125e6, 1.25e9])
def test_a_bucket_keeps_its_rate_within_five_percent_over_five_seconds(rate: float) -> None:
    total = sent_by(TokenBucket(rate, 0.0), 5.0, random.Random(1))
    assert abs(total - 5 * rate) <= 0.05 * 5 * rate + (1 << 20)


def test_a_bucket_saves_up_no_more_than_its_burst() -> None:
    bucket = TokenBucket(1000.0, 0.0)
    bucket.take(100, 1000.0)
    assert bucket.wait_s(1000.0) == 0.0
    bucket.take(1, 1000.0)
    assert bucket.wait_s(1000.0) == pytest.approx(1 / 1000)
    assert pytest.approx(0.1) == BURST_S


def test_a_new_rate_holds_at_once_for_what_is_owed() -> None:
    bucket = TokenBucket(1000.0, 0.0)
    bucket.take(1100, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(1.0)
    bucket.set_rate(4000.0, 0.5)
    assert bucket.wait_s(0.5) == pytest.approx(500 / 4000)
    bucket.set_rate(None, 0.5)
    assert bucket.wait_s(0.5) == 0.0
    bucket.take(10**12, 0.5)
    bucket.set_rate(1000.0, 0.6)
    assert bucket.wait_s(0.6) == 0.0  # what went without a limit is not owed


def test_a_pacer_is_bound_by_its_own_rate_and_by_every_name() -> None:
    clock = [0.0]
    limits = Limits(lambda: clock[0])
    one, other = limits.pacer("link", "site"), limits.pacer("link")
    assert not one.limited
    assert one.portion(1 << 20) == 1 << 20
    limits.set_rate("link", 8_000_000)
    assert limits.rate("link") == 8_000_000
    assert limits.rate("site") is None
    assert one.limited
    assert other.limited
    assert one.portion(1 << 20) == 20_000
    one.set_rate(800_000)
    assert one.portion(1 << 20) == 4096
    assert other.portion(1 << 20) == 20_000
    one.set_asked_rate(80_000_000)
    assert one.portion(1 << 20) == 4096
    one.set_rate(None)
    assert one.portion(1 << 20) == 20_000
    other.take(100_000)  # the link's bucket had nothing saved up: it owes this
    clock[0] += 0.1
    one.take(1)
    other.close()
    limits.set_rate("link", 8)
    other.take(10**9)  # closed: returns at once


def test_a_rate_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above zero"):
        Limits().set_rate("link", 0)


@pytest.mark.parametrize(
    ("text", "minute", "expected"),
    [
        ("200Mbit/s", 0, 2e8),
        ("25MB/s", 1439, 2e8),
        ("off", 5, None),
        ("08:00-18:00=200Mbit/s,else=1Gbit/s", 8 * 60, 2e8),
        ("08:00-18:00=200Mbit/s,else=1Gbit/s", 18 * 60, 1e9),
        ("08:00-18:00=200Mbit/s", 7 * 60, None),
        ("22:00-06:00=off, else=1Mbit/s", 23 * 60, None),
        ("22:00-06:00=off, else=1Mbit/s", 6 * 60, 1e6),
        ("00:00-24:00=5Mbit/s", 1439, 5e6),
        ("08:00-12:00=1Mbit/s,10:00-11:00=2Mbit/s", 10 * 60, 1e6),
    ],
)
def test_schedules_say_what_holds(text: str, minute: int, expected: float | None) -> None:
    assert parse_schedule(text).rate_at(minute) == expected


@pytest.mark.parametrize(
    "text", ["", "fast", "0Mbit/s", "8-18=1Mbit/s", "25:00-26:00=1Mbit/s", "08:00-08:00=1Mbit/s", "08:60-09:00=off", "08:00-18:00=1Mbit/s,2Mbit/s", "else=", "-5Mbit/s"]
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_schedule(text)
    assert caught.value.hint
