"""A bounded pool of reusable buffers: the one byte budget for data between disk and network.

Guarantees that no more than `count` buffers of `size_bytes` exist; who wants one more waits. A buffer goes back when
its last holder lets go. The most recently used buffer is handed out first, because it is the one still in cache.
"""

from __future__ import annotations

import mmap
import threading
from time import perf_counter_ns

from flowengine.errors import FlowError

__all__ = ["Buffer", "BufferPool", "PoolClosed", "fresh_memory"]


def fresh_memory(size_bytes: int) -> memoryview:
    """Writable memory that costs nothing until it is touched: a `bytearray` writes all its zeros first.

    Short transfers touch little of the buffers that long ones need.
    """
    return memoryview(mmap.mmap(-1, size_bytes))


class PoolClosed(FlowError):
    """The transfer is over and its pool was closed; the waiting thread should end."""

    reason = "interrupted"


class Buffer:
    """`size_bytes` of memory with a count of holders. Starts with one holder."""

    __slots__ = ("_holders", "_pool", "view")

    def __init__(self, pool: BufferPool, size_bytes: int) -> None:
        self._pool = pool
        self._holders = 0
        self.view = fresh_memory(size_bytes)

    def hold(self) -> None:
        """Add one holder."""
        with self._pool.lock:
            self._holders += 1

    def release(self) -> None:
        """Drop one holder; the last one gives the buffer back. The memory may be overwritten from then on."""
        with self._pool.lock:
            self._holders -= 1
            assert self._holders >= 0, "a buffer was released more often than held"
            if self._holders == 0:
                self._pool._give_back(self)


class BufferPool:
    """At most `count` buffers of `size_bytes` each, allocated when first needed.

    Attributes:
        waited_ns: time that callers of `acquire` spent waiting, all together.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.count = count
        self.lock = threading.Lock()
        self._free: list[Buffer] = []
        self._made = 0
        self._closed = False
        self.waited_ns = 0
        self._returned = threading.Condition(self.lock)

    def acquire(self) -> Buffer:
        """A buffer with one holder; blocks while all are held.

        Raises:
            PoolClosed: the pool was closed before or meanwhile.
        """
        with self.lock:
            while True:
                if self._closed:
                    raise PoolClosed("the buffer pool was closed")
                if self._free:
                    buffer = self._free.pop()
                    break
                if self._made < self.count:
                    self._made += 1
                    buffer = Buffer(self, self.size_bytes)
                    break
                began = perf_counter_ns()
                self._returned.wait()
                self.waited_ns += perf_counter_ns() - began
            buffer._holders = 1
            return buffer

    def exhausted(self) -> bool:
        """Whether an `acquire` would wait now."""
        with self.lock:
            return not self._free and self._made >= self.count

    def close(self) -> None:
        """Wake every waiter with `PoolClosed`. Buffers still held stay valid."""
        with self.lock:
            self._closed = True
            self._returned.notify_all()

    def _give_back(self, buffer: Buffer) -> None:
        self._free.append(buffer)
        self._returned.notify()
