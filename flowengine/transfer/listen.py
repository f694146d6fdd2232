"""The side that is dialled: one port for control and data connections, told apart by their first byte."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from flowengine.errors import (
    AuthenticationError,
    FlowError,
    NotFound,
    ProtocolError,
    TemporaryError,
    UsageError,
)
from flowengine.transfer.channel import HANDSHAKE_S, Channel, disconnected, session_errors, software
from flowengine.transfer.connect import blocking, new_session
from flowengine.transfer.identity import Identity, TicketGuest
from flowengine.transfer.session import Session
from flowengine.transfer.sites import Guest, SiteTrust, tls_refusal
from flowengine.transfer.streams import NEAR_RTT_S, Streams, stream_count
from flowengine.trust.certificates import CertificateFacts
from flowengine.trust.grant import Grant
from flowengine.wire.control import MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES, ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.handshake import Established, ServerHandshake
from flowengine.wire.handshake import refusal as handshake_refusal
from flowengine.wire.keys import Side
from flowengine.wire.messages import Open, Opened, Options
from flowengine.wire.preamble import PREAMBLE_BYTES, SESSION_ID, Kind, PreambleRegistry, kind_of_connection
from flowengine.wire.ticket import Ticket

__all__ = ["Handler", "Incoming", "Listener"]

PREAMBLE_S: Final = 5.0
_ALERT_S: Final = 1.0
_REMEMBERED: Final = 256
"""Sessions that ended and whose late data connections are closed without a word."""


@dataclass
class Incoming:
    """A client that proved its right and asked for something.

    Attributes:
        channel: to answer on.
        request: what it asked for.
        peer: its address, for messages.
        grant: under which it is let in; None for a ticket's client.
        site: what its certificate says; None for a ticket's client.
    """

    channel: Channel
    request: Open
    peer: str
    _listener: Listener
    grant: Grant | None = None
    site: CertificateFacts | None = None

    @contextlib.asynccontextmanager
    async def accept(
        self, options: Options, compression: int | None = None, *, release: bytes = b""
    ) -> AsyncIterator[Session]:
        """Agree to the request and give the session, which data connections join while the block lasts.

        `release` is this side's own, where it is the source of a site's data.

        An error that ends the session is told to the peer and raised on; `FlowError` only.
        """
        channel, request = self.channel, self.request
        session_id = secrets.token_bytes(16)
        count = stream_count(channel.rtt_s, request.streams)
        session = new_session(channel, session_id, request.profile, options, compression)
        session.first_streams = count
        session.sends = request.role == "target"
        with self._listener._expecting(session_id, channel, session.streams):
            try:
                async with session_errors(channel):
                    await channel.send(Opened(count, session_id, release))
                    yield session
            finally:
                session.streams.close()


Handler = Callable[[Incoming], Awaitable[None]]


class Listener:
    """Accepts tickets' clients, or other sites under grants, on one port.

    Args:
        host, port: where to listen; port 0 takes a free one.
        identity: certificate and secret that let tickets' clients in, a fresh one where None; or whom a site
            believes, to let sites in.
        log: told of what was refused, in one line without secrets.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        identity: Identity | SiteTrust | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._identity = identity or Identity.fresh()
        self._registry = PreambleRegistry()
        self._joining: dict[bytes, tuple[Streams, bool]] = {}
        self._ended: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._log = log or (lambda line: None)
        self._sockets: list[trio.SocketListener] = []
        self._bound: list[socket.socket] = []

    def bind(self) -> None:
        """Take the port; raises `OSError` where that is not possible."""
        infos = socket.getaddrinfo(
            self._host or None, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, proto, _, address = infos[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except BaseException:
            sock.close()
            raise
        self._port = sock.getsockname()[1]
        self._bound = [sock]

    def ticket(self, host: str | None = None, path: bytes = b"") -> Ticket:
        """The ticket that lets a client in."""
        if not isinstance(self._identity, Identity):
            raise UsageError("a site lets nobody in by a ticket")
        return Ticket(host or self._host, self._port, path, self._identity.fingerprint, self._identity.secret)

    @property
    def port(self) -> int:
        """The port, once it is bound."""
        return self._port

    def close_bound(self) -> None:
        """Close the listening sockets in this process (after a fork, in the one that does not serve)."""
        for sock in self._bound:
            sock.close()
        self._bound = []

    async def serve(self, handler: Handler, *, max_connections: int = 256) -> None:
        """Accept until cancelled; each client's request is handled in its own task.

        An error of one client's session is logged and told to that client; it does not end the others.
        """
        limit = trio.CapacityLimiter(max_connections)
        self._sockets = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in self._bound]

        async def accepted(stream: trio.SocketStream) -> None:
            async with limit:
                await self._connection(stream, handler)

        await trio.serve_listeners(accepted, self._sockets)

    @contextlib.contextmanager
    def _expecting(self, session_id: bytes, channel: Channel, streams: Streams) -> Iterator[None]:
        """Let data connections of a session in for the length of the block."""
        self._registry.register(session_id, channel.secrets.preamble_key(session_id, Side.SOURCE))
        self._joining[session_id] = streams, channel.rtt_s >= NEAR_RTT_S
        try:
            yield
        finally:
            self._registry.forget(session_id)
            del self._joining[session_id]
            self._ended.append(session_id)

    async def _connection(self, tcp: trio.SocketStream, handler: Handler) -> None:
        peer = "?"
        try:
            peer = "{}:{}".format(*tcp.socket.getpeername()[:2])
            with trio.fail_after(PREAMBLE_S):
                first = await tcp.socket.recv(1, socket.MSG_PEEK)
            if not first:
                await tcp.aclose()
            elif kind_of_connection(first[0]) is Kind.END_TO_END:
                await self._data_connection(tcp)
            else:
                await self._control_connection(tcp, peer, handler)
        except FlowError as error:
            self._log(f"{peer}: {_logged(error)}")
            await trio.aclose_forcefully(tcp)
        except (
            OSError,
            trio.TooSlowError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            ssl.SSLError,
        ) as error:
            self._log(f"{peer}: connection dropped: {error or type(error).__name__}")
            await trio.aclose_forcefully(tcp)
        except Exception as error:
            # One client's session, whatever is wrong with it, must not end the others'.
            self._log(f"{peer}: internal error, please report it: {_innermost(error)!r}")
            await trio.aclose_forcefully(tcp)

    async def _data_connection(self, tcp: trio.SocketStream) -> None:
        data = b""
        with trio.fail_after(PREAMBLE_S):
            while len(data) < PREAMBLE_BYTES:
                part = await tcp.receive_some(PREAMBLE_BYTES - len(data))
                if not part:
                    raise ProtocolError("a data connection closed inside its preamble")
                data += part
        if data[SESSION_ID] in self._ended:  # came too late to be of use, which is nobody's fault
            await tcp.aclose()
            return
        preamble = self._registry.accept(data)
        streams, long = self._joining[preamble.session_id]
        streams.arrived(preamble.stream, blocking(tcp, long=long))

    async def _control_connection(self, tcp: trio.SocketStream, peer: str, handler: Handler) -> None:
        guest = self._identity.guest()
        stream = trio.SSLStream(tcp, guest.context, server_side=True)
        with trio.fail_after(HANDSHAKE_S):
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError as error:
                refused = tls_refusal(error, "whoever connected")
                if refused is None:
                    raise
                self._log(f"{peer}: {_logged(refused)}")
                await _send_alert(stream, tcp)
                await trio.aclose_forcefully(tcp)
                return
            guest.certificate = stream.getpeercert(binary_form=True)
            channel = await self._server_handshake(stream, guest, tcp.socket.getpeername()[0])
        looked = False
        try:
            while True:
                try:
                    request = await channel.receive()
                except TemporaryError:
                    if looked:
                        return  # it has seen what it came for
                    raise
                if request is None:
                    return
                if not isinstance(request, Open):
                    raise ProtocolError(
                        f"the client began with {type(request).__name__} instead of a request"
                    )
                guest.check_request(request)
                await handler(Incoming(channel, request, peer, self, guest.grant, guest.facts))
                looked = request.role in ("stat", "list")
                if not looked:
                    return
        except FlowError as error:
            self._log(f"{peer}: {_logged(error)}")
            await channel.refuse(error)
        except OSError as error:
            self._log(f"{peer}: {error}")
            await channel.refuse(
                NotFound(str(error)) if isinstance(error, FileNotFoundError) else FlowError(str(error))
            )
        finally:
            await channel.aclose()

    async def _server_handshake(
        self, stream: trio.SSLStream[trio.SocketStream], guest: TicketGuest | Guest, peer: str
    ) -> Channel:
        handshake = ServerHandshake(
            guest.resolver, guest.own_fingerprint, os.urandom(32), software=software()
        )
        decoder = ControlDecoder(MAX_HANDSHAKE_BYTES)
        handshake.start()
        sent_at = 0.0
        while True:
            data = await stream.receive_some(MAX_HANDSHAKE_BYTES)
            rtt = time.monotonic() - sent_at
            if not data:
                raise disconnected()
            try:
                arrived = decoder.feed(data)
                while arrived:
                    for item in await trio.to_thread.run_sync(handshake.receive, arrived.pop(0)):
                        if isinstance(item, Established):
                            # A request may stand right behind the proof.
                            decoder.max_message = MAX_MESSAGE_BYTES
                            secrets = item.secrets(guest.fingerprint)
                            return Channel(stream, secrets, rtt, decoder=decoder, pending=arrived, peer=peer)
                        await stream.send_all(frame(item))
                        sent_at = time.monotonic()
            except FlowError as error:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(frame(handshake_refusal(error)))
                raise


async def _send_alert(stream: trio.SSLStream[trio.SocketStream], tcp: trio.SocketStream) -> None:
    """Send what OpenSSL had to say last, which trio drops: the alert that tells a client why it is not let in."""
    outgoing: ssl.MemoryBIO | None = getattr(stream, "_outgoing", None)
    alert = outgoing.read() if outgoing is not None else b""
    with trio.move_on_after(_ALERT_S), contextlib.suppress(trio.BrokenResourceError):
        if alert:
            await tcp.send_all(alert)
            await tcp.send_eof()
            while await tcp.receive_some(4096):  # or closing would reset the connection under the alert
                pass


def _logged(error: FlowError) -> str:
    """An error as a line of the log; what was refused is found there by its reason."""
    if isinstance(error, AuthenticationError) and error.reason != AuthenticationError.reason:
        return f"refused ({error.reason}): {error.message}"
    return error.message


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
