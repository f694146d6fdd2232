"""For callers that block: a thread with an event loop of its own, and plain iterators over what it brings."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, ParamSpec, Protocol, TypeVar

import anyio
import anyio.lowlevel
from anyio.from_thread import BlockingPortal

from flowengine.api.events import Event
from flowengine.client.batches import Batches
from flowengine.client.transport import EventStream

__all__ = ["Events", "Items", "LoopThread", "Run"]

P = ParamSpec("P")
T = TypeVar("T")


class Run(Protocol):
    """Runs an asynchronous function to its end, and gives what it returned."""

    def __call__(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T: ...


class LoopThread:
    """A thread that runs an event loop, from the first call until `close` or the end of the process."""

    def __init__(self) -> None:
        self._ready: Future[BlockingPortal] = Future()
        # A daemon: a client that nobody closed, as notebooks have them, must not keep the interpreter.
        self._thread = threading.Thread(target=self._run, name="flowengine client", daemon=True)
        self._thread.start()
        self._portal = self._ready.result()

    def _run(self) -> None:
        async def main() -> None:
            async with BlockingPortal() as portal:
                self._ready.set_result(portal)
                await portal.sleep_until_stopped()
            for _ in range(3):  # connections that were cut off are closed in the loop's next rounds
                await anyio.lowlevel.checkpoint()

        try:
            anyio.run(main, backend="asyncio")
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise

    def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run to the end. Interrupting the caller (Ctrl-C) cancels the call."""

        async def run() -> T:
            return await function(*args, **kwargs)

        future = self._portal.start_task_soon(run)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop and its thread; what still runs on it is cancelled.

        Something may run though nobody waits for it: an interrupt comes at any instruction, also after a call was
        started and before its caller could remember that.
        """
        self._portal.start_task_soon(self._portal.stop, True)
        self._thread.join()


class Items(Iterator[T], Generic[T]):
    """Items of an asynchronous source, one by one; asks for them in batches."""

    def __init__(self, run: Run, batches: Batches[T]) -> None:
        self._run = run
        self._batches = batches
        self._items: list[T] = []
        self._at = 0

    def __iter__(self) -> Items[T]:
        return self

    def __next__(self) -> T:
        while self._at >= len(self._items):
            batch = self._run(self._batches.next_batch)
            if batch is None:
                raise StopIteration
            self._items, self._at = batch, 0
        self._at += 1
        return self._items[self._at - 1]


class Events(Iterator[Event]):
    """Events as they happen; leave the loop, or close it, to end the stream."""

    def __init__(self, run: Run, stream: EventStream[Event]) -> None:
        self._run = run
        self._stream = stream

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Event:
        event = self._run(self._stream.next_event)
        if event is None:
            raise StopIteration
        return event

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream."""
        self._run(self._stream.aclose)
