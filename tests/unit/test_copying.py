"""What copier threads leave behind when a session breaks is let go by whoever ends it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from flowengine.store.buffers import BufferPool
from flowengine.transfer.copying import Copier, DropJob, WriteJob
from flowengine.transfer.timing import StageClock


class Large:
    """A large object that holds the old file which it replaces."""

    def __init__(self, path: Path) -> None:
        self.old = os.open(path, os.O_RDONLY)

    def drop_old(self) -> None:
        os.close(self.old)
        self.old = -1


def test_jobs_that_nobody_does_any_more_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    large, pool = Large(tmp_path / "old"), BufferPool(1, 4096)
    copier = Copier(cast(Any, None), -1, StageClock())
    copier.jobs.put(None)  # a thread's end stands before what the publisher still had
    copier.jobs.put(DropJob(cast(Any, large)))
    buffer = pool.acquire()
    copier.jobs.put(WriteJob(cast(Any, None), 0, b"", buffer, buffer.view))
    buffer.release()
    assert pool.exhausted()
    copier.close()
    assert large.old == -1
    assert not pool.exhausted()
