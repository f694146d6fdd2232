"""Hops: one site of a route and the next, as both the ends and the relays make them.

What the neighbours show each other, and what the source's word is good for, is checked here; what then passes over a
hop is nobody's business here.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec
import trio

from flowengine.errors import AuthenticationError, FlowError, ProtocolError
from flowengine.transfer.channel import Channel, disconnected
from flowengine.transfer.control import refusal
from flowengine.transfer.reaching import keep_watch
from flowengine.transfer.session import Consent
from flowengine.transfer.sites import SiteIdentity, SitePeer, SiteTrust
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.relay_grant import RelayGrant
from flowengine.wire import hops as hop_messages
from flowengine.wire.hops import MAX_HOP_MESSAGE_BYTES, MAX_STREAMS_OF_HOP, HopOpen, HopOpened, HopWait
from flowengine.wire.keys import Side
from flowengine.wire.messages import Refuse
from flowengine.wire.preamble import Kind, Preamble
from flowengine.wire.proofs import Proof, RelayProof

__all__ = [
    "HOP_S", "Hop", "HopGate", "Waited", "ask_hop", "hop_answer", "hop_request", "hop_wait", "make_hop",
    "wait_at_relay",
]  # fmt: skip

HOP_S: Final = 15.0
"""How long the rest of a route may take to stand."""
_REQUEST_S: Final = 5.0

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
    """A hop that this side asked for, with the whole rest of its route behind it.

    Attributes:
        stream: TLS to the next site.
        address: where it answered.
        hop_id, key: what preambles of its data connections are made of.
        rtt_s: to the end of the route.
        ticket: the source's, where the source is behind it.
        serial: of the next site's certificate.
        streams: data connections that may be open over it at once.
        parked: data connections that the next site dialled, where it is the one that dials; else None.
        over: set when the hop has ended.
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
    parked: trio.MemoryReceiveChannel[trio.SocketStream] | None = None
    over: trio.Event = field(default_factory=trio.Event)

    async def connect(self, stream: int) -> tuple[trio.SocketStream, bytes]:
        """A data connection to the next site, and what must be sent on it before anything else."""
        if self.parked is not None:
            return await self.parked.receive(), b""
        return await trio.open_tcp_stream(*self.address), self.preamble(stream)

    def preamble(self, stream: int) -> bytes:
        """What opens a data connection to the next site."""
        return Preamble(self.hop_id, stream, 0, Kind.HOP).encode(self.key)

    async def aclose(self) -> None:
        """End the hop, and with it all its streams."""
        await self.channel.aclose()
        self.over.set()


class _HopDialled(msgspec.Struct, frozen=True):
    """One connection to the next site of a route, or from one that waits to the relay before it."""

    trust: SiteTrust
    own: SiteIdentity
    document: bytes
    grant: RelayGrant
    stop: int
    seen: list[CertificateFacts]

    @property
    def context(self) -> ssl.SSLContext:
        return self.own.client_context

    @property
    def client_fingerprint(self) -> bytes:
        return self.own.facts.fingerprint

    def recognise(self, certificate: bytes | None) -> Proof:
        facts = self.trust.check_peer(certificate)
        expected = self.grant.stops[self.stop]
        if (facts.site, facts.key_sha256) != (expected.site, expected.key_sha256):
            raise AuthenticationError(
                f"{facts.shown} answers where the route {self.grant.shown} has {expected.site}",
                hint="its address may be another's now; a site that was enrolled anew needs a new grant",
                reason="grant-other-party",
            )
        self.seen.append(facts)
        return RelayProof(self.document)


class _NextSite(SitePeer):
    """A neighbour on a route, to be dialled under a relay grant."""

    _dialled: _HopDialled

    @classmethod
    def of(cls, trust: SiteTrust, document: bytes, grant: RelayGrant, stop: int) -> _NextSite:
        peer = cls.at(grant.stops[stop].address, trust, document)
        assert isinstance(peer, _NextSite)
        peer._dialled = _HopDialled(trust, trust.identity, document, grant, stop, [])
        return peer

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
    peer = _NextSite.of(trust, document, grant, at + 1)
    channel = await dial(peer)
    return await ask_hop(
        channel,
        grant,
        peer.dialled().seen[-1],
        control=control,
        ticket=ticket,
        rtt_us=rtt_us,
        streams=streams,
    )


async def ask_hop(
    channel: Channel,
    grant: RelayGrant,
    facts: CertificateFacts,
    *,
    control: bool,
    ticket: bytes,
    rtt_us: int,
    streams: int,
    hop_id: bytes = b"",
) -> Hop:
    """Ask the next site of a route for the hop, over a connection that either of both dialled; closed when it fails.

    Args:
        facts: of the next site's certificate; the others as of `make_hop`.
        hop_id: as the next site named the hop already; empty where it does so now.

    Raises:
        TemporaryError, FlowError: as of `make_hop`.
    """
    try:
        sock = keep_watch(channel.stream)
        asked = HopOpen(control, ticket, min(rtt_us + int(channel.rtt_s * 1e6), (1 << 32) - 1), streams)
        await channel.send_encoded(hop_messages.encode(asked))
        answer = await _receive(channel, HOP_S)
        if not isinstance(answer, HopOpened) or hop_id not in (b"", answer.hop_id):
            raise ProtocolError(f"{facts.site} did not answer the request for a hop")
        return Hop(
            grant,
            channel,
            channel.bare(),
            sock.getpeername()[:2],
            answer.hop_id,
            channel.secrets.preamble_key(answer.hop_id, Side.SOURCE),
            channel.rtt_s + answer.rtt_us / 1e6,
            answer.ticket,
            facts.serial,
            min(answer.streams, streams),
        )
    except BaseException:
        await channel.aclose()
        raise


class Waited(msgspec.Struct, frozen=True):
    """The last site of a route waited at the relay before it, and was asked.

    Attributes:
        channel: to the relay.
        facts: of the relay's certificate.
        address: where it answered, and data connections are dialled.
        asked: what the relay asks for.
    """

    channel: Channel
    facts: CertificateFacts
    address: tuple[str, int]
    hop_id: bytes
    asked: HopOpen


async def wait_at_relay(dial: Dial, trust: SiteTrust, document: bytes, grant: RelayGrant) -> Waited:
    """Dial the relay before this site, the last of a route, and wait there until the other end has come.

    Args:
        document: the signed relay grant, already admitted.

    Raises:
        TemporaryError: the relay does not answer, or the connection broke.
        FlowError: as it refused.
    """
    peer = _NextSite.of(trust, document, grant, len(grant.stops) - 2)
    channel = await dial(peer)
    try:
        sock = keep_watch(channel.stream)
        hop_id = os.urandom(16)
        await channel.send_encoded(hop_messages.encode(HopWait(hop_id)))
        asked = await _receive(channel, float("inf"))
        if not isinstance(asked, HopOpen):
            raise ProtocolError(f"{peer.dialled().seen[-1].site} did not ask for the hop that was waited for")
        return Waited(channel, peer.dialled().seen[-1], sock.getpeername()[:2], hop_id, asked)
    except BaseException:
        await channel.aclose()
        raise


async def hop_wait(channel: Channel) -> bytes:
    """The hop id that a site chose which dialled this relay to wait here."""
    keep_watch(channel.stream)
    message = await _receive(channel, _REQUEST_S)
    if not isinstance(message, HopWait):
        raise ProtocolError("a site that cannot be dialled did not say that it waits")
    return message.hop_id


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
