"""Walks what is to be moved: one pass, in the manifest's order, opening only what has changed.

Goal
    A stream of events that the source turns into offers (and `flow manifest` into a manifest), in memory that does
    not grow with the tree, at a few microseconds an entry.
Plan
    Depth first, by directory descriptors, never through a link. In each directory first what is no directory, in
    name order, small objects many to a batch and large ones piece by piece, then the subdirectories. What the scan
    cache knows is not opened; the rest is read once, into a pooled buffer that the consumer may send from.
Invariants
    - Order and content of the events depend on the tree alone, but for the grouping into batches.
    - What cannot be read is reported by name and left out; the scan goes on.
    - Only what was read at least `RACY_NS` after its last change enters the cache.
"""

from __future__ import annotations

import os
import stat
import time
from bisect import bisect_left
from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import Final

import msgspec

from flowengine.chunking import CHUNK_BYTES
from flowengine.manifest import HARDLINK, Block, Entry, join_blocks
from flowengine.manifest.entries import MAX_NAME_BYTES, join
from flowengine.store.buffers import BufferPool
from flowengine.store.hard_links import HardLinks
from flowengine.store.leaves import known_leaves
from flowengine.store.many import AnyStat, Kind, Listing, Row, Stat, list_folder, listing_of, open_listed
from flowengine.store.proofs import encode_entries, recall, split_proof, stats_proof
from flowengine.store.reading import ObjectChanged, ObjectReader
from flowengine.store.scan_cache import DirectoryPart, ScanCache
from flowengine.store.scan_events import (
    Batch,
    DirectoryEntered,
    DirectoryLeft,
    Event,
    LargeBegun,
    LargeEnded,
    ScanFailed,
)
from flowengine.store.scan_large import LargeScan
from flowengine.store.scan_small import (
    MAX_BATCH_CHUNKS,
    MAX_BATCH_ENTRIES,
    READ_ATTEMPTS,
    ExtraReader,
    SmallReader,
    batches,
    is_one_batch,
)
from flowengine.store.selection import Root, Selection, subset_tree
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import LARGE_OBJECT_BYTES
from flowengine.wire.paths import MAX_DEPTH, MAX_PATH_BYTES, STAGING_NAME

__all__ = ["RACY_NS", "Scanner"]

RACY_NS: Final = 20_000_000
"""Longer than a tick of the clock behind ctime (10 ms at 100 Hz), so that a later change must show."""
_MOST_LEAVES: Final = 32
"""Directories that are looked at together."""


class _Frame:
    """One directory on the way down."""

    __slots__ = ("complete", "depth", "dirfd", "path", "pending", "real", "st", "subset")

    def __init__(
        self,
        dirfd: int,
        path: bytes,
        real: bytes,
        st: AnyStat | None,
        subset: dict[bytes, object] | None,
        depth: int = 0,
    ) -> None:
        self.depth = depth
        self.dirfd = dirfd
        self.path = path
        self.real = real
        self.st = st
        self.subset = subset
        self.complete = True
        self.pending: list[tuple[bytes, int, bytes]] = []


class Scanner:
    """Walks a selection. One use, by one thread.

    Args:
        selection: what to walk.
        reader: reads large objects; its profile cuts the small ones too.
        pool: buffers for small objects.
        cache: what earlier scans learned; None scans without memory.
        filters: what to leave out.
        xattrs, owner: whether extended attributes and ownership are part of the entries.
        opened: called with each path that is opened for reading; tests count with it.
    """

    def __init__(
        self,
        selection: Selection,
        reader: ObjectReader,
        pool: BufferPool,
        cache: ScanCache | None,
        *,
        filters: FilterSet | None = None,
        xattrs: bool = False,
        owner: bool = False,
    ) -> None:
        self._selection = selection
        self._pool = pool
        self._cache = cache
        self._filters = filters or None
        self._extra: ExtraReader | None = None
        if xattrs or owner:
            from flowengine.store.attributes import extra_reader

            self._extra = extra_reader(xattrs=xattrs, owner=owner)
        # A program that runs as its owner must not become one that runs as somebody else.
        self._mode_bits = 0o7777 if owner else 0o1777
        # Whether nothing is left out, and all that is told of an object is what the cache keeps of it.
        self._takes_all = selection.files_from is None and self._filters is None and self._extra is None
        # By depth, how many directories are worth being looked at together.
        self._leaves_ahead: dict[int, int] = {}
        self._links = HardLinks()
        self._named: set[bytes] = set()
        self._subset = subset_tree(selection.files_from)
        self._small = SmallReader(reader, pool, self._extra, self._mode_bits)
        self._larges = LargeScan(reader, cache, self._extra, self._mode_bits)
        self._least_chunk = reader.profile.minimum
        self.objects = 0
        self.size_bytes = 0
        self.complete = True

    @property
    def objects_read(self) -> int:
        """Objects that were opened and read."""
        return self._larges.objects_read + self._small.objects_read

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of them."""
        return self._larges.bytes_read + self._small.bytes_read

    def events(self) -> Iterator[Event]:
        """All events, from the root's `DirectoryEntered` to its `DirectoryLeft`."""
        root = _Frame(-1, b"", b"", None, None)
        extra_fds: list[int] = []
        yield DirectoryEntered(b"", b"")
        try:
            yield from self._renamed(self._root(root, extra_fds))
            yield from self._descend(root)
            st = root.st
            if st is not None:
                yield DirectoryLeft(
                    st.st_mode & self._mode_bits,
                    st.st_mtime_ns,
                    self._directory_extra(root),
                    root.complete,
                    True,
                )
            else:
                yield DirectoryLeft(0o755, 0, b"", root.complete, False)
        finally:
            self._small.let_go()
            for fd in extra_fds:
                os.close(fd)

    def _renamed(self, events: Iterator[Event]) -> Iterator[Event]:
        """The root's own entries; a single file that gets another name was read under its own."""
        root = self._selection.roots[0] if len(self._selection.roots) == 1 else None
        real = os.path.basename(root.path) if root is not None else b""
        if root is None or not root.name or root.name == real:
            yield from events
            return
        for event in events:
            if isinstance(event, Batch):
                entries = [msgspec.structs.replace(entry, name=root.name) for entry in event.entries]
                yield Batch(entries, event.buffer, event.starts, event.path, real)
            elif isinstance(event, LargeBegun):
                yield LargeBegun(msgspec.structs.replace(event.entry, name=root.name), event.path)
            else:
                yield event

    def _root(self, root: _Frame, fds: list[int]) -> Iterator[Event]:
        """The root's own entries: those of one directory, or a union."""
        files: list[tuple[bytes, Stat, int, bytes]] = []
        names: dict[bytes, bytes] = {}
        subset = self._subset
        for item in self._selection.roots:
            contents = not item.name
            directory = item.path if contents else (os.path.dirname(item.path) or b".")
            try:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                yield self._failed(root, item.path, error)
                continue
            fds.append(fd)
            found = yield from self._named_by(root, item, fd, directory)
            if found is None:
                continue
            found_files, found_dirs = found
            for name, st in found_files:
                if name in names:
                    yield self._collision(root, name, names[name], directory)
                    continue
                names[name] = directory
                files.append((name, st, fd, directory))
            for name, _ in found_dirs:
                if name in names:
                    yield self._collision(root, name, names[name], directory)
                    continue
                names[name] = directory
                root.pending.append((name, fd, directory))
        files.sort(key=lambda row: row[0])
        root.pending.sort(reverse=True)
        root.subset = subset if self._selection.single_contents or subset else None
        # Entries from one directory go as one listing; a union goes run by run of the same directory.
        start = 0
        while start < len(files):
            end = start
            while end < len(files) and files[end][2] == files[start][2]:
                end += 1
            frame = _Frame(files[start][2], b"", files[start][3], None, None)
            yield from self._entries(
                frame,
                listing_of([(n, st) for n, st, _, _ in files[start:end]], LARGE_OBJECT_BYTES),
                whole=len(self._selection.roots) == 1 and self._selection.single_contents,
            )
            root.complete = root.complete and frame.complete
            start = end

    def _named_by(
        self, root: _Frame, item: Root, fd: int, directory: bytes
    ) -> Generator[Event, None, tuple[list[Row], list[Row]] | None]:
        """What one path of the command names: files and links, and folders; None where it cannot be had.

        Args:
            fd, directory: the folder itself where its contents were named, else the one that it is in.
        """
        if not item.name:
            if self._selection.single_contents:
                root.st = os.fstat(fd)
                root.dirfd = fd
                root.real = directory.rstrip(b"/") or b"/"
            frame = _Frame(fd, b"", directory, None, self._subset)
            listing = yield from self._taken(frame, list_folder(fd, LARGE_OBJECT_BYTES, STAGING_NAME))
            root.complete = root.complete and frame.complete
            return listing.smalls.pairs() + listing.larges.pairs(), listing.folders.pairs()
        try:
            named = os.stat(
                item.path if os.path.isdir(item.path) else os.path.basename(item.path),
                dir_fd=None if os.path.isdir(item.path) else fd,
                follow_symlinks=False,
            )
            if stat.S_ISLNK(named.st_mode) and os.path.isdir(item.path):
                named = os.lstat(item.path)
        except OSError as error:
            yield self._failed(root, item.path, error)
            return None
        if stat.S_ISDIR(named.st_mode):
            self._named.add(item.name)
            return [], [(item.name, Stat.of(named))]
        return [(os.path.basename(item.path), Stat.of(named))], []

    def _collision(self, root: _Frame, name: bytes, first: bytes, second: bytes) -> ScanFailed:
        root.complete = self.complete = False
        return ScanFailed(
            name,
            "collision",
            f"both {show_path(first)} and {show_path(second)} have an entry of this name; the first is taken",
        )

    def _failed(self, frame: _Frame, path: bytes, error: OSError) -> ScanFailed:
        frame.complete = self.complete = False
        reason = (
            "vanished"
            if isinstance(error, FileNotFoundError)
            else "permission"
            if isinstance(error, PermissionError)
            else "unreadable"
        )
        return ScanFailed(path, reason, error.strerror or str(error))

    def _descend(self, root: _Frame) -> Iterator[Event]:
        """Visit subdirectories depth first with an explicit stack: depth costs descriptors, not Python frames."""
        stack = [root]
        try:
            while stack:
                frame = stack[-1]
                if not frame.pending:
                    stack.pop()
                    if frame is root:
                        break
                    assert frame.st is not None
                    yield DirectoryLeft(
                        frame.st.st_mode & self._mode_bits,
                        frame.st.st_mtime_ns,
                        self._directory_extra(frame),
                        frame.complete,
                        True,
                    )
                    os.close(frame.dirfd)
                    continue
                yield from self._known_leaves(frame)
                if not frame.pending:
                    continue
                name, parent_fd, parent_real = frame.pending.pop()
                path = join(frame.path, name)
                if len(stack) >= MAX_DEPTH or len(path) > MAX_PATH_BYTES:
                    frame.complete = self.complete = False
                    yield ScanFailed(
                        path, "too-deep", f"paths may have {MAX_DEPTH} parts and {MAX_PATH_BYTES} bytes"
                    )
                    continue
                try:
                    fd, st, listed = open_listed(parent_fd, name, LARGE_OBJECT_BYTES, STAGING_NAME)
                except OSError as error:
                    yield self._failed(frame, path, error)
                    continue
                subset = None
                if frame is root and name in self._named:
                    subset = self._subset
                elif frame.subset is not None:
                    child = frame.subset.get(name)
                    subset = child if isinstance(child, dict) and child else None
                real = parent_real.rstrip(b"/") + b"/" + name
                below = _Frame(fd, path, real, st, subset, len(stack))
                stack.append(below)
                yield DirectoryEntered(name, path)
                listing = yield from self._taken(below, listed)
                below.pending = [(n, fd, real) for n in reversed(listing.folders.names)]
                yield from self._entries(below, listing, whole=True)
        finally:
            for frame in stack:
                if frame is not root:
                    os.close(frame.dirfd)

    def _known_leaves(self, frame: _Frame) -> Iterator[Event]:
        """What is told of the next subdirectories while these are folders of files that nobody touched; they pend no more.

        Several are looked at together, more while that is of use. One that is not such costs being looked at twice, and those
        behind it are looked at again when their turn comes.
        """
        cache, depth = self._cache, frame.depth + 1
        ahead = self._leaves_ahead.get(depth, 0)
        in_reach = depth < MAX_DEPTH and len(frame.path) + 1 + MAX_NAME_BYTES <= MAX_PATH_BYTES
        if cache is None or not self._takes_all or not in_reach:
            return
        while frame.pending and ahead:
            _, fd, above = frame.pending[-1]
            names: list[bytes] = []
            for name, parent, _ in frame.pending[: -ahead - 1 : -1]:
                if parent != fd:  # those of several roots come mixed
                    break
                names.append(name)
            leaves = known_leaves(cache, fd, names, LARGE_OBJECT_BYTES, STAGING_NAME)
            for name, leaf in zip(names, leaves, strict=True):
                if leaf is None:
                    self._leaves_ahead[depth] = 0
                    return
                frame.pending.pop()
                yield DirectoryEntered(name, join(frame.path, name))
                yield from self._recalled_block(above.rstrip(b"/") + b"/" + name, leaf.block)
                yield DirectoryLeft(leaf.st.st_mode & self._mode_bits, leaf.st.st_mtime_ns, b"", True, True)
            ahead = self._leaves_ahead[depth] = min(2 * ahead, _MOST_LEAVES)

    def _recalled_block(self, real: bytes, block: Block) -> Iterator[Event]:
        """All small objects of a directory, as the scan cache has them."""
        self.objects += block.count
        self.size_bytes += block.size_bytes
        for part in block.parts(MAX_BATCH_ENTRIES, MAX_BATCH_CHUNKS):
            yield Batch(part, None, [-1] * part.count, real, recalled=True)

    def _directory_extra(self, frame: _Frame) -> bytes:
        if self._extra is None or frame.st is None:
            return b""
        return self._extra(frame.dirfd, frame.st)

    def _taken(self, frame: _Frame, listing: Listing) -> Generator[Event, None, Listing]:
        """What is to be moved of what stands in a directory; a generator for the failures it meets."""
        if listing.error is not None:
            yield self._failed(frame, frame.path, listing.error)
        for name in listing.others.names if len(listing.others) else ():
            if name != STAGING_NAME and self._takes(frame, name):
                frame.complete = False
                yield ScanFailed(
                    join(frame.path, name), "special-file", "sockets, pipes and devices are not moved"
                )
        if listing.marked is None and frame.subset is None and self._filters is None:
            return listing
        if listing.marked not in (None, Kind.FOLDER):
            frame.complete = False
            yield ScanFailed(
                join(frame.path, STAGING_NAME), "reserved-name", "the name is reserved for staging"
            )
        rows = [
            row
            for kind in (listing.smalls, listing.larges, listing.folders)
            for row in kind.pairs()
            if row[0] != STAGING_NAME and (frame.subset is None or row[0] in frame.subset)
        ]
        if frame.subset is not None:
            frame.complete = False  # what is not listed is not known to be gone
            if frame.path or len(self._selection.roots) == 1:
                for name in sorted(frame.subset.keys() - {name for name, _ in rows}):
                    self.complete = False
                    yield ScanFailed(join(frame.path, name), "not-found", "listed, but not at the source")
        if self._filters is not None:
            allows = self._filters.allows
            prefix = frame.path + b"/" if frame.path else b""
            rows = [row for row in rows if allows(prefix + row[0], stat.S_ISDIR(row[1].st_mode))]
        return listing_of(rows, LARGE_OBJECT_BYTES)

    def _takes(self, frame: _Frame, name: bytes) -> bool:
        """Whether filters and the list of names let an object of a directory through."""
        if frame.subset is not None and name not in frame.subset:
            return False
        return self._filters is None or self._filters.allows(join(frame.path, name), False)

    # --- entries of one directory -------------------------------------------------------------------------------

    def _entries(self, frame: _Frame, listing: Listing, *, whole: bool) -> Iterator[Event]:
        """Events for the non-directories of one directory."""
        smalls, larges = listing.smalls, listing.larges
        if not len(smalls) and not len(larges):
            return
        known: dict[bytes, Entry] = {}
        hit: Block | list[Entry] | None = None
        st_dir = frame.st or os.fstat(frame.dirfd)
        if self._cache is not None and len(smalls) and self._extra is None:
            hit, known = recall(self._cache, st_dir, listing.proof)
        if isinstance(hit, Block) and not len(larges) and not listing.linked:
            if not frame.pending:
                self._leaves_ahead[frame.depth] = 1
            yield from self._recalled_block(frame.real, hit)
            return
        self.objects += len(smalls) + len(larges)
        self.size_bytes += sum([st.st_size for st in larges.stats]) if len(larges) else 0
        if isinstance(hit, Block):
            hit = hit.entries
        if hit is not None:
            self.size_bytes += sum([entry.size for entry in hit])
            if not len(larges):
                yield from self._recalled(frame, hit, smalls.pairs() if listing.linked else [])
                return
            known = dict(zip(split_proof(listing.proof), hit, strict=True))
        elif len(smalls):
            self.size_bytes += listing.file_bytes
        remember = whole and self._cache is not None and self._extra is None
        yield from self._fresh(frame, listing, known, st_dir, remember=remember)

    def _recalled(self, frame: _Frame, hit: list[Entry], rows: list[Row]) -> Iterator[Event]:
        """Batches of a directory's small objects, all of which the cache knows.

        Args:
            rows: names and stats of them, where some have other names as well.
        """
        start = 0
        while start < len(hit):
            end = start
            chunks = 0
            while end < len(hit) and end - start < MAX_BATCH_ENTRIES and chunks < MAX_BATCH_CHUNKS:
                chunks += len(hit[end].chunks) // CHUNK_BYTES
                end += 1
            entries = hit[start:end]
            linked = self._links.mark(frame.path, entries, rows[start:end])
            yield Batch(entries, None, [-1] * len(entries), frame.real, recalled=not linked)
            start = end

    def _fresh(
        self,
        frame: _Frame,
        listing: Listing,
        known: dict[bytes, Entry],
        st_dir: AnyStat,
        *,
        remember: bool,
    ) -> Iterator[Event]:
        """Entries of a directory in which something is new, large ones at their place among the small ones."""
        newest = listing.newest_ns
        age = time.time_ns() - newest
        if 0 <= age < RACY_NS:
            time.sleep((RACY_NS - age) / 1e9)
        racy_from = time.time_ns() - RACY_NS
        if (
            newest < racy_from
            and not known
            and listing.plain
            and listing.file_bytes
            and not len(listing.larges)
            and not listing.linked
            and self._extra is None
        ):
            yield from self._fresh_blocks(frame, listing, st_dir, racy_from, remember=remember)
            return
        smalls, larges = listing.smalls.pairs(), listing.larges.pairs()
        proofs = split_proof(listing.proof) if known else [b""] * len(smalls)
        found = [known.get(proof) for proof in proofs]
        keep: list[Row] = []
        keep_entries: list[Entry] = []
        parts = 0
        start = 0
        for large in [*larges, None]:
            end = bisect_left(smalls, large) if large is not None else len(smalls)
            sizes = [st.st_size for _, st in smalls[start:end]]
            for first, last in pairwise([0, *batches(sizes, self._least_chunk, self._pool.size_bytes)]):
                first, last = start + first, start + last
                made = self._small.make(frame.dirfd, smalls[first:last], found[first:last], racy_from)
                for name, error in made.failures:
                    yield self._unread(frame, name, error)
                if not made.entries:
                    continue
                if remember and last < len(smalls):
                    assert self._cache is not None
                    parts += 1
                    part = DirectoryPart(stats_proof(made.rows), encode_entries(made.entries))
                    self._cache.add_directory_part(st_dir.st_dev, st_dir.st_ino, parts, part)
                keep += made.rows
                keep_entries += made.entries
                shown = made.entries
                if listing.linked:
                    shown = list(shown)
                    self._links.mark(frame.path, shown, made.rows)
                yield Batch(shown, made.buffer, made.starts, frame.real)
            start = end
            if large is not None:
                self._small.let_go()
                yield from self._large(frame, *large, racy_from)
        if remember and keep:
            assert self._cache is not None
            part = DirectoryPart(stats_proof(keep), encode_entries(keep_entries))
            self._cache.save_directory(st_dir.st_dev, st_dir.st_ino, [part])

    def _fresh_blocks(
        self, frame: _Frame, listing: Listing, st_dir: AnyStat, racy_from: int, *, remember: bool
    ) -> Iterator[Event]:
        """Entries of a directory of which nothing is known and that holds nothing but small files."""
        smalls, cache = listing.smalls, self._cache if remember else None
        parts: list[DirectoryPart] = []
        blocks: list[Block] = []
        if is_one_batch(len(smalls), smalls.size_bytes, self._least_chunk, self._pool.size_bytes):
            ends = [len(smalls)]
        else:
            ends = batches(smalls.sizes, self._least_chunk, self._pool.size_bytes)
        for first, last in pairwise([0, *ends]):
            rows = smalls.part(first, last)
            batch = self._small.make_block(frame.dirfd, rows)
            if batch is not None and batch.block is not None:
                batch.path = frame.real
                proof = listing.proof if len(ends) == 1 else rows.proof
                part = DirectoryPart(proof, batch.block.data)
                blocks.append(batch.block)
            else:
                made = self._small.make(frame.dirfd, rows.pairs(), [None] * len(rows), racy_from)
                for name, error in made.failures:
                    yield self._unread(frame, name, error)
                if not made.entries:
                    continue
                part = DirectoryPart(stats_proof(made.rows), encode_entries(made.entries))
                batch = Batch(made.entries, made.buffer, made.starts, frame.real)
            parts.append(part)
            if cache is not None and last < len(smalls):
                cache.add_directory_part(st_dir.st_dev, st_dir.st_ino, len(parts), part)
            yield batch
        if cache is not None and parts:
            if len(blocks) == len(ends) > 1:
                parts = [DirectoryPart(listing.proof, join_blocks(blocks))]
            cache.save_directory(st_dir.st_dev, st_dir.st_ino, parts)

    def _unread(self, frame: _Frame, name: bytes, error: OSError | ObjectChanged) -> ScanFailed:
        if isinstance(error, OSError):
            return self._failed(frame, join(frame.path, name), error)
        frame.complete = self.complete = False
        return ScanFailed(join(frame.path, name), "changed", error.message)

    def _large(self, frame: _Frame, name: bytes, st: Stat, racy_from: int) -> Iterator[Event]:
        """Events of one large object, again from the start when it changes."""
        first = self._links.first_name(frame.path, name, st) if st.st_nlink > 1 else None
        if first is not None:
            entry = Entry(name, HARDLINK, st.st_mode & self._mode_bits, st.st_mtime_ns, 0, b"", first)
            yield Batch([entry], None, [-1], frame.real)
            return
        path = join(frame.path, name)
        for _ in range(READ_ATTEMPTS):
            try:
                # One object open at a time, and only where the cache does not cover it.
                begun = yield from self._larges.once(frame.dirfd, frame.real, name, st, racy_from)
                if begun:
                    return
                st = Stat.of(os.stat(name, dir_fd=frame.dirfd, follow_symlinks=False))
                if not stat.S_ISREG(st.st_mode):
                    break
            except OSError as error:
                yield LargeEnded("unreadable", error.strerror or str(error))
                yield self._failed(frame, path, error)
                return
            racy_from = time.time_ns() - RACY_NS
        frame.complete = self.complete = False
        yield ScanFailed(path, "changed", f"changed while it was read, {READ_ATTEMPTS} times in a row")
