"""The 64 bytes that open a data connection: which session and stream it is for, and proof of the right to it.

Goal
    A stranger who connects to the data port costs one read of 64 bytes and one MAC.
Plan
    The dialer sends a `Preamble` under a key that both ends derived for the session and the dialer's side. A
    hop to a relay begins with a preamble under that hop's key; the end-to-end preamble, in the same format,
    follows inside. The first byte tells data connections (0xF1) from TLS (0x16) on one port.
Invariants
    - A preamble is used once: per session, kind and stream only a higher epoch is taken.
    - Unknown session and wrong MAC give the same answer and cost the same.
    - Nothing is allocated from what a stranger sends.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from flowengine.errors import AuthenticationError, ProtocolError
from flowengine.wire.keys import ID_BYTES, Secret

__all__ = [
    "MAX_SESSIONS",
    "MAX_STREAMS",
    "PREAMBLE_BYTES",
    "PREAMBLE_MAGIC",
    "PREAMBLE_VERSION",
    "SESSION_ID",
    "Kind",
    "Preamble",
    "PreambleRegistry",
    "is_data_connection",
]

PREAMBLE_BYTES: Final = 64
PREAMBLE_MAGIC: Final = 0xF1
PREAMBLE_VERSION: Final = 1
MAX_SESSIONS: Final = 4096
MAX_STREAMS: Final = 1024
"""Streams of one session; a stream number is below it."""

SESSION_ID: Final = slice(12, 12 + ID_BYTES)
"""Where a preamble names its session."""

_KEY_BYTES: Final = 32
_MAC_BYTES: Final = 32
_FIELDS: Final = struct.Struct(">BBBBII16s4x")
_NO_KEY: Final = bytes(_KEY_BYTES)


class Kind(IntEnum):
    """What the far end of a preamble's MAC is."""

    END_TO_END = 0
    HOP = 1


@dataclass(frozen=True, slots=True)
class Preamble:
    """What a data connection is for.

    Attributes:
        session_id: 16 bytes; end to end it is the transfer id.
        stream: Number of the stream, below `MAX_STREAMS`.
        epoch: Higher than that of any earlier connection of the same stream.
        kind: Whether the receiver is the far end or the next hop.
    """

    session_id: bytes
    stream: int
    epoch: int
    kind: Kind = Kind.END_TO_END

    def encode(self, key: bytes) -> bytes:
        """The 64 bytes, under a MAC key from `SessionSecrets.preamble_key`."""
        if len(self.session_id) != ID_BYTES or not 0 <= self.stream < MAX_STREAMS:
            raise ValueError(
                f"session id of {len(self.session_id)} bytes or stream {self.stream} out of range"
            )
        fields = _FIELDS.pack(
            PREAMBLE_MAGIC, PREAMBLE_VERSION, self.kind, 0, self.stream, self.epoch, self.session_id
        )
        return fields + _mac(key, fields)


def is_data_connection(first_byte: int) -> bool:
    """Whether a connection that begins so is a data connection; else it is taken for TLS.

    >>> is_data_connection(0xF1), is_data_connection(0x16)
    (True, False)
    """
    return first_byte == PREAMBLE_MAGIC


class PreambleRegistry(Secret):
    """The sessions that data connections may join, and what was used up of each. Bounded, without a clock."""

    __slots__ = ("_max_sessions", "_sessions")

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._sessions: dict[bytes, tuple[bytes, dict[tuple[Kind, int], int]]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def register(self, session_id: bytes, key: bytes) -> None:
        """Let data connections of a session in.

        Registering a session again (its control connection was made anew) replaces the key and keeps the
        epochs that were used.

        Raises:
            ProtocolError: there are too many sessions.
        """
        if len(session_id) != ID_BYTES or len(key) != _KEY_BYTES:
            raise ValueError(f"a session id has {ID_BYTES} bytes and a key {_KEY_BYTES}")
        known = self._sessions.get(session_id)
        if known is None and len(self._sessions) >= self._max_sessions:
            raise ProtocolError(
                f"{len(self._sessions)} sessions are open already, the limit here",
                hint="wait until one of them ends",
                reason="busy",
            )
        self._sessions[session_id] = (key, known[1] if known else {})

    def forget(self, session_id: bytes) -> None:
        """Let no more data connections of a session in; unknown sessions are ignored."""
        self._sessions.pop(session_id, None)

    def accept(self, data: bytes | bytearray | memoryview) -> Preamble:
        """The preamble in `data`, which is used up by this.

        Raises:
            ProtocolError: these are not 64 bytes of a preamble of this version.
            AuthenticationError: nobody who holds the session's key made it, or it was used before.
        """
        if len(data) != PREAMBLE_BYTES:
            raise ProtocolError(f"a data connection opened with {len(data)} bytes, not {PREAMBLE_BYTES}")
        # One copy of constant size; fields and MAC come from the same bytes.
        fields, mac = bytes(data[: _FIELDS.size]), bytes(data[_FIELDS.size :])
        magic, version, kind, reserved, stream, epoch, session_id = _FIELDS.unpack(fields)
        if magic != PREAMBLE_MAGIC:
            raise ProtocolError(
                f"a data connection opened with byte 0x{magic:02x}, not 0x{PREAMBLE_MAGIC:02x}"
            )
        if version != PREAMBLE_VERSION:
            raise ProtocolError(
                f"a data connection opened with preamble version {version}, not {PREAMBLE_VERSION}",
                hint="update the older side",
            )
        key, used = self._sessions.get(session_id, (_NO_KEY, None))
        right = hmac.compare_digest(mac, _mac(key, fields))
        if used is None or not right:
            raise AuthenticationError("a data connection did not prove that it belongs to an open session")
        # From here on the maker holds the session's key.
        if kind not in (Kind.END_TO_END, Kind.HOP) or reserved or any(fields[-4:]) or stream >= MAX_STREAMS:
            raise ProtocolError(f"a preamble of stream {stream} sets fields that this version does not know")
        if epoch <= used.get((Kind(kind), stream), -1):
            raise AuthenticationError(f"the preamble of stream {stream}, epoch {epoch}, was used before")
        used[Kind(kind), stream] = epoch
        return Preamble(session_id, stream, epoch, Kind(kind))


def _mac(key: bytes, fields: bytes) -> bytes:
    return hmac.digest(key, b"flowengine preamble\x00" + fields, "sha256")
