"""What a large object can be rebuilt from: the file that stands in its place now, cut and indexed as it is read.

The basis is read in its own thread while offers arrive, so source and target read at the same time. A question that
the index cannot answer yet waits until the reading is some way past the place asked about: edits are local, and what
moved further than that is sent again.
"""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import Final

from flowengine.chunking import CHUNK_BYTES, Profile, packed_size
from flowengine.store.buffers import BufferPool
from flowengine.store.reading import SEGMENT_BYTES, ObjectReader
from flowengine.store.scan_cache import Identity, ScanCache
from flowengine.units import MIB

__all__ = ["Basis", "Recalled"]

LOOK_AHEAD_BYTES: Final = 64 * MIB
MAX_INDEXED_CHUNKS: Final = 500_000
"""Chunks that may have moved are looked for among so many (about 40 GB of object around the place asked about)."""
MAX_LISTED_CHUNKS: Final = 4_000_000
"""Chunks are compared place by place up to so many; larger objects want a larger chunk size."""
MAX_AHEAD_BYTES: Final = 8192 * MIB
"""How far reading may run ahead of what is asked for."""


class Basis:
    """Chunk id → offset in an existing file.

    Attributes:
        fd: of the file, open for reading until `close`.
        st: the file's stat when it was opened.
        elsewhere: the file has another name, and may be replaced or renamed at any time.
        found_bytes: size of the chunks that were found in it.
        trusted: the file was hashed in this session; otherwise what is taken from it is hashed when copied.
    """

    def __init__(
        self,
        fd: int,
        st: os.stat_result,
        profile: Profile,
        cache: ScanCache | None,
        *,
        elsewhere: bool = False,
    ) -> None:
        self.fd = fd
        self.st = st
        self.size_bytes = st.st_size
        self.identity = Identity.of(st)
        self.found_bytes = 0
        self.elsewhere = elsewhere
        self._profile = profile
        self._index: dict[bytes, int] = {}
        self._listed = bytearray()
        self._compared = 0
        self._asked = 0
        self._condition = threading.Condition()
        self._progress = 0
        self._done = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self.trusted = True
        self.bytes_read = 0
        pieces = cache.pieces(self.identity) if cache is not None else []
        for offset, packed in pieces:
            self._add(offset, packed)
        if self._progress >= self.size_bytes:
            self._done = True
            self.trusted = False
        else:
            self._index.clear()
            self._listed.clear()
            self._progress = 0
            self._thread = threading.Thread(target=self._read, name="flow-basis", daemon=True)
            self._thread.start()

    @property
    def known_without_reading(self) -> bool:
        """Whether the scan cache told all of it."""
        return self._thread is None

    def _add(self, offset: int, packed: bytes) -> None:
        index = self._index
        if len(self._listed) < MAX_LISTED_CHUNKS * CHUNK_BYTES:
            self._listed += packed
        for at in range(0, len(packed), CHUNK_BYTES):
            index[packed[at : at + CHUNK_BYTES]] = offset
            offset += int.from_bytes(packed[at : at + 4], "little")
        while len(index) > MAX_INDEXED_CHUNKS:
            del index[next(iter(index))]
        self._progress = offset

    def _read(self) -> None:
        pool = BufferPool(2, SEGMENT_BYTES + self._profile.maximum)
        reader = ObjectReader(self._profile, pool)
        try:
            with closing(reader.pieces(self.fd, self.size_bytes, sparse=True)) as pieces:
                for piece in pieces:
                    if piece.buffer is not None:
                        piece.buffer.release()
                    self.bytes_read += piece.size_bytes
                    with self._condition:
                        self._add(piece.offset, piece.packed)
                        self._condition.notify_all()
                        while not self._closed and self._progress > self._asked + MAX_AHEAD_BYTES:
                            self._condition.wait()
                        if self._closed:
                            return
        except Exception:  # noqa: S110 - what cannot be read is simply no basis; its chunks come from the source
            pass
        finally:
            with self._condition:
                self._done = True
                self._condition.notify_all()

    def find(self, one: bytes, near: int) -> int | None:
        """Offset of a chunk (packed: length and id) in the file. Blocks.

        None when it is not there, or further ahead than is waited for.
        """
        with self._condition:
            self._ask(near)
            while True:
                found = self._index.get(one)
                if (
                    found is not None
                    or self._done
                    or self._progress >= min(near + LOOK_AHEAD_BYTES, self.size_bytes)
                ):
                    return found
                self._condition.wait()

    def goes_on_with(self, offset: int, packed: bytes) -> bool:
        """Whether just these chunks come next in the file, given that all before `offset` were asked about. Blocks."""
        with self._condition:
            self._ask(offset + packed_size(packed))  # a long run may end beyond what is read ahead by itself
            end = self._compared + len(packed)
            while len(self._listed) < end and not self._done:
                self._condition.wait()
            if self._listed[self._compared : end] != packed:
                return False
            self._compared = end
            return True

    def _ask(self, offset: int) -> None:
        self._asked = max(self._asked, offset)
        self._condition.notify_all()

    def unchanged(self) -> bool:
        """Whether the file is still the one that was read."""
        st = os.fstat(self.fd)
        if self.elsewhere:  # a rename moves its ctime
            return (st.st_size, st.st_mtime_ns) == (self.st.st_size, self.st.st_mtime_ns)
        return Identity.of(st) == self.identity

    def close(self) -> None:
        """Stop reading and close the file. Blocks until the reader has let go of it."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
        os.close(self.fd)


class Recalled:
    """A file of another name that the chunk index takes for the object, open for reading until `close`.

    Nothing of it was read: each chunk that is taken from it is hashed when it is copied.

    Attributes:
        whole: the index knew all that was offered so far.
    """

    trusted: Final = False

    def __init__(self, fd: int, path: bytes) -> None:
        self.fd = fd
        self.path = path
        self.whole = True

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)
