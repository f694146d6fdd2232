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
import ssl
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from typing import TYPE_CHECKING, TypeAlias

import trio

from flowengine.chunking import profile_named
from flowengine.errors import AuthenticationError, ProtocolError, TemporaryError
from flowengine.transfer.channel import HANDSHAKE_S, Channel, disconnected, session_errors
from flowengine.transfer.control import STALL_S
from flowengine.transfer.dialing import Dialer
from flowengine.transfer.handshaking import Ahead, Dialled, client_handshake, tls_refusal
from flowengine.transfer.reaching import Reached, reach_straight, straight_way
from flowengine.transfer.session import Session, first_window_bytes
from flowengine.transfer.streams import Streams, congestion_of, prefer_congestion
from flowengine.wire.keys import NO_FINGERPRINT, Side
from flowengine.wire.messages import Open, Opened, Options
from flowengine.wire.proofs import Proof, TicketProof
from flowengine.wire.ticket import Ticket

if TYPE_CHECKING:
    from flowengine.transfer.routes import RoutedPeer
    from flowengine.transfer.sites import SitePeer

__all__ = ["Peer", "dial", "new_session", "open_session"]


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # pinned by fingerprint right after the handshake
    return context


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


Peer: TypeAlias = "Ticket | SitePeer"
"""Whom to dial: whoever a ticket names, or another site under a grant."""


def _routed(peer: Peer) -> RoutedPeer | None:
    """The peer where it may be reached over several routes."""
    if isinstance(peer, Ticket):
        return None
    from flowengine.transfer.routes import RoutedPeer  # nobody with a ticket needs what sites do

    return peer if isinstance(peer, RoutedPeer) else None


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
    routed = _routed(peer)
    reached = await (routed.reach(dial) if routed is not None and routed.ways else reach_straight(peer))
    dialled = _dialled(peer)
    stream = trio.SSLStream(reached.stream, dialled.context, server_side=False)
    try:
        with trio.fail_after(HANDSHAKE_S):
            return await client_handshake(stream, peer.location, dialled, ahead, reached)
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
    routed = _routed(peer)
    async with trio.open_nursery() as nursery:
        dialer = Dialer(nursery, routed, dial)

        def ahead(reached: Reached, rtt_s: float) -> Open:
            prefer_congestion(
                reached.sock
            )  # as on the data connections, so that it tells what they will have
            wanted = request(rtt_s, congestion_of(reached.sock))
            wanted.ticket = reached.consent.document if reached.consent is not None else b""
            ways = (routed.ways if routed is not None else ()) or (straight_way(peer),)
            wanted.streams = dialer.begin(reached, ways, wanted.streams, fixed=fixed_streams)
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
                session = _session_of(channel, answer, asked[0], dialer.streams, compression)
                dialer.join(answer.session_id, key, answer.streams, session.control.post)
                session.stall_s = stall_s
                session.fixed_streams = fixed_streams
                session.consent = over[0].consent
                yield session
        finally:
            if routed is not None:
                routed.dialer = None
            dialer.streams.close()
            await channel.aclose()
            nursery.cancel_scope.cancel()


def _session_of(
    channel: Channel, answer: Opened, asked: Open, streams: Streams, compression: int | None
) -> Session:
    """The session that a server agreed to."""
    session = new_session(
        channel, answer.session_id, asked.profile, asked.options, compression, streams=streams
    )
    session.first_streams = answer.streams
    session.sends = asked.role == "source"
    session.release = answer.ticket
    session.subtrees = answer.subtrees
    return session


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
