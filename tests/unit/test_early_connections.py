"""Connections that are begun early: taken once, closed where they come to nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from flowengine.errors import TemporaryError
from flowengine.transfer import early
from flowengine.transfer.reaching import connect
from flowengine.wire.ticket import Ticket


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def ticket_for(listener: socket.socket) -> Ticket:
    host, port = listener.getsockname()
    return Ticket(host, port, b"", bytes(32), bytes(32))


def test_it_is_taken_once(listener: socket.socket) -> None:
    address = listener.getsockname()
    assert not early.is_begun(*address)
    early.begin(*address)
    early.begin(*address)
    taken = early.take(*address, patience_s=10)
    assert taken is not None
    with taken:
        accepted, peer = listener.accept()
        accepted.close()
        assert taken.getsockname() == peer
    assert not early.is_begun(*address)
    assert early.take(*address) is None


def test_who_dials_takes_it(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("another connection was made")

    ticket = ticket_for(listener)
    early.begin(ticket.host, ticket.port)
    accepted, _ = listener.accept()
    monkeypatch.setattr(trio, "open_tcp_stream", refuse)

    async def main() -> None:
        stream = await connect(ticket)
        await stream.send_all(b"hello")
        await stream.aclose()

    with accepted:
        trio.run(main)
        assert accepted.recv(16) == b"hello"


def test_nobody_there_is_said_by_who_dials(listener: socket.socket) -> None:
    ticket = ticket_for(listener)
    listener.close()
    early.begin(ticket.host, ticket.port)
    with pytest.raises(TemporaryError, match="cannot reach"):
        trio.run(connect, ticket)
    assert not early.is_begun(ticket.host, ticket.port)


def test_one_that_the_other_side_closed_is_not_taken(listener: socket.socket) -> None:
    address = listener.getsockname()
    early.begin(*address)
    accepted, peer = listener.accept()
    accepted.shutdown(socket.SHUT_RDWR)
    accepted.close()
    # The end has arrived once the kernel knows no such connection any more, or one that is half closed.
    begun = early._begun[address]
    begun.join()
    assert begun._sock is not None
    assert begun._sock.getsockname() == peer
    begun._sock.settimeout(10)
    assert begun._sock.recv(1, socket.MSG_PEEK) == b""
    assert early.take(*address) is None


def test_one_that_comes_too_late_is_closed(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    address = listener.getsockname()
    real, (here, there) = socket.create_connection, socket.socketpair()

    def slowly(*args: object) -> socket.socket:
        there.recv(1)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_connection", slowly)
    with here, there:
        early.begin(*address)
        begun = early._begun[address]
        assert early.take(*address, patience_s=0) is None
        here.send(b"x")
        begun.join()
    accepted, _ = listener.accept()
    with accepted:
        assert accepted.recv(1) == b""
