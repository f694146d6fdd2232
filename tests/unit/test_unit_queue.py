"""Units on their way to the lanes: compressed ahead of them, as many as fit, and what a lane makes of them."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from test_frames import stream_keys

from flowengine.transfer.compressing import BACKLOG_BYTES, BACKLOG_RAW_BYTES, UnitQueue
from flowengine.transfer.compression import CompressionChooser
from flowengine.transfer.lanes import Credit, ReceivingLane, SendingLane
from flowengine.transfer.pacing import Limits
from flowengine.transfer.timing import StageClock
from flowengine.transfer.unit import ChunkGone, PackedUnit, Unit
from flowengine.transfer.unit_size import UnitSize
from flowengine.units import MIB
from flowengine.wire.frames import Buffer, FrameOpener, FrameSealer, WritableBuffer
from flowengine.wire.keys import StreamKeys
from flowengine.wire.records import Run, record_limit

LONG_RTT_S = 0.08
CHUNKS = 16
CHUNK = MIB // CHUNKS


@dataclass
class Part:
    """Bytes of a run, as a hold gives them."""

    data: bytes
    gone: bool = False
    released: int = 0
    asked: Callable[[], None] = lambda: None

    def views(self) -> list[memoryview]:
        self.asked()
        if self.gone:
            raise ChunkGone("vanished", "it is gone")
        half = len(self.data) // 2
        return [memoryview(self.data)[:half], memoryview(self.data)[half:]]

    def release(self) -> None:
        self.released += 1


@dataclass
class Offer:
    """An offer of `CHUNKS` chunks."""

    lengths: list[int] = field(default_factory=lambda: [CHUNK] * CHUNKS)

    def begin(self, index: int, count: int) -> None:
        """Nothing to do."""

    def has_begun(self, index: int) -> bool:
        return False


def made(number: int, *datas: bytes, gone: int = -1) -> Unit:
    """A unit of one run per data, of offers from `number` on."""
    unit = Unit()
    for index, data in enumerate(datas):
        unit.runs.append((number + index, 0, CHUNKS))
        unit.holds.append(Offer())
        unit.parts.append(Part(data, gone=index == gone))
        unit.raw_bytes += len(data)
    return unit


def text(number: int) -> bytes:
    return (b"%08d, " % number) * (MIB // 10) + b"#" * (MIB % 10)


def noise(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def nobody(run: Callable[[], None]) -> None:
    """The test has a thread of its own."""


class Bench:
    """A queue with one thread that compresses."""

    def __init__(self, chooser: CompressionChooser) -> None:
        self.carried: queue.SimpleQueue[Unit] = queue.SimpleQueue()
        self.units = UnitQueue(chooser, StageClock(), self.carried.put, nobody, UnitSize())
        self.thread = threading.Thread(target=self.units.compress)
        self.thread.start()
        self._taken: list[Unit | PackedUnit] = []

    def next(self) -> Unit | PackedUnit:
        if not self._taken:
            self._taken += self.units.get(30) or []
        return self._taken.pop(0)


@contextlib.contextmanager
def bench(chooser: CompressionChooser) -> Iterator[Bench]:
    one = Bench(chooser)
    try:
        yield one
    finally:
        one.units.close()
        one.thread.join(30)
        assert not one.thread.is_alive()


def test_what_was_compressed_needs_its_plaintext_no_more() -> None:
    with bench(CompressionChooser(LONG_RTT_S)) as one:
        unit = made(4, text(1))
        one.units.put(unit)
        packed = one.next()
        assert isinstance(packed, PackedUnit)
        assert len(packed.data) < packed.raw_bytes == MIB
        assert packed.runs == [(4, 0, CHUNKS)]
        assert packed.holds == unit.holds
        assert one.carried.get(timeout=30) is unit
        assert [part.released for part in unit.parts] == [1]  # type: ignore[attr-defined]


def test_what_gets_no_smaller_goes_as_it_is_and_is_tried_less_and_less() -> None:
    with bench(CompressionChooser(LONG_RTT_S, 1)) as one:
        units = [made(number, noise(number)) for number in range(8)]
        for unit in units:
            one.units.put(unit)
        assert [one.next() for _ in units] == units
        kinds = []
        for number in range(8, 12):  # one was skipped, then two; of four two are left
            one.units.put(made(number, text(number)))
            kinds.append(type(one.next()))
        assert kinds == [Unit, Unit, PackedUnit, PackedUnit]


def test_what_is_not_to_be_compressed_waits_for_no_thread() -> None:
    chooser = CompressionChooser(LONG_RTT_S, 0)
    units = UnitQueue(chooser, StageClock(), lambda unit: None, nobody, UnitSize())  # nobody compresses
    unit = made(1, text(1))
    units.put(unit)
    assert units.get(0) == [unit]
    with pytest.raises(queue.Empty):
        units.get(0)


def test_what_was_wanted_first_leaves_first_though_it_took_time_to_compress() -> None:
    carried: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    units = UnitQueue(CompressionChooser(0.0001), StageClock(), carried.put, nobody, UnitSize())
    wanted = [made(number, text(number)) for number in range(12)]
    for unit in wanted:
        units.put(unit)
    units.end_lanes(1)
    later = units.get(0)
    assert later == [wanted[8]]  # only the first bytes are compressed on a link like this
    units.put_back(later)
    thread = threading.Thread(target=units.compress)
    thread.start()
    for _ in range(8):
        carried.get(timeout=30)
    units.close()
    thread.join(30)
    taken = []
    while (cargo := units.get(0)) is not None:
        taken += [unit.number for unit in cargo]
    assert taken == list(range(12))


def test_no_more_is_compressed_than_fits_the_backlog() -> None:
    carried: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 1), StageClock(), carried.put, nobody, UnitSize())
    for number in range(400):
        units.put(made(number, text(number)))
    thread = threading.Thread(target=units.compress)
    thread.start()
    # What takes little room is bounded by what it is taken apart.
    for _ in range(BACKLOG_RAW_BYTES // MIB):
        carried.get(timeout=30)
    cargo = units.get(30)
    assert cargo is not None
    for _ in cargo:  # there is room for as many again
        carried.get(timeout=30)
    assert carried.empty()
    units.close()
    thread.join(30)
    assert not thread.is_alive()


def test_threads_are_begun_as_units_come_to_wait() -> None:
    begun: list[Callable[[], None]] = []
    units = UnitQueue(
        CompressionChooser(LONG_RTT_S, 1, cores=4), StageClock(), lambda unit: None, begun.append, UnitSize()
    )
    counts = []
    for number in range(6):
        units.put(made(number, text(number)))
        counts.append(len(begun))
    assert counts == [1, 2, 3, 3, 3, 3]
    units.close()
    for run in begun:
        run()  # each ends
    never = UnitQueue(
        CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, begun.append, UnitSize()
    )
    never.put(made(1, text(1)))
    assert len(begun) == 3


def test_a_unit_that_is_lost_in_part_is_left_to_the_lane() -> None:
    with bench(CompressionChooser(LONG_RTT_S)) as one:
        unit = made(1, text(1), text(2), gone=1)
        one.units.put(unit)
        assert one.next() is unit


def test_while_the_link_is_about_to_be_idle_a_quicker_level_is_taken() -> None:
    chooser = CompressionChooser(LONG_RTT_S)
    assert chooser.level == 1
    assert chooser.level_for(0.1) == -3
    assert chooser.level_for(0.5) == 1
    assert CompressionChooser(LONG_RTT_S, 5).level_for(0.0) == 5
    assert BACKLOG_BYTES < BACKLOG_RAW_BYTES


class Opener(FrameOpener):
    """Keeps how long frames are."""

    def __init__(self, frames: list[int], keys: StreamKeys) -> None:
        super().__init__(keys)
        self._seen = frames

    def open_into(self, header: Buffer, body: Buffer, out: WritableBuffer) -> int:
        used = super().open_into(header, body, out)
        if not self.ended:
            self._seen.append(len(header) + len(body))
        return used


@dataclass
class Line:
    """One stream from a sending to a receiving lane."""

    units: UnitQueue
    got: dict[Run, bytes] = field(default_factory=dict)
    lost: list[Run] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    """Bytes of each record as it travelled."""
    going: dict[int, list[Run]] = field(default_factory=dict)
    """By offer, what of it may leave; all of it where nothing is said."""
    size: UnitSize = field(default_factory=UnitSize)
    carried: Callable[[Unit], None] = lambda unit: None
    frames: list[int] = field(default_factory=list)
    """Bytes of each data frame."""
    used: int = 0
    """Of the receiving lane's buffer."""

    def run(self) -> None:
        ours, theirs = socket.socketpair()
        clock = StageClock()
        chooser = CompressionChooser(LONG_RTT_S)

        def deliver(runs: list[Run], plain: memoryview, stored_bytes: int) -> None:
            at = 0
            for run in runs:
                size = run[2] * CHUNK
                self.got[run] = bytes(plain[at : at + size])
                at += size
            assert at == len(plain)
            self.stored.append(stored_bytes)

        sending = SendingLane(
            ours,
            FrameSealer(stream_keys()),
            self.units,
            Credit(64 * MIB),
            chooser,
            clock,
            Limits().pacer(),
            lambda: 1,
            lambda run, gone: self.lost.append(run),
            self.carried,
            self.size,
            going=lambda hold, run: self.going.get(run[0]),
        )
        receiving = ReceivingLane(
            theirs, Opener(self.frames, stream_keys()), record_limit(MIB), deliver, clock
        )
        thread = threading.Thread(target=sending.run)
        with ours, theirs:
            thread.start()
            receiving.run()
            thread.join(30)
        self.used = receiving._used
        # The session keeps them for what they counted, and streams are taken back many times in a long transfer.
        assert not len(sending._out)
        assert not len(receiving._plain)


def test_of_a_compressed_unit_only_what_may_leave_is_sent() -> None:
    chooser = CompressionChooser(LONG_RTT_S, 1)
    with bench(chooser) as one:
        line = Line(one.units, going={2: [(2, 3, 2), (2, 9, 1)], 3: []})
        half = CHUNKS // 2
        unit = made(1, *(text(number) for number in (1, 2, 3, 4)))
        unit.runs[3] = (4, half, half)
        unit.parts[3] = Part(text(4)[half * CHUNK :])
        unit.raw_bytes -= half * CHUNK
        whole = made(7, text(7))
        one.units.put(unit)
        one.units.put(whole)
        for _ in range(2):
            one.carried.get(timeout=30)
        one.units.end_lanes(1)
        line.run()
    assert line.got == {
        (1, 0, CHUNKS): text(1),
        (2, 3, 2): text(2)[3 * CHUNK : 5 * CHUNK],
        (2, 9, 1): text(2)[9 * CHUNK : 10 * CHUNK],
        (4, half, half): text(4)[half * CHUNK :],
        (7, 0, CHUNKS): text(7),
    }
    assert line.lost == []


def test_of_a_plain_unit_only_what_may_leave_and_is_there_is_sent() -> None:
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, nobody, UnitSize())
    line = Line(units, going={2: [(2, 15, 1)], 4: []})
    units.put(made(1, noise(1), noise(2), noise(3), noise(4), gone=2))
    units.end_lanes(1)
    line.run()
    assert line.got == {(1, 0, CHUNKS): noise(1), (2, 15, 1): noise(2)[15 * CHUNK :]}
    assert line.lost == [(3, 0, CHUNKS)]


def test_full_frames_are_as_large_as_they_are_to_be_when_each_is_begun() -> None:
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, nobody, UnitSize())
    line = Line(units)
    sizes = [4 * MIB, 2 * MIB, MIB, 4 * MIB]
    done = []

    def carried(unit: Unit) -> None:  # a frame was sealed: the next may have another size
        done.append(unit)
        now = sizes[len(done) // 10 % len(sizes)]
        line.size.unit_bytes = now

    line.carried = carried
    pieces = {number: noise(number) for number in range(40)}
    for number, data in pieces.items():
        units.put(made(number, data))
    units.end_lanes(1)
    line.run()
    assert b"".join(line.got.values()) == b"".join(pieces.values())
    assert len(done) == len(pieces)
    assert set(line.frames[:-1]) == {MIB, 2 * MIB, 4 * MIB}  # none is padded but the last


def test_small_records_use_little_of_the_buffer_that_large_ones_need() -> None:
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, nobody, UnitSize())
    line = Line(units)
    for number in range(30):
        units.put(made(number, noise(number)))
    units.end_lanes(1)
    line.run()
    assert set(line.frames[:-1]) == {MIB}
    assert line.used == 4 * MIB


def test_a_size_that_changes_while_a_frame_is_filled_holds_from_the_next_on() -> None:
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, nobody, UnitSize())
    line = Line(units)
    asked = []

    def change() -> None:
        """To and fro in the middle of a frame of 4 MiB, and now and then back to that."""
        asked.append(1)
        now = 4 * MIB if len(asked) % 4 else MIB
        line.size.unit_bytes = now

    pieces = {number: noise(number) for number in range(40)}
    for number, data in pieces.items():
        unit = made(number, data)
        unit.parts = [Part(data, asked=change)]
        units.put(unit)
    units.end_lanes(1)
    line.run()
    assert b"".join(line.got.values()) == b"".join(pieces.values())
    assert set(line.frames[:-1]) <= {MIB, 4 * MIB}
    assert line.used > 8 * MIB
    assert 4 * MIB in line.frames


def test_a_lane_that_leaves_puts_back_what_it_took() -> None:
    with bench(CompressionChooser(LONG_RTT_S, 1)) as one:
        one.units.put(made(1, text(1)))
        cargo = one.units.get(30)
        assert cargo is not None
        assert isinstance(cargo[0], PackedUnit)
        one.units.put_back(cargo)
        assert one.units.get(0) is cargo


def test_a_lane_gets_at_once_what_fills_a_frame() -> None:
    """What is left of a unit is an eighth: of eight units a frame is full, and of one it would be padded."""
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 1), StageClock(), lambda unit: None, nobody, UnitSize())
    for number in range(40):
        units.put(made(number, noise(number)[: MIB // 8] + bytes(MIB - MIB // 8)))
    thread = threading.Thread(target=units.compress)
    thread.start()
    sizes = []
    while sum(sizes) < 40:
        cargo = units.get(30)
        assert cargo is not None
        sizes.append(len(cargo))
    units.close()
    thread.join(30)
    assert sizes == [8] * 5


def test_a_compressed_unit_that_may_leave_whole_after_a_halt_stays_compressed() -> None:
    with bench(CompressionChooser(LONG_RTT_S, 1)) as one:
        line = Line(one.units, going={1: [(1, 0, CHUNKS)], 2: [(2, 0, CHUNKS)]})
        one.units.put(made(1, text(1), text(2)))
        one.carried.get(timeout=30)
        one.units.end_lanes(1)
        line.run()
    assert line.got == {(1, 0, CHUNKS): text(1), (2, 0, CHUNKS): text(2)}
    assert sum(line.stored) < MIB // 2


def test_runs_that_go_on_travel_as_one() -> None:
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, nobody, UnitSize())
    unit = made(1, noise(1))
    unit.runs = [(1, 0, 3), (1, 3, CHUNKS - 3)]
    unit.holds = [Offer(), Offer()]
    unit.parts = [Part(noise(1)[: 3 * CHUNK]), Part(noise(1)[3 * CHUNK :])]
    units.put(unit)
    units.end_lanes(1)
    line = Line(units)
    line.run()
    assert line.got == {(1, 0, CHUNKS): noise(1)}


def test_at_the_end_nobody_needs_what_is_ready() -> None:
    units = UnitQueue(CompressionChooser(LONG_RTT_S, 0), StageClock(), lambda unit: None, nobody, UnitSize())
    for number in range(3):
        units.put(made(number, noise(number)))
    units.forget()
    units.end_lanes(1)
    assert units.get(0) is None
