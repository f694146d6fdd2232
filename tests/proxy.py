"""A TCP proxy between a target and a source that tests can make cut, flip and record what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flowengine.wire.ticket import Ticket


@dataclass
class Way:
    """One direction of one connection.

    Attributes:
        number: of the connection, in order of arrival.
        upstream: towards the server.
        data: what passed, where the proxy records.
    """

    number: int
    upstream: bool
    passed: int = 0
    data: bytearray = field(default_factory=bytearray)


Meddle = Callable[[Way, bytes], bytes | None]
"""Given what is about to pass; gives what passes instead, or None to cut the connection."""


class Proxy:
    """Passes connections on to a ticket's server; `meddle` sees and changes every piece."""

    def __init__(self, ticket: Ticket, meddle: Meddle | None = None, *, record: bool = False) -> None:
        self._server = (ticket.host, ticket.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._meddle = meddle
        self._record = record
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.ways: list[Way] = []
        self.ticket = Ticket(
            "127.0.0.1", self._listener.getsockname()[1], ticket.path, ticket.fingerprint, ticket.secret
        )
        self._start(self._accept)

    @property
    def passed(self) -> int:
        """Bytes that passed in all."""
        return sum(way.passed for way in self.ways)

    def _start(self, body: Callable[[], None]) -> None:
        thread = threading.Thread(target=body, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:
                client.close()
                continue
            with self._lock:
                number = len(self.ways) // 2
                up, down = Way(number, True), Way(number, False)
                self.ways += [up, down]
                self._sockets += [client, server]
            self._start(lambda a=client, b=server, w=up: self._pump(a, b, w))
            self._start(lambda a=server, b=client, w=down: self._pump(a, b, w))

    def _pump(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        try:
            while data := source.recv(1 << 18):
                if self._meddle is not None:
                    changed = self._meddle(way, data)
                    if changed is None:
                        self.cut()
                        return
                    data = changed
                if self._record:
                    way.data += data
                way.passed += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every connection that is open now."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._closing = [*getattr(self, "_closing", []), *sockets]

    def close(self) -> None:
        """End the proxy."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for sock in self._closing:
            sock.close()


@contextlib.contextmanager
def proxied(ticket: Ticket, meddle: Meddle | None = None, *, record: bool = False) -> Iterator[Proxy]:
    """A proxy in front of a served folder; `proxy.ticket` leads through it."""
    proxy = Proxy(ticket, meddle, record=record)
    try:
        yield proxy
    finally:
        proxy.close()
