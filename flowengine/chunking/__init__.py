"""Content-defined chunking: where an object is cut, and what a chunk is called.

Goal
    Equal bytes give equal chunks wherever they stand, so that what one side has need not be sent again.
Plan
    A place is a cut where the 68 bytes before it say so (docs/spec/chunking.md); how likely that is depends on the length
    of the chunk, as in FastCDC (Xia et al., "The Design of Fast Content-Defined Chunking for Data Deduplication Based
    Storage Systems", IEEE TPDS 2020), so that lengths vary little. blake3-256 of the plaintext names the chunk.
Invariants
    - Cuts depend on the bytes and the profile alone: not on buffer sizes, threads or where reading began.
    - Boundaries and ids are pinned by tests/vectors/chunking.json; a change of either is a new format.
"""

from __future__ import annotations

import struct
from array import array
from functools import cache
from typing import Final

import msgspec

from flowengine.chunking.cutting import first_lengths
from flowengine.chunking.filling import Filling, pack_address, pack_many, packed_chunks, rule_for
from flowengine.chunking.hashing import (
    CHUNK_BYTES,
    ID_BYTES,
    are_chunks,
    chunk_id,
    ids_of,
    ids_under,
    lengths_of,
    pack_chunks,
    pack_ids,
    right_chunks,
)
from flowengine.chunking.library import Data, Rule
from flowengine.compiled import Scratch
from flowengine.errors import UsageError
from flowengine.units import KIB, MIB

__all__ = [
    "CHUNK_BYTES",
    "DEFAULT_PROFILE",
    "ID_BYTES",
    "PROFILES",
    "Cutter",
    "Profile",
    "are_chunks",
    "chunk_id",
    "ids_of",
    "ids_under",
    "lengths_of",
    "pack_chunks",
    "pack_ids",
    "packed_size",
    "profile_named",
    "right_chunks",
    "zero_chunk_id",
]


_SIZE: Final = struct.Struct("=q")


class Profile(msgspec.Struct, frozen=True):
    """Sizes in bytes that steer the cutting; part of every manifest. The real average is about avg + min."""

    name: str
    average: int
    minimum: int
    maximum: int


PROFILES: Final[dict[str, Profile]] = {
    "64KiB": Profile("64KiB", 64 * KIB, 16 * KIB, 256 * KIB),
    "256KiB": Profile("256KiB", 256 * KIB, 64 * KIB, MIB),
    "1MiB": Profile("1MiB", MIB, 256 * KIB, 4 * MIB),
}
DEFAULT_PROFILE: Final = PROFILES["64KiB"]


def profile_named(name: str) -> Profile:
    """The profile of that name.

    Raises:
        UsageError: no profile has the name; the message lists those that exist.
    """
    if name not in PROFILES:
        raise UsageError(f"no chunking profile is called {name!r}", hint=f"use one of {', '.join(PROFILES)}")
    return PROFILES[name]


class Cutter:
    """Finds cuts and names chunks for one profile; any thread may use it.

    >>> Cutter(DEFAULT_PROFILE).lengths(bytes(600 * 1024))
    [262144, 262144, 90112]
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._sizes = (profile.minimum, profile.average, profile.maximum)
        self._rule = rule_for(self._sizes)
        self._scratch = Scratch()

    def lengths(self, data: Data) -> list[int]:
        """Lengths of the chunks of `data`, whose start counts as a cut and whose end ends the last chunk."""
        size = len(data)
        if size <= self.profile.minimum:
            return [size] if size else []
        return first_lengths(data, self._sizes, size // self.profile.minimum + 1)

    def packed(self, data: Data, id_bytes: int = ID_BYTES) -> bytes:
        """The chunks of `data`, as `lengths` gives them, packed, with the first `id_bytes` of the id of each."""
        if self._rule is not None:
            return packed_chunks(self._rule, data, id_bytes)
        lengths = self.lengths(data)
        return pack_ids(lengths, ids_of(data, lengths), id_bytes)

    def packed_many(self, data: Data, sizes: bytes, stride: int) -> tuple[bytes, bytes]:
        """How many chunks each of some objects has, as native int64, and their packed chunks. For one thread at a time.

        Args:
            data: the objects, one behind the other.
            sizes: of them in bytes, as native int64 that begin `stride` bytes from one to the next.
        """
        objects = (len(sizes) + stride - 1) // stride
        if self._rule is not None:
            return pack_many(self._rule, data, sizes, stride, objects, self._scratch)
        view, at = memoryview(data), 0
        counts, lengths = array("q"), list[int]()
        for number in range(objects):
            (size,) = _SIZE.unpack_from(sizes, stride * number)
            cut = self.lengths(view[at : at + size])
            counts.append(len(cut))
            lengths += cut
            at += size
        return counts.tobytes(), pack_ids(lengths, ids_of(data, lengths))

    @property
    def pack_way(self) -> tuple[int, Rule] | None:
        """The address of `flow_pack_many`, and the rule that it is given, for another library; None where Python does it."""
        return None if self._rule is None else (pack_address(), self._rule)

    def filling(self, view: memoryview, filled: int = 0) -> Filling:
        """A buffer that is to be filled with bytes from a cut on, of which it holds `filled` already."""
        return Filling(self._rule, self.lengths, view, filled)

    def first_length(self, data: Data) -> int:
        """Length of the first chunk of non-empty `data`."""
        return first_lengths(data, self._sizes, 1)[0]


def packed_size(packed: bytes) -> int:
    """Bytes of the chunks of a packed list."""
    return sum(lengths_of(packed))


@cache
def zero_chunk_id(length: int) -> bytes:
    """The id of a chunk of `length` zero bytes: a hole is recognised by it and never travels."""
    return chunk_id(bytes(length))
