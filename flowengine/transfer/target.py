"""The target's side of a session: it drives; what is not at hand it wants, and what arrives it lands.

Threads and their work: the loop receives control messages; the placer answers offers; lanes deliver; copiers take
what is at hand; the publisher makes durable and visible. They meet in `Landing`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import trio

from flowengine.errors import LocalError, ProtocolError, TemporaryError
from flowengine.manifest import Header, ManifestBuilder
from flowengine.store.atomic import AtomicTree
from flowengine.store.buffers import PoolClosed
from flowengine.store.filesystem import local_error, open_beneath, raise_descriptor_limit, sync_filesystem
from flowengine.store.index_log import IndexLog
from flowengine.store.landed import LandedManifest, index_exists
from flowengine.store.scan_cache import ScanCache
from flowengine.store.staging import Staging
from flowengine.transfer.control import wait_for_last_word
from flowengine.transfer.copying import Copier, DropJob
from flowengine.transfer.halting import halt_landing
from flowengine.transfer.landing import Landing
from flowengine.transfer.lanes import ReceivingLane
from flowengine.transfer.losing import lose
from flowengine.transfer.placement import Placement
from flowengine.transfer.placing import Placer
from flowengine.transfer.publishing import Publisher
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import MAX_OPEN_OFFERS, Counters, Observer, Session
from flowengine.transfer.streams import MAX_STREAMS
from flowengine.transfer.timing import bottleneck_line
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import (
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Failed,
    Finer,
    Finish,
    Lost,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Progress,
    Receipt,
    Totals,
    Want,
    WantStreams,
)
from flowengine.wire.records import Run, record_limit

if TYPE_CHECKING:
    from flowengine.store.chunk_index import ChunkIndex

__all__ = ["NOWHERE", "TargetOutcome", "TargetRoot", "run_target"]

MAX_QUEUED_MESSAGES: Final = 8192
"""Messages that may wait for the placer before no more are received."""
_COPIERS: Final = 2
_RUNS_AT_ONCE: Final = 1000
_HALT_GRACE_S: Final = 5.0
"""How long offers may still come that were on their way when the source was told to stop."""
NOWHERE: Final = b"/nonexistent/flow-nowhere"
"""A target that is not there, for a dry run that only looks."""


@dataclass
class TargetOutcome:
    """How a session ended at the target.

    Attributes:
        state: "completed", or "incomplete" when some objects failed or the source could not be read whole.
        failures: (path, reason, message), those reported by the source included.
        extras: what stands at the target and not at the source, as paths; deleted if that was asked for.
        bottleneck: the one line that says what limited the transfer.
    """

    state: str
    version_id: bytes
    failures: list[tuple[bytes, str, str]] = field(default_factory=list)
    extras: list[bytes] = field(default_factory=list)
    bottleneck: str = ""


@dataclass
class TargetRoot:
    """The directory that a transfer lands in.

    Attributes:
        path: absolute; made where missing, parents too.
        record: where the manifest of what landed is kept; None keeps none.
        sink: given the bytes of the manifest of what is offered, where there is no record.
        landed: told (path, size) of objects once they are durable under their names, in the publisher's thread. Not
            where the version is published at once: its objects have their names only when all of it has landed.
    """

    path: bytes
    record: LandedManifest | None = None
    sink: Callable[[bytes], object] | None = None
    landed: Callable[[list[tuple[bytes, int]]], None] | None = None


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
        self._caches = caches
        self._observe = observe
        self._started = trio.current_time()
        # What lies elsewhere below the root is worth remembering only where the scan cache is.
        self._remembers = caches[0] is not None and not options.dry_run
        self._index: ChunkIndex | None = None
        self._has_index = self._remembers and index_exists(root.path, session.profile.name)
        apply = None
        if options.xattrs or options.owner:
            from flowengine.store.attributes import apply_extra

            apply = apply_extra
        self._landing = Landing(
            staging,  # type: ignore[arg-type]  # a dry run never reaches it
            session.control,
            counters,
            session.clock,
            apply_extra=apply,
            pace=session.writes.spend,
        )
        self._publisher = Publisher(
            self._landing,
            root_fd,
            session.control,
            session.clock,
            caches[1],
            index_log=IndexLog(root.path, session.profile.name) if self._remembers else None,
            tell=root.landed if options.publish != "atomic" else None,
        )
        self._publisher.index_grew = self._index_grew
        self._settled = trio.Event()
        token = self._token = trio.lowlevel.current_trio_token()
        self._landing.settled = lambda: token.run_sync_soon(self._settled.set)
        if options.delete:
            filters = FilterSet.from_wire(options.filters)
            self._publisher.make_way = lambda directory, name: remove_tree(
                directory.fd, name, directory.child(name), filters
            )
        self._copier = Copier(self._landing, root_fd, session.clock)
        self._publisher.let_go = lambda large: self._copier.jobs.put(DropJob(large))
        sink = root.sink
        if root.record is not None and not options.dry_run:
            sink = root.record.begin()
        self._recorder = ManifestRecorder(
            ManifestBuilder(sink, Header(session.profile, xattrs=options.xattrs, owner=options.owner))
        )
        self._extras: list[tuple[bytes, list[bytes]]] = []
        placement = Placement(
            self._landing,
            self._copier,
            root_fd,
            session.profile,
            options,
            caches[0],
            counters,
            self._recorder,
            self._answer,
            open_index=self._open_index,
        )
        self._placer = Placer(
            placement,
            lambda path, names: self._extras.append((path, names)),
            folds_names=staging is not None and _folds_names(staging.fd),
        )
        self._inbox: queue.SimpleQueue[Message | EncodedOffer | None] = queue.SimpleQueue()
        self._finish: Finish | None = None
        self._source_failures: list[tuple[bytes, str, str]] = []
        self._lanes: list[ReceivingLane] = []
        self._by_link: dict[str, list[ReceivingLane]] = {}
        session.carried = lambda: {
            near: sum(lane.bytes_received for lane in lanes) for near, lanes in self._by_link.items()
        }
        self._concluded = False
        self._offers = 0
        self._answers = 0
        self._room = trio.Event()
        self._held = False
        self._halted_at: float | None = None
        session.told_to_halt = self._halt

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
            self._halt(session.halted)
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
                        nursery.start_soon(thread, self._place)
                        nursery.start_soon(self._until_concluded, self._listen)
                        nursery.start_soon(self._until_concluded, self._control.run_writer)
                        nursery.start_soon(session.heartbeat, self._counters, self._observed, lambda: "")
                        publisher_done = trio.Event()
                        nursery.start_soon(self._run_publisher, limiter, publisher_done)
                        try:
                            await self._settled.wait()
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
                    self._inbox.put(None)
                    self._placer.stop()
                    landing.stop()
                    for _ in range(_COPIERS):
                        self._copier.jobs.put(None)
        finally:
            landing.close()
            if self._index is not None and landing.index_is_wrong:
                self._index.drop()
            if outcome is None and self._root.record is not None and not self._session.options.dry_run:
                self._root.record.abandon()
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
        """Have the lanes' threads end: their sockets do, and nobody waits for a rate."""
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
                for message in batch:
                    self._handle(message)
                if self._inbox.qsize() > MAX_QUEUED_MESSAGES:
                    self._room, self._held = trio.Event(), True
                    if self._inbox.qsize() > MAX_QUEUED_MESSAGES // 2:
                        await self._room.wait()  # what is not received holds the source back
        if self._concluded:
            self._shut()  # a stream that the source never saw has no sealed end
        else:
            raise TemporaryError(
                "the source closed the control connection before it was done",
                hint="look at the source's own message; the same command continues where it stopped",
                reason="disconnected",
            )

    def _handle(self, message: Message | EncodedOffer) -> None:
        match message:
            case (
                EncodedOffer()
                | Offer()
                | Finer()
                | ObjectBegin()
                | ObjectRun()
                | ObjectEnd()
                | DirectoryBegin()
                | DirectoryEnd()
                | Finish()
            ):
                if isinstance(message, Finish):
                    self._session.peer_checkpoint = message.checkpoint
                if self._session.halted and isinstance(message, EncodedOffer | Offer | ObjectBegin):
                    self._check_halt()
                if isinstance(message, EncodedOffer | Offer | ObjectRun | Finer):
                    self._offers += 1
                    if self._offers - self._answers > MAX_OPEN_OFFERS:
                        raise ProtocolError("the source offers without waiting for answers")
                self._inbox.put(message)
            case Totals(objects, size_bytes, final):
                self._counters.objects, self._counters.size_bytes = objects, size_bytes
                self._counters.scan_done = final
            case Failed(path, reason, text):
                self._source_failures.append((path, reason, text))
                self._counters.objects_failed += 1
            case Lost(offer, index, count, reason, text):
                lose(self._landing, offer, index, count, reason, text)
            case Progress():
                if message.halt:
                    self._session.halt(message.halt[:1000])
                self._session.peer_progress = message
                self._session.told_changes(message.changes)
            case WantStreams(count, via) if self._session.streams.dial is not None:
                if not self._session.fixed_streams:
                    self._session.want_streams(min(count, MAX_STREAMS), via)
            case _:
                raise ProtocolError(
                    f"the source sent {type(message).__name__}, which only a target sends",
                    hint="check that both sides run compatible versions",
                )

    def _halt(self, why: str) -> None:
        """Let land what has begun to, and nothing else; the source is told what is not wanted any more."""
        if not self._session.options.dry_run:
            self._tell_unwanted(halt_landing(self._landing, why))
        self._session.halt_is_told = True
        self._control.post(Progress(self._counters.as_dict(), "", [], why))

    def _tell_unwanted(self, runs: list[Run]) -> None:
        for first in range(0, len(runs), _RUNS_AT_ONCE):
            self._control.post(
                Progress(self._counters.as_dict(), "", [], "", runs[first : first + _RUNS_AT_ONCE])
            )

    def _check_halt(self) -> None:
        """A source that was told to offer nothing more has a moment to hear it."""
        now = trio.current_time()
        if self._halted_at is None:
            self._halted_at = now
        elif now - self._halted_at > _HALT_GRACE_S:
            raise ProtocolError(
                f"the source goes on to offer after it was told to stop: {self._session.halted}"
            )

    def _answer(self, want: Want) -> None:
        self._answers += 1
        self._control.post(want)

    def _place(self) -> None:
        """Body of the placer's thread."""
        stage = self._session.clock.stage("place")
        halted = False
        while True:
            message = self._inbox.get()
            if message is None:
                return
            begin = perf_counter_ns()
            if isinstance(message, Finish):
                self._finished(message)
            elif not self._settled.is_set():  # a finer cut may still come for what has failed: too late
                if self._landing.halted and not halted:
                    # What was opened while the others were given up, too.
                    halted = True
                    self._tell_unwanted(halt_landing(self._landing, self._landing.halted))
                try:
                    self._placer.handle(message)
                except PoolClosed:
                    return
            if self._held and self._inbox.qsize() <= MAX_QUEUED_MESSAGES // 2:
                self._held = False
                self._token.run_sync_soon(self._room.set)
            stage.since(begin)

    def _finished(self, message: Finish) -> None:
        if not self._placer.root_is_left:
            raise ProtocolError("the source finished before it left the root directory")
        summary = self._recorder.finish()
        if (summary.version_id, summary.objects, summary.size_bytes) != (
            message.version_id,
            message.objects,
            message.size_bytes,
        ):
            raise ProtocolError(
                "what the source says it offered is not what arrived: the version ids differ",
                hint="update both sides to the same version; if that is so, report this as a bug",
            )
        self._finish = message
        self._landing.close_offering()

    # --- the end ------------------------------------------------------------------------------------------------

    def _conclude(self, tree: AtomicTree | None) -> TargetOutcome:
        """Everything landed or failed: delete what is to be deleted, make it durable, keep the manifest."""
        finish = self._finish
        assert finish is not None
        options, landing = self._session.options, self._landing
        extras = [path + b"/" + name if path else name for path, names in self._extras for name in names]
        failed = bool(self._source_failures or landing.failures)
        # A folder that was not read whole names no extras: that nothing was deleted in it must be said as well.
        if not options.dry_run and (
            (extras and (options.delete or tree is not None))
            or (options.delete and (failed or not finish.complete))
        ):
            refusal = self._why_not_delete(finish, failed)
            if refusal:
                landing.report(b".", "delete-refused", refusal)
            else:
                self._delete()
        # Both ends may have a word on one object; the source's comes first and is kept.
        told = {failure[0]: failure for failure in [*landing.failures, *self._source_failures]}
        failures = list(told.values())
        state = "completed" if not failures and finish.complete else "incomplete"
        if not options.dry_run:
            if tree is not None:
                if state == "completed":
                    tree.publish(None if self._placer.root_is_one_directory else 0o755)
            elif self._publisher.needs_final_sync or extras:
                sync_filesystem(self._root_fd)
            self._publisher.flush_index(last=True)
            for cache in self._caches:  # before the receipt: who runs the next command counts on it
                if cache is not None:
                    cache.flush()
            if self._root.record is not None:
                if state == "completed":
                    self._root.record.commit(beside=not self._placer.root_is_one_directory)
                else:
                    self._root.record.abandon()
        self._observed(self._counters)
        return TargetOutcome(state, finish.version_id, failures, extras, self._bottleneck())

    def _why_not_delete(self, finish: Finish, failed: bool) -> str:
        if not self._session.options.delete:
            return (
                "the target holds what the source does not have, and publishing at once replaces the whole folder: "
                "add --delete to agree, or publish object by object"
            )
        if not finish.objects:
            return "nothing was deleted: the source is empty, which is more often a mistake than a wish"
        if failed or not finish.complete:
            return "nothing was deleted: the source was not read whole, or some objects failed"
        return ""

    def _delete(self) -> None:
        filters = FilterSet.from_wire(self._session.options.filters)
        for path, names in self._extras:
            fd = (
                open_beneath(self._root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
                if path
                else os.dup(self._root_fd)
            )
            try:
                before = os.fstat(fd)
                for name in names:
                    try:
                        if remove_tree(fd, name, path + b"/" + name if path else name, filters):
                            self._counters.objects_deleted += 1
                    except OSError as error:
                        self._landing.report(
                            path + b"/" + name if path else name, "local", f"cannot delete: {error.strerror}"
                        )
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            finally:
                os.close(fd)

    def _bottleneck(self) -> str:
        source: dict[str, int] = {}
        threads = self._session.clock.threads()
        for name, value in self._session.peer_counters().items():
            if name.startswith("busy."):
                source[name[5:]] = value
            elif name.startswith("threads."):
                threads[name[8:]] = value
        return bottleneck_line(
            source, self._session.clock.busy_ms(), self._session.clock.elapsed_s(), threads
        )

    def _receipt(self, outcome: TargetOutcome) -> Receipt:
        return Receipt(
            outcome.version_id,
            outcome.state,
            self._counters.as_dict(),
            outcome.bottleneck,
            self._session.checkpoint,
        )


def remove_tree(parent_fd: int, name: bytes, path: bytes, filters: FilterSet) -> bool:
    """Remove a name and what is below it, but for what a filter hides; whether all of it is gone.

    Args:
        path: of the name, from the target's root, as filters see it.
    """
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent_fd)
        return True
    if not filters:
        shutil.rmtree(os.fsdecode(name), dir_fd=parent_fd)
        return True
    gone = True
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
    try:
        for below in [os.fsencode(item) for item in os.listdir(fd)]:
            is_dir = stat.S_ISDIR(os.stat(below, dir_fd=fd, follow_symlinks=False).st_mode)
            child = path + b"/" + below
            gone = filters.allows(child, is_dir) and remove_tree(fd, below, child, filters) and gone
    finally:
        os.close(fd)
    if gone:
        os.rmdir(name, dir_fd=parent_fd)
    return gone


def _folds_names(staging_fd: int) -> bool:
    """Whether the file system takes names of another case or Unicode form for the same."""
    probe, others = "s.probe-\u00e9", ("S.PROBE-\u00c9", "s.probe-e\u0301")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=staging_fd))
        try:
            for other in others:
                with contextlib.suppress(FileNotFoundError):
                    os.stat(other, dir_fd=staging_fd)
                    return True
            return False
        finally:
            os.unlink(probe, dir_fd=staging_fd)
    except OSError:
        return True  # a file system that refuses such names is not one to be trusted with them
