"""How long a copy takes beside what its links carry: what is believed of it, and what follows (learned by `learning`)."""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["UNLEARNED", "Pace", "Seen", "expect_s"]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One task that ended: what moved, how long it took, and what its way was believed to carry (0: not known)."""

    objects: int
    size_bytes: int
    seconds: float
    rate_bits_per_s: float = 0.0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What a task takes.

    Attributes:
        start_s: before and behind everything.
        object_s: for each object.
        byte_s: for each byte, where the links would carry more.
        at_once: objects and bytes go on at the same time: the longer one counts.
        spread: relative standard deviation of the time.
        seen: tasks that it was learned from.
    """

    start_s: float = 0.15
    object_s: float = 3e-4
    byte_s: float = 2.5e-9
    at_once: bool = False
    spread: float = 0.5
    seen: int = 0


UNLEARNED: Final = Pace()


def expect_s(pace: Pace, objects: int, size_bytes: int, rate_bits_per_s: float | None) -> float:
    """Seconds that a task takes over a way with this rate; None or 0: as much as its ends can do.

    >>> round(expect_s(Pace(start_s=0.1, object_s=0, byte_s=1e-9), 1, 10**9, 8e8), 3)
    10.1
    """
    byte_s = max(pace.byte_s, 8 / rate_bits_per_s if rate_bits_per_s else 0.0)
    parts = pace.object_s * objects, byte_s * size_bytes
    return pace.start_s + (max(parts) if pace.at_once else sum(parts))
