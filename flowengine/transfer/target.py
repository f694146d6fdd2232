"""The target's side of a session: it drives; what is not at hand it wants, and what arrives it lands.

Goal
    One session from its first stream to the receipt, whatever ends it.
Plan
    Threads and their work: the loop receives control messages (`transfer.hearing`); the placer answers offers; lanes
    deliver; copiers take what is at hand; the publisher makes durable and visible. They meet in `Landing`. The end is
    `transfer.concluding`. Here they are put together, started, and brought to their ends.
Invariants
    - No thread is left behind: each ends by its queue or its socket, also when the session is cancelled.
    - A dry run touches nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from flowengine.errors import LocalError, TemporaryError
from flowengine.machine import usable_processors
from flowengine.manifest import Header, ManifestBuilder
from flowengine.store.atomic import AtomicTree
from flowengine.store.filesystem import folds_names, local_error, raise_descriptor_limit
from flowengine.store.index_log import IndexLog
from flowengine.store.landed import LandedManifest, index_exists
from flowengine.store.scan_cache import ScanCache, state_directory
from flowengine.store.staging import Staging
from flowengine.transfer.concluding import Conclusion, TargetOutcome, remove_tree
from flowengine.transfer.control import wait_for_last_word
from flowengine.transfer.copying import Copier, DropJob
from flowengine.transfer.hearing import Hearing
from flowengine.transfer.landing import Landing
from flowengine.transfer.lanes import ReceivingLane
from flowengine.transfer.placement import Placement
from flowengine.transfer.placing import Placer
from flowengine.transfer.publishing import Publisher
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.streams import MAX_STREAMS
from flowengine.transfer.vouched import VouchedRecorder
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import Receipt
from flowengine.wire.records import record_limit

if TYPE_CHECKING:
    from flowengine.store.chunk_index import ChunkIndex

__all__ = ["NOWHERE", "TargetOutcome", "TargetRoot", "run_target"]

_COPIERS: Final = max(2, min(8, usable_processors()))
"""Each reads, hashes and writes for an object of its own, where several are copied."""
NOWHERE: Final = b"/nonexistent/flow-nowhere"
"""A target that is not there, for a dry run that only looks."""


@dataclass
class TargetRoot:
    """The directory that a transfer lands in.

    Attributes:
        path: absolute; made where missing, parents too.
        record: where the manifest of what landed is kept; None keeps none.
        sink: given the bytes of the manifest of what is offered, where there is no record.
        landed: told (path, size) of objects once they are durable under their names, in the publisher's thread. Not
            where the version is published at once: its objects have their names only when all of it has landed.
        version: take this version, of which the source shows the manifest, or nothing; empty: whatever is offered.
    """

    path: bytes
    record: LandedManifest | None = None
    sink: Callable[[bytes], object] | None = None
    landed: Callable[[list[tuple[bytes, int]]], None] | None = None
    version: bytes = b""


async def run_target(
    session: Session,
    root: TargetRoot,
    *,
    caches: tuple[ScanCache | None, ScanCache | None],
    counters: Counters,
    observe: Observer | None = None,
) -> TargetOutcome:
    """Land one session.

    Args:
        session: established; its sockets are closed at the end.
        root: where to.
        caches: two connections to the scan cache, one for the placer's thread, one for the publisher's.
        counters: updated as things happen.
        observe: called twice a second.

    Raises:
        TemporaryError: the session broke, the disk is full or the target is busy; another session continues.
        FlowError: as the peer or the local system says.
    """
    raise_descriptor_limit()
    await session.streams.wait_first()  # until then it is a request like any other, and touches nothing
    options = session.options
    dry = options.dry_run
    tree = AtomicTree(root.path, caches[1]) if options.publish == "atomic" and not dry else None
    root_fd = -1
    staging: Staging | None = None
    try:
        if tree is not None:
            await trio.to_thread.run_sync(tree.prepare)
        path = tree.path if tree is not None else root.path
        root_fd = _open_root(path, make=not dry)
        if not dry:
            staging = Staging(root_fd, path)
        target = _Target(session, root, root_fd, staging, caches, counters, observe)
        outcome = await target.run(tree)
        if staging is not None:
            staging.close(remove=outcome.state == "completed" and tree is None)
            staging = None
        return outcome
    finally:
        for cache in caches:
            if cache is not None:
                cache.flush()
        if staging is not None:
            staging.close(remove=False)
        if tree is not None:
            tree.close()
        session.streams.close()
        if root_fd >= 0:
            os.close(root_fd)


def _open_root(path: bytes, *, make: bool) -> int:
    try:
        if make:
            os.makedirs(path, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        if make:
            raise local_error(error, "cannot make the target", path) from error
        return -1
    except (FileExistsError, NotADirectoryError):
        raise LocalError(
            f"the target {show_path(path)} is not a folder",
            hint="choose another target, or remove what is there",
        ) from None
    except OSError as error:
        raise local_error(error, "cannot open the target", path) from error


class _Target:
    def __init__(
        self,
        session: Session,
        root: TargetRoot,
        root_fd: int,
        staging: Staging | None,
        caches: tuple[ScanCache | None, ScanCache | None],
        counters: Counters,
        observe: Observer | None,
    ) -> None:
        options = session.options
        self._session = session
        self._control = session.control
        self._root = root
        self._root_fd = root_fd
        self._counters = counters
        self._observe = observe
        # What lies elsewhere below the root is worth remembering only where the scan cache is.
        self._remembers = caches[0] is not None and not options.dry_run
        self._index: ChunkIndex | None = None
        self._has_index = self._remembers and index_exists(root.path, session.profile.name)
        self._landing = self._make_landing(staging)
        self._publisher = self._make_publisher(caches[1])
        self._copier = Copier(self._landing, root_fd, session.clock)
        self._publisher.let_go = lambda large: self._copier.jobs.put(DropJob(large))
        self._conclusion = Conclusion(session, root.record, root_fd, caches, self._landing, self._publisher)
        sink = root.sink
        if root.record is not None and not options.dry_run:
            sink = root.record.begin()
        builder = ManifestBuilder(sink, Header(session.profile, xattrs=options.xattrs, owner=options.owner))
        recorder = self._recorder = (
            VouchedRecorder(builder, root.version, state_directory())
            if root.version
            else ManifestRecorder(builder)
        )
        self._hearing = Hearing(session, self._landing, recorder)
        placement = Placement(
            self._landing,
            self._copier,
            root_fd,
            session.profile,
            options,
            caches[0],
            counters,
            recorder,
            self._hearing.answer,
            open_index=self._open_index,
        )
        self._placer = Placer(
            placement,
            lambda path, names: self._conclusion.extras.append((path, names)),
            folds_names=staging is not None and folds_names(staging.fd),
        )
        self._lanes: list[ReceivingLane] = []
        self._by_link: dict[str, list[ReceivingLane]] = {}
        session.carried = lambda: {
            near: sum(lane.bytes_received for lane in lanes) for near, lanes in self._by_link.items()
        }
        self._concluded = False

    def _make_landing(self, staging: Staging | None) -> Landing:
        session = self._session
        apply = None
        if session.options.xattrs or session.options.owner:
            from flowengine.store.attributes import apply_extra

            apply = apply_extra
        return Landing(
            staging,  # type: ignore[arg-type]  # a dry run never reaches it
            session.control,
            self._counters,
            session.clock,
            apply_extra=apply,
            pace=session.writes.spend,
        )

    def _make_publisher(self, cache: ScanCache | None) -> Publisher:
        session, root = self._session, self._root
        publisher = Publisher(
            self._landing,
            self._root_fd,
            session.control,
            session.clock,
            cache,
            index_log=IndexLog(root.path, session.profile.name) if self._remembers else None,
            tell=root.landed if session.options.publish != "atomic" else None,
        )
        publisher.memory.index_grew = self._index_grew
        if session.options.delete:
            filters = FilterSet.from_wire(session.options.filters)
            publisher.make_way = lambda directory, name: remove_tree(
                directory.fd, name, directory.child(name), filters
            )
        return publisher

    def _open_index(self) -> ChunkIndex | None:
        """The chunk index of the target root, if it has one; loaded when first needed, because numpy takes its time."""
        if self._index is None and self._has_index:
            from flowengine.store.chunk_index import ChunkIndex

            self._index = ChunkIndex(self._root.path, self._session.profile.name)
        return self._index

    def _index_grew(self) -> None:
        self._has_index = True
        if self._index is not None:
            self._index.stale = True

    async def run(self, tree: AtomicTree | None) -> TargetOutcome:
        session, landing = self._session, self._landing
        if session.halted:
            self._hearing.halt(session.halted)
        limiter = trio.CapacityLimiter(MAX_STREAMS + _COPIERS + 2)
        outcome: TargetOutcome | None = None

        async def thread(body: Callable[[], None]) -> None:
            await trio.to_thread.run_sync(body, limiter=limiter)

        try:
            async with trio.open_nursery() as nursery:
                try:
                    async with trio.open_nursery() as lanes:
                        nursery.start_soon(self._join_lanes, lanes, limiter)
                        for _ in range(_COPIERS):
                            nursery.start_soon(thread, self._copier.run)
                        nursery.start_soon(self._shut_when_cancelled)
                        nursery.start_soon(thread, partial(self._hearing.place, self._placer))
                        nursery.start_soon(self._until_concluded, self._listen)
                        nursery.start_soon(self._until_concluded, self._control.run_writer)
                        nursery.start_soon(session.heartbeat, self._counters, self._observed, lambda: "")
                        publisher_done = trio.Event()
                        nursery.start_soon(self._run_publisher, limiter, publisher_done)
                        try:
                            await self._hearing.settled.wait()
                            landing.stop()
                            await publisher_done.wait()
                            outcome = await trio.to_thread.run_sync(self._conclude, tree, limiter=limiter)
                        except BaseException:
                            self._shut()  # or this nursery would wait for its lanes for ever
                            raise
                        self._concluded = True
                        self._control.post(self._receipt(outcome))
                        # The source answers the receipt with a sealed end on every stream; the lanes end by that.
                    self._control.finish_writing()
                    nursery.cancel_scope.cancel()
                except BaseException:
                    self._shut()
                    raise
                finally:
                    self._hearing.stop()
                    self._placer.stop()
                    landing.stop()
                    self._copier.jobs.end()
        finally:
            landing.close()
            self._recorder.close()
            if self._index is not None and landing.index_is_wrong:
                self._index.drop()
            if outcome is None and self._root.record is not None and not self._session.options.dry_run:
                self._root.record.abandon()
            self._copier.close()  # last: closing old files may fail, and nothing else waits for it
        assert outcome is not None
        return outcome

    def _observed(self, counters: Counters) -> None:
        self._landing.acknowledge()  # what is too little to be told at once is told with the progress
        counters.bytes_sent = sum(lane.bytes_received for lane in self._lanes) + self._control.bytes_received
        if self._observe is not None:
            self._observe(counters)

    async def _join_lanes(self, lanes: trio.Nursery, limiter: trio.CapacityLimiter) -> None:
        """Start a lane on every data connection that comes, until all has landed."""
        session = self._session
        limit = record_limit(session.profile.maximum)
        while not self._concluded:
            number, sock = await session.streams.next()
            if not self._concluded:
                lane = ReceivingLane(
                    sock, session.opener(number), limit, self._landing.deliver, session.clock
                )
                self._lanes.append(lane)
                self._by_link.setdefault(session.streams.near(number), []).append(lane)
                lanes.start_soon(self._lane, number, lane, limiter)

    async def _lane(self, number: int, lane: ReceivingLane, limiter: trio.CapacityLimiter) -> None:
        """Run a lane's thread; when it fails, wake the other lanes, which nothing else can."""
        try:
            await trio.to_thread.run_sync(lane.run, limiter=limiter)
            self._session.streams.gone(number)
        except TemporaryError as error:
            self._shut()
            if not self._concluded:  # all has landed: a source that leaves without a word does no harm
                await wait_for_last_word(error)
                raise
        except BaseException:
            self._shut()
            raise

    def _shut(self) -> None:
        """Have the lanes' threads end: their sockets do, and nobody waits for a rate or for the publisher."""
        self._landing.let_go()
        self._session.writes.close()
        self._session.streams.shut()

    async def _shut_when_cancelled(self) -> None:
        """Threads cannot be cancelled: they end because their sockets do."""
        try:
            await trio.sleep_forever()
        finally:
            self._shut()

    async def _until_concluded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a part of the control connection, which the source may drop once it has the receipt."""
        try:
            await work()
        except TemporaryError:
            if not self._concluded:
                raise

    async def _run_publisher(self, limiter: trio.CapacityLimiter, done: trio.Event) -> None:
        await trio.to_thread.run_sync(self._publisher.run, limiter=limiter)
        done.set()

    # --- control ------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async with contextlib.aclosing(self._control.receive(self._session.stall_s)) as batches:
            async for batch in batches:
                await self._hearing.take(batch)
        if self._concluded:
            self._shut()  # a stream that the source never saw has no sealed end
        else:
            raise TemporaryError(
                "the source closed the control connection before it was done",
                hint="look at the source's own message; the same command continues where it stopped",
                reason="disconnected",
            )

    # --- the end ------------------------------------------------------------------------------------------------

    def _conclude(self, tree: AtomicTree | None) -> TargetOutcome:
        finish = self._hearing.finish
        assert finish is not None
        outcome = self._conclusion.reach(tree, self._placer, finish, self._hearing.source_failures)
        self._observed(self._counters)
        return outcome

    def _receipt(self, outcome: TargetOutcome) -> Receipt:
        return Receipt(
            outcome.version_id,
            outcome.state,
            self._counters.as_dict(),
            outcome.bottleneck,
            self._session.checkpoint,
        )
