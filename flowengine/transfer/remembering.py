"""What is remembered of what the publisher has placed: for the next scan, and for chunks that are wanted again.

Goal
    The next transfer reads nothing of it again, whether this process ends well, is killed, or is in the middle.
Plan
    A directory is kept whole in the scan cache when it is finished. Until then much of it is kept by the part, so that
    after a kill little is read again. Which chunks lie where is noted, and reaches the index many at a time.
Invariants
    - Only what has its final name is remembered, with the stat that it has there.
    - Nothing depends on it: all of it may be lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from flowengine.chunking import CHUNK_BYTES
from flowengine.manifest import FILE, SYMLINK, Block, Columns, Entry
from flowengine.store.index_log import IndexLog
from flowengine.store.many import AnyStat, Rows, Stat
from flowengine.store.proofs import encode_entries, stats_proof
from flowengine.store.runs import PlacedFolders, note_folders
from flowengine.store.scan_cache import DirectoryPart, Identity, ScanCache
from flowengine.transfer.landing import Landing
from flowengine.transfer.sinks import BlockRows, TargetDirectory, part_of
from flowengine.transfer.subtrees import SubtreesOffer
from flowengine.wire.messages import LARGE_OBJECT_BYTES

__all__ = ["Placed", "PlacedBlock", "PlacedMemory", "PlacedTree"]

_INDEX_CHUNKS: Final = 150_000
"""So many chunks reach the index during a session; fewer than a landing remembers by itself."""
_INDEX_LEAST: Final = 16
_LEAST_PART: Final = 128
"""So many objects of an unfinished directory are worth a row of the scan cache: a killed process reads fewer again."""

PlacedBlock = tuple[TargetDirectory, Block, Rows]
"""Files of a block that have their names, with their stats there."""
Placed = tuple[TargetDirectory, list[Entry], Sequence[Stat | None]]
"""Objects of a directory that have their names, each with its stat there."""


class PlacedTree:
    """Whole subtrees that were placed.

    Args:
        tree: as it was offered.
        placed: what became of its folders and files.

    Attributes:
        objects, size_bytes: of the files that have their names.
    """

    def __init__(self, tree: SubtreesOffer, placed: PlacedFolders) -> None:
        self._tree = tree
        self._placed = placed
        self._whole = not any(placed.errors) and 1 not in tree.left_out
        self.objects, self.size_bytes = tree.files, tree.size_bytes
        if not self._whole:
            sizes = [size for _, size in self.landed()]
            self.objects, self.size_bytes = len(sizes), sum(sizes)

    def landed(self) -> Iterator[tuple[bytes, int]]:
        """(path, bytes) of each file that has its name."""
        tree = self._tree
        files = zip(
            tree.columns.names.split(b"\0"), tree.sizes, self._placed.errors, tree.left_out, strict=False
        )
        for path, folder in zip(tree.paths, tree.folders, strict=True):
            for name, size, error, left_out in islice(files, folder.files):
                if error <= 0 and not left_out:
                    yield path + b"/" + name, size

    def noted(self) -> tuple[list[tuple[Stat, DirectoryPart]], bytes] | None:
        """What scan cache and chunk index are told, of all folders at once; None where it is to be said folder by folder."""
        tree, placed = self._tree, self._placed
        if not self._whole or any(placed.folder_errors):
            return None
        some = [number for number, block in enumerate(tree.blocks) if block is not None]
        made = note_folders(
            [tree.paths[number] for number in some],
            [tree.folders[number].files for number in some],
            tree.columns,
            placed.files,
        )
        if made is None:
            return None
        proofs, rows = made
        parts: list[tuple[Stat, DirectoryPart]] = []
        for number, proof in zip(some, proofs, strict=True):
            block = tree.blocks[number]
            assert block is not None
            parts.append((placed.folders[number], DirectoryPart(proof, block.data)))
        return parts, rows

    @property
    def chunks(self) -> int:
        """How many chunks its files have."""
        return len(self._tree.wanted)

    def folders(self) -> Iterator[tuple[bytes, Stat, Block, Rows, Columns]]:
        """(path, stat, files, stats and columns of these) of each folder in which all is as it is to be, and files are."""
        tree, placed, columns = self._tree, self._placed, self._tree.columns
        first = 0
        for number, (path, block) in enumerate(zip(tree.paths, tree.blocks, strict=True)):
            if block is None:
                continue
            last = first + block.count
            well = self._whole or not (any(placed.errors[first:last]) or 1 in tree.left_out[first:last])
            if well and not placed.folder_errors[number]:
                rows = placed.files.part(first, last)
                chunks = columns.chunks[tree.firsts[first] * CHUNK_BYTES : tree.firsts[last] * CHUNK_BYTES]
                own = Columns(rows.packed_names, tree.numbers_of(first, last), chunks)
                yield path, placed.folders[number], block, rows, own
            first = last


class PlacedMemory:
    """What scan cache and chunk index are told. For use by the publisher's thread.

    Attributes:
        index_grew: called when chunks were written for the index to take over.
    """

    def __init__(self, landing: Landing, cache: ScanCache | None, index_log: IndexLog | None) -> None:
        self._landing = landing
        self._cache = cache
        self._index_log = index_log
        self._parts: dict[bytes, int] = {}
        self._unkept: dict[bytes, list[tuple[bytes, AnyStat, Entry]]] = {}
        self._unkept_blocks: dict[bytes, list[BlockRows]] = {}
        self.index_grew: Callable[[], None] = lambda: None

    def add(self, placed: list[Placed]) -> None:
        """Tell the scan cache and the chunk index what now lies at the target."""
        for directory, entries, stats in placed:
            directory.unchanged_all = False
            rows: list[tuple[bytes, AnyStat, Entry]] = []
            for entry, st in zip(entries, stats, strict=True):
                if st is None or entry.kind not in (FILE, SYMLINK) or entry.extra:
                    continue
                if entry.size >= LARGE_OBJECT_BYTES:
                    self._remember_large(directory, entry, st)
                else:
                    rows.append((entry.name, st, entry))
            if not rows:
                continue
            directory.add_rows(rows)
            if self._index_log is not None:
                self._index_log.add_small(directory.path, rows)
                self._flush_full_index()
            if self._cache is not None:
                self._remember_part(directory, rows)

    def add_blocks(self, placed: list[PlacedBlock]) -> None:
        """Tell the scan cache and the chunk index of blocks that have their names."""
        for directory, block, rows in placed:
            directory.unchanged_all = False
            directory.add_block(block, rows)
            if self._index_log is not None:
                self._index_log.add_block(directory.path, block, rows)
                self._flush_full_index()
            if self._cache is None:
                continue
            if directory.end is not None and not directory.open_names.difference(block.names):
                self._unkept_blocks.pop(directory.path, None)
                continue  # written whole when the directory is finished, in a moment
            waiting = self._unkept_blocks.setdefault(directory.path, [])
            waiting.append((block, rows))
            if (
                sum([one.count for one, _ in waiting]) >= _LEAST_PART
                and (part := part_of(waiting)) is not None
            ):
                del self._unkept_blocks[directory.path]
                self._add_part(directory, part)

    def add_trees(self, placed: list[PlacedTree]) -> None:
        """Tell the scan cache and the chunk index of whole subtrees; they are finished."""
        for tree in placed:
            noted = tree.noted()
            if noted is not None:
                if self._index_log is not None:
                    self._index_log.add_rows(noted[1], tree.chunks)
                if self._cache is not None:
                    for st, part in noted[0]:
                        self._cache.save_directory(st.st_dev, st.st_ino, [part])
            for path, st, block, rows, columns in tree.folders() if noted is None else ():
                if self._index_log is not None:
                    self._index_log.add_block(path, block, rows, columns)
                if self._cache is not None:
                    self._cache.save_directory(st.st_dev, st.st_ino, [DirectoryPart(rows.proof, block.data)])
            self._flush_full_index()

    def relinked(self, entry: Entry, before: AnyStat, directory: TargetDirectory) -> None:
        """Another name moved the inode's ctime: what the cache knows of it is still true."""
        now = Stat.of(os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False))
        if self._cache is not None and before.st_size >= LARGE_OBJECT_BYTES:
            self._cache.settle_pieces(Identity.of(now), before.st_ctime_ns)
        parent, _, name = entry.link.rpartition(b"/")
        first = self._landing.directories.get(parent)
        for index, row in enumerate(first.rows if first is not None else ()):
            if row[0] == name and first is not None:
                first.rows[index] = (name, now, row[2])

    def finish(self, directory: TargetDirectory) -> None:
        """All of a directory has its names, its mode and its time: keep it whole."""
        if self._cache is None or directory.unchanged_all or (part := directory.part()) is None:
            return
        st = os.fstat(directory.fd)
        self._cache.save_directory(st.st_dev, st.st_ino, [part])

    def forget(self, directory: TargetDirectory) -> None:
        """A directory is done with."""
        directory.forget_rows()
        self._unkept.pop(directory.path, None)
        self._unkept_blocks.pop(directory.path, None)

    def _remember_large(self, directory: TargetDirectory, entry: Entry, st: Stat) -> None:
        if self._cache is None:
            return
        self._cache.settle_pieces(Identity.of(st))
        for offset, packed in self._cache.pieces(Identity.of(st)):
            if self._index_log is not None and packed:
                self._index_log.add(directory.child(entry.name), st, offset, packed)
                self._flush_full_index()

    def _remember_part(self, directory: TargetDirectory, rows: list[tuple[bytes, AnyStat, Entry]]) -> None:
        """Keep what is known of a directory that is still being filled, once it is much."""
        assert self._cache is not None
        if directory.end is not None and not (directory.open_names - {name for name, _, _ in rows}):
            self._unkept.pop(directory.path, None)
            return  # written whole when the directory is finished, in a moment
        waiting = self._unkept.setdefault(directory.path, [])
        waiting += rows
        if len(waiting) < _LEAST_PART:
            return
        del self._unkept[directory.path]
        part = DirectoryPart(
            stats_proof([(name, st) for name, st, _ in waiting]),
            encode_entries([entry for _, _, entry in waiting]),
        )
        self._add_part(directory, part)

    def _add_part(self, directory: TargetDirectory, part: DirectoryPart) -> None:
        assert self._cache is not None
        st_dir = os.fstat(directory.fd)
        number = self._parts[directory.path] = self._parts.get(directory.path, 0) + 1
        self._cache.add_directory_part(st_dir.st_dev, st_dir.st_ino, number, part)

    def _flush_full_index(self) -> None:
        """What is noted of chunks reaches the index many at a time."""
        if self._index_log is not None and self._index_log.chunks >= _INDEX_CHUNKS:
            self.flush_index()

    def flush_index(self, *, last: bool = False) -> None:
        """Write what was noted to the chunk index.

        A few chunks are not worth it: sending them again takes less time than loading what searches the index.
        """
        log = self._index_log
        if log is not None and not (last and log.chunks < _INDEX_LEAST) and not self._landing.index_is_wrong:
            log.flush()
            self.index_grew()
