"""A unit: some MiB of wanted chunks, on its way from the offers that they are of to a lane."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from flowengine.wire.records import Run

if TYPE_CHECKING:
    from flowengine.transfer.leaving import UnitHold

__all__ = ["ChunkGone", "PackedUnit", "Unit", "UnitSource", "cut_out", "joined"]


class UnitSource(Protocol):
    """Where a unit's plaintext comes from."""

    def views(self) -> list[memoryview]:
        """The plaintext as parts, in order; valid until `release`. Raises `ChunkGone` when it is lost."""

    def release(self) -> None:
        """The parts are no longer needed."""


class ChunkGone(Exception):
    """Chunks that were offered cannot be read any more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Unit:
    """About `UnitSize.unit_bytes` of plaintext: chunk runs, and for each of them its offer and where its bytes come from.

    Attributes:
        number: how many were wanted before it.
    """

    __slots__ = ("holds", "number", "parts", "raw_bytes", "runs")

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.holds: list[UnitHold] = []
        self.parts: list[UnitSource] = []
        self.raw_bytes = 0
        self.number = -1

    def release(self) -> None:
        """Its plaintext is no longer needed."""
        for part in self.parts:
            part.release()


class PackedUnit:
    """A unit that was compressed and needs its plaintext no more.

    Attributes:
        data: the compressed bytes; smaller than `raw_bytes`.
    """

    __slots__ = ("data", "holds", "number", "raw_bytes", "runs")

    def __init__(self, unit: Unit, data: bytes) -> None:
        self.runs = unit.runs
        self.holds = unit.holds
        self.raw_bytes = unit.raw_bytes
        self.number = unit.number
        self.data = data


def joined(runs: list[Run]) -> list[Run]:
    """Runs as they travel: what goes on in the same offer is one.

    >>> joined([(0, 1, 2), (0, 3, 1), (0, 5, 1), (1, 6, 1)])
    [(0, 1, 3), (0, 5, 1), (1, 6, 1)]
    """
    if len(runs) < 2:
        return runs
    made = [runs[0]]
    for number, index, count in runs[1:]:
        before, first, length = made[-1]
        if (number, index) == (before, first + length):
            made[-1] = (number, first, length + count)
        else:
            made.append((number, index, count))
    return made


def cut_out(plain: memoryview, lengths: list[int], run: Run, going: list[Run]) -> Iterator[memoryview]:
    """The bytes of some parts of a run.

    Args:
        plain: the bytes of all of it.
        lengths: of all chunks of its offer.
        going: parts of the run, in order.
    """
    first = run[1]
    for _, index, count in going:
        start = sum(lengths[first:index])
        yield plain[start : start + sum(lengths[index : index + count])]
