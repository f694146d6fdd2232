"""The side that dials: from a ticket to a session.

Goal
    A long round trip is paid as seldom as possible: TCP, TLS, hello, then the proof with the request behind it.
Plan
    The client checks the server's certificate before it says anything, by a ticket's fingerprint or a federation's CA; the
    handshake proves both ways the secret of ticket or grant. Data connections are dialled all at once while the handshake runs, and join the
    session as soon as it has an id; more of them may be dialled later.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256
from typing import Final, Protocol, TypeAlias

import trio

from flowengine.chunking import profile_named
from flowengine.errors import AuthenticationError, ProtocolError, TemporaryError
from flowengine.transfer.channel import HANDSHAKE_S, Channel, disconnected, session_errors, software
from flowengine.transfer.control import STALL_S
from flowengine.transfer.session import Session, first_window_bytes
from flowengine.transfer.sites import SitePeer, tls_refusal
from flowengine.transfer.streams import (
    MAX_STREAMS,
    NEAR_RTT_S,
    STREAMS_S,
    Streams,
    congestion_of,
    prefer_congestion,
    prepare_socket,
)
from flowengine.transfer.tcp_info import tcp_state
from flowengine.wire import messages
from flowengine.wire.control import MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES, ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.handshake import ClientHandshake, Established, Proof, TicketProof
from flowengine.wire.keys import NO_FINGERPRINT, Side
from flowengine.wire.messages import Message, Open, Opened, Options
from flowengine.wire.preamble import MAX_STREAMS as MAX_NUMBERS
from flowengine.wire.preamble import Preamble
from flowengine.wire.ticket import Ticket

__all__ = ["Peer", "blocking", "dial", "new_session", "open_session"]

CONNECT_S: Final = 20.0

TlsStream: TypeAlias = "trio.SSLStream[trio.SocketStream]"
Ahead: TypeAlias = Callable[[TlsStream, float], Message]


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # pinned by fingerprint right after the handshake
    return context


class Dialled(Protocol):
    """How one whole connection to a peer is made: where it is, who it must be, what to prove to it."""

    @property
    def context(self) -> ssl.SSLContext:
        """For this side of TLS."""

    @property
    def client_fingerprint(self) -> bytes:
        """SHA-256 of the certificate that this side shows in TLS; zeros for none."""

    def recognise(self, certificate: bytes | None) -> Proof:
        """What to prove to whoever showed this certificate (DER); raises `AuthenticationError` for anybody else."""


class _TicketDialled:
    """A ticket names its listener by the fingerprint of a certificate that nobody signed."""

    client_fingerprint = NO_FINGERPRINT

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self.context = _client_context()

    def recognise(self, certificate: bytes | None) -> Proof:
        if not certificate or sha256(certificate).digest() != self._ticket.fingerprint:
            raise AuthenticationError(
                f"whoever answers at {self._ticket.location} is not the one that made the ticket: another certificate",
                hint="flow serve was started anew (ask for the new ticket), or somebody is in between",
            )
        return TicketProof(self._ticket.secret)


Peer: TypeAlias = Ticket | SitePeer
"""Whom to dial: whoever a ticket names, or another site under a grant."""


def _dialled(peer: Peer) -> Dialled:
    return _TicketDialled(peer) if isinstance(peer, Ticket) else peer.dialled()


async def dial(peer: Peer, ahead: Ahead | None = None) -> Channel:
    """An authenticated control connection to a peer, in three round trips behind that of TCP.

    Args:
        ahead: called with the control connection and its round-trip time once the other side's certificate is the
            right one; what it gives is sent right behind the proof, and answered with the welcome.

    Raises:
        TemporaryError: nobody answers there (reason "disconnected").
        AuthenticationError: whoever answers is not who the ticket or grant names, or does not accept it.
    """
    try:
        with trio.fail_after(CONNECT_S):
            tcp = await trio.open_tcp_stream(peer.host, peer.port)
    except (OSError, trio.TooSlowError) as error:
        runs = "flow serve" if isinstance(peer, Ticket) else "the site's agent"
        raise TemporaryError(
            f"cannot reach {peer.location}: {_why(error)}",
            hint=f"check that {runs} runs there and that no firewall stands between",
            reason="disconnected",
            # An agent is started again by whoever runs the site; what a ticket names may never have been there.
            refused=isinstance(peer, Ticket) and _is_refusal(error),
        ) from error
    dialled = _dialled(peer)
    stream = trio.SSLStream(tcp, dialled.context, server_side=False)
    try:
        with trio.fail_after(HANDSHAKE_S):
            return await _client_handshake(stream, peer.location, dialled, ahead)
    except trio.TooSlowError:
        await trio.aclose_forcefully(stream)
        raise TemporaryError(
            f"{peer.location} accepted the connection and then said nothing for {HANDSHAKE_S:.0f} s",
            hint="look at the other side; is it flowengine that listens there?",
            reason="stalled",
        ) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        await trio.aclose_forcefully(stream)
        # With TLS 1.3 a server's refusal of this side's certificate comes behind its own handshake.
        raise tls_refusal(error, peer.location) or disconnected() from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


def _tried(error: BaseException) -> Sequence[BaseException]:
    """What went wrong at each address of a host."""
    cause = error.__cause__ or error
    return cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)


def _is_refusal(error: BaseException) -> bool:
    """Whether a host answered, at every address, that nothing listens there."""
    return all(isinstance(one, ConnectionRefusedError) for one in _tried(error))


def _why(error: BaseException) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {CONNECT_S:.0f} s"
    # trio puts addresses before the system's words, and says of several errors only how many there were.
    reasons = [
        os.strerror(one.errno)
        if isinstance(one, OSError) and one.errno and not isinstance(one, socket.gaierror)
        else getattr(one, "strerror", None) or str(one)
        for one in _tried(error)
    ]
    return ", ".join(dict.fromkeys(reason[:1].lower() + reason[1:] for reason in reasons))


async def _client_handshake(
    stream: TlsStream, location: str, dialled: Dialled, ahead: Ahead | None
) -> Channel:
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        if not isinstance(error.__cause__, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLEOFError):
            raise  # the connection was cut
        raise tls_refusal(error, location) or ProtocolError(
            f"{location} does not speak TLS 1.3", hint="is it flowengine that listens there?"
        ) from error
    certificate = stream.getpeercert(binary_form=True)
    proof = await trio.to_thread.run_sync(dialled.recognise, certificate)
    fingerprint = sha256(certificate or b"").digest()
    handshake = ClientHandshake(proof, fingerprint, os.urandom(32), software=software())
    sock = stream.transport_stream.socket
    rtt_s = tcp_state(sock).rtt_s  # as the kernel saw it while TCP and TLS were set up
    request = messages.encode(ahead(stream, rtt_s)) if ahead is not None else b""
    early = frame(request) if 0 < len(request) <= MAX_HANDSHAKE_BYTES else b""
    decoder = ControlDecoder(MAX_HANDSHAKE_BYTES)
    outgoing: list[bytes | Established] = list(handshake.start())
    while True:
        for item in outgoing:
            assert isinstance(item, bytes)
            if handshake.proof_given:
                # It has shown the right certificate: its welcome may be followed by what the session sends.
                decoder.max_message = MAX_MESSAGE_BYTES
            await stream.send_all(frame(item) + (early if handshake.proof_given else b""))
        data = await stream.receive_some(MAX_HANDSHAKE_BYTES)
        if not data:
            raise disconnected()
        arrived = decoder.feed(data)
        outgoing = []
        while arrived:
            outgoing += handshake.receive(arrived.pop(0))
            if outgoing and isinstance(outgoing[-1], Established):
                if request and not early:
                    await stream.send_all(frame(request))
                return Channel(
                    stream,
                    outgoing[-1].secrets(dialled.client_fingerprint),
                    rtt_s,
                    decoder=decoder,
                    pending=arrived,
                    peer=str(sock.getpeername()[0]),
                )


class _Dialer:
    """Dials data connections to where the control connection leads; they wait until the session has an id.

    Args:
        nursery: runs the dialling; cancelled by whoever ends the session.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._address = ("", 0)
        self._ready = trio.Event()
        self._session_id = b""
        self._key = b""
        self._accepted = 0
        self._numbers = 0
        self._failed = 0
        self.long = False
        self.streams = Streams(self.dial)

    def begin(self, address: tuple[str, int], count: int, *, long: bool) -> None:
        """Dial so many before it is known whether the server agrees."""
        self._address = address
        self.long = long
        self.dial(count)

    def join(self, session_id: bytes, key: bytes, accepted: int) -> None:
        """The server agreed: connections that are there, and those still to come, join the session.

        Args:
            accepted: how many of the first ones the server takes.
        """
        self._session_id, self._key = session_id, key
        if accepted > self._numbers:
            self.dial(min(accepted, MAX_STREAMS) - self._numbers)
        self._accepted = accepted
        self._ready.set()

    def dial(self, count: int) -> None:
        """Dial so many more; one that fails is missing, and nothing else."""
        for _ in range(min(count, MAX_NUMBERS - self._numbers)):
            self._nursery.start_soon(self._one, self._numbers)
            self._numbers += 1

    async def _one(self, number: int) -> None:
        early = not self._ready.is_set()
        try:
            with trio.fail_after(STREAMS_S):
                tcp = await trio.open_tcp_stream(*self._address)
        except (OSError, trio.TooSlowError):
            return  # those that came carry on; without any the session says so
        try:
            await self._ready.wait()
            if early and number >= self._accepted:
                return
            await tcp.send_all(Preamble(self._session_id, number, 0).encode(self._key))
            self.streams.arrived(number, blocking(tcp, long=self.long))
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(tcp)


@contextlib.asynccontextmanager
async def open_session(
    peer: Peer,
    request: Callable[[float, str], Open],
    *,
    compression: int | None = None,
    stall_s: float = STALL_S,
    fixed_streams: bool = False,
) -> AsyncIterator[Session]:
    """A session with a peer, for the length of the block.

    An error that ends it is told to the peer and raised on, perhaps in an exception group.

    Args:
        peer: where to, and the right to it.
        request: what to ask for; called with the round-trip time and the congestion control.
        compression: zstd level of what this side sends, 0 none, None adapts.
        stall_s: how long the peer may say nothing.
        fixed_streams: whether the number of streams stays as it is asked for.

    Raises:
        TemporaryError: nobody answers there, or the connection broke.
        AuthenticationError: whoever answers is not who the ticket or grant names, or does not accept it.
        FlowError: the server refused.
    """
    asked: list[Open] = []
    async with trio.open_nursery() as nursery:
        dialer = _Dialer(nursery)

        def ahead(stream: TlsStream, rtt_s: float) -> Open:
            sock = stream.transport_stream.socket
            prefer_congestion(sock)  # as that of the data connections, so it tells what they will have
            asked.append(request(rtt_s, congestion_of(sock)))
            host, port = sock.getpeername()[:2]
            dialer.begin((host, port), asked[0].streams, long=rtt_s >= NEAR_RTT_S)
            return asked[0]

        channel = await dial(peer, ahead)
        try:
            async with session_errors(channel):
                answer = await channel.receive(stall_s)
                if not isinstance(answer, Opened):
                    raise ProtocolError("the other side did not answer the request", reason="disconnected")
                key = channel.secrets.preamble_key(answer.session_id, Side.SOURCE)
                dialer.join(answer.session_id, key, answer.streams)
                session = new_session(
                    channel,
                    answer.session_id,
                    asked[0].profile,
                    asked[0].options,
                    compression,
                    streams=dialer.streams,
                )
                session.stall_s = stall_s
                session.first_streams = answer.streams
                session.fixed_streams = fixed_streams
                session.sends = asked[0].role == "source"
                session.release = answer.ticket
                yield session
        finally:
            dialer.streams.close()
            await channel.aclose()
            nursery.cancel_scope.cancel()


def new_session(
    channel: Channel,
    session_id: bytes,
    profile_name: str,
    options: Options,
    compression: int | None,
    *,
    streams: Streams | None = None,
) -> Session:
    """The session of a channel on which both sides agreed."""
    return Session(
        control=channel.control(),
        streams=streams if streams is not None else Streams(),
        secrets=channel.secrets,
        session_id=session_id,
        profile=profile_named(profile_name),
        options=options,
        rtt_s=channel.rtt_s,
        window_bytes=first_window_bytes(channel.rtt_s),
        compression=compression,
        peer=channel.peer,
    )


def blocking(tcp: trio.SocketStream, *, long: bool) -> socket.socket:
    """The plain socket of a trio stream, ready for a lane."""
    sock = socket.socket(fileno=tcp.socket.detach())
    prepare_socket(sock, long=long)
    return sock
