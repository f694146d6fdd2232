"""What landed below a target root, noted for its chunk index without loading what searches one.

A log is written in one piece at the end of a transfer (or once much has come together) and taken over by the next
`ChunkIndex` that is opened there. Like the index it is a cache: it is never synced, and a damaged one is dropped.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import Final

from flowengine.chunking import CHUNK_BYTES
from flowengine.manifest import Block, Columns, Entry
from flowengine.store.landed import index_folder
from flowengine.store.many import AnyStat, Rows
from flowengine.store.runs import log_rows

__all__ = ["LOG_SUFFIX", "IndexLog", "read_log"]

LOG_SUFFIX: Final = ".log"
_MAGIC: Final = b"flowlog1"
_ROW: Final = struct.Struct("<HIQqQ")
"""Bytes of the path, bytes of the packed chunks, size and mtime_ns of the object, offset of the first chunk."""


class IndexLog:
    """Collects what landed below a root. For use by one thread.

    Args:
        root: the target root's real path.
        profile_name: of the chunking profile.
        directory: state directory; the user's where None.

    Attributes:
        chunks: how many wait to be written.
    """

    def __init__(self, root: bytes, profile_name: str, directory: str | None = None) -> None:
        self._folder = index_folder(root, profile_name, directory)
        self._rows: list[bytes] = []
        self._written = 0
        self.chunks = 0

    def add(self, path: bytes, st: AnyStat, offset: int, packed: bytes) -> None:
        """Chunks that landed in an object, from `offset` on."""
        row = _ROW.pack(len(path), len(packed), st.st_size, st.st_mtime_ns, offset)
        self._rows += (row, path, packed)
        self.chunks += len(packed) // CHUNK_BYTES

    def add_small(self, folder: bytes, rows: list[tuple[bytes, AnyStat, Entry]]) -> None:
        """Small objects that landed in a folder: (name, stat, entry) of each."""
        before = folder + b"/" if folder else b""
        out, pack = self._rows, _ROW.pack
        for name, st, entry in rows:
            packed = entry.chunks
            if packed:
                path = before + name
                out += (pack(len(path), len(packed), st.st_size, st.st_mtime_ns, 0), path, packed)
                self.chunks += len(packed) // CHUNK_BYTES

    def add_block(self, folder: bytes, block: Block, rows: Rows, columns: Columns | None = None) -> None:
        """The same, of a block and the stats of its files; `columns` are its own, where they were made elsewhere."""
        data = log_rows(folder + b"/" if folder else b"", columns or block.columns, rows)
        if data is None:
            self.add_small(folder, [*zip(block.names, rows.stats, block.entries, strict=True)])
        else:
            self._rows.append(data)
            self.chunks += block.chunks

    def add_rows(self, rows: bytes, chunks: int) -> None:
        """Rows of so many chunks that are written already (`store.runs.note_folders`)."""
        self._rows.append(rows)
        self.chunks += chunks

    def flush(self) -> None:
        """Write what was added. Failures cost the cache only."""
        if not self._rows:
            return
        path = os.path.join(self._folder, f"{os.getpid():08d}-{self._written:04d}{LOG_SUFFIX}")
        self._written += 1
        rows, self._rows, self.chunks = self._rows, [], 0
        with contextlib.suppress(OSError):
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            fd = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "wb") as file:
                file.write(_MAGIC + b"".join(rows))
            os.replace(f"{path}.part", path)


def read_log(path: str) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    """(path, size, mtime_ns, offset, packed chunks) of each row of a log.

    Raises:
        ValueError: it is damaged.
        OSError: as the file system says.
    """
    with open(path, "rb") as file:
        data = file.read()
    at, end = len(_MAGIC), len(data)
    if data[:at] != _MAGIC:
        raise ValueError("not a log of a chunk index")
    while at < end:
        if at + _ROW.size > end:
            raise ValueError("the log is cut off")
        path_bytes, packed_bytes, size, mtime_ns, offset = _ROW.unpack_from(data, at)
        at += _ROW.size
        stop = at + path_bytes + packed_bytes
        if stop > end or not packed_bytes or packed_bytes % CHUNK_BYTES:
            raise ValueError("a row of the log is cut off")
        yield data[at : at + path_bytes], size, mtime_ns, offset, data[at + path_bytes : stop]
        at = stop
