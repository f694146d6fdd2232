"""Runs of plain files in their encoded form: compared, cut to pages and counted without an object for each.

Goal
    A folder that nobody touched costs one comparison of bytes, and many small files no Python objects on their way.
Plan
    The bytes of a run of entries are the same in a page of the manifest, in an offer and in the scan cache. A `Block`
    keeps them with what one look over them gives: counts, and where pages end. Columns and entries are made when
    somebody asks. The look is a `Parser`'s: the one here is in Python, `store.many` has the same compiled.
Invariants
    - A block holds files only, each with all its chunks inline and nothing else; each is true in itself (as
      `check_entries` checks), names rise, and the bytes are canonical. All else is None, and goes the long way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol
from zlib import crc32

import msgspec

from flowengine.chunking import CHUNK_BYTES, ID_BYTES
from flowengine.errors import ProtocolError
from flowengine.manifest.cut import page_ends
from flowengine.manifest.entries import FILE, UNPACK_LENGTHS, Entry, Header, check_entries, encode

__all__ = ["PYTHON", "Block", "Columns", "Parser", "Segment", "join_blocks", "join_columns", "list_head"]

decode = msgspec.msgpack.Decoder(list[Entry]).decode
_PLAIN: Final = Header()


class Segment(NamedTuple):
    """Entries up to the end of a page, or up to the end of a block.

    Attributes:
        end: where its last entry ends in the block's bytes.
        weight: of its entries, as pages are cut by.
        name_at, name_length: where the name of its last entry lies.
        mode_bits: those that any of its entries has.
    """

    end: int
    files: int
    size_bytes: int
    chunks: int
    weight: int
    name_at: int
    name_length: int
    mode_bits: int


class Columns(NamedTuple):
    """What a block holds, kind by kind.

    Attributes:
        names: with NUL behind each.
        packed: of each file five native int64: bytes of its packed chunks, size, mode, mtime_ns, and where its entry
            ends in the block's bytes.
        chunks: of all files, packed, one behind the other.
    """

    names: bytes
    packed: bytes
    chunks: bytes

    @property
    def numbers(self) -> memoryview[int]:
        """`packed` as numbers."""
        return memoryview(self.packed).cast("q")

    @property
    def lengths(self) -> list[int]:
        """Bytes of each chunk of all files."""
        return [length for (length,) in UNPACK_LENGTHS(self.chunks)]

    @property
    def ids(self) -> list[bytes]:
        """The ids of all chunks."""
        chunks = self.chunks
        return [chunks[at : at + ID_BYTES] for at in range(4, len(chunks), CHUNK_BYTES)]


class Parser(Protocol):
    """Looks over the bytes of entries."""

    def segments(self, data: bytes, count: int, weight: int) -> list[Segment]:
        """Segments of what follows `count` entries of `weight` on a page; none where it is no block."""

    def columns(self, data: bytes, entries: int) -> Columns:
        """The columns of a block of so many entries."""


class Block:
    """Consecutive plain files of one directory.

    Attributes:
        data: MessagePack, as `encode` makes of the list of entries.
        parser: what looked it over.
        segments: where pages end that begin with it; the last one ends with the block, not by a cut, and may be empty.
        count, size_bytes, chunks, mode_bits: of all its entries.
    """

    __slots__ = (
        "_columns",
        "_entries",
        "_names",
        "chunks",
        "count",
        "data",
        "mode_bits",
        "parser",
        "segments",
        "size_bytes",
    )

    def __init__(self, data: bytes, segments: list[Segment], parser: Parser) -> None:
        self.data = data
        self.segments = segments
        self.parser = parser
        self._entries: list[Entry] | None = None
        self._columns: Columns | None = None
        self._names: list[bytes] | None = None
        if len(segments) == 1:
            one = segments[0]
            self.count, self.size_bytes, self.chunks, self.mode_bits = one[1], one[2], one[3], one[7]
            return
        self.count = self.size_bytes = self.chunks = self.mode_bits = 0
        for one in segments:
            self.count += one.files
            self.size_bytes += one.size_bytes
            self.chunks += one.chunks
            self.mode_bits |= one.mode_bits

    @classmethod
    def parse(cls, data: bytes, parser: Parser | None = None) -> Block | None:
        """The block of these bytes, if they are one."""
        parser = parser or PYTHON
        segments = parser.segments(data, 0, 0)
        return cls(data, segments, parser) if segments else None

    def __len__(self) -> int:
        return self.count

    @property
    def is_one_page(self) -> bool:
        """Whether its bytes are those of a page, where nothing stands before or after it in its directory."""
        return len(self.segments) == 1 or (len(self.segments) == 2 and not self.segments[1].files)

    @property
    def begin(self) -> int:
        """Where the first entry begins in the bytes."""
        return _head_bytes(self.count)

    @property
    def first_name(self) -> bytes:
        """The name of the first entry."""
        at = self.begin + 3
        return self.data[at : at + self.data[at - 1]]

    @property
    def last_name(self) -> bytes:
        """The name of the last entry."""
        one = self.segments[-1] if self.segments[-1].files else self.segments[-2]
        return self.data[one.name_at : one.name_at + one.name_length]

    @property
    def entries(self) -> list[Entry]:
        """Its entries; made when first asked for."""
        if self._entries is None:
            self._entries = decode(self.data)
        return self._entries

    @property
    def columns(self) -> Columns:
        """Its columns; made when first asked for."""
        if self._columns is None:
            self._columns = self.parser.columns(self.data, self.count)
        return self._columns

    @property
    def names(self) -> list[bytes]:
        """The names of its entries."""
        if self._names is None:
            self._names = self.columns.names.split(b"\0")[:-1]
        return self._names

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return self.columns.numbers[1::5].tolist()

    @property
    def chunk_counts(self) -> list[int]:
        """How many chunks each file has."""
        if self.chunks == self.count and 0 not in self.columns.numbers[::5].tolist():
            return [1] * self.count
        return [size // CHUNK_BYTES for size in self.columns.numbers[::5]]

    @property
    def chunk_lengths(self) -> list[int]:
        """Bytes of each chunk of all files."""
        return self.columns.lengths

    @property
    def chunk_ids(self) -> list[bytes]:
        """The ids of all chunks."""
        return self.columns.ids

    def same_content(self, other: Block) -> bool:
        """Whether these are files of the same names, sizes and chunks."""
        own, theirs = self.columns, other.columns
        return own.names == theirs.names and own.chunks == theirs.chunks and self.sizes == other.sizes

    def segments_after(self, count: int, weight: int) -> list[Segment]:
        """Its segments where a page has so many entries of this weight already."""
        return self.segments if not count else self.parser.segments(self.data, count, weight)

    def end_of(self, index: int) -> int:
        """Where in the bytes the first `index` entries end."""
        return self.columns.numbers[5 * index - 1] if index else self.begin

    def parts(self, most_entries: int, most_chunks: int) -> Iterator[Block]:
        """Itself, in blocks of at most so many entries, each closed once it has so many chunks."""
        if self.count <= most_entries and self.chunks <= most_chunks:
            yield self
            return
        numbers = self.columns.numbers
        start = 0
        while start < self.count:
            end, chunks = start, 0
            while end < self.count and end - start < most_entries and chunks < most_chunks:
                chunks += numbers[5 * end] // CHUNK_BYTES
                end += 1
            yield self.part(start, end)
            start = end

    def part(self, first: int, last: int) -> Block:
        """The block of its entries from `first` on, before `last`; there must be one."""
        if first == 0 and last == self.count:
            return self
        data = list_head(last - first) + self.data[self.end_of(first) : self.end_of(last)]
        part = Block.parse(data, self.parser)
        assert part is not None
        return part


def join_blocks(blocks: Sequence[Block]) -> bytes:
    """The bytes of blocks that follow each other, as of one; they are one where they are of one directory."""
    if len(blocks) == 1:
        return blocks[0].data
    return list_head(sum(map(len, blocks))) + b"".join([block.data[block.begin :] for block in blocks])


def join_columns(blocks: Sequence[Block]) -> Columns:
    """What blocks hold, of several directories or of one, those of one behind those of the other."""
    if len(blocks) == 1:
        return blocks[0].columns
    return blocks[0].parser.columns(join_blocks(blocks), sum(map(len, blocks)))


def list_head(count: int) -> bytes:
    """What MessagePack has before so many items of a list."""
    if count < 16:
        return bytes([0x90 | count])
    return b"\xdc" + count.to_bytes(2, "big") if count < 65536 else b"\xdd" + count.to_bytes(4, "big")


def _head_bytes(count: int) -> int:
    return 1 if count < 16 else 3 if count < 65536 else 5


class _Python:
    """The parser that needs no compiler."""

    def segments(self, data: bytes, count: int, weight: int) -> list[Segment]:
        try:
            entries = decode(data)
        except (msgspec.DecodeError, RecursionError, OverflowError):
            return []
        if not entries or encode(entries) != data:
            return []
        if any(e.kind != FILE or e.link or e.flags or e.extra or e.runs or e.depth for e in entries):
            return []
        try:
            check_entries(entries, b"", b"", _PLAIN)
        except ProtocolError:
            return []
        weights = [40 + len(e.name) + len(e.chunks) for e in entries]
        made: list[Segment] = []
        start = 0
        at = _head_bytes(len(entries))
        for end in (*page_ends([crc32(e.name) for e in entries], weights, count, weight), len(entries)):
            some = entries[start:end]
            begin = at
            for entry in some:
                begin, at = at, at + len(encode(entry))
            made.append(
                Segment(
                    at,
                    len(some),
                    sum([e.size for e in some]),
                    sum([len(e.chunks) for e in some]) // CHUNK_BYTES,
                    sum(weights[start:end]),
                    begin + 3 if some else 0,
                    len(some[-1].name) if some else 0,
                    _union([e.mode for e in some]),
                )
            )
            start = end
        return made

    def columns(self, data: bytes, entries: int) -> Columns:
        rows = decode(data)
        numbers: list[int] = []
        at = _head_bytes(entries)
        for entry in rows:
            at += len(encode(entry))
            numbers += (len(entry.chunks), entry.size, entry.mode, entry.mtime_ns, at)
        return Columns(
            b"".join([entry.name + b"\0" for entry in rows]),
            struct.pack(f"={len(numbers)}q", *numbers),
            b"".join([entry.chunks for entry in rows]),
        )


def _union(modes: list[int]) -> int:
    bits = 0
    for mode in modes:
        bits |= mode
    return bits


PYTHON: Final[Parser] = _Python()
