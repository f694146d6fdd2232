"""The rule of streams, pace and window, against small models of links."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowengine.transfer.concurrency import Change, Concurrency, Sample
from flowengine.transfer.session import MAX_WINDOW_BYTES, MIN_WINDOW_BYTES, window_bytes

SEGMENT = 9000
TICK_S = 0.2


@dataclass
class Model:
    """A link of a rate, where each stream gets `per_stream` at most and what is sent beyond the link's rate is lost.

    `overrun` is what streams without a pace send of what the link carries; `bad_line` a share that is lost anyway.
    """

    rate: float
    per_stream: float = 1e12
    overrun: float = 1.0
    bad_line: float = 0.0
    busy: float = 0.9
    at_s: float = 0.0
    arrived: float = 0.0
    sent: float = 0.0
    resent: float = 0.0
    sending_s: float = 0.0
    changes: list[Change] = field(default_factory=list)

    def run(self, rule: Concurrency, seconds: float) -> list[Change]:
        fresh: list[Change] = []
        end = self.at_s + seconds
        while self.at_s < end:
            offered = min(rule.streams * self.per_stream, self.rate * self.overrun)
            if rule.pace is not None:
                offered = min(offered, rule.pace)
            goodput = min(offered, self.rate)
            lost = max(0.0, offered - self.rate) + self.bad_line * goodput
            self.at_s += TICK_S
            self.arrived += goodput * TICK_S
            self.sent += (goodput + lost) * TICK_S / SEGMENT
            self.resent += lost * TICK_S / SEGMENT
            self.sending_s += self.busy * rule.streams * TICK_S
            rtt = 0.16 if offered > self.rate else 0.08
            sample = Sample(
                self.at_s,
                int(self.arrived),
                int(self.sent),
                int(self.resent),
                self.sending_s,
                0.0,
                rtt,
                0.08,
                rule.streams,
            )
            fresh += rule.observe(sample)
        self.changes += fresh
        return fresh


def test_what_overruns_the_queue_is_paced_to_what_arrives_and_stays_there() -> None:
    rule = Concurrency(8, 32)
    model = Model(rate=125e6, overrun=1.3)
    model.run(rule, 2)
    assert rule.pace is not None
    assert 0.9 * 125e6 < rule.pace < 1.3 * 125e6
    model.run(rule, 30)
    sent, resent, arrived = model.sent, model.resent, model.arrived
    model.run(rule, 20)
    assert (model.resent - resent) / (model.sent - sent) < 0.02
    assert (model.arrived - arrived) / 20 > 0.97 * 125e6
    assert rule.streams == 8


def test_a_paced_link_that_gets_faster_is_noticed() -> None:
    rule = Concurrency(8, 32, pace=50e6)
    model = Model(rate=400e6, overrun=1.0)
    model.run(rule, 20)
    assert rule.pace is not None
    assert rule.pace > 300e6


def test_streams_are_added_while_they_help_and_no_longer() -> None:
    rule = Concurrency(8, 32)
    model = Model(rate=125e6, per_stream=6e6, bad_line=0.001)
    model.run(rule, 10)
    assert rule.streams * model.per_stream >= 0.95 * model.rate
    assert rule.streams <= 32
    assert all(change.reason for change in model.changes)


def test_streams_that_do_not_help_are_ended_again_and_the_next_try_waits() -> None:
    rule = Concurrency(8, 32)
    model = Model(rate=125e6)
    model.run(rule, 6)
    assert [change.value for change in model.changes if change.what == "streams"] == [12, 8]
    assert rule.streams == 8
    assert not [change for change in model.run(rule, 4) if change.what == "streams"]


def test_nothing_changes_while_the_application_is_the_limit() -> None:
    rule = Concurrency(8, 32)
    assert Model(rate=20e6, busy=0.1).run(rule, 20) == []
    assert rule.streams == 8
    assert rule.pace is None


def test_one_loss_at_the_start_is_no_congestion() -> None:
    rule = Concurrency(8, 32)
    fresh: list[Change] = []
    sent = resent = 0
    for tick in range(1, 12):  # slow start, in which one of the first segments is lost
        sent += 25 * 2 ** min(tick, 7)
        resent = 3 if tick > 1 else 0
        fresh += rule.observe(
            Sample(tick * 0.07, sent * SEGMENT, sent, resent, tick * 0.4, 0.0, 0.08, 0.08, 8)
        )
    assert not [change for change in fresh if change.what == "pace"]


def test_a_slow_link_that_loses_much_is_paced_too() -> None:
    link = Model(rate=0.5e6, overrun=1.3)
    rule = Concurrency(4, 32)
    fresh = link.run(rule, 5)
    assert any(change.what == "pace" and "sent again" in change.reason for change in fresh)


def test_a_number_that_was_asked_for_stays() -> None:
    rule = Concurrency(3, 3, probe=False)
    model = Model(rate=125e6, per_stream=6e6, bad_line=0.001)
    model.run(rule, 10)
    assert rule.streams == 3


def test_what_is_remembered_is_what_did_best() -> None:
    rule = Concurrency(8, 32)
    Model(rate=125e6).run(rule, 10)
    found = rule.remember()
    assert found.streams == 8
    assert 0.95 * 125e6 < found.bytes_per_s < 1.05 * 125e6


def test_the_window_is_two_bandwidth_delay_products_within_bounds() -> None:
    assert window_bytes(0.08, 125e6) == 20_000_000
    assert window_bytes(0.0001, 1e9) == MIN_WINDOW_BYTES
    assert window_bytes(1.0, 1e9) == MAX_WINDOW_BYTES
