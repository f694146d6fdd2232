"""Runs of small files as columns: made and placed when they land, many to a call.

As in `store.many`, by the compiled library where it is there, and in Python with the same results where it is not.
"""

from __future__ import annotations

import ctypes
import errno
import os

from flowengine.manifest import Block, Entry
from flowengine.store.filesystem import READ_FILE
from flowengine.store.many import (
    STAT,
    Row,
    Rows,
    Stat,
    library,
    place_files,
    rows_of,
    write_files,
)

__all__ = ["dress_files", "log_rows", "place_run", "staging_name", "write_run"]


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
    place = (
        bytes(data[: block.size_bytes])
        if data.readonly
        else ctypes.addressof(ctypes.c_char.from_buffer(data))
    )
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


def dress_files(folder: int, block: Block, rows: Rows) -> Rows | None:
    """Give files of an open folder the modes and times of a block; their stats then.

    Args:
        rows: their names and stats until now.

    Returns:
        None where one of them is not as its stat says (any more) or cannot be had: then some have what they are to have.
    """
    compiled = library()
    if compiled is None or not rows.packed_names:
        dressed: list[Row] = []
        for (name, st), entry in zip(rows.pairs(), block.entries, strict=True):
            if (st.st_mode & 0o7777, st.st_mtime_ns) != (entry.mode, entry.mtime_ns):
                try:
                    st = _dress(folder, name, st, entry)
                except OSError:
                    return None
            dressed.append((name, st))
        return rows_of(dressed)
    stats = ctypes.create_string_buffer(rows.packed, len(rows.packed))
    done = compiled.flow_touch(folder, rows.packed_names, len(rows), block.columns.packed, stats)
    return Rows(len(rows), rows.packed_names, stats.raw) if done == len(rows) else None


def _dress(folder: int, name: bytes, st: Stat, entry: Entry) -> Stat:
    fd = os.open(name, READ_FILE, dir_fd=folder)
    try:
        now = Stat.of(os.fstat(fd))
        if now[:5] != st[:5] or now.st_dev != st.st_dev:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if now.st_mode & 0o7777 != entry.mode:
            os.fchmod(fd, entry.mode)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        return Stat.of(os.fstat(fd))
    finally:
        os.close(fd)


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
