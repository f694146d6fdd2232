"""The relay: hops of other sites' transfers, spliced to the next hop. It has no key and keeps nothing.

Goal
    Sealed streams pass through this site at the speed of its network, within its own limits, and only those that the
    coordinator granted and policy here agrees to.
Plan
    A *passage* is one route through this site: the hop that a neighbour dialled, and the one that was made onward. While
    both stand, what comes on the one's control connection goes to the other, and each data connection that names the
    passage is dialled on and handed to a `Splice` in a thread.
Invariants
    - Nothing passes before the relay grant was admitted, the onward route stands, and the gate agreed to the ticket.
    - A passage ends as a whole: with either hop, a revoked neighbour, too many bytes, or this agent.
    - Passages, streams, half-open connections and bytes on their way are bounded, each in one place.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from flowengine.errors import ProtocolError, TemporaryError
from flowengine.transfer.channel import Channel
from flowengine.transfer.connect import dial
from flowengine.transfer.dialing import blocking
from flowengine.transfer.hops import Hop, HopGate, hop_answer, hop_request, make_hop
from flowengine.transfer.meeting import MeetingPlace
from flowengine.transfer.pacing import Pacer
from flowengine.transfer.session import Consent
from flowengine.transfer.sites import SiteTrust
from flowengine.transfer.splicing import Splice
from flowengine.transfer.streams import NEAR_RTT_S
from flowengine.transfer.tcp_info import tcp_state
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.relay_grant import RelayGrant
from flowengine.wire import hops as hop_messages
from flowengine.wire.hops import HopOpen, HopOpened
from flowengine.wire.keys import Side
from flowengine.wire.preamble import PREAMBLE_BYTES, Preamble

__all__ = ["Passed", "Relay"]

MAX_PASSAGES: Final = 256
_ONWARD_S: Final = 5.0
"""How long the next site may take to accept a data connection."""
_IDLE_S: Final = 180.0
"""A control connection on which nothing passes for so long is dead: both ends say something twice a second."""
_PUMP_BYTES: Final = 64 * 1024
_TICK_S: Final = 0.5
_SLACK_BYTES: Final = 64 << 20
"""What may pass beyond a grant's payload: frames, control messages, and what a broken pass sent in vain."""


@dataclass(frozen=True)
class Passed:
    """What passed on one passage so far.

    Attributes:
        hop_id: names the passage.
        before, behind: the sites next to this one, towards the source and towards the target.
        streams: open now.
    """

    hop_id: bytes
    grant: RelayGrant
    before: str
    behind: str
    passed_bytes: int
    streams: int


@dataclass(eq=False)
class _Passage:
    grant: RelayGrant
    onward: Hop
    pacer: Callable[[], Pacer]
    serials: frozenset[str]
    before: str
    behind: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    splices: set[Splice] = field(default_factory=set)
    ended_bytes: int = 0
    opening: int = 0
    why: str = ""

    def passed_bytes(self) -> int:
        return self.ended_bytes + sum(splice.passed_bytes for splice in list(self.splices))

    def end(self, why: str) -> None:
        self.why = self.why or why
        self.scope.cancel()


class Relay:
    """Carries other sites' streams.

    Args:
        gate: asked before anything passes.
        pacer: gives the rates for what goes to a site for a grant.
        max_streams: data connections that pass at once.
        log: told of each passage as it begins and ends, with facts.
    """

    def __init__(
        self,
        trust: SiteTrust,
        gate: HopGate,
        pacer: Callable[[RelayGrant, str], Pacer],
        *,
        max_streams: int,
        log: Callable[[str, dict[str, object]], None],
    ) -> None:
        self._trust = trust
        self._gate = gate
        self._pacer = pacer
        self._log = log
        self._passages: dict[bytes, _Passage] = {}
        # One that takes the place of another may come before that one's thread has ended.
        self._limiter = trio.CapacityLimiter(2 * max_streams)
        self._meeting = MeetingPlace()
        self._draining = False
        self._making = 0
        self._none_left = trio.Event()
        self.max_streams = max_streams
        self.passed_bytes = 0
        """By passages that ended."""

    @property
    def streams(self) -> int:
        """Data connections that pass now."""
        return sum(len(passage.splices) + passage.opening for passage in self._passages.values())

    def passages(self) -> list[Passed]:
        """What passes now, and what passed on it."""
        return [
            Passed(hop_id, p.grant, p.before, p.behind, p.passed_bytes(), len(p.splices))
            for hop_id, p in self._passages.items()
        ]

    def drop_revoked(self) -> None:
        """End what passes between neighbours of which one's certificate was revoked."""
        for passage in self._passages.values():
            if passage.serials & self._trust.revoked:
                passage.end("certificate-revoked")
        self._meeting.drop_revoked(self._trust.revoked)

    async def drain(self, grace_s: float) -> None:
        """Take no new passages, let those that are nearly done end, then cut the rest off, and wait for that."""
        self._draining = True
        self._meeting.close()
        with trio.move_on_after(grace_s):
            await self._all_ended()
        for passage in self._passages.values():
            passage.end("draining")
        await self._all_ended()

    async def _all_ended(self) -> None:
        while self._passages:
            self._none_left = trio.Event()
            await self._none_left.wait()

    async def carry(
        self,
        channel: Channel,
        document: bytes,
        grant: RelayGrant,
        facts: CertificateFacts,
        register: Callable[[bytes, bytes], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Serve one hop that a neighbour dialled, until it ends.

        Args:
            document, grant: the relay grant, admitted for this site and that neighbour.
            facts: of the neighbour's certificate.
            register: lets data connections in that name a hop, by its id and key.

        Raises:
            FlowError: the passage cannot be made; the neighbour was told.
        """
        async with hop_answer(channel):
            asked = await hop_request(channel)
            self._check_room()
            self._making += 1
            try:
                consent: Consent | None = None
                if grant.dial == "source":
                    consent = await self._gate.relay(grant, asked.ticket)
                onward = await self._onward(document, grant, asked)
            finally:
                self._making -= 1
        try:
            async with hop_answer(channel):
                if consent is None:
                    consent = await self._gate.relay(grant, onward.ticket)
                self._check_room()
            with self._gate.held(grant, consent):
                await self._run(channel, grant, facts, onward, consent, register, control=asked.control)
        finally:
            await onward.aclose()

    async def _onward(self, document: bytes, grant: RelayGrant, asked: HopOpen) -> Hop:
        streams = min(asked.streams, self._room())
        if grant.meets and grant.place(self._trust.identity.party) == len(grant.stops) - 2:
            return await self._meeting.make_hop(grant, asked, streams)
        return await make_hop(
            dial,
            self._trust,
            document,
            grant,
            control=asked.control,
            ticket=asked.ticket,
            rtt_us=asked.rtt_us,
            streams=streams,
        )

    async def host(
        self,
        channel: Channel,
        grant: RelayGrant,
        facts: CertificateFacts,
        register: Callable[[bytes, bytes], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Have the last site of a route wait here, which cannot be dialled; returns when it has gone.

        Args:
            grant, facts, register: as of `carry`, of the site that waits.

        Raises:
            FlowError: it may not wait; it was told.
        """
        async with hop_answer(channel):
            self._check_room()
            await self._meeting.wait(channel, grant, facts, register)

    def _room(self) -> int:
        """Data connections that may still be promised."""
        return self.max_streams - sum(passage.onward.streams for passage in self._passages.values())

    def _check_room(self) -> None:
        if self._draining:
            raise TemporaryError("this relay is stopping", hint="another route is used", reason="busy")
        if len(self._passages) + self._making >= MAX_PASSAGES or self._room() < 1:
            raise TemporaryError(
                f"this relay has given its {self.max_streams} streams to {len(self._passages)} routes",
                hint="another route is used; an operator may raise max_streams in [relay] of site.toml",
                reason="busy",
            )

    async def _run(
        self,
        channel: Channel,
        grant: RelayGrant,
        facts: CertificateFacts,
        onward: Hop,
        consent: Consent,
        register: Callable[[bytes, bytes], contextlib.AbstractContextManager[None]],
        *,
        control: bool,
    ) -> None:
        at = grant.place(self._trust.identity.party)
        assert at is not None
        before, behind = grant.neighbour(at, "source"), grant.neighbour(at, "target")
        hop_id = secrets.token_bytes(16)
        passage = _Passage(
            grant,
            onward,
            partial(self._pacer, grant, behind),
            frozenset({facts.serial, onward.serial}),
            before,
            behind,
        )
        about: dict[str, object] = {
            "task": grant.task, "transfer": grant.transfer, "before": before, "behind": behind, "control": control,
        }  # fmt: skip
        began = time.monotonic()
        with register(hop_id, channel.secrets.preamble_key(hop_id, Side.SOURCE)):
            self._passages[hop_id] = passage
            try:
                ticket = onward.ticket if grant.dial == "target" else b""
                opened = HopOpened(hop_id, ticket, int(onward.rtt_s * 1e6), onward.streams)
                await channel.send_encoded(hop_messages.encode(opened))
                self._log("relay begins", about)
                with passage.scope:
                    async with trio.open_nursery() as nursery:
                        near, far = channel.bare(), onward.stream
                        for source, target in ((near, far), (far, near)):
                            nursery.start_soon(partial(self._pump, passage, source, target, control=control))
                        nursery.start_soon(self._watch, passage)
            finally:
                await self._end(hop_id, passage)
                why = passage.why or "a hop was closed"
                seconds = round(time.monotonic() - began, 1)
                size_bytes = passage.passed_bytes()
                self._log("relay ended", about | {"bytes": size_bytes, "s": seconds, "why": why})
                with trio.CancelScope(shield=True):
                    await self._gate.passed(grant, consent, size_bytes)

    async def _end(self, hop_id: bytes, passage: _Passage) -> None:
        for splice in list(passage.splices):
            splice.stop()
        del self._passages[hop_id]
        self.passed_bytes += passage.passed_bytes()
        self._none_left.set()

    @staticmethod
    async def _pump(
        passage: _Passage, source: trio.abc.Stream, target: trio.abc.Stream, *, control: bool
    ) -> None:
        """Pass on what comes until either side ends; without a control connection nothing may come."""
        try:
            while True:
                with trio.fail_after(_IDLE_S if control else float("inf")):
                    data = await source.receive_some(_PUMP_BYTES)
                    if not data or not control:
                        return
                    await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            return
        finally:
            passage.scope.cancel()

    async def _watch(self, passage: _Passage) -> None:
        limit = passage.grant.byte_limit
        while True:
            await trio.sleep(_TICK_S)
            if limit is not None and passage.passed_bytes() > limit + limit // 10 + _SLACK_BYTES:
                passage.end("grant-used-up")

    async def join(self, preamble: Preamble, tcp: trio.SocketStream) -> None:
        """Pass on one data connection, which named its passage; returns when it has ended.

        Raises:
            FlowError: it cannot be: too many streams, or the next site does not answer.
        """
        if self._meeting.park(preamble.session_id, tcp):
            return
        passage = self._passages[preamble.session_id]
        if len(passage.splices) + passage.opening >= 2 * passage.onward.streams:
            raise ProtocolError(f"a stream more than the {passage.onward.streams} of its route")
        passage.opening += 1
        try:
            splice = await self._open(passage, preamble.stream, tcp)
            passage.splices.add(splice)
        finally:
            passage.opening -= 1
        try:
            if preamble.session_id not in self._passages:  # it ended meanwhile
                splice.stop()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(splice.run, limiter=self._limiter)
        finally:
            passage.splices.discard(splice)
            passage.ended_bytes += splice.passed_bytes
        if splice.problem:
            self._log("relay stream broke", {"task": passage.grant.task, "why": splice.problem})

    async def _open(self, passage: _Passage, number: int, tcp: trio.SocketStream) -> Splice:
        onward = passage.onward
        try:
            with trio.fail_after(_ONWARD_S):
                next_tcp, head = await onward.connect(number)
                if passage.grant.dial == "target":
                    # The dialler's own preamble is all that ever goes against the stream's direction.
                    head += await _exactly(tcp, PREAMBLE_BYTES)
                await next_tcp.send_all(head)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.EndOfChannel) as error:
            raise TemporaryError(
                f"a stream of task {passage.grant.task} found no way on: {error or type(error).__name__}",
                reason="disconnected",
            ) from error
        rtts = [tcp_state(stream.socket).rtt_s for stream in (tcp, next_tcp)]
        one, two = (
            blocking(stream, long=rtt >= NEAR_RTT_S)
            for stream, rtt in zip((tcp, next_tcp), rtts, strict=True)
        )
        pair: tuple[socket.socket, socket.socket] = (one, two)
        source, target = pair if passage.grant.dial == "source" else pair[::-1]
        return Splice(source, target, passage.pacer())


async def _exactly(tcp: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await tcp.receive_some(size - len(data))
        if not part:
            raise trio.BrokenResourceError("it closed inside its preamble")
        data += part
    return data
