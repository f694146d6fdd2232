"""Many small folders as one at the source: what is gathered, what is kept until the answer, and what is sent."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import trio.testing
from sessions import session_over

from flowengine.chunking import chunk_id, pack_chunks
from flowengine.errors import ProtocolError
from flowengine.manifest import FILE, Block, Entry
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.store.encoded import parse_block
from flowengine.store.proofs import encode_entries
from flowengine.store.scan_events import Batch, DirectoryEntered, DirectoryLeft, Event
from flowengine.transfer import gathering
from flowengine.transfer.compressing import UnitQueue
from flowengine.transfer.compression import CompressionChooser
from flowengine.transfer.gathering import Gathered, Gatherer
from flowengine.transfer.holds import BatchHold, SubtreesHold, UnitPacker
from flowengine.transfer.offers import Offers
from flowengine.transfer.session import Session
from flowengine.transfer.unit import ChunkGone, Unit
from flowengine.transfer.unit_size import LEAST_UNIT_BYTES, UnitSize
from flowengine.units import MIB
from flowengine.wire.messages import WANT_ALL, WANT_NONE, WANT_SOME, EncodedOffer, Folder, Subtrees

CHUNK = 16 * 1024


def content(seed: int, size_bytes: int) -> bytes:
    """Bytes of which no chunk comes twice."""
    return random.Random(seed).randbytes(size_bytes)


def block_of(files: dict[bytes, bytes], cut: int = CHUNK) -> Block:
    entries = []
    for name, data in files.items():
        pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
        packed = pack_chunks([(len(piece), chunk_id(piece)) for piece in pieces])
        entries.append(Entry(name, FILE, 0o644, 0, len(data), packed))
    made = parse_block(encode_entries(entries))
    assert made is not None
    return made


def small(name: bytes = b"f") -> Batch:
    return Batch(block_of({name: name * 3}), None, [-1], b"/root")


def left(number: int = 0) -> DirectoryLeft:
    return DirectoryLeft(0o755, number, b"", True, True)


def entered(name: bytes) -> DirectoryEntered:
    return DirectoryEntered(name, b"/root/" + name)


def told(gatherer: Gatherer, events: list[Event]) -> list[Event | Gathered]:
    return [one for event in events for one in gatherer.take(event)]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told for its age alone."""
    monkeypatch.setattr(gathering, "HELD_NS", 1 << 62)


# --- gathering --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
def test_complete_folders_are_told_as_one_when_their_parent_ends() -> None:
    gatherer = Gatherer()
    files, more = small(b"x"), small(b"y")
    end = left()
    events: list[Event] = [
        entered(b"a"), files, entered(b"below"), entered(b"deep"), more, left(1), left(2), left(3), entered(b"b"), left(4)
    ]  # fmt: skip
    root = DirectoryEntered(b"", b"/root")
    assert told(gatherer, [root]) == [root]
    assert told(gatherer, events) == []
    one, last = told(gatherer, [end])
    assert last is end
    assert isinstance(one, Gathered)
    assert files.block is not None
    assert more.block is not None
    assert one.folders == [
        Folder(0, b"a", 0o755, 3, files.block.data),
        Folder(1, b"below", 0o755, 2),
        Folder(2, b"deep", 0o755, 1, more.block.data),
        Folder(0, b"b", 0o755, 4),
    ]
    assert one.batches == [files, more]
    assert one.blocks == [files.block, None, more.block, None]


@pytest.mark.usefixtures("patient")
def test_one_folder_alone_and_folders_without_files_are_told_as_they_are() -> None:
    cases: list[list[Event]] = [
        [entered(b"a"), small(), left()],
        [entered(b"a"), left(1), entered(b"b"), entered(b"c"), left(2), left(3)],
    ]
    for events in cases:
        gatherer = Gatherer()
        assert told(gatherer, [*events, left(9)]) == [*events, left(9)]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "odd",
    [
        DirectoryLeft(0o755, 7, b"", False, True),
        DirectoryLeft(0o755, 7, b"", True, False),
        DirectoryLeft(0o755, 7, b"extra", True, True),
    ],
)
def test_a_folder_that_ends_oddly_is_told_as_it_is_and_those_in_it_as_one(odd: DirectoryLeft) -> None:
    above, files = entered(b"a"), small()
    events: list[Event] = [above, files, entered(b"x"), small(), left(), entered(b"y"), small(), left()]
    gatherer = Gatherer()
    assert told(gatherer, events) == []
    first, second, one, last = told(gatherer, [odd])
    assert (first, second, last) == (above, files, odd)
    assert isinstance(one, Gathered)
    assert [(folder.depth, folder.name) for folder in one.folders] == [(0, b"x"), (0, b"y")]


@pytest.mark.usefixtures("patient")
def test_files_that_come_in_two_batches_are_told_in_their_folder() -> None:
    """Whoever gathered the first would offer a folder that is not whole."""
    above, one, other = entered(b"a"), small(b"1"), small(b"2")
    gatherer = Gatherer()
    assert told(gatherer, [above, one]) == []
    assert told(gatherer, [other]) == [above, one, other]
    end = left()
    assert told(gatherer, [end]) == [end]


def test_what_is_too_old_is_told_before_the_next_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "HELD_NS", -1)
    events: list[Event] = [entered(b"a"), small(), left(), entered(b"b"), small(), left()]
    gatherer = Gatherer()
    assert told(gatherer, events) == events[:3]
    assert told(gatherer, [left(5)]) == [*events[3:], left(5)]


@pytest.mark.usefixtures("patient")
def test_what_is_kept_back_is_dropped_for_its_buffers_to_be_let_go() -> None:
    files = small()
    gatherer = Gatherer()
    assert told(gatherer, [entered(b"a"), files, entered(b"b")]) == []
    assert gatherer.drop() == [files]
    assert gatherer.drop() == []
    end = left()
    assert told(gatherer, [end]) == [end]  # nothing is open any more


# --- what is kept until the answer ------------------------------------------------------------------------------


def filled(pool: BufferPool, folders: list[dict[bytes, bytes]]) -> tuple[Buffer, list[Batch]]:
    """The files of folders one behind the other in one buffer, each batch a holder; so is the caller."""
    buffer = pool.acquire()
    at, batches = 0, []
    for files in folders:
        data = b"".join(files.values())
        buffer.view[at : at + len(data)] = data
        buffer.hold()
        batches.append(Batch(block_of(files), buffer, [at], b"/nowhere"))
        at += len(data)
    return buffer, batches


def on_disk(root: Path, folders: list[dict[bytes, bytes]]) -> list[Batch]:
    """The files of folders as the scan cache knows them: read when they are wanted."""
    batches = []
    for number, files in enumerate(folders):
        folder = root / f"d{number}"
        folder.mkdir()
        for name, data in files.items():
            (folder / os.fsdecode(name)).write_bytes(data)
        batches.append(Batch(block_of(files), None, [-1] * len(files), os.fsencode(folder)))
    return batches


FOLDERS = [
    {b"a": content(1, 100), b"b": b"", b"c": content(2, 3 * CHUNK + 5)},
    {b"only": b""},
    {b"a": content(3, 2 * CHUNK), b"z": content(4, 1)},
    {b"last": content(5, 77)},
]
ALL = [data for files in FOLDERS for data in files.values()]


def read(unit: Unit) -> list[tuple[tuple[int, int, int], bytes]]:
    return [
        (run, b"".join(bytes(view) for view in part.views()))
        for run, part in zip(unit.runs, unit.parts, strict=True)
    ]


def test_the_chunks_of_all_folders_are_those_of_one_offer() -> None:
    pool = BufferPool(1, MIB)
    buffer, batches = filled(pool, FOLDERS)
    hold = SubtreesHold(batches)
    assert len(hold) == 4
    assert hold.lengths == [100, CHUNK, CHUNK, CHUNK, 5, CHUNK, CHUNK, 1, 77]
    joined = b"".join(ALL)
    for index in range(len(hold.lengths)):
        for end in range(index + 1, len(hold.lengths) + 1):
            parts = hold.parts(index, end - index)
            assert sum(count for count, _ in parts) == end - index
            data = b"".join(bytes(view) for _, part in parts for view in part.views())
            begin = sum(hold.lengths[:index])
            assert data == joined[begin : begin + sum(hold.lengths[index:end])]
            for _, part in parts:
                part.release()
    assert len(hold.parts(0, 9)) == 1  # it lies in one piece
    hold.parts(0, 9)[0][1].release()
    hold.release()
    buffer.release()


def test_what_lies_in_two_buffers_or_with_a_gap_is_not_taken_for_one_piece() -> None:
    pool = BufferPool(2, MIB)
    buffer, batches = filled(pool, FOLDERS[:1])
    other, more = filled(pool, FOLDERS[2:])
    gap = 3 * CHUNK
    other.view[gap : gap + 77] = FOLDERS[3][b"last"]
    more[1].starts = [gap]
    hold = SubtreesHold([*batches, *more])
    parts = hold.parts(0, len(hold.lengths))
    assert [count for count, _ in parts] == [5, 3, 1]
    data = b"".join(bytes(view) for _, part in parts for view in part.views())
    assert data == b"".join(ALL)
    for _, part in parts:
        part.release()
    hold.release()
    buffer.release()
    other.release()
    assert [pool.acquire(), pool.acquire()]  # both are free again


def test_what_is_read_again_is_read_file_by_file_and_what_is_gone_costs_only_itself(tmp_path: Path) -> None:
    hold = SubtreesHold(on_disk(tmp_path, FOLDERS))
    hold.number = 3
    (tmp_path / "d2" / "a").unlink()
    (tmp_path / "d3" / "last").write_bytes(b"changed")
    packer = UnitPacker(UnitSize())
    assert list(packer.add(hold, 0, len(hold.lengths))) == []
    unit = packer.flush()
    assert unit is not None
    assert unit.runs == [(3, 0, 1), (3, 1, 4), (3, 5, 2), (3, 7, 1), (3, 8, 1)]
    got: list[bytes | str] = []
    for part in unit.parts:
        try:
            got.append(b"".join(bytes(view) for view in part.views()))
        except ChunkGone as gone:
            got.append(gone.reason)
    assert got == [FOLDERS[0][b"a"], FOLDERS[0][b"c"], "vanished", FOLDERS[2][b"z"], "changed"]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        [MIB - 1, 1, MIB - 1, MIB - 1],
        [700_000, 300_000, 100_000, MIB - 1, 0, 0, 5],
        [LEAST_UNIT_BYTES // 4] * 17,
        [CHUNK * 63, CHUNK, CHUNK * 63, CHUNK * 2],
        [40_000] * 120,
    ],
)
def test_units_hold_whole_files_and_little_more_than_they_should(
    tmp_path: Path, sizes: list[int], kept: bool
) -> None:
    folders = [{b"%d" % number: content(number, size)} for number, size in enumerate(sizes)]
    pool = BufferPool(1, 8 * MIB)
    if kept:
        buffer, batches = filled(pool, folders)
        buffer.release()
    else:
        batches = on_disk(tmp_path, folders)
    hold = SubtreesHold(batches)
    hold.number = 0
    ends = {0}
    for batch in batches:
        assert batch.block is not None
        ends.add(max(ends) + batch.block.chunks)
    packer = UnitPacker(UnitSize())
    units = list(packer.add(hold, 0, len(hold.lengths)))
    rest = packer.flush()
    units += [rest] if rest is not None else []
    at = 0
    sent = b""
    for unit in units:
        assert unit.runs
        assert unit.raw_bytes <= LEAST_UNIT_BYTES + CHUNK
        size = 0
        for run, data in read(unit):
            number, index, count = run
            assert (number, index) == (0, at)
            at += count
            size += len(data)
            sent += data
        assert size == unit.raw_bytes
        assert at in ends  # no file goes on in another unit
        unit.release()
    assert at == len(hold.lengths)
    assert sent == b"".join(data for files in folders for data in files.values())
    # Two that follow each other would not have fitted into one.
    sizes_of = [unit.raw_bytes for unit in units]
    assert all(one + other >= LEAST_UNIT_BYTES for one, other in pairwise(sizes_of))
    hold.release()
    if kept:
        assert not pool.exhausted()


def test_a_unit_that_was_begun_by_another_offer_is_closed_before_a_file_that_it_has_no_room_for(
    tmp_path: Path,
) -> None:
    single = BatchHold(on_disk(tmp_path, [{b"s": content(9, 900_000)}])[0])
    single.number = 0
    (tmp_path / "more").mkdir()
    hold = SubtreesHold(on_disk(tmp_path / "more", [{b"x": content(1, 500_000)}, {b"y": content(2, 10)}]))
    hold.number = 1
    packer = UnitPacker(UnitSize())
    assert list(packer.add(single, 0, len(single.lengths))) == []
    units = list(packer.add(hold, 0, len(hold.lengths)))
    rest = packer.flush()
    assert rest is not None
    assert [[run[0] for run in unit.runs] for unit in units] == [[0]]
    assert rest.runs == [(1, 0, 31), (1, 31, 1)]


# --- answers ----------------------------------------------------------------------------------------------------


class Offering:
    """A session's offers, and the units that its answers made."""

    def __init__(self, session: Session) -> None:
        self.chooser = CompressionChooser(0.0, 0)
        self.session = session
        self.queue = UnitQueue(self.chooser, session.clock, self.carried, self.in_thread, UnitSize())
        self.offers = Offers(session, self.queue, UnitSize())

    def carried(self, unit: Unit) -> None:
        self.offers.carried(unit)

    def in_thread(self, body: Callable[[], None]) -> None:
        raise AssertionError("nothing is compressed")

    def units(self) -> list[Unit]:
        """What is to be sent by now."""
        self.offers.flush()
        found: list[Unit] = []
        while not self.queue._ready.empty():
            cargo = self.queue.get(0)
            assert cargo is not None
            for unit in cargo:
                assert isinstance(unit, Unit)
                found.append(unit)
        return found

    def offer(self, batches: list[Batch]) -> None:
        folders = [
            Folder(0, b"%d" % number, 0o755, 0, batch.block.data)
            for number, batch in enumerate(batches)
            if batch.block is not None
        ]
        self.offers.make(SubtreesHold(batches), Subtrees(folders))


def offered(offering: Offering) -> BufferPool:
    """Offer `FOLDERS` in one message; gives the pool whose only buffer their bytes lie in."""
    pool = BufferPool(1, MIB)
    buffer, batches = filled(pool, FOLDERS)
    buffer.release()
    offering.offer(batches)
    return pool


@pytest.fixture
async def offering() -> Offering:
    ours, _ = trio.testing.memory_stream_pair()
    return Offering(session_over(ours))


@pytest.mark.trio
async def test_all_is_sent_by_the_first_offers_number_where_all_is_wanted(offering: Offering) -> None:
    pool = offered(offering)
    offering.offers.make(BatchHold(small()), EncodedOffer(block_of({b"f": b"fff"}).data))
    offering.offers.answer(WANT_ALL, b"", b"", whole=4)
    (unit,) = offering.units()
    assert unit.runs == [(0, 0, 9)]
    assert read(unit)[0][1] == b"".join(ALL)
    unit.release()
    assert not pool.exhausted()
    offering.offers.answer(WANT_ALL, b"", b"", whole=0)  # the next has the number behind all of them
    (unit,) = offering.units()
    assert unit.runs == [(4, 0, 1)]


@pytest.mark.trio
async def test_none_of_it_is_sent_where_none_is_wanted(offering: Offering) -> None:
    pool = offered(offering)
    offering.offers.answer(WANT_NONE, b"", b"", whole=4)
    assert offering.units() == []
    assert not pool.exhausted()
    with pytest.raises(ProtocolError, match="not made"):
        offering.offers.answer(WANT_NONE, b"", b"", whole=4)


@pytest.mark.trio
async def test_offers_that_are_answered_one_by_one_have_numbers_of_their_own(offering: Offering) -> None:
    pool = offered(offering)
    offering.offers.make(BatchHold(small()), EncodedOffer(block_of({b"f": b"fff"}).data))
    offering.offers.answer(WANT_SOME, bytes([0b11110]), b"", whole=0)
    offering.offers.answer(WANT_NONE, b"", b"", whole=0)
    with pytest.raises(ProtocolError, match="whole"):  # some of them were answered by themselves
        offering.offers.answer(WANT_ALL, b"", b"", whole=3)
    offering.offers.answer(WANT_NONE, b"", b"", whole=0)
    offering.offers.answer(WANT_ALL, b"", b"", whole=0)
    offering.offers.answer(WANT_ALL, b"", b"", whole=0)
    units = offering.units()
    runs = [run for unit in units for run in unit.runs]
    assert runs == [(0, 1, 4), (3, 0, 1), (4, 0, 1)]
    parts = units[0].parts[:2]
    assert [bytes(view) for part in parts for view in part.views()] == [
        FOLDERS[0][b"c"],
        FOLDERS[3][b"last"],
    ]
    for part in parts:
        part.release()
    assert not pool.exhausted()


@pytest.mark.trio
async def test_parts_of_it_are_answered_as_one(offering: Offering) -> None:
    pool = offered(offering)
    offering.offers.answer(WANT_NONE, b"", b"", whole=0)
    offering.offers.answer(WANT_ALL, b"", b"", whole=2)  # by the number of the first of the two
    offering.offers.answer(WANT_ALL, b"", b"", whole=1)
    (unit,) = offering.units()
    first, middle, last = (b"".join(FOLDERS[0].values()), ALL[len(FOLDERS[0]) : -1], ALL[-1])
    assert b"".join(ALL) == first + b"".join(middle) + last
    assert unit.runs == [(1, 0, len(middle)), (3, 0, 1)]
    assert [data for _, data in read(unit)] == [b"".join(middle), last]
    unit.release()
    assert not pool.exhausted()
    with pytest.raises(ProtocolError, match="not made"):
        offering.offers.answer(WANT_NONE, b"", b"", whole=1)


@pytest.mark.trio
@pytest.mark.parametrize("whole", [-1, 5, 6])
async def test_no_more_is_answered_as_one_than_was_offered_so(offering: Offering, whole: int) -> None:
    pool = offered(offering)
    offering.offer([small()])
    with pytest.raises(ProtocolError, match="whole"):
        offering.offers.answer(WANT_NONE, b"", b"", whole=whole)
    offering.offers.stop()
    assert not pool.exhausted()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("kind", "bitmap", "finer"), [(WANT_SOME, b"\x01\0", b""), (WANT_NONE, b"", b"\x01\0")]
)
async def test_an_answer_to_all_says_all_or_none(
    offering: Offering, kind: int, bitmap: bytes, finer: bytes
) -> None:
    offering.offer([small(), small(b"g")])
    with pytest.raises(ProtocolError, match="whole"):
        offering.offers.answer(kind, bitmap, finer, whole=2)
    assert offering.units() == []


@pytest.mark.trio
async def test_what_was_offered_by_itself_is_not_answered_as_whole(offering: Offering) -> None:
    offering.offers.make(BatchHold(small()), EncodedOffer(block_of({b"f": b"fff"}).data))
    with pytest.raises(ProtocolError, match="whole"):
        offering.offers.answer(WANT_ALL, b"", b"", whole=1)


@pytest.mark.trio
async def test_every_buffer_is_let_go_when_the_session_ends_in_the_middle_of_the_answers(
    offering: Offering,
) -> None:
    pool = BufferPool(2, MIB)
    for _ in range(2):
        buffer, batches = filled(pool, FOLDERS)
        buffer.release()
        offering.offer(batches)
    assert pool.exhausted()
    offering.offers.answer(WANT_NONE, b"", b"", whole=0)
    offering.offers.stop()
    assert [pool.acquire(), pool.acquire()]
