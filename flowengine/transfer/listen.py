"""The side that is dialled: one port for control and data connections, told apart by their first byte."""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from flowengine.errors import (
    AuthenticationError,
    Denied,
    FlowError,
    NotFound,
    ProtocolError,
    TemporaryError,
    UsageError,
)
from flowengine.transfer.channel import HANDSHAKE_S, Channel, session_errors
from flowengine.transfer.connect import dial, new_session
from flowengine.transfer.dialing import blocking
from flowengine.transfer.handshaking import send_alert, server_handshake, tls_refusal
from flowengine.transfer.hops import HopGate, hop_answer, hop_request, wait_at_relay
from flowengine.transfer.identity import Identity, TicketGuest
from flowengine.transfer.meeting import PARKED
from flowengine.transfer.reaching import keep_watch
from flowengine.transfer.relay import Relay
from flowengine.transfer.session import Session
from flowengine.transfer.sites import Guest, SiteTrust
from flowengine.transfer.streams import NEAR_RTT_S, Streams, stream_count
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.grant import Grant, Party
from flowengine.trust.relay_grant import RelayGrant
from flowengine.wire import hops as hop_messages
from flowengine.wire.hops import HopOpen, HopOpened
from flowengine.wire.keys import Side
from flowengine.wire.messages import Open, Opened, Options
from flowengine.wire.preamble import (
    MAX_STREAMS,
    PREAMBLE_BYTES,
    SESSION_ID,
    Kind,
    Preamble,
    PreambleRegistry,
    kind_of_connection,
)
from flowengine.wire.ticket import Ticket

__all__ = ["Handler", "Incoming", "Listener"]

PREAMBLE_S: Final = 5.0
"""How long whoever connects may take to say what the connection is for."""
_AGAIN_S: Final = 1.0
"""Pause before another data connection is parked at a relay that did not take the last one."""
_REMEMBERED: Final = 256
"""Sessions that ended and whose late data connections are closed without a word."""


@dataclass(frozen=True)
class _LastHop:
    """The hop over which a route ends here.

    Attributes:
        site: of the neighbour.
        asked: what that asked for.
        hop_id: names the hop.
    """

    grant: RelayGrant
    site: CertificateFacts
    channel: Channel
    asked: HopOpen
    hop_id: bytes

    @property
    def rtt_s(self) -> float:
        """Of the whole route."""
        return self.asked.rtt_us / 1e6

    @property
    def near(self) -> str:
        return self.site.site


@dataclass(frozen=True)
class _Joining:
    """A session that data connections may join, and under which grant."""

    streams: Streams
    long: bool
    grant: Grant | None
    site: CertificateFacts | None

    def is_of(self, relay_grant: RelayGrant) -> bool:
        return _same_task(self.grant, relay_grant)


def _same_task(grant: Grant | None, relay_grant: RelayGrant) -> bool:
    """Whether a route was granted for just what a session does."""
    return grant is not None and (
        (grant.transfer, grant.task, grant.fence, grant.source, grant.target, grant.source_path, grant.target_path)
        == (
            relay_grant.transfer, relay_grant.task, relay_grant.fence, relay_grant.source, relay_grant.target,
            relay_grant.source_path, relay_grant.target_path,
        )
    )  # fmt: skip


@dataclass
class Incoming:
    """A client that proved its right and asked for something.

    Attributes:
        channel: to answer on.
        request: what it asked for.
        peer: its address, for messages.
        grant: under which it is let in; None for a ticket's client.
        site: what its certificate says; None for a ticket's client.
        route: all sites from the source to the target, where its control connection came through relays; else empty.
    """

    channel: Channel
    request: Open
    peer: str
    _listener: Listener
    grant: Grant | None = None
    site: CertificateFacts | None = None

    @property
    def route(self) -> tuple[Party, ...]:
        return self.channel.route

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
        session.subtrees = request.subtrees
        with self._listener._expecting(session_id, self, session.streams):
            try:
                async with session_errors(channel):
                    await channel.send(Opened(count, session_id, release, subtrees=True))
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
        gate: what policy says to routes that end here; None: no route may.
        relay: carries other sites' streams; None: this site does not relay.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        identity: Identity | SiteTrust | None = None,
        log: Callable[[str], None] | None = None,
        gate: HopGate | None = None,
        relay: Relay | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._identity = identity or Identity.fresh()
        self._registry = PreambleRegistry()
        self._joining: dict[bytes, _Joining] = {}
        self._hops = PreambleRegistry(Kind.HOP)
        self._last_hops: dict[bytes, _LastHop] = {}
        self._ended: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._log = log or (lambda line: None)
        self._gate = gate
        self._relay = relay
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

    async def serve(self, handler: Handler, *, max_connections: int = 256) -> None:
        """Accept until cancelled; each client's request is handled in its own task.

        An error of one client's session is logged and told to that client; it does not end the others.
        """
        # A stream that passes keeps its place while it does; those that are served here leave theirs at once.
        passing = self._relay.max_streams if self._relay is not None else 0
        limit = trio.CapacityLimiter(max_connections + passing)
        self._sockets = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in self._bound]

        async def accepted(stream: trio.SocketStream) -> None:
            async with limit:
                await self._connection(stream, handler)

        await trio.serve_listeners(accepted, self._sockets)

    @contextlib.contextmanager
    def _expecting(self, session_id: bytes, incoming: Incoming, streams: Streams) -> Iterator[None]:
        """Let data connections of a session in for the length of the block."""
        channel = incoming.channel
        self._registry.register(session_id, channel.secrets.preamble_key(session_id, Side.SOURCE))
        self._joining[session_id] = _Joining(
            streams, channel.rtt_s >= NEAR_RTT_S, incoming.grant, incoming.site
        )
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
            elif (kind := kind_of_connection(first[0])) is None:
                host = tcp.socket.getpeername()[0]
                await self._control_connection(tcp, peer, host, handler)
            elif kind is Kind.END_TO_END:
                with trio.fail_after(PREAMBLE_S):
                    self._join(await _preamble(tcp), tcp, None)
            else:
                await self._hop_data(tcp)
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

    def _join(self, data: bytes, tcp: trio.SocketStream, hop: _LastHop | None) -> None:
        """Let a data connection, straight or over the last hop of a route, take part in the session that it names."""
        if data[SESSION_ID] in self._ended:  # came too late to be of use, which is nobody's fault
            tcp.socket.close()
            return
        preamble = self._registry.accept(data)
        session = self._joining[preamble.session_id]
        if hop is not None and not session.is_of(hop.grant):
            raise AuthenticationError(
                f"a stream came over the route {hop.grant.shown} for a session of another task",
                reason="grant-other-party",
            )
        near = hop.near if hop is not None else session.site.site if session.site is not None else ""
        session.streams.arrived(preamble.stream, blocking(tcp, long=session.long), near)

    async def _hop_data(self, tcp: trio.SocketStream) -> None:
        """A data connection over a hop: to be passed on, or at the end of its route."""
        with trio.fail_after(PREAMBLE_S):
            data = await _preamble(tcp)
            if data[SESSION_ID] in self._ended:
                tcp.socket.close()
                return
            preamble = self._hops.accept(data)
            hop = self._last_hops.get(preamble.session_id)
            if hop is not None:
                self._join(await _preamble(tcp), tcp, hop)
                return
        assert self._relay is not None
        await self._relay.join(preamble, tcp)

    @contextlib.contextmanager
    def _hop(self, hop_id: bytes, key: bytes) -> Iterator[None]:
        """Let data connections of a hop in for the length of the block."""
        self._hops.register(hop_id, key)
        try:
            yield
        finally:
            self._hops.forget(hop_id)
            self._ended.append(hop_id)

    async def _control_connection(
        self,
        below: trio.abc.Stream,
        peer: str,
        host: str,
        handler: Handler,
        hop: _LastHop | None = None,
    ) -> None:
        """TLS, and what it carries: a session, a look, or a hop of a route.

        Args:
            below: what TLS runs over.
            peer, host: where that comes from, for messages and for the memory of links.
            hop: through which it comes, where it does.
        """
        guest = self._identity.guest()
        stream = trio.SSLStream(below, guest.context, server_side=True)
        with trio.fail_after(HANDSHAKE_S):
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError as error:
                refused = tls_refusal(error, "whoever connected")
                if refused is None:
                    raise
                self._log(f"{peer}: {_logged(refused)}")
                if isinstance(below, trio.SocketStream):
                    await send_alert(stream, below)
                await trio.aclose_forcefully(below)
                return
            guest.certificate = stream.getpeercert(binary_form=True)
            channel = await server_handshake(stream, guest, host)
        if isinstance(guest, Guest) and guest.relay_grant is not None:
            await self._serve_hop(
                channel, guest, guest.relay_grant, peer, host, handler, inner=hop is not None
            )
            return
        if hop is not None:
            channel.rtt_s, channel.route = hop.rtt_s, hop.grant.route
            if not _same_task(guest.grant, hop.grant):
                raise AuthenticationError(
                    f"a control connection of another task came over the route {hop.grant.shown}",
                    reason="grant-other-party",
                )
        await self._serve_requests(channel, guest, peer, handler)

    async def _serve_hop(
        self,
        channel: Channel,
        guest: Guest,
        grant: RelayGrant,
        peer: str,
        host: str,
        handler: Handler,
        *,
        inner: bool,
    ) -> None:
        """A neighbour made a hop to here: carry it on, or be the end of its route, until it ends."""
        assert guest.facts is not None
        try:
            async with hop_answer(channel):
                if inner:
                    raise ProtocolError("a hop was asked for inside another hop")
            at = grant.place(guest.own.party)
            if at != len(grant.stops) - 1:
                async with hop_answer(channel):
                    if self._relay is None:
                        raise Denied(
                            f"site {guest.own.site} does not relay",
                            hint="its operator would have to set enabled in [relay] of site.toml",
                        )
                if guest.facts.site == grant.stops[-1].site:
                    await self._relay.host(channel, grant, guest.facts, self._hop)
                else:
                    await self._relay.carry(channel, guest.document, grant, guest.facts, self._hop)
            else:
                async with hop_answer(channel):
                    asked = await hop_request(channel)
                hop = _LastHop(grant, guest.facts, channel, asked, secrets.token_bytes(16))
                await self._end_of_route(hop, guest.own.site, peer, host, handler)
        finally:
            await channel.aclose()

    async def meet(self, document: bytes, handler: Handler, taken: Callable[[], None]) -> None:
        """Wait at the relay before this site, the last of a route, and serve the other end; returns when that has gone.

        Args:
            document: the signed relay grant.
            handler: as of `serve`.
            taken: called when the other end has come: it may come again for another session.

        Raises:
            FlowError: the relay does not answer or refuses, or policy does, or the connection broke.
        """
        trust = self._identity
        assert isinstance(trust, SiteTrust)
        grant = await trio.to_thread.run_sync(lambda: trust.admit_relay(document, before=None))
        came = await wait_at_relay(dial, trust, document, grant)
        taken()
        hop = _LastHop(grant, came.facts, came.channel, came.asked, came.hop_id)
        peer = "{}:{}".format(*came.address)
        failed: list[FlowError] = []
        async with trio.open_nursery() as nursery:
            for number in range(PARKED):
                nursery.start_soon(self._park, hop, came.address, range(number, MAX_STREAMS, PARKED))
            try:
                await self._end_of_route(hop, trust.identity.site, peer, came.address[0], handler)
            except FlowError as error:
                failed.append(error)
            except (
                trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, ssl.SSLError,
            ) as error:  # fmt: skip
                self._log(f"{peer}: connection dropped: {error or type(error).__name__}")
            finally:
                await came.channel.aclose()
            nursery.cancel_scope.cancel()
        if failed:
            raise failed[0]

    async def _park(self, hop: _LastHop, address: tuple[str, int], numbers: range) -> None:
        """Keep a data connection open to the relay at which this site waited, and another when it is used."""
        key = hop.channel.secrets.preamble_key(hop.hop_id, Side.SOURCE)
        for number in numbers:
            try:
                with trio.fail_after(PREAMBLE_S):
                    tcp = await trio.open_tcp_stream(*address)
                    await tcp.send_all(Preamble(hop.hop_id, number, 0, Kind.HOP).encode(key))
            except (OSError, trio.TooSlowError, trio.BrokenResourceError):
                await trio.sleep(_AGAIN_S)
                continue
            try:
                self._join(await _preamble(tcp), tcp, hop)
            except FlowError as error:
                self._log("{}:{}: {}".format(*address, _logged(error)))
                await trio.sleep(_AGAIN_S)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(_AGAIN_S)
            finally:
                await trio.aclose_forcefully(tcp)

    async def _end_of_route(self, hop: _LastHop, own: str, peer: str, host: str, handler: Handler) -> None:
        channel, grant, asked, hop_id = hop.channel, hop.grant, hop.asked, hop.hop_id
        ticket = b""
        async with hop_answer(channel):
            if self._gate is None:
                raise Denied(f"no route may end at site {own}")
            if grant.dial == "target":
                consent = await self._gate.release(grant)
                ticket = consent.document
            else:
                consent = await self._gate.land(grant, asked.ticket)
        key = channel.secrets.preamble_key(hop_id, Side.SOURCE)
        with self._gate.held(grant, consent), self._hop(hop_id, key):
            self._last_hops[hop_id] = hop
            try:
                await channel.send_encoded(hop_messages.encode(HopOpened(hop_id, ticket, 0, asked.streams)))
                below = channel.bare()
                if asked.control:
                    await self._control_connection(below, f"{peer} (relayed)", host, handler, hop)
                else:  # nothing is said on it; it ends with the route
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await below.receive_some(1)
            finally:
                del self._last_hops[hop_id]

    def drop_revoked(self, revoked: frozenset[str]) -> None:
        """End routes that come in over a neighbour whose certificate was revoked."""
        for hop in self._last_hops.values():
            if hop.site.serial in revoked:
                keep_watch(hop.channel.stream).shutdown(socket.SHUT_RDWR)

    async def _serve_requests(
        self, channel: Channel, guest: TicketGuest | Guest, peer: str, handler: Handler
    ) -> None:
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


async def _preamble(tcp: trio.SocketStream) -> bytes:
    """The bytes that open a data connection; constant size, whoever sends them."""
    data = b""
    while len(data) < PREAMBLE_BYTES:
        part = await tcp.receive_some(PREAMBLE_BYTES - len(data))
        if not part:
            raise ProtocolError("a data connection closed inside its preamble")
        data += part
    return data


def _logged(error: FlowError) -> str:
    """An error as a line of the log; what was refused is found there by its reason."""
    if isinstance(error, AuthenticationError) and error.reason != AuthenticationError.reason:
        return f"refused ({error.reason}): {error.message}"
    return error.message


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
