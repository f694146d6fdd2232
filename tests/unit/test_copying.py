"""What copiers do in which order, and what is let go of where a session breaks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from flowengine.store.buffers import Buffer, BufferPool
from flowengine.transfer import copying
from flowengine.transfer.copying import Copier, CopyJob, CopyQueue, DropJob, WriteJob
from flowengine.transfer.timing import StageClock


class Large:
    """A large object that holds the old file which it replaces."""

    def __init__(self, path: Path) -> None:
        self.old = os.open(path, os.O_RDONLY)

    def drop_old(self) -> None:
        os.close(self.old)
        self.old = -1


@pytest.fixture
def buffer() -> Buffer:
    return BufferPool(1, 64).acquire()


def copy(sink: object, offset: int = 0) -> CopyJob:
    return CopyJob(cast(Any, sink), offset, b"", basis=None, path=(b"old", ""), source_offset=offset)


def write(sink: object, buffer: Buffer) -> WriteJob:
    return WriteJob(cast(Any, sink), 0, b"", buffer, buffer.view)


def test_two_copiers_are_at_two_objects(buffer: Buffer) -> None:
    jobs = CopyQueue()
    mine = [copy("a", 0), copy("a", 1), copy("a", 2)]
    other = [write("b", buffer), write("b", buffer)]
    for job in [*mine, *other]:
        jobs.put(job)
    assert jobs.next(None) is mine[0]
    assert jobs.next(None) is other[0]
    assert jobs.next(mine[0]) is mine[1]  # and not the other's, which is at its object still
    assert jobs.next(other[0]) is other[1]


def test_a_copier_without_an_object_helps_to_read_and_does_not_wait_to_write(buffer: Buffer) -> None:
    jobs = CopyQueue()
    for job in (copies := [copy("a", 0), copy("a", 1)]):
        jobs.put(job)
    assert [jobs.next(None), jobs.next(None)] == copies
    for job in (writes := [write("b", buffer), write("b", buffer)]):
        jobs.put(job)
    assert jobs.next(copies[0]) is writes[0]
    jobs.put(last := copy("c"))
    assert jobs.next(copies[1]) is last  # the second write is for whoever writes the first
    assert jobs.next(writes[0]) is writes[1]


def test_the_end_lets_everybody_go_and_old_files_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_MAX_WAITING", 1)
    jobs = CopyQueue()
    jobs.put(copy("a"))
    putter = threading.Thread(target=jobs.put, args=(copy("b"),))  # there is no room
    putter.start()
    jobs.put(drop := DropJob(cast(Any, "large")))  # nobody waits to have an old file closed
    assert putter.is_alive()
    jobs.end()
    putter.join(10)
    assert not putter.is_alive()
    assert jobs.next(None) is drop
    assert jobs.next(drop) is None
    assert len(jobs.rest()) == 2
    assert jobs.rest() == []


def test_only_so_many_objects_have_jobs_waiting() -> None:
    jobs = CopyQueue(most_objects=1)
    jobs.put(first := copy("a"))
    jobs.put(second := copy("a"))
    putter = threading.Thread(target=jobs.put, args=(other := copy("b"),))
    putter.start()
    assert jobs.next(None) is first
    assert putter.is_alive()
    assert jobs.next(first) is second
    putter.join(10)
    assert jobs.next(second) is other


def test_a_copier_that_waits_for_a_job_is_let_go() -> None:
    jobs, told = CopyQueue(), []
    copier = threading.Thread(target=lambda: told.append(jobs.next(None)))
    copier.start()
    jobs.end()
    copier.join(10)
    assert told == [None]


def test_jobs_that_nobody_does_any_more_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    large, pool = Large(tmp_path / "old"), BufferPool(1, 4096)
    copier = Copier(cast(Any, None), -1, StageClock())
    buffer = pool.acquire()
    copier.jobs.put(write("a", buffer))
    buffer.release()
    copier.jobs.end()
    copier.jobs.put(DropJob(cast(Any, large)))  # the publisher had still that
    assert pool.exhausted()
    copier.close()
    assert large.old == -1
    assert not pool.exhausted()
