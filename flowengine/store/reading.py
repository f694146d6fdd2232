"""Reads an object once: cut and hashed in the pass that reads it, in reused buffers.

Goal
    One read of the bytes gives chunk lengths, chunk ids and the bytes themselves, at memory speed, on as many
    threads as the host can spare, with boundaries that equal those of one thread.
Plan
    One thread: buffers are filled by one call each, in steps that stay in cache (`chunking.filling`); what is left behind
    the last sure cut moves to the front of the next buffer. Several threads: each takes a segment as if it began with a cut, plus one maximum chunk
    beyond its end; the segments are stitched in order at the first cut that both sides share.
Invariants
    - A chunk lies whole in one buffer.
    - A run of zeros that the file system reports as a hole is not read; it gives the chunks that reading would give.
    - Short reads (the object shrank) raise `ObjectChanged`; the caller compares `fstat` before and after for the rest.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Generator
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from flowengine.chunking import (
    CHUNK_BYTES,
    Cutter,
    Profile,
    chunk_id,
    lengths_of,
    pack_chunks,
    zero_chunk_id,
)
from flowengine.chunking.filling import Filling
from flowengine.errors import FlowError
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.store.page_cache import ReadTrail
from flowengine.units import MIB

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["PACED_STEP_BYTES", "SEGMENT_BYTES", "ObjectChanged", "ObjectReader", "Piece"]

SEGMENT_BYTES: Final = 8 * MIB
"""Bytes that one thread cuts at a time, and how much a buffer carries beyond its carry-over."""

_READAHEAD: Final = 3
"""Segments beyond those that are being read, in which the system may have begun to read already."""

PACED_STEP_BYTES: Final = MIB
"""Read this much at a time where reading is held to a rate."""


class ObjectChanged(FlowError):
    """The object changed while it was read; what was read of it must be forgotten."""

    reason = "changed"
    retryable = True


class Piece:
    """Consecutive chunks of one object.

    Attributes:
        offset: where the first chunk begins in the object.
        lengths: the chunks' lengths in bytes.
        packed: the packed chunk list.
        buffer: holds the bytes (one holder, to be released by who consumes the piece), None for a hole.
        start: where the first chunk begins in the buffer; chunks are contiguous there.
    """

    __slots__ = ("buffer", "lengths", "offset", "packed", "start")

    def __init__(
        self, offset: int, lengths: list[int], packed: bytes, buffer: Buffer | None, start: int
    ) -> None:
        self.offset = offset
        self.lengths = lengths
        self.packed = packed
        self.buffer = buffer
        self.start = start

    @property
    def size_bytes(self) -> int:
        """Sum of the chunks' lengths."""
        return sum(self.lengths)


def _workers(threads: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # takes time to load, and small objects need none

    return ThreadPoolExecutor(threads, "flow-read")


def hole_end(fd: int, offset: int, size_bytes: int) -> int:
    """Where the hole at `offset` ends; `offset` itself where there is data or the file system cannot tell."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data up to the end
            return size_bytes
        return offset


class ObjectReader:
    """Cuts and hashes objects of one profile into pieces; owns its worker threads.

    Args:
        profile: chunking profile.
        pool: buffers of at least `SEGMENT_BYTES` + the profile's maximum.
        threads: threads that read, cut and hash one object at once; 1 works in the caller's thread alone.
        pace: called with the bytes that are about to be read, by each thread that reads; returns when they may be.
        paced: whether that may wait now; what is read goes by smaller steps then.
    """

    def __init__(
        self,
        profile: Profile,
        pool: BufferPool,
        threads: int = 1,
        pace: Callable[[int], None] = lambda size_bytes: None,
        paced: Callable[[], bool] = lambda: False,
    ) -> None:
        assert pool.size_bytes >= SEGMENT_BYTES + profile.maximum
        self.profile = profile
        self.pace = pace
        self._paced = paced
        self._pool = pool
        self._cutter = Cutter(profile)
        self._threads = threads
        # Workers beyond half the pool would starve the consumers of the pieces in front of them.
        self._depth = max(1, min(threads + 1, pool.count // 2))
        self._workers: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the worker threads; pieces already given stay valid."""
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)

    def pieces(
        self, fd: int, size_bytes: int, *, sparse: bool = False, offset: int = 0
    ) -> Generator[Piece, None, None]:
        """The object's pieces in order, reading from `offset`, which must be a cut.

        Blocks while the pool is empty. Closing the iterator early releases what it holds.

        Raises:
            ObjectChanged: the object is shorter than `size_bytes`.
            OSError: as the file system says.
        """
        ahead = 1
        if self._threads > 1 and size_bytes - offset > SEGMENT_BYTES and not sparse:
            self._workers = self._workers or _workers(self._threads)
            pieces = self._pieces_threaded(fd, size_bytes, offset)
            ahead = self._depth
        else:
            pieces = self._pieces_sequential(fd, size_bytes, offset, sparse)
        trail = ReadTrail(fd, size_bytes, offset, ahead_bytes=(ahead + _READAHEAD) * SEGMENT_BYTES)
        try:
            trail.reached(offset)
            for piece in pieces:
                if piece.buffer is None:
                    trail.skip(piece.offset + piece.size_bytes)
                else:
                    trail.reached(piece.offset)
                yield piece
        finally:
            pieces.close()
            trail.end()

    def _pieces_sequential(
        self, fd: int, size_bytes: int, offset: int, sparse: bool
    ) -> Generator[Piece, None, None]:
        maximum = self.profile.maximum
        zero = pack_chunks([(maximum, zero_chunk_id(maximum))]) if sparse else b""
        carry: memoryview | None = None
        carrier: Buffer | None = None
        position = offset  # object offset of the next cut
        buffer: Buffer | None = None
        try:
            while position < size_bytes:
                if sparse and carry is None:
                    holes = (hole_end(fd, position, size_bytes) - position) // maximum
                    while holes > 0:
                        count = min(holes, 1024)
                        yield Piece(position, [maximum] * count, zero * count, None, 0)
                        holes -= count
                        position += count * maximum
                    if position >= size_bytes:
                        break
                buffer = self._pool.acquire()
                filled = 0
                if carry is not None:
                    filled = len(carry)
                    buffer.view[:filled] = carry
                    carry = None
                if carrier is not None:
                    carrier.release()
                    carrier = None
                piece, filled = self._fill(fd, size_bytes, buffer, position, filled)
                done = position + piece.size_bytes
                leftover = filled - (done - position)
                # With holes ahead it is cheaper to read the leftover again than to carry it past a check.
                if leftover and done < size_bytes and not sparse:
                    carry = buffer.view[filled - leftover : filled]
                    carrier = buffer
                    buffer.hold()
                position = done
                buffer = None
                yield piece
        finally:
            if buffer is not None:
                buffer.release()
            if carrier is not None:
                carrier.release()

    def _fill(
        self, fd: int, size_bytes: int, buffer: Buffer, position: int, filled: int
    ) -> tuple[Piece, int]:
        """Read, cut and hash until the buffer is full or the object ends: (piece, bytes in the buffer)."""
        room = min(len(buffer.view), filled + SEGMENT_BYTES, size_bytes - position)
        filling = self._cutter.filling(buffer.view, filled)
        packed = self._go_on(filling, fd, position, room, size_bytes)
        return Piece(position, lengths_of(packed), packed, buffer, 0), room

    def _go_on(self, filling: Filling, fd: int, start: int, until: int, size_bytes: int) -> bytes:
        """Fill a buffer that begins at `start` of the object up to `until`, step by step; gives the chunks packed."""
        packed = []
        while True:
            # The library goes on in steps that the cache holds: each way back to here costs some 30 us of a cold interpreter.
            step = min(PACED_STEP_BYTES, until - filling.filled) if self._paced() else until - filling.filled
            self.pace(step)
            end = filling.filled + step
            try:
                packed.append(filling.fill(fd, start + filling.filled, end, ends=start + end >= size_bytes))
            except EOFError:
                raise ObjectChanged(
                    f"expected {size_bytes} bytes, the object now ends at {start + filling.filled}",
                    hint="it is being written to; it is read again, and reported when it goes on changing",
                ) from None
            if end >= until:
                return b"".join(packed)

    def _pieces_threaded(self, fd: int, size_bytes: int, offset: int) -> Generator[Piece, None, None]:
        assert self._workers is not None
        ahead: deque[tuple[int, Buffer, Future[bytes]]] = deque()
        position = offset
        start = offset
        cutter = self._cutter
        try:
            while position < size_bytes:
                while start < size_bytes and len(ahead) < self._depth:
                    buffer = self._pool.acquire()
                    ahead.append(
                        (start, buffer, self._workers.submit(self._segment, fd, size_bytes, buffer, start))
                    )
                    start += SEGMENT_BYTES
                begin, buffer, future = ahead[0]
                end = min(begin + SEGMENT_BYTES, size_bytes)
                piece = self._stitch(begin, end, size_bytes, position, buffer, future.result(), cutter)
                ahead.popleft()
                position += piece.size_bytes
                if piece.lengths:
                    yield piece
                else:
                    buffer.release()
        finally:
            for _, buffer, future in ahead:
                if not future.cancel():
                    future.exception()  # wait: the thread writes into the buffer
                buffer.release()

    def _segment(self, fd: int, size_bytes: int, buffer: Buffer, start: int) -> bytes:
        """Chunks that begin in the segment, as if its start were a cut."""
        end = min(SEGMENT_BYTES, size_bytes - start)
        # The stitcher may need what follows the last cut when its own cuts run differently.
        limit = min(end + self.profile.maximum, size_bytes - start)
        filling = self._cutter.filling(buffer.view)
        packed = self._go_on(filling, fd, start, end, size_bytes)
        if limit > end:
            begun = filling.cut
            rest = self._go_on(filling, fd, start, limit, size_bytes)
            if begun < end:
                packed += rest[:CHUNK_BYTES]
        return packed

    @staticmethod
    def _stitch(
        begin: int, end: int, size_bytes: int, position: int, buffer: Buffer, packed: bytes, cutter: Cutter
    ) -> Piece:
        """The true chunks that begin in [position, end): cut anew up to the first shared cut, then the segment's own."""
        limit = min(end + cutter.profile.maximum, size_bytes) - begin
        where = {at: index for index, at in enumerate(accumulate(lengths_of(packed)[:-1], initial=0))}
        true: list[bytes] = []
        cut = position - begin
        while begin + cut < end:
            shared = where.get(cut)
            if shared is not None:
                true.append(packed[shared * CHUNK_BYTES :])
                break
            length = cutter.first_length(buffer.view[cut : min(cut + cutter.profile.maximum, limit)])
            true.append(pack_chunks([(length, chunk_id(buffer.view[cut : cut + length]))]))
            cut += length
        joined = b"".join(true)
        return Piece(position, lengths_of(joined), joined, buffer, position - begin)
