"""What the kernel knows about a TCP connection (TCP_INFO, linux/tcp.h)."""

from __future__ import annotations

import socket
import struct
from typing import Final, Protocol

import msgspec

__all__ = ["HasOptions", "TcpState", "tcp_state"]

_BYTES: Final = 232
_RTT: Final = struct.Struct("=I")
# From tcpi_total_retrans to tcpi_bytes_sent, without a gap.
_COUNTS: Final = struct.Struct("=I4Q6I4Q2IQ")
_RTT_AT: Final = 68
_COUNTS_AT: Final = 100


class HasOptions(Protocol):
    """A socket, trio's or the standard library's."""

    def getsockopt(self, level: int, option: int, buflen: int, /) -> bytes:
        """As `socket.socket`'s."""

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        """As `socket.socket`'s."""


class TcpState(msgspec.Struct, frozen=True):
    """Counters of one connection since it was made; a kernel that does not know one gives 0.

    Attributes:
        rtt_s, min_rtt_s: smoothed round-trip time, and the least that was seen.
        arrived_bytes: what the other end has, by its acknowledgements, those behind a gap included; an estimate from
            segments, because `tcpi_bytes_acked` stands still at a gap and jumps behind it.
        sent_segments, resent_segments: data segments, those sent again counted in both.
        receiver_limited_s: how long the other end had no room for more.
    """

    rtt_s: float
    min_rtt_s: float
    arrived_bytes: int
    sent_segments: int
    resent_segments: int
    receiver_limited_s: float


def tcp_state(sock: HasOptions) -> TcpState:
    """The state of a connected TCP socket.

    Raises:
        OSError: it is closed.
    """
    data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES).ljust(_BYTES, b"\0")
    (rtt_us,) = _RTT.unpack_from(data, _RTT_AT)
    counts = _COUNTS.unpack_from(data, _COUNTS_AT)
    resent, acked, min_rtt_us, sent = counts[0], counts[3], counts[8], counts[10]
    delivered, sent_bytes = counts[15], counts[17]
    # The SYN counts as delivered, too.
    arrived = max(acked, int((delivered - 1) * sent_bytes / sent)) if sent else acked
    return TcpState(rtt_us / 1e6, min_rtt_us / 1e6, arrived, sent, resent, counts[13] / 1e6)
