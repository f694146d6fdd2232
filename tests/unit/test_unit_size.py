"""Units and full frames grow with what a stream carries, and shrink with it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from flowengine.transfer.holds import Hold, UnitPacker
from flowengine.transfer.lanes import Credit
from flowengine.transfer.source import _Source
from flowengine.transfer.unit_size import LEAST_UNIT_BYTES, UnitSize
from flowengine.units import GIB, MIB
from flowengine.wire.frames import FRAME_SIZES, MAX_PAYLOAD_BYTES, frame_bytes_for
from flowengine.wire.messages import Received
from flowengine.wire.records import MAX_UNIT_BYTES

MS = 1_000_000


def carried(
    size: UnitSize,
    bytes_per_s: float,
    streams: int,
    *,
    window_bytes: int = 256 * MIB,
    begin_ms: int = 0,
    for_ms: int = 500,
) -> int:
    """What the units are once so much was acknowledged every 5 ms for so long."""
    for now in range(begin_ms, begin_ms + for_ms + 1, 5):
        size.received(int(bytes_per_s * 0.005), streams, window_bytes, now * MS)
    return size.unit_bytes


def test_nothing_is_known_at_first() -> None:
    size = UnitSize()
    assert size.unit_bytes == LEAST_UNIT_BYTES
    size.received(64 * MIB, 1, GIB, 5 * MS)  # what came before this is not known
    size.received(64 * MIB, 1, GIB, 6 * MS)  # nor is a millisecond long enough
    assert size.unit_bytes == LEAST_UNIT_BYTES


@pytest.mark.parametrize(
    ("bytes_per_s", "streams", "unit"),
    [
        (2e6, 2, MIB),  # a limit
        (125e6, 8, MIB),  # 1 Gbit/s over a long way
        (62e6, 2, 2 * MIB),
        (125e6, 2, 4 * MIB),
        (1.25e9, 8, 4 * MIB),  # 10 Gbit/s
        (10e9, 2, 4 * MIB),
    ],
)
def test_a_unit_is_what_a_stream_carries_in_a_short_time(bytes_per_s: float, streams: int, unit: int) -> None:
    size = UnitSize()
    assert carried(size, bytes_per_s, streams) == unit
    assert frame_bytes_for(size.payload_bytes) == unit
    assert size.payload_bytes <= MAX_PAYLOAD_BYTES
    assert unit in FRAME_SIZES
    assert LEAST_UNIT_BYTES <= unit <= MAX_UNIT_BYTES


@pytest.mark.parametrize(
    ("window_bytes", "streams", "unit"),
    [
        (16 * MIB, 1, 4 * MIB),
        (16 * MIB, 2, 2 * MIB),
        (16 * MIB, 8, MIB),
        (50_000_000, 2, 4 * MIB),
        (256 * MIB, 64, MIB),
    ],
)
def test_four_large_units_of_each_stream_fit_the_credit_window(
    window_bytes: int, streams: int, unit: int
) -> None:
    assert carried(UnitSize(), 50e9, streams, window_bytes=window_bytes) == unit


def test_a_link_that_slows_down_gets_small_ones_again() -> None:
    size = UnitSize()
    assert carried(size, 500e6, 2) == MAX_UNIT_BYTES
    assert carried(size, 5e6, 2, begin_ms=505) == LEAST_UNIT_BYTES
    assert carried(size, 500e6, 2, begin_ms=1010) == MAX_UNIT_BYTES
    size.received(1000, 2, GIB, 60_000 * MS)  # and after a minute in which nothing was wanted
    assert size.unit_bytes == LEAST_UNIT_BYTES


def test_what_a_target_acknowledges_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    clock = SimpleNamespace(perf_counter_ns=lambda: now)
    monkeypatch.setattr("flowengine.transfer.source.time", clock)
    source = SimpleNamespace(
        _credit=Credit(50_000_000), _unit_size=UnitSize(), _session=SimpleNamespace(streams=[1, 2])
    )
    for _ in range(100):
        now += 5 * MS
        _Source._handle(cast(_Source, source), Received(4 * MIB))
    assert source._unit_size.unit_bytes == 4 * MIB


class Chunks:
    """A hold of chunks of 64 KiB, which are nowhere."""

    def __init__(self, number: int, count: int) -> None:
        self.number = number
        self.lengths = [MIB // 16] * count

    def parts(self, index: int, count: int) -> Iterator[tuple[int, None]]:
        yield count, None


def test_a_unit_that_was_begun_when_they_were_larger_is_closed() -> None:
    size = UnitSize()
    size.unit_bytes = 4 * MIB
    packer = UnitPacker(size)
    assert list(packer.add(cast(Hold, Chunks(1, 33)), 0, 33)) == []
    size.unit_bytes = MIB
    units = list(packer.add(cast(Hold, Chunks(2, 24)), 0, 24))
    rest = packer.flush()
    assert rest is not None
    assert [unit.runs for unit in (*units, rest)] == [[(1, 0, 33)], [(2, 0, 16)], [(2, 16, 8)]]


def test_streams_that_are_all_gone_do_no_harm() -> None:
    size = UnitSize()
    assert carried(size, 500e6, 0) == MAX_UNIT_BYTES
