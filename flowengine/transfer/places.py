"""Where the chunks that landed in this session can be read again, if somebody asks.

What came together is remembered as one, and looked into for the few chunks that come once more.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from flowengine.chunking import CHUNK_BYTES, packed_size
from flowengine.manifest import Block

__all__ = ["LandedPart", "LandedRun", "LandedSubtrees", "Location", "Place", "path_of_file"]

Place = tuple[bytes, str | int, int]
"""(final path, the name or number of the staging file, offset)"""


class LandedRun:
    """Files of a block that landed.

    Args:
        folder: their directory's path, from the target's root.
        number: that of the first one's staging file.
    """

    __slots__ = ("_block", "_folder", "_number")

    def __init__(self, folder: bytes, block: Block, number: int) -> None:
        self._folder = folder
        self._block = block
        self._number = number

    def place_of(self, identity: bytes) -> Place:
        """Where a chunk of the run is."""
        chunk = self._block.chunk_ids.index(identity)
        lengths = self._block.chunk_lengths
        firsts = [*accumulate(self._block.chunk_counts, initial=0)]
        owner = bisect_right(firsts, chunk) - 1
        first = firsts[owner]
        name = self._block.names[owner]
        path = self._folder + b"/" + name if self._folder else name
        return path, self._number + owner, sum(lengths[first:chunk])


def path_of_file(folders: list[bytes], ends: list[int], names: bytes, file: int) -> bytes:
    """The path of one of many files.

    Args:
        folders: the paths of their folders.
        ends: how many files there are up to the end of each folder.
        names: of all files, with NUL behind each.
    """
    return folders[bisect_right(ends, file)] + b"/" + names.split(b"\0", file + 1)[file]


class LandedSubtrees:
    """Files of many folders that landed; arguments as of `path_of_file`.

    Args:
        packed: the chunks of all files.
        firsts: how many chunks come before each file.
        number: that of the first one's staging file.
    """

    __slots__ = ("_ends", "_firsts", "_folders", "_names", "_number", "_packed")

    def __init__(
        self,
        folders: list[bytes],
        ends: list[int],
        names: bytes,
        packed: bytes,
        firsts: list[int],
        number: int,
    ) -> None:
        self._folders = folders
        self._ends = ends
        self._names = names
        self._packed = packed
        self._firsts = firsts
        self._number = number

    def place_of(self, identity: bytes) -> Place:
        """Where a chunk of a file is that was written."""
        packed = self._packed
        chunk = next(
            at // CHUNK_BYTES
            for at in range(0, len(packed), CHUNK_BYTES)
            if packed[at + 4 : at + CHUNK_BYTES] == identity
        )
        owner = bisect_right(self._firsts, chunk) - 1
        before = packed_size(packed[self._firsts[owner] * CHUNK_BYTES : chunk * CHUNK_BYTES])
        path = path_of_file(self._folders, self._ends, self._names, owner)
        return path, self._number + owner, before


class LandedPart:
    """Chunks of one object that landed, one behind the other.

    Args:
        place: of the first one.
    """

    __slots__ = ("_packed", "_place")

    def __init__(self, place: Place, packed: bytes) -> None:
        self._place = place
        self._packed = packed

    def place_of(self, identity: bytes) -> Place:
        """Where one of the chunks is."""
        path, staged, offset = self._place
        for at in range(0, len(self._packed), CHUNK_BYTES):
            if self._packed[at + 4 : at + CHUNK_BYTES] == identity:
                return path, staged, offset + packed_size(self._packed[:at])
        raise KeyError(identity)


Location = LandedRun | LandedPart | LandedSubtrees
"""What a chunk arrived with, which knows its place."""
