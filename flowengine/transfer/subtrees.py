"""Whole subtrees of small files that land where nothing stood: one offer, one delivery, one step of the publisher.

Goal
    At the target, too, a folder of a few files costs what its files cost.
Plan
    `SubtreesOffer` has the files of all the folders as columns. They are wanted as one, arrive as runs of whole files, and
    are written to staging files whose numbers follow from theirs. When none is out any more the publisher makes the folders
    and places the files in them; until then nothing of it is to be seen. What is given up (by a halt, or because the source
    lost it) is left out.
Invariants
    - The account of what is open stays `transfer.landing`'s: a file is open until it is placed, has failed or was given up.
    - The folder that all are in stays open as long as they are.
    - Files are in staging whole or not at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, repeat
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from flowengine.chunking import CHUNK_BYTES, right_chunks
from flowengine.errors import IntegrityError, ProtocolError
from flowengine.manifest import Block, join_columns
from flowengine.store.filesystem import local_error
from flowengine.store.runs import FolderPlace, write_run
from flowengine.transfer.places import LandedSubtrees, path_of_file
from flowengine.transfer.sinks import NO_ENTRY, WANTED, TargetDirectory, waited_for
from flowengine.transfer.timing import Stage
from flowengine.units import show_path
from flowengine.wire.messages import Folder

if TYPE_CHECKING:
    from flowengine.transfer.landing import Landing

__all__ = [
    "LEFT_OUT",
    "OUT",
    "WRITTEN",
    "SubtreesOffer",
    "at_hand",
    "deliver_subtrees",
    "files_not_begun",
    "give_up_files",
    "is_all_new",
    "place_if_complete",
    "want_subtrees",
]

OUT: Final = 0
WRITTEN: Final = 1
LEFT_OUT: Final = 2
_IS_LEFT_OUT: Final = bytes(value == LEFT_OUT for value in range(256))
_NUMBERS: Final = 40
"""Bytes of a file's numbers in `Columns.packed`."""


class SubtreesOffer:
    """Folders of plain files below a directory, all of which are wanted, and none of which stood there.

    Args:
        directory: which they are in.
        folders, blocks: each folder before those in it, and its files.

    Attributes:
        number: of the first of their offers.
        columns: all files, those of one folder behind those of the other.
        sizes, size_bytes: of the files.
        firsts: how many chunks come before each file; one more for the end.
        wanted, open: as of other offers.
        states: of each file: `OUT` on its way, `WRITTEN` to staging, or `LEFT_OUT`: it will not land.
        pending: files with chunks that are on their way.
        complete: whether the publisher has it, or nothing of it lands.
        staged: the number of the first file's staging file.
    """

    __slots__ = (
        "_ids", "_landed", "_lengths", "_paths", "blocks", "columns", "complete", "directory", "file_ends", "firsts", "folders", "number", "open",
        "pending", "size_bytes", "sizes", "staged", "states", "wanted",
    )  # fmt: skip

    def __init__(
        self, directory: TargetDirectory, folders: Sequence[Folder], blocks: Sequence[Block | None]
    ) -> None:
        self.directory = directory
        self.number = -1
        self.blocks = blocks
        files = [len(block or ()) for block in blocks]
        self.folders = [
            FolderPlace(one.depth, one.name, one.mode, one.mtime_ns, count)
            for one, count in zip(folders, files, strict=True)
        ]
        self.file_ends = [*accumulate(files)]
        self.columns = join_columns([block for block in blocks if block is not None])
        counts = [size // CHUNK_BYTES for size in self.columns.numbers[::5]]
        self.firsts = [*accumulate(counts, initial=0)]
        self.wanted = bytearray(self.firsts[-1])
        self.open = 0
        self.sizes = self.columns.numbers[1::5].tolist()
        self.size_bytes = sum(self.sizes)
        self.states = bytearray(len(counts))
        self.pending = len(counts) - counts.count(0)
        self.complete = False
        self.staged = -1
        self._ids: list[bytes] = []
        self._lengths: list[int] = []
        self._paths: list[bytes] = []
        self._landed: LandedSubtrees | None = None

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self.states)

    @property
    def token(self) -> bytes:
        """What it is called among what is open in its directory; no name has a slash."""
        return b"/%d" % self.number

    @property
    def left_out(self) -> bytes:
        """Of each file, whether it will not land."""
        return bytes(self.states.translate(_IS_LEFT_OUT))

    def has_chunks(self, file: int) -> bool:
        """Whether a file is not empty."""
        return self.firsts[file] < self.firsts[file + 1]

    @property
    def ids(self) -> list[bytes]:
        """Of all chunks."""
        if not self._ids:
            self._ids = self.columns.ids
        return self._ids

    @property
    def lengths(self) -> list[int]:
        """Of all chunks."""
        if not self._lengths:
            self._lengths = self.columns.lengths
        return self._lengths

    @property
    def paths(self) -> list[bytes]:
        """Of the folders, from the target's root."""
        if not self._paths:
            paths: list[bytes] = []
            above: list[bytes] = []
            for one in self.folders:
                del above[one.depth :]
                path = above[-1] + b"/" + one.name if above else self.directory.child(one.name)
                above.append(path)
                paths.append(path)
            self._paths = paths  # at once: any thread may ask
        return self._paths

    @property
    def parents(self) -> list[int]:
        """Of each folder the number of the one that it is in; -1 for the directory."""
        parents: list[int] = []
        above: list[int] = []
        for number, one in enumerate(self.folders):
            del above[one.depth :]
            parents.append(above[-1] if above else -1)
            above.append(number)
        return parents

    def owner(self, chunk: int) -> int:
        """Which file a chunk is of."""
        return bisect_right(self.firsts, chunk) - 1

    def path_of(self, file: int) -> bytes:
        """The path of a file, from the target's root."""
        return path_of_file(self.paths, self.file_ends, self.columns.names, file)

    @property
    def landed(self) -> LandedSubtrees:
        """Where its chunks are once they are written."""
        if self._landed is None:
            self._landed = LandedSubtrees(
                self.paths, self.file_ends, self.columns.names, self.columns.chunks, self.firsts, self.staged
            )
        return self._landed

    def numbers_of(self, first: int, last: int) -> bytes:
        """The numbers of some files."""
        return self.columns.packed[first * _NUMBERS : last * _NUMBERS]

    def write(self, landing: Landing, first: int, last: int, data: memoryview) -> None:
        """Write some files to staging, whose bytes lie one behind the other.

        Raises:
            OSError: as the file system says.
        """
        staged = self.staged + first
        write_run(landing.staging.part(staged), staged, self.numbers_of(first, last), data, landing.umask)


def is_all_new(landing: Landing, offer: SubtreesOffer) -> bool:
    """Whether no chunk of an offer is at hand or on its way. It stays so: only the placer's thread adds to what is."""
    ids = set(offer.ids)
    if len(ids) != len(offer.wanted):
        return False
    with landing.lock:
        return landing.inflight.keys().isdisjoint(ids) and landing.recent.keys().isdisjoint(ids)


def at_hand(landing: Landing, offer: SubtreesOffer) -> list[int]:
    """The chunks of an offer that are at hand or on their way, or come more than once in it, each but for the first time."""
    if is_all_new(landing, offer):
        return []
    with landing.lock:
        seen: set[bytes] = set()
        known: list[int] = []
        for chunk, identity in enumerate(offer.ids):
            if identity in seen or identity in landing.inflight or identity in landing.recent:
                known.append(chunk)
            seen.add(identity)
    return known


def want_subtrees(landing: Landing, offer: SubtreesOffer) -> None:
    """Want all of an offer of which nothing is at hand."""
    with landing.lock:
        landing.inflight.update(dict.fromkeys(offer.ids))
        offer.open = len(offer.wanted)
        offer.wanted[:] = bytes([WANTED]) * offer.open
        offer.staged = landing.staging.run_numbers(offer.files)
        landing.subtrees_opened(offer)
        if offer.open:
            landing.offers[offer.number] = offer
    place_if_complete(landing, offer)  # empty files wait for nothing


def deliver_subtrees(
    landing: Landing,
    offer: SubtreesOffer,
    index: int,
    count: int,
    plain: memoryview,
    stages: tuple[Stage, Stage],
) -> int:
    """Verify and write whole files; gives how many bytes of `plain` they take.

    Raises:
        IntegrityError: a chunk has not the hash that it was offered with.
        ProtocolError: a file that is to land comes in parts.
        FlowError: the disk refused.
    """
    verify, write = stages
    end = index + count
    ids, chunks = offer.ids[index:end], offer.columns.chunks[index * CHUNK_BYTES : end * CHUNK_BYTES]
    begin = perf_counter_ns()
    right = right_chunks(plain, chunks)
    if right != count:
        raise IntegrityError(
            f"a chunk of {show_path(offer.path_of(offer.owner(index + right)))} does not have the hash it was "
            "offered with",
            hint="nothing of it was used; if it repeats, the source's memory or disk is faulty, or it lies",
        )
    begin = verify.since(begin)
    try:
        written, size = _write_files(landing, offer, index, end, plain)
        with landing.lock:
            waiters = [*map(landing.inflight.pop, ids, repeat(None))]
            for start, stop in written:
                landing.recent.update(zip(offer.ids[start:stop], repeat(offer.landed), strict=False))
                offer.pending -= sum(
                    map(offer.has_chunks, range(offer.owner(start), offer.owner(stop - 1) + 1))
                )
            landing.forget_oldest()
        if any(waiters):
            landing.serve([*waited_for(chunks, 0, waiters)], plain)
    except OSError as error:
        raise local_error(error, "cannot write into", offer.directory.path or b".") from error
    place_if_complete(landing, offer)
    write.since(begin)
    return size


def _write_files(
    landing: Landing, offer: SubtreesOffer, index: int, end: int, plain: memoryview
) -> tuple[list[tuple[int, int]], int]:
    """Write those of some files that are to land: their chunks, from one and before the other, and the bytes of all.

    Which they are is settled: what a lane has in hand is not given up.
    """
    firsts, states, lengths = offer.firsts, offer.states, offer.lengths
    files = range(offer.owner(index), offer.owner(end - 1) + 1)
    written: list[tuple[int, int]] = []
    at = 0
    for state, group in groupby(files, states.__getitem__):
        some = [*group]
        first, last = some[0], some[-1] + 1
        start, stop = max(firsts[first], index), min(firsts[last], end)
        size = sum(lengths[start:stop])
        if state == OUT:  # an empty one between those that are left out may have been written before
            if (start, stop) != (firsts[first], firsts[last]):
                raise ProtocolError(
                    f"{show_path(offer.path_of(first))} or {show_path(offer.path_of(last - 1))} came in parts, and was "
                    "offered as one of many that come whole"
                )
            offer.write(landing, first, last, plain[at : at + size])
            states[first:last] = bytes([WRITTEN]) * (last - first)
            if start < stop:
                written.append((start, stop))
        at += size
    return written, at


def give_up_files(landing: Landing, offer: SubtreesOffer, files: Iterable[int]) -> None:
    """These will not land; inside the lock. They must be out, and no lane may have anything of them in hand."""
    for file in files:
        offer.states[file] = LEFT_OUT
        offer.pending -= offer.has_chunks(file)
        landing.given_up()


def files_not_begun(offer: SubtreesOffer) -> list[int]:
    """The files with chunks of which nothing is here, nor in a lane's hands."""
    marks, firsts = offer.wanted, offer.firsts
    return [
        file
        for file, state in enumerate(offer.states)
        if state == OUT
        and offer.has_chunks(file)
        and marks.count(WANTED, firsts[file], firsts[file + 1]) == firsts[file + 1] - firsts[file]
    ]


def place_if_complete(landing: Landing, offer: SubtreesOffer) -> None:
    """Hand an offer to the publisher once nothing of it is out; not inside the lock.

    Raises:
        FlowError: the disk refused.
    """
    with landing.lock:
        if offer.pending or offer.complete:
            return
        offer.complete = True
        halted = bool(landing.halted)
        empty = [file for file, state in enumerate(offer.states) if state == OUT]
        if halted:
            give_up_files(landing, offer, empty)
        else:
            for file in empty:
                offer.states[file] = WRITTEN
    if not halted:
        try:
            for file in empty:
                offer.write(landing, file, file + 1, memoryview(b""))
        except OSError as error:
            raise local_error(error, "cannot write into", offer.directory.path or b".") from error
    if halted and offer.states.count(LEFT_OUT) == offer.files:
        landing.subtrees_closed(offer)
    else:
        landing.publishable.put(("subtrees", offer.directory, NO_ENTRY, offer))
