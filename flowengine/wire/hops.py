"""What two neighbours on a route say to each other before anything passes between them.

After TLS, in which both show certificates, and a handshake that shows the relay grant, the side that dialled asks for
the hop and the other side agrees. A site that cannot be dialled dials the relay before it, says that it waits, and is
asked over that connection when the other end comes; docs/spec/wire.md has the table. From then on the connection carries the end-to-end
control connection, if that goes over this route, and else nothing: when it ends, the hop ends.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flowengine.errors import ProtocolError
from flowengine.wire.control import MAX_HANDSHAKE_BYTES
from flowengine.wire.messages import Refuse

__all__ = [
    "MAX_HOP_MESSAGE_BYTES",
    "MAX_STREAMS_OF_HOP",
    "MAX_TICKET_BYTES",
    "HopMessage",
    "HopOpen",
    "HopOpened",
    "HopWait",
    "decode",
    "encode",
]

MAX_TICKET_BYTES: Final = 12 * 1024
MAX_STREAMS_OF_HOP: Final = 16
MAX_HOP_MESSAGE_BYTES: Final = MAX_HANDSHAKE_BYTES


class _Message(msgspec.Struct, array_like=True, gc=False, tag=True):
    """Common configuration, as of transfer messages."""


class HopOpen(_Message, tag=1):
    """The side that dialled asks for the hop.

    Attributes:
        control: whether the end-to-end control connection is to go over it.
        ticket: the source's, where the source is on this side; else empty.
        rtt_us: round trip from the first site of the route to here, as the kernels on the way measured it.
        streams: data connections that it wants to have over the route at once, at most.
    """

    control: bool
    ticket: bytes = b""
    rtt_us: int = 0
    streams: int = MAX_STREAMS_OF_HOP


class HopOpened(_Message, tag=2):
    """The side that was dialled agrees; every hop behind it stands.

    Attributes:
        hop_id: 16 random bytes, by which data connections name the hop in their preambles.
        ticket: the source's, where the source is on this side; else empty.
        rtt_us: round trip from here to the last site of the route.
        streams: data connections that may be open over it at once, by all the sites behind.
    """

    hop_id: bytes
    ticket: bytes = b""
    rtt_us: int = 0
    streams: int = MAX_STREAMS_OF_HOP


class HopWait(_Message, tag=4):
    """The last site of a route, which cannot be dialled, dialled the relay before it, and waits there to be asked.

    Attributes:
        hop_id: 16 random bytes, by which the data connections that it dials will name the hop.
    """

    hop_id: bytes


HopMessage = HopOpen | HopOpened | HopWait | Refuse

encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(HopMessage)


def decode(data: bytes | memoryview) -> HopMessage:
    """The message in `data`.

    Raises:
        ProtocolError: the bytes are not one message of a hop, or one beyond its bounds.
    """
    try:
        message: HopMessage = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise ProtocolError(
            f"a site on the route sent a message that does not decode: {error}",
            hint="check that both sides run compatible versions (flow --version)",
        ) from None
    if isinstance(message, Refuse):
        return message
    if not isinstance(message, HopOpen) and len(message.hop_id) != 16:
        raise ProtocolError("a site on the route named the hop with other than 16 bytes")
    if isinstance(message, HopWait):
        return message
    if not 0 < message.streams <= MAX_STREAMS_OF_HOP:
        raise ProtocolError(f"a site on the route speaks of {message.streams} data connections over it")
    if len(message.ticket) > MAX_TICKET_BYTES or not 0 <= message.rtt_us < 1 << 32:
        raise ProtocolError("a site on the route sent a ticket or a round trip beyond the limits")
    return message
