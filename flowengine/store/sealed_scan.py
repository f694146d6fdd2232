"""Walks what is to be moved and gives it sealed: the events of `store.scan`, of objects that the target cannot read.

Goal
    A source offers sealed objects as if they lay on its disk; nothing of them is written there.
Plan
    The same order as a scan has, by the names that objects have at the holder. What is read is sealed as it is read,
    cut and hashed; each folder has an object of its own with its mode and times. Without a scan cache: everything is
    read each time, and what has not changed gives the same bytes, so the target has them already.
Invariants
    - No name, no size of a name and no byte of content stands in an event; failures are told by sealed names too.
    - Every piece and every batch comes with its bytes: nothing can be read again later.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from flowengine.chunking import Cutter, Profile, ids_of, pack_ids
from flowengine.errors import UsageError
from flowengine.manifest import FILE, Entry
from flowengine.manifest.entries import join
from flowengine.store.attributes import extra_reader
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.store.filesystem import READ_FILE, READ_FOLDER
from flowengine.store.reading import SEGMENT_BYTES as READ_BYTES
from flowengine.store.reading import ObjectChanged, Piece
from flowengine.store.scan_events import (
    Batch,
    DirectoryEntered,
    DirectoryLeft,
    Event,
    LargeBegun,
    LargeEnded,
    LargePiece,
    ScanFailed,
)
from flowengine.store.scan_small import MAX_BATCH_CHUNKS, MAX_BATCH_ENTRIES, READ_ATTEMPTS
from flowengine.store.selection import Selection
from flowengine.trust.sealed import SEGMENT_BYTES, ObjectSealer, SealingKey, object_name
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import LARGE_OBJECT_BYTES
from flowengine.wire.paths import MAX_DEPTH, MAX_PATH_BYTES, STAGING_NAME

__all__ = ["SealedScanner"]

_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700
_Row = tuple[bytes, bytes, os.stat_result]
"""Name at the holder, own name, stat."""


@dataclass
class _Folder:
    """One folder on the way down: its path as it is, and as the holder sees it."""

    fd: int
    path: bytes
    sealed: bytes
    st: os.stat_result
    pending: list[_Row] = field(default_factory=list)
    complete: bool = True


class SealedScanner:
    """Walks a selection of one root and seals it. One use, by one thread.

    Args:
        selection: what to walk; one root, all of it.
        key: to seal with.
        profile: how the sealed bytes are cut.
        pool: buffers of at least 8 MiB and a largest chunk.
        filters: what to leave out, by its own path.
        xattrs, owner: whether these are sealed too.
        pace: called with the bytes that are about to be read; returns when they may be.
        note: told of each failure by the object's own path; stays at this site.
    """

    def __init__(
        self,
        selection: Selection,
        key: SealingKey,
        profile: Profile,
        pool: BufferPool,
        *,
        filters: FilterSet | None = None,
        xattrs: bool = False,
        owner: bool = False,
        pace: Callable[[int], object] = lambda size: None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        if len(selection.roots) != 1 or selection.files_from is not None:
            raise UsageError("what is sealed is one path, with all that is in it")
        self._root = selection.roots[0]
        self._key = key
        self._cutter = Cutter(profile)
        self._pool = pool
        self._filters = filters or None
        self._extra = extra_reader(xattrs=xattrs, owner=owner) if xattrs or owner else None
        self._mode_bits = 0o7777 if owner else 0o1777
        self._pace = pace
        self._note = note
        self._shared: Buffer | None = None
        self._filled = 0
        self.objects = 0
        self.size_bytes = 0
        self.objects_read = 0
        self.bytes_read = 0
        self.complete = True

    def events(self) -> Iterator[Event]:
        """All events, from the root's `DirectoryEntered` to its `DirectoryLeft`."""
        yield DirectoryEntered(b"", b"")
        stack: list[_Folder] = []
        whole = True
        try:
            try:
                first, rows = self._begin()
            except OSError as error:
                yield self._failed(None, self._root.name, self._name(self._root.name), error)
            else:
                stack.append(first)
                yield from self._objects(first, rows)
                yield from self._descend(stack)
                whole = first.complete
            yield DirectoryLeft(_FOLDER_MODE, 0, b"", whole and self._filters is None, False)
        finally:
            for folder in stack:
                os.close(folder.fd)
            if self._shared is not None:
                self._shared.release()

    # --- folders ------------------------------------------------------------------------------------------------

    def _begin(self) -> tuple[_Folder, list[_Row]]:
        """The root's frame and its rows: what is in a folder, or the one thing that was named."""
        root = self._root
        if not root.name:
            fd = os.open(root.path, os.O_RDONLY | os.O_DIRECTORY)
            first = _Folder(fd, b"", b"", os.fstat(fd))
            rows = self._list(first)
            return first, [(self._name(b""), b"", first.st), *rows]
        parent, _, name = root.path.rpartition(b"/")
        fd = os.open(parent or b".", os.O_RDONLY | os.O_DIRECTORY)
        first = _Folder(fd, b"", b"", os.fstat(fd))
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            os.close(fd)
            raise
        row = (self._name(root.name), name, st)
        if stat.S_ISDIR(st.st_mode):
            first.pending = [row]
            return first, []
        return first, [row]

    def _list(self, folder: _Folder) -> list[_Row]:
        """What is in a folder and no folder; the folders are left pending."""
        rows: list[_Row] = []
        with os.scandir(folder.fd) as listing:
            for item in listing:
                name = os.fsencode(item.name)
                try:
                    st = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # gone between listing and stat: never seen
                path = join(folder.path, name)
                is_folder = stat.S_ISDIR(st.st_mode)
                if name == STAGING_NAME or (
                    self._filters is not None and not self._filters.allows(path, is_folder)
                ):
                    continue
                if is_folder:
                    folder.pending.append((self._name(path), name, st))
                elif stat.S_ISREG(st.st_mode) or stat.S_ISLNK(st.st_mode):
                    rows.append((self._name(path), name, st))
                else:
                    folder.complete = self.complete = False
                    self._note(f"{show_path(path)} is left out: sockets, pipes and devices are not moved")
        folder.pending.sort(reverse=True)
        return rows

    def _descend(self, stack: list[_Folder]) -> Iterator[Event]:
        first = stack[0]
        while True:
            folder = stack[-1]
            if not folder.pending:
                if folder is first:
                    return
                stack.pop()
                os.close(folder.fd)
                yield DirectoryLeft(_FOLDER_MODE, 0, b"", folder.complete and self._filters is None, True)
                continue
            sealed, name, _ = folder.pending.pop()
            path = join(folder.path, self._shown(folder, name))
            shown = join(folder.sealed, sealed)
            if len(stack) >= MAX_DEPTH or len(path) > MAX_PATH_BYTES or len(shown) > MAX_PATH_BYTES:
                folder.complete = self.complete = False
                why = f"sealed paths may have {MAX_DEPTH} parts and {MAX_PATH_BYTES} bytes"
                self._note(f"{show_path(path)} is left out: {why}")
                yield ScanFailed(shown, "too-deep", why)
                continue
            try:
                fd = os.open(name, READ_FOLDER, dir_fd=folder.fd)
            except OSError as error:
                yield self._failed(folder, path, shown, error)
                continue
            below = _Folder(fd, path, shown, os.fstat(fd))
            stack.append(below)
            yield DirectoryEntered(sealed, shown)
            try:
                rows = self._list(below)
            except OSError as error:
                yield self._failed(below, path, shown, error)
                rows = []
            yield from self._objects(below, [(self._name(path), b"", below.st), *rows])

    def _shown(self, folder: _Folder, name: bytes) -> bytes:
        """What an object is called in the version: the one that was named may be called otherwise."""
        return self._root.name if self._root.name and not folder.path else name

    def _name(self, path: bytes) -> bytes:
        return object_name(self._key.object_id(path))

    def _failed(self, folder: _Folder | None, path: bytes, shown: bytes, error: OSError) -> ScanFailed:
        self.complete = False
        if folder is not None:
            folder.complete = False
        reason = (
            "vanished"
            if isinstance(error, FileNotFoundError)
            else "permission"
            if isinstance(error, PermissionError)
            else "unreadable"
        )
        self._note(f"{show_path(path)} is left out: {error.strerror or error}")
        return ScanFailed(shown, reason, error.strerror or "it could not be read")

    # --- objects ------------------------------------------------------------------------------------------------

    def _objects(self, folder: _Folder, rows: list[_Row]) -> Iterator[Event]:
        """Events for what is in a folder and no folder, and for the folder itself (its own name is empty)."""
        batch = _Open([], [], None)
        self.objects += len(rows)
        for sealed, name, st in sorted(rows):
            path = join(folder.path, self._shown(folder, name)) if name else folder.path
            shown = join(folder.sealed, sealed)
            try:
                if stat.S_ISREG(st.st_mode):
                    extra = self._extra_of(folder.fd, name, st)
                    size = ObjectSealer.size_of(path, st.st_size, extra=extra)
                    if size >= LARGE_OBJECT_BYTES:
                        if batch.entries:
                            yield batch.close()
                            batch = _Open([], [], None)
                        self._let_go()
                        yield from self._large(folder, sealed, name, path)
                        continue
                data = self._small(folder, name, st, path)
            except OSError as error:
                yield self._failed(folder, path, shown, error)
                continue
            except ObjectChanged as error:
                folder.complete = self.complete = False
                self._note(f"{show_path(path)} is left out: {error.message}")
                yield ScanFailed(shown, "changed", error.message)
                continue
            if batch.entries and (
                len(batch.entries) >= MAX_BATCH_ENTRIES
                or batch.chunks >= MAX_BATCH_CHUNKS
                or self._filled + len(data) > self._pool.size_bytes
            ):
                yield batch.close()
                batch = _Open([], [], None)
            self._put(batch, sealed, data)
        if batch.entries:
            yield batch.close()

    def _put(self, batch: _Open, sealed: bytes, data: bytes) -> None:
        if self._shared is not None and self._filled + len(data) > self._pool.size_bytes:
            self._let_go()
        if self._shared is None:
            self._shared, self._filled = self._pool.acquire(), 0
        if batch.buffer is None:
            self._shared.hold()
            batch.buffer = self._shared
        view = self._shared.view[self._filled : self._filled + len(data)]
        view[:] = data
        lengths = self._cutter.lengths(view)
        batch.entries.append(
            Entry(sealed, FILE, _FILE_MODE, 0, len(data), pack_ids(lengths, ids_of(view, lengths)))
        )
        batch.starts.append(self._filled)
        batch.chunks += len(lengths)
        self._filled += len(data)
        self.size_bytes += len(data)

    def _let_go(self) -> None:
        if self._shared is not None:
            self._shared.release()
            self._shared = None

    def _small(self, folder: _Folder, name: bytes, st: os.stat_result, path: bytes) -> bytes:
        """One sealed object whose bytes fit a batch."""
        sealer = ObjectSealer(self._key, path)
        if not name:
            extra = self._extra(folder.fd, folder.st) if self._extra is not None else b""
            return sealer.seal(
                b"", "directory", folder.st.st_mode & self._mode_bits, folder.st.st_mtime_ns, extra=extra
            )
        if stat.S_ISLNK(st.st_mode):
            return sealer.seal(b"", "symlink", 0o777, st.st_mtime_ns, os.readlink(name, dir_fd=folder.fd))
        fd = os.open(name, READ_FILE, dir_fd=folder.fd)
        try:
            for _ in range(READ_ATTEMPTS):
                before = os.fstat(fd)
                if before.st_size >= LARGE_OBJECT_BYTES:  # since it was listed: not into memory
                    raise ObjectChanged("grew while it was read; what was read of it was thrown away")
                self._pace(before.st_size)
                content = os.pread(fd, before.st_size + 1, 0)
                if len(content) == before.st_size and _same(before, os.fstat(fd)):
                    break
            else:
                raise ObjectChanged("changed while it was read; what was read of it was thrown away")
            extra = self._extra(fd, before) if self._extra is not None else b""
            if ObjectSealer.size_of(path, len(content), extra=extra) >= LARGE_OBJECT_BYTES:
                raise ObjectChanged("grew while it was read; what was read of it was thrown away")
        finally:
            os.close(fd)
        self.objects_read += 1
        self.bytes_read += len(content)
        return sealer.seal(content, "file", before.st_mode & self._mode_bits, before.st_mtime_ns, extra=extra)

    def _extra_of(self, folder_fd: int, name: bytes, st: os.stat_result) -> bytes:
        if self._extra is None:
            return b""
        fd = os.open(name, READ_FILE, dir_fd=folder_fd)
        try:
            return self._extra(fd, st)
        finally:
            os.close(fd)

    def _large(self, folder: _Folder, sealed: bytes, name: bytes, path: bytes) -> Iterator[Event]:
        """Events of one large object, again from the start when it changes."""
        shown = join(folder.sealed, sealed)
        for _ in range(READ_ATTEMPTS):
            fd = os.open(name, READ_FILE, dir_fd=folder.fd)
            try:
                st = os.fstat(fd)
                extra = self._extra(fd, st) if self._extra is not None else b""
                size = ObjectSealer.size_of(path, st.st_size, extra=extra)
                if size < LARGE_OBJECT_BYTES:
                    break
                yield LargeBegun(Entry(sealed, FILE, _FILE_MODE, 0, size), b"")
                try:
                    yield from self._pieces(self._sealed(fd, st, path, extra))
                    if not _same(st, os.fstat(fd)):
                        raise ObjectChanged("changed while it was read")
                except ObjectChanged as error:
                    yield LargeEnded("changed", error.message)
                    continue
                except OSError as error:
                    yield LargeEnded("unreadable", error.strerror or "it could not be read")
                    yield self._failed(folder, path, shown, error)
                    return
            finally:
                os.close(fd)
            self.objects_read += 1
            self.size_bytes += size
            yield LargeEnded("", "")
            return
        folder.complete = self.complete = False
        why = f"changed while it was read, {READ_ATTEMPTS} times in a row"
        self._note(f"{show_path(path)} is left out: {why}")
        yield ScanFailed(shown, "changed", why)

    def _sealed(self, fd: int, st: os.stat_result, path: bytes, extra: bytes) -> Iterator[bytes | bytearray]:
        """The parts of a sealed object."""
        sealer = ObjectSealer(self._key, path)
        yield sealer.header
        for at in range(0, st.st_size, SEGMENT_BYTES):
            wanted = min(SEGMENT_BYTES, st.st_size - at)
            self._pace(wanted)
            content = os.pread(fd, wanted, at)
            if len(content) != wanted:
                raise ObjectChanged(
                    f"expected {st.st_size} bytes, the object now ends at {at + len(content)}"
                )
            self.bytes_read += wanted
            yield sealer.segment(content)
        yield sealer.finish("file", st.st_mode & self._mode_bits, st.st_mtime_ns, extra=extra)

    def _pieces(self, parts: Iterator[bytes | bytearray]) -> Iterator[Event]:
        """What parts make, cut into chunks."""
        part: bytes | bytearray | None = next(parts)
        carry = b""
        offset = 0
        while part is not None:
            buffer = self._pool.acquire()
            try:
                view, filled = buffer.view, len(carry)
                view[:filled] = carry
                room = min(len(view), READ_BYTES + filled)
                while part is not None and filled + len(part) <= room:
                    view[filled : filled + len(part)] = part
                    filled += len(part)
                    part = next(parts, None)
                lengths = self._cutter.lengths(view[:filled])
                if part is not None:
                    lengths.pop()  # it ends with the buffer, not necessarily with a cut
                done = sum(lengths)
                carry = bytes(view[done:filled])
                piece = Piece(offset, lengths, pack_ids(lengths, ids_of(view, lengths)), buffer, 0)
            except BaseException:
                buffer.release()
                raise
            offset += done
            yield LargePiece(piece, False)


@dataclass
class _Open:
    """A batch that is being filled."""

    entries: list[Entry]
    starts: list[int]
    buffer: Buffer | None
    chunks: int = 0

    def close(self) -> Batch:
        return Batch(self.entries, self.buffer, self.starts, b"")


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns, one.st_ctime_ns) == (
        other.st_size,
        other.st_mtime_ns,
        other.st_ctime_ns,
    )
