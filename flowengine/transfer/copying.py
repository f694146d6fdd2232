"""Copies what is at hand at the target into what is on its way, each chunk hashed unless it was in this session."""

from __future__ import annotations

import os
import resource
import threading
from collections import deque
from time import perf_counter_ns
from typing import Final

from flowengine.chunking import are_chunks, packed_size
from flowengine.errors import FlowError
from flowengine.store.buffers import Buffer
from flowengine.store.filesystem import READ_FILE, copy_range, local_error, open_beneath
from flowengine.transfer.basis import Basis, Recalled
from flowengine.transfer.landing import Landing
from flowengine.transfer.sinks import LargeObject, Sink
from flowengine.transfer.timing import StageClock

__all__ = ["Copier", "CopyJob", "CopyQueue", "DropJob", "WriteJob", "append_copy"]

_MAX_COPY_BYTES: Final = 4 << 20
_MAX_WAITING: Final = 1024
"""Jobs that may wait before the placer does: a job is a few KiB of memory, for up to 4 MiB of data."""


class CopyJob:
    """Chunks to be taken from a local file into a sink: from a basis, or from a path below the root.

    Attributes:
        size_bytes: of the chunks together.
    """

    __slots__ = ("basis", "offset", "packed", "path", "sink", "size_bytes", "source_offset")

    def __init__(
        self,
        sink: Sink,
        offset: int,
        packed: bytes,
        *,
        basis: Basis | Recalled | None,
        path: tuple[bytes, str | int] | None,
        source_offset: int,
    ) -> None:
        self.sink = sink
        self.offset = offset
        self.packed = packed
        self.basis = basis
        self.path = path
        self.source_offset = source_offset
        self.size_bytes = packed_size(packed)


class DropJob:
    """Old files to be closed, which frees the pages of what has no name any more.

    That takes 0.2 s a gigabyte in memory, for which nobody is to wait.
    """

    __slots__ = ("large",)

    def __init__(self, large: LargeObject) -> None:
        self.large = large


class WriteJob:
    """Chunks that were read from a local file and verified, to be written into a sink; their buffer is let go then."""

    __slots__ = ("buffer", "offset", "packed", "sink", "view")

    def __init__(self, sink: Sink, offset: int, packed: bytes, buffer: Buffer, view: memoryview) -> None:
        buffer.hold()
        self.sink = sink
        self.offset = offset
        self.packed = packed
        self.buffer = buffer
        self.view = view


Job = CopyJob | WriteJob | DropJob


class CopyQueue:
    """Jobs for several copiers: those of one object in their order, and those of several objects at the same time.

    The kernel lets one thread write to a file at a time: a copier takes the first job of an object that no other copier is
    at, and helps with another's only where it has to read for it.

    Args:
        most_objects: that may have jobs waiting; each holds up to three descriptors. By the system's limit, where None.
    """

    def __init__(self, most_objects: int | None = None) -> None:
        self._most_objects = most_objects or max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16)
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._room = threading.Condition(lock)
        # By the object that they write to; None stands for those that only close old files.
        self._waiting: dict[Sink | None, deque[Job]] = {}
        self._count = 0
        self._taken: list[Sink | None] = []
        self._ended = False

    def put(self, job: Job) -> None:
        """Add a job; blocks while very many wait, or of many objects, but not for old files to be closed."""
        sink = _object_of(job)
        with self._changed:
            while sink is not None and not self._ended and self._is_full_for(sink):
                self._room.wait()
            self._waiting.setdefault(sink, deque()).append(job)
            self._count += 1
            self._changed.notify()

    def _is_full_for(self, sink: Sink) -> bool:
        return self._count >= _MAX_WAITING or (
            sink not in self._waiting and len(self._waiting) >= self._most_objects
        )

    def next(self, done: Job | None) -> Job | None:
        """The next job of a thread that has `done` one; blocks. None at the end: then only old files are still closed."""
        with self._changed:
            if done is not None:
                self._taken.remove(_object_of(done))
            while True:
                if self._ended:
                    return self._take(None) if None in self._waiting else None
                for sink in self._waiting:
                    if sink not in self._taken:
                        return self._take(sink)
                for sink, jobs in self._waiting.items():
                    if isinstance(jobs[0], CopyJob):
                        return self._take(sink)
                self._changed.wait()

    def _take(self, sink: Sink | None) -> Job:
        jobs = self._waiting[sink]
        job = jobs.popleft()
        if not jobs:
            del self._waiting[sink]
        self._count -= 1
        self._taken.append(sink)
        self._room.notify()
        return job

    def end(self) -> None:
        """Let every thread go that takes from here, or waits to put something."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            self._room.notify_all()

    def rest(self) -> list[Job]:
        """What no thread will do any more."""
        with self._changed:
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            self._waiting.clear()
            return jobs


def _object_of(job: Job) -> Sink | None:
    """The object that a job writes to."""
    return None if isinstance(job, DropJob) else job.sink


class Copier:
    """Copies what is at hand; its `run` is the body of a thread, of which there may be several."""

    def __init__(self, landing: Landing, root_fd: int, clock: StageClock) -> None:
        self._landing = landing
        self._root_fd = root_fd
        self._clock = clock
        self._local = threading.local()
        self.jobs = CopyQueue()

    def run(self) -> None:
        """Work until the queue ends; blocks."""
        stage = self._clock.stage("copy")
        job: Job | None = None
        while (job := self.jobs.next(job)) is not None:
            begin = perf_counter_ns()
            if isinstance(job, WriteJob):
                self._write(job)
            elif isinstance(job, DropJob):
                job.large.drop_old()
            else:
                self._copy(job)
            stage.since(begin)

    def close(self) -> None:
        """Let go what the jobs that are left hold. No thread may be running any more, this one's or the publisher's."""
        for job in self.jobs.rest():
            if isinstance(job, DropJob):
                job.large.drop_old()
            elif isinstance(job, WriteJob):
                job.buffer.release()

    def _write(self, job: WriteJob) -> None:
        sink = job.sink
        size = len(job.view)
        try:
            if not sink.failed:
                try:
                    sink.put(job.offset, job.view, job.packed)
                except OSError as error:
                    self._refused(sink, error)
                    return
                self._landing.counters.bytes_reused += size
        finally:
            job.buffer.release()
        self._landing.add(sink, size)

    def _refused(self, sink: Sink, error: OSError) -> None:
        """The local system would not copy: a full disk ends the session, anything else fails the object."""
        wrapped = local_error(error, "cannot copy local chunks into", sink.directory.child(sink.entry.name))
        if wrapped.retryable:
            raise wrapped from error
        reason = "stale" if isinstance(error, FileNotFoundError) else "local"
        self._landing.fail_sink(sink, reason, wrapped.message)

    def _copy(self, job: CopyJob) -> None:
        sink = job.sink
        size = job.size_bytes
        if not sink.failed:
            try:
                if job.basis is not None and job.basis.trusted and isinstance(sink, LargeObject):
                    assert sink.staged is not None
                    copy_range(job.basis.fd, job.source_offset, sink.staged.fd, job.offset, size)
                    sink.staged.journal(job.offset, job.packed)
                else:
                    self._copy_checked(job, size)
            except FlowError as error:
                if isinstance(job.basis, Recalled) or (job.path is not None and not job.path[1]):
                    self._landing.index_is_wrong = True
                self._landing.fail_sink(sink, error.reason, error.message)
                return
            except OSError as error:
                self._refused(sink, error)
                return
            self._landing.counters.bytes_reused += size
        self._landing.add(sink, size)

    def _copy_checked(self, job: CopyJob, size: int) -> None:
        """Read, hash, write: for sources that were not hashed in this session."""
        fd = job.basis.fd if job.basis is not None else self._open(job)
        try:
            data = self._buffer(size)
            got = os.preadv(fd, [data], job.source_offset)
        finally:
            if job.basis is None:
                os.close(fd)
        if not are_chunks(data[:got], job.packed):
            raise FlowError(
                "a local chunk that was to be reused is not what it was; it is fetched from the source instead",
                reason="stale",
            )
        job.sink.put(job.offset, data, job.packed)

    def _buffer(self, size: int) -> memoryview:
        """Memory of this thread, used again for every job: fresh memory costs more than what is done with it."""
        view: memoryview | None = getattr(self._local, "view", None)
        if view is None or len(view) < size:
            view = self._local.view = memoryview(bytearray(max(size, _MAX_COPY_BYTES)))
        return view[:size]

    def _open(self, job: CopyJob) -> int:
        assert job.path is not None
        path, staged = job.path
        if not staged:
            return open_beneath(self._root_fd, path, READ_FILE)
        try:
            name, folder = self._landing.staging.find(staged)
            return os.open(name, READ_FILE, dir_fd=folder)
        except FileNotFoundError:
            return open_beneath(self._root_fd, path, READ_FILE)


def append_copy(
    jobs: list[CopyJob],
    sink: Sink,
    offset: int,
    one: bytes,
    basis: Basis | Recalled | None,
    path: bytes | None,
    source_offset: int,
) -> None:
    """Add a copy of one chunk, as part of the copy before it where both sides go on."""
    last = jobs[-1] if jobs else None
    if last is not None and last.sink is sink and last.basis is basis and (last.path or (None,))[0] == path:
        size = last.size_bytes
        if (
            last.offset + size == offset
            and last.source_offset + size == source_offset
            and size < _MAX_COPY_BYTES
        ):
            last.packed += one
            last.size_bytes += int.from_bytes(one[:4], "little")
            return
    where = (path, "") if path is not None else None
    jobs.append(CopyJob(sink, offset, one, basis=basis, path=where, source_offset=source_offset))
