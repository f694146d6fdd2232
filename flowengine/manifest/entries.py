"""What a manifest says of one object, and how the pieces of the tree are encoded, hashed and checked.

Goal
    One version of a dataset has one encoding, whoever writes it; what breaks a rule is named, never repaired.
Plan
    msgspec structs written as arrays, whole pages at a time: C code encodes, decodes and checks the ranges of
    single fields; the loops here check what ties fields together. docs/spec/manifest.md has the byte tables.
Invariants
    - `encode(decode(x)) == x` for every accepted x: there is no second spelling of the same thing.
    - Every kind of piece is hashed under its own BLAKE3 context, so that no piece passes for another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from operator import lt
from struct import Struct as Packing
from struct import unpack
from typing import Annotated, Final, NamedTuple, NoReturn, TypeVar

import msgspec
from blake3 import blake3
from msgspec import Meta

from flowengine.chunking import CHUNK_BYTES, DEFAULT_PROFILE, ID_BYTES, Profile, ids_under
from flowengine.errors import IntegrityError, ProtocolError, UsageError
from flowengine.units import show_path

__all__ = [
    "DIRECTORY",
    "FILE",
    "FLAG_SPARSE",
    "FORMAT_VERSION",
    "HARDLINK",
    "MAX_CHUNK_BYTES",
    "MAX_EXTRA_BYTES",
    "MAX_INLINE_ITEMS",
    "MAX_LINK_BYTES",
    "MAX_NAME_BYTES",
    "MAX_PAGE_BYTES",
    "MAX_PAGE_ENTRIES",
    "MAX_RUN_DEPTH",
    "RUN_BYTES",
    "SYMLINK",
    "Entry",
    "Extra",
    "Header",
    "Kind",
    "Node",
    "Root",
    "Subdirectory",
    "Totals",
    "chunk_count",
    "decode_extra",
    "digest",
    "digests",
    "encode_extra",
    "is_name",
    "join",
]

FORMAT_VERSION: Final = 1

FILE: Final = 0
SYMLINK: Final = 1
HARDLINK: Final = 2
DIRECTORY: Final = 3
"""Kind of entries that `ManifestReader` makes up for directories; never encoded in a page of entries."""

FLAG_SPARSE: Final = 1
"""The file has holes at the source. Advice for the writer; holes are recognised by their chunk ids."""

MAX_NAME_BYTES: Final = 255
MAX_LINK_BYTES: Final = 4096
MAX_EXTRA_BYTES: Final = 65535
MAX_CHUNK_BYTES: Final = 4 << 20
MAX_INLINE_ITEMS: Final = 1024
"""An entry holds at most so many chunks; with more, so many runs of chunks; and so on."""
MAX_RUN_DEPTH: Final = 4
MAX_PAGE_ENTRIES: Final = 1024
MAX_PAGE_BYTES: Final = 256 << 10
MAX_NODE_PAGES: Final = 1 << 17
MAX_PROFILE_NAME: Final = 32
MAX_INT: Final = 2**63 - 1

RUN_BYTES: Final = 48
"""Size of one packed run: run id, u64 little-endian bytes of the object in it, u64 number of chunks."""

PACK_RUN = Packing("<32sQQ").pack
UNPACK_RUNS = Packing("<32sQQ").iter_unpack
UNPACK_LENGTHS = Packing("<I32x").iter_unpack

_HINT = "whoever made this manifest is faulty or hostile: have it made again by a current version"


class Kind(IntEnum):
    """Kinds of pieces, which are also the types of records in a manifest file."""

    HEADER = 1
    RUN = 2
    RUN_LIST = 3
    ENTRIES = 4
    SUBDIRECTORIES = 5
    NODE = 6
    ROOT = 7


_CONTEXT: Final = {
    Kind.RUN: "flowengine manifest v1 chunk run",
    Kind.RUN_LIST: "flowengine manifest v1 run list",
    Kind.ENTRIES: "flowengine manifest v1 page of entries",
    Kind.SUBDIRECTORIES: "flowengine manifest v1 page of subdirectories",
    Kind.NODE: "flowengine manifest v1 directory node",
    Kind.ROOT: "flowengine manifest v1 root",
}

_Name = Annotated[bytes, Meta(min_length=1, max_length=MAX_NAME_BYTES)]
_Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
_Mode = Annotated[int, Meta(ge=0, le=0o7777)]
_Time = Annotated[int, Meta(ge=-(2**63), le=MAX_INT)]
_Extra = Annotated[bytes, Meta(max_length=MAX_EXTRA_BYTES)]
_Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One object of a directory.

    Attributes:
        name: One path component.
        kind: `FILE`, `SYMLINK` or `HARDLINK`; `DIRECTORY` only from a reader.
        mode: Permission bits, 0o7777 at most.
        mtime_ns: Modification time, nanoseconds since 1970, UTC.
        size: Bytes of a file; 0 for links; bytes below, for a directory.
        chunks: Packed chunk list of a file of at most 1024 chunks (`flowengine.chunking.pack_chunks`).
        link: Target of a symbolic link; for a hard link, the path from the root to the file's first name.
        flags: `FLAG_SPARSE`.
        extra: `encode_extra` of extended attributes and owner, empty when not asked for.
        runs: Packed runs (48 bytes each) of a file of more chunks.
        depth: How many levels of runs stand between the entry and its chunks; 0 where `chunks` has them.

    >>> Entry(b"empty", FILE, 0o644, 0).size
    0
    """

    name: _Name
    kind: Annotated[int, Meta(ge=FILE, le=HARDLINK)]
    mode: _Mode
    mtime_ns: _Time
    size: _Count = 0
    chunks: Annotated[bytes, Meta(max_length=MAX_INLINE_ITEMS * CHUNK_BYTES)] = b""
    link: Annotated[bytes, Meta(max_length=MAX_LINK_BYTES)] = b""
    flags: Annotated[int, Meta(ge=0, le=FLAG_SPARSE)] = 0
    extra: _Extra = b""
    runs: Annotated[bytes, Meta(max_length=MAX_INLINE_ITEMS * RUN_BYTES)] = b""
    depth: Annotated[int, Meta(ge=0, le=MAX_RUN_DEPTH)] = 0


class Subdirectory(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One directory as its parent lists it, with the totals of all that lies below it."""

    name: _Name
    mode: _Mode
    mtime_ns: _Time
    node_id: _Id
    objects: _Count
    directories: _Count
    size: _Count
    chunks: _Count
    extra: _Extra = b""


class Node(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a directory consists of: ids of its pages, 32 bytes each, in order."""

    entries: Annotated[bytes, Meta(max_length=MAX_NODE_PAGES * ID_BYTES)] = b""
    subdirectories: Annotated[bytes, Meta(max_length=MAX_NODE_PAGES * ID_BYTES)] = b""


class _HeaderFields(msgspec.Struct, array_like=True, frozen=True, gc=False):
    format_version: int
    profile: Annotated[str, Meta(min_length=1, max_length=MAX_PROFILE_NAME)]
    average: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
    minimum: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
    maximum: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
    options: Annotated[int, Meta(ge=0, le=7)]


class Root(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """All that a version id covers: what the header says, the root directory's node, and the totals."""

    header: Annotated[bytes, Meta(max_length=128)]
    mode: _Mode
    mtime_ns: _Time
    node_id: _Id
    objects: _Count
    directories: _Count
    size: _Count
    chunks: _Count
    extra: _Extra = b""


class Extra(msgspec.Struct, array_like=True, frozen=True):
    """What is kept of an object on request only; None or empty where not kept."""

    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    uid: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    gid: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    owner: Annotated[bytes, Meta(max_length=MAX_NAME_BYTES)] = b""
    group: Annotated[bytes, Meta(max_length=MAX_NAME_BYTES)] = b""


class Header(NamedTuple):
    """What both sides must agree on before their manifests can be equal.

    Attributes:
        profile: How objects were chunked.
        xattrs: Extended attributes are kept.
        owner: Owner and group are kept.
        root_attributes: Mode, mtime and extra of the root directory are kept. Off, two copies of a dataset
            have one version id even where one root is a mount point or a bucket.
    """

    profile: Profile = DEFAULT_PROFILE
    xattrs: bool = False
    owner: bool = False
    root_attributes: bool = False

    def encode(self) -> bytes:
        """The header's canonical bytes."""
        name, average, minimum, maximum = (
            self.profile.name,
            self.profile.average,
            self.profile.minimum,
            self.profile.maximum,
        )
        options = self.xattrs | self.owner << 1 | self.root_attributes << 2
        return encode(_HeaderFields(FORMAT_VERSION, name, average, minimum, maximum, options))

    @staticmethod
    def decode(data: bytes) -> Header:
        """The header in `data`.

        Raises:
            ProtocolError: not a header, or one of a format that this version does not know.
        """
        fields = decode_canonical(_decode_header, data, "header")
        if fields.format_version != FORMAT_VERSION:
            raise ProtocolError(
                f"the manifest has format {fields.format_version}, only {FORMAT_VERSION} is known here",
                hint="update flowengine here, or have the manifest made by the version that runs here",
            )
        if not fields.minimum <= fields.average <= fields.maximum:
            raise ProtocolError("the manifest's chunking profile has sizes out of order", hint=_HINT)
        profile = Profile(fields.profile, fields.average, fields.minimum, fields.maximum)
        return Header(profile, bool(fields.options & 1), bool(fields.options & 2), bool(fields.options & 4))


class Totals(NamedTuple):
    """Counts of what a page, a directory or a version holds; `directories` without the root."""

    objects: int = 0
    directories: int = 0
    size: int = 0
    chunks: int = 0

    def plus(self, other: Totals) -> Totals:
        """The sums, field by field."""
        return Totals(
            self.objects + other.objects,
            self.directories + other.directories,
            self.size + other.size,
            self.chunks + other.chunks,
        )


encode = msgspec.msgpack.Encoder().encode
_PageOf = Meta(min_length=1, max_length=MAX_PAGE_ENTRIES)
_decode_entries = msgspec.msgpack.Decoder(Annotated[list[Entry], _PageOf]).decode
_decode_subdirectories = msgspec.msgpack.Decoder(Annotated[list[Subdirectory], _PageOf]).decode
_decode_header = msgspec.msgpack.Decoder(_HeaderFields).decode
_decode_extra = msgspec.msgpack.Decoder(Extra).decode
decode_node_fields = msgspec.msgpack.Decoder(Node).decode
decode_root_fields = msgspec.msgpack.Decoder(Root).decode
_NO_EXTRA = Extra()

T = TypeVar("T")


def digest(kind: Kind, data: bytes) -> bytes:
    """The id of a piece: BLAKE3 of its canonical bytes, in derive-key mode under its kind's context."""
    return blake3(data, derive_key_context=_CONTEXT[kind]).digest()


def digests(kind: Kind, pieces: Sequence[bytes]) -> list[bytes]:
    """The ids of several pieces of a kind."""
    return ids_under(_CONTEXT[kind], pieces)


def decode_canonical(
    decode: Callable[[bytes], T],
    data: bytes,
    what: str,
    where: bytes | None = None,
    *,
    canonical: bool = True,
) -> T:
    """`decode(data)`; every failure, and any second spelling of the same value, is a `ProtocolError`."""
    try:
        value = decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        why = f"does not decode: {error}"
    else:
        if not canonical or encode(value) == data:
            return value
        why = "is not in its canonical form"
    place = "" if where is None else f", in directory {show_path(where)!r},"
    raise ProtocolError(f"a {what} of the manifest{place} {why}", hint=_HINT)


def join(directory: bytes, name: bytes) -> bytes:
    """The path from the root of `name` in `directory`."""
    return directory + b"/" + name if directory and name else directory or name


def is_name(name: bytes) -> bool:
    """Whether `name` can be one path component.

    >>> is_name(b"a"), is_name(b".."), is_name(b"a/b")
    (True, False, False)
    """
    return (
        0 < len(name) <= MAX_NAME_BYTES
        and b"/" not in name
        and b"\0" not in name
        and name not in (b".", b"..")
    )


def chunk_count(entry: Entry) -> int:
    """How many chunks the entry's object has."""
    if entry.depth:
        return sum(count for _, _, count in UNPACK_RUNS(entry.runs))
    return len(entry.chunks) // CHUNK_BYTES


def encode_extra(extra: Extra) -> bytes:
    """The bytes for `Entry.extra`: empty when nothing is kept; attributes in order of their names.

    Raises:
        UsageError: more than fits (64 KiB), or an attribute that is named twice.

    >>> encode_extra(Extra()), decode_extra(encode_extra(Extra(uid=7))).uid
    (b'', 7)
    """
    ordered = Extra(tuple(sorted(extra.xattrs)), extra.uid, extra.gid, extra.owner, extra.group)
    if ordered == _NO_EXTRA:
        return b""
    data = encode(ordered)
    try:
        decode_extra(data)
    except ProtocolError as error:
        raise UsageError(error.message, hint="leave extended attributes out (no --xattrs)") from None
    return data


def decode_extra(data: bytes) -> Extra:
    """What `Entry.extra` holds.

    Raises:
        ProtocolError: not the canonical bytes of an `Extra`, or larger than allowed.
    """
    if not data:
        return _NO_EXTRA
    if len(data) > MAX_EXTRA_BYTES:
        raise ProtocolError(f"extended attributes take {len(data)} bytes, more than {MAX_EXTRA_BYTES}")
    extra = decode_canonical(_decode_extra, data, "field of extended attributes")
    names = [name for name, _ in extra.xattrs]
    if extra == _NO_EXTRA or not all(map(lt, names, names[1:])) or not all(0 < len(n) <= 255 for n in names):
        raise ProtocolError("extended attributes are empty, unsorted or named wrongly", hint=_HINT)
    return extra


def decode_page(data: bytes, where: bytes, *, canonical: bool = True) -> list[Entry]:
    """The entries of a page of directory `where`, each field in range; `check_entries` checks the rest."""
    _check_page_size(data, where)
    return decode_canonical(_decode_entries, data, "page of entries", where, canonical=canonical)


def decode_subdirectories(data: bytes, where: bytes) -> list[Subdirectory]:
    """The directories on a page, each field in range; not checked against their nodes."""
    _check_page_size(data, where)
    return decode_canonical(_decode_subdirectories, data, "page of subdirectories", where)


def _check_page_size(data: bytes, where: bytes) -> None:
    if len(data) > MAX_PAGE_BYTES:
        raise ProtocolError(
            f"a page of directory {show_path(where)!r} has {len(data)} bytes, more than {MAX_PAGE_BYTES}",
            hint=_HINT,
        )


def check_names(names: Sequence[bytes], where: bytes, after: bytes) -> None:
    """Refuse names that are no path components or do not rise strictly from `after` (exclusive).

    The four tests run in C over the whole page; only a page that fails one is looked through name by name.
    """
    joined = b"/".join(names)
    if (
        after < names[0]
        and all(map(lt, names, names[1:]))
        and joined.count(b"/") == len(names) - 1
        and b"\0" not in joined
        and b"." not in names
        and b".." not in names
    ):
        return
    for name in names:
        if not is_name(name):
            lie(where, name, "that is not a name of one path component")
        if not after < name:
            lie(where, name, f"it stands after {show_path(after)!r}: names must rise and not repeat")
        after = name
    raise AssertionError("unreachable")


def check_entries(entries: Sequence[Entry], where: bytes, after: bytes, header: Header) -> Totals:
    """Totals of a page's entries, which follow the name `after` in the directory `where`.

    Raises:
        ProtocolError: an entry contradicts itself or its neighbours; the message names it.
    """
    check_names([entry.name for entry in entries], where, after)
    # Most pages have nothing but files of one chunk: those are checked all at once.
    one_chunk_each = not [
        e for e in entries if len(e.chunks) != CHUNK_BYTES or e.kind or e.depth or e.link or e.runs or e.extra
    ]
    sizes = [e.size for e in entries]
    if one_chunk_each and 0 < min(sizes) <= max(sizes) <= MAX_CHUNK_BYTES:
        lengths = unpack(f"<{len(sizes)}I", b"".join([e.chunks[:4] for e in entries]))
        if sizes == [*lengths]:
            return Totals(len(sizes), 0, sum(sizes), len(sizes))
    chunks = 0
    for entry in entries:
        packed = entry.chunks
        if (
            len(packed) == CHUNK_BYTES
            and int.from_bytes(packed[:4], "little") == entry.size
            and 0 < entry.size <= MAX_CHUNK_BYTES
            and not (entry.kind or entry.depth or entry.link or entry.runs or entry.extra)
        ):
            chunks += 1
        else:
            chunks += _check_entry(entry, where, header)
    size = sum(sizes)
    if size > MAX_INT or chunks > MAX_INT:
        lie(where, entries[-1].name, "the sizes on its page add up to more than 2^63")
    return Totals(len(entries), 0, size, chunks)


def _check_entry(entry: Entry, where: bytes, header: Header) -> int:
    """The number of chunks of one entry of any kind, after all checks on it."""
    name = entry.name
    if entry.extra:
        check_extra(entry.extra, where, name, header)
    if entry.kind == FILE:
        if entry.link:
            lie(where, name, "it is a file and has a link target")
        return _check_runs(entry, where) if entry.depth else _check_chunks(entry, where)
    if entry.size or entry.chunks or entry.runs or entry.depth or entry.flags:
        lie(where, name, "it is a link and has a size, chunks or flags")
    if not entry.link or b"\0" in entry.link:
        lie(where, name, "it is a link and its target is empty or has a NUL")
    if entry.kind == HARDLINK:
        if not all(map(is_name, entry.link.split(b"/"))):
            lie(where, name, f"its first name {show_path(entry.link)!r} is not a path below the root")
        if not order_key(entry.link) < order_key(join(where, name)):
            lie(where, name, f"its first name {show_path(entry.link)!r} comes later in the manifest")
    return 0


def _check_chunks(entry: Entry, where: bytes) -> int:
    if entry.runs:
        lie(where, entry.name, "it has runs and depth 0")
    if len(entry.chunks) % CHUNK_BYTES:
        lie(where, entry.name, "its chunk list is cut off")
    lengths = [length for (length,) in UNPACK_LENGTHS(entry.chunks)]
    if lengths and (min(lengths) < 1 or max(lengths) > MAX_CHUNK_BYTES):
        lie(where, entry.name, f"a chunk of it is empty or larger than {MAX_CHUNK_BYTES} bytes")
    if sum(lengths) != entry.size:
        lie(where, entry.name, f"its size is {entry.size} but its chunks hold {sum(lengths)} bytes")
    return len(lengths)


def _check_runs(entry: Entry, where: bytes) -> int:
    if entry.chunks or not entry.runs or len(entry.runs) % RUN_BYTES:
        lie(where, entry.name, "its list of runs is missing, cut off, or stands beside a chunk list")
    size = chunks = 0
    for _, run_size, run_chunks in UNPACK_RUNS(entry.runs):
        if not 0 < run_chunks <= run_size <= run_chunks * MAX_CHUNK_BYTES:
            lie(where, entry.name, f"a run of it claims {run_size} bytes in {run_chunks} chunks")
        size += run_size
        chunks += run_chunks
    if size != entry.size:
        lie(where, entry.name, f"its size is {entry.size} but its runs hold {size} bytes")
    if chunks <= MAX_INLINE_ITEMS:
        lie(where, entry.name, f"its {chunks} chunks are in runs, though an entry holds {MAX_INLINE_ITEMS}")
    return chunks


def check_extra(data: bytes, where: bytes, name: bytes, header: Header) -> None:
    """Refuse extended attributes or owners that are malformed, or that the header says are not kept."""
    try:
        extra = decode_extra(data)
    except ProtocolError as error:
        lie(where, name, error.message)
    if extra.xattrs and not header.xattrs:
        lie(where, name, "it has extended attributes in a manifest that keeps none")
    if (extra.uid, extra.gid, extra.owner, extra.group) != (None, None, b"", b"") and not header.owner:
        lie(where, name, "it has an owner in a manifest that keeps none")


def order_key(path: bytes) -> list[tuple[int, bytes]]:
    """Sorts paths of non-directories in manifest order: a directory's own entries before its subdirectories.

    >>> sorted([b"a/z", b"b", b"a/b/c"], key=order_key)
    [b'b', b'a/z', b'a/b/c']
    """
    *directories, name = path.split(b"/")
    return [*((1, part) for part in directories), (0, name)]


def lie(where: bytes, name: bytes, why: str) -> NoReturn:
    """Raise the error for an entry that cannot be true."""
    path = show_path(join(where, name) or b".")
    raise ProtocolError(f"the manifest's entry {path!r} cannot be right: {why}", hint=_HINT, path=path)


def damaged(why: str) -> IntegrityError:
    """The error for a manifest file whose bytes are not what was written."""
    return IntegrityError(
        f"the manifest file is damaged: {why}",
        hint="restore the file from a good copy or make it again from the dataset",
    )
