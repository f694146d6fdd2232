"""The 64 bytes that open a data connection: which session and stream it is for, and proof of the right to it.

Goal
    A stranger who connects to the data port costs one read of 64 bytes and one MAC.
Plan
    The dialer sends a `Preamble` under a key that both ends derived for the session and the dialer's side. A
    hop of a route begins with a preamble under that hop's key; the end-to-end preamble, in the same form, follows
    inside. The first byte tells hops (0xF2), data connections (0xF1) and TLS (0x16) apart on one port.
Invariants
    - A preamble is used once: per session, kind and stream only a higher epoch is taken.
    - Unknown session and wrong MAC give the same answer and cost the same.
    - Nothing is allocated from what a stranger sends.
"""

from __future__ import annotations

import hmac
import struct
from enum import IntEnum
from typing import Final

import msgspec

from flowengine.errors import AuthenticationError, ProtocolError
from flowengine.wire.keys import ID_BYTES, Secret

__all__ = [
    "MAX_SESSIONS",
    "MAX_STREAMS",
    "PREAMBLE_BYTES",
    "PREAMBLE_VERSION",
    "SESSION_ID",
    "Kind",
    "Preamble",
    "PreambleRegistry",
    "kind_of_connection",
]

PREAMBLE_BYTES: Final = 64
PREAMBLE_VERSION: Final = 1
MAX_SESSIONS: Final = 4096
MAX_STREAMS: Final = 1024
"""Streams of one session; a stream number is below it."""

SESSION_ID: Final = slice(12, 12 + ID_BYTES)
"""Where a preamble names its session."""

_KEY_BYTES: Final = 32
_MAC_BYTES: Final = 32
_FIELDS: Final = struct.Struct(">BBHII16s4x")
_NO_KEY: Final = bytes(_KEY_BYTES)


class Kind(IntEnum):
    """What the far end of a preamble's MAC is; the value is the first byte on the wire."""

    END_TO_END = 0xF1
    HOP = 0xF2


class Preamble(msgspec.Struct, frozen=True):
    """What a data connection is for.

    Attributes:
        session_id: 16 bytes, as the side that is dialled chose them for the session or the hop.
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
        fields = _FIELDS.pack(self.kind, PREAMBLE_VERSION, 0, self.stream, self.epoch, self.session_id)
        return fields + _mac(key, fields)


def kind_of_connection(first_byte: int) -> Kind | None:
    """Which preamble a connection begins with that begins so; None: it is taken for TLS.

    >>> kind_of_connection(0xF1), kind_of_connection(0xF2), kind_of_connection(0x16)
    (<Kind.END_TO_END: 241>, <Kind.HOP: 242>, None)
    """
    return Kind(first_byte) if first_byte in (Kind.END_TO_END, Kind.HOP) else None


class PreambleRegistry(Secret):
    """The sessions, or the hops, that connections may join, and what was used up of each. Bounded, without a clock."""

    __slots__ = ("_kind", "_max_sessions", "_sessions")

    def __init__(self, kind: Kind = Kind.END_TO_END, *, max_sessions: int = MAX_SESSIONS) -> None:
        self._kind = kind
        self._max_sessions = max_sessions
        self._sessions: dict[bytes, tuple[bytes, dict[int, int]]] = {}

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
        magic, version, reserved, stream, epoch, session_id = _FIELDS.unpack(fields)
        if magic != self._kind:
            raise ProtocolError(f"a data connection opened with byte 0x{magic:02x}, not 0x{self._kind:02x}")
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
        if reserved or any(fields[-4:]) or stream >= MAX_STREAMS:
            raise ProtocolError(f"a preamble of stream {stream} sets fields that this version does not know")
        if epoch <= used.get(stream, -1):
            raise AuthenticationError(f"the preamble of stream {stream}, epoch {epoch}, was used before")
        used[stream] = epoch
        return Preamble(session_id, stream, epoch, self._kind)


def _mac(key: bytes, fields: bytes) -> bytes:
    return hmac.digest(key, b"flowengine preamble\x00" + fields, "sha256")
