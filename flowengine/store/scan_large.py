"""Reads a large object for a scan, piece by piece: what the scan cache knows of it is not opened.

Goal
    An object of any size in a few buffers, read once, and after an interruption only from where it was left.
Invariants
    - The cache learns a piece only of an object that is as it was when it was listed, and of which no change can hide
      behind the clock.
    - An object that changed while it was read ends with a reason, and what the cache knew of it is forgotten.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

from flowengine.chunking import lengths_of
from flowengine.manifest import FILE, FLAG_SPARSE, Entry
from flowengine.store.filesystem import READ_FILE
from flowengine.store.many import Stat
from flowengine.store.reading import ObjectChanged, ObjectReader, Piece
from flowengine.store.scan_cache import Identity, ScanCache, known_runs
from flowengine.store.scan_events import Event, LargeBegun, LargeEnded, LargePiece
from flowengine.store.scan_small import ExtraReader, read_extra

__all__ = ["LargeScan"]


class LargeScan:
    """Reads large objects, one at a time.

    Args:
        cache: what earlier scans learned; None reads without memory.
        extra: reads what else is part of an entry; None for nothing.
        mode_bits: bits of a mode that are part of it.

    Attributes:
        objects_read: objects that were opened and read to their end.
        bytes_read: bytes that were read.
    """

    def __init__(
        self, reader: ObjectReader, cache: ScanCache | None, extra: ExtraReader | None, mode_bits: int
    ) -> None:
        self._reader = reader
        self._cache = cache
        self._extra = extra
        self._mode_bits = mode_bits
        self.objects_read = 0
        self.bytes_read = 0

    def once(
        self, dirfd: int, real: bytes, name: bytes, st: Stat, racy_from: int
    ) -> Generator[Event, None, bool]:
        """One attempt; returns whether it held still.

        Args:
            dirfd, real: its directory, and the path of that.
            st: as it was listed.
            racy_from: what changed since then may have changed again without its time showing it.

        Raises:
            OSError: it cannot be opened or read.
        """
        flags = FLAG_SPARSE if st.st_blocks * 512 < st.st_size else 0
        extra = read_extra(self._extra, dirfd, name, st) if self._extra is not None else b""
        entry = Entry(
            name, FILE, st.st_mode & self._mode_bits, st.st_mtime_ns, st.st_size, b"", b"", flags, extra
        )
        yield LargeBegun(entry, real.rstrip(b"/") + b"/" + name)
        identity = Identity.of(st)
        done = 0
        cached = self._cache.pieces(identity) if self._cache is not None else []
        for packed in known_runs(cached, st.st_size):
            lengths = lengths_of(packed)
            yield LargePiece(Piece(done, lengths, packed, None, 0), True)
            done += sum(lengths)
        if done < st.st_size:
            fd = os.open(name, READ_FILE, dir_fd=dirfd)
            try:
                yield from self._pieces(fd, st, identity, done, racy_from, fresh=not cached)
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

    def _pieces(
        self, fd: int, st: Stat, identity: Identity, done: int, racy_from: int, *, fresh: bool
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
            pieces.close()
