"""A place on the way of bytes where tests stop them: what happens then is not a matter of luck."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from proxy import Proxy, Way
from support import free_port

from flowengine.wire.ticket import Ticket

__all__ = ["Gate", "gated"]


class Gate:
    """Lets bytes from the dialled side through up to a number, then holds all connections until it is moved on."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._passed = 0
        self._until = 0
        self._open = False
        self.port = 0
        """Of the gate: where peers dial."""
        self.behind = 0
        """Of the agent behind it."""
        self.proxy: Proxy | None = None

    def meddle(self, way: Way, data: bytes) -> bytes:
        """For the proxy."""
        with self._condition:
            if not way.upstream:
                self._passed += len(data)
                while self._passed > self._until and not self._open:
                    self._condition.notify_all()
                    self._condition.wait()
        return data

    def wait_reached(self, size: int) -> None:
        """Until so many bytes have passed in all; nothing more passes then."""
        with self._condition:
            self._until = size
            self._condition.notify_all()
            assert self._condition.wait_for(lambda: self._passed >= size, 240), f"{self._passed} of {size}"

    def open(self) -> None:
        """Hold nothing back any more."""
        with self._condition:
            self._open = True
            self._condition.notify_all()


@contextlib.contextmanager
def gated() -> Iterator[Gate]:
    """A gate before a free port, which an agent may take (`gate.behind`)."""
    free = free_port()
    gate = Gate()
    gate.proxy = Proxy(Ticket("127.0.0.1", free, b"", bytes(32), bytes(32)), gate.meddle)
    gate.port, gate.behind = gate.proxy.ticket.port, free
    try:
        yield gate
    finally:
        gate.open()
        gate.proxy.close()
