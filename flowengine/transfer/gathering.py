"""Gathers whole subtrees of small files out of a scan's events: many folders that are offered as one.

Goal
    A folder of a few files costs what its files cost, and not a passage of its own through every step of a transfer.
Plan
    A folder that holds nothing but a block of files, and folders of the same kind, is kept back until there are many of
    them or something else comes. What is complete then is a `Gathered`; folders that are still open are told as they are.
Invariants
    - The order of the scan is kept: what is kept back is told before what comes after it.
    - What is kept back is bounded, and told with the first folder that is met `HELD_NS` later.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from flowengine.manifest import Block
from flowengine.store.scan_events import Batch, DirectoryEntered, DirectoryLeft, Event
from flowengine.wire.messages import MAX_OFFER_CHUNKS, MAX_OFFER_ENTRIES, Folder, passages

__all__ = ["HELD_NS", "Gathered", "Gatherer"]

HELD_NS: Final = 50_000_000
_MANY_FOLDERS: Final = 128
_MANY_FILES: Final = MAX_OFFER_ENTRIES - 128
_MANY_CHUNKS: Final = 4096
_MANY_BYTES: Final = 4 << 20
"""From one of these on nothing more is begun, so that a folder of usual size still fits. What is not placed whole when a
session breaks is sent again: keep it little."""
_MOST_BYTES: Final = 8 << 20


class _Held:
    """A folder that was entered; `left` is None while it is open."""

    __slots__ = ("batch", "depth", "entered", "left")

    def __init__(self, depth: int, entered: DirectoryEntered) -> None:
        self.depth = depth
        self.entered = entered
        self.batch: Batch | None = None
        self.left: DirectoryLeft | None = None


class Gathered:
    """Complete subtrees of the current directory, their folders in the order in which they are met.

    Attributes:
        folders: as they are offered.
        blocks: of each its files; None where it has none itself.
        batches: of those that have some.
    """

    __slots__ = ("batches", "blocks", "folders")

    def __init__(self, folders: list[Folder], batches: Sequence[Batch | None]) -> None:
        self.folders = folders
        self.blocks: list[Block | None] = [None if one is None else one.block for one in batches]
        self.batches = [one for one in batches if one is not None]


class Gatherer:
    """Keeps back what may be offered as one. For use by one thread."""

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._open: list[int] = []
        self._files = self._chunks = self._size_bytes = 0
        self._since: int | None = None

    def take(self, event: Event) -> Iterable[Event | Gathered]:
        """What is to be told now that `event` is met."""
        if self._held and self._since is None:  # not before: to tell what was in front of them may take long
            self._since = time.perf_counter_ns()
        match event:
            case DirectoryEntered(name) if name:
                told = [*self.let_go()] if self._is_much() else ()
                self._held.append(_Held(len(self._open), event))
                self._open.append(len(self._held) - 1)
                return told
            case Batch(block=Block() as block) if self._fits(block):
                self._held[-1].batch = event
                self._files += block.count
                self._chunks += block.chunks
                self._size_bytes += block.size_bytes
                return ()
            case DirectoryLeft(complete=True, apply=True, extra=b"") if self._open:
                self._held[self._open.pop()].left = event
                return ()
            case _:
                return [*self.let_go(), event] if self._held else (event,)

    def let_go(self) -> Iterator[Event | Gathered]:
        """All that is kept back: what is complete as one, folders that are open as they were met."""
        held, opened = self._held, self._open
        self._forget()
        start = 0
        for depth, end in enumerate((*opened, len(held))):
            yield from _told(held[start:end], depth)
            if end < len(held):
                yield held[end].entered
                batch = held[end].batch
                if batch is not None:
                    yield batch
            start = end + 1

    def drop(self) -> list[Batch]:
        """Forget what is kept back; gives the batches of it, whose buffers are for the caller to release."""
        batches = [one.batch for one in self._held if one.batch is not None]
        self._forget()
        return batches

    def _forget(self) -> None:
        self._held, self._open = [], []
        self._since = None
        self._files = self._chunks = self._size_bytes = 0

    def _is_much(self) -> bool:
        return (
            len(self._held) >= _MANY_FOLDERS
            or self._files >= _MANY_FILES
            or self._chunks >= _MANY_CHUNKS
            or self._size_bytes >= _MANY_BYTES
            or (self._since is not None and time.perf_counter_ns() - self._since > HELD_NS)
        )

    def _fits(self, block: Block) -> bool:
        """Whether these are all the files of the folder that was entered last, as far as one knows, and not too much."""
        return (
            bool(self._open)
            and self._open[-1] == len(self._held) - 1
            and self._held[-1].batch is None
            and self._files + block.count <= MAX_OFFER_ENTRIES
            and self._chunks + block.chunks <= MAX_OFFER_CHUNKS
            and self._size_bytes + block.size_bytes <= _MOST_BYTES
        )


def _told(held: list[_Held], depth: int) -> Iterator[Event | Gathered]:
    """Complete subtrees of a folder at this depth: as one where there is something in them, and more than one folder."""
    if len(held) > 1 and any(one.batch is not None for one in held):
        folders: list[Folder] = []
        for one in held:
            left, block = one.left, one.batch.block if one.batch is not None else None
            assert left is not None
            data = block.data if block is not None else b""
            folders.append(Folder(one.depth - depth, one.entered.name, left.mode, left.mtime_ns, data))
        yield Gathered(folders, [one.batch for one in held])
        return
    for one, entered in passages(held, depth):
        if not entered:
            assert one.left is not None
            yield one.left
            continue
        yield one.entered
        if one.batch is not None:
            yield one.batch
