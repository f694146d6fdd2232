"""How long a copy takes beside what its links carry: learned from those that ended.

Goal
    A time that a user can rely on, for one large file as for many small ones.
Plan
    A task of n objects and s bytes takes a start, something for each object, and something for each byte, the larger of
    what its ends need for it and what its way carries. What ended at the same pair of sites tells the three numbers:
    least squares of relative errors, none of them negative, with outliers weighed down. Two forms are tried, one in which
    objects and bytes take turns and one in which they go on at once, and the better one is kept.
Invariants
    Equal observations give an equal pace; a pace never says that anything takes no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

import msgspec
import numpy as np

from flowengine.plan.network import FloatArray

__all__ = ["UNLEARNED", "Pace", "Seen", "expect_s", "learn"]

LEAST_START_S: Final = 0.02
ROUNDS: Final = 4
ENOUGH: Final = 4


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


def learn(seen: Sequence[Seen]) -> Pace:
    """The pace of tasks like these; `UNLEARNED` while there are too few."""
    usable = [one for one in seen if one.seconds > 0]
    if len(usable) < ENOUGH:
        return UNLEARNED
    best = min((_fitted(usable, at_once) for at_once in (False, True)), key=lambda pace: pace.spread)
    # Few observations fit any line well; that says little of the next one.
    doubt = 1.0 / (len(usable) - 2)
    return msgspec.structs.replace(best, spread=round(float(np.hypot(best.spread, 0.3 * doubt)), 4))


def _fitted(seen: Sequence[Seen], at_once: bool) -> Pace:
    seconds = np.array([one.seconds for one in seen])
    objects = np.array([float(one.objects) for one in seen])
    size = np.array([float(one.size_bytes) for one in seen])
    way = np.array([8 / one.rate_bits_per_s if one.rate_bits_per_s else 0.0 for one in seen])
    start, each, byte = LEAST_START_S, float(np.median(seconds / np.maximum(objects, 1))) / 2, 0.0
    weight = 1.0 / seconds
    for _ in range(ROUNDS * 2):
        held = way > byte
        bytes_take = np.maximum(way, byte) * size
        objects_take = each * objects
        by_objects = np.zeros(len(seen), dtype=bool) if not at_once else objects_take > bytes_take
        by_bytes = np.zeros(len(seen), dtype=bool) if not at_once else ~by_objects
        columns = np.stack(
            [
                np.ones(len(seen)),
                np.where(by_bytes, 0.0, objects),
                np.where(held | by_objects, 0.0, size),
            ],
            axis=1,
        )
        rest = seconds - np.where(held & ~by_objects, way * size, 0.0)
        start, each, byte = _least_squares(columns * weight[:, None], rest * weight)
        pace = Pace(start_s=max(start, LEAST_START_S), object_s=each, byte_s=byte, at_once=at_once)
        off = np.abs(_times(pace, objects, size, way) / seconds - 1)
        usual = max(float(np.median(off)), 0.01)
        weight = np.minimum(1.0, 2 * usual / np.maximum(off, 1e-9)) / seconds
    spread = 1.4826 * float(np.median(off))
    return msgspec.structs.replace(pace, spread=max(round(spread, 4), 0.02), seen=len(seen))


def _times(pace: Pace, objects: FloatArray, size: FloatArray, way: FloatArray) -> FloatArray:
    parts = pace.object_s * objects, np.maximum(way, pace.byte_s) * size
    taken = np.maximum(*parts) if pace.at_once else parts[0] + parts[1]
    return np.asarray(pace.start_s + taken, dtype=np.float64)


def _least_squares(columns: FloatArray, wanted: FloatArray) -> tuple[float, float, float]:
    """The best of three numbers none of which is negative: each choice of those above zero is tried."""
    found, least = np.zeros(3), float("inf")
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    for count in (3, 2, 1):
        for chosen in combinations(range(3), count):
            part = list(chosen)
            if not np.abs(columns[:, part]).max(axis=0).all():
                continue
            answer = np.linalg.lstsq(columns[:, part] / scale[part], wanted, rcond=None)[0] / scale[part]
            if (answer < 0).any():
                continue
            wrong = float(((columns[:, part] @ answer - wanted) ** 2).sum())
            if wrong < least * (1 - 1e-9):
                least = wrong
                found = np.zeros(3)
                found[part] = answer
    return float(found[0]), float(found[1]), float(found[2])
