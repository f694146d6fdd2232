"""Chunks that the source gives up while others of the same object are in a lane's hands, or come later."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio.testing

from flowengine.chunking import chunk_id, pack_chunks
from flowengine.chunking.fine import fine_id
from flowengine.errors import ProtocolError
from flowengine.manifest import FILE, Entry
from flowengine.store.staging import Staging
from flowengine.transfer.control import Control, ControlDecoder
from flowengine.transfer.landing import Landing
from flowengine.transfer.losing import lose
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import (
    FINER,
    WANTED,
    FineOffer,
    Refinement,
    Region,
    SmallObject,
    SmallOffer,
    TargetDirectory,
)
from flowengine.transfer.timing import StageClock

WAIT_S = 30
"""Far more than it takes: a thread that hangs fails the test instead of stopping it."""
HALVES = [bytes([number]) * 3000 for number in (1, 2)]
WHOLE = b"".join(HALVES)
REST = b"\x03" * 2000


class Held(list[int]):
    """Offsets that hold whoever looks one up, until they are let go: a lane that has verified and not yet copied."""

    def __init__(self, offsets: list[int]) -> None:
        super().__init__(offsets)
        self.reached, self.go = threading.Event(), threading.Event()

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        self.reached.set()
        assert self.go.wait(WAIT_S)
        return super().__getitem__(index)


class Bench:
    """`a` is one chunk, asked for in two fine ones (offer 1), and one more; `b` waits for its first chunk."""

    def __init__(self, folder: Path) -> None:
        ours, _ = trio.testing.memory_stream_pair()
        self.root = os.open(folder, os.O_RDONLY)
        self.staging = Staging(self.root, os.fsencode(folder))
        self.landing = landing = Landing(
            self.staging,
            Control(ours, ControlDecoder()),
            Counters(),
            StageClock(),
            apply_extra=None,
            pace=lambda size: None,
        )
        self.folder = TargetDirectory(b"", b"", os.dup(self.root), None, created=False)
        packed = [pack_chunks([(len(part), chunk_id(part))]) for part in (WHOLE, REST)]
        a = Entry(b"a", FILE, 0o644, 0, size=len(WHOLE + REST), chunks=b"".join(packed))
        b = Entry(b"b", FILE, 0o644, 0, size=len(WHOLE), chunks=packed[0])
        self.offer = SmallOffer(self.folder, [a, b])
        self.offer.wanted[:2] = bytes([FINER, WANTED])
        self.offer.open = 2
        waiting = self.offer.sinks[1] = SmallObject(self.folder, b, self.staging)
        landing.adopt(waiting)
        landing.inflight = {chunk_id(WHOLE): [(waiting, 0)], chunk_id(REST): None}
        one = Refinement(0, self.offer, 0, len(WHOLE), packed[0], Region(0, 0))
        one.buffer = memoryview(bytearray(len(WHOLE)))
        rows = [len(half).to_bytes(4, "little") + fine_id(half) for half in HALVES]
        self.fine = FineOffer(b"".join(rows), [one])
        self.fine.owners, self.fine.offsets = [0, 0], [0, len(HALVES[0])]
        self.fine.wanted[:] = bytes([WANTED, WANTED])
        self.fine.open = 2
        landing.refining_bytes = len(WHOLE)
        landing.offers = {0: self.offer, 1: self.fine}
        for name in (b"a", b"b"):
            landing.opened(self.folder, name)

    def deliver(self, number: int, index: int, data: bytes) -> None:
        self.landing.deliver([(number, index, 1)], memoryview(data), len(data))

    def lose(self, number: int, index: int) -> None:
        lose(self.landing, number, index, 1, "vanished", "it is gone")

    def check_lost(self) -> None:
        """Both objects failed by name, once, and nothing is left of them but what the session's end takes away."""
        landing = self.landing
        assert [(path, reason) for path, reason, _ in sorted(landing.failures)] == [
            (b"a", "vanished"),
            (b"b", "vanished"),
        ]
        assert self.folder.open_names == set()
        assert chunk_id(WHOLE) not in landing.inflight
        assert chunk_id(WHOLE) not in landing.recent
        assert landing.refining_bytes == 0
        assert landing.publishable.empty()


@contextlib.contextmanager
def closing(bench: Bench) -> Iterator[Bench]:
    try:
        yield bench
    finally:
        bench.landing.close()
        bench.staging.close(remove=True)
        os.close(bench.folder.fd)
        os.close(bench.root)


@pytest.mark.trio
async def test_a_chunk_of_which_a_fine_one_is_lost_takes_the_others_and_goes_nowhere(tmp_path: Path) -> None:
    with closing(Bench(tmp_path)) as bench:
        bench.lose(1, 0)
        bench.deliver(1, 1, HALVES[1])  # it was on its way
        bench.deliver(0, 1, REST)
        bench.check_lost()
        assert bench.landing.offers == {}


@pytest.mark.trio
async def test_a_chunk_may_be_lost_while_a_lane_has_a_fine_one_of_it_in_hand(tmp_path: Path) -> None:
    with closing(Bench(tmp_path)) as bench:
        held = bench.fine.offsets = Held(bench.fine.offsets)
        failed: list[BaseException] = []

        def lane() -> None:
            try:
                bench.deliver(1, 1, HALVES[1])
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=lane)
        thread.start()
        try:
            assert held.reached.wait(WAIT_S)
            bench.lose(1, 1)  # a lane has it: it arrives, whatever the source says
            assert bench.landing.failures == []
            bench.lose(1, 0)
            assert bench.landing.offers.keys() == {0, 1}  # what a lane holds keeps its offer open
        finally:
            held.go.set()
            thread.join(WAIT_S)
        assert not thread.is_alive()
        assert failed == []
        bench.deliver(0, 1, REST)
        bench.check_lost()
        assert bench.landing.offers == {}


@pytest.mark.trio
async def test_a_chunk_is_not_lost_twice_and_what_came_of_its_object_does_not_help_it(tmp_path: Path) -> None:
    with closing(Bench(tmp_path)) as bench:
        bench.deliver(0, 1, REST)  # `a` has a sink from here on
        bench.deliver(1, 0, HALVES[0])
        bench.lose(1, 1)
        bench.check_lost()
        with pytest.raises(ProtocolError, match="not open"):  # nothing of it can be lost twice
            bench.lose(1, 1)


@pytest.mark.trio
async def test_fine_chunks_that_all_come_make_their_chunk_and_serve_who_waits(tmp_path: Path) -> None:
    with closing(Bench(tmp_path)) as bench:
        for index in (1, 0):
            bench.deliver(1, index, HALVES[index])
        bench.deliver(0, 1, REST)
        done = {bench.landing.publishable.get_nowait()[2].name for _ in range(2)}  # type: ignore[index]
        assert done == {b"a", b"b"}
        assert bench.landing.failures == []
        assert bench.landing.offers == {}
        assert bench.landing.refining_bytes == 0
