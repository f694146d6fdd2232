"""What a session's TLS runs over, and how it is had where nothing lies between the ends.

Routes over relays, and sites that meet under grants, are in modules of their own (`transfer.routes`, `transfer.hops`,
`transfer.sites`): who dials by a ticket needs none of them, and a small file has moved by the time that they are loaded.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from flowengine.errors import TemporaryError
from flowengine.transfer import early
from flowengine.transfer.session import Consent
from flowengine.transfer.tcp_info import tcp_state
from flowengine.wire.ticket import Ticket

if TYPE_CHECKING:
    from flowengine.transfer.hops import Hop

__all__ = ["Located", "Reached", "Way", "connect", "keep_watch", "reach_straight", "straight_way"]

CONNECT_S: Final = 20.0
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 4}
"""A neighbour whose host vanished is noticed within 6 s, though nothing may be said on a hop for hours."""
_UNACKNOWLEDGED_MS: Final = 15_000


class Way(msgspec.Struct, frozen=True):
    """One route.

    Attributes:
        sites: in the order in which they are dialled; empty names where no sites are known.
        address: where the second of them is dialled, as "host:port".
        document: the signed relay grant; empty where there is no relay.
    """

    sites: tuple[str, ...]
    address: str
    document: bytes = b""

    def __repr__(self) -> str:  # the document is long, and nobody else's
        return f"<Way {self.shown}>"

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


def straight_way(peer: Located) -> Way:
    """The route to a peer with nothing in between."""
    return Way(("", ""), f"{peer.host}:{peer.port}")


async def reach_straight(peer: Located) -> Reached:
    """A peer over TCP, for the control connection.

    Raises:
        TemporaryError: nobody answers there (reason "disconnected").
    """
    tcp = await connect(peer)
    return Reached(straight_way(peer), tcp, tcp.socket, tcp_state(tcp.socket).rtt_s)


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
