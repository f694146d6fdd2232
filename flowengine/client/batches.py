"""Items that come in batches, to be looped over with `async for`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["Batches"]

T = TypeVar("T")


class Batches(AsyncIterator[T], Generic[T]):
    """Items that come in batches. May be left at any point: nothing stays open.

    Args:
        fetch: the next batch; None at the end.
    """

    def __init__(self, fetch: Callable[[], Awaitable[list[T] | None]]) -> None:
        self._fetch = fetch
        self._items: list[T] = []
        self._at = 0

    def __aiter__(self) -> Batches[T]:
        return self

    async def __anext__(self) -> T:
        while self._at >= len(self._items):
            batch = await self.next_batch()
            if batch is None:
                raise StopAsyncIteration
            self._items, self._at = batch, 0
        self._at += 1
        return self._items[self._at - 1]

    async def next_batch(self) -> list[T] | None:
        """What came next, all at once; None at the end."""
        return await self._fetch()
