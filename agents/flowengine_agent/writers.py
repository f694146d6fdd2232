"""One writer per target path: who writes where in this process, and who waits for whom."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from flowengine.errors import TemporaryError
from flowengine.units import show_path

__all__ = ["Writers"]


@dataclass(eq=False)
class _Writer:
    path: bytes
    task: str
    ended: trio.Event


class Writers:
    """Real paths that tasks write to now. Two overlap where one is the other or lies below it."""

    def __init__(self) -> None:
        self._writers: list[_Writer] = []

    def _in_the_way(self, path: bytes) -> _Writer | None:
        for writer in self._writers:
            short, long = sorted((writer.path.rstrip(b"/"), path.rstrip(b"/")), key=len)
            if long == short or long.startswith(short + b"/"):
                return writer
        return None

    @asynccontextmanager
    async def write(self, path: bytes, task: str, waits: Callable[[str], None]) -> AsyncIterator[None]:
        """Be the one writer of a path and all below and above it; waits until that is so.

        Args:
            waits: told what is waited for, and "" when that is over.
        """
        while (other := self._in_the_way(path)) is not None:
            waits(f"target-path: task {other.task} writes to {show_path(other.path)}")
            await other.ended.wait()
        waits("")
        async with self._writing(path, task):
            yield

    @asynccontextmanager
    async def write_nowait(self, path: bytes, task: str) -> AsyncIterator[None]:
        """As `write`, for a peer that dials again by itself.

        Raises:
            TemporaryError: somebody else writes there (reason "busy").
        """
        other = self._in_the_way(path)
        if other is not None:
            raise TemporaryError(
                f"task {other.task} writes to {show_path(other.path)} now",
                hint="this one goes on when that one has ended",
                reason="busy",
            )
        async with self._writing(path, task):
            yield

    @asynccontextmanager
    async def _writing(self, path: bytes, task: str) -> AsyncIterator[None]:
        writer = _Writer(path, task, trio.Event())
        self._writers.append(writer)
        try:
            yield
        finally:
            self._writers.remove(writer)
            writer.ended.set()
