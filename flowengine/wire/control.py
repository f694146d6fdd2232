"""Control messages on a byte stream: a big-endian u32 length, then that many bytes.

A length is checked before anything is kept of its message; the decoder never holds more than one message
that is not whole, so its memory is bounded by `max_message` and what is fed at once.
"""

from __future__ import annotations

import struct
from typing import Final

from flowengine.errors import ProtocolError, TemporaryError
from flowengine.units import MIB, format_bytes

__all__ = ["LENGTH_BYTES", "MAX_HANDSHAKE_BYTES", "MAX_MESSAGE_BYTES", "ControlDecoder", "encode"]

LENGTH_BYTES: Final = 4
MAX_MESSAGE_BYTES: Final = 4 * MIB
MAX_HANDSHAKE_BYTES: Final = 16 * 1024
"""The bound for messages of a peer that has proved nothing yet."""

_LENGTH: Final = struct.Struct(">I")


def encode(payload: bytes, max_message: int = MAX_MESSAGE_BYTES) -> bytes:
    r"""A message ready to send.

    >>> encode(b"hi")
    b'\x00\x00\x00\x02hi'

    Raises:
        ValueError: the message is empty or longer than `max_message`.
    """
    if not 0 < len(payload) <= max_message:
        raise ValueError(f"a control message has 1 to {max_message} bytes, not {len(payload)}")
    return _LENGTH.pack(len(payload)) + payload


class ControlDecoder:
    """Cuts what arrives on a control connection into messages, however it was split on its way.

    Args:
        max_message: Longest message in bytes; may be changed between messages (a handshake needs little).
    """

    def __init__(self, max_message: int = MAX_MESSAGE_BYTES) -> None:
        self.max_message = max_message
        self._buffer = bytearray()
        self._broken = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """The messages that `data` completes, oldest first.

        Raises:
            ProtocolError: a message is empty or longer than `max_message`; the connection is of no more use.
        """
        if self._broken:
            raise ProtocolError("the control connection is broken; nothing more is read from it")
        messages: list[bytes] = []
        buffer = self._buffer
        view = memoryview(data)
        position, end = 0, len(view)
        while True:
            if len(buffer) < LENGTH_BYTES:
                step = min(LENGTH_BYTES - len(buffer), end - position)
                buffer += view[position : position + step]
                position += step
                if len(buffer) < LENGTH_BYTES:
                    return messages
            length: int = _LENGTH.unpack_from(buffer)[0]
            self._check(length)
            step = min(LENGTH_BYTES + length - len(buffer), end - position)
            buffer += view[position : position + step]
            position += step
            if len(buffer) < LENGTH_BYTES + length:
                return messages
            messages.append(bytes(memoryview(buffer)[LENGTH_BYTES:]))
            buffer.clear()

    def take_rest(self) -> bytes:
        """The beginning of a message that is not whole yet, for another decoder."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def finish(self) -> None:
        """Call at end of file.

        Raises:
            TemporaryError: the connection was cut inside a message.
        """
        if self._buffer:
            raise TemporaryError(
                f"the control connection was cut inside a message, after {len(self._buffer)} bytes of it",
                hint="reconnect; what landed is kept",
                reason="disconnected",
            )

    def _check(self, length: int) -> None:
        if 0 < length <= self.max_message:
            return
        self._broken = True
        self._buffer.clear()
        what = "is empty" if not length else f"of {format_bytes(length)}"
        raise ProtocolError(
            f"a control message {what}; between 1 byte and {format_bytes(self.max_message)} are allowed here",
            hint="the peer is not flowengine, or a newer version of it; compare the versions of both sides",
        )
