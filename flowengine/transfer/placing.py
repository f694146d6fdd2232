"""Decides, offer by offer, what is at hand at the target and what is wanted.

Goal
    A cold copy, a resume, a delta and a repair are one code path: what is in place, in staging, on its way or
    elsewhere at hand is never asked for.
Plan
    One thread takes the source's messages in order. For each directory it lists what stands there and asks the scan
    cache about it; for each entry it compares, for each chunk it looks in place, in staging, among what is on its way
    or has just arrived, and in the file that is replaced. The rest is wanted. Copies go to the copier threads.
Invariants
    - Offers are answered in order, each exactly once.
    - An entry name reaches the file system only after the manifest's and the path validator's checks.
    - A dry run answers "none" to everything and touches nothing.
"""

from __future__ import annotations

import os
import queue
import stat
from collections.abc import Callable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from flowengine.chunking import CHUNK_BYTES, Cutter, Profile, chunk_id, pack_chunks, zero_chunk_id
from flowengine.errors import FlowError, ProtocolError
from flowengine.manifest import FILE, HARDLINK, SYMLINK, Entry, Header
from flowengine.manifest.entries import check_entries
from flowengine.store.attributes import apply_extra, extra_reader
from flowengine.store.filesystem import copy_range, local_error, open_beneath
from flowengine.store.scan import recall, split_proof, stats_proof
from flowengine.store.scan_cache import PROVISIONAL, Identity, ScanCache
from flowengine.transfer.basis import Basis
from flowengine.transfer.landing import (
    Landing,
    LargeObject,
    RunOffer,
    Sink,
    SmallObject,
    SmallOffer,
    TargetDirectory,
)
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import Counters
from flowengine.transfer.timing import StageClock
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    MAX_OFFER_CHUNKS,
    MAX_OFFER_ENTRIES,
    WANT_ALL,
    WANT_NONE,
    WANT_SOME,
    DirectoryBegin,
    DirectoryEnd,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Options,
    Want,
)
from flowengine.wire.paths import (
    MAX_DEPTH,
    MAX_PATH_BYTES,
    STAGING_NAME,
    check_link_target,
    check_name,
    check_relative_path,
    collision_key,
)

if TYPE_CHECKING:
    from flowengine.store.chunk_index import ChunkIndex

__all__ = ["Copier", "CopyJob", "Placer"]

_MISSING: Final = object()
_MAX_COPY_BYTES: Final = 4 << 20


class CopyJob:
    """Verified bytes to be taken from a local file into a sink."""

    __slots__ = ("basis", "fallback", "offset", "packed", "path", "sink", "source_offset")

    def __init__(
        self,
        sink: Sink,
        offset: int,
        packed: bytes,
        *,
        basis: Basis | None,
        path: tuple[bytes, str] | None,
        source_offset: int,
    ) -> None:
        self.sink = sink
        self.offset = offset
        self.packed = packed
        self.basis = basis
        self.path = path
        self.source_offset = source_offset


class Copier:
    """Copies what is at hand; its `run` is the body of a thread, of which there may be several."""

    def __init__(self, landing: Landing, root_fd: int, clock: StageClock) -> None:
        self._landing = landing
        self._root_fd = root_fd
        self._clock = clock
        self.jobs: queue.SimpleQueue[CopyJob | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Work until the end mark; blocks."""
        stage = self._clock.stage("copy")
        while True:
            job = self.jobs.get()
            if job is None:
                return
            begin = perf_counter_ns()
            self._copy(job)
            stage.since(begin)

    def _copy(self, job: CopyJob) -> None:
        sink = job.sink
        size = _size(job.packed)
        if not sink.failed:
            try:
                if job.basis is not None and job.basis.trusted and isinstance(sink, LargeObject):
                    assert sink.staged is not None
                    copy_range(job.basis.fd, job.source_offset, sink.staged.fd, job.offset, size)
                    sink.staged.journal(job.offset, job.packed)
                else:
                    self._copy_checked(job, size)
            except FlowError as error:
                if job.path is not None and not job.path[1]:
                    self._landing.index_is_wrong = True
                self._landing.fail_sink(sink, error.reason, error.message)
                return
            except OSError as error:
                wrapped = local_error(
                    error, "cannot copy local chunks into", sink.directory.child(sink.entry.name)
                )
                if wrapped.retryable:
                    raise wrapped from error
                reason = "stale" if isinstance(error, FileNotFoundError) else "local"
                self._landing.fail_sink(sink, reason, wrapped.message)
                return
            self._landing.counters.bytes_reused += size
        self._landing.add(sink, size)

    def _copy_checked(self, job: CopyJob, size: int) -> None:
        """Read, hash, write: for sources that were not hashed in this session."""
        fd = job.basis.fd if job.basis is not None else self._open(job)
        try:
            data = memoryview(bytearray(size))
            got = os.preadv(fd, [data], job.source_offset)
        finally:
            if job.basis is None:
                os.close(fd)
        at = 0
        for start in range(0, len(job.packed), CHUNK_BYTES):
            length = int.from_bytes(job.packed[start : start + 4], "little")
            if (
                at + length > got
                or chunk_id(data[at : at + length]) != job.packed[start + 4 : start + CHUNK_BYTES]
            ):
                raise FlowError(
                    "a local chunk that was to be reused is not what it was; it is fetched from the source instead",
                    reason="stale",
                )
            at += length
        job.sink.put(job.offset, data, job.packed)

    def _open(self, job: CopyJob) -> int:
        assert job.path is not None
        path, staged = job.path
        if not staged:
            return open_beneath(self._root_fd, path, os.O_RDONLY)
        try:
            return os.open(staged, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._landing.staging.fd)
        except FileNotFoundError:
            return open_beneath(self._root_fd, path, os.O_RDONLY)


class Placer:
    """The target's answer to each message of the source. For use by one thread.

    Args:
        landing: where wanted chunks will arrive; its staging and control connection are used too.
        want: posts an answer.
        recorder: builds the manifest of what is offered.
        index: what else lies below the root; None where that is not remembered.
        extras: given (directory path, names) of what stands at the target and was not offered.
    """

    def __init__(
        self,
        landing: Landing,
        copier: Copier,
        root_fd: int,
        profile: Profile,
        options: Options,
        cache: ScanCache | None,
        counters: Counters,
        recorder: ManifestRecorder,
        want: Callable[[Want], None],
        extras: Callable[[bytes, list[bytes]], None],
        *,
        index: ChunkIndex | None = None,
        folds_names: bool = False,
    ) -> None:
        self._landing = landing
        self._copier = copier
        self._profile = profile
        self._header = Header(profile, xattrs=options.xattrs, owner=options.owner)
        self._attempts: dict[bytes, int] = {}
        self._cutter = Cutter(profile)
        self._options = options
        self._dry = options.dry_run
        self._read_extra = (
            extra_reader(xattrs=options.xattrs, owner=options.owner)
            if options.xattrs or options.owner
            else None
        )
        self._atomic = options.publish == "atomic" and not options.dry_run
        self._cache = cache
        self._counters = counters
        self._recorder = recorder
        self._want = want
        self._extras = extras
        self._index = index
        self._filters = FilterSet.from_wire(options.filters)
        self._folds_names = folds_names
        self._stack: list[TargetDirectory] = []
        self._root_fd = root_fd
        self._offers = 0
        self._large: LargeObject | None = None
        self._large_entry: Entry | None = None
        self._zero = zero_chunk_id(profile.maximum)
        self.root_is_one_directory = True
        self.root_is_left = False

    # --- messages -----------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """Act on one message.

        Raises:
            ProtocolError: it contradicts the protocol, the limits or itself.
            FlowError: the local system refused in a way that ends the session.
        """
        match message:
            case Offer():
                self._offer(message)
            case ObjectRun():
                self._object_run(message)
            case ObjectBegin():
                self._object_begin(message.entry)
            case ObjectEnd():
                self._object_end(message)
            case DirectoryBegin():
                self._directory_begin(message.name)
            case DirectoryEnd():
                self._directory_end(message)

    def _current(self) -> TargetDirectory:
        if not self._stack:
            raise ProtocolError("the source offered something outside any directory")
        return self._stack[-1]

    # --- directories --------------------------------------------------------------------------------------------

    def _directory_begin(self, name: bytes) -> None:
        if self._large_entry is not None:
            raise ProtocolError("the source entered a directory inside a large object")
        self._recorder.enter(name)
        if not self._stack:
            directory = TargetDirectory(
                b"", b"", os.dup(self._root_fd) if self._root_fd >= 0 else -1, None, created=False
            )
        else:
            parent = self._stack[-1]
            check_name(name, reserved=(STAGING_NAME,))
            if len(self._stack) >= MAX_DEPTH or len(parent.path) + len(name) + 1 > MAX_PATH_BYTES:
                raise ProtocolError(
                    f"the path {show_path(parent.child(name))} is deeper or longer than allowed"
                )
            if parent.offered is not None:
                parent.offered.add(name)
            path = parent.child(name)
            self._landing.wait_for_directories(len(self._stack))
            if self._collides(parent, name):
                directory = TargetDirectory(path, name, -1, parent, created=False)
            else:
                fd, created = self._make_directory(parent, name, path)
                directory = TargetDirectory(path, name, fd, parent, created=created)
        if self._options.delete or self._atomic:
            directory.offered = set()
        if self._folds_names:
            directory.keys = {}
        if directory.fd >= 0 and not directory.created:
            self._list(directory)
        self._landing.directory_begun(directory)
        self._stack.append(directory)

    def _make_directory(self, parent: TargetDirectory, name: bytes, path: bytes) -> tuple[int, bool]:
        """(descriptor, whether it is new); -1 where it cannot be had: then all below it fails by name."""
        if parent.fd < 0:
            return -1, False
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            if not self._dry:
                try:
                    os.mkdir(name, 0o700, dir_fd=parent.fd)
                    return os.open(name, flags, dir_fd=parent.fd), True
                except FileExistsError:
                    pass
            try:
                return os.open(name, flags, dir_fd=parent.fd), False
            except FileNotFoundError:
                return -1, False
            except OSError:
                if self._dry:
                    return -1, False
                if stat.S_ISDIR(os.stat(name, dir_fd=parent.fd, follow_symlinks=False).st_mode):
                    raise
                os.unlink(name, dir_fd=parent.fd)  # a file or link stands where the source has a folder
                os.mkdir(name, 0o700, dir_fd=parent.fd)
                return os.open(name, flags, dir_fd=parent.fd), True
        except OSError as error:
            wrapped = local_error(error, "cannot make the folder", path)
            if wrapped.retryable:
                raise wrapped from error
            self._landing.report(path, wrapped.reason, wrapped.message)
            return -1, False

    def _list(self, directory: TargetDirectory) -> None:
        """What stands in the directory now, and what the scan cache knows of it."""
        existing = directory.existing
        try:
            with os.scandir(directory.fd) as listing:
                for item in listing:
                    try:
                        existing[os.fsencode(item.name)] = item.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
        except OSError as error:
            raise local_error(error, "cannot list", directory.path or b".") from error
        if existing.pop(STAGING_NAME, None) is not None and directory.parent is not None and not self._dry:
            self._landing.staging.check_not_written(b"/proc/self/fd/%d" % directory.fd)
        if self._cache is None or not existing:
            return
        rows = sorted(
            (name, st)
            for name, st in existing.items()
            if st.st_mode & 0o170000 == 0o120000
            or (st.st_mode & 0o170000 == 0o100000 and st.st_size < LARGE_OBJECT_BYTES)
        )
        if not rows:
            return
        hit, known = recall(self._cache, os.fstat(directory.fd), rows)
        if hit is not None:
            directory.known = {entry.name: entry for entry in hit}
        elif known:
            for (name, _), proof in zip(rows, split_proof(stats_proof(rows)), strict=True):
                entry = known.get(proof)
                if entry is not None:
                    directory.known[name] = entry

    def _directory_end(self, message: DirectoryEnd) -> None:
        directory = self._current()
        if self._large_entry is not None:
            raise ProtocolError("the source closed a directory inside a large object")
        if directory.parent is None:
            self.root_is_one_directory = message.apply
            self.root_is_left = True
        self._recorder.leave(message.mode, message.mtime_ns, message.extra)
        self._stack.pop()
        if directory.offered is not None and message.complete:
            extra = [
                name
                for name in directory.existing
                if name not in directory.offered and self._may_delete(directory, name)
            ]
            if extra:
                self._extras(directory.path, sorted(extra))
        if self._dry or directory.fd < 0:
            self._landing.directory_skipped(directory)
            return
        self._landing.directory_ended(directory, message)

    def _may_delete(self, directory: TargetDirectory, name: bytes) -> bool:
        """What a filter hides from the transfer is safe from it."""
        st = directory.existing[name]
        return self._filters.allows(directory.child(name), stat.S_ISDIR(st.st_mode))

    def _collides(self, directory: TargetDirectory, name: bytes) -> bool:
        """Whether the target's file system would take this name for another one of the same directory."""
        if directory.keys is None:
            return False
        key = collision_key(name)
        first = directory.keys.setdefault(key, name)
        if first == name:
            return False
        self._landing.report(
            directory.child(name),
            "collision",
            f"the target's file system takes it for {show_path(first)}, which the source has as well; only that one lands",
        )
        return True

    # --- small objects ------------------------------------------------------------------------------------------

    def _offer(self, message: Offer) -> None:
        directory = self._current()
        entries = message.entries
        if not entries or len(entries) > MAX_OFFER_ENTRIES:
            raise ProtocolError(f"an offer of {len(entries)} entries; 1 to {MAX_OFFER_ENTRIES} are allowed")
        if self._large_entry is not None:
            raise ProtocolError("the source offered entries inside a large object")
        self._landing.wait_for_objects()
        # The recorder checks page by page, later; nothing may reach the file system before it was checked.
        check_entries(entries, directory.path, directory.last_name, self._header)
        directory.last_name = entries[-1].name
        self._recorder.entries(entries)
        number = self._offers
        self._offers += 1
        offer = SmallOffer(directory, entries)
        if len(offer.owners) > MAX_OFFER_CHUNKS:
            raise ProtocolError(
                f"an offer of {len(offer.owners)} chunks; at most {MAX_OFFER_CHUNKS} are allowed"
            )
        if directory.offered is not None:
            directory.offered.update([entry.name for entry in entries])
        landing = self._landing
        usable = directory.fd >= 0
        jobs: list[CopyJob] = []
        new: list[int] = []
        for index, entry in enumerate(entries):
            if entry.name == STAGING_NAME:
                check_name(entry.name, reserved=(STAGING_NAME,))
            if not usable or (directory.keys is not None and self._collides(directory, entry.name)):
                if usable is False and not self._dry:
                    landing.report(directory.child(entry.name), "local", "its folder could not be made")
                elif self._dry and not usable:
                    self._count_wanted(entry)
                continue
            directory.entries += 1
            if entry.kind == FILE:
                if not self._is_in_place(directory, entry):
                    new.append(index)
            elif entry.kind == SYMLINK:
                self._symlink(directory, entry)
            elif entry.kind == HARDLINK:
                self._hard_link(directory, entry)
            else:
                raise ProtocolError(f"an entry of kind {entry.kind} was offered among objects")
        hints = self._hints(offer, new)
        for index in new:
            self._small_file(directory, offer, index, entries[index], jobs, hints)
        wanted = offer.wanted
        total = wanted.count(1)
        if total:
            offer.open = total
            landing.offers[number] = offer
        self._answer(wanted, total)
        for job in jobs:
            self._copier.jobs.put(job)

    def _hints(self, offer: SmallOffer, new: list[int]) -> dict[int, tuple[bytes, int]]:
        """What the index knows of the chunks of those entries, by chunk of the offer; one look-up for all."""
        if not self._index or not new:
            return {}
        packed = b"".join([offer.entries[index].chunks for index in new])
        chunks = [
            offer.first[index] + number
            for index in new
            for number in range(len(offer.entries[index].chunks) // CHUNK_BYTES)
        ]
        return {
            chunks[position]: place for position, place in self._index.find(self._root_fd, packed).items()
        }

    def _is_in_place(self, directory: TargetDirectory, entry: Entry) -> bool:
        """Whether a small object is right where it stands; if so, its mode and time are seen to."""
        st = directory.existing.get(entry.name) if directory.existing else None
        if (
            st is not None
            and st.st_size == entry.size
            and st.st_mode & 0o170000 == 0o100000
            and not self._must_not_touch(entry, st)
            and self._same_content(directory, entry, st)
        ):
            self._keep(directory, entry, st)
            return True
        return False

    def _count_wanted(self, entry: Entry) -> None:
        self._counters.bytes_payload += entry.size

    def _answer(self, wanted: bytearray, total: int) -> None:
        if not total:
            self._want(Want(WANT_NONE))
        elif total == len(wanted):
            self._want(Want(WANT_ALL))
        else:
            # int("0101…", 2) turns flags to bits at C speed; bit 0 is the first chunk.
            text = wanted[::-1].translate(_TO_DIGITS)
            self._want(Want(WANT_SOME, int(text, 2).to_bytes((len(wanted) + 7) // 8, "little")))

    def _small_file(
        self,
        directory: TargetDirectory,
        offer: SmallOffer,
        index: int,
        entry: Entry,
        jobs: list[CopyJob],
        hints: dict[int, tuple[bytes, int]],
    ) -> None:
        if self._dry:
            self._count_wanted(entry)
            return
        landing = self._landing
        if entry.size >= LARGE_OBJECT_BYTES:
            raise ProtocolError(f"{show_path(directory.child(entry.name))} is too large to be offered whole")
        landing.opened(directory, entry.name)
        packed = entry.chunks
        if not packed:
            sink = SmallObject(directory, entry, landing.staging)
            landing.adopt(sink)
            landing.add(sink, 0)
            return
        first = offer.first[index]
        count = len(packed) // CHUNK_BYTES
        elsewhere: list[tuple[int, int, bytes]] = []
        offset = 0
        with landing.lock:
            inflight, recent = landing.inflight, landing.recent
            for number in range(count):
                identity = packed[number * CHUNK_BYTES + 4 : (number + 1) * CHUNK_BYTES]
                length = int.from_bytes(packed[number * CHUNK_BYTES : number * CHUNK_BYTES + 4], "little")
                if identity in inflight or identity in recent or first + number in hints:
                    elsewhere.append((number, offset, identity))
                else:
                    inflight[identity] = None
                    offer.wanted[first + number] = 1
                offset += length
        if not elsewhere:
            return  # a sink is made only when its chunks arrive apart
        sink = SmallObject(directory, entry, landing.staging)
        landing.adopt(sink)
        offer.sinks[index] = sink
        for number, offset, identity in elsewhere:
            one = packed[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
            hint = hints.get(first + number)
            if hint is not None:
                self._append_copy(jobs, sink, offset, one, None, hint[0], hint[1])
            else:
                self._reuse(sink, offset, identity, one, jobs)

    def _reuse(self, sink: Sink, offset: int, identity: bytes, one: bytes, jobs: list[CopyJob]) -> None:
        """Get a chunk from another object of this session: one on its way, or one that arrived."""
        landing = self._landing
        with landing.lock:
            waiters = landing.inflight.get(identity, _MISSING)
            if waiters is None:
                landing.inflight[identity] = [(sink, offset)]
                return
            if isinstance(waiters, list):
                waiters.append((sink, offset))
                return
            location = landing.recent.get(identity)
        if (
            location is None
        ):  # forgotten meanwhile: rare, and cheaper to fail and come again than to ask out of turn
            landing.fail_sink(
                sink, "stale", "a chunk that was at hand is not any more; it is fetched in the next pass"
            )
            return
        path, staged, source_offset = location
        jobs.append(CopyJob(sink, offset, one, basis=None, path=(path, staged), source_offset=source_offset))

    def _same_content(self, directory: TargetDirectory, entry: Entry, st: os.stat_result) -> bool:
        known = directory.known.get(entry.name)
        if known is not None:
            return known.kind == FILE and known.chunks == entry.chunks
        if not entry.size:
            return True
        try:
            fd = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory.fd)
        except OSError:
            return False
        try:
            data = os.pread(fd, entry.size + 1, 0)
        finally:
            os.close(fd)
        self._counters.objects_read += 1
        self._counters.bytes_read += len(data)
        directory.unchanged_all = False  # what was just learned is worth keeping
        if len(data) != entry.size:
            return False
        view = memoryview(data)
        at = 0
        chunks = []
        for length in self._cutter.lengths(view):
            chunks.append((length, chunk_id(view[at : at + length])))
            at += length
        return pack_chunks(chunks) == entry.chunks

    def _must_not_touch(self, entry: Entry, st: os.stat_result) -> bool:
        """Whether keeping this file would change an inode that the published tree has too."""
        return (
            self._atomic
            and st.st_nlink > 1
            and (
                stat.S_IMODE(st.st_mode) != entry.mode
                or st.st_mtime_ns != entry.mtime_ns
                or bool(entry.extra)
            )
        )

    def _keep(self, directory: TargetDirectory, entry: Entry, st: os.stat_result) -> None:
        """The content is right: see to mode and time, and leave it."""
        counters = self._counters
        counters.objects_unchanged += 1
        counters.bytes_unchanged += entry.size
        counters.objects_done += 1
        counters.bytes_done += entry.size
        if self._dry:
            return
        if stat.S_IMODE(st.st_mode) != entry.mode or st.st_mtime_ns != entry.mtime_ns or entry.extra:
            try:
                fd = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory.fd)
                try:
                    if (
                        entry.extra
                        and self._read_extra is not None
                        and self._read_extra(fd, st) != entry.extra
                    ):
                        apply_extra(fd, entry.extra)
                    os.fchmod(fd, entry.mode)
                    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
                    st = os.fstat(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                self._landing.report(
                    directory.child(entry.name), "local", f"cannot set mode or time: {error.strerror}"
                )
                return
            directory.unchanged_all = False
        if entry.size < LARGE_OBJECT_BYTES and not entry.extra:
            directory.rows.append((entry.name, st, entry))

    def _symlink(self, directory: TargetDirectory, entry: Entry) -> None:
        path = directory.child(entry.name)
        try:
            check_link_target(path, entry.link, links="keep" if self._options.links == "keep" else "inside")
        except ProtocolError as error:
            self._landing.report(path, "link", error.message)
            return
        st = directory.existing.get(entry.name) if directory.existing else None
        if st is not None and stat.S_ISLNK(st.st_mode):
            try:
                same = os.readlink(entry.name, dir_fd=directory.fd) == entry.link
            except OSError:
                same = False
            if same and not (self._atomic and st.st_nlink > 1 and st.st_mtime_ns != entry.mtime_ns):
                if st.st_mtime_ns != entry.mtime_ns and not self._dry:
                    os.utime(
                        entry.name,
                        ns=(entry.mtime_ns, entry.mtime_ns),
                        dir_fd=directory.fd,
                        follow_symlinks=False,
                    )
                    st = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False)
                    directory.unchanged_all = False
                self._counters.objects_unchanged += 1
                self._counters.objects_done += 1
                directory.rows.append((entry.name, st, entry))
                return
        if not self._dry:
            self._landing.opened(directory, entry.name)
            self._landing.ready("symlink", directory, entry, None)

    def _hard_link(self, directory: TargetDirectory, entry: Entry) -> None:
        check_relative_path(entry.link, reserved=(STAGING_NAME,))
        st = directory.existing.get(entry.name) if directory.existing else None
        if st is not None and st.st_nlink > 1:
            try:
                fd = open_beneath(self._root_fd, entry.link, os.O_RDONLY)
                try:
                    first = os.fstat(fd)
                finally:
                    os.close(fd)
                parent, _, name = entry.link.rpartition(b"/")
                owner = self._landing.directories.get(parent)
                busy = owner is not None and name in owner.open_names
                if not busy and (first.st_ino, first.st_dev) == (st.st_ino, st.st_dev):
                    self._counters.objects_unchanged += 1
                    self._counters.objects_done += 1
                    return
            except OSError:
                pass
        if not self._dry:
            self._landing.opened(directory, entry.name)
            self._landing.ready("hardlink", directory, entry, None)

    # --- large objects ------------------------------------------------------------------------------------------

    def _object_begin(self, entry: Entry) -> None:
        directory = self._current()
        if self._large_entry is not None:
            raise ProtocolError("a large object began inside another")
        if entry.kind != FILE or entry.chunks or entry.runs or entry.size < 1:
            raise ProtocolError("a large object was announced that is none")
        check_name(entry.name, reserved=(STAGING_NAME,))
        # The same object once more is one that could not be read to its end before.
        if entry.name < directory.last_name:
            raise ProtocolError(f"{show_path(directory.child(entry.name))} was offered out of order")
        directory.last_name = entry.name
        self._recorder.large_begin(entry)
        self._large_entry = entry
        if directory.offered is not None:
            directory.offered.add(entry.name)
        self._large = None
        if directory.fd < 0:
            if not self._dry:
                self._landing.report(directory.child(entry.name), "local", "its folder could not be made")
            else:
                self._count_wanted(entry)
            return
        if self._collides(directory, entry.name):
            return
        directory.entries += 1
        large = LargeObject(directory, entry)
        st = directory.existing.get(entry.name) if directory.existing else None
        if st is not None and stat.S_ISREG(st.st_mode) and st.st_size >= self._profile.minimum:
            try:
                fd = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory.fd)
            except OSError:
                pass
            else:
                large.basis = Basis(fd, os.fstat(fd), self._profile, self._cache)
                if not large.basis.known_without_reading:
                    self._counters.objects_read += 1
        self._large = large
        self._landing.adopt(large)
        if not self._dry:
            self._landing.opened(directory, entry.name)
            if (
                large.basis is None
                or large.basis.size_bytes != entry.size
                or self._must_not_touch(entry, large.basis.st)
            ):
                self._stage(large)

    def _stage(self, large: LargeObject) -> None:
        """Make (or find again) the staging file, and bring in what was the same so far."""
        path = large.directory.child(large.entry.name)
        try:
            large.staged = self._landing.staging.open_object(
                path, large.entry.size, self._attempts.get(path, 0)
            )
        except OSError as error:
            raise local_error(error, "cannot stage", path) from error
        same, large.same_until = large.same_until, []
        for offset, packed in same:
            self._take_run(large, offset, packed, None)

    def _object_run(self, message: ObjectRun) -> None:
        packed = message.chunks
        entry, large = self._large_entry, self._large
        if entry is None:
            raise ProtocolError("a run of chunks was offered outside a large object")
        count = len(packed) // CHUNK_BYTES
        if not packed or len(packed) % CHUNK_BYTES or count > MAX_OFFER_CHUNKS:
            raise ProtocolError(
                f"a run of {len(packed)} bytes was offered; 1 to {MAX_OFFER_CHUNKS} whole chunks are allowed"
            )
        lengths = [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES)]
        if not 0 < min(lengths) <= max(lengths) <= self._profile.maximum:
            raise ProtocolError(
                f"a chunk of {max(lengths)} bytes was offered; the profile's largest is {self._profile.maximum}"
            )
        self._recorder.large_chunks(packed)
        number = self._offers
        self._offers += 1
        if large is None:
            self._want(Want(WANT_NONE))
            return
        offset = large.position
        large.position += _size(packed)
        if large.position > entry.size:
            raise ProtocolError(
                f"{show_path(large.directory.child(entry.name))} has more chunks than its size of {entry.size}"
            )
        if large.staged is None and self._same_in_place(large, offset, packed):
            large.same_until.append((offset, packed))
            self._want(Want(WANT_NONE))
            return
        if self._dry:
            self._dry_run(large, offset, packed)
            self._want(Want(WANT_NONE))
            return
        if large.staged is None:
            self._stage(large)
        self._take_run(large, offset, packed, number)

    def _same_in_place(self, large: LargeObject, offset: int, packed: bytes) -> bool:
        """Whether the file in place has just these chunks just here."""
        basis = large.basis
        if basis is None or basis.size_bytes != large.entry.size:
            return False
        return basis.goes_on_with(offset, packed)

    def _dry_run(self, large: LargeObject, offset: int, packed: bytes) -> None:
        for at in range(0, len(packed), CHUNK_BYTES):
            length = int.from_bytes(packed[at : at + 4], "little")
            if (
                large.basis is not None
                and large.basis.find(packed[at : at + CHUNK_BYTES], offset) is not None
            ):
                self._counters.bytes_reused += length
            else:
                self._counters.bytes_payload += length
            offset += length

    def _take_run(self, large: LargeObject, offset: int, packed: bytes, number: int | None) -> None:
        """Find each chunk of a run, or want it (where `number` is given)."""
        staged, basis, landing = large.staged, large.basis, self._landing
        assert staged is not None
        if self._cache is not None:
            st = os.fstat(staged.fd)
            key = Identity(st.st_dev, st.st_ino, large.entry.size, large.entry.mtime_ns, PROVISIONAL)
            self._cache.add_pieces(key, [(offset, packed)], replace=offset == 0)
        count = len(packed) // CHUNK_BYTES
        wanted = bytearray(count)
        offsets: list[int] = []
        jobs: list[CopyJob] = []
        there = 0
        hints: dict[int, tuple[bytes, int]] | None = None
        elsewhere: list[tuple[int, bytes, bytes]] = []
        for index in range(count):
            one = packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            length = int.from_bytes(one[:4], "little")
            identity = one[4:]
            offsets.append(offset)
            if number is None:  # the file in place was found to have it just here
                jobs.append(CopyJob(large, offset, one, basis=basis, path=None, source_offset=offset))
            elif staged.have and staged.have.get(offset) == (length, identity):
                there += length
                self._counters.bytes_reused += length
            elif identity == self._zero and length == self._profile.maximum and not staged.have:
                there += length  # a hole in the staging file is just that
            else:
                found = basis.find(one, offset) if basis is not None else None
                if found is not None:
                    self._append_copy(jobs, large, offset, one, basis, None, found)
                else:
                    with landing.lock:
                        near = identity in landing.inflight or identity in landing.recent
                    if near:
                        elsewhere.append((offset, identity, one))
                    else:
                        if hints is None:
                            hints = self._index.find(self._root_fd, packed) if self._index else {}
                        hint = hints.get(index)
                        if hint is not None:
                            self._append_copy(jobs, large, offset, one, None, hint[0], hint[1])
                        else:
                            with landing.lock:
                                landing.inflight[identity] = None
                            wanted[index] = 1
            offset += length
        total = wanted.count(1)
        if number is not None:
            if total:
                landing.offers[number] = RunOffer(large, packed, offsets, wanted, total)
            self._answer(wanted, total)
        for place, identity, one in elsewhere:
            self._reuse(large, place, identity, one, jobs)
        for job in jobs:
            self._copier.jobs.put(job)
        if there:
            landing.add(large, there)

    @staticmethod
    def _append_copy(
        jobs: list[CopyJob],
        sink: Sink,
        offset: int,
        one: bytes,
        basis: Basis | None,
        path: bytes | None,
        source_offset: int,
    ) -> None:
        """Add a copy of one chunk, as part of the copy before it where both sides go on."""
        last = jobs[-1] if jobs else None
        if (
            last is not None
            and last.sink is sink
            and last.basis is basis
            and (last.path or (None,))[0] == path
        ):
            size = _size(last.packed)
            if (
                last.offset + size == offset
                and last.source_offset + size == source_offset
                and size < _MAX_COPY_BYTES
            ):
                last.packed += one
                return
        where = (path, "") if path is not None else None
        jobs.append(CopyJob(sink, offset, one, basis=basis, path=where, source_offset=source_offset))

    def _object_end(self, message: ObjectEnd) -> None:
        entry, large = self._large_entry, self._large
        if entry is None:
            raise ProtocolError("a large object ended that had not begun")
        self._large_entry = self._large = None
        if not message.reason and large is not None and large.position != entry.size:
            raise ProtocolError(
                f"{show_path(large.directory.child(entry.name))} ended after {large.position} bytes; {entry.size} were announced"
            )
        self._recorder.large_end(keep=not message.reason)
        if large is None:
            return
        directory = large.directory
        if message.reason:
            self._give_up(large, message)
        elif large.staged is not None:
            self._landing.seal(large)
        elif not self._dry:
            self._large_unchanged(large)
        elif sum([_size(packed) for _, packed in large.same_until]) == entry.size:
            self._keep(directory, entry, directory.existing[entry.name])
        if large.basis is not None and not large.failed and (large.staged is None or self._dry):
            large.basis.close()
            large.basis = None
            self._landing.disown(large)

    def _large_unchanged(self, large: LargeObject) -> None:
        basis, directory, entry = large.basis, large.directory, large.entry
        assert basis is not None
        if not basis.unchanged():
            self._landing.fail(directory, entry.name, "stale", "changed at the target while it was compared")
            return
        self._keep(directory, entry, os.fstat(basis.fd))
        if self._cache is not None:
            st = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False)
            if not basis.known_without_reading or Identity.of(st) != basis.identity:
                self._cache.add_pieces(Identity.of(st), large.same_until, replace=True)
        self._landing.done(directory, entry.name)

    def _give_up(self, large: LargeObject, message: ObjectEnd) -> None:
        """The source could not read it to the end, and will say so (or offer it anew)."""
        if self._dry:
            return
        path = large.directory.child(large.entry.name)
        self._attempts[path] = self._attempts.get(path, 0) + 1
        with self._landing.lock:
            large.failed = True  # what was wanted may still arrive; it is checked and thrown away
        self._landing.done(large.directory, large.entry.name)


def _size(packed: bytes) -> int:
    return sum([int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES)])


_TO_DIGITS: Final = bytes(48 + (value != 0) for value in range(256))
