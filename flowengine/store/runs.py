"""Runs of small files as columns: made and placed when they land, many to a call.

As in `store.many`, by the compiled library where it is there, and in Python with the same results where it is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from itertools import accumulate, chain, islice, pairwise
from typing import Final, NamedTuple

from flowengine.manifest import Block, Columns, Entry
from flowengine.store.filesystem import READ_FILE, READ_FOLDER
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

__all__ = [
    "FolderPlace",
    "PlacedFolders",
    "dress_files",
    "log_rows",
    "note_folders",
    "part_of",
    "place_folders",
    "place_run",
    "staging_name",
    "staging_number",
    "write_run",
]

_PART_BITS: Final = 40  # as in `_many.c`
_IN_PART: Final = (1 << _PART_BITS) - 1
_NO_STAT: Final = Stat(*[0] * len(Stat._fields))


def staging_name(number: int) -> str:
    """What the staging file of a run's object is called, in the part of the staging folder that it is in."""
    return f"{number & _IN_PART:x}"


def staging_number(part: int, number: int) -> int:
    """The number of a part's file, which says both."""
    return part << _PART_BITS | number


def part_of(number: int) -> int:
    """The part of the staging folder that a file is in."""
    return number >> _PART_BITS


def write_run(folder: int, first: int, packed: bytes, data: memoryview, umask: int = 0) -> None:
    """Make the staging files of a run, from number `first` on, whose bytes lie one behind the other in `data`.

    Args:
        packed: the numbers of each, as in `Columns.packed`.
        umask: as of `write_files`.

    Raises:
        OSError: of the first that could not be made; those before it are there.
    """
    numbers = memoryview(packed).cast("q")
    sizes = numbers[1::5].tolist()
    total = sum(sizes)
    if total > len(data):
        raise ValueError("a file's bytes lie outside the data")
    compiled = library()
    if compiled is None:
        starts = accumulate(sizes[:-1], initial=0)
        what = [*zip(starts, sizes, numbers[2::5].tolist(), numbers[3::5].tolist(), strict=True)]
        write_files(folder, [staging_name(first + n) for n in range(len(sizes))], what, data, umask)
        return
    # ctypes finds the address of writable memory, and of bytes (which unpacked records are).
    place = (
        bytes(data[:total])
        if data.readonly or not total
        else ctypes.addressof(ctypes.c_char.from_buffer(data))
    )
    error = compiled.flow_write_run(folder, first, len(sizes), packed, place, umask)
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


class FolderPlace(NamedTuple):
    """A folder that is to be made and filled.

    Attributes:
        depth: how many of those before it are around it.
        files: how many of a run's files come into it, the next ones.
    """

    depth: int
    name: bytes
    mode: int
    mtime_ns: int
    files: int


class PlacedFolders(NamedTuple):
    """What became of folders and of the files in them.

    Attributes:
        files: of all files, in order; of one with an error the stat is none.
        errors: of each file, what kept it from its name; 0 where nothing did; below 0 where it cannot be looked at.
        folders: the stat of each.
        folder_errors: of each, what kept it from being made, and with it all in it; below 0 what kept it from its mode
            and time.
    """

    files: Rows
    errors: list[int]
    folders: list[Stat]
    folder_errors: list[int]


def place_folders(
    base: int,
    folders: Sequence[FolderPlace],
    staging: int,
    first: int,
    names: bytes,
    left_out: bytes,
    *,
    sync: bool,
) -> PlacedFolders:
    """Make folders and give the staging files of a run their names in them; each gets mode and time when it is full.

    A folder that is there already is used as it is. Nothing is followed that is a link.

    Args:
        base: the open folder that all are below.
        folders: each before those in it.
        staging, first: the folder of the staging files, and the number of the first one.
        names: of the files, with NUL behind each.
        left_out: of each file, whether it has no staging file and is left out.
        sync: make each folder durable.

    Raises:
        OSError: a folder cannot be made durable.
    """
    compiled = library()
    if compiled is None:
        return _place_folders(base, folders, staging, first, names, left_out, sync=sync)
    count, files = len(folders), len(left_out)
    rows = ctypes.create_string_buffer(files * STAT.size)
    errors = (ctypes.c_int64 * files)()
    folder_rows = ctypes.create_string_buffer(count * STAT.size)
    folder_errors = (ctypes.c_int64 * count)()
    failed = compiled.flow_place_folders(
        base,
        b"".join([one.name + b"\0" for one in folders]),
        struct.pack(f"={4 * count}q", *chain.from_iterable([(d, m, t, n) for d, _, m, t, n in folders])),
        count,
        staging,
        first,
        names,
        left_out,
        rows,
        errors,
        folder_rows,
        folder_errors,
        sync,
    )
    if failed < 0:
        raise OSError(-failed, os.strerror(-failed))
    return PlacedFolders(
        Rows(files, names, rows.raw),
        errors[:],
        [*map(Stat._make, STAT.iter_unpack(folder_rows.raw))],
        folder_errors[:],
    )


def _place_folders(
    base: int,
    folders: Sequence[FolderPlace],
    staging: int,
    first: int,
    names: bytes,
    left_out: bytes,
    *,
    sync: bool,
) -> PlacedFolders:
    files = names.split(b"\0")[:-1]
    found: list[Stat] = [_NO_STAT] * len(files)
    errors = [0] * len(files)
    folder_rows = [_NO_STAT] * len(folders)
    folder_errors = [0] * len(folders)
    opened: list[tuple[int, int]] = []
    next_files = iter(range(len(files)))

    def leave() -> None:
        number, fd = opened.pop()
        if fd < 0:
            return
        one = folders[number]
        try:
            os.fchmod(fd, one.mode)
            os.utime(fd, ns=(one.mtime_ns, one.mtime_ns))
            folder_rows[number] = Stat.of(os.fstat(fd))
        except OSError as error:
            folder_errors[number] = -(error.errno or errno.EIO)
        try:
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    for number, one in enumerate(folders):
        while len(opened) > one.depth:
            leave()
        above, fd = opened[-1] if opened else (-1, base)
        error, fd = (folder_errors[above], -1) if fd < 0 else _make_folder(fd, one.name)
        folder_errors[number] = error
        opened.append((number, fd))
        for at in islice(next_files, one.files):
            if left_out[at]:
                continue
            errors[at] = error
            if not error:
                found[at], errors[at] = _place_one(staging, staging_name(first + at), fd, files[at])
    while opened:
        leave()
    return PlacedFolders(rows_of([*zip(files, found, strict=True)]), errors, folder_rows, folder_errors)


def _make_folder(parent: int, name: bytes) -> tuple[int, int]:
    """(errno or 0, its descriptor or -1)"""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        return 0, os.open(name, READ_FOLDER, dir_fd=parent)
    except OSError as error:
        return error.errno or errno.EIO, -1


def _place_one(staging: int, staged: str, folder: int, name: bytes) -> tuple[Stat, int]:
    """Its stat, and errno: below 0 where it cannot be looked at."""
    try:
        os.rename(staged, name, src_dir_fd=staging, dst_dir_fd=folder)
    except OSError as error:
        return _NO_STAT, error.errno or errno.EIO
    try:
        return Stat.of(os.stat(name, dir_fd=folder, follow_symlinks=False)), 0
    except OSError as error:
        return _NO_STAT, -(error.errno or errno.EIO)


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


def log_rows(prefix: bytes, columns: Columns, rows: Rows) -> bytes | None:
    """What `store.index_log` notes of a folder's plain files that landed; None where Python is to do it."""
    compiled = library()
    if compiled is None or not rows.packed_names:
        return None
    names, packed, chunks = columns
    room = len(rows) * (30 + len(prefix)) + len(names) + len(chunks)
    out = ctypes.create_string_buffer(room)
    size = compiled.flow_log(prefix, len(prefix), names, rows.packed, packed, chunks, len(rows), out)
    return ctypes.string_at(out, size)


def note_folders(
    paths: Sequence[bytes], files: Sequence[int], columns: Columns, rows: Rows
) -> tuple[list[bytes], bytes] | None:
    """The proof of each of some folders, and what `store.index_log` notes of all files; None where Python is to do it.

    Args:
        paths: of the folders, from the root.
        files: how many of the files are in each.
        columns, rows: of all files, with their stats where they are.
    """
    compiled = library()
    if compiled is None or not rows.packed_names:
        return None
    names, packed, chunks = columns
    total = len(rows)
    prefixes = [path + b"/" for path in paths]
    proofs = ctypes.create_string_buffer(1 + 3 * len(paths) + 40 * total + len(names))
    ends = (ctypes.c_int64 * len(paths))()
    prefix_bytes = sum([count * len(prefix) for prefix, count in zip(prefixes, files, strict=True)])
    log = ctypes.create_string_buffer(30 * total + prefix_bytes + len(names) + len(chunks) + 1)
    size = compiled.flow_note(
        b"\0".join([*prefixes, b""]),
        struct.pack(f"={len(files)}q", *files),
        len(paths),
        names,
        rows.packed,
        packed,
        chunks,
        proofs,
        ends,
        log,
    )
    told = proofs.raw
    return [told[a:b] for a, b in pairwise([0, *ends])], ctypes.string_at(log, size)
