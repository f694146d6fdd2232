"""How long a copy takes beside what its links carry: learned from those that ended.

Goal
    A time that a user can rely on, for one large file as for many small ones.
Plan
    A task of n objects and s bytes takes a start, something for each object, and something for each byte, the larger of
    what its ends need for it and what its way carries. What ended at the same pair of sites tells the three numbers: those
    with the least mean error, as factors, outliers counted up to a bound. They are searched on a grid that is drawn
    closer round the best point, because the error has many hollows. Two forms are tried, one in which objects and bytes take
    turns and one in which they go on at once, and the better one is kept. What observations do not tell stays near what
    is expected of anything: each number that is a factor of e away from that counts like a small error of one observation.
Invariants
    Equal observations give an equal pace; a pace never says that anything takes no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from flowengine.plan.network import FloatArray
from flowengine.plan.pace import UNLEARNED, Pace, Seen

__all__ = ["learn"]

LEAST_START_S: Final = 0.02
ROUNDS: Final = 6
OUTLIER: Final = 1.0
"""No observation counts as further off than by a factor of e: it may have waited for something else."""
STARTS: Final = np.geomspace(LEAST_START_S, 5.0, 13)
OBJECTS: Final = np.geomspace(1e-6, 3e-2, 18)
BYTES: Final = np.geomspace(1e-11, 1e-6, 18)
PRIOR_COUNTS: Final = 0.05
ENOUGH: Final = 4


def learn(seen: Sequence[Seen]) -> Pace:
    """The pace of tasks like these; `UNLEARNED` while there are too few."""
    usable = [one for one in seen if one.seconds > 0]
    if len(usable) < ENOUGH:
        return UNLEARNED
    best = min((_fitted(usable, at_once) for at_once in (False, True)), key=lambda found: found[0])[1]
    # Few observations fit any line well; that says little of the next one.
    doubt = 1.0 / (len(usable) - 2)
    return msgspec.structs.replace(best, spread=round(float(np.hypot(best.spread, 0.3 * doubt)), 4))


def _fitted(seen: Sequence[Seen], at_once: bool) -> tuple[float, Pace]:
    """The best of a grid that is drawn closer round the best point again and again, and how wrong it is."""
    seconds = np.array([one.seconds for one in seen])
    objects = np.array([float(one.objects) for one in seen])
    size = np.array([float(one.size_bytes) for one in seen])
    way = np.array([8 / one.rate_bits_per_s if one.rate_bits_per_s else 0.0 for one in seen])
    start, each, byte = STARTS, OBJECTS, BYTES
    step = 1.0
    for _ in range(ROUNDS):
        bytes_take = np.maximum(way, byte[:, None]) * size
        objects_take = each[:, None] * objects
        if at_once:
            rest = np.maximum(objects_take[:, None, :], bytes_take[None, :, :])
        else:
            rest = objects_take[:, None, :] + bytes_take[None, :, :]
        off = np.abs(np.log((start[:, None, None, None] + rest[None]) / seconds))
        wrong = np.minimum(off, OUTLIER).mean(axis=3)
        wrong += PRIOR_COUNTS / len(seen) * _strangeness(start, each, byte)
        best = np.unravel_index(int(np.argmin(wrong)), wrong.shape)
        found = float(start[best[0]]), float(each[best[1]]), float(byte[best[2]])
        step /= 3
        near = np.exp(np.arange(-3, 4) * step)
        start, each, byte = (value * near for value in found)
        start = np.maximum(start, LEAST_START_S)
    spread = 1.4826 * float(np.median(np.abs(_times(found, objects, size, way, at_once) / seconds - 1)))
    return float(wrong[best]), Pace(
        start_s=found[0],
        object_s=found[1],
        byte_s=found[2],
        at_once=at_once,
        spread=max(round(spread, 4), 0.02),
        seen=len(seen),
    )


def _strangeness(start: FloatArray, each: FloatArray, byte: FloatArray) -> FloatArray:
    """How far numbers are from those of anything, in factors of e, for every combination."""
    apart = (
        np.abs(np.log(value / usual))
        for value, usual in (
            (start, UNLEARNED.start_s),
            (each, UNLEARNED.object_s),
            (byte, UNLEARNED.byte_s),
        )
    )
    first, second, third = apart
    return np.asarray(first[:, None, None] + second[None, :, None] + third[None, None, :], dtype=np.float64)


def _times(
    found: tuple[float, float, float], objects: FloatArray, size: FloatArray, way: FloatArray, at_once: bool
) -> FloatArray:
    start, each, byte = found
    parts = each * objects, np.maximum(way, byte) * size
    return np.asarray(start + (np.maximum(*parts) if at_once else parts[0] + parts[1]), dtype=np.float64)
