"""Building a manifest: entries in, ids and (where wanted) a file out, streaming.

Order of calls: `begin_directory(b"")`; a directory's entries in name order; then its subdirectories in name
order, each from its `begin_directory` to its `end_directory`; `end_directory`; at last `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from blake3 import blake3

from flowengine.chunking import CHUNK_BYTES
from flowengine.errors import IntegrityError, ProtocolError, UsageError
from flowengine.manifest.block import Block, decode, list_head
from flowengine.manifest.cut import ChunkListBuilder, PageCutter, is_closed
from flowengine.manifest.entries import (
    MAX_INT,
    MAX_NODE_PAGES,
    UNPACK_RUNS,
    Entry,
    Header,
    Kind,
    Node,
    Root,
    Subdirectory,
    Totals,
    check_entries,
    check_extra,
    decode_page,
    digest,
    digests,
    encode,
    is_name,
    join,
    lie,
)
from flowengine.manifest.records import END_MAGIC, FILE_CONTEXT, FOOTER, MAGIC, RECORD
from flowengine.units import show_path

__all__ = ["MAX_DEPTH", "Leaf", "ManifestBuilder", "Page", "Summary"]

_PIECE_BYTES: Final = 64 << 10
MAX_DEPTH: Final = 1024
"""Directories within directories; PATH_MAX allows 2048 on Linux."""


class Summary(NamedTuple):
    """What a version holds. `directories` does not count the root."""

    version_id: bytes
    objects: int
    directories: int
    size_bytes: int
    chunks: int


class Page(NamedTuple):
    """A page that was added: its id, its canonical bytes, and what it holds."""

    page_id: bytes
    data: bytes
    objects: int
    size_bytes: int
    chunks: int


class Leaf(NamedTuple):
    """A directory that has none in it: its name, mode and mtime, and its files if it has some."""

    name: bytes
    mode: int
    mtime_ns: int
    block: Block | None


class _Open:
    """A directory between its begin and its end."""

    __slots__ = (
        "cutter", "doubtful", "entries_ended", "entry_ids", "entry_offsets", "last_directory", "last_name", "name", "open_page", "packed",
        "packed_count", "packed_name", "packed_totals", "packed_weight", "path", "subdirectories", "subdirectory_ids",
        "subdirectory_offsets", "totals", "waiting_offsets",
    )  # fmt: skip

    def __init__(self, name: bytes, path: bytes) -> None:
        self.name = name
        self.path = path
        self.totals = Totals()
        # Many directories have few entries, or no subdirectories: what cuts them is made when something comes.
        self.cutter: PageCutter[Entry] | None = None
        self.entries_ended = False  # the first subdirectory began
        self.doubtful = False  # entries came that nobody has checked
        self.open_page = False  # the last page has no cut at its end, so none may follow
        self.last_name = self.last_directory = b""
        # Of a page that is not full, what came in blocks; then the cutter holds nothing.
        self.packed: list[bytes] = []
        self.packed_count = self.packed_weight = 0
        self.packed_totals = (0, 0)
        self.packed_name = b""
        self.entry_ids: list[bytes] = []
        self.entry_offsets: list[int] = []
        self.subdirectories: PageCutter[Subdirectory] | None = None
        self.waiting_offsets: list[int] = []
        self.subdirectory_ids: list[bytes] = []
        self.subdirectory_offsets: list[int] = []


class ManifestBuilder:
    """Builds one version's manifest from its entries, in manifest order.

    Not for two threads at once. After an error the builder is of no further use.

    Args:
        sink: Is given the bytes of the manifest file, piece after piece; None where only the ids are wanted.
        header: Chunking profile and options; two manifests compare equal only under equal headers.

    >>> builder = ManifestBuilder()
    >>> builder.begin_directory(b"")
    >>> _ = builder.add_page([Entry(b"empty", 0, 0o644, 0)])
    >>> _ = builder.end_directory(0o755, 0)
    >>> builder.finish().objects
    1
    """

    def __init__(self, sink: Callable[[bytes], object] | None = None, header: Header | None = None) -> None:
        self._sink = sink
        self._header = header if header is not None else Header()
        self._offset = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._checksum = blake3(derive_key_context=FILE_CONTEXT)
        self._stack: list[_Open] = []
        # Places of runs that no page has named yet, and how many times each was added since.
        self._runs: dict[bytes, tuple[int, int]] = {}
        self._root: tuple[Subdirectory, int] | None = None
        self._finished = False
        if sink is not None:
            self._emit(len(MAGIC), MAGIC)
        self._write(Kind.HEADER, self._header.encode())

    # ---- bytes ---------------------------------------------------------------------------------------------

    def _emit(self, size_bytes: int, *parts: bytes) -> None:
        """Append parts that are so many bytes together."""
        self._offset += size_bytes
        self._waiting += parts
        self._waiting_bytes += size_bytes
        if self._waiting_bytes >= _PIECE_BYTES:
            self._give()

    def _give(self) -> None:
        """Hand what waits to the sink: records are some hundred bytes each, and many."""
        if self._sink is not None and self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._checksum.update(data)
            self._sink(data)

    def _write(self, kind: Kind, body: bytes, places: Sequence[int] = ()) -> int:
        """Append a record, with the offsets of what it names; gives its own."""
        offset = self._offset
        if self._sink is not None:
            locator = b"".join([place.to_bytes(8, "little") for place in places])
            head = RECORD.pack(kind, len(body), len(locator))
            self._emit(RECORD.size + len(body) + len(locator), head, body, locator)
        return offset

    # ---- runs of large objects -----------------------------------------------------------------------------

    def new_object(self) -> ChunkListBuilder:
        """Takes the chunk list of one object of any size; `finish().fields()` go into the object's entry."""
        return ChunkListBuilder(self.add_run)

    def add_run(self, run: bytes, level: int = 1) -> bytes:
        """Keep one run of a large object's chunk list (or, from level 2 on, of its runs); gives its id.

        Must come before the page that has the object. Runs of several objects may come mixed; where they do,
        the file's bytes depend on that order, the version id never.
        """
        kind = Kind.RUN if level == 1 else Kind.RUN_LIST
        run_id = digest(kind, run)
        if self._sink is None:
            return run_id
        locator = self._place_runs(run, b"a run list") if level > 1 else ()
        offset, times = self._runs.get(run_id, (0, 0))
        if not times:
            offset = self._write(kind, run, locator)
        self._runs[run_id] = (offset, times + 1)
        return run_id

    def _place_runs(self, packed: bytes, where: bytes) -> list[int]:
        """Where the runs of a packed list lie, each of which was added once for each time it is named."""
        offsets: list[int] = []
        for run_id, _, _ in UNPACK_RUNS(packed):
            offset, times = self._runs.get(run_id, (0, 0))
            if not times:
                raise UsageError(f"{show_path(where)!r} names a run of chunks that was not added before it")
            if times == 1:
                del self._runs[run_id]
            else:
                self._runs[run_id] = (offset, times - 1)
            offsets.append(offset)
        return offsets

    # ---- the tree ------------------------------------------------------------------------------------------

    def begin_directory(self, name: bytes) -> None:
        """What follows lies in the subdirectory `name` of the current directory; the root's name is empty.

        Raises:
            ProtocolError: not a name, out of order, or too deep.
        """
        if self._finished or (self._root is not None and not self._stack):
            raise UsageError("the manifest's root directory was closed already")
        if not self._stack:
            if name:
                raise ProtocolError(f"the first directory must be the root, not {show_path(name)!r}")
            self._stack.append(_Open(b"", b""))
            return
        parent = self._next_subdirectory(name)
        self._stack.append(_Open(name, join(parent.path, name)))

    def _next_subdirectory(self, name: bytes) -> _Open:
        """The current directory, which may have a subdirectory of this name next."""
        parent = self._stack[-1]
        if not is_name(name):
            lie(parent.path, name, "that is not a name of one path component")
        if not parent.last_directory < name:
            lie(parent.path, name, f"it stands after {show_path(parent.last_directory)!r}: names must rise")
        if len(self._stack) >= MAX_DEPTH:
            lie(parent.path, name, f"it is more than {MAX_DEPTH} directories deep")
        self._finish_entries(parent)
        parent.last_directory = name
        return parent

    def add_entries(self, entries: Sequence[Entry], *, check: bool = True) -> None:
        """Add the next entries of the current directory, in any number; pages are cut here.

        Args:
            check: False where they come out of a decoder and `check_entries` has passed them: spares the same checks.

        Raises:
            ProtocolError: an entry contradicts itself or stands out of order.
        """
        directory = self._current()
        if directory.open_page:
            raise ProtocolError(f"entries follow the last page of {show_path(directory.path)!r}")
        directory.doubtful = directory.doubtful or check
        if directory.packed:
            waiting = decode(list_head(directory.packed_count) + b"".join(directory.packed))
            self._forget_packed(directory)
            entries = [*waiting, *entries]
        if directory.cutter is None:
            directory.cutter = PageCutter()
        for page in directory.cutter.feed(entries):
            self._store(directory, page, None, check=directory.doubtful)

    def add_block(self, block: Block) -> None:
        """Add the next entries of the current directory, which are a block: it is cut as it is.

        Raises:
            ProtocolError: it stands out of order.
        """
        directory = self._current()
        if directory.cutter is not None and directory.cutter.waiting:
            self.add_entries(block.entries, check=False)
            return
        if directory.open_page:
            raise ProtocolError(f"entries follow the last page of {show_path(directory.path)!r}")
        if not (directory.packed_name or directory.last_name) < block.first_name:
            lie(directory.path, block.first_name, "it stands out of order")
        data, start = block.data, block.begin
        *closed, rest = block.segments_after(directory.packed_count, directory.packed_weight)
        for one in (*closed, rest) if rest.files else closed:
            directory.packed.append(data[start : one.end])
            directory.packed_count += one.files
            size, chunks = directory.packed_totals
            directory.packed_totals = size + one.size_bytes, chunks + one.chunks
            directory.packed_name = data[one.name_at : one.name_at + one.name_length]
            start = one.end
            if one is not rest:
                self._store_packed(directory)
        directory.packed_weight += rest.weight

    def add_page(self, entries: Sequence[Entry]) -> Page:
        """Add one page of the current directory, cut as `cut_pages` cuts.

        Raises:
            ProtocolError: an entry contradicts itself, stands out of order, or the page is cut otherwise.
        """
        directory = self._page_may_follow()
        page = list(entries)
        if not page:
            raise ProtocolError(f"a page of {show_path(directory.path)!r} is empty")
        self._close_page(directory, page)
        return self._store(directory, page, None)

    def add_encoded_page(self, data: bytes, page_id: bytes | None = None, *, check: bool = True) -> Page:
        """Add one page of the current directory from its bytes.

        Args:
            data: The page's canonical bytes.
            page_id: The id it must have, where one was told.
            check: False only for bytes that a builder of this process made: spares the checks of entries and
                of the canonical form, not that of order.

        Raises:
            IntegrityError: the bytes do not have that id.
            ProtocolError: as for `add_page`, or not canonical.
        """
        directory = self._page_may_follow()
        entries = decode_page(data, directory.path, canonical=check)
        found = digest(Kind.ENTRIES, data)
        if page_id is not None and found != page_id:
            raise IntegrityError(
                f"a page of {show_path(directory.path)!r} does not have the hash {page_id.hex()}"
            )
        self._close_page(directory, entries)
        return self._store(directory, entries, data, check=check)

    def end_directory(self, mode: int, mtime_ns: int, extra: bytes = b"") -> bytes:
        """Close the current directory; gives its node id.

        Raises:
            ProtocolError: mode, time or extra out of range.
        """
        directory = self._current(subdirectories=True)
        self._finish_entries(directory)
        if directory.subdirectories is not None and (last := directory.subdirectories.finish()):
            self._store_subdirectories(directory, last)
        if len(directory.entry_ids) + len(directory.subdirectory_ids) > MAX_NODE_PAGES:
            raise UsageError(
                f"the directory {show_path(directory.path)!r} has too many entries for a manifest",
                hint="spread its files over subdirectories",
            )
        body = encode(Node(b"".join(directory.entry_ids), b"".join(directory.subdirectory_ids)))
        node_id = digest(Kind.NODE, body)
        offset = self._write(Kind.NODE, body, directory.entry_offsets + directory.subdirectory_offsets)
        self._stack.pop()
        above = self._stack[-1].path if self._stack else b""
        self._check_attributes(above, directory.name, mode, mtime_ns, directory.totals)
        if extra:
            check_extra(extra, above, directory.name, self._header)
        entry = Subdirectory(directory.name, mode, mtime_ns, node_id, *directory.totals, extra)
        if not self._stack:
            self._root = (entry, offset)
            return node_id
        self._add_subdirectory(self._stack[-1], entry, offset)
        return node_id

    @staticmethod
    def _check_attributes(above: bytes, name: bytes, mode: int, mtime_ns: int, totals: Totals) -> None:
        if not 0 <= mode <= 0o7777 or not -(2**63) <= mtime_ns <= MAX_INT or max(totals) > MAX_INT:
            lie(above, name, "its mode, time or totals are out of range")

    def _add_subdirectory(self, parent: _Open, entry: Subdirectory, offset: int) -> None:
        totals = parent.totals
        parent.totals = Totals(
            totals.objects + entry.objects,
            totals.directories + entry.directories + 1,
            totals.size + entry.size,
            totals.chunks + entry.chunks,
        )
        parent.waiting_offsets.append(offset)
        if parent.subdirectories is None:
            parent.subdirectories = PageCutter()
        if page := parent.subdirectories.add(entry):
            self._store_subdirectories(parent, page)

    def add_leaves(self, leaves: Sequence[Leaf]) -> None:
        """Add subdirectories of the current directory that have no other in them, each as a whole.

        Raises:
            ProtocolError: as for `begin_directory`, `add_block` and `end_directory`.
        """
        if not self._stack or not all(leaf.block is None or leaf.block.is_one_page for leaf in leaves):
            for leaf in leaves:
                self.begin_directory(leaf.name)
                if leaf.block is not None:
                    self.add_block(leaf.block)
                self.end_directory(leaf.mode, leaf.mtime_ns)
            return
        pages = iter(digests(Kind.ENTRIES, [leaf.block.data for leaf in leaves if leaf.block is not None]))
        bodies = [encode(Node() if leaf.block is None else Node(next(pages))) for leaf in leaves]
        for leaf, body, node_id in zip(leaves, bodies, digests(Kind.NODE, bodies), strict=True):
            name, mode, mtime_ns, block = leaf
            parent = self._next_subdirectory(name)
            totals = Totals()
            places: tuple[int, ...] = ()
            if block is not None:
                totals = Totals(block.count, 0, block.size_bytes, block.chunks)
                places = (self._write(Kind.ENTRIES, block.data),)
            offset = self._write(Kind.NODE, body, places)
            self._check_attributes(parent.path, name, mode, mtime_ns, totals)
            self._add_subdirectory(parent, Subdirectory(name, mode, mtime_ns, node_id, *totals), offset)

    def finish(self) -> Summary:
        """Close the manifest, whose root directory was ended; gives the version id and the totals."""
        if self._root is None or self._finished:
            raise UsageError("a manifest is finished once, after its root directory was ended")
        self._finished = True
        root, offset = self._root
        kept = self._header.root_attributes
        body = encode(
            Root(
                self._header.encode(),
                root.mode if kept else 0,
                root.mtime_ns if kept else 0,
                root.node_id,
                root.objects,
                root.directories,
                root.size,
                root.chunks,
                root.extra if kept else b"",
            )
        )
        version_id = digest(Kind.ROOT, body)
        at = self._write(Kind.ROOT, body, [offset])
        if self._sink is not None:
            self._give()
            footer = FOOTER.pack(at, version_id, bytes(32), END_MAGIC)
            self._checksum.update(footer[:40])
            self._sink(FOOTER.pack(at, version_id, self._checksum.digest(), END_MAGIC))
        return Summary(version_id, root.objects, root.directories, root.size, root.chunks)

    # ---- pages ---------------------------------------------------------------------------------------------

    def _current(self, *, subdirectories: bool = False) -> _Open:
        if not self._stack:
            raise UsageError("no directory of the manifest is open")
        directory = self._stack[-1]
        if directory.entries_ended and not subdirectories:
            raise ProtocolError(
                f"entries of {show_path(directory.path)!r} come after its subdirectories, not before"
            )
        return directory

    def _page_may_follow(self) -> _Open:
        directory = self._current()
        waiting = directory.cutter is not None and directory.cutter.waiting
        if directory.open_page or directory.packed or waiting:
            raise ProtocolError(
                f"a page of {show_path(directory.path)!r} follows one that was not cut by its rule"
            )
        return directory

    @staticmethod
    def _close_page(directory: _Open, page: list[Entry]) -> None:
        closed = is_closed(page)
        if closed is None:
            raise ProtocolError(f"a page of {show_path(directory.path)!r} goes on after a cut")
        directory.open_page = not closed

    def _finish_entries(self, directory: _Open) -> None:
        if directory.entries_ended:
            return
        directory.entries_ended = True
        if directory.packed:
            self._store_packed(directory)
        if directory.cutter is not None and (last := directory.cutter.finish()):
            self._store(directory, last, None, check=directory.doubtful)

    def _store(
        self, directory: _Open, entries: list[Entry], data: bytes | None, *, check: bool = True
    ) -> Page:
        """Check and write one page; decoding what was just encoded checks each field's range in C."""
        if data is None:
            try:
                data = encode(entries)
            except (OverflowError, TypeError) as error:
                raise ProtocolError(
                    f"an entry of {show_path(directory.path)!r} does not encode: {error}"
                ) from None
            if check:
                entries = decode_page(data, directory.path, canonical=False)
        if check:
            totals = check_entries(entries, directory.path, directory.last_name, self._header)
        elif not directory.last_name < entries[0].name:
            lie(directory.path, entries[0].name, "it stands out of order")
        else:
            totals = _count(entries)
        locator: Sequence[int] = ()
        if self._sink is not None and (packed := b"".join([e.runs for e in entries if e.runs])):
            locator = self._place_runs(packed, directory.path)
        page_id = digest(Kind.ENTRIES, data)
        directory.entry_offsets.append(self._write(Kind.ENTRIES, data, locator))
        directory.entry_ids.append(page_id)
        directory.last_name = entries[-1].name
        directory.totals = directory.totals.plus(totals)
        return Page(page_id, data, totals.objects, totals.size, totals.chunks)

    def _store_packed(self, directory: _Open) -> None:
        """Write the page whose entries came in blocks."""
        data = list_head(directory.packed_count) + b"".join(directory.packed)
        size, chunks = directory.packed_totals
        directory.entry_ids.append(digest(Kind.ENTRIES, data))
        directory.entry_offsets.append(self._write(Kind.ENTRIES, data))
        directory.last_name = directory.packed_name
        directory.totals = directory.totals.plus(Totals(directory.packed_count, 0, size, chunks))
        self._forget_packed(directory)

    @staticmethod
    def _forget_packed(directory: _Open) -> None:
        directory.packed = []
        directory.packed_count = directory.packed_weight = 0
        directory.packed_totals = (0, 0)
        directory.packed_name = b""

    def _store_subdirectories(self, directory: _Open, page: list[Subdirectory]) -> None:
        body = encode(page)
        offsets, directory.waiting_offsets = (
            directory.waiting_offsets[: len(page)],
            directory.waiting_offsets[len(page) :],
        )
        directory.subdirectory_offsets.append(self._write(Kind.SUBDIRECTORIES, body, offsets))
        directory.subdirectory_ids.append(digest(Kind.SUBDIRECTORIES, body))


def _count(entries: list[Entry]) -> Totals:
    chunks = sum([len(e.chunks) for e in entries]) // CHUNK_BYTES
    if any(e.depth for e in entries):
        chunks += sum(count for e in entries for _, _, count in UNPACK_RUNS(e.runs))
    return Totals(len(entries), 0, sum([e.size for e in entries]), chunks)
