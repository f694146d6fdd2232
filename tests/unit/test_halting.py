"""A halt, at both ends: what has begun goes on, what has not does not, whatever was shared or on its way."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest
import trio.testing

from flowengine.chunking import chunk_id, pack_chunks
from flowengine.errors import ProtocolError
from flowengine.manifest import FILE, Entry
from flowengine.store.reading import Piece
from flowengine.store.scan_events import Batch
from flowengine.store.staging import Staging
from flowengine.transfer import halting
from flowengine.transfer.control import Control, ControlDecoder
from flowengine.transfer.halting import halt_landing
from flowengine.transfer.holds import BatchHold, LargeLeft, PieceHold
from flowengine.transfer.landing import Landing
from flowengine.transfer.leaving import ANSWER_S, Leaving
from flowengine.transfer.losing import lose
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import (
    UNWANTED,
    WANTED,
    LargeObject,
    RunOffer,
    SmallObject,
    SmallOffer,
    TargetDirectory,
)
from flowengine.transfer.timing import StageClock
from flowengine.wire.records import Run


def entry(name: bytes, *parts: bytes) -> Entry:
    packed = pack_chunks([(len(part), chunk_id(part)) for part in parts])
    return Entry(name, FILE, 0o644, 0, size=sum(map(len, parts)), chunks=packed)


X, Y, Z, W = (bytes([number]) * 3000 for number in range(1, 5))


class Bench:
    """A landing with one offer: `a` is the chunk X, `b` is Y and the X that comes for `a`, `c` is Z, `d` Z and W."""

    def __init__(self, folder: Path) -> None:
        ours, _ = trio.testing.memory_stream_pair()
        self.root = os.open(folder, os.O_RDONLY)
        self.staging = Staging(self.root, os.fsencode(folder))
        self.landing = Landing(
            self.staging,
            Control(ours, ControlDecoder()),
            Counters(),
            StageClock(),
            apply_extra=None,
            pace=lambda size: None,
        )
        self.folder = TargetDirectory(b"", b"", os.dup(self.root), None, created=False)
        self.entries = [entry(b"a", X), entry(b"b", Y, X), entry(b"c", Z), entry(b"d", W, Y)]
        self.offer = SmallOffer(self.folder, self.entries)
        self.shared = SmallObject(self.folder, self.entries[1], self.staging)
        self.offer.sinks[1] = self.shared
        self.landing.adopt(self.shared)
        for index in (0, 1, 3, 4, 5):  # all but the X of `b`, and the Y of `d` comes once more
            self.offer.wanted[index] = WANTED
        self.offer.open = 5
        self.landing.inflight = {
            chunk_id(X): [(self.shared, len(Y))],
            chunk_id(Y): None,
            chunk_id(Z): None,
            chunk_id(W): None,
        }
        self.landing.offers[0] = self.offer
        for one in self.entries:
            self.landing.opened(self.folder, one.name)

    def deliver(self, runs: list[Run], data: bytes) -> None:
        self.landing.deliver(runs, memoryview(data), len(data))

    def ready(self) -> list[tuple[str, bytes]]:
        found = []
        while not self.landing.publishable.empty():
            item = self.landing.publishable.get()
            assert item is not None
            kind, _, one, what = item
            if kind == "smalls":
                assert isinstance(what, list)
                found += [(kind, small.name) for small, _ in what]
            elif kind != "directory":
                found.append((kind, one.name))
        return found

    def close(self) -> None:
        self.landing.close()
        self.staging.close(remove=True)
        os.close(self.folder.fd)
        os.close(self.root)


@pytest.mark.trio
async def test_what_has_begun_ends_with_a_chunk_that_it_shares_with_what_was_given_up(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        bench.deliver([(0, 1, 1)], Y)  # `b` has begun
        assert halt_landing(bench.landing, "ended") == [(0, 3, 3)]  # the X of `a` still comes, for `b`
        assert bench.folder.open_names == {b"b"}
        bench.deliver([(0, 0, 1), (0, 3, 3)], X + Z + W + Y)  # all of it was on its way
        assert bench.ready() == [("small", b"b")]
        assert bench.landing.offers == {}
        assert [reason for _, reason, _ in bench.landing.failures] == ["policy-stopped"]
        assert [name for name in os.listdir(bench.staging.fd) if name.startswith("s.")] == [
            bench.shared.staged
        ]


@pytest.mark.trio
async def test_nothing_begins_by_what_arrives_after_a_halt(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        assert halt_landing(bench.landing, "ended") == [(0, 0, 2), (0, 3, 3)]
        assert bench.folder.open_names == set()
        with pytest.raises(ProtocolError, match="not wanted"):  # it never was: not even now
            bench.deliver([(0, 0, 3)], X + Y + X)
        bench.deliver([(0, 3, 1)], Z)
        assert bench.offer.wanted[3] == 0
        lose(bench.landing, 0, 4, 2, "vanished", "it is gone")  # the source's word crosses
        assert UNWANTED not in bench.offer.wanted[3:]
        assert bench.ready() == []
        assert halt_landing(bench.landing, "ended") == []  # the placer's own


@pytest.mark.trio
async def test_a_large_object_of_which_something_is_here_goes_on_and_another_is_named(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        begun, other = (entry(name, Z * 400, W * 400) for name in (b"begun", b"other"))
        for number, one in enumerate([begun, other], 1):
            large = LargeObject(bench.folder, one)
            large.staged = bench.staging.open_object(one.name, one.size, 0)
            bench.landing.adopt(large)
            bench.landing.opened(bench.folder, one.name)
            packed = one.chunks
            size = len(Z * 400)
            bench.landing.offers[number] = RunOffer(
                large, packed, [size, size], [0, size], bytearray([WANTED, WANTED]), 2
            )
        bench.deliver([(1, 0, 1)], Z * 400)
        runs = halt_landing(bench.landing, "ended")
        assert [run for run in runs if run[0]] == [(2, 0, 2)]
        assert bench.folder.open_names == {b"begun"}
        assert [path for path, _, _ in bench.landing.failures] == [b"other", b"."]


def batch() -> BatchHold:
    """`a` and `c` of one chunk, `b` between of two."""
    held = BatchHold(Batch([entry(b"a", X), entry(b"b", Y, X), entry(b"c", Z)], None, [-1, -1, -1], b"/f"))
    held.number = 0
    assert len(held.lengths) == 4
    return held


def test_a_source_sends_what_the_target_says_has_begun() -> None:
    lost: list[Run] = []
    leaving, held = Leaving(lost.append), batch()
    assert leaving.parts(held, (0, 0, 2), halted=False) is None
    leaving.unwanted([(0, 3, 1)], all_of_it=False)  # it halts, and has more to say
    assert leaving.parts(held, (0, 2, 2), halted=False) == [(0, 2, 1)]
    leaving.unwanted([(7, 0, 2)], all_of_it=True)
    other = PieceHold(Piece(0, [10, 10, 10], b"", None, 0), b"/f/large")
    # Nothing of it was sent; the target has its beginning from an earlier session.
    assert leaving.parts(other, (7, 0, 3), halted=True) == [(7, 2, 1)]
    assert leaving.parts(other, (8, 0, 3), halted=True) == [(8, 0, 3)]
    assert lost == []


def test_a_source_that_halts_and_hears_nothing_goes_by_what_it_has_sent() -> None:
    lost: list[Run] = []
    times = iter([0.0, ANSWER_S + 1, ANSWER_S + 1, ANSWER_S + 1, ANSWER_S + 1])
    leaving, held, left = Leaving(lost.append, lambda: next(times)), batch(), LargeLeft()
    assert leaving.parts(held, (0, 0, 2), halted=False) is None  # `a`, and the half of `b`
    assert (
        leaving.parts(PieceHold(Piece(0, [9], b"", None, 0), b"/f/l", left=left), (1, 0, 1), halted=False)
        is None
    )
    assert leaving.parts(held, (0, 2, 2), halted=True) == [(0, 2, 1)]
    assert lost == [(0, 3, 1)]
    assert leaving.parts(
        PieceHold(Piece(9, [9], b"", None, 0), b"/f/l", left=left), (2, 0, 1), halted=True
    ) == [(2, 0, 1)]
    assert leaving.parts(PieceHold(Piece(0, [9], b"", None, 0), b"/f/m"), (3, 0, 1), halted=True) == []
    assert lost[1:] == [(3, 0, 1)]


def test_nobody_waits_for_the_targets_word_once_the_session_is_over() -> None:
    leaving = Leaving(lambda run: None)
    leaving.close()
    assert leaving.parts(batch(), (0, 3, 1), halted=True) == [(0, 3, 1)]  # into a socket that is closed


@pytest.mark.parametrize(
    "runs",
    [[(0, 0, 0)], [(-1, 0, 1)], [(0, -1, 2)], [(0, 0, 1 << 62)], [(0, 1 << 62, 1)], [(0, 0, 32_768)] * 31],
)
def test_a_target_does_not_make_a_source_remember_what_it_never_offered(runs: list[Run]) -> None:
    with pytest.raises(ProtocolError, match="no more"):
        Leaving(lambda run: None).unwanted(runs, all_of_it=True)


@pytest.mark.trio
async def test_the_placer_may_offer_while_a_halt_looks_at_what_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds to the offers without the lock, from another thread."""
    look = halting._fail_whole

    def look_and_add(landing: Landing, offer: SmallOffer) -> list[tuple[TargetDirectory, bytes]]:
        landing.offers[len(landing.offers)] = SmallOffer(offer.directory, [entry(b"z", Z)])
        return list(look(landing, offer))

    monkeypatch.setattr(halting, "_fail_whole", look_and_add)
    with contextlib.closing(Bench(tmp_path)) as bench:
        assert halt_landing(bench.landing, "ended") == [(0, 0, 2), (0, 3, 3)]


@pytest.mark.trio
async def test_nobody_waits_for_a_publisher_that_failed(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        for _ in range(5000):  # it takes nothing any more, and more is queued than it may be behind
            bench.landing.ready("directory", bench.folder, bench.entries[0], None)
        lane = threading.Thread(target=bench.deliver, args=([(0, 0, 1)], X))
        lane.start()
        deadline = time.monotonic() + 30
        while bench.offer.open == 5 and time.monotonic() < deadline:
            lane.join(0.01)
        assert lane.is_alive(), "it waits for the publisher"
        bench.landing.let_go()
        lane.join(30)
        assert not lane.is_alive()
