"""Where delivered chunks go: verified, written to every place that needs them, journalled.

Goal
    Nothing unverified is ever visible under its final name, and a small object costs a handful of system calls.
Plan
    Lanes call `deliver` with a record's plaintext. Every chunk is hashed against what was offered, then written: small
    objects whole, from the lane's buffer, to a staging file each; large ones into their journalled staging file. What
    is complete goes to the publisher (`transfer.publishing`).
Invariants
    - A chunk is accepted once, and only if it was wanted.
    - Whoever sees that nothing of a directory is open finds its end in the publisher's queue already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import resource
import threading
from collections.abc import Callable, Container, Iterator
from itertools import islice
from time import perf_counter_ns
from typing import Final

from blake3 import blake3

from flowengine.chunking import CHUNK_BYTES, ID_BYTES, chunk_id
from flowengine.chunking.fine import FINE_BYTES, fine_id, fine_lengths
from flowengine.errors import IntegrityError, ProtocolError
from flowengine.manifest import FILE, Entry
from flowengine.store.filesystem import local_error, process_umask
from flowengine.store.many import write_files
from flowengine.store.staging import Staging
from flowengine.transfer.control import Control
from flowengine.transfer.landing_blocks import deliver_block, wrong_chunk
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import (
    CLAIMED,
    NOT_WANTED,
    UNWANTED,
    WANTED,
    FineOffer,
    LargeObject,
    Location,
    Place,
    Refinement,
    RunOffer,
    Sink,
    SmallObject,
    SmallOffer,
    TargetDirectory,
    Waiter,
)
from flowengine.transfer.timing import Stage, StageClock
from flowengine.units import MIB
from flowengine.wire.messages import LARGE_OBJECT_BYTES, DirectoryEnd, Failed, Received
from flowengine.wire.records import Run

__all__ = ["Landing"]

_CHECKPOINT_BYTES: Final = 256 * 1024 * 1024
_RECENT_CHUNKS: Final = 200_000
_RECENT_STEP: Final = 10_000
_ACKNOWLEDGE_BYTES: Final = 4 * MIB
"""Credit goes back in steps of this size, a quarter of the least window: each message wakes both ends' loops."""
_MAX_BACKLOG: Final = 2048
"""Deliveries that may wait for the publisher before lanes wait too; `_MAX_OPEN_OBJECTS` bounds what is in them."""
_MAX_OPEN_OBJECTS: Final = 32_768
"""Objects that may be on their way before the placer takes no more offers."""
_TURN_S: Final = 0.02
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class Landing:
    """Delivery for one session at the target, and the account of what is open.

    Attributes:
        publishable: what is complete, for the publisher: (kind, directory, entry, staging name or sink); of kind
            "smalls" the last is a list of (entry, staging name), of kind "block" a block and the number of the staging
            file of its first file.
        turn: see `in_turn`.
        links: hard links that wait for their first name; kept by the publisher.
        closing: nothing more will be offered.
        halted: why no object may begin any more; empty while they may. Set by `transfer.halting`.
        settled: called once all that was opened has landed or failed.
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
        self._pace = pace
        self.staging = staging
        self.counters = counters
        self._control = control
        self._clock = clock
        self.apply_extra = apply_extra
        self.index_is_wrong = False
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)
        self._stopped = False
        self._unacknowledged = 0
        self.offers: dict[int, SmallOffer | RunOffer | FineOffer] = {}
        self.refining_bytes = 0
        self.inflight: dict[bytes, list[Waiter] | None] = {}
        self.recent: dict[bytes, Location] = {}
        self.directories: dict[bytes, TargetDirectory] = {}
        self.failures: list[tuple[bytes, str, str]] = []
        self.failed_paths: set[bytes] = set()
        # One thread takes from it: with several, a SimpleQueue's `get` with a timeout may wait for ever (see SendingLane).
        self.publishable: queue.SimpleQueue[tuple[str, TargetDirectory, Entry, object] | None] = (
            queue.SimpleQueue()
        )
        self.links: list[tuple[TargetDirectory, Entry]] = []
        self.closing = False
        self.halted = ""
        self.settled: Callable[[], None] = lambda: None
        self._open_objects = 0
        self.turn = threading.Lock()
        self._local = threading.local()
        self.sinks: set[Sink] = set()
        self._masked = process_umask() | 0o7000
        self._max_directories = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    # --- bookkeeping, any thread --------------------------------------------------------------------------------

    def opened(self, directory: TargetDirectory, name: bytes) -> None:
        """An object is on its way."""
        with self.lock:
            directory.open_names.add(name)
            self._open_objects += 1

    def open_whole(self, offer: SmallOffer, indexes: list[int], hints: Container[int]) -> list[int]:
        """Want entries of one chunk that is nowhere at hand; gives those that are wanted, and on their way, so.

        Args:
            hints: chunks of the offer that are known to lie elsewhere at the target.
        """
        entries, first, wanted, names = offer.entries, offer.first, offer.wanted, offer.directory.open_names
        whole: list[int] = []
        with self.lock:
            inflight, recent = self.inflight, self.recent
            for index in indexes:
                entry, chunk = entries[index], first[index]
                identity = entry.chunks[4:]
                if (
                    len(identity) == ID_BYTES
                    and identity not in inflight
                    and identity not in recent
                    and chunk not in hints
                    and entry.size < LARGE_OBJECT_BYTES
                ):
                    inflight[identity] = None
                    wanted[chunk] = WANTED
                    names.add(entry.name)
                    whole.append(index)
            self._open_objects += len(whole)
        return whole

    def opened_all(self, directory: TargetDirectory, names: list[bytes]) -> None:
        """Many objects are on their way; inside the lock."""
        directory.open_names.update(names)
        self._open_objects += len(names)

    def landed(self, objects: list[tuple[TargetDirectory, list[bytes]]]) -> None:
        """Objects that were open landed: per directory their names."""
        with self.lock:
            for directory, names in objects:
                before = len(directory.open_names)
                directory.open_names.difference_update(names)
                done = before - len(directory.open_names)
                self._open_objects -= done
                if done and directory.end is not None and not directory.open_names:
                    # Inside the lock: whoever sees that nothing is open finds this in the queue already.
                    self.publishable.put(("directory", directory, _NO_ENTRY, None))
            idle = self.closing and self._open_objects == 0
            self._room.notify_all()
        if self.links and objects:
            self.publishable.put(("links", objects[0][0], _NO_ENTRY, None))
        if idle and objects:
            self.settled()

    def close_offering(self) -> None:
        """Nothing more will be opened; `settled` is called once all that is open is done."""
        with self.lock:
            self.closing = True
            idle = self._open_objects == 0
        if idle:
            self.settled()

    def fail(self, directory: TargetDirectory, name: bytes, reason: str, message: str) -> None:
        """An open object will not land in this session."""
        self.report(directory.child(name), reason, message)
        self.done(directory, name)

    def report(self, path: bytes, reason: str, message: str) -> None:
        """Count and tell a failure; the object must not be open."""
        with self.lock:
            if path in self.failed_paths:
                return
            self.failed_paths.add(path)
            self.failures.append((path, reason, message))
            self.counters.objects_failed += 1
        self._control.post(Failed(path, reason, message))

    def done(self, directory: TargetDirectory, name: bytes) -> None:
        """An object that was open landed, failed, or was found to be right already."""
        with self.lock:
            if name not in directory.open_names:
                return
            directory.open_names.discard(name)
            self._open_objects -= 1
            if self._open_objects == _MAX_OPEN_OBJECTS:
                self._room.notify_all()
            if directory.end is not None and not directory.open_names:
                self.publishable.put(("directory", directory, _NO_ENTRY, None))
            idle = self.closing and self._open_objects == 0
        if self.links:  # one of them may have waited for just this
            self.publishable.put(("links", directory, _NO_ENTRY, None))
        if idle:
            self.settled()

    def directory_begun(self, directory: TargetDirectory) -> None:
        """A directory was entered; its parent stays open at least as long as it."""
        with self.lock:
            self.directories[directory.path] = directory
            if directory.parent is not None:
                # Names have no slash, so this cannot meet an object of the parent.
                directory.parent.open_names.add(directory.name + b"/")

    def directory_skipped(self, directory: TargetDirectory) -> None:
        """A directory that was entered holds nothing open and is not to be finished."""
        with self.lock:
            self.directories.pop(directory.path, None)
            parent = directory.parent
            if parent is not None:
                parent.open_names.discard(directory.name + b"/")
        if directory.fd >= 0:
            os.close(directory.fd)

    def directory_ended(self, directory: TargetDirectory, end: DirectoryEnd) -> None:
        """No more entries of this directory will be offered."""
        with self.lock:
            quiet = not directory.open_names and directory.is_as(end)
            if not quiet:
                directory.end = end
                if not directory.open_names:
                    self.publishable.put(("directory", directory, _NO_ENTRY, None))
        if quiet:  # there is nothing to make durable: no other thread need hear of it
            self.directory_skipped(directory)

    def directory_closed(self, directory: TargetDirectory) -> None:
        """A directory was finished; its descriptor is about to be closed."""
        with self.lock:
            self.directories.pop(directory.path, None)
            self._room.notify_all()

    def ready(self, kind: str, directory: TargetDirectory, entry: Entry, what: object) -> None:
        """Hand an object that is complete to the publisher."""
        self.publishable.put((kind, directory, entry, what))

    def stop(self) -> None:
        """Let the publisher end after what is queued, and nobody wait for it any more."""
        with self.lock:
            self._stopped = True
            self._room.notify_all()
        self.publishable.put(None)

    def wait_for_objects(self) -> None:
        """Hold the placer back while very many objects are open: tiny ones cost no credit, but each costs memory."""
        with self.lock:
            while self._open_objects > _MAX_OPEN_OBJECTS and not self._stopped:
                self._room.wait()

    def wait_for_directories(self, in_use: int) -> None:
        """Hold the placer back while too many directories are open: each costs a descriptor.

        Args:
            in_use: those that the placer itself is in; they are not waited for.
        """
        with self.lock:
            while len(self.directories) - in_use > self._max_directories and not self._stopped:
                self._room.wait()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let one thread at a time make small files, where that is quick.

        Each system call lets go of the interpreter; threads that do nothing else hand it to each other at every
        one, which costs more than the calls. Where calls are slow (a network file system) nobody waits long.
        """
        held = self.turn.acquire(timeout=_TURN_S)
        try:
            yield
        finally:
            if held:
                self.turn.release()

    # --- delivery, lane threads ---------------------------------------------------------------------------------

    def deliver(self, runs: list[Run], plain: memoryview, stored_bytes: int) -> None:
        """One record's chunks. Blocks while they are verified and written.

        Raises:
            ProtocolError, IntegrityError: the peer sent what was not wanted, or not what it offered.
            FlowError: the disk refused.
        """
        self._pace(len(plain))
        stages = self._stages()
        at = 0
        for number, first, total in runs:
            index, end = first, first + total
            while index < end or not total:  # at once, but where some of it is not wanted any more
                offer, count, wanted = self._claim(number, index, end - index)
                if not wanted:
                    at += sum(chunk_lengths(offer, index, count))
                elif isinstance(offer, FineOffer):
                    at += self._deliver_fine(offer, index, count, plain[at:], stages)
                else:
                    at += self._deliver_chunks(offer, index, count, plain[at:], stages)
                with self.lock:
                    offer.wanted[index : index + count] = bytes(count)
                    offer.open -= count
                    if not offer.open:
                        del self.offers[number]
                    # The publisher needs nothing from here, so waiting for it cannot stop it.
                    while self.publishable.qsize() > _MAX_BACKLOG and not self._stopped:
                        self._room.wait()
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
            self._control.post(Received(size_bytes))

    def _deliver_chunks(
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
            return self._deliver_small(offer, index, count, plain, stages)
        except OSError as error:
            name = offer.target.directory.path if isinstance(offer, RunOffer) else offer.directory.path
            raise local_error(error, "cannot write into", name or b".") from error

    def _claim(
        self, number: int, index: int, count: int
    ) -> tuple[SmallOffer | RunOffer | FineOffer, int, bool]:
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

    def _stages(self) -> tuple[Stage, Stage]:
        stages: tuple[Stage, Stage] | None = getattr(self._local, "stages", None)
        if stages is None:
            stages = self._local.stages = (self._clock.stage("verify"), self._clock.stage("write"))
        return stages

    def _verify(
        self, packed: bytes, index: int, plain: memoryview, at: int, directory: TargetDirectory, entry: Entry
    ) -> int:
        """Check one chunk at plain[at:]; its length."""
        start = index * CHUNK_BYTES
        length = int.from_bytes(packed[start : start + 4], "little")
        data = plain[at : at + length]
        if len(data) != length or chunk_id(data) != packed[start + 4 : start + CHUNK_BYTES]:
            raise wrong_chunk(directory, entry)
        return length

    def _deliver_run(
        self, offer: RunOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
    ) -> int:
        verify, write = stages
        target = offer.target
        packed = offer.packed
        begin = perf_counter_ns()
        size, start = 0, index * CHUNK_BYTES
        for length in offer.lengths[index : index + count]:
            end = size + length
            # A record that is too short gives a shorter slice, which has another hash.
            if chunk_id(plain[size:end]) != packed[start + 4 : start + CHUNK_BYTES]:
                raise wrong_chunk(target.directory, target.entry)
            size, start = end, start + CHUNK_BYTES
        begin = verify.since(begin)
        run = packed[index * CHUNK_BYTES : (index + count) * CHUNK_BYTES]
        location: Place | None = None
        if not target.failed:
            target.put(offer.offsets[index], plain[:size], run)
            where = target.directory.child(target.entry.name)
            location = (where, target.staged.name if target.staged else "", offer.offsets[index])
        self._arrived([(run, 0, location)], plain)
        write.since(begin)
        self.add(target, size)
        return size

    def _deliver_small(
        self, offer: SmallOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
    ) -> int:
        verify, write = stages
        if (
            offer.block is not None
            and not offer.sinks
            and not offer.block.mode_bits & self._masked
            and (files := offer.whole_files(index, count)) is not None
        ):
            return deliver_block(self, offer, offer.block.part(*files), index, plain, stages)
        with self.in_turn():
            begin = perf_counter_ns()
            parts = self._verify_small(offer, index, count, plain)
            begin = verify.since(begin)
            directory, entries, sinks = offer.directory, offer.entries, offer.sinks
            path, small_name = directory.path + b"/" if directory.path else b"", self.staging.small_name
            arrived: list[tuple[bytes, int, Place | None]] = []
            whole: list[tuple[Entry, str]] = []
            what: list[tuple[int, int, int, int]] = []
            at = 0
            for owner, number, chunks, size in parts:
                entry = entries[owner]
                packed = entry.chunks
                if chunks * CHUNK_BYTES != len(packed) or owner in sinks:
                    sink = self._small_sink(offer, owner)
                    before = sum(_lengths(packed[: number * CHUNK_BYTES]))
                    run = packed[number * CHUNK_BYTES : (number + chunks) * CHUNK_BYTES]
                    location: Place | None = None
                    if not sink.failed:
                        sink.put(before, plain[at : at + size], run)
                        location = path + entry.name, sink.staged, before
                    arrived.append((run, at, location))
                    self.add(sink, size)
                else:
                    staged = small_name()
                    whole.append((entry, staged))
                    what.append((at, size, entry.mode, entry.mtime_ns))
                    arrived.append((packed, at, (path + entry.name, staged, 0)))
                at += size
            complete = self._write_whole(directory, whole, what, plain)
            if complete:
                self.publishable.put(("smalls", directory, _NO_ENTRY, complete))
            self._arrived(arrived, plain)
            write.since(begin)
        return at

    def _write_whole(
        self,
        directory: TargetDirectory,
        whole: list[tuple[Entry, str]],
        what: list[tuple[int, int, int, int]],
        plain: memoryview,
    ) -> list[tuple[Entry, str]]:
        """Write objects to their staging files; gives those that could be given their attributes."""
        if not whole:
            return whole
        # The staging folder is this user's alone, so a file may have its own mode from the start.
        if not [entry for entry, _ in whole if entry.mode & self._masked or entry.extra]:
            write_files(self.staging.fd, [staged for _, staged in whole], what, plain)
            return whole
        complete: list[tuple[Entry, str]] = []
        for (entry, staged), (at, size, _, _) in zip(whole, what, strict=True):
            refused = self._write_small(staged, entry, plain[at : at + size])
            if refused:
                self.fail(directory, entry.name, "attributes", refused)
            else:
                complete.append((entry, staged))
        return complete

    def _verify_small(
        self, offer: SmallOffer, index: int, count: int, plain: memoryview
    ) -> list[tuple[int, int, int, int]]:
        """Check all chunks of a run: per object (which, its first chunk here, how many, their bytes)."""
        directory, entries, owners = offer.directory, offer.entries, offer.owners
        parts: list[tuple[int, int, int, int]] = []
        at = 0
        number, end = index, index + count
        while number < end:
            owner = owners[number]
            entry = entries[owner]
            packed = entry.chunks
            if len(packed) == CHUNK_BYTES:
                data = plain[at : at + entry.size]
                if len(data) != entry.size or blake3(data).digest() != packed[4:]:
                    raise wrong_chunk(directory, entry)
                parts.append((owner, 0, 1, entry.size))
                at += entry.size
                number += 1
                continue
            first = number - offer.first[owner]
            chunks = min(end - number, len(packed) // CHUNK_BYTES - first)
            size = 0
            for chunk in range(first, first + chunks):
                size += self._verify(packed, chunk, plain, at + size, directory, entry)
            parts.append((owner, first, chunks, size))
            at += size
            number += chunks
        return parts

    def _deliver_fine(
        self, offer: FineOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
    ) -> int:
        verify, _ = stages
        packed = offer.packed
        begin = perf_counter_ns()
        at = 0
        arrived: dict[int, int] = {}
        for number in range(index, index + count):
            start = number * FINE_BYTES
            length = int.from_bytes(packed[start : start + 4], "little")
            data = plain[at : at + length]
            owner = offer.owners[number]
            if len(data) != length or fine_id(data) != packed[start + 4 : start + FINE_BYTES]:
                raise IntegrityError(
                    "a fine chunk does not have the hash it was offered with",
                    hint="nothing of it was used; if it repeats, the source's memory or disk is faulty, or it lies",
                )
            offset = offer.offsets[number]
            offer.refinements[owner].buffer[offset : offset + length] = data
            arrived[owner] = arrived.get(owner, 0) + length
            at += length
        verify.since(begin)
        with self.lock:
            for owner, size in arrived.items():
                offer.refinements[owner].remaining -= size
            whole = [offer.refinements[owner] for owner in arrived if not offer.refinements[owner].remaining]
        for refinement in whole:
            self.finish_refinement(refinement)
        return at

    def refine(self, size_bytes: int) -> None:
        """So many bytes more (or less) of chunks are being put together from fine ones."""
        with self.lock:
            self.refining_bytes += size_bytes

    def finish_refinement(self, refinement: Refinement) -> None:
        """A chunk was put together from fine ones: from here on it is one that arrived.

        Raises:
            IntegrityError: it does not have the hash that the chunk was offered with.
            FlowError: the disk refused.
        """
        offer, index = refinement.offer, refinement.index
        self._deliver_chunks(offer, index, 1, refinement.buffer, self._stages())
        with self.lock:
            self.drop_refinement(refinement)

    def drop_refinement(self, refinement: Refinement) -> None:
        """Forget a refinement; inside the lock."""
        offer = refinement.offer
        refinement.buffer = memoryview(b"")
        refinement.dead = True
        self.refining_bytes -= refinement.size_bytes
        offer.wanted[refinement.index] = NOT_WANTED
        offer.open -= 1
        if not offer.open:
            self.offers.pop(refinement.number, None)

    def place_small(self, directory: TargetDirectory, entry: Entry, data: bytes) -> None:
        """Land a small object that is open with bytes that were found at the target and verified."""
        view = memoryview(data)
        staged = self.staging.small_name()
        try:
            refused = self._write_small(staged, entry, view)
        except OSError as error:
            raise local_error(error, "cannot write into", directory.path or b".") from error
        self._arrived([(entry.chunks, 0, (directory.child(entry.name), staged, 0))], view)
        self.counters.bytes_reused += len(view)
        if refused:
            self.fail(directory, entry.name, "attributes", refused)
        else:
            self.publishable.put(("small", directory, entry, staged))

    def _small_sink(self, offer: SmallOffer, owner: int) -> SmallObject:
        """The staging file of a small object whose chunks arrive apart; made by the first of them."""
        with self.lock:
            sink = offer.sinks.get(owner)
            if sink is None:
                sink = offer.sinks[owner] = SmallObject(offer.directory, offer.entries[owner], self.staging)
                self.sinks.add(sink)
            return sink

    def _write_small(self, staged: str, entry: Entry, data: memoryview) -> str:
        """Write a whole small object to its staging file; what the system refused of its attributes."""
        fd = os.open(staged, _CREATE, 0o600, dir_fd=self.staging.fd)
        try:
            done = os.write(fd, data)
            while done < len(data):
                done += os.write(fd, data[done:])
            return self.dress(fd, entry)
        finally:
            os.close(fd)

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

    def _arrived(self, items: list[tuple[bytes, int, Place | None]], plain: memoryview) -> None:
        """Chunks are here: remember where, and write them to whoever else waits for them.

        Args:
            items: (packed chunks, where they begin in `plain`, where they were put; None for nowhere).
        """
        waiting: list[tuple[list[Waiter], int, int, bytes]] = []
        with self.lock:
            inflight, recent = self.inflight, self.recent
            for packed, at, location in items:
                if len(packed) == CHUNK_BYTES:
                    identity = packed[4:]
                    waiters = inflight.pop(identity, None)
                    if waiters:
                        waiting.append((waiters, at, int.from_bytes(packed[:4], "little"), packed))
                    if location is not None:
                        recent[identity] = location
                    continue
                path, staged, offset = location or (b"", "", 0)
                place = offset - at
                for start in range(0, len(packed), CHUNK_BYTES):
                    identity = packed[start + 4 : start + CHUNK_BYTES]
                    if location is not None:
                        recent[identity] = (path, staged, place + at)
                    waiters = inflight.pop(identity, None)
                    length = int.from_bytes(packed[start : start + 4], "little")
                    if waiters:
                        waiting.append((waiters, at, length, packed[start : start + CHUNK_BYTES]))
                    at += length
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
        assert sink.remaining >= 0
        if complete:
            self._complete(sink)
        elif isinstance(sink, LargeObject) and sink.unsynced >= _CHECKPOINT_BYTES:
            sink.unsynced = 0
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
            os.close(sink.fd)
            self.disown(sink)
            if refused:
                self.fail(sink.directory, sink.entry.name, "attributes", refused)
            else:
                self.publishable.put(("small", sink.directory, sink.entry, sink.staged))
        else:
            self.publishable.put(("large", sink.directory, sink.entry, sink))

    def lose(self, number: int, index: int, count: int, reason: str, message: str) -> None:
        """The source cannot serve chunks that were wanted: their objects, and all that wait for them, fail."""
        offer = self.offers.get(number)
        if offer is None or index < 0 or count < 1 or index + count > len(offer.wanted):
            raise ProtocolError(f"the source gave up chunks of offer {number}, which is not open")
        victims: list[Sink] = []
        names: list[tuple[TargetDirectory, bytes]] = []
        with self.lock:
            for chunk in range(index, index + count):
                mark = offer.wanted[chunk]
                if mark not in (WANTED, UNWANTED):
                    continue
                offer.wanted[chunk] = NOT_WANTED
                offer.open -= 1
                if mark == UNWANTED:
                    continue
                if not isinstance(offer, FineOffer):
                    self._lose_chunk(offer, chunk, victims, names)
                    continue
                refinement = offer.refinements[offer.owners[chunk]]
                if not refinement.dead:
                    self._lose_chunk(refinement.offer, refinement.index, victims, names)
                    self.drop_refinement(refinement)
            if not offer.open:
                self.offers.pop(number, None)
        for sink in victims:
            self.fail_sink(sink, reason, message)
        for directory, name in names:
            self.fail(directory, name, reason, message)

    def _lose_chunk(
        self,
        offer: SmallOffer | RunOffer,
        chunk: int,
        victims: list[Sink],
        names: list[tuple[TargetDirectory, bytes]],
    ) -> None:
        """Who needs a chunk that will not come; inside the lock."""
        if isinstance(offer, RunOffer):
            packed, at = offer.packed, chunk
            victims.append(offer.target)
        else:
            owner = offer.owners[chunk]
            packed, at = offer.entries[owner].chunks, chunk - offer.first[owner]
            if owner in offer.sinks:
                victims.append(offer.sinks[owner])
            else:
                names.append((offer.directory, offer.entries[owner].name))
        identity = packed[at * CHUNK_BYTES + 4 : (at + 1) * CHUNK_BYTES]
        victims += [sink for sink, _ in self.inflight.pop(identity, None) or []]

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


_NO_ENTRY: Final = Entry(b"-", FILE, 0, 0)


def chunk_lengths(offer: SmallOffer | RunOffer | FineOffer, index: int, count: int) -> list[int]:
    """The sizes of some chunks of an offer."""
    if isinstance(offer, RunOffer):
        return offer.lengths[index : index + count]
    if isinstance(offer, FineOffer):
        return fine_lengths(offer.packed[index * FINE_BYTES : (index + count) * FINE_BYTES])
    if offer.block is not None:
        return offer.lengths[index : index + count]
    found: list[int] = []
    for chunk in range(index, index + count):
        owner = offer.owners[chunk]
        found += _lengths(offer.entries[owner].chunks)[chunk - offer.first[owner] :][:1]
    return found


def _lengths(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES)]
