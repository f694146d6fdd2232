"""System calls on many small files at once: listing a folder, reading, making and placing files.

Goal
    A small file costs what the kernel takes for it: not an interpreter's way to each call, nor the interpreter handed
    from thread to thread around each.
Plan
    A library of a few C functions (`_many.c`) that the build compiles where it can, called by ctypes, which lets the
    interpreter go for the whole of a call. Where it is missing, the same in Python.
Invariants
    - Both ways give the same results; what went wrong with one file is said of that file.
    - Names come in one block of bytes and leave in lists; nothing of the library's memory is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import cached_property
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

from flowengine.compiled import Scratch, load_library
from flowengine.store.filesystem import READ_FILE, READ_FOLDER

__all__ = [
    "STAT",
    "AnyStat",
    "Kind",
    "Listing",
    "Row",
    "Rows",
    "Stat",
    "is_compiled",
    "joined",
    "library",
    "list_folder",
    "listing_of",
    "open_listed",
    "place_files",
    "read_files",
    "read_rows",
    "rows_of",
    "stats_proof",
    "were_cold",
    "write_files",
]

_INTERFACE: Final = 11
_KINDS: Final = 4


class Kind(IntEnum):
    """What an entry of a folder is to a transfer."""

    SMALL = 0
    LARGE = 1
    FOLDER = 2
    OTHER = 3


STAT: Final = struct.Struct("=10q")
"""A `Stat` as the library has it."""
_ENCODING: Final = sys.getfilesystemencoding()  # os.fsencode does just this, three times slower
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class Stat(NamedTuple):
    """What is looked at of a file's stat, under the names that `os.stat_result` has for it."""

    st_ino: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_mode: int
    st_nlink: int
    st_blocks: int
    st_dev: int
    st_uid: int
    st_gid: int

    @classmethod
    def of(cls, st: os.stat_result) -> Stat:
        """The same of a stat of Python's."""
        return cls(
            st.st_ino,
            st.st_size,
            st.st_mtime_ns,
            st.st_ctime_ns,
            st.st_mode,
            st.st_nlink,
            st.st_blocks,
            st.st_dev,
            st.st_uid,
            st.st_gid,
        )


AnyStat: TypeAlias = os.stat_result | Stat
Row: TypeAlias = tuple[bytes, Stat]


def stats_proof(rows: Sequence[tuple[bytes, AnyStat]]) -> bytes:
    """What proves that entries are unchanged: inode, size, mtime, ctime, mode of each, then their names."""
    flat: list[int] = []
    for _, st in rows:
        flat += (_signed(st.st_ino), st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_mode)
    return struct.pack(f"<I{len(flat)}q", len(rows), *flat) + b"/".join([name for name, _ in rows])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


class Rows:
    """Entries of one kind in order of their names; what they hold is unpacked when first asked for.

    Attributes:
        packed_names: with NUL behind each; empty where it was unpacked from the start.
        packed: of each ten native int64, the fields of `Stat`.
    """

    def __init__(self, count: int, names: bytes, numbers: bytes) -> None:
        self._count = count
        self.packed_names = names
        self.packed = numbers

    def __len__(self) -> int:
        return self._count

    @cached_property
    def names(self) -> list[bytes]:
        return self.packed_names.split(b"\0")[:-1]

    @cached_property
    def stats(self) -> list[Stat]:
        return [*map(Stat._make, STAT.iter_unpack(self.packed))]

    def __contains__(self, name: bytes) -> bool:
        if not self.packed_names:
            return bool(self._count) and name in self.names
        return self.packed_names.startswith(name + b"\0") or b"\0" + name + b"\0" in self.packed_names

    def pairs(self) -> list[Row]:
        """(name, stat) of each."""
        return [*zip(self.names, self.stats, strict=True)] if self._count else []

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each."""
        return self._column(1)

    @property
    def packed_sizes(self) -> tuple[bytes, int]:
        """The sizes as native int64, and how many bytes from one to the next."""
        if not self.packed_names:
            return struct.pack(f"={self._count}q", *self.sizes), 8
        return self.packed[8:], STAT.size

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all."""
        return sum(self.sizes)

    def _column(self, number: int) -> list[int]:
        if not self.packed_names:
            return [st[number] for st in self.stats] if self._count else []
        column: list[int] = memoryview(self.packed).cast("q")[number :: len(Stat._fields)].tolist()
        return column

    def part(self, first: int, last: int) -> Rows:
        """Those from `first` on, before `last`."""
        if first == 0 and last == self._count:
            return self
        if not self.packed_names:
            return rows_of(self.pairs()[first:last])
        names = b"\0".join([*self.names[first:last], b""])
        return Rows(last - first, names, self.packed[STAT.size * first : STAT.size * last])

    @property
    def proof(self) -> bytes:
        """`stats_proof` of them."""
        if _library is None or not self.packed_names:
            return stats_proof(self.pairs())
        out = ctypes.create_string_buffer(4 + 40 * self._count + len(self.packed_names))
        _library.flow_prove(self.packed_names, len(self.packed_names), self.packed, self._count, out)
        return out.raw[:-1]


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of one folder, those of one part behind those of the other."""
    if len(parts) == 1:
        return parts[0]
    if all(rows.packed_names for rows in parts):
        return Rows(
            sum(map(len, parts)),
            b"".join([rows.packed_names for rows in parts]),
            b"".join([rows.packed for rows in parts]),
        )
    return rows_of([pair for rows in parts for pair in rows.pairs()])


_NO_ROWS: Final = Rows(0, b"", b"")


class Listing(NamedTuple):
    """A folder's entries: small objects (files and symbolic links), large ones, folders, and what is neither.

    Attributes:
        proof: `stats_proof` the small objects; empty where there are none.
        linked: whether a small file has more than one name.
        plain: whether all small objects are files.
        file_bytes: of the small files.
        newest_ns: when the last of the small and large objects changed (ctime); below all times where there are none.
        marked: what has the name that was asked about; None where there is nothing.
        error: what ended the listing early.
    """

    smalls: Rows
    larges: Rows
    folders: Rows
    others: Rows
    proof: bytes
    linked: bool
    plain: bool
    file_bytes: int
    newest_ns: int
    marked: Kind | None
    error: OSError | None


_LISTING: Final = struct.Struct(f"@{2 * _KINDS + 7}q{2 * _KINDS + 1}P")
"""`Listing` of `_many.c`: numbers, then addresses."""
_NEVER: Final = -(1 << 63)


_NUMBER, _POINTER, _NAMES = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
_library = load_library(
    __file__,
    "many",
    _INTERFACE,
    [
        ("flow_list", _NUMBER, [_NUMBER, _NUMBER, _NAMES, _POINTER]),
        ("flow_list_at", _NUMBER, [_NUMBER, _NAMES, _NUMBER, _NAMES, *[_POINTER] * 2]),
        ("flow_free", None, [_POINTER]),
        ("flow_leaves", _POINTER, [_NUMBER, _NAMES, _NUMBER, _NUMBER, _NAMES, *[_POINTER] * 3]),
        ("flow_free_proofs", None, [_POINTER]),
        ("flow_read", _NUMBER, [_NUMBER, _NAMES, _NUMBER, _POINTER, _NUMBER, _POINTER, _POINTER]),
        ("flow_write", _NUMBER, [_NUMBER, _NAMES, _NUMBER, _POINTER, _POINTER, _NUMBER]),
        ("flow_place", None, [_NUMBER, _NAMES, _POINTER, _NAMES, _NUMBER, _POINTER, _POINTER]),
        ("flow_segments", _NUMBER, [_NAMES, _NUMBER, _NUMBER, _NUMBER, _POINTER, _NUMBER]),
        ("flow_columns", _NUMBER, [_NAMES, _NUMBER, _POINTER, _POINTER, _POINTER]),
        ("flow_same", _NUMBER, [_NAMES, _NUMBER, _NAMES, _NAMES, _NUMBER, _NUMBER]),
        ("flow_prove", None, [_NAMES, _NUMBER, _NAMES, _NUMBER, _POINTER]),
        (
            "flow_block",
            _NUMBER,
            [*[_NAMES] * 2, *[_NUMBER] * 2, *[_NAMES] * 2, *[_POINTER] * 2, _NUMBER, _POINTER],
        ),
        ("flow_write_run", _NUMBER, [_NUMBER, _NUMBER, _NUMBER, _NAMES, _POINTER, _NUMBER]),
        ("flow_place_run", _NUMBER, [_NUMBER, _NUMBER, _NUMBER, _NAMES, _NUMBER, _POINTER, _POINTER]),
        (
            "flow_place_folders",
            _NUMBER,
            [_NUMBER, *[_NAMES] * 2, *[_NUMBER] * 3, *[_NAMES] * 2, *[_POINTER] * 4, _NUMBER],
        ),
        ("flow_touch", _NUMBER, [_NUMBER, _NAMES, _NUMBER, _NAMES, _POINTER]),
        (
            "flow_read_block",
            _NUMBER,
            [
                *[_NUMBER, _NAMES, _NAMES, _NUMBER, *[_POINTER] * 6],
                *[_NUMBER, _NUMBER, *[_POINTER] * 2, _NUMBER, _POINTER],
            ],
        ),
        ("flow_note", _NUMBER, [_NAMES, _POINTER, _NUMBER, *[_NAMES] * 4, *[_POINTER] * 3]),
        ("flow_log", _NUMBER, [_NAMES, _NUMBER, _NAMES, _NAMES, _NAMES, _NAMES, _NUMBER, _POINTER]),
    ],
)


def library() -> ctypes.CDLL | None:
    """The compiled library, where it is in use."""
    return _library


class _PerThread(threading.local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.listed = Scratch()


_thread = _PerThread()
were_cold = _NUMBER(0)
"""Whether the files that were read last had to be fetched from a disk; a guess, which any thread may change."""


def is_compiled() -> bool:
    """Whether the compiled library is in use."""
    return _library is not None


# --- listing --------------------------------------------------------------------------------------------------------


def list_folder(fd: int, large_bytes: int, marked: bytes = b"") -> Listing:
    """What stands in an open folder; its `error` is not raised.

    Args:
        large_bytes: files of this size and more are large.
        marked: the name that `Listing.marked` is about.
    """
    if _library is None:
        return _list_folder(fd, large_bytes, marked)
    place = _thread.listed.room(_LISTING.size)
    _library.flow_list(fd, large_bytes, marked, place)
    return _listing_at(place)


def open_listed(parent: int, name: bytes, large_bytes: int, marked: bytes = b"") -> tuple[int, Stat, Listing]:
    """Open a folder of an open one, and what stands in it: (descriptor, its stat, as `list_folder`); no link is followed.

    Raises:
        OSError: it cannot be opened.
    """
    if _library is None:
        fd = os.open(name, READ_FOLDER, dir_fd=parent)
        return fd, Stat.of(os.fstat(fd)), _list_folder(fd, large_bytes, marked)
    place = _thread.listed.room(_LISTING.size + STAT.size)
    own = place + _LISTING.size
    fd = int(_library.flow_list_at(parent, name, large_bytes, marked, place, own))
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    st = Stat._make(STAT.unpack(ctypes.string_at(own, STAT.size)))
    return fd, st, _listing_at(place)


def _listing_at(place: int) -> Listing:
    """What the library wrote there; its memory is freed."""
    assert _library is not None
    told = _LISTING.unpack(ctypes.string_at(place, _LISTING.size))
    try:
        rows = [
            Rows(
                count,
                ctypes.string_at(names, name_bytes),
                ctypes.string_at(packed, count * STAT.size),
            )
            if count
            else _NO_ROWS
            for count, name_bytes, names, packed in zip(
                told[:4], told[4:8], told[15:19], told[19:23], strict=True
            )
        ]
        linked, error, proof_bytes, newest_ns, file_bytes, links, found = told[8:15]
        if not links and told[0]:
            rows[0].size_bytes = file_bytes
        return Listing(
            rows[0],
            rows[1],
            rows[2],
            rows[3],
            ctypes.string_at(told[23], proof_bytes) if proof_bytes else b"",
            bool(linked),
            not links,
            file_bytes,
            newest_ns,
            Kind(found - 1) if found else None,
            OSError(error, os.strerror(error)) if error else None,
        )
    finally:
        _library.flow_free(place)


def _list_folder(fd: int, large_bytes: int, marked: bytes) -> Listing:
    found: list[Row] = []
    failed: OSError | None = None
    try:
        with os.scandir(fd) as listing:
            for item in listing:
                try:
                    st = Stat.of(item.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue  # gone between listing and stat: never seen
                found.append((item.name.encode(_ENCODING, "surrogateescape"), st))
    except OSError as error:
        failed = error
    return listing_of(found, large_bytes, marked, failed)


def listing_of(
    found: Iterable[Row], large_bytes: int, marked: bytes = b"", error: OSError | None = None
) -> Listing:
    """The listing of a folder that has these entries; arguments as of `list_folder`."""
    kinds: list[list[Row]] = [[] for _ in range(_KINDS)]
    for row in sorted(found):
        st = row[1]
        kind = st.st_mode & 0o170000
        if kind == 0o100000:
            kinds[Kind.SMALL if st.st_size < large_bytes else Kind.LARGE].append(row)
        else:
            kinds[Kind.SMALL if kind == 0o120000 else Kind.FOLDER if kind == 0o040000 else Kind.OTHER].append(
                row
            )
    smalls = kinds[Kind.SMALL]
    files = [st for _, st in smalls if st.st_mode & 0o170000 == 0o100000]
    packed = [rows_of(rows) for rows in kinds]
    return Listing(
        packed[0],
        packed[1],
        packed[2],
        packed[3],
        stats_proof(smalls) if smalls else b"",
        any(st.st_nlink > 1 for st in files),
        len(files) == len(smalls),
        sum([st.st_size for st in files]),
        max([st.st_ctime_ns for _, st in smalls + kinds[Kind.LARGE]], default=_NEVER),
        next((kind for kind in Kind for name, _ in kinds[kind] if marked and name == marked), None),
        error,
    )


def rows_of(rows: Sequence[Row]) -> Rows:
    """Rows that are unpacked already."""
    made = Rows(len(rows), b"", b"")
    made.names = [name for name, _ in rows]
    made.stats = [st for _, st in rows]
    return made


# --- reading --------------------------------------------------------------------------------------------------------


def read_files(folder: int, rows: Sequence[tuple[bytes, AnyStat]], buffer: memoryview, at: int) -> int:
    """Read regular files whole to `buffer[at:]`, one behind the other, as long as each is as its stat says.

    Empty ones are not opened.

    Args:
        buffer: writable, with a byte to spare behind the last file.

    Returns:
        How many were read; the next one cannot be, or is not what it was (any more).
    """
    if sum([st.st_size for _, st in rows]) >= len(buffer) - at:
        raise ValueError("the files do not fit into the buffer")
    if _library is None:
        return _read_files(folder, rows, buffer, at)
    expected = struct.pack(
        f"={3 * len(rows)}q",
        *chain.from_iterable([(st.st_size, st.st_mtime_ns, st.st_ctime_ns) for _, st in rows]),
    )
    names = b"\0".join([name for name, _ in rows])
    place = ctypes.addressof(ctypes.c_char.from_buffer(buffer, at))
    return int(_library.flow_read(folder, names, len(rows), expected, 3, place, ctypes.byref(were_cold)))


def read_rows(folder: int, rows: Rows, buffer: memoryview, at: int) -> int:
    """The same of rows as they were listed."""
    if _library is None or not rows.packed_names:
        return read_files(folder, rows.pairs(), buffer, at)
    if rows.size_bytes >= len(buffer) - at:
        raise ValueError("the files do not fit into the buffer")
    place = ctypes.addressof(ctypes.c_char.from_buffer(buffer, at))
    expected = rows.packed[8:]  # from the size of the first on
    return int(
        _library.flow_read(
            folder, rows.packed_names, len(rows), expected, len(Stat._fields), place, ctypes.byref(were_cold)
        )
    )


def _read_files(folder: int, rows: Sequence[tuple[bytes, AnyStat]], buffer: memoryview, at: int) -> int:
    for number, (name, st) in enumerate(rows):
        size = st.st_size
        if not size:
            continue
        try:
            fd = os.open(name, READ_FILE, dir_fd=folder)
            try:
                # One byte more than expected shows growth without another call.
                got = os.preadv(fd, [buffer[at : at + size + 1]], 0)
                after = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError:
            return number
        if (got, after.st_size, after.st_mtime_ns, after.st_ctime_ns) != (
            size,
            size,
            st.st_mtime_ns,
            st.st_ctime_ns,
        ):
            return number
        at += size
    return len(rows)


# --- making and placing ---------------------------------------------------------------------------------------------


def write_files(
    folder: int,
    names: Sequence[str],
    what: Sequence[tuple[int, int, int, int]],
    data: memoryview,
    umask: int = 0,
) -> None:
    """Make files that must not be there.

    Args:
        what: for each, where its bytes begin in `data`, how many they are, its mode and mtime_ns.
        umask: bits that the system takes from modes, and that are to be given all the same.

    Raises:
        OSError: of the first that could not be made; those before it are there.
    """
    if not all(0 <= at <= at + size <= len(data) for at, size, _, _ in what):
        raise ValueError("a file's bytes lie outside the data")
    if _library is None:
        for name, (at, size, mode, mtime_ns) in zip(names, what, strict=True):
            _write_file(folder, name, data[at : at + size], mode, mtime_ns, umask)
        return
    numbers = struct.pack(f"={4 * len(what)}q", *chain.from_iterable(what))
    # ctypes finds the address of writable memory, and of bytes (which unpacked records are).
    last = max([at + size for at, size, _, _ in what], default=0)
    place = bytes(data[:last]) if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))
    error = _library.flow_write(folder, "\0".join(names).encode(), len(names), numbers, place, umask)
    if error:
        raise OSError(error, os.strerror(error))


def _write_file(folder: int, name: str, data: memoryview, mode: int, mtime_ns: int, umask: int) -> None:
    fd = os.open(name, _CREATE, mode, dir_fd=folder)
    try:
        done = os.write(fd, data)
        while done < len(data):
            done += os.write(fd, data[done:])
        if mode & umask:
            os.fchmod(fd, mode)
        os.utime(fd, ns=(mtime_ns, mtime_ns))
    finally:
        os.close(fd)


def place_files(folder: int, moves: Sequence[tuple[str, int, bytes]]) -> tuple[list[Stat | None], list[int]]:
    """Rename files, each to a name in a folder that is open, and look at it there.

    Args:
        moves: for each, its name in `folder`, the folder that it comes to, and its name there.

    Returns:
        For each its stat where it stands now (None where it cannot be looked at), and which were not renamed.
    """
    if _library is None or not moves:
        return _place_files(folder, moves)
    count = len(moves)
    rows = ctypes.create_string_buffer(count * STAT.size)
    errors = (ctypes.c_int64 * count)()
    names, folders, places = zip(*moves, strict=True)
    _library.flow_place(
        folder,
        "\0".join(names).encode(),
        struct.pack(f"={count}q", *folders),
        b"\0".join(places),
        count,
        rows,
        errors,
    )
    stats: list[Stat | None] = [*map(Stat._make, STAT.iter_unpack(rows.raw))]
    failed: list[int] = []
    if any(errors):
        stats = [None if error else st for error, st in zip(errors, stats, strict=True)]
        failed = [number for number, error in enumerate(errors) if error > 0]
    return stats, failed


def _place_files(folder: int, moves: Sequence[tuple[str, int, bytes]]) -> tuple[list[Stat | None], list[int]]:
    stats: list[Stat | None] = []
    failed: list[int] = []
    for number, (staged, to, name) in enumerate(moves):
        st: Stat | None = None
        try:
            os.rename(staged, name, src_dir_fd=folder, dst_dir_fd=to)
        except OSError:
            failed.append(number)
        else:
            with contextlib.suppress(OSError):
                st = Stat.of(os.stat(name, dir_fd=to, follow_symlinks=False))
        stats.append(st)
    return stats, failed
