"""Coverage-guided fuzzing of everything that reads a manifest.

Usage: python tests/fuzz/fuzz_manifest.py TARGET [libFuzzer options], as `pages -max_total_time=60`; `--list`
names the targets. Needs atheris; importing this module, and calling the targets with bytes, does not.

A target must take any bytes: the manifest's two errors are right, anything else is a finding.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Final

from blake3 import blake3

from flowengine.errors import IntegrityError, ProtocolError
from flowengine.manifest import (
    DIRECTORY,
    Entry,
    Extra,
    Header,
    ManifestBuilder,
    ManifestReader,
    chunk_count,
    cut_pages,
    decode_extra,
    diff,
    encode_extra,
)
from flowengine.manifest.entries import Kind, decode_page, digest, encode
from flowengine.manifest.records import END_MAGIC, FILE_CONTEXT, FOOTER, MAGIC, RECORD

_REFUSED: Final = (IntegrityError, ProtocolError)
_MOST_LOOKUPS: Final = 100


def _page_and_file() -> tuple[bytes, bytes]:
    out = bytearray()
    builder = ManifestBuilder(out.extend)
    builder.begin_directory(b"")
    chunk = struct.pack("<I32s", 5, b"c" * 32)
    large = builder.new_object()
    large.feed(chunk * 1100)
    entries = [
        Entry(b"a", 0, 0o644, 1, 5, chunk),
        Entry(b"h", 2, 0o644, 1, link=b"a"),
        Entry(b"l", 1, 0o777, 2, link=b"a"),
        Entry(b"o", 0, 0o600, -3, **large.finish().fields()),
    ]
    page = builder.add_page(entries).data
    builder.begin_directory(b"d")
    builder.end_directory(0o755, 3)
    builder.end_directory(0o755, 4)
    builder.finish()
    return page, bytes(out)


_PAGE, _FILE = _page_and_file()
_EXTRA: Final = encode_extra(Extra(((b"user.a", b"1"), (b"user.b", b"2")), 7, None, b"o", b"g"))
_RUN: Final = struct.pack("<I32s", 5, b"c" * 32) * 1100
_RUN_ID: Final = digest(Kind.RUN, _RUN)
_PLACE: Final = b"R" * 32


def _altered(whole: bytes, data: bytes) -> bytes:
    """What `data` says to do to `whole`: three bytes each, a place and what to put there."""
    out = bytearray(whole)
    for at in range(0, len(data) - 2, 3):
        place = int.from_bytes(data[at : at + 2], "little") % len(out)
        out[place] ^= data[at + 2]
    return bytes(out)


def pages(data: bytes) -> None:
    """A page from a peer, any or nearly right: accepted only in its one spelling."""
    if data[:1] == b"\0":
        data = _altered(_PAGE, data[1:])
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    try:
        page = builder.add_encoded_page(data)
        builder.end_directory(0, 0)
    except _REFUSED:
        return
    if page.data != data or page.page_id != digest(Kind.ENTRIES, data):
        raise AssertionError("a page changed on its way")
    if builder.finish().objects != len(decode_page(data, b"")):
        raise AssertionError("entries were lost")


def files(data: bytes) -> None:
    """A whole file, any or nearly right: what is read of an altered one was there before."""
    near = data[:1] == b"\0"
    if near:
        data = _altered(_FILE, data[1:])
    found = _read(data)
    if near and found is not None and found != _read(_FILE):
        raise AssertionError("a forged entry was believed")


def records(data: bytes) -> None:
    """A file whose hashes and checksum are right around any bodies, as a hostile maker can write it."""
    _read(forged(data))


def forged(data: bytes) -> bytes:
    """Such a file; a right one for no data."""
    page, data = _part(data, _PAGE.replace(_RUN_ID, _PLACE))
    below, data = _part(data, b"\x91\x99\xc4\1d\0\0\xc4\x20" + bytes(32) + b"\0\0\0\0\xc4\0")
    run, data = _part(data, _RUN)
    out = bytearray(MAGIC)

    def add(kind: Kind, body: bytes, *offsets: int) -> tuple[bytes, int]:
        offset = len(out)
        out.extend(RECORD.pack(kind, len(body), 8 * len(offsets)) + body)
        out.extend(struct.pack(f"<{len(offsets)}Q", *offsets))
        return digest(kind, body) if kind is not Kind.HEADER else b"", offset

    header = Header().encode()
    add(Kind.HEADER, header)
    run_id, run_at = add(Kind.RUN, run)
    empty_id, empty_at = add(Kind.NODE, b"\x92\xc4\0\xc4\0")
    try:
        entries = decode_page(page, b"", canonical=False)
    except ProtocolError:
        entries = []
    runs = sum(len(entry.runs) for entry in entries) // 48
    size, chunks = sum(entry.size for entry in entries), sum(map(chunk_count, entries))
    page_id, page_at = add(Kind.ENTRIES, page.replace(_PLACE, run_id), *[run_at] * runs)
    below_id, below_at = add(Kind.SUBDIRECTORIES, below.replace(bytes(32), empty_id), empty_at)
    node = b"\x92\xc4\x20" + page_id + b"\xc4\x20" + below_id
    node_id, node_at = add(Kind.NODE, node, page_at, below_at)
    totals = _altered(b"".join(map(encode, (len(entries), 1, size, chunks))), data)
    root = b"\x99\xc4" + bytes([len(header)]) + header + b"\0\0\xc4\x20" + node_id + totals + b"\xc4\0"
    version_id, root_at = add(Kind.ROOT, root, node_at)
    footer = FOOTER.pack(root_at, version_id, bytes(32), END_MAGIC)
    checksum = blake3(bytes(out) + footer[:40], derive_key_context=FILE_CONTEXT).digest()
    return bytes(out) + FOOTER.pack(root_at, version_id, checksum, END_MAGIC)


def _part(data: bytes, usual: bytes) -> tuple[bytes, bytes]:
    """The next part of `data`: given bytes, or the usual ones with alterations; and the rest."""
    kind, length, rest = data[:1], int.from_bytes(data[1:3], "little"), data[3:]
    part = rest[:length]
    return (part if kind == b"\1" else _altered(usual, part)), rest[length:]


def _read(data: bytes) -> list[tuple[bytes, Entry]] | None:
    """Everything in a file, read in every way; None where it was refused."""

    def opened() -> ManifestReader:
        return ManifestReader(lambda offset, length: data[offset : offset + length], len(data))

    try:
        walked = [*opened().walk()]
        for directory, entry in walked[:_MOST_LOOKUPS]:
            path = directory + b"/" + entry.name if directory else entry.name
            if opened().lookup(path) != entry:
                raise AssertionError(f"walk and lookup differ on {path!r}")
        if len({(directory, entry.name) for directory, entry in walked}) != len(walked):
            raise AssertionError("a name stands twice")
        for directory in {directory for directory, _ in walked}:
            plain = [e for where, e in walked if where == directory and e.kind != DIRECTORY]
            if [e for page in cut_pages(plain) for e in page] != plain:
                raise AssertionError("cutting lost entries")
        list(diff(opened(), _reader_of_nothing()))
        opened().verify()
    except _REFUSED:
        return None
    return walked


def _reader_of_nothing() -> ManifestReader:
    out = bytearray()
    builder = ManifestBuilder(out.extend)
    builder.begin_directory(b"")
    builder.end_directory(0, 0)
    builder.finish()
    return ManifestReader(lambda offset, length: bytes(out[offset : offset + length]), len(out))


def extras(data: bytes) -> None:
    """Extended attributes and owners, any or nearly right: one spelling."""
    if data[:1] == b"\0":
        data = _altered(_EXTRA, data[1:])
    try:
        extra = decode_extra(data)
    except ProtocolError:
        return
    if encode_extra(extra) != data:
        raise AssertionError("extended attributes changed on their way")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (pages, files, records, extras)
}


if __name__ == "__main__":
    from instrument import fuzz

    fuzz(sys.argv, TARGETS, "flowengine.manifest.")
