"""Places whole subtrees that are offered as one: what is new here is wanted as one, the rest folder by folder.

Plan
    All that came is looked at at once: what is on its way or arrived, what the index knows, what lies here under other names.
    A folder of whose files something may be at hand, or that stands here, is entered; the subtrees between such folders are
    wanted together. So one file that is known costs the folders that it is in, and not all that came with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator

import msgspec

from flowengine.errors import ProtocolError
from flowengine.manifest import Block
from flowengine.store.encoded import parse_block
from flowengine.store.leaves import known_leaves
from flowengine.transfer.placement import SET_ID_BITS, Placement
from flowengine.transfer.sinks import TargetDirectory
from flowengine.transfer.subtrees import SubtreesOffer, at_hand, is_all_new, want_subtrees
from flowengine.units import show_path
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    MAX_OFFER_CHUNKS,
    MAX_OFFER_ENTRIES,
    MAX_SUBTREES_FOLDERS,
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Folder,
    Subtrees,
    passages,
)
from flowengine.wire.paths import MAX_DEPTH, MAX_PATH_BYTES, STAGING_NAME, check_name

__all__ = ["SubtreesPlacer", "check_folders", "each_of", "offers_of"]


def offers_of(message: Subtrees) -> int:
    """How many offers it is."""
    return sum([bool(folder.entries) for folder in message.folders])


def check_folders(directory: TargetDirectory, folders: list[Folder], depth: int) -> None:
    """Refuse what is no list of whole subtrees of a directory so deep, before anything of it is done.

    Raises:
        ProtocolError: it contradicts the protocol or its limits.
    """
    if not 0 < len(folders) <= MAX_SUBTREES_FOLDERS or not any(folder.entries for folder in folders):
        raise ProtocolError(
            f"subtrees of {len(folders)} folders were offered; 1 to {MAX_SUBTREES_FOLDERS} are allowed, and files in them"
        )
    above: list[int] = []
    root = len(directory.path)
    for folder in folders:
        if not 0 <= folder.depth <= len(above):
            raise ProtocolError(
                f"the folder {show_path(folder.name)} is offered {folder.depth} below a folder with {len(above)} around it"
            )
        del above[folder.depth :]
        check_name(folder.name, reserved=(STAGING_NAME,))
        above.append((above[-1] if above else root) + 1 + len(folder.name))
        if depth + folder.depth >= MAX_DEPTH or above[-1] > MAX_PATH_BYTES:
            raise ProtocolError(
                f"the path of a folder {show_path(folder.name)} below {show_path(directory.path or b'.')} is deeper or "
                "longer than allowed"
            )


def each_of(folders: list[Folder]) -> Iterator[DirectoryBegin | EncodedOffer | DirectoryEnd]:
    """What says the same folder by folder."""
    for folder, entered in passages(folders):
        if not entered:
            yield DirectoryEnd(folder.mode, folder.mtime_ns)
            continue
        yield DirectoryBegin(folder.name)
        if folder.entries:
            yield EncodedOffer(folder.entries)


class SubtreesPlacer:
    """Answers offers of whole subtrees. For use by the placer's thread.

    Args:
        handle: acts on what is told of one folder.
        current: the directory that the source is in.
    """

    def __init__(
        self,
        placement: Placement,
        handle: Callable[[DirectoryBegin | EncodedOffer | DirectoryEnd], None],
        current: Callable[[], TargetDirectory],
    ) -> None:
        self._placement = placement
        self._handle = handle
        self._current = current

    def offer(self, folders: list[Folder], depth: int) -> None:
        """Answer subtrees of the current directory, which is so deep: as one what is new here, the rest folder by folder.

        Raises:
            ProtocolError: what is offered contradicts the protocol, its limits or itself.
        """
        check_folders(self._current(), folders, depth)
        for folder in folders:
            self._placement.check_mode(folder.mode)
        with self._placement.one_message():
            self._place(_Group(folders, self._current()), 0, len(folders))

    def _place(self, group: _Group, start: int, end: int) -> None:
        """Place the subtrees from one folder on and before another one, all in the current directory."""
        directory = self._current()
        unchanged: dict[int, Block] | None = None
        kept: list[tuple[Folder, Block]] = []
        first = at = start
        while at < end:
            behind, folder = group.ends[at], group.folders[at]
            stands = folder.name in directory.existing
            if stands and unchanged is None:
                unchanged = self._unchanged(group, at, end)
            if stands or self._is_doubtful(group, at, behind):
                block = None if unchanged is None else unchanged.get(at)
                if first < at or block is None:
                    self._keep(directory, kept)
                self._as_one(group, first, at)
                if block is not None:
                    kept.append((folder, block))
                else:
                    self._handle(DirectoryBegin(folder.name))
                    if folder.entries:
                        self._handle(EncodedOffer(folder.entries))
                    self._place(group, at + 1, behind)
                    self._handle(DirectoryEnd(folder.mode, folder.mtime_ns))
                first = behind
            at = behind
        self._keep(directory, kept)
        self._as_one(group, first, end)

    def _unchanged(self, group: _Group, start: int, end: int) -> dict[int, Block]:
        """The files of folders with none in them that stand in the current directory as they are offered, by their numbers.

        As far as the scan cache knows. Most of what is offered again is so, and need not be entered.
        """
        placement, directory = self._placement, self._current()
        if placement.cache is None or not self._may_be_one(directory):
            return {}
        numbers: list[int] = []
        at = start
        while at < end:
            folder, behind = group.folders[at], group.ends[at]
            if behind == at + 1 and folder.entries and folder.name in directory.existing:
                numbers.append(at)
            at = behind
        folders = [group.folders[number] for number in numbers]
        leaves = known_leaves(
            placement.cache,
            directory.fd,
            [folder.name for folder in folders],
            LARGE_OBJECT_BYTES,
            STAGING_NAME,
            [folder.entries for folder in folders],
            [directory.existing[folder.name] for folder in folders],
        )
        return {
            number: leaf.block
            for number, folder, leaf in zip(numbers, folders, leaves, strict=True)
            if leaf is not None
            and (leaf.st.st_mode & 0o7777, leaf.st.st_mtime_ns) == (folder.mode, folder.mtime_ns)
            and not leaf.block.mode_bits & SET_ID_BITS
        }

    def _keep(self, directory: TargetDirectory, kept: list[tuple[Folder, Block]]) -> None:
        """Take note of folders that stand as they are offered, in their order; the list is empty then."""
        if not kept:
            return
        placement = self._placement
        if directory.offered is not None:
            directory.offered.update([folder.name for folder, _ in kept])
        placement.recorder.leaves(kept)
        placement.kept(sum([block.count for _, block in kept]), sum([block.size_bytes for _, block in kept]))
        placement.next_number(len(kept))
        placement.answer_none(len(kept))
        kept.clear()

    def _is_doubtful(self, group: _Group, start: int, end: int) -> bool:
        """Whether some of these subtrees, of which nothing stands in the current directory, are to be looked at."""
        lookalikes = self._placement.lookalikes
        if group.doubtful is None:
            group.moves = lookalikes.moves
            group.doubtful = self._doubts(group) or bytearray(b"\1" * len(group.folders))
        elif lookalikes.moves != group.moves and group.offer is not None:
            # What was found in a folder before these says where they may be as well.
            group.moves = lookalikes.moves
            for number in range(start, len(group.folders)):
                if group.blocks[number] and not group.doubtful[number]:
                    group.doubtful[number] = lookalikes.before(group.offer.paths[number]) is not None
        return group.doubtful.find(1, start, end) >= 0

    def _as_one(self, group: _Group, start: int, end: int) -> None:
        """Want some subtrees of which nothing is at hand."""
        if start == end:
            return
        folders, blocks = group.part(start, end)
        directory, landing = self._current(), self._placement.landing
        offer = group.offer if end - start == len(group.folders) else None
        # One folder by itself is as well served by the way that has state for each of its files.
        if offer is None and end - start > 1 and any(blocks) and self._may_be_one(directory):
            offer = SubtreesOffer(directory, folders, blocks)
        if offer is None or landing.halted or not is_all_new(landing, offer):
            for message in each_of(folders):
                self._handle(message)
            return
        self._placement.recorder.subtrees(folders, blocks)
        directory.unchanged_all = False
        if directory.offered is not None:
            directory.offered.update([folder.name for folder in folders if not folder.depth])
        offer.number = self._placement.number
        want_subtrees(landing, offer)
        self._placement.lookalikes.expect(offer.size_bytes)
        self._placement.answer_whole(len(blocks) - blocks.count(None), chunks=len(offer.wanted))

    def _may_be_one(self, directory: TargetDirectory) -> bool:
        """Whether anything in a directory may be wanted as one."""
        placement = self._placement
        return not (
            placement.dry
            or placement.atomic
            or directory.fd < 0
            or directory.keys is not None
            or placement.landing.halted
        )

    def _doubts(self, group: _Group) -> bytearray | None:
        """Of each folder, whether its files may be at hand, or cannot be wanted with others; None where that holds for all."""
        placement, directory = self._placement, group.directory
        if not self._may_be_one(directory):
            return None
        placement.landing.wait_for_objects()
        folders, blocks = group.folders, group.blocks
        forbidden_bits = SET_ID_BITS | placement.landing.masked
        for number, folder in enumerate(folders):
            block = parse_block(folder.entries) if folder.entries else None
            blocks[number] = None if block is None or block.mode_bits & forbidden_bits else block
        if not any(blocks):
            return None
        offer = SubtreesOffer(directory, folders, blocks)
        if offer.files > MAX_OFFER_ENTRIES or len(offer.wanted) > MAX_OFFER_CHUNKS:
            return None
        group.offer = offer
        names = b"\0" + offer.columns.names
        usual = max(offer.sizes) < LARGE_OBJECT_BYTES and b"\0" + STAGING_NAME + b"\0" not in names
        doubtful = bytearray(
            [
                bool(folder.entries) if block is None else not (usual or _is_of_small_files(block))
                for folder, block in zip(folders, blocks, strict=True)
            ]
        )
        for chunk in (*at_hand(placement.landing, offer), *placement.remembered(offer.columns.chunks)):
            doubtful[bisect_right(offer.file_ends, offer.owner(chunk))] = 1
        if placement.lookalikes.known():
            for number, (path, block) in enumerate(zip(offer.paths, blocks, strict=True)):
                if block is not None and placement.lookalikes.may_hold(path, block.names, block.sizes):
                    doubtful[number] = 1
        return doubtful


class _Group:
    """What came in one message.

    Attributes:
        folders: each before those in it.
        directory: which the first is in.
        ends: for each folder, the one behind all that is in it.
        blocks: its files; None where it has none, or they are no block that can be made.
        doubtful: of each folder, whether its files are to be looked at; None before that was asked.
        moves: that the lookalikes knew of when it was.
        offer: all of it as one.
    """

    def __init__(self, folders: list[Folder], directory: TargetDirectory) -> None:
        self.folders = folders
        self.directory = directory
        self.ends = _ends(folders)
        self.blocks: list[Block | None] = [None] * len(folders)
        self.doubtful: bytearray | None = None
        self.moves = 0
        self.offer: SubtreesOffer | None = None

    def part(self, start: int, end: int) -> tuple[list[Folder], list[Block | None]]:
        """Some of the folders, of which the first is in the current directory, and their files."""
        above = self.folders[start].depth
        folders = self.folders[start:end]
        if above:
            folders = [msgspec.structs.replace(folder, depth=folder.depth - above) for folder in folders]
        return folders, self.blocks[start:end]


def _ends(folders: list[Folder]) -> list[int]:
    """For each folder, the one behind all that is in it."""
    ends = [len(folders)] * len(folders)
    opened: list[int] = []
    for number, folder in enumerate(folders):
        for left in opened[folder.depth :]:
            ends[left] = number
        del opened[folder.depth :]
        opened.append(number)
    return ends


def _is_of_small_files(block: Block) -> bool:
    return max(block.sizes) < LARGE_OBJECT_BYTES and STAGING_NAME not in block.names
