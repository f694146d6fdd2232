"""The data connections of a session: they come while it runs, and go when their sender ends them.

Invariants
    - A session begins without waiting for any of them; the first must be there within `STREAMS_S`.
    - Stream numbers rise and are never used again, so every stream has keys of its own.
    - Whoever dialled the control connection dials these; whoever sends decides how many there are.
    - Each goes over one link of this side's, known by the site at its other end, for its whole life.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Final

import trio

from flowengine.errors import TemporaryError
from flowengine.machine import usable_processors
from flowengine.transfer.tcp_info import HasOptions
from flowengine.wire.preamble import MAX_STREAMS as MAX_NUMBERS

__all__ = [
    "DEFAULT_STREAMS",
    "MAX_STREAMS",
    "NEAR_RTT_S",
    "SOCKET_TIMEOUT_S",
    "STREAMS_S",
    "Streams",
    "congestion_of",
    "prefer_congestion",
    "prepare_socket",
    "stays_inside",
    "stream_count",
]

STREAMS_S: Final = 15.0
MAX_STREAMS: Final = 64
"""Streams open at once."""
DEFAULT_STREAMS: Final = 8
SOCKET_TIMEOUT_S: Final = 60
_CONGESTION: Final = "bbr"
NEAR_RTT_S: Final = 0.001
"""A shorter round trip is one inside a machine or a room."""
_TCP_NOTSENT_LOWAT: Final = 25
_MOST_UNSENT_BYTES: Final = 256 * 1024


def stream_count(rtt_s: float, asked: int, *, congestion: str = _CONGESTION) -> int:
    """How many data streams to begin with: as asked, else few on a near link (cores bound it), more on a long one.

    Where loss bounds every stream (any congestion control but BBR) it takes three times as many.

    >>> stream_count(0.08, 0), stream_count(0.08, 100), stream_count(0.0001, 3), stream_count(0.08, 0, congestion="cubic")
    (8, 64, 3, 24)
    """
    if asked:
        return max(1, min(asked, MAX_STREAMS))
    if rtt_s < NEAR_RTT_S:
        return min(4, usable_processors())
    return DEFAULT_STREAMS if congestion == _CONGESTION else 3 * DEFAULT_STREAMS


class Streams:
    """Connected data sockets by stream number, and how more of them are had.

    Args:
        dial: where this side dials: asked for so many more over the routes that the site `via` is next to the other
            end on (all where empty); called in the loop's thread.

    Attributes:
        most: the largest number that was open at once.
        leaving: numbers of streams that are to end as soon as they can; read by their lanes.
        told_to_leave, told_gone: told of that, and of streams that ended, where their lanes run in another process.
    """

    def __init__(self, dial: Callable[[int, str], None] | None = None) -> None:
        self.dial = dial
        self._put, self._get = trio.open_memory_channel[tuple[int, socket.socket]](MAX_NUMBERS)
        self._open: dict[int, socket.socket] = {}
        self._links: dict[int, tuple[str, str]] = {}
        self._first = trio.Event()
        self._ended = False
        self.most = 0
        self.leaving: set[int] = set()
        self.told_to_leave: Callable[[list[int]], None] = lambda numbers: None
        self.told_gone: Callable[[int], None] = lambda number: None

    def __len__(self) -> int:
        return len(self._open)

    @property
    def sockets(self) -> dict[int, socket.socket]:
        """Those that are open now."""
        return self._open

    def near(self, number: int) -> str:
        """The site at the other end of the link that a stream goes over from here; empty where nobody said."""
        return self._links.get(number, ("", ""))[0]

    def link(self, number: int) -> tuple[str, str]:
        """The sites next to this side, and to the other side, on a stream's route."""
        return self._links.get(number, ("", ""))

    def over(self, near: str) -> list[int]:
        """Numbers of the open streams that go over a link of this side's, and are not to end."""
        return [n for n in self._open if self._links[n][0] == near and n not in self.leaving]

    def beyond(self, far: str) -> list[int]:
        """The same for a link of the other side's, which only the side that dials can tell."""
        return [n for n in self._open if self._links[n][1] == far and n not in self.leaving]

    def arrived(self, number: int, sock: socket.socket, near: str = "", far: str = "") -> None:
        """A data connection is there, its preamble exchanged.

        Args:
            near, far: the sites next to this side, and to the other side, on its route.
        """
        if self._ended or number in self._open or len(self._open) >= MAX_STREAMS:
            sock.close()
            return
        self._open[number] = sock
        self._links[number] = (near, far)
        self.most = max(self.most, len(self._open))
        self._first.set()
        self._put.send_nowait((number, sock))

    async def wait_first(self) -> None:
        """Wait until the first connection is there.

        Raises:
            TemporaryError: it did not come in time.
        """
        try:
            with trio.fail_after(STREAMS_S):
                await self._first.wait()
        except trio.TooSlowError:
            raise TemporaryError(
                f"no data connection came within {STREAMS_S:.0f} s",
                hint="the control connection works, so look for a limit on connections between the two sides",
                reason="disconnected",
            ) from None

    async def next(self) -> tuple[int, socket.socket]:
        """The next connection that comes; raises as `wait_first`."""
        await self.wait_first()
        return await self._get.receive()

    def leave(self, numbers: Iterable[int]) -> None:
        """Let these end as soon as they can; what they would have carried goes over others."""
        here = [number for number in numbers if number in self._open]
        self.leaving.update(here)
        self.told_to_leave(here)

    def gone(self, number: int) -> None:
        """A stream ended and its thread is done with it."""
        sock = self._open.pop(number, None)
        if sock is not None:
            sock.close()
            self.told_gone(number)

    def finish(self) -> None:
        """Take no more of them."""
        self._ended = True

    def shut(self) -> None:
        """Wake every lane by ending its connection; safe to call twice."""
        self._ended = True
        for sock in list(self._open.values()):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        """Close all of them; no lane may be running."""
        self._ended = True
        for number in list(self._open):
            self.gone(number)


def prepare_socket(sock: socket.socket, *, long: bool) -> None:
    """Blocking calls with a hard time-out, no Nagle; on a long link BBR where the system allows it.

    Buffers are left to the kernel, which tunes them up to tcp_wmem and tcp_rmem: a size of our own would be
    limited to net.core.wmem_max (208 KiB on most systems) and would switch the tuning off.
    """
    sock.setblocking(True)
    limit = struct.pack("ll", SOCKET_TIMEOUT_S, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if long:
        # What waits in the kernel counts as being on its way: keep it little, and units go where there is room.
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _MOST_UNSENT_BYTES)
        prefer_congestion(sock)


def stays_inside(sock: socket.socket) -> bool:
    """Whether both ends of a connection are on this machine."""
    if sock.family == socket.AF_UNIX:
        return True
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:
        return False  # it has just broken


def prefer_congestion(sock: HasOptions) -> None:
    """Take BBR, unless something was configured: FLOW_CONGESTION, or a route with an algorithm of its own."""
    current, wanted = congestion_of(sock), _wanted_congestion(sock)
    if wanted == current:
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted.encode())
    except OSError as error:
        # Not there, or not allowed to this user: the system's own is used.
        if error.errno not in (errno.ENOENT, errno.EPERM):
            raise


def congestion_of(sock: HasOptions) -> str:
    """The congestion control of a connection."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).partition(b"\0")[0].decode()


def _wanted_congestion(sock: HasOptions) -> str:
    current = congestion_of(sock)
    configured = os.environ.get("FLOW_CONGESTION")
    if configured:
        return current if configured == "system" else configured
    try:
        with open("/proc/sys/net/ipv4/tcp_congestion_control", encoding="ascii") as file:
            usual = file.read().strip()
    except OSError:
        return current
    return _CONGESTION if current == usual else current
