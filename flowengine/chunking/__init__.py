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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from blake3 import blake3

from flowengine.chunking.cutting import first_lengths
from flowengine.errors import UsageError
from flowengine.units import KIB, MIB

__all__ = [
    "CHUNK_BYTES",
    "DEFAULT_PROFILE",
    "ID_BYTES",
    "PROFILES",
    "Cutter",
    "Profile",
    "chunk_id",
    "pack_chunks",
    "packed_size",
    "profile_named",
    "zero_chunk_id",
]

ID_BYTES: Final = 32
CHUNK_BYTES: Final = 36
"""Size of one packed chunk: u32 little-endian length, then the id."""

_PACK = struct.Struct("<I32s").pack


@dataclass(frozen=True, slots=True)
class Profile:
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
    """Finds cuts for one profile; any thread may use it.

    >>> Cutter(DEFAULT_PROFILE).lengths(bytes(600 * 1024))
    [262144, 262144, 90112]
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._sizes = (profile.minimum, profile.average, profile.maximum)

    def lengths(self, data: bytes | bytearray | memoryview) -> list[int]:
        """Lengths of the chunks of `data`, whose start counts as a cut and whose end ends the last chunk."""
        size = len(data)
        if size <= self.profile.minimum:
            return [size] if size else []
        return first_lengths(data, self._sizes, size // self.profile.minimum + 1)

    def first_length(self, data: bytes | bytearray | memoryview) -> int:
        """Length of the first chunk of non-empty `data`."""
        return first_lengths(data, self._sizes, 1)[0]


def chunk_id(data: bytes | bytearray | memoryview) -> bytes:
    """blake3-256 of the plaintext: 32 bytes."""
    return blake3(data).digest()


def pack_chunks(chunks: Iterable[tuple[int, bytes]]) -> bytes:
    """(length, id) pairs as the packed list that manifests and messages carry, 36 bytes a chunk."""
    return b"".join([_PACK(length, identity) for length, identity in chunks])


def packed_size(packed: bytes) -> int:
    """Bytes of the chunks of a packed list."""
    return sum([int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES)])


@cache
def zero_chunk_id(length: int) -> bytes:
    """The id of a chunk of `length` zero bytes: a hole is recognised by it and never travels."""
    return blake3(bytes(length)).digest()
