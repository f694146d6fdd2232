"""Where two sites meet of which neither can be dialled: both dial the relay between them, and one waits there.

Goal
    Sites behind firewalls that let nothing in move data between each other, by the same rules as everybody.
Plan
    The site that waits shows the relay grant and says that it waits. When the other end's request for the hop comes, the
    relay asks it over that connection, as it would have asked a site that it dialled; from there on nothing differs but
    that data connections are dialled by the site that waited: it keeps a few open and idle (*parked*), and dials another
    when one is used.
Invariants
    - Who waits is known by certificate and grant, and is given to nobody but the other end of just that claim and route.
    - Connections that wait, and those that are parked, are bounded.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from flowengine.errors import ProtocolError, TemporaryError
from flowengine.transfer.channel import Channel
from flowengine.transfer.hops import Hop, ask_hop, hop_wait
from flowengine.transfer.reaching import keep_watch
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.relay_grant import RelayGrant
from flowengine.wire.hops import HopOpen
from flowengine.wire.keys import Side

__all__ = ["PARKED", "MeetingPlace"]

PARKED: Final = 4
"""Data connections that a waiting site keeps open and unused."""
MAX_WAITING: Final = 256
_MAX_WAITING_FOR_ONE: Final = 3
"""One for the route that stands, one for the next session, and one that may be dead."""
MEET_S: Final = 8.0
"""How long the end that comes first is kept waiting for the other one; less than it waits for an answer."""


@dataclass(eq=False)
class _Waiting:
    """A site that waits here.

    Attributes:
        taken: set when the other end has come.
        free: set when nobody watches the connection any more.
        over: set when the hop to it has ended.
    """

    channel: Channel
    grant: RelayGrant
    facts: CertificateFacts
    hop_id: bytes
    park: trio.MemorySendChannel[trio.SocketStream]
    parked: trio.MemoryReceiveChannel[trio.SocketStream]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    taken: trio.Event = field(default_factory=trio.Event)
    free: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)


class MeetingPlace:
    """The sites that wait at a relay."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[object, ...], list[_Waiting]] = {}
        self._hops: dict[bytes, _Waiting] = {}
        self._came = trio.Event()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())

    async def wait(
        self,
        channel: Channel,
        grant: RelayGrant,
        facts: CertificateFacts,
        register: Callable[[bytes, bytes], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Keep a site that waits until it goes, or the hop to it has ended.

        Args:
            register: as of `Relay.carry`.

        Raises:
            FlowError: it may not wait; it has not been told.
        """
        hop_id = await hop_wait(channel)
        if len(self) >= MAX_WAITING:
            raise TemporaryError(
                f"{len(self)} sites wait at this relay already, as many as may", reason="busy"
            )
        park, parked = trio.open_memory_channel[trio.SocketStream](2 * PARKED)
        waiting = _Waiting(channel, grant, facts, hop_id, park, parked)
        queue = self._waiting.setdefault(grant.passage, [])
        if len(queue) >= _MAX_WAITING_FOR_ONE:
            queue.pop(0).scope.cancel()
        with register(hop_id, channel.secrets.preamble_key(hop_id, Side.SOURCE)):
            self._hops[hop_id] = waiting
            queue.append(waiting)
            self._came.set()
            self._came = trio.Event()
            try:
                with waiting.scope:
                    await self._until_taken(waiting)
                    waiting.free.set()
                    if waiting.taken.is_set():
                        await waiting.over.wait()
            finally:
                waiting.free.set()
                self._leave(waiting)
                del self._hops[hop_id]
                park.close()
                with contextlib.suppress(trio.EndOfChannel):
                    while True:
                        parked.receive_nowait().socket.close()

    @staticmethod
    async def _until_taken(waiting: _Waiting) -> None:
        """Returns when the other end took it, or it said something, which only its end can be."""
        async with trio.open_nursery() as nursery:

            async def gone() -> None:
                await trio.lowlevel.wait_readable(keep_watch(waiting.channel.stream))
                nursery.cancel_scope.cancel()

            nursery.start_soon(gone)
            await waiting.taken.wait()
            nursery.cancel_scope.cancel()

    def _leave(self, waiting: _Waiting) -> None:
        queue = self._waiting.get(waiting.grant.passage, [])
        if waiting in queue:
            queue.remove(waiting)
        if not queue:
            self._waiting.pop(waiting.grant.passage, None)

    async def make_hop(self, grant: RelayGrant, asked: HopOpen, streams: int) -> Hop:
        """The hop to the last site of a route, which waits here or soon does.

        Args:
            grant: of the other end, which has come.
            asked: what that asks for.

        Raises:
            TemporaryError: the site has not come in time.
            FlowError: as it refused.
        """
        waiting = await self._take(grant)
        try:
            hop = await ask_hop(
                waiting.channel,
                grant,
                waiting.facts,
                control=asked.control,
                ticket=asked.ticket,
                rtt_us=asked.rtt_us,
                streams=streams,
                hop_id=waiting.hop_id,
            )
        except BaseException:
            waiting.over.set()
            raise
        hop.parked, hop.over = waiting.parked, waiting.over
        return hop

    async def _take(self, grant: RelayGrant) -> _Waiting:
        with trio.move_on_after(MEET_S):
            while not self._waiting.get(grant.passage):
                await self._came.wait()
            waiting = self._waiting[grant.passage][
                -1
            ]  # the one that came last is the least likely to be dead
            self._leave(waiting)
            waiting.taken.set()
            await waiting.free.wait()
            return waiting
        raise TemporaryError(
            f"site {grant.stops[-1].site}, which cannot be dialled, has not come to this relay within {MEET_S:.0f} s",
            hint="its agent comes as soon as it hears of it: is it online, and may it dial this relay?",
            reason="disconnected",
        )

    def park(self, hop_id: bytes, tcp: trio.SocketStream) -> bool:
        """Keep a data connection that a waiting site dialled; False where the hop is none of those.

        Raises:
            ProtocolError: there are more than it may have.
        """
        waiting = self._hops.get(hop_id)
        if waiting is None:
            return False
        if waiting.park.statistics().current_buffer_used >= 2 * PARKED:
            raise ProtocolError(f"site {waiting.facts.site} dialled more data connections than it may park")
        # Whoever accepted it closes what it was given.
        own = socket.socket(fileno=tcp.socket.detach())
        waiting.park.send_nowait(trio.SocketStream(trio.socket.from_stdlib_socket(own)))
        return True

    def drop_revoked(self, revoked: frozenset[str]) -> None:
        """Send away who waits with a revoked certificate."""
        for waiting in list(self._hops.values()):
            if waiting.facts.serial in revoked:
                waiting.scope.cancel()

    def close(self) -> None:
        """Send away all who wait."""
        for queue in list(self._waiting.values()):
            for waiting in list(queue):
                waiting.scope.cancel()
