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
import ssl
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from typing import Protocol, TypeAlias

import trio

from flowengine.chunking import profile_named
from flowengine.errors import AuthenticationError, ProtocolError, TemporaryError
from flowengine.transfer.channel import HANDSHAKE_S, Channel, disconnected, session_errors, software
from flowengine.transfer.control import STALL_S
from flowengine.transfer.dialing import Dialer
from flowengine.transfer.routes import Reached, RoutedPeer, reach, ways_of
from flowengine.transfer.session import Session, first_window_bytes
from flowengine.transfer.sites import SitePeer, tls_refusal
from flowengine.transfer.streams import Streams, congestion_of, prefer_congestion
from flowengine.transfer.tcp_info import tcp_state
from flowengine.wire import messages
from flowengine.wire.control import MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES, ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.handshake import ClientHandshake, Established, Proof, TicketProof
from flowengine.wire.keys import NO_FINGERPRINT, Side
from flowengine.wire.messages import Message, Open, Opened, Options
from flowengine.wire.ticket import Ticket

__all__ = ["Peer", "dial", "new_session", "open_session"]

TlsStream: TypeAlias = "trio.SSLStream[trio.abc.Stream]"
Ahead: TypeAlias = Callable[[Reached, float], Message]


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
    """An authenticated control connection to a peer, in three round trips behind that of TCP, over whichever route stands.

    Args:
        ahead: called with what was reached and its round-trip time once the other side's certificate is the right
            one; what it gives is sent right behind the proof, and answered with the welcome.

    Raises:
        TemporaryError: nobody answers there (reason "disconnected").
        AuthenticationError: whoever answers is not who the ticket or grant names, or does not accept it.
    """
    reached = await reach(peer, dial)
    dialled = _dialled(peer)
    stream = trio.SSLStream(reached.stream, dialled.context, server_side=False)
    try:
        with trio.fail_after(HANDSHAKE_S):
            return await _client_handshake(stream, peer.location, dialled, ahead, reached)
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


async def _client_handshake(
    stream: TlsStream, location: str, dialled: Dialled, ahead: Ahead | None, reached: Reached
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
    # As the kernel saw it while TCP and TLS were set up; through relays the sum of what they saw.
    rtt_s = tcp_state(reached.sock).rtt_s if reached.hop is None else reached.rtt_s
    request = messages.encode(ahead(reached, rtt_s)) if ahead is not None else b""
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
                    peer=reached.address[0],
                    route=reached.hop.grant.route if reached.hop is not None else (),
                )


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
    over: list[Reached] = []
    routed = peer if isinstance(peer, RoutedPeer) else None
    async with trio.open_nursery() as nursery:
        dialer = Dialer(nursery, routed, dial)

        def ahead(reached: Reached, rtt_s: float) -> Open:
            prefer_congestion(
                reached.sock
            )  # as that of the data connections, so it tells what they will have
            wanted = request(rtt_s, congestion_of(reached.sock))
            wanted.ticket = reached.consent.document if reached.consent is not None else b""
            wanted.streams = dialer.begin(reached, ways_of(peer), wanted.streams, fixed=fixed_streams)
            asked.append(wanted)
            over.append(reached)
            return wanted

        channel = await dial(peer, ahead)
        if routed is not None:
            routed.dialer = dialer
            dialer.follow(routed.ways)  # they may have changed since
        try:
            async with session_errors(channel):
                answer = await channel.receive(stall_s)
                if not isinstance(answer, Opened):
                    raise ProtocolError("the other side did not answer the request", reason="disconnected")
                key = channel.secrets.preamble_key(answer.session_id, Side.SOURCE)
                session = new_session(
                    channel,
                    answer.session_id,
                    asked[0].profile,
                    asked[0].options,
                    compression,
                    streams=dialer.streams,
                )
                dialer.join(answer.session_id, key, answer.streams, session.control.post)
                session.stall_s = stall_s
                session.first_streams = answer.streams
                session.fixed_streams = fixed_streams
                session.sends = asked[0].role == "source"
                session.release = answer.ticket
                session.consent = over[0].consent
                yield session
        finally:
            if routed is not None:
                routed.dialer = None
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
        route=channel.route,
    )
