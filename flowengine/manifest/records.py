"""Records of a manifest file: how pieces are framed, found and read back with their hashes checked.

A record is a type, two lengths, a body (which its id is the hash of) and a *locator*: offsets of the records
that the body names. Locators are not hashed: one that lies leads to a record without the id looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct as Packing
from struct import unpack
from typing import Final, NamedTuple

from flowengine.chunking import CHUNK_BYTES, ID_BYTES
from flowengine.manifest.cut import MAX_RUN_ITEMS
from flowengine.manifest.entries import (
    MAX_INLINE_ITEMS,
    MAX_NODE_PAGES,
    MAX_PAGE_BYTES,
    MAX_PAGE_ENTRIES,
    RUN_BYTES,
    Entry,
    Header,
    Kind,
    Node,
    Subdirectory,
    check_entries,
    check_extra,
    check_names,
    damaged,
    decode_canonical,
    decode_node_fields,
    decode_page,
    decode_subdirectories,
    digest,
    lie,
)
from flowengine.units import show_path

__all__ = [
    "END_MAGIC",
    "FILE_CONTEXT",
    "FOOTER",
    "MAGIC",
    "RECORD",
    "EntryPage",
    "RecordReader",
    "SubdirectoryPage",
]

MAGIC: Final = b"\x89FLOWM\r\n"
END_MAGIC: Final = b"\x89FLOWEND"
RECORD: Final = Packing("<BII")
"""Before every record: type, bytes of the body, bytes of the locator."""
FOOTER: Final = Packing("<Q32s32s8s")
"""The file's last bytes: offset of the root record, version id, checksum of all before it, `END_MAGIC`."""
FILE_CONTEXT: Final = "flowengine manifest v1 file"

_MAX_BODY: Final = {
    Kind.HEADER: 128,
    Kind.RUN: MAX_RUN_ITEMS * CHUNK_BYTES,
    Kind.RUN_LIST: MAX_RUN_ITEMS * RUN_BYTES,
    Kind.ENTRIES: MAX_PAGE_BYTES,
    Kind.SUBDIRECTORIES: MAX_PAGE_BYTES,
    Kind.NODE: MAX_NODE_PAGES * ID_BYTES + 16,
    Kind.ROOT: MAX_PAGE_BYTES,
}
_MAX_LOCATOR: Final = {
    Kind.HEADER: 0,
    Kind.RUN: 0,
    Kind.RUN_LIST: MAX_RUN_ITEMS * 8,
    Kind.ENTRIES: MAX_PAGE_ENTRIES * MAX_INLINE_ITEMS * 8,
    Kind.SUBDIRECTORIES: MAX_PAGE_ENTRIES * 8,
    Kind.NODE: MAX_NODE_PAGES * 8,
    Kind.ROOT: 8,
}


class EntryPage(NamedTuple):
    """A page of entries as read; `offsets` has one place for each run of each entry, in their order."""

    entries: list[Entry]
    offsets: tuple[int, ...]
    size: int
    chunks: int


class SubdirectoryPage(NamedTuple):
    """A page of subdirectories as read; `offsets` has the place of each one's node."""

    entries: list[Subdirectory]
    offsets: tuple[int, ...]


class DirectoryNode(NamedTuple):
    """A directory's pages: ids and offsets."""

    entries: list[tuple[bytes, int]]
    subdirectories: list[tuple[bytes, int]]


class RecordReader:
    """Reads single records, each checked against the id that its parent has for it.

    Args:
        read_at: Gives `length` bytes from `offset`; fewer only at the file's end.
        size: Bytes of the file.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at = read_at
        self.end = size - FOOTER.size
        self.header = Header()
        self.records_read = 0

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        data = bytes(self._read_at(offset, length))
        if len(data) != length:
            raise damaged(f"it ends at byte {offset + len(data)}, {offset + length} were expected")
        return data

    def record(
        self, kind: Kind, offset: int, identity: bytes | None, before: int
    ) -> tuple[bytes, tuple[int, ...]]:
        """Body and offsets of the record at `offset`, which must lie below `before`.

        Children are written before their parents, so `before` is the parent's offset: no file makes a reader
        go in circles.
        """
        self.records_read += 1
        if not len(MAGIC) <= offset <= before - RECORD.size:
            raise damaged(
                f"a {kind.name.lower()} record should begin at byte {offset}, outside of where it can"
            )
        found, body_bytes, locator_bytes = RECORD.unpack(self.read(offset, RECORD.size))
        if found != kind:
            raise damaged(
                f"the record at byte {offset} has type {found}, not {int(kind)} ({kind.name.lower()})"
            )
        if body_bytes > _MAX_BODY[kind] or locator_bytes > _MAX_LOCATOR[kind] or locator_bytes % 8:
            raise damaged(
                f"the record at byte {offset} has impossible lengths {body_bytes} and {locator_bytes}"
            )
        if offset + RECORD.size + body_bytes + locator_bytes > before:
            raise damaged(f"the record at byte {offset} runs into the next one")
        data = self.read(offset + RECORD.size, body_bytes + locator_bytes)
        body = data[:body_bytes]
        if identity is not None and digest(kind, body) != identity:
            raise damaged(
                f"the {kind.name.lower()} record at byte {offset} does not have the hash {identity.hex()}"
            )
        return body, unpack(f"<{locator_bytes // 8}Q", data[body_bytes:])

    def node(self, identity: bytes, offset: int, before: int, where: bytes) -> DirectoryNode:
        """The pages of directory `where`."""
        body, offsets = self.record(Kind.NODE, offset, identity, before)
        node: Node = decode_canonical(decode_node_fields, body, "directory node", where)
        if len(node.entries) % ID_BYTES or len(node.subdirectories) % ID_BYTES:
            lie(where, b"", "its list of pages is cut off")
        ids = node.entries + node.subdirectories
        pages = [(ids[at : at + ID_BYTES], place) for at, place in zip(_steps(ids), offsets, strict=False)]
        self._match(len(offsets), len(ids) // ID_BYTES, where)
        files = len(node.entries) // ID_BYTES
        return DirectoryNode(pages[:files], pages[files:])

    def entry_page(
        self, identity: bytes, offset: int, before: int, where: bytes, after: bytes = b""
    ) -> EntryPage:
        """A page of entries of `where`, whose names come after `after`."""
        body, offsets = self.record(Kind.ENTRIES, offset, identity, before)
        entries = decode_page(body, where)
        totals = check_entries(entries, where, after, self.header)
        self._match(len(offsets), sum([len(e.runs) for e in entries]) // RUN_BYTES, where)
        return EntryPage(entries, offsets, totals.size, totals.chunks)

    def subdirectory_page(
        self, identity: bytes, offset: int, before: int, where: bytes, after: bytes = b""
    ) -> SubdirectoryPage:
        """A page of subdirectories of `where`, whose names come after `after`."""
        body, offsets = self.record(Kind.SUBDIRECTORIES, offset, identity, before)
        entries = decode_subdirectories(body, where)
        check_names([entry.name for entry in entries], where, after)
        for entry in entries:
            if entry.extra:
                check_extra(entry.extra, where, entry.name, self.header)
        self._match(len(offsets), len(entries), where)
        return SubdirectoryPage(entries, offsets)

    def first_name(self, kind: Kind, identity: bytes, offset: int, before: int) -> bytes:
        """The name that a page of either kind begins with, without decoding the page; its hash is checked.

        On a page of a liar this may be no name at all; whoever goes on to that page finds out there.
        """
        body, _ = self.record(kind, offset, identity, before)
        length_at = 5 if body[:1] == b"\xdc" else 3  # after the page's array, the entry's array, and `c4`
        return body[length_at + 1 : length_at + 1 + body[length_at]] if len(body) > length_at else b""

    @staticmethod
    def _match(found: int, expected: int, where: bytes) -> None:
        if found != expected:
            raise damaged(f"a locator in {show_path(where)!r} has {found} offsets, {expected} were expected")


def _steps(ids: bytes) -> range:
    return range(0, len(ids), ID_BYTES)
