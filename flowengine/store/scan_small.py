"""Small objects of one directory: read many at a time, cut, hashed and made entries of.

Invariants
    - An object whose stat differs before and after its read is read again, up to `READ_ATTEMPTS`, then reported.
    - Objects that were read for one batch lie in its buffer one behind the other, in order.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from flowengine.chunking import CHUNK_BYTES, Cutter
from flowengine.manifest import FILE, SYMLINK, Entry
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.store.encoded import read_block
from flowengine.store.filesystem import READ_FILE
from flowengine.store.many import AnyStat, Row, Rows, Stat, read_files
from flowengine.store.proofs import with_ctime
from flowengine.store.reading import ObjectChanged, ObjectReader
from flowengine.store.scan_cache import PROVISIONAL
from flowengine.store.scan_events import Batch
from flowengine.wire.messages import LARGE_OBJECT_BYTES

__all__ = [
    "MAX_BATCH_CHUNKS",
    "MAX_BATCH_ENTRIES",
    "READ_ATTEMPTS",
    "ExtraReader",
    "Made",
    "SmallReader",
    "batches",
    "is_one_batch",
    "read_extra",
]

READ_ATTEMPTS: Final = 3
MAX_BATCH_ENTRIES: Final = 512
MAX_BATCH_CHUNKS: Final = 4096
"""A batch is closed at so many chunks; one more object may take it over. Well below what an offer may hold."""

ExtraReader = Callable[[int | bytes, AnyStat], bytes]


class Made(msgspec.Struct):
    """Some consecutive small objects of a directory, as far as they could be read.

    Attributes:
        rows: name and stat of each, the stat such that it proves nothing where the object changed too lately.
        entries, starts, buffer: as in `Batch`; whoever gets them releases the buffer.
        failures: (name, error) of what could not be read.
    """

    rows: list[Row] = msgspec.field(default_factory=list)
    entries: list[Entry] = msgspec.field(default_factory=list)
    starts: list[int] = msgspec.field(default_factory=list)
    buffer: Buffer | None = None
    failures: list[tuple[bytes, OSError | ObjectChanged]] = msgspec.field(default_factory=list)


def is_one_batch(count: int, size_bytes: int, minimum: int, most_bytes: int) -> bool:
    """Whether so many objects make one batch, whatever the size of each; as `batches` has it."""
    return (
        count <= MAX_BATCH_ENTRIES
        and size_bytes < most_bytes
        and count + size_bytes // minimum < MAX_BATCH_CHUNKS
    )


def batches(sizes: Sequence[int], minimum: int, most_bytes: int) -> list[int]:
    """Where batches of objects of these sizes end, which are cut to chunks of at least `minimum` bytes."""
    if is_one_batch(len(sizes), sum(sizes), minimum, most_bytes):
        return [len(sizes)]
    ends: list[int] = []
    count = chunks = total = 0
    for at, size in enumerate(sizes):
        if count and (count >= MAX_BATCH_ENTRIES or chunks >= MAX_BATCH_CHUNKS or total + size >= most_bytes):
            ends.append(at)
            count = chunks = total = 0
        count += 1
        chunks += size // minimum + 1
        total += size
    ends.append(len(sizes))
    return ends


class SmallReader:
    """Reads small objects into pooled buffers. For use by one thread.

    Args:
        reader: what reads the large objects: its profile and pace hold here too.
        extra: reads what is kept of objects on request.
        mode_bits: those of a mode that are kept.
    """

    def __init__(
        self, reader: ObjectReader, pool: BufferPool, extra: ExtraReader | None, mode_bits: int
    ) -> None:
        self._pool = pool
        self._pace = reader.pace
        self._cutter = Cutter(reader.profile)
        self._extra = extra
        self._mode_bits = mode_bits
        # Small objects of many directories lie one behind the other in one buffer.
        self._shared: Buffer | None = None
        self._filled = 0
        self.objects_read = 0
        self.bytes_read = 0

    def let_go(self) -> None:
        """Leave the shared buffer to those who hold batches in it."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None

    def make(self, folder: int, rows: list[Row], known: list[Entry | None], racy_from: int) -> Made:
        """Entries of objects of an open folder; those that are known are not looked at."""
        made = Made()
        fresh = [
            row
            for row, entry in zip(rows, known, strict=True)
            if entry is None and row[1].st_size and row[1].st_mode & 0o170000 == 0o100000
        ]
        size = sum([st.st_size for _, st in fresh])
        if fresh:
            self._pace(size)
            made.buffer = self._hold_shared(size)
        filled = self._filled
        read = self._read(folder, fresh, made)
        chunks = self._chunks(made.buffer, filled, read)
        for (name, st), entry in zip(rows, known, strict=True):
            start = -1
            if entry is None:
                kind = st.st_mode & 0o170000
                if kind == 0o120000:
                    try:
                        link = os.readlink(name, dir_fd=folder)
                    except OSError as error:
                        made.failures.append((name, error))
                        continue
                    entry = Entry(name, SYMLINK, 0o777, st.st_mtime_ns, 0, b"", link)
                elif not st.st_size:
                    entry = Entry(name, FILE, st.st_mode & self._mode_bits, st.st_mtime_ns)
                else:
                    if name not in read:
                        continue
                    st = read[name]
                    start, filled = filled, filled + st.st_size
                    mode = st.st_mode & self._mode_bits
                    entry = Entry(name, FILE, mode, st.st_mtime_ns, st.st_size, next(chunks))
                if self._extra is not None:
                    entry = msgspec.structs.replace(entry, extra=self._extra_of(folder, name, st))
                if st.st_ctime_ns >= racy_from:
                    st = with_ctime(st, PROVISIONAL)
            made.entries.append(entry)
            made.rows.append((name, st))
            made.starts.append(start)
        if made.buffer is not None and not made.entries:
            made.buffer.release()
            made.buffer = None
        return made

    def make_block(self, folder: int, rows: Rows) -> Batch | None:
        """A batch of regular files of an open folder of which none is known and not all are empty, as a block.

        None where one of them is not (any more) as it was listed: they are for `make`, then.
        """
        total = rows.size_bytes
        self._pace(total)
        buffer = self._hold_shared(total)
        view, begin = buffer.view, self._filled
        block = read_block(folder, rows, self._mode_bits, self._cutter, view, begin)
        if block is None:
            buffer.release()
            return None
        self._filled += total
        self.objects_read += len(rows) - rows.sizes.count(0)
        self.bytes_read += total
        return Batch(block, buffer, [begin], b"")

    def _read(self, folder: int, fresh: list[Row], made: Made) -> dict[bytes, Stat]:
        """Read objects to the shared buffer: the stat of each that could be read."""
        read: dict[bytes, Stat] = {}
        at = 0
        while at < len(fresh):
            assert made.buffer is not None
            view = made.buffer.view
            done = at + read_files(folder, fresh[at:], view, self._filled)
            read.update(fresh[at:done])
            self._filled += sum([st.st_size for _, st in fresh[at:done]])
            at = done
            if at < len(fresh):  # it changed, or cannot be read
                name, st = fresh[at]
                at += 1
                room = len(view) - sum([st.st_size for _, st in fresh[at:]]) - 1
                try:
                    read[name] = self._read_again(folder, name, st, view[:room])
                    self._filled += read[name].st_size
                except (OSError, ObjectChanged) as error:
                    made.failures.append((name, error))
        self.objects_read += len(read)
        self.bytes_read += sum([st.st_size for st in read.values()])
        return read

    def _chunks(self, buffer: Buffer | None, start: int, read: dict[bytes, Stat]) -> Iterator[bytes]:
        """The packed chunks of each object that was read, which lie one behind the other."""
        if not read:
            return
        assert buffer is not None
        sizes = struct.pack(f"={len(read)}q", *[st.st_size for st in read.values()])
        counts, packed = self._cutter.packed_many(buffer.view[start : self._filled], sizes, 8)
        at = 0
        for count in memoryview(counts).cast("q"):
            yield packed[at : at + CHUNK_BYTES * count]
            at += CHUNK_BYTES * count

    def _hold_shared(self, size_bytes: int) -> Buffer:
        """A buffer with room behind `_filled`, held once more for a batch."""
        if self._shared is not None and self._filled + size_bytes >= self._pool.size_bytes:
            self.let_go()
        if self._shared is None:
            self._shared, self._filled = self._pool.acquire(), 0
        self._shared.hold()
        return self._shared

    def _extra_of(self, folder: int, name: bytes, st: Stat) -> bytes:
        assert self._extra is not None
        return read_extra(self._extra, folder, name, st)

    def _read_again(self, folder: int, name: bytes, st: Stat, view: memoryview) -> Stat:
        """Read one object to view[_filled:] once it holds still; its stat.

        Raises:
            ObjectChanged: it never held still.
        """
        at = self._filled
        fd = os.open(name, READ_FILE, dir_fd=folder)
        try:
            for _ in range(READ_ATTEMPTS):
                # One byte more than expected shows growth without another call.
                got = os.preadv(fd, [view[at : at + st.st_size + 1]], 0)
                after = Stat.of(os.fstat(fd))
                if got == st.st_size and after[1:4] == st[1:4]:
                    return after
                st = after
                if st.st_size >= LARGE_OBJECT_BYTES or at + st.st_size >= len(view):
                    break
        finally:
            os.close(fd)
        raise ObjectChanged("changed while it was read; what was read of it was thrown away")


def read_extra(extra: ExtraReader, folder: int, name: bytes, st: AnyStat) -> bytes:
    """What is kept on request of an object in an open folder; nothing of a link, or where it cannot be opened."""
    if stat.S_ISLNK(st.st_mode):
        return b""
    try:
        fd = os.open(name, READ_FILE, dir_fd=folder)
    except OSError:
        return b""
    try:
        return extra(fd, st)
    finally:
        os.close(fd)
