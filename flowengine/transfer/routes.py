"""Routes of a session, as the side that dials knows them: straight to the other end, or over relays.

Goal
    A session begins over whichever route answers first, in the order that the plan gave, and the loss of one costs a
    second or two.
Plan
    The control connection is tried over the routes one by one, each with a head start before the next; a route that
    failed lately goes last. All that TLS runs over is given as one `Reached`, whatever lies between.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from flowengine.errors import FlowError
from flowengine.transfer.channel import Channel
from flowengine.transfer.hops import HopGate, make_hop
from flowengine.transfer.reaching import Reached, Way, connect, keep_watch
from flowengine.transfer.sites import SitePeer
from flowengine.transfer.tcp_info import tcp_state

if TYPE_CHECKING:
    from flowengine.transfer.dialing import Dialer

__all__ = ["MAX_WAYS", "RoutedPeer"]

MAX_WAYS: Final = 8
"""Routes that one session uses at once."""
HEAD_START_S: Final = 1.0
_FAILED_LATELY_S: Final = 10.0

Dial = Callable[[SitePeer], Awaitable[Channel]]


@dataclass
class RoutedPeer(SitePeer):
    """The other end of a task, to be dialled over one or several routes.

    Attributes:
        ways: the routes, best first; where there are none, it is dialled straight.
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

    async def reach(self, dial: Dial) -> Reached:
        """The first of the routes that stands, for the control connection.

        Args:
            dial: makes the connection to the next site of a route.

        Raises:
            FlowError: none does; the error of one of them, one that may pass if there is any.
        """
        won: list[Reached] = []
        errors: list[FlowError] = []

        async def attempt(way: Way, over: trio.Event) -> None:
            try:
                reached = await self.over(way, dial, control=True)
            except FlowError as error:
                self.failed(way)
                errors.append(error)
                over.set()
                return
            if won:
                await trio.aclose_forcefully(reached.stream)
                return
            won.append(reached)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for way in self.in_order():
                over = trio.Event()
                nursery.start_soon(attempt, way, over)
                with trio.move_on_after(HEAD_START_S):
                    await over.wait()
        if won:
            return won[0]
        raise next((error for error in errors if error.retryable), errors[0])
