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
    - An object whose stat differs before and after its read is read again, up to `READ_ATTEMPTS`, then reported.
    - What cannot be read is reported by name and left out; the scan goes on.
    - Only what was read at least `RACY_NS` after its last change enters the cache.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from flowengine.chunking import CHUNK_BYTES, Cutter, Profile, chunk_id, pack_chunks, packed_size
from flowengine.manifest import FILE, FLAG_SPARSE, HARDLINK, SYMLINK, Entry
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.store.reading import ObjectChanged, ObjectReader, Piece
from flowengine.store.scan_cache import PROVISIONAL, DirectoryPart, Identity, ScanCache
from flowengine.store.selection import Selection
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import LARGE_OBJECT_BYTES
from flowengine.wire.paths import MAX_DEPTH, MAX_PATH_BYTES, STAGING_NAME

__all__ = [
    "RACY_NS",
    "READ_ATTEMPTS",
    "Batch",
    "DirectoryEntered",
    "DirectoryLeft",
    "Event",
    "LargeBegun",
    "LargeEnded",
    "LargePiece",
    "ScanFailed",
    "Scanner",
    "decode_entries",
    "encode_entries",
    "recall",
    "split_proof",
    "stats_proof",
    "with_ctime",
]

READ_ATTEMPTS: Final = 3
KNOWN_RUN_CHUNKS: Final = 4096
"""Chunks of an object that are offered at once where they are known without reading; half of what an offer may hold."""
RACY_NS: Final = 20_000_000
"""Longer than a tick of the clock behind ctime (10 ms at 100 Hz), so that a later change must show."""

MAX_BATCH_ENTRIES: Final = 512
MAX_BATCH_CHUNKS: Final = 4096
"""A batch is closed at so many chunks; one more object may take it over. Well below what an offer may hold."""

encode_entries = msgspec.msgpack.Encoder().encode
decode_entries = msgspec.msgpack.Decoder(list[Entry]).decode


@dataclass(slots=True)
class DirectoryEntered:
    """What follows is in directory `name` of the current one (empty: the root)."""

    name: bytes
    path: bytes


@dataclass(slots=True)
class DirectoryLeft:
    """The current directory is done; `complete` is False where its listing failed or a filter hid entries."""

    mode: int
    mtime_ns: int
    extra: bytes
    complete: bool
    apply: bool


@dataclass(slots=True)
class Batch:
    """Consecutive entries of the current directory.

    Attributes:
        entries: in name order.
        buffer: bytes of the entries that were read now; one holder, to be released by the consumer.
        starts: per entry, where its bytes begin in the buffer; -1: not read now (cached, empty or a link).
        path: the directory's real path.
        renamed: what its one entry is called there, where that differs.
        recalled: all of it is as the scan cache had it.
    """

    entries: list[Entry]
    buffer: Buffer | None
    starts: list[int]
    path: bytes
    renamed: bytes = b""
    recalled: bool = False

    def path_of(self, entry: Entry) -> bytes:
        """Where an entry of the batch can be read again."""
        return self.path.rstrip(b"/") + b"/" + (self.renamed or entry.name)


@dataclass(slots=True)
class LargeBegun:
    """A large object's pieces follow; `path` is where it can be read again."""

    entry: Entry
    path: bytes


@dataclass(slots=True)
class LargePiece:
    """The next piece; `cached`: known without reading, `piece.buffer` is None."""

    piece: Piece
    cached: bool


@dataclass(slots=True)
class LargeEnded:
    """The large object is complete, or (with a reason) must be forgotten."""

    reason: str
    message: str


@dataclass(slots=True)
class ScanFailed:
    """Something could not be read; it is not part of what follows."""

    path: bytes
    reason: str
    message: str


Event = DirectoryEntered | DirectoryLeft | Batch | LargeBegun | LargePiece | LargeEnded | ScanFailed


_Row = tuple[bytes, os.stat_result]


class _Frame:
    """One directory on the way down."""

    __slots__ = ("complete", "dirfd", "owned", "path", "pending", "real", "st", "subset")

    def __init__(
        self,
        dirfd: int,
        path: bytes,
        real: bytes,
        st: os.stat_result | None,
        owned: bool,
        subset: dict[bytes, object] | None,
    ) -> None:
        self.dirfd = dirfd
        self.path = path
        self.real = real
        self.st = st
        self.owned = owned
        self.subset = subset
        self.complete = True
        self.pending: list[tuple[bytes, int, bytes]] = []


def stats_proof(rows: list[tuple[bytes, os.stat_result]]) -> bytes:
    """What proves that entries are unchanged: inode, size, mtime, ctime, mode of each, then their names."""
    flat: list[int] = []
    for _, st in rows:
        flat += (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_mode)
    return struct.pack(f"<I{len(flat)}q", len(rows), *flat) + b"/".join([name for name, _ in rows])


def split_proof(proof: bytes) -> list[bytes]:
    """Per entry the 40 bytes of numbers and the name, as one comparable key."""
    (count,) = struct.unpack_from("<I", proof)
    names = proof[4 + 40 * count :].split(b"/")
    return [proof[4 + 40 * n : 44 + 40 * n] + names[n] for n in range(count)]


def recall(
    cache: ScanCache, st_dir: os.stat_result, rows: list[tuple[bytes, os.stat_result]]
) -> tuple[list[Entry] | None, dict[bytes, Entry]]:
    """What the cache knows of a directory's small objects, given in name order.

    Returns:
        All their entries when nothing changed at all; else None and those known, by the proof of each
        (`split_proof(stats_proof(rows))` has the proofs in order).
    """
    parts = cache.directory(st_dir.st_dev, st_dir.st_ino)
    if not parts:
        return None, {}
    try:
        if len(parts) == 1 and parts[0].stats == stats_proof(rows):
            return decode_entries(parts[0].entries), {}
        known: dict[bytes, Entry] = {}
        for part in parts:
            known.update(zip(split_proof(part.stats), decode_entries(part.entries), strict=True))
        return None, known
    except (msgspec.DecodeError, ValueError, struct.error):
        return None, {}


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
        self._reader = reader
        self._profile: Profile = reader.profile
        self._cutter = Cutter(reader.profile)
        self._pool = pool
        self._cache = cache
        self._filters = filters or None
        self._extra: Callable[[int | bytes, os.stat_result], bytes] | None = None
        if xattrs or owner:
            from flowengine.store.attributes import extra_reader

            self._extra = extra_reader(xattrs=xattrs, owner=owner)
        # A program that runs as its owner must not become one that runs as somebody else.
        self._mode_bits = 0o7777 if owner else 0o1777
        self._links: dict[tuple[int, int], tuple[bytes, int]] = {}
        self._named: set[bytes] = set()
        self._subset = _subset_tree(selection.files_from)
        # Small objects of many directories lie one behind the other in one buffer.
        self._shared: Buffer | None = None
        self._filled = 0
        self.objects = 0
        self.size_bytes = 0
        self.objects_read = 0
        self.bytes_read = 0
        self.complete = True

    def events(self) -> Iterator[Event]:
        """All events, from the root's `DirectoryEntered` to its `DirectoryLeft`."""
        root = _Frame(-1, b"", b"", None, False, None)
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
            self._let_go()
            for fd in extra_fds:
                os.close(fd)

    def _let_go(self) -> None:
        """Leave the shared buffer to those who hold batches in it."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None

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
        files: list[tuple[bytes, os.stat_result, int, bytes]] = []
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
            found_files: list[_Row] = []
            found_dirs: list[_Row] = []
            if contents:
                if self._selection.single_contents:
                    root.st = os.fstat(fd)
                    root.dirfd = fd
                    root.real = directory.rstrip(b"/") or b"/"
                frame = _Frame(fd, b"", directory, None, False, subset)
                found_files, found_dirs = yield from self._list(frame)
                root.complete = root.complete and frame.complete
            else:
                try:
                    st = os.stat(
                        item.path if os.path.isdir(item.path) else os.path.basename(item.path),
                        dir_fd=None if os.path.isdir(item.path) else fd,
                        follow_symlinks=False,
                    )
                    if stat.S_ISLNK(st.st_mode) and os.path.isdir(item.path):
                        st = os.lstat(item.path)
                except OSError as error:
                    yield self._failed(root, item.path, error)
                    continue
                if stat.S_ISDIR(st.st_mode):
                    found_dirs.append((item.name, st))
                    self._named.add(item.name)
                else:
                    found_files.append((os.path.basename(item.path), st))
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
            frame = _Frame(files[start][2], b"", files[start][3], None, False, None)
            yield from self._entries(
                frame,
                [(n, st) for n, st, _, _ in files[start:end]],
                whole=len(self._selection.roots) == 1 and self._selection.single_contents,
            )
            root.complete = root.complete and frame.complete
            start = end

    def _collision(self, root: _Frame, name: bytes, first: bytes, second: bytes) -> ScanFailed:
        root.complete = self.complete = False
        from flowengine.units import show_path

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
                name, parent_fd, parent_real = frame.pending.pop()
                path = _join(frame.path, name)
                if len(stack) >= MAX_DEPTH or len(path) > MAX_PATH_BYTES:
                    frame.complete = self.complete = False
                    yield ScanFailed(
                        path, "too-deep", f"paths may have {MAX_DEPTH} parts and {MAX_PATH_BYTES} bytes"
                    )
                    continue
                try:
                    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
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
                below = _Frame(fd, path, real, os.fstat(fd), True, subset)
                stack.append(below)
                yield DirectoryEntered(name, path)
                files, directories = yield from self._list(below)
                directories.sort(reverse=True)
                below.pending = [(n, fd, real) for n, _ in directories]
                files.sort()
                yield from self._entries(below, files, whole=True)
        finally:
            for frame in stack:
                if frame is not root:
                    os.close(frame.dirfd)

    def _directory_extra(self, frame: _Frame) -> bytes:
        if self._extra is None or frame.st is None:
            return b""
        return self._extra(frame.dirfd, frame.st)

    def _list(self, frame: _Frame) -> Generator[Event, None, tuple[list[_Row], list[_Row]]]:
        """(files, directories) of one directory as (name, stat), unsorted; a generator for the failures it meets."""
        files: list[tuple[bytes, os.stat_result]] = []
        directories: list[tuple[bytes, os.stat_result]] = []
        encoding = sys.getfilesystemencoding()  # os.fsencode does just this, three times slower
        try:
            with os.scandir(frame.dirfd) as listing:
                for item in listing:
                    name = item.name.encode(encoding, "surrogateescape")
                    try:
                        st = item.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # gone between listing and stat: never seen
                    kind = st.st_mode & 0o170000
                    if name == STAGING_NAME:
                        if kind != 0o040000:
                            frame.complete = False
                            yield ScanFailed(
                                _join(frame.path, name), "reserved-name", "the name is reserved for staging"
                            )
                    elif kind == 0o100000 or kind == 0o120000:
                        files.append((name, st))
                    elif kind == 0o040000:
                        directories.append((name, st))
                    elif self._takes(frame, name):
                        frame.complete = False
                        yield ScanFailed(
                            frame.path + b"/" + name if frame.path else name,
                            "special-file",
                            "sockets, pipes and devices are not moved",
                        )
        except OSError as error:
            yield self._failed(frame, frame.path, error)
        if frame.subset is not None:
            subset = frame.subset
            files = [row for row in files if row[0] in subset]
            directories = [row for row in directories if row[0] in subset]
            frame.complete = False  # what is not listed is not known to be gone
            if frame.path or len(self._selection.roots) == 1:
                found = {name for name, _ in files} | {name for name, _ in directories}
                for name in sorted(subset.keys() - found):
                    self.complete = False
                    yield ScanFailed(_join(frame.path, name), "not-found", "listed, but not at the source")
        if self._filters is not None:
            allows = self._filters.allows
            prefix = frame.path + b"/" if frame.path else b""
            files = [row for row in files if allows(prefix + row[0], False)]
            directories = [row for row in directories if allows(prefix + row[0], True)]
        return files, directories

    def _takes(self, frame: _Frame, name: bytes) -> bool:
        """Whether filters and the list of names let an object of a directory through."""
        if frame.subset is not None and name not in frame.subset:
            return False
        return self._filters is None or self._filters.allows(_join(frame.path, name), False)

    # --- entries of one directory -------------------------------------------------------------------------------

    def _entries(
        self, frame: _Frame, rows: list[tuple[bytes, os.stat_result]], *, whole: bool
    ) -> Iterator[Event]:
        """Events for the non-directories of one directory, given in name order."""
        if not rows:
            return
        self.objects += len(rows)
        small = [row for row in rows if row[1].st_size < LARGE_OBJECT_BYTES]
        self.size_bytes += sum([st.st_size for _, st in rows if st.st_mode & 0o170000 == 0o100000])
        known: dict[bytes, Entry] = {}
        hit: list[Entry] | None = None
        st_dir = os.fstat(frame.dirfd)
        if self._cache is not None and small and self._extra is None:
            hit, known = recall(self._cache, st_dir, small)
        if hit is not None and len(small) == len(rows):
            start = 0
            while start < len(hit):
                end = start
                chunks = 0
                while end < len(hit) and end - start < MAX_BATCH_ENTRIES and chunks < MAX_BATCH_CHUNKS:
                    chunks += len(hit[end].chunks) // CHUNK_BYTES
                    end += 1
                entries = hit[start:end]
                linked = self._mark_links(frame, entries, rows[start:end])
                yield Batch(entries, None, [-1] * len(entries), frame.real, recalled=not linked)
                start = end
            return
        if hit is not None:
            known = dict(zip(split_proof(stats_proof(small)), hit, strict=True))
        yield from self._fresh(
            frame, rows, known, st_dir, remember=whole and self._cache is not None and self._extra is None
        )

    def _mark_links(
        self, frame: _Frame, entries: list[Entry], rows: list[tuple[bytes, os.stat_result]]
    ) -> bool:
        """Replace later names of one inode by hard links to the first; whether there were any."""
        linked = False
        for index, (name, st) in enumerate(rows):
            if st.st_nlink > 1 and st.st_mode & 0o170000 == 0o100000:
                first = self._first_name(frame, name, st)
                if first is not None:
                    entries[index] = Entry(
                        name, HARDLINK, entries[index].mode, entries[index].mtime_ns, 0, b"", first
                    )
                    linked = True
        return linked

    def _first_name(self, frame: _Frame, name: bytes, st: os.stat_result) -> bytes | None:
        key = (st.st_dev, st.st_ino)
        found = self._links.get(key)
        if found is None:
            self._links[key] = (frame.path + b"/" + name if frame.path else name, st.st_nlink - 1)
            return None
        first, left = found
        if left <= 1:  # all names were seen; what is outside the tree keeps its row
            del self._links[key]
        else:
            self._links[key] = (first, left - 1)
        return first

    def _fresh(
        self,
        frame: _Frame,
        rows: list[tuple[bytes, os.stat_result]],
        known: dict[bytes, Entry],
        st_dir: os.stat_result,
        *,
        remember: bool,
    ) -> Iterator[Event]:
        """Entries of a directory in which something is new."""
        newest = max([st.st_ctime_ns for _, st in rows])
        age = time.time_ns() - newest
        if 0 <= age < RACY_NS:
            time.sleep((RACY_NS - age) / 1e9)
        racy_from = time.time_ns() - RACY_NS
        keep: list[tuple[bytes, os.stat_result]] = []
        keep_entries: list[Entry] = []
        part = 0
        entries: list[Entry] = []
        batch_rows: list[tuple[bytes, os.stat_result]] = []
        starts: list[int] = []
        buffer: Buffer | None = None
        chunk_total = 0
        proofs = iter(split_proof(stats_proof(rows))) if known else None
        minimum = self._profile.minimum
        for name, st in rows:
            proof = next(proofs) if proofs is not None else b""
            kind = st.st_mode & 0o170000
            large = kind == 0o100000 and st.st_size >= LARGE_OBJECT_BYTES
            if entries and (
                large
                or len(entries) >= MAX_BATCH_ENTRIES
                or chunk_total >= MAX_BATCH_CHUNKS
                or (buffer is not None and self._filled + st.st_size >= self._pool.size_bytes)
            ):
                if remember and not large:
                    assert self._cache is not None
                    part += 1
                    self._cache.add_directory_part(
                        st_dir.st_dev,
                        st_dir.st_ino,
                        part,
                        DirectoryPart(stats_proof(batch_rows), encode_entries(entries)),
                    )
                keep += batch_rows
                keep_entries += entries
                shown = list(entries)
                self._mark_links(frame, shown, batch_rows)
                yield Batch(shown, buffer, starts, frame.real)
                entries, batch_rows, starts, buffer, chunk_total = [], [], [], None, 0
            if large:
                self._let_go()
                yield from self._large(frame, name, st, racy_from)
                continue
            entry = known.get(proof) if known else None
            if entry is not None:
                entries.append(entry)
                batch_rows.append((name, st))
                starts.append(-1)
                chunk_total += len(entry.chunks) // CHUNK_BYTES
                continue
            if kind == 0o120000:
                try:
                    link = os.readlink(name, dir_fd=frame.dirfd)
                except OSError as error:
                    yield self._failed(frame, _join(frame.path, name), error)
                    continue
                made = Entry(name, SYMLINK, 0o777, st.st_mtime_ns, 0, b"", link)
                start = -1
            elif st.st_size == 0:
                made = Entry(name, FILE, st.st_mode & self._mode_bits, st.st_mtime_ns, st.st_size)
                start = -1
            else:
                if buffer is not None and self._filled + st.st_size >= self._pool.size_bytes:
                    buffer.release()  # of this directory nothing lies in it
                    buffer = None
                if buffer is None:
                    buffer = self._hold_shared(st.st_size)
                filled = self._filled
                try:
                    self._reader.pace(st.st_size)
                    st, size = self._read_small(frame.dirfd, name, st, buffer.view, filled)
                except OSError as error:
                    yield self._failed(frame, _join(frame.path, name), error)
                    continue
                except ObjectChanged as error:
                    frame.complete = self.complete = False
                    yield ScanFailed(_join(frame.path, name), "changed", error.message)
                    continue
                view = buffer.view[filled : filled + size]
                if size <= minimum:
                    chunks = size.to_bytes(4, "little") + chunk_id(view) if size else b""
                else:
                    chunks = self._cut(view)
                made = Entry(name, FILE, st.st_mode & self._mode_bits, st.st_mtime_ns, size, chunks)
                start = filled
                self._filled += size
                self.objects_read += 1
                self.bytes_read += size
            if self._extra is not None:
                made = msgspec.structs.replace(made, extra=self._extra_of(frame.dirfd, name, st))
            entries.append(made)
            chunk_total += len(made.chunks) // CHUNK_BYTES
            starts.append(start)
            batch_rows.append(
                (name, st) if st.st_ctime_ns < racy_from else (name, with_ctime(st, PROVISIONAL))
            )
        if entries:
            keep += batch_rows
            keep_entries += entries
            shown = list(entries)
            self._mark_links(frame, shown, batch_rows)
            yield Batch(shown, buffer, starts, frame.real)
        elif buffer is not None:
            buffer.release()
        if remember and keep:
            assert self._cache is not None
            self._cache.save_directory(
                st_dir.st_dev, st_dir.st_ino, [DirectoryPart(stats_proof(keep), encode_entries(keep_entries))]
            )

    def _hold_shared(self, size_bytes: int) -> Buffer:
        """A buffer with room behind `_filled`, held once more for a batch."""
        if self._shared is not None and self._filled + size_bytes >= self._pool.size_bytes:
            self._let_go()
        if self._shared is None:
            self._shared, self._filled = self._pool.acquire(), 0
        self._shared.hold()
        return self._shared

    def _extra_of(self, dirfd: int, name: bytes, st: os.stat_result) -> bytes:
        assert self._extra is not None
        if stat.S_ISLNK(st.st_mode):
            return b""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dirfd)
        except OSError:
            return b""
        try:
            return self._extra(fd, st)
        finally:
            os.close(fd)

    def _cut(self, view: memoryview) -> bytes:
        chunks = []
        at = 0
        for length in self._cutter.lengths(view):
            chunks.append((length, chunk_id(view[at : at + length])))
            at += length
        return pack_chunks(chunks)

    @staticmethod
    def _read_small(
        dirfd: int, name: bytes, st: os.stat_result, view: memoryview, at: int
    ) -> tuple[os.stat_result, int]:
        """Read one small object whole to view[at:]: (its stat, its size).

        Raises:
            ObjectChanged: it never held still.
        """
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dirfd)
        try:
            for _ in range(READ_ATTEMPTS):
                size = st.st_size
                # One byte more than expected shows growth without another call.
                got = os.preadv(fd, [view[at : at + size + 1]], 0)
                after = os.fstat(fd)
                if (
                    got == size
                    and after.st_size == size
                    and after.st_mtime_ns == st.st_mtime_ns
                    and after.st_ctime_ns == st.st_ctime_ns
                ):
                    return after, size
                st = after
                if st.st_size >= LARGE_OBJECT_BYTES or at + st.st_size >= len(view):
                    break
        finally:
            os.close(fd)
        raise ObjectChanged("changed while it was read; what was read of it was thrown away")

    def _large(self, frame: _Frame, name: bytes, st: os.stat_result, racy_from: int) -> Iterator[Event]:
        """Events of one large object, again from the start when it changes."""
        first = self._first_name(frame, name, st) if st.st_nlink > 1 else None
        if first is not None:
            entry = Entry(name, HARDLINK, st.st_mode & self._mode_bits, st.st_mtime_ns, 0, b"", first)
            yield Batch([entry], None, [-1], frame.real)
            return
        path = _join(frame.path, name)
        for _ in range(READ_ATTEMPTS):
            try:
                # One object open at a time, and only where the cache does not cover it.
                begun = yield from self._large_once(frame, name, st, racy_from)
                if begun:
                    return
                st = os.stat(name, dir_fd=frame.dirfd, follow_symlinks=False)
                if not stat.S_ISREG(st.st_mode):
                    break
            except OSError as error:
                yield LargeEnded("unreadable", error.strerror or str(error))
                yield self._failed(frame, path, error)
                return
            racy_from = time.time_ns() - RACY_NS
        frame.complete = self.complete = False
        yield ScanFailed(path, "changed", f"changed while it was read, {READ_ATTEMPTS} times in a row")

    def _large_once(
        self, frame: _Frame, name: bytes, st: os.stat_result, racy_from: int
    ) -> Generator[Event, None, bool]:
        """One attempt; returns whether it held still."""
        flags = FLAG_SPARSE if st.st_blocks * 512 < st.st_size else 0
        extra = self._extra_of(frame.dirfd, name, st) if self._extra is not None else b""
        entry = Entry(
            name, FILE, st.st_mode & self._mode_bits, st.st_mtime_ns, st.st_size, b"", b"", flags, extra
        )
        yield LargeBegun(entry, frame.real.rstrip(b"/") + b"/" + name)
        identity = Identity.of(st)
        done = 0
        cached = self._cache.pieces(identity) if self._cache is not None else []
        for packed in _runs(cached, st.st_size):
            lengths = _lengths(packed)
            yield LargePiece(Piece(done, lengths, packed, None, 0), True)
            done += sum(lengths)
        if done < st.st_size:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=frame.dirfd)
            try:
                yield from self._large_pieces(fd, st, identity, done, racy_from, fresh=not cached)
                if Identity.of(os.fstat(fd)) != identity:
                    raise ObjectChanged("changed while it was read")
            except ObjectChanged as error:
                if self._cache is not None:
                    self._cache.add_pieces(identity, [], replace=True)
                yield LargeEnded("changed", error.message)
                return False
            finally:
                os.close(fd)
            self.objects_read += 1
        yield LargeEnded("", "")
        return True

    def _large_pieces(
        self, fd: int, st: os.stat_result, identity: Identity, done: int, racy_from: int, *, fresh: bool
    ) -> Iterator[Event]:
        pieces = self._reader.pieces(fd, st.st_size, sparse=st.st_blocks * 512 < st.st_size, offset=done)
        remember = self._cache is not None and st.st_ctime_ns < racy_from
        try:
            for piece in pieces:
                size = piece.size_bytes
                self.bytes_read += size if piece.buffer is not None else 0
                # The cache must not learn a piece of an object that has changed since its stat.
                if remember and Identity.of(os.fstat(fd)) == identity:
                    assert self._cache is not None
                    self._cache.add_pieces(identity, [(piece.offset, piece.packed)], replace=fresh)
                    fresh = False
                yield LargePiece(piece, False)
        finally:
            pieces.close()  # type: ignore[attr-defined]


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def _runs(pieces: list[tuple[int, bytes]], size_bytes: int) -> Iterator[bytes]:
    """What is known of an object from its start, in few runs: what is offered again is answered run by run."""
    run: list[bytes] = []
    count = done = 0
    for offset, packed in pieces:
        if offset != done or done >= size_bytes:
            break
        if run and count + len(packed) // CHUNK_BYTES > KNOWN_RUN_CHUNKS:
            yield b"".join(run)
            run, count = [], 0
        run.append(packed)
        count += len(packed) // CHUNK_BYTES
        done += packed_size(packed)
    if run:
        yield b"".join(run)


def _lengths(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES)]


class _OtherCtime:
    """A stat with another ctime."""

    def __init__(self, st: os.stat_result, ctime_ns: int) -> None:
        self.st_dev, self.st_ino, self.st_nlink = st.st_dev, st.st_ino, st.st_nlink
        self.st_mode, self.st_size, self.st_mtime_ns = st.st_mode, st.st_size, st.st_mtime_ns
        self.st_ctime_ns = ctime_ns


def with_ctime(st: os.stat_result, ctime_ns: int) -> os.stat_result:
    """The stat as it would be with another ctime; one that no file has makes a proof that matches nothing."""
    return _OtherCtime(st, ctime_ns)  # type: ignore[return-value]


def _subset_tree(paths: list[bytes] | None) -> dict[bytes, object] | None:
    """`--files-from` as nested names; an empty dict below a name means all of it."""
    if paths is None:
        return None
    tree: dict[bytes, object] = {}
    for path in paths:
        node = tree
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        for part in parts:
            below = node.setdefault(part, {})
            assert isinstance(below, dict)
            node = below
    return tree
