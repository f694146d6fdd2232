"""What the source has offered: numbered, held until it is answered, and sent where it is wanted.

Goal
    The scan runs ahead of the answers by a bounded number of offers and of bytes.
Plan
    The scan thread posts offers, each with a *hold* on its bytes. Answers come in the order of the offers: wanted runs
    become units on the lanes' queue, the hold is let go. Chunks that the target asks to see cut finer are offered
    again by a thread of their own, and keep the place of the offer they were of until that is answered.
Invariants
    - Offers are numbered and answered in order; at most `MAX_OPEN_OFFERS` are unanswered.
    - Every hold is released exactly once: when answered, or when the session ends. One of many folders is split where they
      are not answered as one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Final

from flowengine.chunking.fine import FineCutter, fine_profile
from flowengine.errors import ProtocolError
from flowengine.store.buffers import PoolClosed
from flowengine.transfer.compressing import UnitQueue
from flowengine.transfer.holds import (
    BatchHold,
    FineHold,
    Hold,
    PieceHold,
    SubtreesHold,
    UnitPacker,
    wanted_runs,
)
from flowengine.transfer.session import MAX_OPEN_OFFERS, Session
from flowengine.transfer.unit import Unit
from flowengine.transfer.unit_size import UnitSize
from flowengine.wire.messages import (
    MAX_FINE_CHUNKS,
    MAX_FINER_BYTES,
    WANT_ALL,
    WANT_NONE,
    WANT_SOME,
    EncodedOffer,
    Finer,
    ObjectRun,
    Offer,
    Subtrees,
)

__all__ = ["Offers"]

MAX_WANTED_BYTES: Final = 64 * 1024 * 1024
"""Bytes that may be wanted and not yet sent before the scan waits. A warm scan cache reads nothing, so nothing else
would hold it back, and both ends remember what is wanted."""
_LEAST_COST_BYTES: Final = 4096
"""What a chunk counts for at least: an object costs both ends memory however small it is."""
_KNOWN_SHARE: Final = 16
_RECENT_BYTES: Final = 64 * 1024 * 1024
_LEAST_ANSWERED_BYTES: Final = 4 * 1024 * 1024


class Offers:
    """The offers of one session.

    Args:
        units: where the lanes take what is to be sent.
        size: of a unit.
    """

    def __init__(self, session: Session, units: UnitQueue, size: UnitSize) -> None:
        self._session = session
        self._control = session.control
        self._units = units
        self._packer = UnitPacker(size)
        self._holds: deque[Hold] = deque()
        self._finer: queue.SimpleQueue[tuple[PieceHold | BatchHold, list[int]] | None] = queue.SimpleQueue()
        self._finer_bytes = 0
        self._lock = threading.Lock()
        self._open = threading.Semaphore(MAX_OPEN_OFFERS)
        self._made = 0
        self._sent = threading.Condition()
        self._wanted_bytes = 0
        self._answered_bytes = self._answered_wanted = 0
        self._stopped = False

    @property
    def mostly_known(self) -> bool:
        """Whether little was wanted of what was last answered for of large objects.

        Their bytes are not kept until the answer then: buffers would hold the scan back for a round trip, and to read a
        little again costs less.
        """
        answered, wanted = self._answered_bytes, self._answered_wanted
        return answered >= _LEAST_ANSWERED_BYTES and wanted * _KNOWN_SHARE < answered

    def stop(self) -> None:
        """Let every hold go, and every thread that waits here."""
        self._stopped = True
        with self._sent:
            self._sent.notify_all()
        self._finer.put(None)
        for _ in range(MAX_OPEN_OFFERS):
            self._open.release()
        with self._lock:
            while self._holds:
                self._holds.popleft().release()

    # --- scan thread --------------------------------------------------------------------------------------------

    def make(self, hold: Hold, message: Offer | EncodedOffer | ObjectRun | Subtrees) -> None:
        """Offer something; blocks while too much is unanswered, or wanted and not yet sent.

        Raises:
            PoolClosed: the session ended.
        """
        for _ in range(_offers_of(hold)):
            self._open.acquire()
        with self._sent:
            while self._wanted_bytes > MAX_WANTED_BYTES and not self._stopped:
                self._sent.wait()
        if not self._post(hold, message):
            raise PoolClosed("the session ended")

    def _post(self, hold: Hold, message: Offer | EncodedOffer | ObjectRun | Finer | Subtrees) -> bool:
        """Number an offer and post it; False where the session ended and the hold was let go."""
        with self._lock:
            if self._stopped:
                hold.release()
                return False
            hold.number = self._made
            self._made += _offers_of(hold)
            self._holds.append(hold)
            self._control.post(message)  # inside the lock: they must arrive in the order of their numbers
            return True

    # --- the finer cut's thread ---------------------------------------------------------------------------------

    def cut_finer(self) -> None:
        """Offer again, cut finer, what the target asked for, until `stop`. Each takes the place of the offer it answers."""
        stage = self._session.clock.stage("finer")
        cutter = FineCutter(self._session.profile)
        while (item := self._finer.get()) is not None:
            begin = time.perf_counter_ns()
            hold, indexes = item
            try:
                fine = FineHold(hold, indexes, cutter)
            finally:
                hold.release()
            self._post(fine, Finer(hold.number, fine.packed))
            stage.since(begin)

    # --- loop thread --------------------------------------------------------------------------------------------

    def answer(self, kind: int, bitmap: bytes, finer: bytes, *, whole: int) -> None:
        """The target's answer to the oldest offer that has none; `whole` is not 0: to so many offers of `Subtrees`, as one.

        Raises:
            ProtocolError: there is none, or it asks for what it may not ask for.
        """
        with self._lock:
            if not self._holds:
                raise ProtocolError("the target answered an offer that was not made")
            hold = self._holds[0]
            if whole and (
                not isinstance(hold, SubtreesHold) or not 0 < whole <= len(hold) or kind == WANT_SOME or finer
            ):
                raise ProtocolError("the target answered as whole what was not offered so, or not as whole")
            self._holds.popleft()
            if isinstance(hold, SubtreesHold) and whole < len(hold):
                hold, rest = hold.split(whole)
                if rest is not None:
                    self._holds.appendleft(rest)
        try:
            indexes = self._to_cut_finer(hold, kind, bitmap, finer) if finer else []
        except ProtocolError:
            hold.release()
            raise
        if isinstance(hold, FineHold):
            self._finer_bytes -= sum(hold.lengths)
        if not indexes:  # what is cut finer keeps the place until that is answered too
            self._open.release(_offers_of(hold))
        if isinstance(hold, PieceHold):
            self._count(sum(hold.lengths), 0)
        try:
            for index, count in wanted_runs(kind, bitmap, len(hold.lengths)) if kind != WANT_NONE else ():
                if self._session.options.dry_run:
                    raise ProtocolError("the target asked for bytes in a session that only looks")
                size = sum(hold.lengths[index : index + count])
                self._count(0, size)
                with self._sent:
                    self._wanted_bytes += _cost(size, count)
                for unit in self._packer.add(hold, index, count):
                    self._units.put(unit)
        finally:
            if indexes:
                assert not isinstance(hold, FineHold | SubtreesHold)
                self._finer.put((hold, indexes))
            else:
                hold.release()

    def flush(self) -> None:
        """Send also what fills no unit: wants come many to a batch, and no more of them are here."""
        unit = self._packer.flush()
        if unit is not None:
            self._units.put(unit)

    def _count(self, answered: int, wanted: int) -> None:
        if self._answered_bytes > _RECENT_BYTES:
            self._answered_bytes //= 2
            self._answered_wanted //= 2
        self._answered_bytes += answered
        self._answered_wanted += wanted

    def _to_cut_finer(self, hold: Hold, kind: int, bitmap: bytes, finer: bytes) -> list[int]:
        """The chunks that the target wants to see cut finer before it decides."""
        count = len(hold.lengths)
        bits = int.from_bytes(finer, "little")
        wanted = (1 << count) - 1 if kind == WANT_ALL else int.from_bytes(bitmap, "little")
        if isinstance(hold, FineHold) or bits >> count or (kind != WANT_NONE and bits & wanted):
            raise ProtocolError("the target asked for chunks to be cut finer that it cannot ask for")
        indexes = [
            index
            for first, run in wanted_runs(WANT_SOME, finer, count)
            for index in range(first, first + run)
        ]
        size = sum([hold.lengths[index] for index in indexes])
        if size > MAX_FINE_CHUNKS * fine_profile(self._session.profile).minimum:
            raise ProtocolError(f"the target asked for {size} bytes at once to be cut finer")
        self._finer_bytes += size
        if self._finer_bytes > MAX_FINER_BYTES:
            raise ProtocolError(
                f"the target asked for {self._finer_bytes} bytes to be cut finer and answers none"
            )
        return indexes

    # --- lane threads -------------------------------------------------------------------------------------------

    def carried(self, unit: Unit) -> None:
        """A unit is on its way, or was given up."""
        with self._sent:
            self._wanted_bytes -= _cost(unit.raw_bytes, sum([count for _, _, count in unit.runs]))
            self._sent.notify_all()


def _offers_of(hold: Hold) -> int:
    """How many offers a hold is of."""
    return len(hold) if isinstance(hold, SubtreesHold) else 1


def _cost(size_bytes: int, chunks: int) -> int:
    """What wanted chunks count for; additive, so that parts of a run cost together what the run does."""
    return size_bytes + chunks * _LEAST_COST_BYTES
