"""The cuts of a run of bytes, found by a compiled library or by numpy.

Goal
    Cutting costs less than reading: what a chunk costs is its hash.
Plan
    docs/spec/chunking.md is the rule: whether a place is a cut depends on the 68 bytes before it alone, so that many
    places are looked at with one instruction. A library of C (`_cut.c`), which the build compiles where it can, is
    called by ctypes, which lets the interpreter go; where it is missing, numpy does the same, many times slower.
Invariants
    - Both ways, and all ways of the library for the processors there are, give the same cuts.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from flowengine.chunking.library import CUT_WAYS, LIBRARY, Data, place_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["REACH_BYTES", "best_cut_way", "first_lengths", "is_compiled", "ways"]

REACH_BYTES: Final = 68
"""What stands before a place and decides of it; no chunk but the last of a run is shorter."""

_FACTOR: Final = 0xC2B2AE3D
_TOP: Final = 0x7F
_WEIGHTS: Final = (
    0x2D6F229983014235,
    0x090D291710313F75,
    0x7D229E818260C9C5,
    0xBF0954F20935B08F,
    0xBE67DC22FEEAAE37,
    0xDC9E7789942464BF,
    0x0AFB66CD3435FAD9,
    0x53FD2C313C017EC7,
)
_RARE: Final = 1 << 39
_OFTEN: Final = 1 << 41
_WINDOW: Final = 64
_PLAIN: Final = -1
"""The way without the library, beside its own, which are counted from 0."""
_BLOCK_BYTES: Final = 1 << 18  # what numpy makes of it stays in a processor's cache


_best = CUT_WAYS - 1


def best_cut_way() -> int:
    """The quickest of `ways`."""
    return _best


def is_compiled() -> bool:
    """Whether the compiled library is in use."""
    return LIBRARY is not None


def ways() -> list[int]:
    """The ways that this machine has, all with the same cuts; the last is the quickest."""
    return [*range(_PLAIN, _best + 1)]


def first_lengths(
    data: Data,
    sizes: tuple[int, int, int],
    most: int,
    way: int | None = None,
) -> list[int]:
    """The lengths of the first chunks of bytes whose start counts as a cut and whose end ends the last chunk.

    Args:
        data: contiguous bytes.
        sizes: least length, length from which cuts are likelier, greatest length, in bytes; the least at least
            `REACH_BYTES`, the second at least 512.
        most: not more chunks than this.
        way: one of `ways`; by default the quickest.
    """
    if LIBRARY is None or way == _PLAIN:
        return _plain(data, sizes, most)
    with place_of(data) as (place, size):
        room = min(most, size // sizes[0] + 1)
        lengths = (ctypes.c_uint32 * room)()
        count = LIBRARY.flow_cut(place, size, *sizes, _best if way is None else way, lengths, room)
    return list(lengths[:count])


def _plain(data: Data, sizes: tuple[int, int, int], most: int) -> list[int]:
    minimum, average, maximum = sizes
    size = len(data)
    lengths: list[int] = []
    if size > minimum:
        # Nothing behind the longest that the chunks asked for can be is looked at.
        places, weights = _candidates(data, min(size, most * maximum))
        rare, often = (places[weights < count // average].tolist() for count in (_RARE, _OFTEN))
    else:
        rare, often = [], []
    rare_at = often_at = start = 0
    while start < size and len(lengths) < most:
        while rare_at < len(rare) and rare[rare_at] < start + minimum:
            rare_at += 1
        while often_at < len(often) and often[often_at] < start + max(minimum, average):
            often_at += 1
        end = min(size, start + maximum)
        if rare_at < len(rare) and rare[rare_at] < start + average:
            end = min(end, rare[rare_at])
        elif often_at < len(often):
            end = min(end, often[often_at])
        lengths.append(end - start)
        start = end
    return lengths


def _candidates(data: Data, size: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Places in the first `size` bytes that may be cuts, and what each weighs."""
    import numpy as np  # takes a tenth of a second, and is needed without the library only

    every = np.frombuffer(data, dtype=np.uint8, count=size)
    windows = np.lib.stride_tricks.sliding_window_view(every, _WINDOW) if size >= _WINDOW else None
    factors = np.array(_WEIGHTS, dtype=np.uint64)
    places, weights = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
    for begin in range(REACH_BYTES, size, _BLOCK_BYTES):
        end = min(size, begin + _BLOCK_BYTES)
        found = []
        for phase in range(min(4, end - begin)):
            count = (end - begin - phase + 3) // 4  # places begin + phase, and each fourth behind it
            at = begin + phase - REACH_BYTES
            words = np.frombuffer(every[at : at + 4 * (count + 16)], dtype="<u4")
            near, middle, far = words[-count:], words[-count - 8 : -8], words[-count - 16 : -16]
            total = near + (middle << 8 | middle >> 24) + (far << 16 | far >> 16)
            found.append(np.flatnonzero(total * np.uint32(_FACTOR) >> 24 == _TOP) * 4 + begin + phase)
        here = np.sort(np.concatenate(found))
        if len(here):
            assert windows is not None
            sums = (windows[here - _WINDOW].copy().view("<u8") * factors).sum(axis=1, dtype=np.uint64)
            places.append(here)
            weights.append(sums >> np.uint64(32))
    return np.concatenate(places), np.concatenate(weights)
