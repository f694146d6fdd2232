"""Hops: one site of a route and the next, as both the ends and the relays make them.

What the neighbours show each other, and what the source's word is good for, is checked here; what then passes over a
hop is nobody's business here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from flowengine.errors import AuthenticationError, FlowError, ProtocolError, TemporaryError
from flowengine.transfer.channel import Channel, disconnected
from flowengine.transfer.control import refusal
from flowengine.transfer.session import Consent
from flowengine.transfer.sites import SiteIdentity, SitePeer, SiteTrust
from flowengine.trust.relay_grant import RelayGrant
from flowengine.wire import hops as hop_messages
from flowengine.wire.handshake import Proof, RelayProof
from flowengine.wire.hops import MAX_HOP_MESSAGE_BYTES, MAX_STREAMS_OF_HOP, HopOpen, HopOpened
from flowengine.wire.keys import Side
from flowengine.wire.messages import Refuse
from flowengine.wire.preamble import Kind, Preamble

__all__ = ["HOP_S", "Hop", "HopGate", "hop_answer", "hop_request", "keep_watch", "make_hop"]

HOP_S: Final = 15.0
"""How long the rest of a route may take to stand."""
_REQUEST_S: Final = 5.0
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 4}
"""A neighbour whose host vanished is noticed within 6 s, though nothing may be said on a hop for hours."""
_UNACKNOWLEDGED_MS: Final = 15_000

Dial = Callable[[SitePeer], Awaitable[Channel]]


class HopGate(Protocol):
    """What policy says at a site of a route, before anything passes."""

    async def release(self, grant: RelayGrant | None) -> Consent:
        """At the source: let data go over a route, or raise; None stands for the direct one."""

    async def relay(self, grant: RelayGrant, ticket: bytes) -> Consent:
        """At a relay: agree to what the source's ticket says, or raise."""

    async def land(self, grant: RelayGrant, ticket: bytes) -> Consent:
        """At the target: agree to streams over this route, or raise."""

    async def passed(self, grant: RelayGrant, consent: Consent, size_bytes: int) -> None:
        """At a relay: a route came to its end, and so much has passed on it."""

    def held(self, grant: RelayGrant, consent: Consent) -> contextlib.AbstractContextManager[None]:
        """Use a route for the length of the block; cancels it, and raises, when it is no longer permitted."""


@dataclass
class Hop:
    """A hop that this side dialled, with the whole rest of its route behind it.

    Attributes:
        stream: TLS to the next site.
        address: where it answered.
        hop_id, key: what preambles of its data connections are made of.
        rtt_s: to the end of the route.
        ticket: the source's, where the source is behind it.
        serial: of the next site's certificate.
        streams: data connections that may be open over it at once.
    """

    grant: RelayGrant
    channel: Channel
    stream: trio.abc.Stream
    address: tuple[str, int]
    hop_id: bytes
    key: bytes = field(repr=False)
    rtt_s: float
    ticket: bytes = field(repr=False)
    serial: str
    streams: int

    def preamble(self, stream: int) -> bytes:
        """What opens a data connection to the next site."""
        return Preamble(self.hop_id, stream, 0, Kind.HOP).encode(self.key)

    async def aclose(self) -> None:
        """End the hop, and with it all its streams."""
        await self.channel.aclose()


@dataclass(frozen=True)
class _HopDialled:
    """One connection to the next site of a route."""

    trust: SiteTrust
    own: SiteIdentity
    document: bytes
    grant: RelayGrant
    at: int
    seen: list[str]

    @property
    def context(self) -> ssl.SSLContext:
        return self.own.client_context

    @property
    def client_fingerprint(self) -> bytes:
        return self.own.facts.fingerprint

    def recognise(self, certificate: bytes | None) -> Proof:
        facts = self.trust.check_peer(certificate)
        expected = self.grant.stops[self.at + 1]
        if (facts.site, facts.key_sha256) != (expected.site, expected.key_sha256):
            raise AuthenticationError(
                f"{facts.shown} answers where the route {self.grant.shown} has {expected.site}",
                hint="its address may be another's now; a site that was enrolled anew needs a new grant",
                reason="grant-other-party",
            )
        self.seen.append(facts.serial)
        return RelayProof(self.document)


class _NextSite(SitePeer):
    """The next site of a route, to be dialled under a relay grant."""

    def _prepare(self, grant: RelayGrant, at: int) -> None:
        self._dialled = _HopDialled(self.trust, self.trust.identity, self.document, grant, at, [])

    def dialled(self) -> _HopDialled:  # type: ignore[override]
        return self._dialled


async def make_hop(
    dial: Dial,
    trust: SiteTrust,
    document: bytes,
    grant: RelayGrant,
    *,
    control: bool,
    ticket: bytes = b"",
    rtt_us: int = 0,
    streams: int = MAX_STREAMS_OF_HOP,
) -> Hop:
    """The hop from this site to the next one of a route, once the rest of the route stands as well.

    Args:
        dial: as `connect.dial`.
        document: the signed relay grant, already admitted.
        control: whether the end-to-end control connection is to go over it.
        ticket: the source's, where the source is on this side.
        rtt_us: round trip from the first site to here.
        streams: data connections that are wanted over it at once.

    Raises:
        TemporaryError: the next site, or one behind it, does not answer.
        FlowError: as one of them refused.
    """
    at = grant.place(trust.identity.party)
    assert at is not None
    peer = _NextSite.at(grant.stops[at + 1].address, trust, document)
    assert isinstance(peer, _NextSite)
    peer._prepare(grant, at)
    channel = await dial(peer)
    try:
        sock = keep_watch(channel.stream)
        asked = HopOpen(control, ticket, min(rtt_us + int(channel.rtt_s * 1e6), (1 << 32) - 1), streams)
        await channel.send_encoded(hop_messages.encode(asked))
        answer = await _receive(channel, HOP_S)
        if not isinstance(answer, HopOpened):
            raise ProtocolError(f"{grant.stops[at + 1].site} did not answer the request for a hop")
        return Hop(
            grant,
            channel,
            channel.bare(),
            sock.getpeername()[:2],
            answer.hop_id,
            channel.secrets.preamble_key(answer.hop_id, Side.SOURCE),
            channel.rtt_s + answer.rtt_us / 1e6,
            answer.ticket,
            peer.dialled().seen[-1],
            min(answer.streams, streams),
        )
    except BaseException:
        await channel.aclose()
        raise


async def hop_request(channel: Channel) -> HopOpen:
    """What a neighbour that showed its relay grant asks for."""
    keep_watch(channel.stream)
    message = await _receive(channel, _REQUEST_S)
    if not isinstance(message, HopOpen):
        raise ProtocolError("a neighbour on a route did not ask for the hop")
    return message


@contextlib.asynccontextmanager
async def hop_answer(channel: Channel) -> AsyncIterator[None]:
    """Tell the neighbour of an error that keeps a hop from being made, then raise it on."""
    try:
        yield
    except FlowError as error:
        await channel.refuse(error)
        raise


async def _receive(channel: Channel, within_s: float) -> hop_messages.HopMessage:
    data = await channel.receive_encoded(within_s, max_message=MAX_HOP_MESSAGE_BYTES)
    if data is None:
        raise disconnected()
    message = hop_messages.decode(data)
    if isinstance(message, Refuse):
        raise refusal(message)
    return message


def keep_watch(stream: trio.abc.Stream) -> trio.socket.SocketType:
    """Have the kernel notice when the host at the other end of a hop is gone; gives the socket below the TLS."""
    while isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    if not isinstance(stream, trio.SocketStream):
        raise TemporaryError("a hop needs a connection of its own")
    sock = stream.socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
    return sock
