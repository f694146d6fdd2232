"""How much goes at once: the size of units and of full frames, by what a stream carries.

Goal
    A large step costs both ends least: each has its price in the interpreter and in the kernel, whatever it holds. A small
    one is received sooner: what is only partly there is worth nothing when a connection breaks, and holds credit.
Plan
    A unit, and a full frame, is what one stream carries in 80 ms, by what was acknowledged lately, and at most a quarter of
    its share of the credit window: 1, 2 or 4 MiB.
    Numbers and roads not taken: docs/design/adr/0058-units-grow-with-the-rate.md.
"""

from __future__ import annotations

from typing import Final

from flowengine.units import MIB
from flowengine.wire.frames import OVERHEAD_BYTES
from flowengine.wire.records import MAX_UNIT_BYTES

__all__ = ["LEAST_UNIT_BYTES", "UnitSize"]

LEAST_UNIT_BYTES: Final = MIB
_STEP_S: Final = 0.08
_SHARE: Final = 4
"""Units of each stream that fit the credit window where they are more than the least, or streams would stand waiting for what
others have half sent."""
_LOOK_NS: Final = 100_000_000


class UnitSize:
    """What holds now for all lanes of a session. Set by the event loop, read by any thread.

    Attributes:
        unit_bytes: of plaintext, at which a unit is closed: from 1 MiB to `MAX_UNIT_BYTES`, a power of two. It follows what was
            acknowledged, which is counted as it travels: what is compressed well gets smaller units than it could.
    """

    def __init__(self) -> None:
        self.unit_bytes = LEAST_UNIT_BYTES
        self._since_ns: int | None = None
        self._received = 0

    @property
    def payload_bytes(self) -> int:
        """Of a full frame, which is as large as a unit."""
        return self.unit_bytes - OVERHEAD_BYTES

    def received(self, size_bytes: int, streams: int, window_bytes: int, now_ns: int) -> None:
        """Bytes were acknowledged.

        Args:
            size_bytes: how many since the last time.
            streams: that carry now.
            window_bytes: of credit, for all of them.
            now_ns: of a clock that only goes forward.
        """
        if self._since_ns is None:  # what came before the first is not known
            self._since_ns = now_ns
            return
        self._received += size_bytes
        passed_ns = now_ns - self._since_ns
        if passed_ns < _LOOK_NS:
            return
        carried = self._received / (passed_ns / 1e9) * _STEP_S
        step = min(carried, window_bytes / _SHARE) / max(1, streams)
        self._since_ns, self._received = now_ns, 0
        unit = LEAST_UNIT_BYTES
        while unit < MAX_UNIT_BYTES and step >= 2 * unit:
            unit *= 2
        self.unit_bytes = unit
