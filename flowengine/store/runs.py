"""Runs of small files as columns: encoded when they are read, made and placed when they land, many to a call.

As in `store.many`, by the compiled library where it is there, and in Python with the same results where it is not.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from flowengine.chunking import CHUNK_BYTES, ID_BYTES, pack_chunks
from flowengine.manifest import FILE, Block, Entry
from flowengine.manifest.entries import encode
from flowengine.store.many import STAT, Rows, Stat, library, place_files, rows_of, write_files

__all__ = ["encode_files", "log_rows", "place_run", "staging_name", "write_run"]


def encode_files(
    rows: Rows, mode_bits: int, counts: Sequence[int] | None, lengths: Sequence[int], ids: bytes
) -> bytes:
    """The entries of regular files, encoded.

    Args:
        mode_bits: those of a mode that are kept.
        counts: how many chunks each file has; None: one each.
        lengths, ids: of all chunks.
    """
    compiled = library()
    if compiled is None or not rows.packed_names:
        entries: list[Entry] = []
        at = 0
        for number, (name, st) in enumerate(rows.pairs()):
            end = at + (counts[number] if counts is not None else 1)
            chunks = pack_chunks(
                [(lengths[n], ids[ID_BYTES * n : ID_BYTES * (n + 1)]) for n in range(at, end)]
            )
            entries.append(Entry(name, FILE, st.st_mode & mode_bits, st.st_mtime_ns, st.st_size, chunks))
            at = end
        return encode(entries)
    out = ctypes.create_string_buffer(
        5 + 48 * len(rows) + len(rows.packed_names) + CHUNK_BYTES * len(lengths)
    )
    size = compiled.flow_encode(
        rows.packed_names,
        rows.packed,
        len(rows),
        mode_bits,
        None if counts is None else struct.pack(f"={len(counts)}q", *counts),
        struct.pack(f"={len(lengths)}q", *lengths),
        ids,
        out,
    )
    return ctypes.string_at(out, size)


def staging_name(number: int) -> str:
    """What the staging file of a small object is called."""
    return f"s.{number:x}"


def write_run(folder: int, first: int, block: Block, data: memoryview) -> None:
    """Make the staging files of a block, from number `first` on, whose bytes lie one behind the other in `data`.

    Raises:
        OSError: of the first that could not be made; those before it are there.
    """
    if block.size_bytes > len(data):
        raise ValueError("a file's bytes lie outside the data")
    compiled = library()
    if compiled is None:
        at = 0
        what: list[tuple[int, int, int, int]] = []
        for entry in block.entries:
            what.append((at, entry.size, entry.mode, entry.mtime_ns))
            at += entry.size
        write_files(folder, [staging_name(first + n) for n in range(block.count)], what, data)
        return
    # ctypes finds the address of writable memory, and of bytes (which unpacked records are).
    place = bytes(data) if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))
    error = compiled.flow_write_run(folder, first, block.count, block.columns.packed, place)
    if error:
        raise OSError(error, os.strerror(error))


def place_run(
    folder: int, first: int, block: Block, to: int
) -> tuple[Rows | None, list[Stat | None], list[int]]:
    """Give the staging files of a block their names in an open folder, and look at each there.

    Returns:
        Rows of all where all went well; else None, and what `place_files` gives.
    """
    compiled = library()
    if compiled is None:
        moves = [(staging_name(first + n), to, name) for n, name in enumerate(block.names)]
        stats, failed = place_files(folder, moves)
        whole = [(name, st) for name, st in zip(block.names, stats, strict=True) if st is not None]
        return (rows_of(whole), [], []) if len(whole) == block.count else (None, stats, failed)
    rows = ctypes.create_string_buffer(block.count * STAT.size)
    errors = (ctypes.c_int64 * block.count)()
    names = block.columns.names
    if not compiled.flow_place_run(folder, first, to, names, block.count, rows, errors):
        return Rows(block.count, names, rows.raw), [], []
    looks = map(Stat._make, STAT.iter_unpack(rows.raw))
    found: list[Stat | None] = [None if error else st for error, st in zip(errors, looks, strict=True)]
    return None, found, [number for number, error in enumerate(errors) if error > 0]


def log_rows(prefix: bytes, block: Block, rows: Rows) -> bytes | None:
    """What `store.index_log` notes of a block's files that landed; None where Python is to do it."""
    compiled = library()
    if compiled is None or not rows.packed_names:
        return None
    columns = block.columns
    room = block.count * (30 + len(prefix)) + len(columns.names) + len(columns.chunks)
    out = ctypes.create_string_buffer(room)
    size = compiled.flow_log(
        prefix, len(prefix), columns.names, rows.packed, columns.packed, columns.chunks, block.count, out
    )
    return ctypes.string_at(out, size)
