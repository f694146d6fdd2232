"""Where delivered chunks go: verified, written to every place that needs them, journalled.

Goal
    Nothing unverified is ever visible under its final name, and a chunk travels once however many objects have it.
Plan
    Lanes call `deliver` with a record's plaintext. Every chunk is hashed against what was offered, then written: those
    of large objects here, into a journalled staging file; those of small ones by `transfer.landing_small`, and fine ones
    by `transfer.landing_fine`. Whoever waits for a chunk is served as it arrives. What is complete goes to the publisher
    (`transfer.publishing`). What is open is kept in `transfer.account`; what will not come is `transfer.losing`'s.
Invariants
    - A chunk is accepted once, and only if it was wanted.
    - Verifying and writing happen outside the lock.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from itertools import islice, repeat
from time import monotonic, perf_counter_ns
from typing import Final

from flowengine.chunking import CHUNK_BYTES, right_chunks
from flowengine.errors import ProtocolError
from flowengine.manifest import Entry
from flowengine.store.filesystem import gives_modes, local_error, process_umask
from flowengine.store.page_cache import share_of_memory
from flowengine.store.staging import Staging
from flowengine.transfer.account import OpenAccount
from flowengine.transfer.control import Control
from flowengine.transfer.landing_blocks import wrong_chunk
from flowengine.transfer.landing_fine import deliver_fine
from flowengine.transfer.landing_small import deliver_small
from flowengine.transfer.places import LandedPart, Location, Place
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import (
    CLAIMED,
    UNWANTED,
    WANTED,
    FineOffer,
    LargeObject,
    RunOffer,
    Sink,
    SmallObject,
    SmallOffer,
    Waiter,
    chunk_lengths,
    waited_for,
)
from flowengine.transfer.subtrees import SubtreesOffer, deliver_subtrees
from flowengine.transfer.timing import Stage, StageClock
from flowengine.units import MIB
from flowengine.wire.messages import Received
from flowengine.wire.records import Run

__all__ = ["Landing"]

_CHECKPOINT_BYTES: Final = 256 * MIB
_CHECKPOINT_S: Final = 15.0
"""A large object is synced on its way at most this often: each sync also empties the disk's own cache, and meanwhile the
disk does little else. What a power cut leaves unsynced is hashed again, which takes less than it took to receive."""
_RECENT_CHUNKS: Final = 200_000
_RECENT_STEP: Final = 10_000
_ACKNOWLEDGE_BYTES: Final = 4 * MIB
"""Credit goes back in steps of this size, a quarter of the least window: each message wakes both ends' loops."""
_MAX_BACKLOG: Final = 2048
"""Deliveries that may wait for the publisher before lanes wait too; the account's bound is on what is in them."""


class Landing(OpenAccount):
    """Delivery for one session at the target, on top of the account of what is open.

    Attributes:
        offers: whose chunks are still out, by number.
        inflight: chunks that were wanted, and who else waits for each.
        recent: where the last ones that arrived can be read.
        sinks: of objects that are put together, for as long as they hold files.
        umask: bits that are taken from the modes of files that are made.
        masked: bits of a mode that each file is given by itself, and not by what makes many: those that follow an owner,
            and those of the umask where the file system changes no modes.
        halted: why no object may begin any more; empty while they may. Set by `transfer.halting`.
    """

    def __init__(
        self,
        staging: Staging,
        control: Control,
        counters: Counters,
        clock: StageClock,
        *,
        apply_extra: Callable[[int, bytes], None] | None,
        pace: Callable[[int], None],
    ) -> None:
        super().__init__(control, counters)
        self._pace = pace
        self.staging = staging
        self._clock = clock
        self.apply_extra = apply_extra
        self.index_is_wrong = False
        self._unacknowledged = 0
        self.offers: dict[int, SmallOffer | RunOffer | FineOffer | SubtreesOffer] = {}
        self.refining_bytes = 0
        self.inflight: dict[bytes, list[Waiter] | None] = {}
        self.recent: dict[bytes, Location] = {}
        self.halted = ""
        self._may_stay_bytes = share_of_memory()
        self._local = threading.local()
        self.sinks: set[Sink] = set()
        self.umask = process_umask()
        self.masked = 0o7000
        if self.umask and staging is not None and not gives_modes(staging.fd):
            self.masked |= self.umask

    def passes(self, size_bytes: int) -> bool:
        """Whether a large object of this size, which is begun, is not to stay in the system's cache. Placer's thread."""
        self._may_stay_bytes -= size_bytes
        return self._may_stay_bytes < 0

    # --- delivery, lane threads ---------------------------------------------------------------------------------

    def deliver(self, runs: list[Run], plain: memoryview, stored_bytes: int) -> None:
        """One record's chunks. Blocks while they are verified and written.

        Raises:
            ProtocolError, IntegrityError: the peer sent what was not wanted, or not what it offered.
            FlowError: the disk refused.
        """
        self._pace(len(plain))
        stages = self.stages()
        at = 0
        for number, first, total in runs:
            index, end = first, first + total
            while index < end or not total:  # at once, but where some of it is not wanted any more
                offer, count, wanted = self._claim(number, index, end - index)
                if not wanted:
                    at += sum(chunk_lengths(offer, index, count))
                elif isinstance(offer, SubtreesOffer):
                    at += deliver_subtrees(self, offer, index, count, plain[at:], stages)
                elif isinstance(offer, FineOffer):
                    at += deliver_fine(self, offer, index, count, plain[at:], stages)
                else:
                    at += self.deliver_chunks(offer, index, count, plain[at:], stages)
                with self.lock:
                    offer.wanted[index : index + count] = bytes(count)
                    offer.open -= count
                    if not offer.open:
                        del self.offers[number]
                    # The publisher needs nothing from here, so waiting for it cannot stop it.
                    while self.publishable.qsize() > _MAX_BACKLOG and not self.stopped:
                        self.room.wait()
                index += count
        if at != len(plain):
            raise ProtocolError(f"a record holds {len(plain)} bytes, its chunks are {at} bytes")
        with self.lock:
            self._unacknowledged += stored_bytes
            due = self._unacknowledged >= _ACKNOWLEDGE_BYTES
        if due:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Give back the credit of what was received since the last time."""
        with self.lock:
            size_bytes, self._unacknowledged = self._unacknowledged, 0
        if size_bytes:
            self.control.post(Received(size_bytes))

    def deliver_chunks(
        self,
        offer: SmallOffer | RunOffer,
        index: int,
        count: int,
        plain: memoryview,
        stages: tuple[Stage, Stage],
    ) -> int:
        try:
            if isinstance(offer, RunOffer):
                return self._deliver_run(offer, index, count, plain, stages)
            return deliver_small(self, offer, index, count, plain, stages)
        except OSError as error:
            name = offer.target.directory.path if isinstance(offer, RunOffer) else offer.directory.path
            raise local_error(error, "cannot write into", name or b".") from error

    def _claim(
        self, number: int, index: int, count: int
    ) -> tuple[SmallOffer | RunOffer | FineOffer | SubtreesOffer, int, bool]:
        """The offer whose chunks arrived, how many of them, and whether they are wanted still.

        From here on nobody else delivers these. It is all of them, but where some are not wanted any more.
        """
        with self.lock:
            offer = self.offers.get(number)
            if offer is None:
                raise ProtocolError(f"data arrived for offer {number}, which is not open")
            if index + count > len(offer.wanted) or not count:
                raise ProtocolError(
                    f"data arrived for chunks {index}+{count} of offer {number}, which has {len(offer.wanted)}"
                )
            wanted = offer.wanted[index] != UNWANTED
            if self.halted:
                end = index + count
                marks = offer.wanted[index:end]
                count = next((n for n, mark in enumerate(marks) if (mark != UNWANTED) != wanted), count)
            if wanted and offer.wanted.count(WANTED, index, index + count) != count:
                raise ProtocolError(
                    f"data arrived for chunks of offer {number} that were not wanted (any more)"
                )
            offer.wanted[index : index + count] = bytes([CLAIMED]) * count
            return offer, count, wanted

    def stages(self) -> tuple[Stage, Stage]:
        stages: tuple[Stage, Stage] | None = getattr(self._local, "stages", None)
        if stages is None:
            stages = self._local.stages = (self._clock.stage("verify"), self._clock.stage("write"))
        return stages

    def _deliver_run(
        self, offer: RunOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
    ) -> int:
        verify, write = stages
        target = offer.target
        packed = offer.packed
        begin = perf_counter_ns()
        run = packed[index * CHUNK_BYTES : (index + count) * CHUNK_BYTES]
        if right_chunks(plain, run) != count:  # nor has a record that is too short
            raise wrong_chunk(target.directory, target.entry)
        size = sum(offer.lengths[index : index + count])
        begin = verify.since(begin)
        location: Place | None = None
        if not target.failed:
            target.put(offer.offsets[index], plain[:size], run)
            where = target.directory.child(target.entry.name)
            location = (where, target.staged.name if target.staged else "", offer.offsets[index])
        self.arrived([(run, 0, location)], plain)
        write.since(begin)
        self.add(target, size)
        return size

    # --- what arrived, any thread -------------------------------------------------------------------------------

    def arrived(self, items: list[tuple[bytes, int, Place | None]], plain: memoryview) -> None:
        """Chunks are here: remember where, and write them to whoever else waits for them.

        Args:
            items: (packed chunks, where they begin in `plain`, where they were put; None for nowhere).
        """
        waiting: list[tuple[list[Waiter], int, int, bytes]] = []
        with self.lock:
            for packed, at, location in items:
                ids = [
                    packed[start + 4 : start + CHUNK_BYTES] for start in range(0, len(packed), CHUNK_BYTES)
                ]
                waiters = [*map(self.inflight.pop, ids, repeat(None))]
                if location is not None:
                    self.recent.update(zip(ids, repeat(LandedPart(location, packed)), strict=False))
                if any(waiters):
                    waiting += waited_for(packed, at, waiters)
            self.forget_oldest()
        self.serve(waiting, plain)

    def forget_oldest(self) -> None:
        """Bound what is remembered of chunks that arrived; inside the lock."""
        recent = self.recent
        if len(recent) > _RECENT_CHUNKS + _RECENT_STEP:
            # Many at once: finding the oldest of a dict walks over all that were taken from its front before.
            for identity in list(islice(recent, len(recent) - _RECENT_CHUNKS)):
                del recent[identity]

    def serve(self, waiting: list[tuple[list[Waiter], int, int, bytes]], plain: memoryview) -> None:
        """Write chunks to whoever waits for them: (who, where in `plain`, how long, the packed chunk) of each."""
        for waiters, at, length, one in waiting:
            for sink, offset in waiters:
                if not sink.failed:
                    sink.put(offset, plain[at : at + length], one)
                self.counters.bytes_reused += length
                self.add(sink, length)

    def add(self, sink: Sink, size_bytes: int) -> None:
        """So many more bytes of a sink are in place."""
        with self.lock:
            sink.remaining -= size_bytes
            complete = sink.remaining == 0 and sink.sealed
            due = not complete and isinstance(sink, LargeObject) and _begin_sync(sink)
        assert sink.remaining >= 0
        if complete:
            self._complete(sink)
        elif due:
            self.publishable.put(("checkpoint", sink.directory, sink.entry, sink))

    def seal(self, sink: LargeObject) -> None:
        """All chunks of a large object were offered."""
        with self.lock:
            sink.sealed = True
            complete = sink.remaining == 0
        if complete:
            self._complete(sink)

    def _complete(self, sink: Sink) -> None:
        if sink.failed:
            return
        if isinstance(sink, SmallObject):
            sink.open()
            refused = self.dress(sink.fd, sink.entry)
            self.disown(sink)  # before it is closed: that may fail, and its number be another file's then
            os.close(sink.fd)
            if refused:
                self.fail(sink.directory, sink.entry.name, "attributes", refused)
            else:
                self.publishable.put(("small", sink.directory, sink.entry, sink.staged))
        else:
            self.publishable.put(("large", sink.directory, sink.entry, sink))

    def dress(self, fd: int, entry: Entry) -> str:
        """Give a staging file its attributes; what the system refused, if it did.

        Owner before mode: chown(2) takes the set-user-id bit away. Time last: the others move it.
        """
        try:
            if entry.extra and self.apply_extra is not None:
                self.apply_extra(fd, entry.extra)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            return f"the target cannot give it its attributes: {error.strerror}"
        return ""

    def fail_sink(self, sink: Sink, reason: str, message: str) -> None:
        """An object that has a sink will not land in this session; what is journalled of it stays."""
        with self.lock:
            if sink.failed:
                return
            sink.failed = True
        self.fail(sink.directory, sink.entry.name, reason, message)

    def adopt(self, sink: Sink) -> None:
        """Take over a sink's files. One that fails keeps them to the session's end: a lane may be about to write."""
        with self.lock:
            self.sinks.add(sink)

    def disown(self, sink: Sink) -> None:
        """The sink holds no files any more."""
        with self.lock:
            self.sinks.discard(sink)

    def close(self) -> None:
        """Close what unfinished sinks and directories hold. No lane, copier or publisher may be running."""
        for sink in self.sinks:
            if isinstance(sink, SmallObject):
                if sink.fd >= 0:
                    os.close(sink.fd)
            elif isinstance(sink, LargeObject):
                if sink.staged is not None:
                    sink.staged.close()
                sink.drop_old()
        self.sinks.clear()
        for directory in self.directories.values():
            if directory.fd >= 0:
                os.close(directory.fd)
        self.directories.clear()


def _begin_sync(sink: LargeObject) -> bool:
    """Whether it is to be synced now; then it is not again for a while. Inside the lock."""
    if sink.unsynced < _CHECKPOINT_BYTES or (now := monotonic()) - sink.synced_at < _CHECKPOINT_S:
        return False
    sink.unsynced, sink.synced_at = 0, now
    return True
