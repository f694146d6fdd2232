"""Reading a manifest file: from its end down, checking every piece that is looked at and no other.

A reader trusts nothing in the file. Bytes that are not what was written give `IntegrityError`; bytes that
were written so but cannot be true (sizes that do not add up, names out of order) give `ProtocolError`. What
`walk` has yielded is true as far as it went; that nothing is missing is known when it ends.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeVar

from blake3 import blake3

from flowengine.chunking import CHUNK_BYTES
from flowengine.errors import IntegrityError, NotFound, ProtocolError, UsageError
from flowengine.manifest.build import MAX_DEPTH, Summary
from flowengine.manifest.cut import is_closed, is_run_cut_right, measure_run
from flowengine.manifest.entries import (
    DIRECTORY,
    FILE,
    HARDLINK,
    MAX_CHUNK_BYTES,
    MAX_INLINE_ITEMS,
    RUN_BYTES,
    UNPACK_LENGTHS,
    UNPACK_RUNS,
    Entry,
    Header,
    Kind,
    Root,
    Subdirectory,
    Totals,
    check_extra,
    damaged,
    decode_canonical,
    decode_root_fields,
    join,
    lie,
)
from flowengine.manifest.records import (
    END_MAGIC,
    FILE_CONTEXT,
    FOOTER,
    MAGIC,
    RECORD,
    RecordReader,
)
from flowengine.units import MIB, show_path

__all__ = ["ManifestReader", "directory_entry"]

_T = TypeVar("_T", Entry, Subdirectory)
_MIN_ENTRY_BYTES: Final = 18  # of an entry with a name of one byte, everything else zero or empty
_MAX_SEEN: Final = 100_000
_MIN_FILE_BYTES: Final = len(MAGIC) + 3 * RECORD.size + FOOTER.size


class _Place(NamedTuple):
    """A directory, where its node is, and the offset that the node must lie below."""

    claim: Subdirectory
    offset: int
    before: int


class _Run(NamedTuple):
    """A run as something names it; two equal ones need one check."""

    run_id: bytes
    size: int
    chunks: int
    offset: int
    level: int
    last: bool


class _Frame:
    """A directory that is being walked."""

    __slots__ = ("items", "path", "place", "totals")

    def __init__(self, path: bytes, place: _Place) -> None:
        self.path = path
        self.place = place
        self.totals = Totals()
        self.items: Iterator[list[Entry] | _Place] = iter(())


class ManifestReader:
    """A manifest file, opened for reading.

    Opening reads the header and the end of the file. Memory: the page at hand and the page ids of the
    directories above it. Not for two threads at once.

    Args:
        read_at: Gives `length` bytes from `offset`, fewer only at the file's end: `os.pread` on a descriptor.
        size: Bytes of the file.
        version_id: The version it must be, where the caller knows.

    Attributes:
        summary: Version id and totals. The id holds once opened; the totals hold once walked.
        header: Chunking profile and options.
        root: The root directory, with an empty name.
        records: Single records; counts what was read in `records.records_read`.

    Raises:
        IntegrityError: not a whole manifest file, or another version.
        ProtocolError: a format that this version does not know.
    """

    def __init__(
        self, read_at: Callable[[int, int], bytes], size: int, version_id: bytes | None = None
    ) -> None:
        if size < _MIN_FILE_BYTES:
            raise damaged(f"{size} bytes are too few for a manifest; it was cut off or is something else")
        self.records = records = RecordReader(read_at, size)
        if records.read(0, len(MAGIC)) != MAGIC:
            raise damaged("it does not begin as a manifest file")
        root_at, found, self._checksum, magic = FOOTER.unpack(records.read(records.end, FOOTER.size))
        if magic != END_MAGIC:
            raise damaged("its end is missing: it was cut off, or is still being written")
        if version_id is not None and version_id != found:
            raise IntegrityError(
                f"the manifest is of version {found.hex()}, not {version_id.hex()}",
                hint="fetch the manifest of the version that you mean",
            )
        body, offsets = records.record(Kind.ROOT, root_at, found, records.end)
        header, _ = records.record(Kind.HEADER, len(MAGIC), None, root_at)
        root: Root = decode_canonical(decode_root_fields, body, "root")
        if root.header != header or len(offsets) != 1:
            raise damaged("its header and its end do not belong together")
        self.header = records.header = Header.decode(header)
        if not self.header.root_attributes and (root.mode or root.mtime_ns or root.extra):
            lie(b"", b"", "attributes of the root are given and said not to be")
        if root.extra:
            check_extra(root.extra, b"", b"", self.header)
        if (root.objects + root.directories) * _MIN_ENTRY_BYTES > size:
            lie(
                b"",
                b"",
                f"{root.objects} objects and {root.directories} directories do not fit into {size} bytes",
            )
        claim = Subdirectory(
            b".", root.mode, root.mtime_ns, root.node_id,
            root.objects, root.directories, root.size, root.chunks, root.extra,
        )  # fmt: skip
        self.top = _Place(claim, offsets[0], root_at)
        self.root = Entry(b"", DIRECTORY, root.mode, root.mtime_ns, root.size, extra=root.extra)
        self.summary = Summary(found, root.objects, root.directories, root.size, root.chunks)

    # ---- everything ----------------------------------------------------------------------------------------

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Entry]]:
        """Everything below `path`: (directory's path from the root, entry) in manifest order.

        A subdirectory comes as an entry of kind `DIRECTORY`, before what is in it.

        Raises:
            NotFound: `path` is no directory of this version.
            IntegrityError, ProtocolError: the manifest is damaged or lies; what was yielded so far is right.
        """
        for directory, entries in self.pages(path):
            for entry in entries:
                yield directory, entry

    def pages(self, path: bytes = b"") -> Iterator[tuple[bytes, list[Entry]]]:
        """As `walk`, some entries of one directory at a time."""
        start = self._directory(path)
        left = start.claim.objects + start.claim.directories
        stack = [self._frame(path, start)]
        while stack:
            frame = stack[-1]
            item = next(frame.items, None)
            if item is None:
                if frame.totals != _claimed(frame.place.claim):
                    lie(
                        frame.path,
                        b"",
                        f"its totals are {_claimed(frame.place.claim)}, it holds {frame.totals}",
                    )
                stack.pop()
                continue
            entries = item if isinstance(item, list) else [directory_entry(item.claim)]
            left -= len(entries)
            if left < 0:  # a small file in which directories share nodes could otherwise be walked for ever
                lie(frame.path, entries[0].name, "more lies below it than the totals say")
            yield frame.path, entries
            if isinstance(item, _Place):
                if len(stack) >= MAX_DEPTH:
                    lie(frame.path, item.claim.name, f"it is more than {MAX_DEPTH} directories deep")
                stack.append(self._frame(join(frame.path, item.claim.name), item))

    def verify(self) -> Summary:
        """The summary, after every byte of the file and every statement in it was checked.

        Raises:
            IntegrityError, ProtocolError: the manifest is damaged or lies.
        """
        checksum = blake3(derive_key_context=FILE_CONTEXT)
        covered = self.records.end + 40
        for offset in range(0, covered, MIB):
            checksum.update(self.records.read(offset, min(MIB, covered - offset)))
        if checksum.digest() != self._checksum:
            raise damaged("its checksum is wrong")
        seen: dict[_Run, int] = {}
        for directory, entries in self.pages():
            for entry in entries:
                if entry.depth:
                    for _ in self._chunks(directory, entry, seen):
                        pass
                    if len(seen) > _MAX_SEEN:
                        seen.clear()
                elif entry.kind == HARDLINK and not self._is_file(entry.link):
                    lie(directory, entry.name, f"its first name {show_path(entry.link)!r} is not a file")
        return self.summary

    def _is_file(self, path: bytes) -> bool:
        try:
            return self.lookup(path).kind == FILE
        except NotFound:
            return False

    def _frame(self, path: bytes, place: _Place) -> _Frame:
        frame = _Frame(path, place)
        frame.items = self._items(frame)
        return frame

    def _items(self, frame: _Frame) -> Iterator[list[Entry] | _Place]:
        """What one directory holds, in order, every rule that spans its pages checked."""
        path, place = frame.path, frame.place
        node = self.records.node(place.claim.node_id, place.offset, place.before, path)
        firsts: list[bytes] = []
        names: set[bytes] = set()
        last, closed = b"", True
        for identity, at in node.entries:
            page = self.records.entry_page(identity, at, place.offset, path, last)
            closed = _check_cut(page.entries, path, closed)
            last = page.entries[-1].name
            firsts.append(page.entries[0].name)
            frame.totals = frame.totals.plus(Totals(len(page.entries), 0, page.size, page.chunks))
            if node.subdirectories:
                names = {entry.name for entry in page.entries}
            yield page.entries
        last, closed, current = b"", True, len(firsts) - 1
        for identity, at in node.subdirectories:
            subdirectories = self.records.subdirectory_page(identity, at, place.offset, path, last)
            closed = _check_cut(subdirectories.entries, path, closed)
            last = subdirectories.entries[-1].name
            for claim, below in zip(*subdirectories, strict=True):
                # No name twice: the page that would have it is at hand, or is read again.
                page_number = bisect_right(firsts, claim.name) - 1
                if page_number >= 0 and page_number != current:
                    current = page_number
                    page = self.records.entry_page(*node.entries[current], place.offset, path)
                    names = {entry.name for entry in page.entries}
                if page_number >= 0 and claim.name in names:
                    lie(path, claim.name, "it is there twice, as a directory and as something else")
                frame.totals = frame.totals.plus(_claimed(claim)).plus(Totals(directories=1))
                yield _Place(claim, below, place.offset)

    # ---- single things -------------------------------------------------------------------------------------

    def lookup(self, path: bytes) -> Entry:
        """The entry at `path`; costs a few page reads for each directory on the way.

        Raises:
            NotFound: there is none.
        """
        if not path:
            return self.root
        directory, slash, name = path.rpartition(b"/")
        if slash and not directory:
            raise NotFound(f"{show_path(path)!r} is not a path from the root", path=show_path(path))
        place = self._directory(directory)
        found = self._find_entry(place, directory, name)
        if found is not None:
            return found[0]
        below = self._find_directory(place, directory, name)
        if below is None:
            raise NotFound(f"{show_path(path)!r} is not in this version", path=show_path(path))
        return directory_entry(below.claim)

    def chunks(self, directory: bytes, entry: Entry) -> Iterator[bytes]:
        """The packed chunks of a file that `walk` or `lookup` gave, in pieces of bounded size.

        Args:
            directory: Path of the directory that has the entry.
            entry: The entry; links have no chunks.

        Raises:
            IntegrityError, ProtocolError: the manifest is damaged or lies about this file.
            UsageError: the entry is not of this manifest.
        """
        return self._chunks(directory, entry, None)

    def _chunks(self, directory: bytes, entry: Entry, seen: dict[_Run, int] | None) -> Iterator[bytes]:
        if not entry.depth:
            if entry.chunks:
                yield entry.chunks
            return
        place = self._directory(directory)
        found = self._find_entry(place, directory, entry.name)
        if found is None or found[0] != entry:
            raise UsageError(f"{show_path(join(directory, entry.name))!r} is not an entry of this manifest")
        _, offsets, page_at = found
        where = (directory, entry.name)
        items = 0
        for level, body, number in self._runs(where, entry.runs, offsets, page_at, entry.depth, True, seen):
            if level == entry.depth:
                items += number
            if level == 1 and body:
                yield body
        if items <= MAX_INLINE_ITEMS:
            lie(*where, "it has more levels of runs than it needs")

    def _runs(
        self, where: tuple[bytes, bytes], packed: bytes, offsets: tuple[int, ...], before: int, level: int,
        at_end: bool, seen: dict[_Run, int] | None,
    ) -> Iterator[tuple[int, bytes, int]]:  # fmt: skip
        """(level, run, number of its items) for each run named in `packed` and each below it, in order.

        A run in `seen` is not read again and comes as empty bytes: so checking a hostile manifest, in which
        all runs of a thousand huge objects are one, costs one run.
        """
        kind, item_bytes = (Kind.RUN, CHUNK_BYTES) if level == 1 else (Kind.RUN_LIST, RUN_BYTES)
        number = len(packed) // RUN_BYTES
        if len(offsets) != number:
            raise damaged(
                f"a run of {show_path(join(*where))!r} has {len(offsets)} offsets for {number} runs"
            )
        for position, ((run_id, size, count), at) in enumerate(
            zip(UNPACK_RUNS(packed), offsets, strict=True), 1
        ):
            last = at_end and position == number
            run = _Run(run_id, size, count, at, level, last)
            if seen is not None and run in seen:
                yield level, b"", seen[run]
                continue
            body, below = self.records.record(kind, at, run_id, before)
            if not body or len(body) % item_bytes or measure_run(body, level - 1) != (size, count):
                lie(*where, f"a run of it does not hold {size} bytes in {count} chunks")
            if not is_run_cut_right(body, level - 1, last=last):
                lie(*where, "a run of it is cut at the wrong place")
            if level == 1 and not all(0 < length <= MAX_CHUNK_BYTES for (length,) in UNPACK_LENGTHS(body)):
                lie(*where, f"a chunk of it is empty or larger than {MAX_CHUNK_BYTES} bytes")
            yield level, body, len(body) // item_bytes
            if level > 1:
                yield from self._runs(where, body, below, at, level - 1, last, seen)
            if seen is not None:
                seen[run] = len(body) // item_bytes

    def _directory(self, path: bytes) -> _Place:
        place, walked = self.top, b""
        for name in path.split(b"/") if path else ():
            found = self._find_directory(place, walked, name)
            walked = join(walked, name)
            if found is None:
                raise NotFound(
                    f"{show_path(walked)!r} is not a directory of this version", path=show_path(walked)
                )
            place = found
        return place

    def _find_entry(
        self, place: _Place, where: bytes, name: bytes
    ) -> tuple[Entry, tuple[int, ...], int] | None:
        """The entry, the offsets of its runs, and the offset of its page."""
        pages = self.records.node(place.claim.node_id, place.offset, place.before, where).entries
        number = self._page_with(Kind.ENTRIES, pages, place, name)
        if number < 0:
            return None
        page = self.records.entry_page(*pages[number], place.offset, where)
        index = bisect_left(page.entries, name, key=_name)
        if index == len(page.entries) or page.entries[index].name != name:
            return None
        entry = page.entries[index]
        skipped = sum(len(e.runs) for e in page.entries[:index]) // RUN_BYTES
        return entry, page.offsets[skipped : skipped + len(entry.runs) // RUN_BYTES], pages[number][1]

    def _find_directory(self, place: _Place, where: bytes, name: bytes) -> _Place | None:
        pages = self.records.node(place.claim.node_id, place.offset, place.before, where).subdirectories
        number = self._page_with(Kind.SUBDIRECTORIES, pages, place, name)
        if number < 0:
            return None
        page = self.records.subdirectory_page(*pages[number], place.offset, where)
        index = bisect_left(page.entries, name, key=_name)
        if index == len(page.entries) or page.entries[index].name != name:
            return None
        return _Place(page.entries[index], page.offsets[index], place.offset)

    def _page_with(self, kind: Kind, pages: list[tuple[bytes, int]], place: _Place, name: bytes) -> int:
        """Number of the one page that can have `name`: the last that does not begin after it; -1 for none."""
        if len(pages) == 1:
            return 0

        def first(page: tuple[bytes, int]) -> bytes:
            return self.records.first_name(kind, page[0], page[1], place.offset)

        return bisect_right(pages, name, key=first) - 1


def directory_entry(claim: Subdirectory) -> Entry:
    """A directory in the form of an entry; its size is that of all below it."""
    return Entry(claim.name, DIRECTORY, claim.mode, claim.mtime_ns, claim.size, extra=claim.extra)


def _name(entry: Entry | Subdirectory) -> bytes:
    return entry.name


def _claimed(claim: Subdirectory) -> Totals:
    return Totals(claim.objects, claim.directories, claim.size, claim.chunks)


def _check_cut(page: list[_T], where: bytes, previous_closed: bool) -> bool:
    closed = is_closed(page)
    if closed is None or not previous_closed:
        raise ProtocolError(
            f"the pages of {show_path(where)!r} are not cut by the rule",
            hint="whoever made this manifest is faulty or hostile: have it made again by a current version",
        )
    return closed
