"""Where delivered chunks go: verified, written to every place that needs them, journalled, synced, published.

Goal
    Nothing unverified is ever visible under its final name, nothing is called landed before it is durable, and a
    small object costs a handful of system calls.
Plan
    Lanes call `deliver` with a record's plaintext. Every chunk is hashed against what was offered, then written: small
    objects whole, from the lane's buffer, to a staging file each; large ones into their journalled staging file. What
    is complete goes to the publisher thread, which works in batches: sync data, rename, sync directories, report.
Invariants
    - A chunk is accepted once, and only if it was wanted.
    - `Landed` counts only what was synced before and after its rename.
    - A directory gets its mode and mtime after the last object in it was published.
"""

from __future__ import annotations

import errno
import os
import queue
import resource
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from flowengine.chunking import CHUNK_BYTES, chunk_id
from flowengine.errors import IntegrityError, ProtocolError
from flowengine.manifest import FILE, SYMLINK, Entry
from flowengine.store.filesystem import local_error, open_beneath, sync_filesystem
from flowengine.store.scan import encode_entries, stats_proof
from flowengine.store.scan_cache import DirectoryPart, Identity, ScanCache
from flowengine.store.staging import StagedObject, Staging
from flowengine.transfer.basis import Basis
from flowengine.transfer.control import Control
from flowengine.transfer.session import Counters
from flowengine.transfer.timing import Stage, StageClock
from flowengine.units import show_path
from flowengine.wire.messages import LARGE_OBJECT_BYTES, DirectoryEnd, Failed, Landed, Received
from flowengine.wire.records import Run

if TYPE_CHECKING:
    from flowengine.store.chunk_index import ChunkIndex

__all__ = ["Landing", "LargeObject", "RunOffer", "Sink", "SmallObject", "SmallOffer", "TargetDirectory"]

_BATCH_OBJECTS: Final = 2048
_BATCH_BYTES: Final = 8 * 1024 * 1024
"""What is written and not published when the process dies is sent again: keep it little."""
_BATCH_WAIT_S: Final = 0.05
_SYNC_EACH: Final = 8
"""Up to so many files of a batch are synced one by one; more of them with one syncfs."""
_CHECKPOINT_BYTES: Final = 256 * 1024 * 1024
_RECENT_CHUNKS: Final = 200_000
_WANTED: Final = 1
_CLAIMED: Final = 2
_MAX_BACKLOG: Final = 16_384
"""Objects that may wait for the publisher before lanes wait too."""
_MAX_OPEN_OBJECTS: Final = 32_768
"""Objects that may be on their way before the placer takes no more offers."""
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_INDEX_CHUNKS: Final = 50_000
_INDEX_LEAST: Final = 16


class TargetDirectory:
    """One directory at the target while objects of it are on their way."""

    __slots__ = (
        "created", "end", "entries", "existing", "fd", "keys", "known", "last_name", "linked", "name", "offered", "open_names", "parent", "path",
        "rows", "unchanged_all",
    )  # fmt: skip

    def __init__(
        self, path: bytes, name: bytes, fd: int, parent: TargetDirectory | None, *, created: bool
    ) -> None:
        self.path = path
        self.name = name
        self.fd = fd
        self.parent = parent
        self.created = created
        self.existing: dict[bytes, os.stat_result] = {}
        self.known: dict[bytes, Entry] = {}
        self.open_names: set[bytes] = set()
        self.end: DirectoryEnd | None = None
        self.rows: list[tuple[bytes, os.stat_result, Entry]] = []
        self.offered: set[bytes] | None = None
        self.keys: dict[bytes, bytes] | None = None
        self.linked = False
        self.last_name = b""
        self.unchanged_all = True
        self.entries = 0

    def child(self, name: bytes) -> bytes:
        """The path of an entry, from the target's root."""
        return self.path + b"/" + name if self.path else name


class Sink:
    """Something that chunks are put into; complete when `remaining` is 0 and nothing more will be offered."""

    __slots__ = ("directory", "entry", "failed", "remaining", "sealed")

    def __init__(self, directory: TargetDirectory, entry: Entry, remaining: int) -> None:
        self.directory = directory
        self.entry = entry
        self.remaining = remaining
        self.sealed = True
        self.failed = False

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        """Write verified bytes."""
        raise NotImplementedError


class SmallObject(Sink):
    """A small object of which chunks arrive apart. Its staging file is made by the first of them."""

    __slots__ = ("_lock", "fd", "staged", "staging")

    def __init__(self, directory: TargetDirectory, entry: Entry, staging: Staging) -> None:
        super().__init__(directory, entry, entry.size)
        self.staging = staging
        self.staged = staging.small_name()
        self.fd = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make the staging file, if it is not there yet."""
        with self._lock:
            if self.fd < 0:
                self.fd = os.open(
                    self.staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.staging.fd
                )

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        self.open()
        _write_all(self.fd, data, offset)


class LargeObject(Sink):
    """A large object in its staging file."""

    __slots__ = ("basis", "position", "same_until", "staged", "unsynced")

    def __init__(self, directory: TargetDirectory, entry: Entry) -> None:
        super().__init__(directory, entry, entry.size)
        self.sealed = False
        self.staged: StagedObject | None = None
        self.position = 0
        self.same_until: list[tuple[int, bytes]] = []
        self.unsynced = 0
        self.basis: Basis | None = None

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        assert self.staged is not None
        _write_all(self.staged.fd, data, offset)
        self.staged.journal(offset, packed)
        self.unsynced += len(data)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


@dataclass(slots=True)
class RunOffer:
    """An offered run of a large object, as far as it is wanted."""

    target: LargeObject
    packed: bytes
    offsets: list[int]
    wanted: bytearray
    open: int


class SmallOffer:
    """An offered batch of small objects, as far as it is wanted."""

    __slots__ = ("directory", "entries", "first", "open", "owners", "sinks", "wanted")

    def __init__(self, directory: TargetDirectory, entries: list[Entry]) -> None:
        self.directory = directory
        self.entries = entries
        self.owners: list[int] = []
        self.first: list[int] = []
        for index, entry in enumerate(entries):
            self.first.append(len(self.owners))
            count = len(entry.chunks) // CHUNK_BYTES
            self.owners += [index] * count if count != 1 else (index,)
        self.wanted = bytearray(len(self.owners))
        self.open = 0
        self.sinks: dict[int, SmallObject] = {}


Waiter = tuple[Sink, int]
Location = tuple[bytes, str, int]
"""(final path, staging name, offset): where a chunk that arrived in this session can be read."""


class Landing:
    """Delivery and publication for one session at the target."""

    def __init__(
        self,
        staging: Staging,
        root_fd: int,
        control: Control,
        counters: Counters,
        clock: StageClock,
        cache: ScanCache | None,
        *,
        apply_extra: Callable[[int, bytes], None] | None,
        open_index: Callable[[], ChunkIndex] | None = None,
    ) -> None:
        self._open_index = open_index
        self._to_index: list[tuple[bytes, os.stat_result, int, bytes]] = []
        self._chunks_to_index = 0
        self.index_is_wrong = False
        self.staging = staging
        self._root_fd = root_fd
        self._control = control
        self.counters = counters
        self._clock = clock
        self._cache = cache
        self._apply_extra = apply_extra
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)
        self._stopped = False
        self.offers: dict[int, SmallOffer | RunOffer] = {}
        self.inflight: dict[bytes, list[Waiter] | None] = {}
        self.recent: dict[bytes, Location] = {}
        self.directories: dict[bytes, TargetDirectory] = {}
        self.failures: list[tuple[bytes, str, str]] = []
        self.failed_paths: set[bytes] = set()
        self._ready: queue.SimpleQueue[tuple[str, TargetDirectory, Entry, object] | None] = (
            queue.SimpleQueue()
        )
        self._parts: dict[bytes, int] = {}
        self._links: list[tuple[TargetDirectory, Entry]] = []
        self._open_objects = 0
        self._closing = False
        self.settled: Callable[[], None] = lambda: None
        self._local = threading.local()
        self._sinks: set[Sink] = set()
        umask = os.umask(0o077)
        os.umask(umask)
        self._masked = umask | 0o7000
        self._max_directories = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._finished_directories = 0
        self.needs_final_sync = False
        # Removes a folder that stands where an object must be; None where nothing may be removed.
        self.make_way: Callable[[TargetDirectory, bytes], bool] | None = None

    # --- bookkeeping, any thread --------------------------------------------------------------------------------

    def opened(self, directory: TargetDirectory, name: bytes) -> None:
        """An object is on its way."""
        with self.lock:
            directory.open_names.add(name)
            self._open_objects += 1

    def landed(self, objects: list[tuple[TargetDirectory, Entry]]) -> None:
        """Objects that were open landed."""
        with self.lock:
            for directory, entry in objects:
                if entry.name in directory.open_names:
                    directory.open_names.discard(entry.name)
                    self._open_objects -= 1
                    if directory.end is not None and not directory.open_names:
                        # Inside the lock: whoever sees that nothing is open finds this in the queue already.
                        self._ready.put(("directory", directory, _NO_ENTRY, None))
            idle = self._closing and self._open_objects == 0
            self._room.notify_all()
        if self._links and objects:
            self._ready.put(("links", objects[0][0], _NO_ENTRY, None))
        if idle and objects:
            self.settled()

    def close_offering(self) -> None:
        """Nothing more will be opened; `settled` is called once all that is open is done."""
        with self.lock:
            self._closing = True
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
                self._ready.put(("directory", directory, _NO_ENTRY, None))
            idle = self._closing and self._open_objects == 0
        if self._links:  # one of them may have waited for just this
            self._ready.put(("links", directory, _NO_ENTRY, None))
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
            directory.end = end
            if not directory.open_names:
                self._ready.put(("directory", directory, _NO_ENTRY, None))

    def ready(self, kind: str, directory: TargetDirectory, entry: Entry, what: object) -> None:
        """Hand an object that is complete to the publisher."""
        self._ready.put((kind, directory, entry, what))

    def stop(self) -> None:
        """Let the publisher end after what is queued, and nobody wait for it any more."""
        with self.lock:
            self._stopped = True
            self._room.notify_all()
        self._ready.put(None)

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

    # --- delivery, lane threads ---------------------------------------------------------------------------------

    def deliver(self, runs: list[Run], plain: memoryview, stored_bytes: int) -> None:
        """One record's chunks. Blocks while they are verified and written.

        Raises:
            ProtocolError, IntegrityError: the peer sent what was not wanted, or not what it offered.
            FlowError: the disk refused.
        """
        stages = self._stages()
        at = 0
        for number, index, count in runs:
            offer = self._claim(number, index, count)
            try:
                if isinstance(offer, RunOffer):
                    at += self._deliver_run(offer, index, count, plain[at:], stages)
                else:
                    at += self._deliver_small(offer, index, count, plain[at:], stages)
            except OSError as error:
                name = offer.target.directory.path if isinstance(offer, RunOffer) else offer.directory.path
                raise local_error(error, "cannot write into", name or b".") from error
            with self.lock:
                offer.wanted[index : index + count] = bytes(count)
                offer.open -= count
                if not offer.open:
                    del self.offers[number]
            with self.lock:
                # The publisher needs nothing from here, so waiting for it cannot stop it.
                while self._ready.qsize() > _MAX_BACKLOG and not self._stopped:
                    self._room.wait()
        if at != len(plain):
            raise ProtocolError(f"a record holds {len(plain)} bytes, its chunks are {at} bytes")
        self._control.post(Received(stored_bytes))

    def _claim(self, number: int, index: int, count: int) -> SmallOffer | RunOffer:
        """The offer whose chunks arrived; from here on nobody else delivers these."""
        with self.lock:
            offer = self.offers.get(number)
            if offer is None:
                raise ProtocolError(f"data arrived for offer {number}, which is not open")
            if index + count > len(offer.wanted) or not count:
                raise ProtocolError(
                    f"data arrived for chunks {index}+{count} of offer {number}, which has {len(offer.wanted)}"
                )
            if offer.wanted.count(_WANTED, index, index + count) != count:
                raise ProtocolError(
                    f"data arrived for chunks of offer {number} that were not wanted (any more)"
                )
            offer.wanted[index : index + count] = bytes([_CLAIMED]) * count
            return offer

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
            raise IntegrityError(
                f"a chunk of {show_path(directory.child(entry.name))} does not have the hash it was offered with",
                hint="nothing of it was used; if it repeats, the source's memory or disk is faulty, or it lies",
            )
        return length

    def _deliver_run(
        self, offer: RunOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
    ) -> int:
        verify, write = stages
        target = offer.target
        packed = offer.packed
        begin = perf_counter_ns()
        size = 0
        where = target.directory.child(target.entry.name)
        for number in range(index, index + count):
            size += self._verify(packed, number, plain, size, target.directory, target.entry)
        begin = verify.since(begin)
        run = packed[index * CHUNK_BYTES : (index + count) * CHUNK_BYTES]
        if not target.failed:
            target.put(offer.offsets[index], plain[:size], run)
        location = (where, target.staged.name if target.staged else "", offer.offsets[index])
        self._arrived([(run, 0, location)], plain)
        write.since(begin)
        self.add(target, size)
        return size

    def _deliver_small(
        self, offer: SmallOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
    ) -> int:
        verify, write = stages
        directory, entries, owners = offer.directory, offer.entries, offer.owners
        staging = self.staging
        arrived: list[tuple[bytes, int, Location]] = []
        at = 0
        number = index
        end = index + count
        begin = perf_counter_ns()
        while number < end:
            owner = owners[number]
            entry = entries[owner]
            packed = entry.chunks
            chunks = len(packed) // CHUNK_BYTES
            first = offer.first[owner]
            whole = number == first and number + chunks <= end and owner not in offer.sinks
            stop = first + chunks if whole else min(end, first + chunks)
            size = 0
            for chunk in range(number - first, stop - first):
                size += self._verify(packed, chunk, plain, at + size, directory, entry)
            data = plain[at : at + size]
            begin = verify.since(begin)
            if whole:
                staged = staging.small_name()
                refused = self._write_small(staged, entry, data)
                arrived.append((packed, at, (directory.child(entry.name), staged, 0)))
                if refused:
                    self.fail(directory, entry.name, "attributes", refused)
                else:
                    self._ready.put(("small", directory, entry, staged))
            else:
                sink = self._small_sink(offer, owner)
                before = sum(_lengths(packed[: (number - first) * CHUNK_BYTES]))
                run = packed[(number - first) * CHUNK_BYTES : (stop - first) * CHUNK_BYTES]
                sink.put(before, data, run)
                arrived.append((run, at, (directory.child(entry.name), sink.staged, before)))
                self.add(sink, size)
            begin = write.since(begin)
            at += size
            number = stop
        self._arrived(arrived, plain)
        write.since(begin)
        return at

    def _small_sink(self, offer: SmallOffer, owner: int) -> SmallObject:
        """The staging file of a small object whose chunks arrive apart; made by the first of them."""
        with self.lock:
            sink = offer.sinks.get(owner)
            if sink is None:
                sink = offer.sinks[owner] = SmallObject(offer.directory, offer.entries[owner], self.staging)
                self._sinks.add(sink)
            return sink

    def _write_small(self, staged: str, entry: Entry, data: memoryview) -> str:
        """Write a whole small object to its staging file; what the system refused of its attributes."""
        mode = entry.mode
        # The staging folder is this user's alone, so the file may have its own mode from the start.
        plain_mode = mode & self._masked == 0
        fd = os.open(staged, _CREATE, mode if plain_mode else 0o600, dir_fd=self.staging.fd)
        try:
            done = os.write(fd, data)
            while done < len(data):
                done += os.write(fd, data[done:])
            if plain_mode and not entry.extra:
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
                return ""
            return self._dress(fd, entry)
        finally:
            os.close(fd)

    def _dress(self, fd: int, entry: Entry) -> str:
        """Give a staging file its attributes; what the system refused, if it did.

        Owner before mode: chown(2) takes the set-user-id bit away. Time last: the others move it.
        """
        try:
            if entry.extra and self._apply_extra is not None:
                self._apply_extra(fd, entry.extra)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            return f"the target cannot give it its attributes: {error.strerror}"
        return ""

    def _arrived(self, items: list[tuple[bytes, int, Location]], plain: memoryview) -> None:
        """Chunks are here: remember where, and write them to whoever else waits for them.

        Args:
            items: (packed chunks, where they begin in `plain`, where they were put).
        """
        waiting: list[tuple[list[Waiter], int, int, bytes]] = []
        with self.lock:
            inflight, recent = self.inflight, self.recent
            for packed, at, (path, staged, offset) in items:
                place = offset - at
                for start in range(0, len(packed), CHUNK_BYTES):
                    length = int.from_bytes(packed[start : start + 4], "little")
                    identity = packed[start + 4 : start + CHUNK_BYTES]
                    waiters = inflight.pop(identity, None)
                    if waiters:
                        waiting.append((waiters, at, length, packed[start : start + CHUNK_BYTES]))
                    recent[identity] = (path, staged, place + at)
                    at += length
            while len(recent) > _RECENT_CHUNKS:
                del recent[next(iter(recent))]
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
            self._ready.put(("checkpoint", sink.directory, sink.entry, sink))

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
            refused = self._dress(sink.fd, sink.entry)
            os.close(sink.fd)
            self.disown(sink)
            if refused:
                self.fail(sink.directory, sink.entry.name, "attributes", refused)
            else:
                self._ready.put(("small", sink.directory, sink.entry, sink.staged))
        else:
            self._ready.put(("large", sink.directory, sink.entry, sink))

    def lose(self, number: int, index: int, count: int, reason: str, message: str) -> None:
        """The source cannot serve chunks that were wanted: their objects, and all that wait for them, fail."""
        offer = self.offers.get(number)
        if offer is None or index < 0 or count < 1 or index + count > len(offer.wanted):
            raise ProtocolError(f"the source gave up chunks of offer {number}, which is not open")
        victims: list[Sink] = []
        names: list[tuple[TargetDirectory, bytes]] = []
        with self.lock:
            for chunk in range(index, index + count):
                if offer.wanted[chunk] != _WANTED:
                    continue
                offer.wanted[chunk] = 0
                offer.open -= 1
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
            if not offer.open:
                self.offers.pop(number, None)
        for sink in victims:
            self.fail_sink(sink, reason, message)
        for directory, name in names:
            self.fail(directory, name, reason, message)

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
            self._sinks.add(sink)

    def disown(self, sink: Sink) -> None:
        """The sink holds no files any more."""
        with self.lock:
            self._sinks.discard(sink)

    def close(self) -> None:
        """Close what unfinished sinks and directories hold. No lane, copier or publisher may be running."""
        for sink in self._sinks:
            if isinstance(sink, SmallObject):
                if sink.fd >= 0:
                    os.close(sink.fd)
            elif isinstance(sink, LargeObject):
                if sink.staged is not None:
                    sink.staged.close()
                if sink.basis is not None:
                    sink.basis.close()
        self._sinks.clear()
        for directory in self.directories.values():
            if directory.fd >= 0:
                os.close(directory.fd)
        self.directories.clear()

    # --- publishing, its own thread -----------------------------------------------------------------------------

    def run_publisher(self) -> None:
        """Publish what is ready, in batches, until `stop`; blocks."""
        stage = self._clock.stage("sync")
        while True:
            first = self._ready.get()
            if first is None:
                return
            batch = [first]
            size = first[2].size
            ended = False
            while len(batch) < _BATCH_OBJECTS and size < _BATCH_BYTES:
                try:
                    item = self._ready.get(timeout=_BATCH_WAIT_S if not self._closing else 0)
                except queue.Empty:
                    break
                if item is None:
                    ended = True
                    break
                batch.append(item)
                size += item[2].size
            begin = perf_counter_ns()
            self._publish(batch)
            stage.since(begin)
            if ended:
                return

    def _publish(self, batch: list[tuple[str, TargetDirectory, Entry, object]]) -> None:
        smalls = [(d, e, w) for kind, d, e, w in batch if kind == "small"]
        larges = [
            large
            for kind, _, _, large in batch
            if kind == "large" and isinstance(large, LargeObject) and self._may_publish(large)
        ]
        links = [(d, e) for kind, d, e, _ in batch if kind == "symlink"]
        hard = self._links + [(d, e) for kind, d, e, _ in batch if kind == "hardlink"]
        for kind, _, _, what in batch:
            if kind == "checkpoint":
                assert isinstance(what, LargeObject)
                if not what.failed and what.staged is not None and what.remaining:
                    try:
                        what.staged.sync()
                    except OSError as error:
                        raise local_error(
                            error, "cannot sync", what.directory.child(what.entry.name)
                        ) from error
        self._sync_data(smalls, larges)
        touched: dict[int, TargetDirectory] = {}
        landed: list[tuple[TargetDirectory, Entry]] = []
        for directory, entry, staged in smalls:
            assert isinstance(staged, str)
            if self._rename(staged, directory, entry):
                landed.append((directory, entry))
                touched[directory.fd] = directory
        for large in larges:
            assert large.staged is not None
            if self._rename(large.staged.name, large.directory, large.entry):
                landed.append((large.directory, large.entry))
                touched[large.directory.fd] = large.directory
        for directory, entry in links:
            if self._make_link(directory, entry):
                landed.append((directory, entry))
                touched[directory.fd] = directory
        self._links = []
        for directory, entry in hard:
            verdict = self._make_hard_link(directory, entry)
            if verdict is None:
                self._links.append((directory, entry))
            elif verdict:
                landed.append((directory, entry))
                touched[directory.fd] = directory
        try:
            self._sync_directories(self._with_new_parents(list(touched.values())))
        except OSError as error:
            raise local_error(error, "cannot sync", next(iter(touched.values())).path or b".") from error
        for large in larges:
            assert large.staged is not None
            if not large.failed:
                large.staged.forget_journal()
                large.staged.close()
                if large.basis is not None:
                    large.basis.close()
                self.disown(large)
        self._remember(landed)
        self.counters.objects_done += len(landed)
        self.counters.bytes_done += sum([entry.size for _, entry in landed])
        self._control.post(Landed(self.counters.objects_done, self.counters.bytes_done))
        self.landed(landed)
        for kind, directory, _, _ in batch:
            if kind == "directory" and self.directories.get(directory.path) is directory:
                self._finish_directory(directory)
        if self._links and not landed:
            self._drop_links()

    def _drop_links(self) -> None:
        """Hard links whose first name is not on its way any more and never came: they fail."""
        waiting, self._links = self._links, []
        for directory, entry in waiting:
            if self._is_open(entry.link):
                self._links.append((directory, entry))
            else:
                self.fail(
                    directory, entry.name, "link", f"its first name {show_path(entry.link)} did not land"
                )

    def _is_open(self, path: bytes) -> bool:
        parent, _, name = path.rpartition(b"/")
        with self.lock:
            directory = self.directories.get(parent)
            return directory is not None and name in directory.open_names

    def _may_publish(self, large: LargeObject) -> bool:
        """Dress a complete large object; False where it failed after all."""
        assert large.staged is not None
        if large.basis is not None and large.basis.trusted and not large.basis.unchanged():
            # What was copied from it was hashed before it changed, or after: nobody knows.
            large.staged.discard()
            self.fail_sink(large, "stale", "the file it replaces was written to while it was copied from")
            return False
        refused = self._dress(large.staged.fd, large.entry)
        if refused:
            self.fail_sink(large, "attributes", refused)
        return not refused

    def _sync_small(self, staged: object) -> None:
        assert isinstance(staged, str)
        try:
            fd = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.staging.fd)
        except PermissionError:  # its own mode forbids reading, to everybody but root
            sync_filesystem(self.staging.fd)
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _sync_data(
        self, smalls: list[tuple[TargetDirectory, Entry, object]], larges: list[LargeObject]
    ) -> None:
        try:
            for large in larges:
                assert large.staged is not None
                os.fsync(large.staged.fd)
            if len(smalls) > _SYNC_EACH:
                sync_filesystem(self.staging.fd)
            else:
                for _, _, staged in smalls:
                    self._sync_small(staged)
        except OSError as error:
            raise local_error(error, "cannot sync", b"the target") from error

    def _sync_directories(self, directories: list[TargetDirectory]) -> None:
        if len(directories) > _SYNC_EACH:
            sync_filesystem(self.staging.fd)
        else:
            for directory in directories:
                os.fsync(directory.fd)

    def _with_new_parents(self, directories: list[TargetDirectory]) -> list[TargetDirectory]:
        """The directories and those in which they, or directories above them, were made and not yet synced."""
        found = {id(directory): directory for directory in directories}
        for directory in directories:
            below = directory
            while below.created and not below.linked and below.parent is not None:
                below.linked = True
                below = below.parent
                found[id(below)] = below
        return list(found.values())

    def _rename(self, staged: str, directory: TargetDirectory, entry: Entry) -> bool:
        places = {"src_dir_fd": self.staging.fd, "dst_dir_fd": directory.fd}
        try:
            try:
                os.rename(staged, entry.name, **places)
            except IsADirectoryError:
                if self.make_way is None or not self.make_way(directory, entry.name):
                    raise
                os.rename(staged, entry.name, **places)
            return True
        except OSError as error:
            self._raise_if_full(error, directory, entry)
            self.fail(directory, entry.name, "local", _why_not_placed(error, directory, entry))
            return False

    @staticmethod
    def _raise_if_full(error: OSError, directory: TargetDirectory, entry: Entry) -> None:
        """A full disk is no fault of one object: it suspends the transfer."""
        wrapped = local_error(error, "cannot place", directory.child(entry.name))
        if wrapped.retryable:
            raise wrapped from error

    def _make_link(self, directory: TargetDirectory, entry: Entry) -> bool:
        staged = self.staging.small_name()
        try:
            os.symlink(entry.link, staged.encode(), dir_fd=self.staging.fd)
            os.utime(
                staged, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=self.staging.fd, follow_symlinks=False
            )
        except OSError as error:
            self._raise_if_full(error, directory, entry)
            self.fail(directory, entry.name, "local", error.strerror or str(error))
            return False
        return self._rename(staged, directory, entry)

    def _make_hard_link(self, directory: TargetDirectory, entry: Entry) -> bool | None:
        """Link to the first name; None while that is still on its way."""
        if self._is_open(entry.link):
            return None
        if entry.link in self.failed_paths:
            self.fail(directory, entry.name, "link", f"its first name {show_path(entry.link)} did not land")
            return False
        staged = self.staging.small_name()
        parent, _, name = entry.link.rpartition(b"/")
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            # Component by component: the kernel would follow a link in the middle out of the root.
            fd = open_beneath(self._root_fd, parent, flags) if parent else os.dup(self._root_fd)
            try:
                before = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISREG(before.st_mode):
                    raise OSError(errno.EINVAL, "it is not a file")
                os.link(
                    name, staged.encode(), src_dir_fd=fd, dst_dir_fd=self.staging.fd, follow_symlinks=False
                )
            finally:
                os.close(fd)
        except OSError as error:
            self.fail(
                directory, entry.name, "link", f"cannot link to {show_path(entry.link)}: {error.strerror}"
            )
            return False
        placed = self._rename(staged, directory, entry)
        if placed:
            self._relinked(entry, before, directory)
        if placed:  # rename(2) between two names of one inode does nothing and leaves the first
            try:
                os.unlink(staged, dir_fd=self.staging.fd)
            except FileNotFoundError:
                pass
        return placed

    def _relinked(self, entry: Entry, before: os.stat_result, directory: TargetDirectory) -> None:
        """Another name moved the inode's ctime: what the cache knows of it is still true."""
        now = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False)
        if self._cache is not None and before.st_size >= LARGE_OBJECT_BYTES:
            self._cache.settle_pieces(Identity.of(now), before.st_ctime_ns)
        parent, _, name = entry.link.rpartition(b"/")
        first = self.directories.get(parent)
        for index, row in enumerate(first.rows if first is not None else ()):
            if row[0] == name and first is not None:
                first.rows[index] = (name, now, row[2])

    def _remember(self, landed: list[tuple[TargetDirectory, Entry]]) -> None:
        """Tell the scan cache what now lies at the target."""
        by_directory: dict[int, tuple[TargetDirectory, list[tuple[bytes, os.stat_result]], list[Entry]]] = {}
        for directory, entry in landed:
            if entry.kind not in (FILE, SYMLINK) or entry.extra:
                directory.unchanged_all = False
                continue
            try:
                st = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False)
            except OSError:
                continue
            directory.unchanged_all = False
            if entry.size >= LARGE_OBJECT_BYTES:
                if self._cache is not None:
                    self._cache.settle_pieces(Identity.of(st))
                    for offset, packed in self._cache.pieces(Identity.of(st)):
                        self._index(directory.child(entry.name), st, offset, packed)
                continue
            directory.rows.append((entry.name, st, entry))
            self._index(directory.child(entry.name), st, 0, entry.chunks)
            _, rows, entries = by_directory.setdefault(directory.fd, (directory, [], []))
            rows.append((entry.name, st))
            entries.append(entry)
        if self._cache is None:
            return
        for directory, rows, entries in by_directory.values():
            if directory.end is not None and not (directory.open_names - {name for name, _ in rows}):
                continue  # written whole when the directory is finished, in a moment
            st_dir = os.fstat(directory.fd)
            number = self._parts[directory.path] = self._parts.get(directory.path, 0) + 1
            self._cache.add_directory_part(
                st_dir.st_dev,
                st_dir.st_ino,
                number,
                DirectoryPart(stats_proof(rows), encode_entries(entries)),
            )

    def _index(self, path: bytes, st: os.stat_result, offset: int, packed: bytes) -> None:
        """Note where chunks lie now; they reach the index many at a time."""
        if self._open_index is None or not packed:
            return
        self._to_index.append((path, st, offset, packed))
        self._chunks_to_index += len(packed) // CHUNK_BYTES
        if self._chunks_to_index >= _INDEX_CHUNKS:
            self.flush_index()

    def flush_index(self, *, last: bool = False) -> None:
        """Write what was noted to the chunk index.

        A few chunks are not worth it: sending them again takes less time than loading what searches the index.
        """
        if self._open_index is None or (last and self._chunks_to_index < _INDEX_LEAST) or self.index_is_wrong:
            return
        index = self._open_index()
        for row in self._to_index:
            index.add(*row)
        self._to_index = []
        self._chunks_to_index = 0
        index.commit(merge=last)

    def _sync_finished(self, directory: TargetDirectory) -> None:
        """A few directories are synced one by one; more of them at the end, with one syncfs."""
        self._finished_directories += 1
        if self._finished_directories <= _SYNC_EACH:
            for one in self._with_new_parents([directory]):
                os.fsync(one.fd)
        else:
            self.needs_final_sync = True

    def _finish_directory(self, directory: TargetDirectory) -> None:
        end = directory.end
        assert end is not None
        try:
            if end.apply:
                st = os.fstat(directory.fd)
                if end.extra and self._apply_extra is not None:
                    self._apply_extra(directory.fd, end.extra)
                if stat.S_IMODE(st.st_mode) != end.mode:
                    os.fchmod(directory.fd, end.mode)
                if st.st_mtime_ns != end.mtime_ns:
                    os.utime(directory.fd, ns=(end.mtime_ns, end.mtime_ns))
                if (
                    directory.created
                    or stat.S_IMODE(st.st_mode) != end.mode
                    or st.st_mtime_ns != end.mtime_ns
                ):
                    self._sync_finished(directory)
            if self._cache is not None and directory.rows and not directory.unchanged_all:
                st = os.fstat(directory.fd)
                directory.rows.sort(key=lambda row: row[0])
                part = DirectoryPart(
                    stats_proof([(name, row) for name, row, _ in directory.rows]),
                    encode_entries([entry for _, _, entry in directory.rows]),
                )
                self._cache.save_directory(st.st_dev, st.st_ino, [part])
        except OSError as error:
            self.report(directory.path or b".", "local", f"cannot set mode or time: {error.strerror}")
        finally:
            with self.lock:
                self.directories.pop(directory.path, None)
                self._room.notify_all()
            os.close(directory.fd)
            directory.rows = []
            parent = directory.parent
            if parent is not None:
                with self.lock:
                    parent.open_names.discard(directory.name + b"/")
                    ready = parent.end is not None and not parent.open_names
                if ready:
                    self._finish_directory(parent)


_NO_ENTRY: Final = Entry(b"-", FILE, 0, 0)


def _lengths(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES)]


def _why_not_placed(error: OSError, directory: TargetDirectory, entry: Entry) -> str:
    if isinstance(error, IsADirectoryError):
        return "a folder of this name is in the way at the target; remove it or sync with --delete"
    return error.strerror or str(error)
