"""What passes through a machine leaves the system's page cache as it was.

Goal
    Moving more than fits into memory takes nothing from it that others use, nor time of its own for pages that nobody asks
    for again.
Plan
    Reading: before a window of a file is read, the system is asked whether anything of it is in memory (mincore(2)). Where
    nothing is, the window is let go of again (POSIX_FADV_DONTNEED), some way behind the reading. Writing: what a session
    writes of large objects beyond its share of the memory is let go of likewise.
Invariants
    - What was in the cache before it was read stays.
    - These are hints: nothing fails by them, and a file system that knows them not works as it did.
    - A filter of system calls without mincore (seccomp(2), as of a unit of systemd), which ends who calls it, ends no transfer.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections import deque
from functools import cache
from typing import Final

from flowengine.chunking.library import place_of
from flowengine.machine import memory_limits, usable_processors
from flowengine.store.filesystem import libc
from flowengine.units import MIB

__all__ = [
    "LAG_BYTES",
    "WINDOW_BYTES",
    "ReadTrail",
    "WriteTrail",
    "learn",
    "may_ask",
    "share_of_memory",
]

WINDOW_BYTES: Final = 8 * MIB
LAG_BYTES: Final = 256 * MIB
"""How far behind: another session that reads the same file a little later finds it, and what was written is on the disk."""
_MEMORY_SHARE: Final = 16


@cache
def share_of_memory() -> int:
    """How many bytes of large objects one session leaves in the cache: a sixteenth of the memory that it may use."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *memory_limits()]) // _MEMORY_SHARE


def _let_go(fd: int, offset: int, size_bytes: int) -> None:
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)


_QUESTION: Final = "import ctypes; c = ctypes.CDLL(None); c.prctl(4, 0, 0, 0, 0); c.mincore(None, 0, None)"
"""Asked about nothing; and no core is kept of who is ended by it (PR_SET_DUMPABLE)."""


@cache
def may_ask() -> bool:
    """Whether mincore(2) can be called here: behind a filter of system calls that is tried once, by another process.

    What a filter does to who calls what it does not permit cannot be learned otherwise: some end it.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            if b"\nSeccomp:\t2\n" not in status.read():
                return True
        silent = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        words = [sys.executable or "", "-I", "-S", "-c", _QUESTION]
        asked = os.posix_spawn(words[0], words, os.environ, file_actions=silent)
        return os.waitpid(asked, 0)[1] == 0
    except OSError:
        return False


def learn() -> None:
    """Learn now what cannot be asked any more once this process, or one forked from it, is held to a few folders."""
    may_ask()
    share_of_memory()
    usable_processors()


class ReadTrail:
    """Follows one reading of a file from `offset` on. For use by one thread; `end` comes before the file is closed.

    Args:
        fd: of the file, open for reading.
        ahead_bytes: how far beyond what was reached somebody, or the system, may be reading already.
    """

    def __init__(self, fd: int, size_bytes: int, offset: int = 0, *, ahead_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._ahead_bytes = ahead_bytes
        self._asked = offset // WINDOW_BYTES * WINDOW_BYTES
        self._brought: deque[int] = deque()
        self._pages = bytearray(WINDOW_BYTES // mmap.PAGESIZE)

    def reached(self, offset: int) -> None:
        """All before `offset` was read; what is beyond `ahead_bytes` behind it was not."""
        until = min(self._size_bytes, offset + self._ahead_bytes)
        while self._asked < until:
            if not self._is_there(self._asked):
                self._brought.append(self._asked)
            self._asked += WINDOW_BYTES
        while self._brought and self._brought[0] + WINDOW_BYTES + LAG_BYTES <= offset:
            _let_go(self._fd, self._brought.popleft(), WINDOW_BYTES)

    def skip(self, offset: int) -> None:
        """All up to `offset` is a hole, and not read: it need not be asked about."""
        self._asked = max(self._asked, offset // WINDOW_BYTES * WINDOW_BYTES)
        self.reached(offset)

    def end(self) -> None:
        """Nothing more is read."""
        while self._brought:
            _let_go(self._fd, self._brought.popleft(), WINDOW_BYTES)

    def _is_there(self, window: int) -> bool:
        """Whether some of a window is in memory, or may be: that of a file of somebody else is not told."""
        if not may_ask():
            return True
        size = min(WINDOW_BYTES, self._size_bytes - window)
        count = -(-size // mmap.PAGESIZE)
        try:
            # Not all of it at once: that would take from what may be mapped. Nobody looks into it.
            with (
                mmap.mmap(self._fd, size, prot=mmap.PROT_READ, offset=window) as mapped,
                place_of(memoryview(mapped)) as (place, _),
                place_of(self._pages) as (pages, _),
            ):
                failed = libc().mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), ctypes.c_void_p(pages))
        except (OSError, ValueError):  # not every file system maps, and it may be shorter by now
            return True
        return bool(failed) or self._pages.count(0, 0, count) < count


class WriteTrail:
    """Follows one writing of a file, by any threads, from its start to its end and a little out of order."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept_from = 0

    def wrote(self, end: int) -> None:
        """Something was written that ends at `end`, and the disk was told to begin with it.

        What the disk has not taken yet stays, and goes with `end`.
        """
        until = (end - LAG_BYTES) // WINDOW_BYTES * WINDOW_BYTES
        start = self._kept_from
        if until > start:
            self._kept_from = until  # should two threads come here at once, one asks for what is gone already
            _let_go(self._fd, start, until - start)

    def end(self) -> None:
        """Nothing more is written; what is on the disk by now is let go of."""
        _let_go(self._fd, 0, 0)
