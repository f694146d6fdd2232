"""The source's side of a session: scan, offer, serve what is wanted.

Goal
    The scan runs ahead of the network by a bounded number of buffers and never waits for a round trip.
Plan
    The scan thread walks and posts what it finds. What is answered, wanted and sent of it is `offers`' to know; the
    loop's thread hears the target, the lanes carry bytes.
Invariant
    `Finish` is posted after the last offer, and only after it may a receipt arrive.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from flowengine.errors import ProtocolError, TemporaryError
from flowengine.machine import usable_processors
from flowengine.manifest import Header, ManifestBuilder, Summary
from flowengine.store.buffers import BufferPool, PoolClosed
from flowengine.store.reading import SEGMENT_BYTES, ObjectReader
from flowengine.store.scan import Scanner
from flowengine.store.scan_cache import ScanCache
from flowengine.store.scan_events import (
    Batch,
    DirectoryEntered,
    DirectoryLeft,
    Event,
    LargeBegun,
    LargeEnded,
    LargePiece,
    ScanFailed,
)
from flowengine.store.selection import Selection
from flowengine.transfer.compressing import UnitQueue
from flowengine.transfer.compression import CompressionChooser
from flowengine.transfer.control import wait_for_last_word
from flowengine.transfer.gathering import Gathered, Gatherer
from flowengine.transfer.holds import BatchHold, LargeLeft, PieceHold, SubtreesHold
from flowengine.transfer.lanes import Credit, SendingLane
from flowengine.transfer.leaving import HALTED, Leaving, UnitHold
from flowengine.transfer.link_control import LinkControl
from flowengine.transfer.offers import Offers
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.streams import MAX_STREAMS, NEAR_RTT_S, stays_inside
from flowengine.transfer.unit import ChunkGone
from flowengine.transfer.unit_size import UnitSize
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import (
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Failed,
    Finish,
    Landed,
    LeaveStreams,
    Lost,
    ManifestPart,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Progress,
    Rate,
    Receipt,
    Received,
    Subtrees,
    Totals,
    Want,
)
from flowengine.wire.records import Run

if TYPE_CHECKING:
    from flowengine.store.sealed_scan import SealedScanner
    from flowengine.transfer.admission import Admission
    from flowengine.trust.sealed import SealingKey

__all__ = ["SourceOutcome", "run_source"]

POOL_BUFFERS: Final = 10
_TOTALS_EVERY_NS: Final = 250_000_000
_MAX_NOTES: Final = 1000
_PARTS_WAITING: Final = 64
"""Parts of a manifest that may wait to be sent before no more are read."""


class SourceOutcome(msgspec.Struct):
    """How a session ended at the source.

    Attributes:
        receipt: the target's last word.
        failures: (path, reason, message) of what could not be read here or not written there.
        version_id: of what was offered.
        notes: what was left out of what was sealed, by its own name, which the target does not learn.
    """

    receipt: Receipt
    failures: list[tuple[bytes, str, str]] = msgspec.field(default_factory=list)
    version_id: bytes = b""
    notes: list[str] = msgspec.field(default_factory=list)


async def run_source(
    session: Session,
    selection: Selection,
    *,
    cache: ScanCache | None,
    counters: Counters,
    threads: int = 1,
    observe: Observer | None = None,
    seal: SealingKey | None = None,
    admit: Admission | None = None,
    shown: Iterable[bytes] = (),
) -> SourceOutcome:
    """Serve one session to its receipt.

    Args:
        session: established; its sockets are closed at the end.
        selection: what to offer.
        cache: the scan cache, used by the scan thread alone while this runs.
        counters: updated as things happen.
        threads: threads that read, cut and hash one large object.
        observe: called twice a second.
        seal: offer all of it sealed with this key; None offers it as it is.
        admit: shown all that is about to be offered; None offers whatever is there.
        shown: the manifest of the one version that may be offered, in parts, where the target is to hold it to that.

    Raises:
        TemporaryError: the session broke; another one continues.
        FlowError: as the peer or the local system says.
    """
    return await _Source(session, selection, cache, counters, threads, observe, seal, admit, shown).run()


class _Source:
    def __init__(
        self,
        session: Session,
        selection: Selection,
        cache: ScanCache | None,
        counters: Counters,
        threads: int,
        observe: Observer | None,
        seal: SealingKey | None,
        admit: Admission | None,
        shown: Iterable[bytes],
    ) -> None:
        self._shown = shown
        self._seal = seal
        self._admit = admit
        self._notes: list[str] = []
        self._session = session
        self._control = session.control
        self._selection = selection
        self._cache = cache
        self._counters = counters
        self._observe = observe
        profile = session.profile
        self._pool = BufferPool(POOL_BUFFERS, SEGMENT_BYTES + profile.maximum)
        self._reader = ObjectReader(
            profile, self._pool, threads, session.reads.spend, lambda: session.reads.limited
        )
        self._credit = Credit(session.window_bytes)
        self._chooser = CompressionChooser(session.rtt_s, session.compression, cores=usable_processors())
        self._link = LinkControl(session, self._credit.resize, self._sending_s)
        self._unit_size = UnitSize()
        self._units = UnitQueue(
            self._chooser,
            session.clock,
            lambda unit: self._offers.carried(unit),
            self._in_thread,
            self._unit_size,
        )
        self._offers = Offers(session, self._units, self._unit_size)
        self._in_object = False
        self._in_root = False
        self._path: list[bytes] = []
        self._large_left = LargeLeft()
        self._large_path = self._large_name = b""
        self._refused: set[bytes] = set()
        self._leaving = Leaving(self._left_out)
        self._failures: list[tuple[bytes, str, str]] = []
        self._summary: Summary | None = None
        self._receipt: Receipt | None = None
        self._lanes: list[SendingLane] = []
        self._by_link: dict[str, list[SendingLane]] = {}
        session.carried = lambda: {
            near: sum(lane.bytes_sent for lane in lanes) for near, lanes in self._by_link.items()
        }

        session.told_to_halt = self._ask_what_began

    def _ask_what_began(self, why: str) -> None:
        """This side halts, or has heard of it: the target says of what it has something."""
        self._control.post(Progress(self._counters.as_dict(), "", [], why))

    async def run(self) -> SourceOutcome:
        session = self._session
        if session.halted:
            self._ask_what_began(session.halted)
        self._limiter = trio.CapacityLimiter(MAX_STREAMS + 3 + self._chooser.threads)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    nursery.start_soon(self._join_lanes)
                    self._in_thread(self._scan)
                    self._in_thread(self._offers.cut_finer)
                    nursery.start_soon(self._control.run_writer)
                    nursery.start_soon(self._link.run)
                    nursery.start_soon(session.heartbeat, self._counters, self._observed, self._bottleneck)
                    await self._listen()
                    session.streams.finish()
                    self._units.forget()
                    self._units.end_lanes(len(session.streams.sockets))
                    nursery.cancel_scope.cancel()
                except BaseException:
                    session.streams.shut()
                    raise
                finally:
                    self._stop()
        finally:
            self._reader.close()
            if self._cache is not None:
                self._cache.flush()
            session.streams.close()
        assert self._receipt is not None
        self._count()
        return SourceOutcome(
            self._receipt,
            self._failures,
            self._summary.version_id if self._summary else b"",
            self._notes,
        )

    def _in_thread(self, run: Callable[[], None]) -> None:
        self._nursery.start_soon(partial(trio.to_thread.run_sync, run, limiter=self._limiter))

    async def _join_lanes(self) -> None:
        """Start a lane on every data connection that comes."""
        session = self._session
        while True:
            number, sock = await session.streams.next()
            # A relay may be on this machine while the other end is not: that shows in the round trip to it.
            self._chooser.inside = session.rtt_s < NEAR_RTT_S and all(
                map(stays_inside, session.streams.sockets.values())
            )
            lane = SendingLane(
                sock,
                session.sealer(number),
                self._units,
                self._credit,
                self._chooser,
                session.clock,
                session.pacer_of(session.streams.near(number)),
                lambda: len(session.streams),
                self._lost,
                self._offers.carried,
                self._unit_size,
                partial(session.streams.leaving.__contains__, number),
                self._going,
            )
            self._lanes.append(lane)
            self._by_link.setdefault(session.streams.near(number), []).append(lane)
            self._nursery.start_soon(self._run_lane, number, lane)

    async def _run_lane(self, number: int, lane: SendingLane) -> None:
        # Its end mark stands in the queue already, if the session ends before the thread begins.
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lane.run, limiter=self._limiter)
        except TemporaryError as error:
            await wait_for_last_word(error)
            raise
        self._session.streams.gone(number)

    def _sending_s(self, near: str) -> float:
        """How long lanes over a link stood in send calls, summed."""
        return sum(lane.sending_s for lane in self._by_link.get(near, []))

    def _observed(self, counters: Counters) -> None:
        self._count()
        if self._observe is not None:
            self._observe(counters)

    def _count(self) -> None:
        counters = self._counters
        counters.bytes_sent = sum(lane.bytes_sent for lane in self._lanes) + self._control.bytes_sent
        counters.bytes_payload = sum(lane.raw_bytes for lane in self._lanes)

    def _bottleneck(self) -> str:
        return self._chooser.reason

    def _stop(self) -> None:
        """Make every thread of this session end."""
        self._pool.close()
        self._session.reads.close()
        self._credit.close()
        self._units.close()
        self._leaving.close()
        if self._receipt is None:
            self._session.pacer.close()
            self._units.forget()
            self._units.end_lanes(MAX_STREAMS)
        self._offers.stop()

    # --- scan thread --------------------------------------------------------------------------------------------

    def _scanner(self) -> Scanner | SealedScanner:
        options, filters = self._session.options, FilterSet.from_wire(self._session.options.filters)
        if self._seal is None:
            return Scanner(
                self._selection,
                self._reader,
                self._pool,
                self._cache,
                filters=filters,
                xattrs=options.xattrs,
                owner=options.owner,
            )
        from flowengine.store.sealed_scan import SealedScanner  # few transfers need it

        return SealedScanner(
            self._selection,
            self._seal,
            self._session.profile,
            self._pool,
            filters=filters,
            xattrs=options.xattrs,
            owner=options.owner,
            pace=self._session.reads.spend,
            note=self._note,
        )

    def _note(self, line: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            self._notes.append(line)

    def _scan(self) -> None:
        options = self._session.options
        scanner = self._scanner()
        stage = self._session.clock.stage("read")
        recorder = ManifestRecorder(
            ManifestBuilder(
                None,
                Header(self._session.profile, xattrs=options.xattrs, owner=options.owner),
            )
        )
        events = scanner.events()
        gatherer = Gatherer()
        start, told = time.perf_counter_ns(), 0
        waited = 0
        complete = True
        try:
            self._show()
            for event in events:
                # Waiting for a free buffer is the network's or the target's doing, not the reader's.
                start = stage.since(start + self._pool.waited_ns - waited)
                waited = self._pool.waited_ns
                if self._session.halted and not (self._in_object and self._goes_on()):
                    self._cut_short([*gatherer.drop(), event], recorder)
                    complete = False
                    break
                if self._admit is not None:
                    self._admit(event)
                for one in gatherer.take(event) if self._session.subtrees else (event,):
                    self._post_event(one, recorder)
                start = time.perf_counter_ns()
                if start - told > _TOTALS_EVERY_NS:
                    told = start
                    self._count_scanned(scanner)
                    self._control.post(Totals(scanner.objects, scanner.size_bytes, False))
        except PoolClosed:
            return
        finally:
            events.close()  # type: ignore[attr-defined]
            for batch in gatherer.drop():
                BatchHold(batch).release()
            self._count_scanned(scanner)
        self._counters.scan_done = True
        self._summary = summary = recorder.finish()
        self._control.post(Totals(scanner.objects, scanner.size_bytes, True))
        self._control.post(
            Finish(
                summary.version_id,
                summary.objects,
                summary.size_bytes,
                complete and scanner.complete,
                self._session.checkpoint,
            )
        )

    def _count_scanned(self, scanner: Scanner | SealedScanner) -> None:
        """What was found and read so far, for whoever observes."""
        counters = self._counters
        counters.objects, counters.size_bytes = scanner.objects, scanner.size_bytes
        counters.objects_read, counters.bytes_read = scanner.objects_read, scanner.bytes_read

    def _show(self) -> None:
        """Show the manifest of the version that is given, where it is to be shown."""
        before: bytes | None = None
        for part in self._shown:
            if before is not None:
                self._control.wait_for_room(_PARTS_WAITING)
                self._control.post(ManifestPart(before, False))
            before = part
        if before is not None:
            self._control.post(ManifestPart(before, True))

    def _goes_on(self) -> bool:
        """Whether the large object that is being read is to be offered to its end, for all that is known now."""
        return b"/".join([*self._path, self._large_name]) not in self._refused

    def _cut_short(self, untold: list[Event], recorder: ManifestRecorder) -> None:
        """Offer nothing more: leave the folders that are open, as ones that were not read whole."""
        for event in untold:
            if isinstance(event, Batch):
                BatchHold(event).release()
            elif isinstance(event, LargePiece) and event.piece.buffer is not None:
                event.piece.buffer.release()
        why = self._session.halted
        if self._in_object:
            self._in_object = False
            recorder.large_end(keep=False)
            self._control.post(ObjectEnd(HALTED, why))
        self._failures.append((b".", HALTED, why))
        self._counters.objects_failed += 1
        self._control.post(Failed(b".", HALTED, why))
        for _ in range(len(self._path) + self._in_root):
            recorder.leave(0o755, 0, b"")
            self._control.post(DirectoryEnd(0o755, 0, b"", False, False))

    def _post_event(self, event: Event | Gathered, recorder: ManifestRecorder) -> None:
        post = self._control.post
        match event:
            case Gathered(folders=folders, blocks=blocks, batches=batches):
                self._control.wait_for_room()
                recorder.subtrees(folders, blocks)
                self._offers.make(SubtreesHold(batches, self._session.reads.spend), Subtrees(folders))
            case Batch():
                recorder.batch(event)
                offer = Offer(event.entries) if event.block is None else EncodedOffer(event.block.data)
                self._offers.make(BatchHold(event, self._session.reads.spend), offer)
            case LargePiece():
                recorder.large_chunks(event.piece.packed)
                hold = PieceHold(event.piece, self._large_path, self._session.reads.spend, self._large_left)
                if self._seal is None and self._offers.mostly_known:
                    hold.forget_bytes()
                self._offers.make(hold, ObjectRun(event.piece.packed))
            case LargeBegun(entry, path):
                self._large_path, self._large_name = path, entry.name
                self._large_left = LargeLeft()
                self._in_object = True
                recorder.large_begin(entry)
                post(ObjectBegin(entry))
            case LargeEnded(reason, message):
                self._in_object = False
                recorder.large_end(keep=not reason)
                post(ObjectEnd(reason, message))
            case DirectoryEntered(name, _):
                self._control.wait_for_room()
                if self._in_root:
                    self._path.append(name)
                self._in_root = True
                recorder.enter(name)
                post(DirectoryBegin(name))
            case DirectoryLeft(mode, mtime_ns, extra, complete, apply):
                if self._path:
                    self._path.pop()
                else:
                    self._in_root = False
                recorder.leave(mode, mtime_ns, extra)
                post(DirectoryEnd(mode, mtime_ns, extra, complete, apply))
            case ScanFailed(path, reason, message):
                self._failures.append((path, reason, message))
                self._counters.objects_failed += 1
                post(Failed(path, reason, message))

    # --- loop thread --------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async with contextlib.aclosing(self._control.receive(self._session.stall_s)) as batches:
            async for batch in batches:
                for message in batch:
                    self._handle(message)
                    if self._receipt is not None:
                        return
                self._offers.flush()
        raise ProtocolError(
            "the target closed the control connection without a receipt",
            hint="look at the target's own message; the same command continues where it stopped",
            reason="disconnected",
        )

    def _handle(self, message: Message | EncodedOffer) -> None:
        match message:
            case Want(kind, bitmap, finer, whole):
                self._offers.answer(kind, bitmap, finer, whole=whole)
            case Received(size_bytes):
                self._credit.give_back(size_bytes)
                self._unit_size.received(
                    size_bytes, len(self._session.streams), self._credit.window_bytes, time.perf_counter_ns()
                )
            case Rate(bits_per_s):
                self._asked_rate(bits_per_s)
            case LeaveStreams(numbers):
                self._session.end_streams(numbers)
            case Landed(objects, size_bytes):
                self._counters.objects_done, self._counters.bytes_done = objects, size_bytes
            case Progress():
                self._session.peer_progress = message
                if message.halt or message.unwanted:
                    self._leaving.unwanted(message.unwanted, all_of_it=bool(message.halt))
                if message.halt:
                    self._session.halt(message.halt[:1000])
                for name in ("objects_unchanged", "bytes_reused", "bytes_unchanged", "objects_deleted"):
                    setattr(self._counters, name, message.counters.get(name, 0))
            case Failed(path, reason, text):
                if reason == HALTED:
                    self._refused.add(path)
                self._failures.append((path, reason, text))
                self._counters.objects_failed += 1
            case Receipt():
                self._receipt = message
                self._session.peer_checkpoint = message.checkpoint
            case _:
                raise ProtocolError(
                    f"the target sent {type(message).__name__}, which only a source sends",
                    hint="check that both sides run compatible versions",
                )

    def _asked_rate(self, bits_per_s: int) -> None:
        """The target's own limit; a limit of this side holds besides it."""
        if bits_per_s < 0:
            raise ProtocolError(f"the target asked for a rate of {bits_per_s} bit/s")
        self._session.pacer.set_asked_rate(bits_per_s or None)

    # --- lane threads -------------------------------------------------------------------------------------------

    def _going(self, hold: UnitHold, run: Run) -> list[Run] | None:
        return self._leaving.parts(hold, run, halted=bool(self._session.halted))

    def _left_out(self, run: Run) -> None:
        """A halt keeps it here, and the target has not said what it thinks of it."""
        offer, index, count = run
        self._control.post(Lost(offer, index, count, HALTED, self._session.halted))

    def _lost(self, run: Run, gone: ChunkGone) -> None:
        offer, index, count = run
        self._control.post(Lost(offer, index, count, gone.reason, gone.message))
