"""Bytes on their way from a file to a buffer, cut and named while the processor's cache holds them.

Goal
    The interpreter is passed once for a megabyte: not for each chunk, and not for each of reading, cutting and hashing.
Plan
    `_read.c` does the three in steps of 256 KiB, and goes on looking for a cut where it stopped. Without the library, or
    where it is not to be relied on, the same is done by Python in steps of what it is asked for.
Invariants
    - The chunks are those of the object, whatever the steps are: what ends with a step only is no chunk.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Final

from flowengine.chunking.cutting import best_cut_way
from flowengine.chunking.hashing import CHUNK_BYTES, best_hash_way, ids_of, pack_ids
from flowengine.chunking.library import LIBRARY, Data, Rule, State, place_of
from flowengine.compiled import Scratch

__all__ = ["Filling", "pack_address", "pack_many", "packed_chunks", "rule_for"]

_SHORT: Final = -1_000_000


def rule_for(sizes: tuple[int, int, int]) -> Rule | None:
    """What the library needs to know to cut and name; None where Python is to do it.

    Args:
        sizes: least length, length from which cuts are likelier, greatest length, in bytes.
    """
    if LIBRARY is None or best_hash_way() < 0:
        return None
    return Rule(*sizes, best_cut_way(), best_hash_way())


def packed_chunks(rule: Rule, data: Data, id_bytes: int) -> bytes:
    """The packed chunks of bytes whose start counts as a cut and whose end ends the last chunk."""
    assert LIBRARY is not None
    with place_of(data) as (place, size):
        room = size // rule.minimum + 1
        packed = ctypes.create_string_buffer((4 + id_bytes) * room)
        count = LIBRARY.flow_pack(ctypes.byref(rule), place, size, id_bytes, packed, room)
    if count < 0:
        raise MemoryError
    return ctypes.string_at(packed, (4 + id_bytes) * count)


def pack_many(
    rule: Rule, data: Data, sizes: bytes, stride: int, objects: int, scratch: Scratch
) -> tuple[bytes, bytes]:
    """How many chunks each of some objects has, as native int64, and their packed chunks.

    Args:
        data: the objects, one behind the other.
        sizes: of them in bytes, as native int64 that begin `stride` bytes from one to the next.
    """
    assert LIBRARY is not None
    with place_of(data) as (place, size):
        room = size // rule.minimum + objects
        counts = scratch.room(8 * objects + CHUNK_BYTES * room)
        packed = counts + 8 * objects
        chunks = LIBRARY.flow_pack_many(
            ctypes.byref(rule), place, sizes, stride, objects, counts, packed, room
        )
    if chunks < 0:
        raise MemoryError
    return ctypes.string_at(counts, 8 * objects), ctypes.string_at(packed, CHUNK_BYTES * chunks)


@cache
def pack_address() -> int:
    """Where the library has the function that `pack_many` calls."""
    assert LIBRARY is not None
    return ctypes.cast(LIBRARY.flow_pack_many, ctypes.c_void_p).value or 0


class Filling:
    """A buffer that is filled from a file, step by step.

    Attributes:
        filled: how many bytes it holds.
        cut: how many of them, from the first on, were given as chunks.
    """

    __slots__ = ("_lengths", "_rule", "_state", "_view", "cut", "filled")

    def __init__(
        self,
        rule: Rule | None,
        lengths: Callable[[Data], list[int]],
        view: memoryview,
        filled: int,
    ) -> None:
        self._rule = rule
        self._lengths = lengths
        self._view = view
        self._state = State(filled, 0, 0)
        self.filled = filled
        self.cut = 0

    def fill(self, fd: int, offset: int, until: int, *, ends: bool) -> bytes:
        """Fill it up to `until` from `offset` of a file on, and give the chunks that are whole now, packed.

        Args:
            ends: the object ends at `until`; else a chunk that ends there may go on.

        Raises:
            EOFError: the file ends before that.
            OSError: as the file system says.
            ValueError: the buffer is shorter than that.
        """
        if until > len(self._view):
            raise ValueError(f"a buffer of {len(self._view)} bytes was to be filled up to {until}")
        if self._rule is None:
            return self._fill_plainly(fd, offset, until, ends)
        assert LIBRARY is not None
        room = (until - self.cut) // self._rule.minimum + 1
        packed = ctypes.create_string_buffer(CHUNK_BYTES * room)
        with place_of(self._view) as (place, _):
            count = LIBRARY.flow_read_chunks(
                fd,
                offset,
                ctypes.byref(self._rule),
                place,
                ctypes.byref(self._state),
                until,
                ends,
                packed,
                room,
            )
        self.filled, self.cut = self._state.filled, self._state.cut
        if count < 0:
            if count == _SHORT:
                raise EOFError
            raise OSError(-count, os.strerror(-count))
        return ctypes.string_at(packed, CHUNK_BYTES * count)

    def _fill_plainly(self, fd: int, offset: int, until: int, ends: bool) -> bytes:
        while self.filled < until:
            got = os.preadv(fd, [self._view[self.filled : until]], offset)
            if not got:
                raise EOFError
            self.filled += got
            offset += got
        data = self._view[self.cut : until]
        lengths = self._lengths(data)
        if lengths and not ends:
            lengths.pop()
        ids = ids_of(data, lengths)
        self.cut += sum(lengths)
        return pack_ids(lengths, ids)
