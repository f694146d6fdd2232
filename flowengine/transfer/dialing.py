"""The data connections of a session on the side that dials: over all its routes, more and fewer while it runs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from flowengine.errors import FlowError, TemporaryError
from flowengine.transfer.early import as_asked_for
from flowengine.transfer.reaching import Reached, Way, keep_watch
from flowengine.transfer.streams import MAX_STREAMS, NEAR_RTT_S, STREAMS_S, Streams, prepare_socket
from flowengine.wire.messages import LeaveStreams, Message
from flowengine.wire.preamble import MAX_STREAMS as MAX_NUMBERS
from flowengine.wire.preamble import Preamble

if TYPE_CHECKING:
    from flowengine.transfer.hops import Dial, Hop
    from flowengine.transfer.routes import RoutedPeer

__all__ = ["Dialer", "blocking"]

LEAVE_S: Final = 5.0
"""How long streams of a route that is not to be used any more may take to end.

What is on its way behind a relay that is held to 40 Mbit/s takes 1.4 s; what is slower yet is quicker sent again.
"""
_AGAIN_S: Final = 5.0
"""How long a route that does not stand is left alone before it is tried again."""
_LOOK_S: Final = 0.05


class _Line(msgspec.Struct, eq=False):
    """One route in use.

    Attributes:
        address: where its data connections are dialled; None while the route does not stand.
        hop: its first hop; None on the direct one.
        numbers: of all streams that were ever dialled over it.
        coming: connections that are being dialled.
        given_up: whether it is refused, under the grant that it has, for good.
    """

    way: Way
    address: tuple[str, int] | None = None
    hop: Hop | None = None
    long: bool = False
    scope: trio.CancelScope = msgspec.field(default_factory=trio.CancelScope)
    numbers: list[int] = msgspec.field(default_factory=list)
    coming: int = 0
    given_up: bool = False


class Dialer:
    """Dials data connections; those that are there early wait until the session has an id.

    Args:
        nursery: runs the dialling; cancelled by whoever ends the session.
        peer: whose routes are used; None: there is the direct one alone.
        dial: makes the connection to the next site of a route.
    """

    def __init__(self, nursery: trio.Nursery, peer: RoutedPeer | None, dial: Dial) -> None:
        self._nursery = nursery
        self._peer = peer
        self._dial_hop = dial
        self._lines: list[_Line] = []
        self._control: _Line | None = None
        self._ready = trio.Event()
        self._session_id = b""
        self._key = b""
        self._accepted = 0
        self._each = 1
        self._numbers = 0
        self._post: Callable[[Message], None] = lambda message: None
        self.streams = Streams(self.dial)

    # --- the beginning ------------------------------------------------------------------------------------------

    def begin(self, reached: Reached, ways: Sequence[Way], count: int, *, fixed: bool) -> int:
        """Dial before it is known whether the server agrees; how many connections it is to be asked for.

        Args:
            reached: the route of the control connection.
            ways: all routes.
            count: connections on each route, or on all together where that number is `fixed`.
        """
        lines = max(1, len(ways))
        self._each = max(1, count // lines if fixed else min(count, MAX_STREAMS // lines))
        control = _Line(reached.way, reached.address, reached.hop, long=self._is_long(reached))
        self._control = control
        self._lines.append(control)
        self._dial_on(control, self._each if lines > 1 else count)
        for way in ways:
            if way.sites != reached.way.sites:
                self._add(way)
        return self._each * lines if lines > 1 else count

    def join(self, session_id: bytes, key: bytes, accepted: int, post: Callable[[Message], None]) -> None:
        """The server agreed: connections that are there, and those still to come, join the session.

        Args:
            accepted: how many of the first ones the server takes.
            post: sends a message on the control connection.
        """
        self._session_id, self._key, self._post = session_id, key, post
        if len(self._lines) == 1 and accepted > self._numbers:
            self.dial(min(accepted, MAX_STREAMS) - self._numbers, "")
        self._accepted = accepted
        self._ready.set()

    # --- while it runs ------------------------------------------------------------------------------------------

    def dial(self, count: int, via: str) -> None:
        """Dial so many more over the routes whose link at the source leads to `via`, evenly; all where empty.

        A connection that fails is missing, and nothing else.
        """
        sends = self._peer is not None and self._peer.sends
        fitting = [
            line
            for line in self._lines
            if line.address is not None and via in ("", line.way.near if sends else line.way.far)
        ]
        for _ in range(count if fitting else 0):
            self._dial_on(min(fitting, key=self._open_on), 1)

    def follow(self, ways: Sequence[Way]) -> None:
        """Use these routes: begin those that are new, leave those that are not among them."""
        wanted = {way.sites: way for way in ways}
        for line in list(self._lines):
            way = wanted.pop(line.way.sites, None)
            if way is not None:
                newer = way.document != line.way.document
                line.way = way  # with a newer grant perhaps, for when it is dialled again
                if line.given_up and newer:
                    line.given_up = False
                    self._nursery.start_soon(self._keep, line)
                continue
            self._lines.remove(line)
            self._nursery.start_soon(self._leave, line)
        for way in wanted.values():
            self._add(way)

    def drop_revoked(self, revoked: frozenset[str]) -> None:
        """Cut hops to sites whose certificates were revoked."""
        for line in self._lines:
            if line.hop is not None and line.hop.serial in revoked:
                with contextlib.suppress(OSError):
                    keep_watch(line.hop.stream).shutdown(socket.SHUT_RDWR)

    def _add(self, way: Way) -> None:
        line = _Line(way)
        self._lines.append(line)
        self._nursery.start_soon(self._keep, line)

    def _open_on(self, line: _Line) -> int:
        return len([number for number in line.numbers if number in self.streams.sockets])

    async def _keep(self, line: _Line) -> None:
        """Have a route stand as long as the session uses it."""
        assert self._peer is not None
        with line.scope:
            while True:
                try:
                    reached = await self._peer.over(line.way, self._dial_hop, control=False)
                except FlowError as error:
                    self._peer.failed(line.way)
                    self._peer.note(f"the route {line.way.shown} is not used: {error.message}")
                    if not error.retryable:
                        line.given_up = True
                        return
                    await trio.sleep(_AGAIN_S)
                    continue
                line.hop, line.address, line.long = reached.hop, reached.address, self._is_long(reached)
                if reached.hop is None:
                    await trio.aclose_forcefully(reached.stream)
                    await trio.lowlevel.checkpoint()  # closing is none: the session may have ended
                    self._dial_on(line, self._each)
                    return
                try:
                    with self._held(reached):
                        self._dial_on(line, self._each)
                        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                            await reached.stream.receive_some(1)
                except (
                    FlowError
                ) as error:  # policy changed: its streams are cut, and the next pass does without it
                    self._peer.note(f"the route {line.way.shown} is not used any more: {error.message}")
                    line.given_up = True
                    return
                finally:
                    line.hop = line.address = None
                    await reached.hop.aclose()
                self._peer.failed(line.way)
                await trio.sleep(_AGAIN_S)

    def _held(self, reached: Reached) -> contextlib.AbstractContextManager[None]:
        """Whether policy still permits a route, for as long as it is used."""
        gate = self._peer.gate if self._peer is not None else None
        if gate is None or reached.consent is None or reached.hop is None:
            return contextlib.nullcontext()
        return gate.held(reached.hop.grant, reached.consent)

    async def _leave(self, line: _Line) -> None:
        """End a route's streams, behind what they carry; if that takes long, the whole session.

        Raises:
            TemporaryError: the session cannot go on without it; the next one does.
        """
        withdrawn = TemporaryError(
            f"the route {line.way.shown} is not to be used any more",
            hint="the transfer goes on over the others",
            reason="disconnected",
        )
        assert self._peer is not None
        if line is self._control:
            raise withdrawn
        numbers = [number for number in line.numbers if number in self.streams.sockets]
        if self._peer.sends:
            self.streams.leave(numbers)
        elif numbers:
            self._post(LeaveStreams(numbers))
        deadline = trio.current_time() + LEAVE_S
        while self._open_on(line):
            if trio.current_time() > deadline:
                raise withdrawn
            await trio.sleep(_LOOK_S)
        line.scope.cancel()

    # --- single connections -------------------------------------------------------------------------------------

    def _dial_on(self, line: _Line, count: int) -> None:
        room = line.hop.streams - self._open_on(line) - line.coming if line.hop is not None else count
        for _ in range(min(count, room, MAX_NUMBERS - self._numbers)):
            line.coming += 1
            line.numbers.append(self._numbers)
            self._nursery.start_soon(self._one, self._numbers, line)
            self._numbers += 1

    async def _one(self, number: int, line: _Line) -> None:
        early = not self._ready.is_set()
        hop, address = line.hop, line.address
        assert address is not None
        try:
            await self._dial_one(number, line, hop, address, early=early)
        finally:
            line.coming -= 1

    async def _dial_one(
        self, number: int, line: _Line, hop: Hop | None, address: tuple[str, int], *, early: bool
    ) -> None:
        try:
            with trio.fail_after(STREAMS_S):
                tcp = await trio.open_tcp_stream(as_asked_for(address[0]), address[1])
        except (OSError, trio.TooSlowError):
            return  # those that came carry on; without any the session says so
        try:
            await self._ready.wait()
            if (early and number >= self._accepted) or line.hop is not hop or line not in self._lines:
                return
            head = hop.preamble(number) if hop is not None else b""
            await tcp.send_all(head + Preamble(self._session_id, number, 0).encode(self._key))
            self.streams.arrived(number, blocking(tcp, long=line.long), line.way.near, line.way.far)
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(tcp)

    @staticmethod
    def _is_long(reached: Reached) -> bool:
        """Whether the link to the next site is: each hop has a congestion control of its own."""
        rtt_s = reached.hop.channel.rtt_s if reached.hop is not None else reached.rtt_s
        return rtt_s >= NEAR_RTT_S


def blocking(tcp: trio.SocketStream, *, long: bool) -> socket.socket:
    """The plain socket of a trio stream, ready for a lane."""
    sock = socket.socket(fileno=tcp.socket.detach())
    prepare_socket(sock, long=long)
    return sock
