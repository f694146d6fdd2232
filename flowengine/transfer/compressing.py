"""Units on their way to the lanes, compressed ahead of them where that pays.

Goal
    Neither the processors nor the link wait for each other. What compresses well leaves the link idle, what hardly does
    leaves the processors idle; a backlog of compressed bytes between the two evens that out.
Plan
    Threads of their own take units, compress them, and let go of the plaintext, so that the scan can go on reading.
    How full the backlog is tells the chooser which of the two is the bottleneck now. What is not compressed goes to the
    lanes as it is, without a copy.
Invariants
    - The backlog is bounded in compressed bytes and in what they are taken apart.
    - What a halt forbids is asked of each run by the lane, when it is about to leave: not here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from itertools import count
from time import perf_counter_ns, thread_time_ns
from typing import Final

from flowengine.codec import Compressor
from flowengine.transfer.compression import CompressionChooser
from flowengine.transfer.timing import StageClock
from flowengine.transfer.unit import ChunkGone, PackedUnit, Unit
from flowengine.units import MIB

__all__ = ["UnitQueue"]

BACKLOG_BYTES: Final = 32 * MIB
BACKLOG_RAW_BYTES: Final = 8 * BACKLOG_BYTES
"""Both ends remember each chunk that is wanted and not here."""
_MOST_SKIPPED: Final = 32
_LAST: Final = 1 << 62
"""Numbers from here on are behind those of all units."""


class UnitQueue:
    """What is wanted, for any lane; thread-safe.

    Args:
        chooser: shared compression choice.
        clock: stage timing.
        carried: told of each unit whose plaintext is needed no more, or that was given up.
    """

    def __init__(
        self,
        chooser: CompressionChooser,
        clock: StageClock,
        carried: Callable[[Unit], None],
    ) -> None:
        self._chooser = chooser
        self._clock = clock
        self._carried = carried
        self._plain: queue.SimpleQueue[tuple[Unit, bool] | None] = queue.SimpleQueue()
        # The oldest first: what took time to compress must not wait behind all that was passed on meanwhile.
        self._ready: queue.PriorityQueue[tuple[int, Unit | PackedUnit | None]] = queue.PriorityQueue()
        self._numbers = count()
        self._room = threading.Condition()
        self._packed_bytes = self._raw_bytes = 0
        self._closed = False
        self.threads = chooser.threads

    def put(self, unit: Unit) -> None:
        """A unit is wanted. For one thread."""
        unit.number = next(self._numbers)
        first = self._chooser.among_first(unit.raw_bytes)
        if first or self._chooser.level:
            self._plain.put((unit, first))
        else:
            self._ready.put((unit.number, unit))

    def get(self, timeout_s: float) -> Unit | PackedUnit | None:
        """The next unit; None ends the lane that takes it.

        Raises:
            queue.Empty: there was none for so long.
        """
        _, unit = self._ready.get(timeout=timeout_s)
        if isinstance(unit, PackedUnit):
            self._count(-len(unit.data), -unit.raw_bytes)
        return unit

    def put_back(self, unit: Unit | PackedUnit) -> None:
        """A lane took it that is to end; any other may have it."""
        if isinstance(unit, PackedUnit):
            self._count(len(unit.data), unit.raw_bytes)
        self._ready.put((unit.number, unit))

    def end_lanes(self, lanes: int) -> None:
        """Let so many lanes end, behind what is ready."""
        for _ in range(lanes):
            self._ready.put((_LAST + next(self._numbers), None))

    @property
    def waits(self) -> bool:
        """Whether the backlog is full: what compresses waits for the lanes."""
        return self._packed_bytes >= BACKLOG_BYTES or self._raw_bytes >= BACKLOG_RAW_BYTES

    def close(self) -> None:
        """Let the threads that compress end."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        for _ in range(self.threads):
            self._plain.put(None)

    def compress(self) -> None:
        """Compress units until `close`; blocks. For `threads` threads."""
        compressor = Compressor()
        stage = self._clock.stage("compress")
        skip, backoff = 0, 1
        while (item := self._plain.get()) is not None and self._wait_for_room():
            unit, first = item
            size = unit.raw_bytes
            level = self._chooser.level_for(self._packed_bytes / BACKLOG_BYTES, first=first)
            if not level or skip:
                skip = max(0, skip - 1)
                self._ready.put((unit.number, unit))
                continue
            try:
                views = [view for parts in unit.parts for part in parts for view in part.views()]
            except ChunkGone:
                self._ready.put((unit.number, unit))  # the lane finds which, and says so
                continue
            start, begun = perf_counter_ns(), thread_time_ns()
            packed = compressor.compress(views[0] if len(views) == 1 else b"".join(views), level)
            spent = thread_time_ns() - begun
            stood = stage.since(start) - start
            self._chooser.compressed(
                size, len(packed) if packed is not None else size, spent / 1e9, level, stood / 1e9
            )
            if packed is None:
                skip = backoff
                backoff = min(backoff * 2, _MOST_SKIPPED)
                self._ready.put((unit.number, unit))
                continue
            backoff = 1
            self._count(len(packed), size)
            self._ready.put((unit.number, PackedUnit(unit, packed)))
            unit.release()
            self._carried(unit)

    def _count(self, packed_bytes: int, raw_bytes: int) -> None:
        with self._room:
            self._packed_bytes += packed_bytes
            self._raw_bytes += raw_bytes
            self._room.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until the backlog is not full; whether there is more to do."""
        with self._room:
            while not self._closed and self.waits:
                self._room.wait()
            return not self._closed
