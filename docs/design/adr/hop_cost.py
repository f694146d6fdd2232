"""What it costs to hand a unit of work to another thread: by a trio task, or by a queue between threads.

    python docs/design/adr/hop_cost.py

Belongs to 0003-lanes-are-threads.md. Prints medians of five runs.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable

import trio

UNITS = 20_000


def nothing() -> None:
    """The work."""


async def one_after_another() -> float:
    """Seconds for one call of a worker thread by one task."""
    await trio.to_thread.run_sync(nothing)
    start = time.perf_counter()
    for _ in range(UNITS):
        await trio.to_thread.run_sync(nothing)
    return (time.perf_counter() - start) / UNITS


async def channel_and_hop(workers: int) -> float:
    """Seconds for one unit that goes through a memory channel and one thread hop, with several workers."""
    send, receive = trio.open_memory_channel[int](16)
    limiter = trio.CapacityLimiter(workers)

    async def worker(units: trio.MemoryReceiveChannel[int]) -> None:
        async with units:
            async for _ in units:
                await trio.to_thread.run_sync(nothing, limiter=limiter)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(worker, receive.clone())
        receive.close()
        async with send:
            for unit in range(UNITS):
                await send.send(unit)
    return (time.perf_counter() - start) / UNITS


def there_and_back() -> float:
    """Seconds for one unit to another thread and an answer from it: both have to wake every time."""
    there: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def body() -> None:
        while (unit := there.get()) is not None:
            back.put(unit)

    thread = threading.Thread(target=body)
    thread.start()
    start = time.perf_counter()
    for unit in range(UNITS):
        there.put(unit)
        back.get()
    spent = time.perf_counter() - start
    there.put(None)
    thread.join()
    return spent / UNITS


def waiting_units(threads: int) -> float:
    """Seconds for one unit to threads that find one waiting nearly always."""
    units: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def body() -> None:
        while units.get() is not None:
            nothing()

    running = [threading.Thread(target=body) for _ in range(threads)]
    for thread in running:
        thread.start()
    start = time.perf_counter()
    for unit in range(UNITS):
        units.put(unit)
    for _ in running:
        units.put(None)
    for thread in running:
        thread.join()
    return (time.perf_counter() - start) / UNITS


def show(name: str, measure: Callable[[], float]) -> None:
    """Print the median in microseconds."""
    print(f"{name:62} {statistics.median(measure() for _ in range(5)) * 1e6:8.1f} us")


if __name__ == "__main__":
    show("trio.to_thread.run_sync, one after another", lambda: trio.run(one_after_another))
    for count in (1, 4):
        show(f"trio channel, {count} tasks with a hop each", lambda n=count: trio.run(channel_and_hop, n))
    show("queue between two threads, there and back", there_and_back)
    for count in (1, 4):
        show(f"queue to {count} threads, units waiting", lambda n=count: waiting_units(n))
