"""Routes of a session, as the side that dials knows them: straight to the other end, or over relays.

Goal
    A session begins over whichever route answers first, in the order that the plan gave, and the loss of one costs a
    second or two.
Plan
    The control connection is tried over the routes one by one, each with a head start before the next; a route that
    failed lately goes last. All that TLS runs over is given as one `Reached`, whatever lies between.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from flowengine.errors import FlowError, TemporaryError
from flowengine.transfer import early
from flowengine.transfer.channel import Channel
from flowengine.transfer.hops import Hop, HopGate, keep_watch, make_hop
from flowengine.transfer.session import Consent
from flowengine.transfer.sites import SitePeer
from flowengine.transfer.tcp_info import tcp_state
from flowengine.wire.ticket import Ticket

if TYPE_CHECKING:
    from flowengine.transfer.dialing import Dialer

__all__ = ["MAX_WAYS", "Reached", "RoutedPeer", "Way", "connect", "reach", "ways_of"]

CONNECT_S: Final = 20.0
MAX_WAYS: Final = 8
"""Routes that one session uses at once."""
HEAD_START_S: Final = 1.0
_FAILED_LATELY_S: Final = 10.0

Dial = Callable[[SitePeer], Awaitable[Channel]]


@dataclass(frozen=True)
class Way:
    """One route.

    Attributes:
        sites: in the order in which they are dialled; empty names where no sites are known.
        address: where the second of them is dialled, as "host:port".
        document: the signed relay grant; empty where there is no relay.
    """

    sites: tuple[str, ...]
    address: str
    document: bytes = field(default=b"", repr=False)

    @property
    def near(self) -> str:
        """The site next to the dialling end."""
        return self.sites[1]

    @property
    def far(self) -> str:
        """The site next to the other end."""
        return self.sites[-2]

    @property
    def shown(self) -> str:
        """The route in words."""
        return " > ".join(self.sites) if self.sites[0] else self.address


class Reached(msgspec.Struct):
    """What the TLS between the two ends runs over.

    Attributes:
        stream: TCP, or the inside of a hop.
        sock: of the TCP connection that leaves this host.
        rtt_s: to the other end.
        consent: what policy said here to the route; None where it was not asked yet.
        hop: the first hop, where there is one.
    """

    way: Way
    stream: trio.abc.Stream
    sock: trio.socket.SocketType
    rtt_s: float
    consent: Consent | None = None
    hop: Hop | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where data connections of this route are dialled."""
        host, port = self.sock.getpeername()[:2]
        return host, port


class Located(Protocol):
    """Where somebody listens."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def location(self) -> str: ...


@dataclass
class RoutedPeer(SitePeer):
    """The other end of a task, to be dialled over one or several routes.

    Attributes:
        ways: the routes, best first; never empty.
        gate: what policy says at this site.
        sends: whether this side is the source.
        dialer: of the session that runs now.
        note: told of routes that cannot be used, in one line.
    """

    ways: tuple[Way, ...] = ()
    gate: HopGate | None = None
    sends: bool = False
    dialer: Dialer | None = None
    note: Callable[[str], None] = lambda line: None
    _failed_at: dict[tuple[str, ...], float] = field(default_factory=dict)

    def use(self, ways: Sequence[Way]) -> None:
        """Go over these routes from now on, also in the session that runs."""
        self.ways = tuple(ways[:MAX_WAYS])
        if self.dialer is not None:
            self.dialer.follow(self.ways)

    def drop_revoked(self) -> None:
        """End hops to neighbours whose certificates were revoked; the session goes on over what is left."""
        if self.dialer is not None:
            self.dialer.drop_revoked(self.trust.revoked)

    def in_order(self) -> list[Way]:
        """The routes as they are to be tried."""
        now = trio.current_time()
        return sorted(
            self.ways,
            key=lambda way: now - self._failed_at.get(way.sites, -_FAILED_LATELY_S) < _FAILED_LATELY_S,
        )

    def failed(self, way: Way) -> None:
        """A route did not stand, or broke."""
        self._failed_at[way.sites] = trio.current_time()

    async def over(self, way: Way, dial: Dial, *, control: bool) -> Reached:
        """This route's way to the other end, with policy's consent.

        Args:
            control: whether the control connection is to go over it.

        Raises:
            FlowError: it does not stand, or is not permitted.
        """
        if not way.document:
            consent = await self.gate.release(None) if self.gate is not None and self.sends else None
            tcp = await connect(SitePeer.at(way.address, self.trust, b""))
            return Reached(way, tcp, tcp.socket, tcp_state(tcp.socket).rtt_s, consent)
        grant = await trio.to_thread.run_sync(lambda: self.trust.admit_relay(way.document, before=None))
        consent = await self.gate.release(grant) if self.gate is not None and self.sends else None
        ticket = consent.document if consent is not None else b""
        hop = await make_hop(dial, self.trust, way.document, grant, control=control, ticket=ticket)
        try:
            if not self.sends and self.gate is not None and not control:
                consent = await self.gate.land(
                    grant, hop.ticket
                )  # of the control connection's route the session asks
        except BaseException:
            await hop.aclose()
            raise
        return Reached(way, hop.stream, keep_watch(hop.stream), hop.rtt_s, consent, hop)


def ways_of(peer: Ticket | SitePeer) -> tuple[Way, ...]:
    """The routes to a peer; straight to it where it knows none."""
    if isinstance(peer, RoutedPeer) and peer.ways:
        return peer.ways
    return (Way(("", ""), f"{peer.host}:{peer.port}"),)


async def reach(peer: Ticket | SitePeer, dial: Dial) -> Reached:
    """The first route to a peer that stands, for the control connection.

    Args:
        dial: makes the connection to the next site of a route.

    Raises:
        FlowError: none does; the error of one of them, one that may pass if there is any.
    """
    if not isinstance(peer, RoutedPeer) or not peer.ways:
        tcp = await connect(peer)
        return Reached(ways_of(peer)[0], tcp, tcp.socket, tcp_state(tcp.socket).rtt_s)
    won: list[Reached] = []
    errors: list[FlowError] = []

    async def attempt(way: Way, over: trio.Event) -> None:
        try:
            reached = await peer.over(way, dial, control=True)
        except FlowError as error:
            peer.failed(way)
            errors.append(error)
            over.set()
            return
        if won:
            await trio.aclose_forcefully(reached.stream)
            return
        won.append(reached)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for way in peer.in_order():
            over = trio.Event()
            nursery.start_soon(attempt, way, over)
            with trio.move_on_after(HEAD_START_S):
                await over.wait()
    if won:
        return won[0]
    raise next((error for error in errors if error.retryable), errors[0])


async def connect(peer: Located) -> trio.SocketStream:
    """TCP to where a peer listens.

    Raises:
        TemporaryError: nobody answers there (reason "disconnected").
    """
    if early.is_begun(peer.host, peer.port):
        sock = await trio.to_thread.run_sync(early.take, peer.host, peer.port)
        if sock is not None:
            return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    try:
        with trio.fail_after(CONNECT_S):
            return await trio.open_tcp_stream(peer.host, peer.port)
    except (OSError, trio.TooSlowError) as error:
        runs = "flow serve" if isinstance(peer, Ticket) else "the site's agent"
        raise TemporaryError(
            f"cannot reach {peer.location}: {_why(error)}",
            hint=f"check that {runs} runs there and that no firewall stands between",
            reason="disconnected",
            # An agent is started again by whoever runs the site; what a ticket names may never have been there.
            refused=isinstance(peer, Ticket) and _is_refusal(error),
        ) from error


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
