"""Builds the manifest of what flows past: the source from its scan, the target from what it was offered."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowengine.errors import ProtocolError
from flowengine.manifest import Block, Entry, ManifestBuilder, Summary
from flowengine.manifest.build import Leaf
from flowengine.manifest.cut import ChunkListBuilder
from flowengine.store.scan_events import Batch
from flowengine.wire.messages import Folder

__all__ = ["ManifestRecorder"]


class ManifestRecorder:
    """Turns a session's events into calls of a `ManifestBuilder`; both ends so get the same bytes."""

    def __init__(self, builder: ManifestBuilder) -> None:
        self._builder = builder
        self._large: Entry | None = None
        self._chunks: ChunkListBuilder | None = None

    def show(self, data: bytes, *, last: bool) -> None:
        """The peer shows a manifest; nobody asked for it where there is no version to be held to."""
        raise ProtocolError("the source shows a manifest that it was not asked for")

    def close(self) -> None:
        """Let go what was kept for it."""

    def enter(self, name: bytes) -> None:
        """A directory begins."""
        self._builder.begin_directory(name)

    def entries(self, entries: list[Entry], *, check: bool = True) -> None:
        """The next whole entries of the current directory; `check` as for `ManifestBuilder.add_entries`."""
        self._builder.add_entries(entries, check=check)

    def block(self, block: Block) -> None:
        """The same, of a block."""
        self._builder.add_block(block)

    def batch(self, batch: Batch) -> None:
        """The next entries of the current directory, as a scan gives them."""
        if batch.block is not None:
            self.block(batch.block)
        else:
            self.entries(batch.entries, check=not batch.recalled)

    def subtrees(self, folders: Sequence[Folder], blocks: Sequence[Block | None]) -> None:
        """Whole subtrees of the current directory: their folders as they are met, and the files of each."""
        opened: list[Folder] = []
        leaves: list[tuple[Folder, Block | None]] = []
        for number, (folder, block) in enumerate(zip(folders, blocks, strict=True), 1):
            if len(opened) > folder.depth:
                self.leaves(leaves)
                leaves = []
                while len(opened) > folder.depth:
                    self._leave(opened.pop())
            if number == len(folders) or folders[number].depth <= folder.depth:
                leaves.append((folder, block))
                continue
            self.leaves(leaves)
            leaves = []
            self.enter(folder.name)
            if block is not None:
                self.block(block)
            opened.append(folder)
        self.leaves(leaves)
        while opened:
            self._leave(opened.pop())

    def leaves(self, leaves: Sequence[tuple[Folder, Block | None]]) -> None:
        """Directories of the current one that have none in them, each with its files."""
        if leaves:
            self._builder.add_leaves(
                [Leaf(folder.name, folder.mode, folder.mtime_ns, block) for folder, block in leaves]
            )

    def _leave(self, folder: Folder) -> None:
        self.leave(folder.mode, folder.mtime_ns, b"")

    def large_begin(self, entry: Entry) -> None:
        """A large object begins; forgets one that was not ended."""
        self._large = entry
        self._chunks = self._builder.new_object()

    def large_chunks(self, packed: bytes) -> None:
        """More chunks of the large object."""
        assert self._chunks is not None
        self._chunks.feed(packed)

    def large_end(self, *, keep: bool) -> Entry | None:
        """The large object is complete: its entry; None when it is to be forgotten."""
        entry, chunks = self._large, self._chunks
        self._large = self._chunks = None
        if not keep or entry is None or chunks is None:
            return None
        made = msgspec.structs.replace(entry, **chunks.finish().fields())
        self._builder.add_entries([made])
        return made

    def leave(self, mode: int, mtime_ns: int, extra: bytes) -> None:
        """The current directory ends."""
        self._builder.end_directory(mode, mtime_ns, extra)

    def finish(self) -> Summary:
        """The version's summary, once the root was left."""
        return self._builder.finish()
