"""Units on their way to the lanes, compressed ahead of them where that pays.

Goal
    Neither the processors nor the link wait for each other. What compresses well leaves the link idle, what hardly does
    leaves the processors idle; a backlog of compressed bytes between the two evens that out.
Plan
    Threads of their own take units, compress them, and let go of the plaintext, so that the scan can go on reading. Each
    is begun when a unit would have to wait for the others. They hand on as much at once as fills a frame, or a lane that waits for more would pad what it has. How full the
    backlog is tells the chooser which of the two is the bottleneck now. What is not compressed goes to the lanes as it
    is, without a copy.
Invariants
    - The backlog is bounded in compressed bytes and in what they are taken apart.
    - What a halt forbids is asked of each run by the lane, when it is about to leave: not here.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from itertools import count
from time import perf_counter_ns, thread_time_ns
from typing import Final

from flowengine.codec import Compressor
from flowengine.transfer.compression import CompressionChooser
from flowengine.transfer.timing import Stage, StageClock
from flowengine.transfer.unit import ChunkGone, PackedUnit, Unit
from flowengine.transfer.unit_size import UnitSize
from flowengine.units import MIB

__all__ = ["Cargo", "UnitQueue"]

Cargo = list[Unit] | list[PackedUnit]
"""What a lane takes at once."""

BACKLOG_BYTES: Final = 32 * MIB
BACKLOG_RAW_BYTES: Final = 8 * BACKLOG_BYTES
"""Both ends remember each chunk that is wanted and not here."""
_MOST_SKIPPED: Final = 32
_AT_ONCE_UNITS: Final = 8
_LAST: Final = 1 << 62
"""Numbers from here on are behind those of all units."""


class UnitQueue:
    """What is wanted, for any lane; thread-safe.

    Args:
        chooser: shared compression choice.
        clock: stage timing.
        carried: told of each unit whose plaintext is needed no more, or that was given up.
        in_thread: has one more thread run what it is given; called by the thread that calls `put`.
        size: of a full frame, as lanes make them.
    """

    def __init__(
        self,
        chooser: CompressionChooser,
        clock: StageClock,
        carried: Callable[[Unit], None],
        in_thread: Callable[[Callable[[], None]], None],
        size: UnitSize,
    ) -> None:
        self._size = size
        self._chooser = chooser
        self._clock = clock
        self._carried = carried
        self._in_thread = in_thread
        self._threads = 0
        self._plain: queue.SimpleQueue[tuple[Unit, bool] | None] = queue.SimpleQueue()
        # The oldest first: what took time to compress must not wait behind all that was passed on meanwhile.
        self._ready: queue.PriorityQueue[tuple[int, Cargo | None]] = queue.PriorityQueue()
        self._numbers = count()
        self._room = threading.Condition()
        self._packed_bytes = self._raw_bytes = 0
        self._closed = False

    def put(self, unit: Unit) -> None:
        """A unit is wanted. For one thread."""
        unit.number = next(self._numbers)
        first = self._chooser.among_first(unit.raw_bytes)
        if first or self._chooser.level:
            if self._threads < self._chooser.threads and (not self._threads or not self._plain.empty()):
                self._threads += 1
                self._in_thread(self.compress)
            self._plain.put((unit, first))
        else:
            self._ready.put((unit.number, [unit]))

    def get(self, timeout_s: float) -> Cargo | None:
        """The next units; None ends the lane that takes it.

        Raises:
            queue.Empty: there were none for so long.
        """
        _, cargo = self._ready.get(timeout=timeout_s)
        self._count(cargo, -1)
        return cargo

    def put_back(self, cargo: Cargo) -> None:
        """A lane took it that is to end; any other may have it."""
        self._count(cargo, 1)
        self._ready.put((cargo[0].number, cargo))

    def end_lanes(self, lanes: int) -> None:
        """Let so many lanes end, behind what is ready."""
        for _ in range(lanes):
            self._ready.put((_LAST + next(self._numbers), None))

    def forget(self) -> None:
        """Nobody needs what is ready: all has landed, or the session is over. The end is near, so nothing is released."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()

    def close(self) -> None:
        """Let the threads that compress end."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        for _ in range(self._threads):
            self._plain.put(None)

    def compress(self) -> None:
        """Compress units until `close`; blocks. Several threads may do it."""
        compressor = Compressor()
        stage = self._clock.stage("compress")
        skip, backoff = 0, 1
        made: list[PackedUnit] = []
        while (item := self._next(made)) is not None:
            unit, first = item
            level = self._chooser.level_for(self._packed_bytes / BACKLOG_BYTES, first=first)
            if not level or skip:
                skip = max(0, skip - 1)
                self._ready.put((unit.number, [unit]))
                continue
            packed = self._compress(unit, level, compressor, stage)
            if packed is None:
                skip = backoff
                backoff = min(backoff * 2, _MOST_SKIPPED)
                self._ready.put((unit.number, [unit]))
                continue
            backoff = 1
            made.append(PackedUnit(unit, packed))
            unit.release()
            self._carried(unit)

    def _next(self, made: list[PackedUnit]) -> tuple[Unit, bool] | None:
        """What to compress next; None for nothing more. Before it may wait, it hands on what was made."""
        if sum(len(unit.data) for unit in made) >= self._size.payload_bytes or (
            sum(unit.raw_bytes for unit in made) >= _AT_ONCE_UNITS * self._size.unit_bytes
        ):
            self._hand_on(made)
        try:
            item = self._plain.get_nowait()
        except queue.Empty:
            self._hand_on(made)
            item = self._plain.get()
        if self._is_full():
            self._hand_on(made)
        with self._room:
            while not self._closed and self._is_full():
                self._room.wait()
            return None if self._closed else item

    def _is_full(self) -> bool:
        return self._packed_bytes >= BACKLOG_BYTES or self._raw_bytes >= BACKLOG_RAW_BYTES

    def _hand_on(self, made: list[PackedUnit]) -> None:
        if made:
            cargo = made.copy()
            made.clear()
            self._count(cargo, 1)
            self._ready.put((cargo[0].number, cargo))

    def _compress(self, unit: Unit, level: int, compressor: Compressor, stage: Stage) -> bytes | None:
        """The compressed bytes; None where they would be no fewer, or some cannot be read: the lane says which."""
        try:
            views = [view for part in unit.parts for view in part.views()]
        except ChunkGone:
            return None
        start, begun = perf_counter_ns(), thread_time_ns()
        packed = compressor.compress(views[0] if len(views) == 1 else b"".join(views), level)
        spent = thread_time_ns() - begun
        stood = stage.since(start) - start
        size = unit.raw_bytes
        self._chooser.compressed(
            size, len(packed) if packed is not None else size, spent / 1e9, level, stood / 1e9
        )
        return packed

    def _count(self, cargo: Cargo | None, sign: int) -> None:
        """Of compressed units, how many bytes wait."""
        packed = [unit for unit in cargo or () if isinstance(unit, PackedUnit)]
        if packed:
            with self._room:
                self._packed_bytes += sign * sum(len(unit.data) for unit in packed)
                self._raw_bytes += sign * sum(unit.raw_bytes for unit in packed)
                self._room.notify_all()
