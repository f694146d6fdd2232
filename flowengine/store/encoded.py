"""Runs of small files in their encoded form: made, looked over and compared, by the compiled library where it is there.

As in `store.many`, whose library it is; without it the same is done in Python, with the same results.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Final

from flowengine.chunking import CHUNK_BYTES, Cutter
from flowengine.compiled import Scratch
from flowengine.manifest import FILE, Block, Columns, Entry, Parser, Segment
from flowengine.manifest.block import PYTHON
from flowengine.manifest.entries import encode
from flowengine.store.many import Rows, library, read_rows, were_cold

__all__ = ["block_of", "parse_block", "read_block", "same_files"]


class _PerThread(threading.local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.encoded = Scratch()


_thread = _PerThread()


class _Compiled:
    """Looks over encoded entries by the library; `manifest.block.Parser` says what for."""

    def segments(self, data: bytes, count: int, weight: int) -> list[Segment]:
        compiled = library()
        assert compiled is not None
        room = _SEGMENTS
        while True:
            out = _thread.encoded.room(room * _SEGMENT.size)
            made = compiled.flow_segments(data, len(data), count, weight, out, room)
            if made >= 0:
                found = _SEGMENT.iter_unpack(ctypes.string_at(out, made * _SEGMENT.size))
                return [*map(Segment._make, found)]
            room *= 16

    def columns(self, data: bytes, entries: int) -> Columns:
        compiled = library()
        assert compiled is not None
        numbers = _thread.encoded.room(40 * entries + 2 * len(data))
        names, chunks = numbers + 40 * entries, numbers + 40 * entries + len(data)
        size = compiled.flow_columns(data, len(data), names, numbers, chunks)
        packed = ctypes.string_at(numbers, 40 * entries)
        return Columns(
            ctypes.string_at(names, size),
            packed,
            ctypes.string_at(chunks, sum(memoryview(packed).cast("q")[::5])),
        )


_SEGMENT: Final = struct.Struct("=8q")
_SEGMENTS: Final = 8
_NUMBERED: Final = struct.Struct("=q")
_COMPILED: Final[Parser] = _Compiled()


def parse_block(data: bytes) -> Block | None:
    """The block of encoded entries, if they are one."""
    return Block.parse(data, _COMPILED if library() is not None else PYTHON)


def block_of(rows: Rows, mode_bits: int, counts: bytes, packed: bytes) -> Block | None:
    """The block of regular files; None where they are none that `Block.parse` takes.

    Args:
        mode_bits: those of a mode that are kept.
        counts: how many chunks each file has, as native int64.
        packed: the chunks of all.
    """
    compiled = library()
    if compiled is None or not rows.packed_names:
        entries: list[Entry] = []
        at = 0
        for (name, st), count in zip(rows.pairs(), memoryview(counts).cast("q"), strict=True):
            end = at + CHUNK_BYTES * count
            mode = st.st_mode & mode_bits
            entries.append(Entry(name, FILE, mode, st.st_mtime_ns, st.st_size, packed[at:end]))
            at = end
        return parse_block(encode(entries))
    count = len(rows)
    bound = 5 + 48 * count + len(rows.packed_names) + len(packed)
    room = _SEGMENTS
    while True:
        numbers = _thread.encoded.room(8 + room * _SEGMENT.size + bound)
        segments, data = numbers + 8, numbers + 8 + room * _SEGMENT.size
        size = compiled.flow_block(
            rows.packed_names, rows.packed, count, mode_bits, counts, packed, data, segments, room, numbers
        )
        (made,) = _NUMBERED.unpack(ctypes.string_at(numbers, 8))
        if made >= 0:
            break
        room *= 16
    return _made(data, size, segments, made) if made else None


def read_block(
    folder: int, rows: Rows, mode_bits: int, cutter: Cutter, buffer: memoryview, at: int
) -> Block | None:
    """Read regular files of an open folder whole to `buffer[at:]`, one behind the other: their block.

    None where one of them is not as its stat says (any more), or they are none that `Block.parse` takes.

    Args:
        mode_bits: those of a mode that are kept.
        buffer: writable, with a byte to spare behind the last file.
    """
    total, count = rows.size_bytes, len(rows)
    if total >= len(buffer) - at:
        raise ValueError("the files do not fit into the buffer")
    compiled, way = library(), cutter.pack_way
    if compiled is None or way is None or not rows.packed_names:
        if read_rows(folder, rows, buffer, at) != count:
            return None
        counts, packed = cutter.packed_many(buffer[at : at + total], *rows.packed_sizes)
        return block_of(rows, mode_bits, counts, packed)
    pack, rule = way
    chunks = total // rule.minimum + count
    bound = 5 + 48 * count + len(rows.packed_names) + CHUNK_BYTES * chunks
    room = count + 1
    numbers = _thread.encoded.room(8 + room * _SEGMENT.size + 8 * count + CHUNK_BYTES * chunks + bound)
    segments = numbers + 8
    counted = segments + room * _SEGMENT.size
    named = counted + 8 * count
    data = named + CHUNK_BYTES * chunks
    size = compiled.flow_read_block(
        folder,
        rows.packed_names,
        rows.packed,
        count,
        ctypes.addressof(ctypes.c_char.from_buffer(buffer, at)),
        ctypes.byref(were_cold),
        pack,
        ctypes.byref(rule),
        counted,
        named,
        chunks,
        mode_bits,
        data,
        segments,
        room,
        numbers,
    )
    if size < 0:
        return None
    (made,) = _NUMBERED.unpack(ctypes.string_at(numbers, 8))
    return _made(data, size, segments, made) if made > 0 else None


def _made(data: int, size: int, segments: int, count: int) -> Block:
    found = _SEGMENT.iter_unpack(ctypes.string_at(segments, count * _SEGMENT.size))
    return Block(ctypes.string_at(data, size), [*map(Segment._make, found)], _COMPILED)


def same_files(block: Block, rows: Rows, *, attributes: bool) -> bool:
    """Whether a folder's small objects are files of the block's names and sizes and, if asked for, modes and times."""
    if block.count != len(rows):
        return False
    compiled = library()
    if compiled is not None and rows.packed_names:
        return bool(
            compiled.flow_same(
                block.data, len(block.data), rows.packed_names, rows.packed, block.count, attributes
            )
        )
    return all(
        (name, st.st_mode & 0o170000, st.st_size) == (entry.name, 0o100000, entry.size)
        and (not attributes or (st.st_mode & 0o7777, st.st_mtime_ns) == (entry.mode, entry.mtime_ns))
        for (name, st), entry in zip(rows.pairs(), block.entries, strict=True)
    )
