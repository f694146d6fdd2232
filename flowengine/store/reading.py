"""Reads an object once: cut and hashed in the pass that reads it, in reused buffers.

Goal
    One read of the bytes gives chunk lengths, chunk ids and the bytes themselves, at memory speed, on as many
    threads as the host can spare, with boundaries that equal those of one thread.
Plan
    One thread: buffers are filled in steps that stay in cache; what is left behind the last sure cut moves to the
    front of the next buffer. Several threads: each takes a segment as if it began with a cut, plus one maximum chunk
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from flowengine.chunking import CHUNK_BYTES, Cutter, Profile, chunk_id, pack_chunks, zero_chunk_id
from flowengine.errors import FlowError
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.units import MIB

__all__ = ["SEGMENT_BYTES", "ObjectChanged", "ObjectReader", "Piece"]

SEGMENT_BYTES: Final = 8 * MIB
"""Bytes that one thread cuts at a time, and how much a buffer carries beyond its carry-over."""

_STEP_BYTES: Final = MIB
"""Read this much, then cut and hash it while it is in the cache."""


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
    """

    def __init__(
        self,
        profile: Profile,
        pool: BufferPool,
        threads: int = 1,
        pace: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        assert pool.size_bytes >= SEGMENT_BYTES + profile.maximum
        self.profile = profile
        self.pace = pace
        self._pool = pool
        self._cutter = Cutter(profile)
        self._threads = threads
        self._workers = ThreadPoolExecutor(threads, "flow-read") if threads > 1 else None

    def close(self) -> None:
        """End the worker threads; pieces already given stay valid."""
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)

    def pieces(self, fd: int, size_bytes: int, *, sparse: bool = False, offset: int = 0) -> Iterator[Piece]:
        """The object's pieces in order, reading from `offset`, which must be a cut.

        Blocks while the pool is empty. Closing the iterator early releases what it holds.

        Raises:
            ObjectChanged: the object is shorter than `size_bytes`.
            OSError: as the file system says.
        """
        if self._workers is not None and size_bytes - offset > SEGMENT_BYTES and not sparse:
            return self._pieces_threaded(fd, size_bytes, offset)
        return self._pieces_sequential(fd, size_bytes, offset, sparse)

    def _pieces_sequential(self, fd: int, size_bytes: int, offset: int, sparse: bool) -> Iterator[Piece]:
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
        view = buffer.view
        room = min(len(view), filled + SEGMENT_BYTES)
        lengths: list[int] = []
        ids: list[bytes] = []
        cut = 0
        while True:
            want = min(_STEP_BYTES, room - filled, size_bytes - position - filled)
            if want:
                self._read(fd, view[filled : filled + want], position + filled, size_bytes)
                filled += want
            at_end = position + filled >= size_bytes
            found = self._cutter.lengths(view[cut:filled])
            if not at_end:
                found.pop()  # it ends with the buffer, not necessarily with a cut
            for length in found:
                ids.append(chunk_id(view[cut : cut + length]))
                cut += length
            lengths += found
            if at_end or filled >= room:
                break
        return Piece(position, lengths, pack_chunks(zip(lengths, ids, strict=True)), buffer, 0), filled

    def _read(self, fd: int, view: memoryview, offset: int, size_bytes: int) -> None:
        done = 0
        self.pace(len(view))
        while done < len(view):
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                raise ObjectChanged(
                    f"expected {size_bytes} bytes, the object now ends at {offset + done}",
                    hint="it is being written to; it is read again, and reported when it goes on changing",
                )
            done += got

    def _pieces_threaded(self, fd: int, size_bytes: int, offset: int) -> Iterator[Piece]:
        assert self._workers is not None
        ahead: deque[tuple[int, Buffer, Future[tuple[list[int], list[bytes]]]]] = deque()
        position = offset
        start = offset
        # Workers beyond half the pool would starve the consumers of the pieces in front of them.
        depth = max(1, min(self._threads + 1, self._pool.count // 2))
        cutter = self._cutter
        try:
            while position < size_bytes:
                while start < size_bytes and len(ahead) < depth:
                    buffer = self._pool.acquire()
                    ahead.append(
                        (start, buffer, self._workers.submit(self._segment, fd, size_bytes, buffer, start))
                    )
                    start += SEGMENT_BYTES
                begin, buffer, future = ahead[0]
                lengths, ids = future.result()
                piece = self._stitch(
                    begin,
                    min(begin + SEGMENT_BYTES, size_bytes),
                    size_bytes,
                    position,
                    buffer,
                    lengths,
                    ids,
                    cutter,
                )
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

    def _segment(self, fd: int, size_bytes: int, buffer: Buffer, start: int) -> tuple[list[int], list[bytes]]:
        """Chunks that begin in the segment, as if its start were a cut."""
        cutter = Cutter(self.profile)
        view = buffer.view
        end = min(start + SEGMENT_BYTES, size_bytes) - start
        limit = min(start + SEGMENT_BYTES + self.profile.maximum, size_bytes) - start
        lengths: list[int] = []
        ids: list[bytes] = []
        cut = filled = 0
        while cut < end:
            want = min(_STEP_BYTES, limit - filled)
            if want:
                self._read(fd, view[filled : filled + want], start + filled, size_bytes)
                filled += want
            found = cutter.lengths(view[cut:filled])
            if filled < limit:
                found.pop()
            for length in found:
                if cut >= end:
                    break
                lengths.append(length)
                ids.append(chunk_id(view[cut : cut + length]))
                cut += length
        if filled < limit:
            # The stitcher may need what follows the last cut when its own cuts run differently.
            self._read(fd, view[filled:limit], start + filled, size_bytes)
        return lengths, ids

    @staticmethod
    def _stitch(
        begin: int,
        end: int,
        size_bytes: int,
        position: int,
        buffer: Buffer,
        lengths: list[int],
        ids: list[bytes],
        cutter: Cutter,
    ) -> Piece:
        """The true chunks that begin in [position, end): cut anew up to the first shared cut, then the segment's own."""
        limit = min(end + cutter.profile.maximum, size_bytes) - begin
        where: dict[int, int] = {}
        at = 0
        for index, length in enumerate(lengths):
            where[at] = index
            at += length
        true_lengths: list[int] = []
        true_ids: list[bytes] = []
        cut = position - begin
        while begin + cut < end:
            shared = where.get(cut)
            if shared is not None:
                true_lengths += lengths[shared:]
                true_ids += ids[shared:]
                break
            length = cutter.first_length(buffer.view[cut : min(cut + cutter.profile.maximum, limit)])
            true_lengths.append(length)
            true_ids.append(chunk_id(buffer.view[cut : cut + length]))
            cut += length
        packed = pack_chunks(zip(true_lengths, true_ids, strict=True))
        assert len(packed) == CHUNK_BYTES * len(true_lengths)
        return Piece(position, true_lengths, packed, buffer, position - begin)
