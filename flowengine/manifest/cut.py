"""Where pages and runs end: cuts that depend on contents, so that a small change moves few of them.

Goal
    Two sides that see the same entries or chunks cut them alike, in whatever batches those arrive; after an
    insertion or removal, cuts fall into step again at once.
Plan
    A page of entries ends after an entry that its own name and weight choose (one in 256, or one in 64 KiB of
    weight), or at a bound. A run of chunks ends after a chunk that its own id chooses (one in 512), or at a
    bound.
Invariants
    - Whether a list ends after an item depends on that list alone, never on what follows: so a reader can
      tell a wrongly cut page or run from the page or run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast
from zlib import crc32

from flowengine.chunking import CHUNK_BYTES
from flowengine.errors import ProtocolError
from flowengine.manifest.entries import (
    MAX_CHUNK_BYTES,
    MAX_INLINE_ITEMS,
    MAX_PAGE_ENTRIES,
    MAX_RUN_DEPTH,
    PACK_RUN,
    RUN_BYTES,
    UNPACK_LENGTHS,
    UNPACK_RUNS,
    Entry,
    Subdirectory,
)

__all__ = ["ChunkList", "ChunkListBuilder", "ChunkRunCutter", "PageCutter", "cut_pages", "page_ends"]

PAGE_FULL_WEIGHT: Final = 128 << 10
"""A page ends with the entry that brings it to this weight; one entry more stays below MAX_PAGE_BYTES."""
_MIX: Final = 0x9E3779B1  # 2^32 / golden ratio: spreads CRCs of similar names (Knuth, TAOCP 3, 6.4)
_ALWAYS: Final = 1 << 24  # one name in 256
_LIGHT: Final = _ALWAYS >> 16
_VERY_LIGHT: Final = PAGE_FULL_WEIGHT // MAX_PAGE_ENTRIES - 1

MIN_RUN_ITEMS: Final = 64
MAX_RUN_ITEMS: Final = 2048
_RUN_MASK: Final = 511

T = TypeVar("T", Entry, Subdirectory)


def _weights(entries: Sequence[Entry] | Sequence[Subdirectory]) -> list[int]:
    """Upper bounds of the encoded sizes, cheap to know before encoding."""
    if isinstance(entries[0], Subdirectory):
        return [96 + len(e.name) + len(e.extra) for e in entries]
    files = cast(Sequence[Entry], entries)
    return [40 + len(e.name) + len(e.chunks) + len(e.link) + len(e.extra) + len(e.runs) for e in files]


def page_ends(sums: Sequence[int], weights: Sequence[int], count: int, total: int) -> list[int]:
    """Where pages end, as numbers of entries before the cut.

    Args:
        sums: CRC-32 of each entry's name.
        count, total: entries that the first page has already, and their weight.
    """
    ends: list[int] = []
    for position, (name_sum, weight) in enumerate(zip(sums, weights, strict=True), 1):
        count += 1
        total += weight
        if _ends_page(name_sum, weight, count, total):
            ends.append(position)
            count = total = 0
    return ends


def _ends_page(name_sum: int, weight: int, count: int, total: int) -> bool:
    """Whether a page ends with an entry, which brings it to so many of so much weight."""
    return (
        name_sum * _MIX & 0xFFFFFFFF < (_ALWAYS if weight <= _LIGHT else weight << 16)
        or count >= MAX_PAGE_ENTRIES
        or total >= PAGE_FULL_WEIGHT
    )


class PageCutter(Generic[T]):
    """Cuts one directory's sorted entries (or subdirectories) into pages as they arrive."""

    def __init__(self) -> None:
        self._page: list[T] = []
        self._weight = 0

    @property
    def waiting(self) -> int:
        """Entries that wait for the end of their page."""
        return len(self._page)

    def feed(self, entries: Sequence[T]) -> list[list[T]]:
        """The pages that are complete with `entries`."""
        if not entries:
            return []
        weights = _weights(entries)
        ends = self._light_ends(entries, weights)
        if ends is None:
            ends = self._ends(entries, weights)
        pages: list[list[T]] = []
        start = 0
        for end in ends:
            self._page.extend(entries[start:end])
            pages.append(self._page)
            self._page, self._weight, start = [], 0, end
        self._page.extend(entries[start:])
        self._weight += sum(weights[start:])
        return pages

    def add(self, entry: T) -> list[T]:
        """The page that is complete with one more entry; empty where none is."""
        (weight,) = _weights((entry,))
        self._page.append(entry)
        self._weight += weight
        return self.finish() if _ends_page(crc32(entry.name), weight, len(self._page), self._weight) else []

    def _ends(self, entries: Sequence[T], weights: list[int]) -> list[int]:
        """Where pages end, as numbers of `entries` before the cut."""
        return page_ends([crc32(entry.name) for entry in entries], weights, len(self._page), self._weight)

    def _light_ends(self, entries: Sequence[T], weights: list[int]) -> list[int] | None:
        """The same, quicker, where no bound can come into play; None where one might."""
        if max(weights) > _VERY_LIGHT or self._weight > _VERY_LIGHT * len(self._page):
            return None
        ends: list[int] = [
            at for at, e in enumerate(entries, 1) if crc32(e.name) * _MIX & 0xFFFFFFFF < _ALWAYS
        ]
        previous = -len(self._page)
        for end in (*ends, len(entries)):
            if end - previous >= MAX_PAGE_ENTRIES:
                return None
            previous = end
        return ends

    def finish(self) -> list[T]:
        """The entries that no cut follows: the directory's last page; empty where a cut ended it."""
        page, self._page, self._weight = self._page, [], 0
        return page


def cut_pages(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """The pages of one directory's entries, which come sorted by name.

    >>> entries = [Entry(b"%04d" % i, 0, 0o644, 0) for i in range(1000)]
    >>> [len(page) for page in cut_pages(entries)]
    [176, 124, 262, 206, 127, 10, 95]
    """
    cutter: PageCutter[Entry] = PageCutter()
    batch: list[Entry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == MAX_PAGE_ENTRIES:
            yield from cutter.feed(batch)
            batch = []
    yield from cutter.feed(batch)
    if last := cutter.finish():
        yield last


def is_closed(page: list[T]) -> bool | None:
    """Whether a cut follows the page's last entry; None when one stands inside it, where none may be."""
    cutter: PageCutter[T] = PageCutter()
    pages = cutter.feed(page)
    if not pages:
        return False
    return True if len(pages) == 1 and len(pages[0]) == len(page) else None


class ChunkRunCutter:
    """Cuts a packed list of chunks (or, for `level` 1 and up, of runs) into runs as it arrives."""

    def __init__(self, level: int = 0) -> None:
        self._item_bytes = CHUNK_BYTES if level == 0 else RUN_BYTES
        self._id_at = 4 if level == 0 else 0
        self._pending = bytearray()
        self._seen = 0

    def feed(self, packed: bytes) -> list[bytes]:
        """The runs that are complete with `packed`, a whole number of items."""
        pending, size = self._pending, self._item_bytes
        pending += packed
        if len(pending) % size:
            raise ProtocolError("a packed list of chunks is cut off")
        runs = []
        start, end, count = 0, self._seen * size, self._seen
        while end < len(pending):
            at = end + self._id_at
            end += size
            count += 1
            if count >= MIN_RUN_ITEMS and (
                (pending[at] | pending[at + 1] << 8) & _RUN_MASK == 0 or count >= MAX_RUN_ITEMS
            ):
                runs.append(bytes(pending[start:end]))
                start, count = end, 0
        del pending[:start]
        self._seen = count
        return runs

    def finish(self) -> list[bytes]:
        """The last run, which no cut follows, if there is one."""
        last = bytes(self._pending)
        self._pending.clear()
        self._seen = 0
        return [last] if last else []


class ChunkList(NamedTuple):
    """The chunks of one object in the form that its entry has them: `Entry(..., **chunk_list.fields())`."""

    size: int
    chunk_count: int
    chunks: bytes = b""
    runs: bytes = b""
    depth: int = 0

    def fields(self) -> dict[str, Any]:
        """The entry's fields that tell its content, by name."""
        return {"size": self.size, "chunks": self.chunks, "runs": self.runs, "depth": self.depth}


class ChunkListBuilder:
    """Collects the chunks of one object, however many, in bounded memory.

    Args:
        add_run: Is given each finished run and its level (1: of chunks, 2: of runs, …), gives its id;
            `ManifestBuilder.add_run`.
    """

    def __init__(self, add_run: Callable[[bytes, int], bytes]) -> None:
        self._add_run = add_run
        self._size = self._count = 0
        # items[n] holds what level n has while that fits an entry; then a cutter takes the level over.
        self._items = [bytearray()]
        self._cutters: list[ChunkRunCutter] = []

    def feed(self, packed: bytes) -> None:
        """Take the next chunks, packed.

        Raises:
            ProtocolError: `packed` is not a whole number of chunks, or the object has more than can be told.
        """
        if len(packed) % CHUNK_BYTES:
            raise ProtocolError("a packed list of chunks is cut off")
        lengths = [length for (length,) in UNPACK_LENGTHS(packed)]
        if lengths and not 0 < min(lengths) <= max(lengths) <= MAX_CHUNK_BYTES:
            raise ProtocolError(f"a chunk is empty or larger than {MAX_CHUNK_BYTES} bytes")
        self._size += sum(lengths)
        self._count += len(lengths)
        self._push(0, packed)

    def _push(self, level: int, packed: bytes) -> None:
        if level < len(self._cutters):
            runs = self._cutters[level].feed(packed)
        else:
            items = self._items[level]
            items += packed
            if len(items) <= MAX_INLINE_ITEMS * (CHUNK_BYTES if level == 0 else RUN_BYTES):
                return
            if level == MAX_RUN_DEPTH:
                raise ProtocolError("an object has more chunks than a manifest can hold")
            self._cutters.append(ChunkRunCutter(level))
            self._items.append(bytearray())
            runs = self._cutters[level].feed(bytes(items))
            items.clear()
        for run in runs:
            self._close(level, run)

    def _close(self, level: int, run: bytes) -> None:
        size, count = measure_run(run, level)
        self._push(level + 1, PACK_RUN(self._add_run(run, level + 1), size, count))

    def finish(self) -> ChunkList:
        """The object's size, number of chunks and list."""
        level = 0
        while level < len(self._cutters):  # the last runs of a level can fill the next one up
            for run in self._cutters[level].finish():
                self._close(level, run)
            level += 1
        top = bytes(self._items[-1])
        if not self._cutters:
            return ChunkList(self._size, self._count, chunks=top)
        return ChunkList(self._size, self._count, runs=top, depth=level)


def measure_run(run: bytes, level: int) -> tuple[int, int]:
    """Bytes of the object and number of chunks in a run whose items are of `level` (0: chunks)."""
    if level == 0:
        return sum(length for (length,) in UNPACK_LENGTHS(run)), len(run) // CHUNK_BYTES
    size = count = 0
    for _, run_size, run_count in UNPACK_RUNS(run):
        size += run_size
        count += run_count
    return size, count


def is_run_cut_right(run: bytes, level: int, *, last: bool) -> bool:
    """Whether a run ends at the first cut in it (or, the last of its list, has none or only that)."""
    cutter = ChunkRunCutter(level)
    runs = cutter.feed(run)
    if not runs:
        return last
    return len(runs) == 1 and len(runs[0]) == len(run)
