"""How many streams a link gets, how fast they may send together, and how much may be on its way: the rule.

Goal
    Fill the link and not its queue: no more streams than help, nothing sent that is dropped on the way.
Plan
    Samples of what TCP counted come in, changes go out, each with its reason. Three things are decided apart:
    *Streams* by probing, as MongoDB does for its tickets: add some, and keep them only if goodput rose. That finds
    what a lossy link needs under CUBIC, whose streams are each bound by loss.
    *Pace*, the sum of the streams' SO_MAX_PACING_RATE: BBR and CUBIC both overrun a queue of one bandwidth-delay
    product when the receiver's acknowledgements come in bursts, and then a fifth of all bytes is sent twice. When
    much is sent again, all together are held to what arrives, and from there the pace is raised step by step.
    *Window*: two bandwidth-delay products by what was measured.
Invariants
    - Values in, values out: no clock, no socket. `Sample` has totals, so a sample that is left out does no harm.
    - Streams stay between 1 and `most`, a pace never falls below `LEAST_PACE`.
    - Nothing is changed while the application, not the network, is the limit.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from flowengine.units import format_rate

__all__ = ["Change", "Concurrency", "Remembered", "Sample"]

LEAST_PACE: Final = 1_000_000.0
_MUCH_RESENT: Final = 0.02
"""Share of segments sent again from which on it is congestion; single losses on a bad line are below 1 %."""
_LITTLE_RESENT: Final = 0.005
_ENOUGH_SEGMENTS: Final = 400
_LONGEST_COUNT_S: Final = 1.0
_LEAST_RESENT: Final = 4
"""A share is taken of so many segments, or of what was sent in a second, and a few lost ones are no congestion: at the
start of slow start a single loss on a bad line is several per cent of what was sent so far."""
_NETWORK_LIMITED: Final = 0.4
"""Share of their time that lanes stand in send calls when the network is the limit."""
_SLOW_START_S: Final = 5.0
_MENDING_S: Final = 0.3
_MENDING_ROUND_TRIPS: Final = 4
_WORTH: Final = 1.05
_MUCH_LESS: Final = 0.75
_QUEUE_FREE: Final = 1.3
_EPOCH_S: Final = 0.5
_EPOCH_ROUND_TRIPS: Final = 6
_FIRST_HOLD_S: Final = 8.0
_LAST_HOLD_S: Final = 240.0
_AT_PACE: Final = 0.98
"""Share of a pace that arrives when the pace, and nothing else, is the limit."""
_AT_PACE_GOOD: Final = 0.85
_AT_PACE_BAD: Final = 0.92
"""The same for whether more streams could help, measured over a longer time."""
_FIRST_STEP: Final = 0.04
_LAST_STEP: Final = 0.25
"""What a pace is raised by: little at first, twice as much after each time that went well."""
_FILLING: Final = 1.4
"""Round trip, in least ones, from which on the queue fills."""


class Sample(msgspec.Struct, frozen=True):
    """Totals since the session began, over all its streams, those that ended included.

    Attributes:
        at_s: when.
        arrived_bytes: what the other end has.
        sent_segments, resent_segments: as TCP counts them.
        sending_s: time that lanes spent in send calls, summed.
        receiver_limited_s: time that streams had to wait for room at the other end, summed.
        rtt_s, min_rtt_s: round trip now and at best.
        streams: open now.
    """

    at_s: float
    arrived_bytes: int
    sent_segments: int
    resent_segments: int
    sending_s: float
    receiver_limited_s: float
    rtt_s: float
    min_rtt_s: float
    streams: int


class Change(msgspec.Struct, frozen=True):
    """One decision: `what` is "streams", "pace" (bytes/s) or "window" (bytes)."""

    at_s: float
    what: str
    value: int
    reason: str


class Remembered(msgspec.Struct, frozen=True):
    """What an earlier transfer found out about a link."""

    streams: int
    bytes_per_s: float


class Concurrency:
    """Decides for one session.

    Args:
        streams: at the beginning.
        most: streams that may be open at once.
        probe: whether the number of streams may change.
        pace: sum of the streams' rates at the beginning, in bytes per second; None leaves them free.
    """

    def __init__(self, streams: int, most: int, *, probe: bool = True, pace: float | None = None) -> None:
        self.streams = streams
        self.pace = pace
        self.best = 0.0
        self.lossy = False
        self._most = most
        self._probe = probe
        self._last: Sample | None = None
        self._counted: Sample | None = None
        self._goodputs: deque[float] = deque(maxlen=4)
        self._step = _LAST_STEP if pace is not None else _FIRST_STEP
        self._calm = 0
        self._raised_from: float | None = None
        self._pace_hold_s = 2.0
        self._pace_after = 0.0
        self._mending_until = 0.0
        self._epoch: Sample | None = None
        self._before: tuple[int, float] | None = None
        self._level = 0.0
        self._settling = False
        self._epoch_goodput = 0.0
        self._hold_s = _FIRST_HOLD_S
        self._not_before = 0.0

    def observe(self, now: Sample) -> list[Change]:
        """What to change after a sample; take one every two or three round trips."""
        last, self._last = self._last, now
        if last is None or now.at_s <= last.at_s:
            self._epoch = self._epoch or now
            self._counted = self._counted or now
            return []
        seconds = now.at_s - last.at_s
        goodput = (now.arrived_bytes - last.arrived_bytes) / seconds
        self._goodputs.append(goodput)
        self.best = max(self.best * 0.995, goodput)
        self.lossy = now.resent_segments > 0.0003 * now.sent_segments
        resent = self._resent(now)
        limited = (now.sending_s - last.sending_s) / seconds / max(1, now.streams) >= _NETWORK_LIMITED
        changes = self._repace(now, goodput, resent, limited)
        changes += self._probe_streams(now, limited)
        return changes

    def _resent(self, now: Sample) -> float:
        """Share of what was sent lately that was sent again; 0 while there is too little to tell."""
        counted = self._counted
        assert counted is not None
        sent = now.sent_segments - counted.sent_segments
        resent = now.resent_segments - counted.resent_segments
        if sent < _ENOUGH_SEGMENTS and now.at_s - counted.at_s < _LONGEST_COUNT_S:
            return 0.0
        self._counted = now
        return resent / sent if resent >= _LEAST_RESENT else 0.0

    def remember(self) -> Remembered:
        """What the next transfer over this link may begin with."""
        return Remembered(self.streams if self._before is None else self._before[0], self.best)

    # --- pace ---------------------------------------------------------------------------------------------------

    def _repace(self, now: Sample, goodput: float, resent: float, limited: bool) -> list[Change]:
        if now.at_s < self._mending_until:
            return []  # what is sent again now was lost in the event that was dealt with
        if resent > _MUCH_RESENT:
            self._calm = 0
            self._mending_until = now.at_s + max(_MENDING_S, _MENDING_ROUND_TRIPS * now.rtt_s)
            return self._slow_down(now, resent)
        if self.pace is None:
            return self._fill_pipe(now, goodput) if limited else []
        if not limited:
            return []
        if resent > _LITTLE_RESENT or goodput < _AT_PACE * self.pace:
            self._calm = 0
            return []
        self._calm += 1
        if self._calm < (1 if self._step > _FIRST_STEP else 3) or now.at_s < self._pace_after:
            return []
        self._calm = 0
        self._raised_from = self.pace
        self.pace *= 1 + self._step
        self._step = min(self._step * 2, _LAST_STEP)
        self._pace_after = now.at_s + 3 * now.rtt_s
        return [self._paced(now, f"{format_rate(goodput)} arrive and nothing is lost: look for more")]

    def _fill_pipe(self, now: Sample, goodput: float) -> list[Change]:
        """Slow start has filled the pipe when the round trip grows: what arrives now is what the link carries."""
        if now.rtt_s < _FILLING * now.min_rtt_s or goodput < 0.9 * self.best or now.at_s > _SLOW_START_S:
            return []
        self.pace = max(goodput * 1.02, LEAST_PACE)
        self._pace_after = now.at_s + 3 * now.rtt_s
        self._mending_until = now.at_s + 2 * now.rtt_s
        reason = f"the round trip grew from {now.min_rtt_s * 1000:.0f} to {now.rtt_s * 1000:.0f} ms: the queue fills"
        return [self._paced(now, reason)]

    def _slow_down(self, now: Sample, resent: float) -> list[Change]:
        arrives = max(self._goodputs)
        if self._raised_from is not None:
            target, self._raised_from = min(self._raised_from, arrives * 1.05), None
            self._pace_hold_s = min(self._pace_hold_s * 2, 60.0)
        else:
            target = arrives
        self._pace_after = now.at_s + self._pace_hold_s
        self._step = _FIRST_STEP
        if self.pace is not None and target > 0.97 * self.pace:
            target = 0.97 * self.pace
        self.pace = max(target, LEAST_PACE)
        return [self._paced(now, f"{resent:.1%} was sent again while {format_rate(arrives)} arrived")]

    def _paced(self, now: Sample, reason: str) -> Change:
        assert self.pace is not None
        return Change(now.at_s, "pace", int(self.pace), reason)

    # --- streams ------------------------------------------------------------------------------------------------

    def _probe_streams(self, now: Sample, limited: bool) -> list[Change]:
        epoch = self._epoch
        assert epoch is not None
        seconds = now.at_s - epoch.at_s
        if not self._probe or seconds < max(_EPOCH_S, _EPOCH_ROUND_TRIPS * now.min_rtt_s):
            return []
        goodput = (now.arrived_bytes - epoch.arrived_bytes) / seconds
        bad_line = self._is_bad_line(epoch, now)
        self._epoch = now
        if goodput < _MUCH_LESS * self._level:  # what was found out then holds no longer
            self._not_before, self._hold_s, self._level = 0.0, _FIRST_HOLD_S, 0.0
        if self._settling:  # new streams are still in slow start
            self._settling = False
            return []
        if self._before is not None:
            return self._judge(now, goodput, bad_line=bad_line)
        rising = goodput > _WORTH * self._epoch_goodput
        self._epoch_goodput = goodput
        if rising:  # as it is: more streams would only be taken for the reason
            return []
        # Losses of a bad line keep each stream below its share of the pace; what overran a queue does so no more.
        full = self.pace is not None and goodput > (_AT_PACE_BAD if bad_line else _AT_PACE_GOOD) * self.pace
        queue = now.rtt_s > 2 * now.min_rtt_s
        if not limited or full or queue or now.at_s < self._not_before or self.streams >= self._most:
            return []
        return self._add(now, goodput)

    def _add(self, now: Sample, goodput: float) -> list[Change]:
        self._before = (self.streams, goodput)
        self._settling = True
        self.streams = min(self._most, self.streams + max(1, self.streams // 2))
        return [
            Change(
                now.at_s,
                "streams",
                self.streams,
                f"the network is the limit at {format_rate(goodput)}: try more",
            )
        ]

    @staticmethod
    def _is_bad_line(begin: Sample, end: Sample) -> bool:
        """Whether single losses, not a full queue or the receiver, bound the streams between two samples.

        Then the rate of every stream sinks from its first burst to what the losses leave it, and a comparison with an
        earlier rate says little about the number of streams.
        """
        resent = (end.resent_segments - begin.resent_segments) / max(
            1, end.sent_segments - begin.sent_segments
        )
        waited = (
            (end.receiver_limited_s - begin.receiver_limited_s)
            / (end.at_s - begin.at_s)
            / max(1, end.streams)
        )
        return 0.0003 < resent < _MUCH_RESENT and end.rtt_s < _QUEUE_FREE * end.min_rtt_s and waited < 0.2

    def _judge(self, now: Sample, goodput: float, *, bad_line: bool) -> list[Change]:
        assert self._before is not None
        count, before = self._before
        self._before = None
        if goodput >= before * _WORTH or (bad_line and goodput >= _MUCH_LESS * before):
            self._hold_s = _FIRST_HOLD_S
            return []  # kept; the next epoch may add more
        self._not_before = now.at_s + self._hold_s
        self._level = max(goodput, before)
        self._hold_s = min(self._hold_s * 2, _LAST_HOLD_S)
        gave = f"{self.streams} streams gave {format_rate(goodput)}, {count} gave {format_rate(before)}"
        self.streams = count
        self._settling = True
        return [Change(now.at_s, "streams", count, gave)]
