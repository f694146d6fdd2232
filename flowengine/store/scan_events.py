"""What a scan tells, in the manifest's order."""

from __future__ import annotations

import msgspec

from flowengine.manifest import Block, Entry
from flowengine.store.buffers import Buffer
from flowengine.store.reading import Piece

__all__ = [
    "Batch",
    "DirectoryEntered",
    "DirectoryLeft",
    "Event",
    "LargeBegun",
    "LargeEnded",
    "LargePiece",
    "ScanFailed",
]


class DirectoryEntered(msgspec.Struct):
    """What follows is in directory `name` of the current one (empty: the root)."""

    name: bytes
    path: bytes


class DirectoryLeft(msgspec.Struct):
    """The current directory is done; `complete` is False where its listing failed or a filter hid entries."""

    mode: int
    mtime_ns: int
    extra: bytes
    complete: bool
    apply: bool


class Batch:
    """Consecutive entries of the current directory, as a list or as a block.

    Args:
        entries: in name order.

    Attributes:
        block: the entries, where they came as one.
        buffer: bytes of the entries that were read now; one holder, to be released by the consumer.
        starts: per entry, where its bytes begin in the buffer; -1: not read now (cached, empty or a link). Of a block
            that was read it is the first one alone: its files lie one behind the other.
        path: the directory's real path.
        renamed: what its one entry is called there, where that differs.
        recalled: all of it is as the scan cache had it.
    """

    __slots__ = ("_entries", "block", "buffer", "path", "recalled", "renamed", "starts")

    def __init__(
        self,
        entries: list[Entry] | Block,
        buffer: Buffer | None,
        starts: list[int],
        path: bytes,
        renamed: bytes = b"",
        recalled: bool = False,
    ) -> None:
        self.block = entries if isinstance(entries, Block) else None
        self._entries = None if isinstance(entries, Block) else entries
        self.buffer = buffer
        self.starts = starts
        self.path = path
        self.renamed = renamed
        self.recalled = recalled

    @property
    def entries(self) -> list[Entry]:
        """The entries; those of a block are made when first asked for."""
        if self._entries is None:
            assert self.block is not None
            self._entries = self.block.entries
        return self._entries

    def path_of(self, entry: Entry) -> bytes:
        """Where an entry of the batch can be read again."""
        return self.path.rstrip(b"/") + b"/" + (self.renamed or entry.name)


class LargeBegun(msgspec.Struct):
    """A large object's pieces follow; `path` is where it can be read again."""

    entry: Entry
    path: bytes


class LargePiece(msgspec.Struct):
    """The next piece; `cached`: known without reading, `piece.buffer` is None."""

    piece: Piece
    cached: bool


class LargeEnded(msgspec.Struct):
    """The large object is complete, or (with a reason) must be forgotten."""

    reason: str
    message: str


class ScanFailed(msgspec.Struct):
    """Something could not be read; it is not part of what follows."""

    path: bytes
    reason: str
    message: str


Event = DirectoryEntered | DirectoryLeft | Batch | LargeBegun | LargePiece | LargeEnded | ScanFailed
