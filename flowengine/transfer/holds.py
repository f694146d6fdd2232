"""What the source has offered and not yet been asked about: the chunks' bytes, or where to read them again.

A hold belongs to one offer. When the answer comes, the wanted runs become parts of units; the rest is let go.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate

from flowengine.chunking import CHUNK_BYTES, are_chunks
from flowengine.chunking.fine import FINE_BYTES, FINE_ID_BYTES, FineCutter, fine_lengths
from flowengine.manifest import Block, join_columns
from flowengine.store.buffers import Buffer
from flowengine.store.filesystem import READ_FILE
from flowengine.store.reading import Piece
from flowengine.store.scan_events import Batch
from flowengine.transfer.unit import ChunkGone, Unit
from flowengine.transfer.unit_size import UnitSize
from flowengine.wire.messages import WANT_ALL, WANT_NONE
from flowengine.wire.records import MAX_RUNS

__all__ = [
    "BatchHold",
    "BufferPart",
    "FilePart",
    "FineHold",
    "Hold",
    "LargeLeft",
    "PieceHold",
    "SubtreesHold",
    "UnitPacker",
    "wanted_runs",
]


class BufferPart:
    """Chunks that lie one behind the other in a pooled buffer."""

    __slots__ = ("_buffer", "_view")

    def __init__(self, buffer: Buffer, start: int, size_bytes: int) -> None:
        buffer.hold()
        self._buffer = buffer
        self._view = buffer.view[start : start + size_bytes]

    def views(self) -> list[memoryview]:
        """The bytes; no copy."""
        return [self._view]

    def release(self) -> None:
        """Let the buffer go."""
        self._buffer.release()


Pace = Callable[[int], None]
"""Called with the bytes that are about to be read; returns when they may be."""


def _at_once(size_bytes: int) -> None:
    """No limit."""


class FilePart:
    """Chunks of one object that are read again when their turn comes, and hashed again before they are sent."""

    __slots__ = ("_offset", "_pace", "_packed", "_path", "_size")

    def __init__(self, path: bytes, offset: int, size_bytes: int, packed: bytes, pace: Pace) -> None:
        self._pace = pace
        self._path = path
        self._offset = offset
        self._size = size_bytes
        self._packed = packed

    def views(self) -> list[memoryview]:
        """The bytes, read now.

        Raises:
            ChunkGone: the object is gone or has changed.
        """
        self._pace(self._size)
        data = memoryview(bytearray(self._size))
        try:
            fd = os.open(self._path, READ_FILE)
            try:
                got = os.preadv(fd, [data], self._offset)
            finally:
                os.close(fd)
        except OSError as error:
            raise ChunkGone("vanished", error.strerror or str(error)) from None
        if not are_chunks(data[:got], self._packed):
            raise ChunkGone("changed", "changed after it was scanned")
        return [data]

    def release(self) -> None:
        """Nothing is held."""


class LargeLeft:
    """Whether something of a large object was sent; shared by its pieces."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun = False


class PieceHold:
    """One piece of a large object.

    Args:
        left: of the object, the same for all its pieces.
    """

    __slots__ = ("_left", "_pace", "_path", "_piece", "_starts", "lengths", "number")

    def __init__(
        self, piece: Piece, path: bytes, pace: Pace = _at_once, left: LargeLeft | None = None
    ) -> None:
        self._left = left or LargeLeft()
        self._pace = pace
        self.number = -1
        self.lengths = piece.lengths
        self._starts = list(accumulate(piece.lengths, initial=0))
        self._piece = piece
        self._path = path

    def parts(self, index: int, count: int) -> list[tuple[int, Part]]:
        """The bytes of `count` chunks from `index` on."""
        before = self._starts[index]
        size = self._starts[index + count] - before
        piece = self._piece
        if piece.buffer is not None:
            return [(count, BufferPart(piece.buffer, piece.start + before, size))]
        packed = piece.packed[index * CHUNK_BYTES : (index + count) * CHUNK_BYTES]
        return [(count, FilePart(self._path, piece.offset + before, size, packed, self._pace))]

    def begin(self, index: int, count: int) -> None:
        """Chunks of it are about to be sent."""
        self._left.begun = True

    def has_begun(self, index: int) -> bool:
        """Whether something of the object was sent."""
        return self._left.begun

    def forget_bytes(self) -> None:
        """Let the buffer go already: what is wanted of it after all is read again."""
        buffer, self._piece.buffer = self._piece.buffer, None
        if buffer is not None:
            buffer.release()

    def release(self) -> None:
        """The offer was answered."""
        if self._piece.buffer is not None:
            self._piece.buffer.release()


class MemoryPart:
    """Chunks that lie in memory of their own."""

    __slots__ = ("_view",)

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def views(self) -> list[memoryview]:
        """The bytes; no copy."""
        return [self._view]

    def release(self) -> None:
        """Nothing is held."""


class GonePart:
    """A chunk that could not be read again."""

    __slots__ = ("_gone",)

    def __init__(self, gone: ChunkGone) -> None:
        self._gone = gone

    def views(self) -> list[memoryview]:
        """Raises ChunkGone."""
        raise self._gone

    def release(self) -> None:
        """Nothing is held."""


Part = BufferPart | FilePart | MemoryPart | GonePart


class FineHold:
    """Chunks of an answered offer, cut finer. Has their bytes, so the offer's own hold can be let go.

    A chunk that cannot be read again stands for itself as one fine chunk: it is found to be lost when it is sent.

    Attributes:
        packed: the fine chunks, as they are offered.
    """

    __slots__ = ("_coarse", "_data", "_hold", "_lost", "_starts", "lengths", "number", "packed")

    def __init__(self, hold: PieceHold | BatchHold, indexes: list[int], cutter: FineCutter) -> None:
        self.number = -1
        self._hold = hold
        self._coarse: list[int] = []
        self._lost: dict[int, GonePart] = {}
        data = bytearray()
        packed = bytearray()
        for index in indexes:
            ((_, part),) = hold.parts(index, 1)
            try:
                (view,) = part.views()
                rows = cutter.packed(view)
                data += view
            except ChunkGone as gone:
                size = hold.lengths[index]
                self._lost[len(packed) // FINE_BYTES] = GonePart(gone)
                rows = size.to_bytes(4, "little") + bytes(FINE_ID_BYTES)
                data += bytes(size)
            finally:
                part.release()
            packed += rows
            self._coarse += [index] * (len(rows) // FINE_BYTES)
        self.packed = bytes(packed)
        self.lengths = fine_lengths(self.packed)
        self._starts = list(accumulate(self.lengths, initial=0))
        self._data = memoryview(data)

    def parts(self, index: int, count: int) -> list[tuple[int, Part]]:
        """The bytes of `count` fine chunks from `index` on: what is lost stands by itself."""
        found: list[tuple[int, Part]] = []
        end = index + count
        for place in [*sorted(place for place in self._lost if index <= place < end), end]:
            if place > index:
                # A copy: a few wanted bytes must not keep all of them.
                data = bytes(self._data[self._starts[index] : self._starts[place]])
                found.append((place - index, MemoryPart(memoryview(data))))
            if place < end:
                found.append((1, self._lost[place]))
            index = place + 1
        return found

    def begin(self, index: int, count: int) -> None:
        """Fine chunks of it are about to be sent."""
        for coarse in dict.fromkeys(self._coarse[index : index + count]):
            self._hold.begin(coarse, 1)

    def has_begun(self, index: int) -> bool:
        """Whether something of the object that this fine chunk belongs to was sent."""
        return self._hold.has_begun(self._coarse[index])

    def release(self) -> None:
        """The offer was answered."""


class BatchHold:
    """A batch of small objects; its chunks are those of its entries, in order."""

    __slots__ = ("_batch", "_begun", "_counts", "_lengths", "_owners", "_pace", "_sums", "number")

    def __init__(self, batch: Batch, pace: Pace = _at_once) -> None:
        self._pace = pace
        self._begun: set[int] = set()
        self.number = -1
        self._batch = batch
        self._lengths: list[int] = []
        self._owners: list[int] = []
        self._counts: list[int] = []
        self._sums: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Of the chunks; made when first asked for, since of what is unchanged nobody asks."""
        block = self._batch.block
        if not self._lengths and block is not None:
            self._counts = block.chunk_counts
            self._lengths = block.chunk_lengths
            self._owners = [n for n, count in enumerate(self._counts) for _ in range(count)]
            if self._batch.buffer is not None:  # they lie one behind the other
                self._sums = [*accumulate(self._lengths, initial=self._batch.starts[0])]
        elif not self._lengths:
            self._counts = [len(entry.chunks) // CHUNK_BYTES for entry in self._batch.entries]
            for index, entry in enumerate(self._batch.entries):
                packed = entry.chunks
                if len(packed) == CHUNK_BYTES:
                    self._lengths.append(entry.size)
                    self._owners.append(index)
                else:
                    for at in range(0, len(packed), CHUNK_BYTES):
                        self._lengths.append(int.from_bytes(packed[at : at + 4], "little"))
                        self._owners.append(index)
        return self._lengths

    def parts(self, index: int, count: int) -> list[tuple[int, Part]]:
        """The bytes of `count` chunks from `index` on: one view where they were read now, else file by file."""
        batch = self._batch
        lengths = self.lengths
        owners = self._owners
        found: list[tuple[int, Part]] = []
        end = index + count
        if self._sums:
            assert batch.buffer is not None
            start = self._sums[index]
            return [(count, BufferPart(batch.buffer, start, self._sums[end] - start))]
        at = index
        while at < end:
            owner = owners[at]
            first = at
            while first > 0 and owners[first - 1] == owner:
                first -= 1
            before = sum(lengths[first:at])
            start = batch.starts[owner]
            stop = at
            if start >= 0:
                assert batch.buffer is not None
                # Objects that were read now lie in the buffer one behind the other.
                while stop < end and batch.starts[owners[stop]] >= 0:
                    stop += 1
                part: Part = BufferPart(batch.buffer, start + before, sum(lengths[at:stop]))
            else:
                while stop < end and owners[stop] == owner:
                    stop += 1
                entry = batch.entries[owner]
                packed = entry.chunks[(at - first) * CHUNK_BYTES : (stop - first) * CHUNK_BYTES]
                part = FilePart(batch.path_of(entry), before, sum(lengths[at:stop]), packed, self._pace)
            found.append((stop - at, part))
            at = stop
        return found

    def begin(self, index: int, count: int) -> None:
        """Chunks of it are about to be sent."""
        # Only objects of several chunks can be left in the middle, and of a run only the first and the last one.
        counts, owners = self._counts, self._owners
        for owner in (owners[index], owners[index + count - 1]):
            if counts[owner] > 1:
                self._begun.add(owner)

    def has_begun(self, index: int) -> bool:
        """Whether something of the object that this chunk belongs to was sent."""
        return self._owners[index] in self._begun

    def release(self) -> None:
        """The offer was answered."""
        if self._batch.buffer is not None:
            self._batch.buffer.release()


class SubtreesHold:
    """The batches of many folders that are offered as one; its chunks are those of all of them, in order.

    Attributes:
        number: of the first batch's offer; each of the others has the next one.
    """

    __slots__ = ("_batches", "_files", "_lengths", "_pace", "_pieces", "_sums", "number")

    def __init__(self, batches: list[Batch], pace: Pace = _at_once) -> None:
        self.number = -1
        self._batches = batches
        self._pace = pace
        self._lengths: list[int] = []
        self._files: list[int] = []
        self._sums: list[int] = []
        self._pieces: list[tuple[int, int, Batch, int]] = []

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def lengths(self) -> list[int]:
        """Of the chunks; made when first asked for."""
        if not self._lengths:
            blocks = [batch.block for batch in self._batches if batch.block is not None]
            columns = join_columns(blocks)
            self._lengths = columns.lengths
            self._sums = [*accumulate(self._lengths, initial=0)]
            counts = [size // CHUNK_BYTES for size in columns.numbers[::5]]
            self._files = [*accumulate(counts, initial=0)]
            self._pieces = self._read_at_once(blocks)
        return self._lengths

    def _read_at_once(self, blocks: list[Block]) -> list[tuple[int, int, Batch, int]]:
        """(first chunk, the one behind the last, a batch, where that begins in the buffer): together what lies so."""
        pieces: list[tuple[int, int, Batch, int]] = []
        first = 0
        for batch, block in zip(self._batches, blocks, strict=True):
            last = first + block.chunks
            start = batch.starts[0]
            if pieces and batch.buffer is not None:
                begin, _, before, at = pieces[-1]
                if before.buffer is batch.buffer and at + self._sums[first] - self._sums[begin] == start:
                    pieces[-1] = (begin, last, before, at)
                    first = last
                    continue
            pieces.append((first, last, batch, start))
            first = last
        return pieces

    def parts(self, index: int, count: int) -> list[tuple[int, Part]]:
        """The bytes of `count` chunks from `index` on: one view of what was read one behind the other, else file by file."""
        found: list[tuple[int, Part]] = []
        end, sums = index + count, self._sums
        for first, last, batch, start in self._pieces:
            begin, stop = max(first, index), min(last, end)
            if begin >= stop:
                continue
            if batch.buffer is None:
                found += BatchHold(batch, self._pace).parts(begin - first, stop - begin)
            else:
                at = start + sums[begin] - sums[first]
                found.append((stop - begin, BufferPart(batch.buffer, at, sums[stop] - sums[begin])))
        return found

    def file_end(self, index: int) -> int:
        """How many chunks the files have that end with this chunk or before it."""
        return self._files[bisect_right(self._files, index) - 1]

    def begin(self, index: int, count: int) -> None:
        """Chunks of it are about to be sent: files are sent whole."""

    def has_begun(self, index: int) -> bool:
        """No part of a file was sent before the rest."""
        return False

    def split(self, whole: int) -> tuple[BatchHold | SubtreesHold, SubtreesHold | None]:
        """Two holds in place of this one: of the first so many batches, or of the first one by itself (0); and of the rest."""
        count = whole or 1
        first = (
            SubtreesHold(self._batches[:count], self._pace)
            if whole
            else BatchHold(self._batches[0], self._pace)
        )
        first.number = self.number
        if count == len(self._batches):
            return first, None
        rest = SubtreesHold(self._batches[count:], self._pace)
        rest.number = self.number + count
        return first, rest

    def release(self) -> None:
        """All the offers were answered."""
        for batch in self._batches:
            if batch.buffer is not None:
                batch.buffer.release()


Hold = PieceHold | BatchHold | FineHold | SubtreesHold


def wanted_runs(kind: int, bitmap: bytes, count: int) -> Iterator[tuple[int, int]]:
    """(first index, count) of each run of wanted chunks.

    >>> list(wanted_runs(2, bytes([0b0110_1101]), 7))
    [(0, 1), (2, 2), (5, 2)]
    """
    if kind == WANT_NONE or not count:
        return
    if kind == WANT_ALL:
        yield 0, count
        return
    bits = int.from_bytes(bitmap, "little")
    at = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        at += zeros
        bits >>= zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield at, min(ones, count - at)
        at += ones
        bits >>= ones
        if at >= count:
            return


class UnitPacker:
    """Packs wanted runs of many offers into units of about a size. For use by one thread."""

    def __init__(self, size: UnitSize) -> None:
        self._size = size
        self._unit = Unit()

    def add(self, hold: Hold, index: int, count: int) -> Iterator[Unit]:
        """Add a run; gives the units that it fills."""
        lengths = hold.lengths
        most = self._size.unit_bytes
        end = index + count
        if self._unit.raw_bytes >= most:  # units were larger when it was begun
            yield self._unit
            self._unit = Unit()
        while index < end:
            size = self._unit.raw_bytes
            stop = index
            while stop < end and size < most:
                size += lengths[stop]
                stop += 1
            if isinstance(hold, SubtreesHold) and stop < end:
                stop = hold.file_end(stop)
                if stop <= index:  # the next file needs a unit of its own: it is smaller than one
                    yield self._unit
                    self._unit = Unit()
                    continue
            # A run for each part: what cannot be read any more costs only its own chunks.
            for chunks, part in hold.parts(index, stop - index):
                unit = self._unit
                unit.runs.append((hold.number, index, chunks))
                unit.holds.append(hold)
                unit.parts.append(part)
                unit.raw_bytes += sum(lengths[index : index + chunks])
                index += chunks
                if unit.raw_bytes >= most or len(unit.runs) >= MAX_RUNS:
                    yield unit
                    self._unit = Unit()

    def flush(self) -> Unit | None:
        """The unit that is not full, if it holds anything."""
        if not self._unit.raw_bytes:
            return None
        unit, self._unit = self._unit, Unit()
        return unit
