"""Walks along an old file beside the new one: reads each chunk where it should be, and finds the way again after an edit.

Goal
    What both versions have is read, hashed and written once, without cutting the old file.
Plan
    As long as nothing was inserted or taken out, a chunk of the new version lies in the old file at its own offset
    plus a *shift*. Where one does not, some chunks behind it are tried with the same shift, since what was overwritten
    moves nothing; what stands between may have moved even so, where one edit makes up for another, and is searched
    first. Else a window of the old file, from where the last one ended, is cut as the new version was; the first chunk
    found there gives the next shift.
Invariants
    - Every chunk that is taken was hashed in the buffer that it is written from.
    - A window begins at a cut of the old file, because the chunk before it ends there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from flowengine.chunking import CHUNK_BYTES, Cutter, Profile, chunk_id, right_chunks
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.units import MIB

__all__ = ["Follower"]

_WINDOWS: Final = (MIB, 8 * MIB)
"""Looked at after an edit: first so much, and if that is in vain, so much."""
_LOST_BYTES: Final = 16 * MIB
_AHEAD: Final = (2, 4, 8, 16)
"""Chunks behind an edit that are tried where they would be had it moved nothing: a thousandth of a window's bytes each."""

Write = Callable[[int, int, Buffer, memoryview], None]
"""(first chunk, end, buffer, the chunks' bytes in it)"""


class Follower:
    """An old file that a large object is compared with as it is offered. Owns the descriptor. For use by one thread.

    Args:
        fd: of the file, open for reading.
        elsewhere: the file has another name than the object.
        pool: buffers to read into.

    Attributes:
        found: something was found in it.
    """

    def __init__(self, fd: int, profile: Profile, pool: BufferPool, *, elsewhere: bool) -> None:
        self.fd = fd
        self.size_bytes = os.fstat(fd).st_size
        self.elsewhere = elsewhere
        self.found = False
        self._pool = pool
        self._cutter = Cutter(profile)
        self._maximum = profile.maximum
        self._shift = 0
        self._end = 0
        self._lost_bytes = 0
        self._window: tuple[int, int] = (-1, 0)
        self._cuts: dict[bytes, int] = {}

    @property
    def lost(self) -> bool:
        """Whether nothing was found for so long that the whole file had better be searched."""
        return self._lost_bytes > _LOST_BYTES

    def take(
        self, offsets: list[int], lengths: list[int], packed: bytes, skip: set[int], write: Write
    ) -> list[int]:
        """Have what the old file has written; gives the place of each chunk in it, -1 for those that it has not.

        Args:
            offsets: of the chunks in the new version.
            packed: the chunks.
            skip: chunks that are there already.
            write: called with what was read and is right; it takes its own hold on the buffer.
        """
        places = [-1] * len(lengths)
        index = 0
        again = bool(self._lost_bytes)
        if again:
            index = self._find_again(index, offsets, lengths, packed)
        while index < len(lengths):
            end, size = index, 0
            while end < len(lengths) and size + lengths[end] <= self._pool.size_bytes:
                size += lengths[end]
                end += 1
            buffer = self._pool.acquire()
            try:
                stop = self._compare(index, end, size, offsets, lengths, packed, skip, buffer, places, write)
            finally:
                buffer.release()
            if stop > index:
                self.found = True
                self._end = offsets[stop - 1] + lengths[stop - 1] + self._shift
            elif again:  # it was there when the window was cut: somebody writes to the file
                self._window, self._lost_bytes = (-1, 0), _LOST_BYTES
                break
            again = stop < end
            index = stop
            if again:
                # So it is where something was found before; one that begins in the middle has nothing yet.
                self._end = offsets[stop] + self._shift
                index = self._behind(stop, offsets, lengths, packed)
                if index < 0:
                    index = self._find_again(stop, offsets, lengths, packed)
                elif index - stop > 1:
                    self._cut(offsets[index] + self._shift - self._end)
                    index = self._find_cut(stop, index, offsets, packed)
        return places

    def _behind(self, stop: int, offsets: list[int], lengths: list[int], packed: bytes) -> int:
        """The first chunk behind an edit that lies where it would without it; -1 where none of those tried does."""
        for ahead in _AHEAD:
            at = stop + ahead
            if at >= len(lengths):
                break
            if self._is_there(at, offsets, lengths, packed):
                while at - 1 > stop and self._is_there(at - 1, offsets, lengths, packed):
                    at -= 1
                return at
        return -1

    def _is_there(self, index: int, offsets: list[int], lengths: list[int], packed: bytes) -> bool:
        place = offsets[index] + self._shift
        if place < 0:
            return False
        try:
            data = os.pread(self.fd, lengths[index], place)
        except OSError:
            return False
        return chunk_id(data) == packed[index * CHUNK_BYTES + 4 : (index + 1) * CHUNK_BYTES]

    def _compare(
        self,
        first: int,
        end: int,
        size: int,
        offsets: list[int],
        lengths: list[int],
        packed: bytes,
        skip: set[int],
        buffer: Buffer,
        places: list[int],
        write: Write,
    ) -> int:
        """Read the chunks from `first` to `end` where they should be; gives the first that is not there, or `end`."""
        start = offsets[first]
        got = 0
        if start + self._shift >= 0:
            try:
                got = os.preadv(self.fd, [buffer.view[:size]], start + self._shift)
            except OSError:
                got = 0
        at, stop = 0, first
        while stop < end:
            if stop in skip:
                at += lengths[stop]
                stop += 1
                continue
            until = next((index for index in range(stop, end) if index in skip), end)
            there = right_chunks(buffer.view[at:got], packed[stop * CHUNK_BYTES : until * CHUNK_BYTES])
            right = stop + there
            size = sum(lengths[stop:right])
            if there:
                places[stop:right] = [offset + self._shift for offset in offsets[stop:right]]
                write(stop, right, buffer, buffer.view[at : at + size])
            at += size
            stop = right
            if right < until:
                break
        return stop

    def _find_again(self, index: int, offsets: list[int], lengths: list[int], packed: bytes) -> int:
        """The first chunk from `index` on that the old file has a little further on; the number of chunks for none."""
        for window in _WINDOWS:
            if (self._end, window) != self._window:
                self._cut(window)
            at = self._find_cut(index, len(lengths), offsets, packed)
            if at < len(lengths):
                self._lost_bytes = 0
                return at
        self._lost_bytes += max(1, sum(lengths[index:]))
        return len(lengths)

    def _find_cut(self, first: int, end: int, offsets: list[int], packed: bytes) -> int:
        """The first of the chunks from `first` to `end` that the window has, and the shift is its own; `end` for none."""
        for at in range(first, end):
            place = self._cuts.get(packed[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES])
            if place is not None:
                self._shift = place - offsets[at]
                return at
        return end

    def _cut(self, window: int) -> None:
        """Cut a window of the old file from where the last chunk that was found ended."""
        self._window = (self._end, window)
        self._cuts = {}
        try:
            data = memoryview(os.pread(self.fd, window + self._maximum, self._end))
        except OSError:
            return
        packed = self._cutter.packed(data)
        if self._end + len(data) < self.size_bytes:
            packed = packed[:-CHUNK_BYTES]  # it ends with the window, not necessarily with a cut
        at = self._end
        for start in range(0, len(packed), CHUNK_BYTES):
            one = packed[start : start + CHUNK_BYTES]
            self._cuts.setdefault(one, at)
            at += int.from_bytes(one[:4], "little")

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)
