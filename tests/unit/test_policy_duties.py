"""What duties mean: windows over changes of clocks, stop modes, deletion under clocks that jump."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import msgspec
import pytest

from flowengine.policy import Engine, load
from flowengine.policy.duties import (
    Clock,
    Instant,
    Terms,
    Window,
    deletion,
    dump_duties,
    load_duties,
    stop_mode,
    window_at,
)
from flowengine.policy.model import Duty

BERLIN = {"Europe/Berlin": ZoneInfo("Europe/Berlin")}
NIGHT = ["Europe/Berlin 20:00-06:00"]


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def duty(kind: str, **params: object) -> Duty:
    return Duty(kind, tuple(sorted(params.items())), ("p/r",))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-03-28T12:00+01:00", Window(False, at("2026-03-28T20:00+01:00"))),
        ("2026-03-28T23:00+01:00", Window(True, at("2026-03-29T06:00+02:00"))),  # the night loses an hour
        ("2026-10-24T23:00+02:00", Window(True, at("2026-10-25T06:00+01:00"))),  # and gains one
        ("2026-06-01T06:00+02:00", Window(False, at("2026-06-01T20:00+02:00"))),
    ],
)
def test_windows_are_local_times(now: str, expected: Window) -> None:
    assert window_at(NIGHT, at(now), BERLIN) == expected


def test_windows_that_touch_are_one_and_an_unknown_zone_is_closed() -> None:
    all_day = ["Europe/Berlin 00:00-12:00"]
    assert window_at([], 0, {}) == Window(True)
    assert window_at(all_day, at("2026-06-01T03:00+02:00"), BERLIN).until == at("2026-06-01T12:00+02:00")
    assert window_at(["Mars/Olympus 00:00-12:00"], 0, BERLIN) == Window(False)


def test_terms_read_every_duty_that_outlives_or_bounds_a_transfer() -> None:
    terms = Terms.of(
        [
            duty("window", windows=tuple(NIGHT)),
            duty("rate_max", value=4_000_000_000),
            duty("delete_by", value=1000, proof="receipt"),
            duty("delete_after", value=60, proof="certificate"),
            duty("onward", value="forbid"),
            duty("encrypt", at=("flight", "rest"), suite=("aes-256-gcm",)),
            duty("stop", value="drain"),
        ]
    )
    assert (terms.windows, terms.rate_bits_per_s, terms.proof) == (tuple(NIGHT), 4_000_000_000, "certificate")
    assert (terms.due(100), terms.due(990), terms.at_rest, terms.onward) == (160, 1000, True, "forbid")
    assert terms.binds_what_landed
    assert not Terms.of([duty("log", evidence="full")]).binds_what_landed
    assert load_duties(msgspec.json.decode(msgspec.json.encode(dump_duties(terms.duties)))) == terms.duties
    with pytest.raises(ValueError, match="no duty"):
        load_duties([7])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("quarantine", "expected"), [(None, [True, False, False]), (True, [True] * 3), (False, [False] * 3)]
)
def test_what_had_landed_goes_by_duty_or_by_stop_mode(quarantine: bool | None, expected: list[bool]) -> None:
    terms = Terms(quarantine=quarantine)
    assert [terms.takes_landed(mode) for mode in ("stop-now", "finish-file", "drain")] == expected


POLICY = b"""
[policy]
id = "p"
version = "1"
title = "t"
owner = "o"
applies_to = []
effective = 2020-01-01
review_by = 2099-01-01
[[rule]]
id = "ok"
effect = "permit"
on = ["land"]
when = ["agreement.tia_done is true"]
why = "w"
[[rule]]
id = "gently"
effect = "forbid"
on = ["land"]
stop = "finish-file"
when = ["site.country is 'RU'"]
why = "w"
[[rule]]
id = "drain"
effect = "forbid"
on = ["land"]
stop = "drain"
when = ["site.country is 'RU'", "request.purpose is 'x'"]
why = "w"
"""


def test_the_strictest_rule_that_denies_says_how_a_transfer_stops() -> None:
    engine = Engine(load({"p.toml": POLICY}))
    facts = {"time.now": at("2026-01-01T00:00+00:00"), "agreement.tia_done": True, "request.purpose": "x"}
    forbidden = engine.decide("land", facts | {"site.country": "RU"}, None)
    assert not forbidden.permit
    assert stop_mode(forbidden, Terms()) == "finish-file"
    assert stop_mode(forbidden, Terms(stop="stop-now")) == "stop-now"
    lost = engine.decide("land", facts | {"site.country": "FR", "agreement.tia_done": False}, None)
    assert not lost.permit
    assert stop_mode(lost, Terms()) == "stop-now"
    assert stop_mode(lost, Terms(stop="drain")) == "drain"


def test_a_clock_that_jumps_leaves_both_times_possible() -> None:
    clock = Clock(1000.0, 0.0, "boot")
    assert clock.read(1010.0, 10.0, "boot") == Instant(1010.0, 1010.0)
    assert clock.read(100.0, 10.0, "boot") == Instant(100.0, 1010.0)
    assert clock.read(99_999.0, 10.0, "boot") == Instant(1010.0, 99_999.0)
    assert clock.read(2000.0, 3.0, "other") == Instant(2000.0, 2000.0)
    assert clock.read(500.0, 3.0, "other") == Instant(1000.0, 1000.0)
    assert clock.agree(2000.0, 20.0, "boot").read(2001.0, 21.0, "boot") == Instant(2001.0, 2001.0)


def test_deletion_hides_in_doubt_and_deletes_when_sure() -> None:
    terms = Terms(delete_after_s=100)
    sure = Instant(1100, 1100)
    assert deletion(Terms(), 1000, sure) == "keep"
    assert deletion(terms, 1000, Instant(1099, 1099)) == "keep"
    assert deletion(terms, 1000, sure) == "delete"
    assert deletion(terms, 1000, Instant(500, 1100)) == "hide"  # a clock set back keeps nothing in sight
    assert deletion(terms, 1000, Instant(1001, 99_999)) == "hide"  # one set forward destroys nothing
    held = Terms(delete_after_s=100, holds=("case-1", "case-2"))
    assert deletion(held, 1000, sure) == "held"
    assert deletion(held, 1000, sure, released=frozenset({"case-1"})) == "held"
    assert deletion(held, 1000, sure, released=frozenset({"case-1", "case-2"})) == "delete"
    kept = Terms(delete_after_s=100, retain_s=100)
    assert deletion(kept, 1000, sure) == "delete"
    assert deletion(kept, 1000, Instant(1050, 1200)) == "hide"
