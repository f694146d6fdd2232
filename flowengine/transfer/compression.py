"""None or which zstd level: by which of link and processors is the bottleneck now.

Goal
    Logical bytes per second. Compression pays while the link is slower than it, and must never be the bottleneck.
Plan
    What is compressed waits for the lanes in a backlog (`compressing.py`). While that is low the link is about to be
    idle, and the level below the chosen one is taken, unit by unit: so the two mix until processors and link are both
    full, which no single level achieves. What is reported becomes a judgement every half second: lanes that stand in
    send calls mean that the link is the limit, and what was sealed is what it carries; a backlog that stays low means
    that the level is too high: by processor time where there is enough of it, by the clock where others have the
    processors as well. A step is taken where the prediction, min(link x ratio, threads x speed), says that it gains.
"""

from __future__ import annotations

import threading
from typing import Final

from flowengine.units import format_rate

__all__ = ["CompressionChooser"]

_LEVELS: Final = (0, -3, 1, 3, 6)
_COST: Final = {-3: 0.62, 1: 1.0, 3: 2.0, 6: 5.0}
"""Processor time per byte, relative to level 1, on tables and text. Level -3 gives three tenths more bytes, and the other
end takes them apart a third faster; what the levels between the two give, a mix of both gives as well."""
_FIRST_BYTES: Final = 8 << 20
_FIRST_LEVEL: Final = 3
"""The first bytes are compressed whatever the link: nothing is known of it yet, it costs milliseconds, and where a
transfer moves little, as an update does, it is all there is."""
_FIRST_SPEED: Final = 400e6
"""Bytes per second and thread that level 1 is taken for until it was measured."""
_FIRST_RATIO: Final = 2.0
_FAST_LINK: Final = 450e6
_FAST_INSIDE: Final = 100e6
"""Inside one machine both ends have the same processors: what looks like a slow link is the other end at work, which
compressing would take them from. Only a rate that somebody asked for is below this."""
_LONG_RTT_S: Final = 0.002
_WINDOW_S: Final = 0.5
_LEAST_BYTES: Final = 2 << 20
_LINK_IS_LIMIT: Final = 0.4
_LINK_IS_IDLE: Final = 0.15
_BUSY: Final = 0.7
_STEADY: Final = 1.25
"""A rate that grew more since the last judgement is that of TCP finding its own: the link may carry much more."""
_LOW: Final = 0.25
"""Share of the backlog below which the link is about to be idle."""
_MOSTLY: Final = 0.8
_MOST_THREADS: Final = 16


class CompressionChooser:
    """Chooses for all lanes of a session; thread-safe.

    Args:
        rtt_s: of the link; a long one is worth compressing for until it was measured.
        fixed_level: what was asked for; None adapts.
        cores: processors of this side.

    Attributes:
        inside: whether all that is sent stays on this machine.
        threads: that are to compress: all processors but one, at least two: they must not crowd out the reader that
            feeds them.
        level: to compress with now; 0 is not at all.
        reason: why, in a few words.
    """

    def __init__(self, rtt_s: float, fixed_level: int | None = None, *, cores: int = 1) -> None:
        self._fixed = fixed_level is not None
        self.inside = False
        self._able = max(1, cores // 2)  # what may be counted on: the others read, hash, seal and send
        self.threads = min(_MOST_THREADS, max(2, cores - 1))
        self._lock = threading.Lock()
        self._began = 0.0
        self._sealed = self._tried = self._packed = self._eased = 0
        self._sending_s = self._compressing_s = self._standing_s = self._as_level_1_s = 0.0
        self._link = self._rate = 0.0
        self._first_bytes = _FIRST_BYTES
        self._speed = _FIRST_SPEED
        self._ratio = _FIRST_RATIO
        self.level = fixed_level if fixed_level is not None else 1 if rtt_s > _LONG_RTT_S else 0
        self.reason = "asked for" if self._fixed else "the link was not measured yet"

    def among_first(self, size_bytes: int) -> bool:
        """Whether so many bytes that are about to be sent are among the first."""
        if self._fixed or self.inside or self._first_bytes <= 0:
            return False
        self._first_bytes -= size_bytes
        return True

    def level_for(self, filled: float, *, first: bool = False) -> int:
        """The zstd level for what is about to be compressed; 0 for none.

        Args:
            filled: share of the backlog that waits for the link.
            first: it is `among_first`.
        """
        if first:
            return max(self.level, _FIRST_LEVEL)
        at = -1 if self._fixed else _LEVELS.index(self.level)
        return _LEVELS[at - 1] if at > 1 and filled < _LOW else self.level

    def compressed(
        self, raw_bytes: int, packed_bytes: int, seconds: float, level: int, wall_s: float = 0.0
    ) -> None:
        """A unit was compressed, or it was tried.

        Args:
            packed_bytes: `raw_bytes` where it did not get smaller.
            seconds: of processor time.
            wall_s: how long it took: longer than that where others have the processors.
        """
        with self._lock:
            self._tried += raw_bytes
            if level < self.level:
                self._eased += raw_bytes
            self._packed += packed_bytes
            self._compressing_s += seconds
            self._standing_s += wall_s
            self._as_level_1_s += seconds / _COST.get(level, _COST[6])

    def sent(self, sealed_bytes: int, seconds: float, now: float, lanes: int) -> None:
        """A lane stood so long in send calls for so many bytes.

        Args:
            now: a clock in seconds.
            lanes: how many share the link.
        """
        with self._lock:
            self._sealed += sealed_bytes
            self._sending_s += seconds
            if not self._began:
                self._began = now
            elapsed = now - self._began
            if elapsed < _WINDOW_S or self._sealed < _LEAST_BYTES:
                return
            if not self._fixed:
                self._judge(elapsed, self._sending_s / elapsed / max(1, lanes))
            self._began = now
            self._sealed = self._tried = self._packed = self._eased = 0
            self._sending_s = self._compressing_s = self._standing_s = self._as_level_1_s = 0.0

    def _judge(self, elapsed: float, sending: float) -> None:
        before, self._rate = self._rate, self._sealed / elapsed
        rate = self._rate
        limited = sending >= _LINK_IS_LIMIT
        steady = 0 < rate < _STEADY * before
        if limited:
            self._link = 0.5 * (self._link or rate) + 0.5 * rate
        else:
            self._link = max(self._link, rate)
        if self._tried and self._as_level_1_s > 0:
            measured = self._tried / self._as_level_1_s
            self._speed = 0.5 * self._speed + 0.5 * measured
            self._ratio = 0.5 * self._ratio + 0.5 * self._tried / max(1, self._packed)
        at = _LEVELS.index(self.level)
        full = max(self._compressing_s / self._able, self._standing_s / self.threads) / elapsed
        low = at == 1 or self._eased > _MOSTLY * self._tried
        if limited and steady and at + 1 < len(_LEVELS) and self._pays(_LEVELS[at + 1]):
            self._take(_LEVELS[at + 1], "and compressing is faster")
        elif at and sending < _LINK_IS_IDLE and full > _BUSY and low and self._hinders(at):
            self._take(_LEVELS[at - 1], "and compressing holds it up")

    def _pays(self, level: int) -> bool:
        """Whether the processors can compress so well as fast as the link takes it."""
        if self._link > (_FAST_INSIDE if self.inside else _FAST_LINK):
            return False
        able = self._able * self._speed / _COST[level]
        # Without compression at present, anything above the link's own rate is a gain.
        return able > self._link * (self._ratio if self.level else 1.2)

    def _hinders(self, at: int) -> bool:
        """Whether the next lower level would give more; only the link's rate, where known, speaks for none at all."""
        return at > 1 or self._link > self._able * self._speed

    def _take(self, level: int, why: str) -> None:
        self.level = level
        self.reason = f"zstd level {level}: the link carries {format_rate(self._link)}, {why}"
        if not level:
            self.reason = f"no compression: the link carries {format_rate(self._link)}, {why}"
