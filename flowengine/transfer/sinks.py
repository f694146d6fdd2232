"""What is on its way into the target: directories, objects, and the offers whose chunks are still out.

A *sink* takes verified bytes. It belongs to one object of one directory, which is finished after the last of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import accumulate, pairwise
from operator import itemgetter
from time import monotonic
from typing import Final, Protocol

import msgspec

from flowengine.chunking import CHUNK_BYTES, lengths_of
from flowengine.chunking.fine import FINE_BYTES, fine_lengths
from flowengine.manifest import FILE, Block, Entry, join_blocks
from flowengine.store.encoded import same_files
from flowengine.store.filesystem import open_beneath, start_writeback
from flowengine.store.many import AnyStat, Listing, Rows, Stat, joined
from flowengine.store.proofs import encode_entries, stats_proof
from flowengine.store.scan_cache import DirectoryPart
from flowengine.store.staging import StagedObject, Staging
from flowengine.transfer.basis import Basis, Recalled
from flowengine.transfer.following import Follower
from flowengine.transfer.lookalikes import Guess
from flowengine.wire.messages import DirectoryEnd
from flowengine.wire.paths import STAGING_NAME

__all__ = [
    "CLAIMED",
    "FINER",
    "NOT_WANTED",
    "NO_ENTRY",
    "UNWANTED",
    "WANTED",
    "BlockRows",
    "FineOffer",
    "LargeObject",
    "Refinement",
    "Region",
    "RunOffer",
    "Sink",
    "SmallObject",
    "SmallOffer",
    "TargetDirectory",
    "Waiter",
    "chunk_lengths",
    "part_of",
    "waited_for",
]


NOT_WANTED: Final = 0
WANTED: Final = 1
CLAIMED: Final = 2
"""It arrived, and a lane is at work on it."""
FINER: Final = 3
"""It was asked for in fine chunks."""
UNWANTED: Final = 4
"""It was wanted and is not any more; the source may have sent it before it heard."""


NO_ENTRY: Final = Entry(b"-", FILE, 0, 0)
"""Where the publisher is told of something that is no one object."""

BlockRows = tuple[Block, Rows]
"""Files of a directory, and their stats there."""


def part_of(found: list[BlockRows]) -> DirectoryPart | None:
    """Blocks of one directory as the scan cache keeps them; None where there are none, or one lies within another."""
    found.sort(key=lambda one: one[0].first_name)
    for (one, _), (other, _) in pairwise(found):
        if not one.last_name < other.first_name:
            return None
    if not found:
        return None
    return DirectoryPart(
        joined([rows for _, rows in found]).proof, join_blocks([block for block, _ in found])
    )


class TargetDirectory:
    """One directory at the target while objects of it are on their way.

    Attributes:
        listing: what stood there when it was entered.
        recalled: where nothing changed since the scan cache saw it, all its small objects in name order; those
            before `recalled_at` were offered.
        st: of the directory itself, before anything was done in it.
        unchanged_all: nothing was done in it, and the scan cache knows it as it is.
        learned: the same, but for the scan cache.
    """

    __slots__ = (
        "_existing", "_kept", "_known", "_landed", "_rows", "_same", "created", "end", "entries", "fd", "keys", "last_name", "learned", "linked", "listing", "name", "offered",
        "open_names", "parent", "path", "recalled", "recalled_at", "st", "unchanged_all",
    )  # fmt: skip

    def __init__(
        self, path: bytes, name: bytes, fd: int, parent: TargetDirectory | None, *, created: bool
    ) -> None:
        self.path = path
        self.name = name
        self.fd = fd
        self.parent = parent
        self.created = created
        self.listing: Listing | None = None
        self._existing: dict[bytes, Stat] | None = None
        self._known: dict[bytes, Entry] | None = {}
        self.recalled: Block | list[Entry] = []
        self._same: bool | None = None
        self.recalled_at = 0
        self.st: os.stat_result | None = None
        self.open_names: set[bytes] = set()
        self.end: DirectoryEnd | None = None
        self._rows: list[tuple[bytes, AnyStat, Entry]] = []
        self._kept: list[tuple[int, Block]] = []
        self._landed: list[BlockRows] = []
        self.offered: set[bytes] | None = None
        self.keys: dict[bytes, bytes] | None = None
        self.linked = False
        self.last_name = b""
        self.unchanged_all = True
        self.learned = False
        self.entries = 0

    @property
    def was_empty(self) -> bool:
        """Whether nothing stood there when it was entered."""
        return self.listing is None or not any(map(len, self.listing[:4]))

    @property
    def existing(self) -> dict[bytes, Stat]:
        """What stood there when it was entered, by name; the staging folder is not counted."""
        if self._existing is None:
            kinds = self.listing[:4] if self.listing is not None else ()
            self._existing = {name: st for rows in kinds for name, st in rows.pairs()}
            self._existing.pop(STAGING_NAME, None)
        return self._existing

    def has_folder(self, name: bytes) -> bool:
        """Whether a folder of this name stood there when it was entered."""
        return self.listing is not None and name in self.listing.folders

    @property
    def known(self) -> dict[bytes, Entry]:
        """What the scan cache knows of small objects, by name."""
        if self._known is None:
            self._known = {entry.name: entry for entry in self._recalled_entries()}
        return self._known

    @property
    def rows(self) -> list[tuple[bytes, AnyStat, Entry]]:
        """What the scan cache is to know of it: name, stat and entry of each small object."""
        while self._kept:
            start, block = self._kept.pop()
            assert self.listing is not None
            stats = self.listing.smalls.stats[start : start + block.count]
            self._rows += zip(block.names, stats, block.entries, strict=True)
        while self._landed:
            block, rows = self._landed.pop()
            self._rows += zip(block.names, rows.stats, block.entries, strict=True)
        return self._rows

    def add_block(self, block: Block, rows: Rows) -> None:
        """More of them, as a block."""
        self._landed.append((block, rows))

    def part(self) -> DirectoryPart | None:
        """All of them as the scan cache keeps them; None where there are none."""
        if len(self._kept) == 1 and not self._rows and not self._landed:
            (_, block), listing = self._kept[0], self.listing
            if listing is not None and block.count == len(listing.smalls):
                return DirectoryPart(listing.proof, block.data)
        if not self._rows:
            found = list(self._landed)
            for start, block in self._kept:
                assert self.listing is not None
                found.append((block, self.listing.smalls.part(start, start + block.count)))
            made = part_of(found)
            if made is not None:
                return made
        rows = sorted(self.rows, key=itemgetter(0))
        if not rows:
            return None
        return DirectoryPart(
            stats_proof([(name, st) for name, st, _ in rows]), encode_entries([entry for _, _, entry in rows])
        )

    def add_rows(self, rows: list[tuple[bytes, AnyStat, Entry]]) -> None:
        """More of them, in any order."""
        self._rows += rows

    def forget_rows(self) -> None:
        """They were kept."""
        self._rows, self._kept, self._landed = [], [], []

    def _recalled_entries(self) -> list[Entry]:
        return self.recalled.entries if isinstance(self.recalled, Block) else self.recalled

    def recall(self, entries: Block | list[Entry]) -> None:
        """Nothing changed since the scan cache saw these, which are all small objects."""
        self.recalled, self._known = entries, None

    def are_next(self, entries: list[Entry]) -> list[tuple[bytes, AnyStat, Entry]] | None:
        """The rows of objects that stand here just as they are offered, if they are the next ones recalled."""
        start = self.recalled_at
        end = start + len(entries)
        if self.listing is None or self._recalled_entries()[start:end] != entries:
            return None
        stats = self.listing.smalls.stats[start:end]
        if (
            [st.st_mode for st in stats] != [0o100000 | entry.mode for entry in entries]
            or [st.st_mtime_ns for st in stats] != [entry.mtime_ns for entry in entries]
            or [entry for entry in entries if entry.kind or entry.extra or entry.mode & 0o6000]
        ):
            return None
        self.recalled_at = end
        return [(entry.name, st, entry) for st, entry in zip(stats, entries, strict=True)]

    def keeps(self, block: Block) -> bool:
        """Whether objects stand here just as they are offered, and are the next ones recalled; then they are rows."""
        start, known = self.recalled_at, self.recalled
        if not isinstance(known, Block) or self.listing is None:
            return False
        if block.count == known.count:
            if start or known.data != block.data:
                return False
        elif (
            start + block.count > known.count
            or known.data[known.end_of(start) : known.end_of(start + block.count)]
            != block.data[block.begin :]
        ):
            return False
        if not self._is_recalled(known):
            return False
        self._kept.append((start, block))
        self.recalled_at += block.count
        return True

    def next_alike(self, block: Block) -> Rows | None:
        """The stats of objects that stand here as they are offered but for modes and times, if they are the next ones.

        They are not next any more once `recalled_at` is moved.
        """
        start, end, known = self.recalled_at, self.recalled_at + block.count, self.recalled
        if (
            not isinstance(known, Block)
            or self.listing is None
            or end > known.count
            or not self._is_recalled(known)
        ):
            return None
        if not block.same_content(known.part(start, end)):
            return None
        return self.listing.smalls.part(start, end)

    def _is_recalled(self, known: Block) -> bool:
        if self._same is None:
            assert self.listing is not None
            self._same = same_files(known, self.listing.smalls, attributes=True)
        return self._same

    def keep_block(self, block: Block) -> None:
        """All that stands here are just these files, which is worth keeping."""
        self._kept.append((0, block))
        self.learned = True

    def is_as(self, end: DirectoryEnd) -> bool:
        """Whether nothing was done in it and it has the mode and time that it is to have."""
        st = self.st
        return (
            st is not None
            and self.unchanged_all
            and not self.created
            and not end.extra
            and (not end.apply or (st.st_mode & 0o7777 == end.mode and st.st_mtime_ns == end.mtime_ns))
        )

    def child(self, name: bytes) -> bytes:
        """The path of an entry, from the target's root."""
        return self.path + b"/" + name if self.path else name


class Sink:
    """Something that chunks are put into; complete when `remaining` is 0 and nothing more will be offered."""

    __slots__ = ("directory", "entry", "failed", "remaining", "sealed")

    def __init__(self, directory: TargetDirectory, entry: Entry, remaining: int) -> None:
        self.directory = directory
        self.entry = entry
        self.remaining = remaining
        self.sealed = True
        self.failed = False

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        """Write verified bytes."""
        raise NotImplementedError


class SmallObject(Sink):
    """A small object of which chunks arrive apart. Its staging file is made by the first of them."""

    __slots__ = ("_lock", "fd", "staged", "staging")

    def __init__(self, directory: TargetDirectory, entry: Entry, staging: Staging) -> None:
        super().__init__(directory, entry, entry.size)
        self.staging = staging
        self.staged = staging.small_name()
        self.fd = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make the staging file, if it is not there yet."""
        with self._lock:
            if self.fd < 0:
                self.fd = os.open(
                    self.staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.staging.fd
                )

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        self.open()
        _write_all(self.fd, data, offset)


class LargeObject(Sink):
    """A large object in its staging file.

    Attributes:
        basis: an old file that is searched for its chunks.
        follower: an old file that it is compared with in step.
        recalled: a file that is remembered to be the same, from which copies are made unread; where it turns out to be
            no more than alike, it is followed as well.
        unsynced: bytes written since it was last synced, or begun.
        synced_at: when that was, or was asked for, by the monotonic clock, in seconds.
        left: where in that ends what was found last, -1 where the last chunk was not found.
    """

    __slots__ = (
        "_writing", "basis", "follower", "left", "position", "recalled", "same_until", "staged", "synced_at", "unsynced",
    )  # fmt: skip

    def __init__(self, directory: TargetDirectory, entry: Entry) -> None:
        super().__init__(directory, entry, entry.size)
        self.sealed = False
        self.staged: StagedObject | None = None
        self.position = 0
        self.left = -1
        self.follower: Follower | None = None
        # The kernel lets one thread write to a file at a time, and the others spin: let them sleep.
        self._writing = threading.Lock()
        self.same_until: list[tuple[int, bytes]] = []
        self.unsynced = 0
        self.synced_at = monotonic()
        self.basis: Basis | None = None
        self.recalled: Recalled | None = None

    def drop_old(self) -> None:
        """Close the files that it was compared with."""
        if self.basis is not None:
            self.basis.close()
            self.basis = None
        if self.follower is not None:
            self.follower.close()
            self.follower = None
        if self.recalled is not None:
            self.recalled.close()
            self.recalled = None

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        assert self.staged is not None
        with self._writing:
            _write_all(self.staged.fd, data, offset)
        start_writeback(self.staged.fd, offset, len(data))
        if self.staged.trail is not None:
            self.staged.trail.wrote(offset + len(data))
        self.staged.journal(offset, packed)
        self.unsynced += len(data)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class RunOffer(msgspec.Struct):
    """An offered run of a large object, as far as it is wanted."""

    target: LargeObject
    packed: bytes
    lengths: list[int]
    offsets: list[int]
    wanted: bytearray
    open: int


class SmallOffer:
    """An offered batch of small objects, as far as it is wanted.

    Attributes:
        block: the entries, where they came as one.
        lengths, ids: of all chunks of a block.
    """

    __slots__ = (
        "_entries", "_ids", "_lengths", "block", "directory", "first", "open", "owners", "sinks", "wanted",
    )  # fmt: skip

    def __init__(self, directory: TargetDirectory, entries: list[Entry] | Block) -> None:
        self.directory = directory
        self._ids: list[bytes] = []
        self._lengths: list[int] = []
        self.block = entries if isinstance(entries, Block) else None
        self._entries = None if isinstance(entries, Block) else entries
        counts = (
            entries.chunk_counts
            if isinstance(entries, Block)
            else [len(entry.chunks) // CHUNK_BYTES for entry in entries]
        )
        self.first = [*accumulate(counts[:-1], initial=0)]
        self.owners = [index for index, count in enumerate(counts) for _ in range(count)]
        self.wanted = bytearray(len(self.owners))
        self.open = 0
        self.sinks: dict[int, SmallObject] = {}

    @property
    def entries(self) -> list[Entry]:
        """The entries; those of a block are made when first asked for."""
        if self._entries is None:
            assert self.block is not None
            self._entries = self.block.entries
        return self._entries

    @property
    def ids(self) -> list[bytes]:
        if not self._ids and self.block is not None:
            self._ids = self.block.chunk_ids
        return self._ids

    @property
    def lengths(self) -> list[int]:
        if not self._lengths and self.block is not None:
            self._lengths = self.block.chunk_lengths
        return self._lengths

    def whole_files(self, index: int, count: int) -> tuple[int, int] | None:
        """Which files of a block chunks are, from the first on and before the last; None where one is not whole."""
        first, last = self.owners[index], self.owners[index + count - 1] + 1
        end = self.first[last] if last < len(self.first) else len(self.owners)
        return (first, last) if self.first[first] == index and end == index + count else None

    def chunks_of(self, owner: int) -> slice:
        """Which chunks are those of an entry."""
        end = self.first[owner + 1] if owner + 1 < len(self.first) else len(self.owners)
        return slice(self.first[owner], end)


class Region:
    """A part of an old file that may hold bytes of a wanted chunk.

    Args:
        fd: of the file, open as long as the region is used; -1: it is opened by name when it is read.
        directory_fd, name: a directory and the file's path below it.
        guess: what is guessed of the file, where only its name says that it is alike.
    """

    __slots__ = ("directory_fd", "fd", "guess", "name", "start", "stop")

    def __init__(
        self,
        start: int,
        stop: int,
        *,
        fd: int = -1,
        directory_fd: int = -1,
        name: bytes = b"",
        guess: Guess | None = None,
    ) -> None:
        self.start = start
        self.stop = stop
        self.fd = fd
        self.directory_fd = directory_fd
        self.name = name
        self.guess = guess

    def read(self) -> bytes:
        """Its bytes, as far as the file has them."""
        if self.fd >= 0:
            return os.pread(self.fd, self.stop - self.start, self.start)
        fd = open_beneath(self.directory_fd, self.name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.pread(fd, self.stop - self.start, self.start)
        finally:
            os.close(fd)


class Refinement:
    """A wanted chunk that is put together from fine ones.

    Attributes:
        number, offer, index: which chunk of which offer it is.
        one: the packed chunk.
        region: where its bytes may be.
        buffer: what is there of it so far; made when its fine chunks were offered.
        remaining: bytes that are not there yet.
        dead: a part of it was lost, so it will not be whole.
    """

    __slots__ = ("buffer", "dead", "index", "number", "offer", "one", "region", "remaining", "size_bytes")

    def __init__(
        self,
        number: int,
        offer: RunOffer | SmallOffer,
        index: int,
        size_bytes: int,
        one: bytes,
        region: Region,
    ) -> None:
        self.number = number
        self.offer = offer
        self.index = index
        self.size_bytes = size_bytes
        self.one = one
        self.region = region
        self.buffer = memoryview(b"")
        self.remaining = size_bytes
        self.dead = False

    @property
    def sink(self) -> Sink | None:
        """What the chunk is for; None where that has none of its own yet."""
        offer = self.offer
        return offer.target if isinstance(offer, RunOffer) else offer.sinks.get(offer.owners[self.index])


class FineOffer:
    """The fine chunks of some refinements, as far as they are wanted."""

    __slots__ = ("offsets", "open", "owners", "packed", "refinements", "wanted")

    def __init__(self, packed: bytes, refinements: list[Refinement]) -> None:
        self.packed = packed
        self.refinements = refinements
        self.owners: list[int] = []
        self.offsets: list[int] = []
        self.wanted = bytearray(len(packed) // FINE_BYTES)
        self.open = 0


Waiter = tuple[Sink, int]


class HasLengths(Protocol):
    """An offer that has the sizes of its chunks at hand."""

    @property
    def lengths(self) -> list[int]:
        """Of all chunks."""


def chunk_lengths(offer: SmallOffer | FineOffer | HasLengths, index: int, count: int) -> list[int]:
    """The sizes of some chunks of an offer."""
    if isinstance(offer, FineOffer):
        return fine_lengths(offer.packed[index * FINE_BYTES : (index + count) * FINE_BYTES])
    if not isinstance(offer, SmallOffer) or offer.block is not None:
        return offer.lengths[index : index + count]
    found: list[int] = []
    for chunk in range(index, index + count):
        owner = offer.owners[chunk]
        found += lengths_of(offer.entries[owner].chunks)[chunk - offer.first[owner] :][:1]
    return found


def waited_for(
    packed: bytes, at: int, waiters: list[list[Waiter] | None]
) -> Iterator[tuple[list[Waiter], int, int, bytes]]:
    """Of chunks that lie one behind the other from `at` on, those that somebody waits for: as `Landing.serve` takes them."""
    for index, (length, some) in enumerate(zip(lengths_of(packed), waiters, strict=True)):
        if some:
            yield some, at, length, packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        at += length
