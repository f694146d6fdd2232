"""The names of chunks: blake3-256 of many pieces in one call.

Goal
    What is hashed costs its bytes, however many pieces it comes in.
Plan
    A compiled library (`_hash.c`) hashes pieces side by side in the processor's vectors and lets the interpreter go once
    for all of them; the package blake3, which takes them one by one, is what it is compared with before it is used, and
    does all of it where the library is missing.
Invariants
    - Both, and all ways of the library for the processors there are, give the same names.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from blake3 import blake3

from flowengine.chunking.library import HASH_WAYS, LIBRARY, Data, place_of

__all__ = [
    "CHUNK_BYTES",
    "ID_BYTES",
    "are_chunks",
    "best_hash_way",
    "chunk_id",
    "hash_ways",
    "ids_of",
    "ids_under",
    "lengths_of",
    "pack_chunks",
    "pack_ids",
    "right_chunks",
]

ID_BYTES: Final = 32
CHUNK_BYTES: Final = 36
"""Size of one packed chunk: u32 little-endian length, then the id."""

_PACK = struct.Struct("<I32s").pack
_LENGTHS: Final = struct.Struct("<I32x").iter_unpack
_TRIED: Final = (1, 64, 1000, 1024, 1025, 3 * 1024, 5000, 40_000)
"""Lengths with which the library is compared: parts of a block, of a leaf, trees, and more leaves than are hashed at once."""


def chunk_id(data: Data) -> bytes:
    """blake3-256 of the plaintext: 32 bytes."""
    return blake3(data).digest()


def pack_chunks(chunks: Iterable[tuple[int, bytes]]) -> bytes:
    """(length, id) pairs as the packed list that manifests and messages carry, 36 bytes a chunk."""
    return b"".join([_PACK(length, identity) for length, identity in chunks])


def pack_ids(lengths: Sequence[int], ids: bytes, id_bytes: int = ID_BYTES) -> bytes:
    """The packed list of pieces of these lengths and ids, with the first `id_bytes` of each id."""
    return b"".join(
        [
            length.to_bytes(4, "little") + ids[at : at + id_bytes]
            for length, at in zip(lengths, range(0, len(ids), ID_BYTES), strict=True)
        ]
    )


def best_hash_way() -> int:
    """The quickest of `hash_ways`; -1 where the library is missing or not to be relied on."""
    return _way


def lengths_of(packed: bytes) -> list[int]:
    """The lengths of the chunks of a packed list."""
    return [length for (length,) in _LENGTHS(packed)]


def hash_ways() -> list[int]:
    """The ways that this machine has, all with the same names; the last is the quickest, the first needs no library."""
    return [*range(-1, _way + 1)]


def ids_of(data: Data, lengths: Sequence[int], way: int | None = None) -> bytes:
    """The ids of pieces that lie one behind the other, 32 bytes each.

    Args:
        data: contiguous bytes, as many as the lengths add up to or more.
        lengths: of the pieces, in bytes, below 2**32 each.
        way: one of `hash_ways`; by default the quickest.

    Raises:
        ValueError: the pieces reach beyond the data.
    """
    if sum(lengths) > len(data):
        raise ValueError(f"pieces of {sum(lengths)} bytes were to be hashed in {len(data)} bytes")
    way = _way if way is None else way
    if LIBRARY is None or way < 0:
        view, at, ids = memoryview(data), 0, []
        for length in lengths:
            ids.append(blake3(view[at : at + length]).digest())
            at += length
        return b"".join(ids)
    told = array("I", lengths)
    names = ctypes.create_string_buffer(ID_BYTES * len(lengths))
    with place_of(data) as (place, _):
        if LIBRARY.flow_hash(way, place, told.buffer_info()[0], len(lengths), names):
            raise MemoryError
    return names.raw


def ids_under(context: str, pieces: Sequence[bytes], way: int | None = None) -> list[bytes]:
    """blake3-256 of each of some pieces in derive-key mode, under the same context.

    Args:
        way: one of `hash_ways`; by default the quickest.
    """
    way = _way if way is None else way
    if LIBRARY is None or way < 0:
        return [blake3(piece, derive_key_context=context).digest() for piece in pieces]
    told, named = array("I", map(len, pieces)), context.encode()
    found = ctypes.create_string_buffer(ID_BYTES * len(pieces))
    if LIBRARY.flow_hash_under(
        way, named, len(named), b"".join(pieces), told.buffer_info()[0], len(pieces), found
    ):
        raise MemoryError
    ids = found.raw
    return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]


def right_chunks(data: Data, packed: bytes, way: int | None = None) -> int:
    """How many chunks of a packed list, from the first on, are what lies one behind the other in `data`.

    Where the data is too short, it is those that are whole in it.

    Args:
        data: contiguous bytes.
        packed: chunks with the ids that they should have.
        way: one of `hash_ways`; by default the quickest.
    """
    way = _way if way is None else way
    count = len(packed) // CHUNK_BYTES
    if LIBRARY is None or way < 0:
        view, at = memoryview(data), 0
        for index, length in enumerate(lengths_of(packed)):
            found = blake3(view[at : at + length]).digest() if at + length <= len(view) else b""
            if found != packed[index * CHUNK_BYTES + 4 : (index + 1) * CHUNK_BYTES]:
                return index
            at += length
        return count
    with place_of(data) as (place, size):
        right: int = LIBRARY.flow_check(way, place, size, packed, count)
    if right < 0:
        raise MemoryError
    return right


def are_chunks(data: Data, packed: bytes) -> bool:
    """Whether `data` begins with all chunks of a packed list."""
    return right_chunks(data, packed) * CHUNK_BYTES == len(packed)


def _sound(way: int) -> bool:
    """Whether the library hashes as the package does, with this compiler on this processor."""
    data = bytes(range(256)) * (sum(_TRIED) // 256 + 1)
    pieces = [data[:size] for size in _TRIED]
    return ids_of(data, _TRIED, way) == ids_of(data, _TRIED, -1) and (
        ids_under("flowengine", pieces, way) == ids_under("flowengine", pieces, -1)
    )


_way = HASH_WAYS - 1
if _way >= 0 and not _sound(_way):
    _way = -1
