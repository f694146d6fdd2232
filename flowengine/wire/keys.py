"""The key schedule: from two randoms to one AES-256-GCM key per stream, direction, epoch and generation.

Goal
    No two frames are ever sealed under the same key and nonce, and nobody but the two ends of the control
    connection can derive a key.
Plan
    Both ends exchange 32 random bytes over the TLS 1.3 control connection. HKDF-SHA256 (RFC 5869) extracts a
    pseudorandom key from them, salted with the handshake's binding, and expands it per use with an `info`
    that names everything the key is for. The nonce is IV xor frame counter, as in TLS 1.3 (RFC 8446, 5.3).
Invariants
    - A counter lives with its key object, starts at 0, only rises, and cannot be set.
    - A `SessionSecrets` gives keys of one (transfer, stream, direction) only for rising epochs: each once.
    - A generation covers 65,536 frames (at most 256 GiB), so both ends rekey at the same frame.
    - No object here shows, pickles or copies its secret. (Python cannot promise to wipe memory.)
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import Final, NoReturn, SupportsIndex

from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from flowengine.errors import ProtocolError

__all__ = [
    "FINGERPRINT_BYTES",
    "FRAMES_PER_GENERATION",
    "ID_BYTES",
    "MAX_EPOCH",
    "MAX_FRAMES",
    "MAX_KEYED_STREAMS",
    "NO_FINGERPRINT",
    "PROTOCOL_VERSION",
    "RANDOM_BYTES",
    "SUITE",
    "SUITE_NAME",
    "Direction",
    "Secret",
    "SessionSecrets",
    "Side",
    "StreamKeys",
    "show_version",
]

PROTOCOL_VERSION: Final = 0x0001
"""Major version in the high byte, minor in the low one: 0.1."""
SUITE: Final = 1
SUITE_NAME: Final = "HKDF-SHA256 + AES-256-GCM"
RANDOM_BYTES: Final = 32
FINGERPRINT_BYTES: Final = 32
ID_BYTES: Final = 16
NO_FINGERPRINT: Final = bytes(FINGERPRINT_BYTES)
"""Stands for the certificate of a client that has none (a ticket's client)."""
FRAMES_PER_GENERATION: Final = 1 << 16
MAX_FRAMES: Final = FRAMES_PER_GENERATION << 32
"""Frames under one epoch: 2^32 generations."""
MAX_EPOCH: Final = (1 << 32) - 1
MAX_KEYED_STREAMS: Final = 65_536
"""(transfer, stream, direction) triples that one session hands out keys for."""

_KEY_BYTES: Final = 32
_IV_BYTES: Final = 12
_STREAM_LABEL: Final = b"flowengine stream key\x00"
_PREAMBLE_LABEL: Final = b"flowengine preamble key\x00"
_STREAM_INFO: Final = struct.Struct(">HB32s32s16sIBII")
_PREAMBLE_INFO: Final = struct.Struct(">HB32s32s16sB")


class Direction(StrEnum):
    """Which way the frames of a key travel."""

    SOURCE_TO_TARGET = "source->target"
    TARGET_TO_SOURCE = "target->source"


class Side(StrEnum):
    """A role at the ends of a transfer."""

    SOURCE = "source"
    TARGET = "target"


_DIRECTION_CODES: Final = {Direction.SOURCE_TO_TARGET: 1, Direction.TARGET_TO_SOURCE: 2}
_SIDE_CODES: Final = {Side.SOURCE: 1, Side.TARGET: 2}


def show_version(version: int) -> str:
    """A protocol version for people.

    >>> show_version(PROTOCOL_VERSION)
    '0.1'
    """
    return f"{version >> 8}.{version & 0xFF}"


class Secret:
    """Base of objects that hold key material: never shown, pickled or copied."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds key material and is neither pickled nor copied")


class StreamKeys(Secret):
    """Keys and frame counter of one (transfer, stream, direction, epoch): for one sealer or one opener.

    Made by `SessionSecrets.stream_keys`. Not for use by two threads at once.
    """

    __slots__ = ("_aead", "_counter", "_expand", "_iv", "_key", "direction", "epoch", "stream")

    def __init__(self, prk: bytes, info: bytes, stream: int, direction: Direction, epoch: int) -> None:
        self.stream = stream
        self.direction = direction
        self.epoch = epoch
        self._counter = 0
        self._expand = (prk, info)
        self._derive(0)

    @property
    def counter(self) -> int:
        """Number of the next frame."""
        return self._counter

    @property
    def generation(self) -> int:
        """Key generation of the next frame."""
        return self._counter // FRAMES_PER_GENERATION

    def advance(self) -> tuple[AESGCM, bytes, int]:
        """Key, nonce and number of the next frame; they are never given again.

        Raises:
            ProtocolError: the epoch is used up (2^48 frames); open the stream again under a new epoch.
        """
        counter = self._counter
        if counter >= MAX_FRAMES:
            raise ProtocolError(
                f"stream {self.stream} used up all {MAX_FRAMES} frames of epoch {self.epoch}",
                hint="close the stream and open it again under a new epoch",
            )
        if counter and counter % FRAMES_PER_GENERATION == 0:
            self._derive(counter // FRAMES_PER_GENERATION)
        self._counter = counter + 1
        return self._aead, (self._iv ^ counter).to_bytes(_IV_BYTES, "big"), counter

    def next_cipher(self) -> tuple[AEADEncryptionContext, int]:
        """A cipher that seals the next frame piece by piece, and the frame's number; see `advance`."""
        _, nonce, counter = self.advance()
        return Cipher(self._key, GCM(nonce)).encryptor(), counter

    def _derive(self, generation: int) -> None:
        prk, info = self._expand
        block = _expand(prk, info + generation.to_bytes(4, "big"), _KEY_BYTES + _IV_BYTES)
        self._key = AES(block[:_KEY_BYTES])
        self._aead = AESGCM(block[:_KEY_BYTES])
        self._iv = int.from_bytes(block[_KEY_BYTES:], "big")


class SessionSecrets(Secret):
    """What both ends of one control connection derive all keys of their session from.

    Args:
        client_random: 32 random bytes of the side that dialled the control connection.
        server_random: 32 random bytes of the side that accepted it.
        client_fingerprint: SHA-256 of the client's certificate (DER); `NO_FINGERPRINT` where it has none.
        server_fingerprint: SHA-256 of the server's certificate (DER).
        binding: Handshake secret that both sides share besides the randoms; see `wire.handshake`.
        protocol: Protocol version that the handshake chose.
    """

    __slots__ = ("_context", "_epochs", "_prk")

    def __init__(
        self,
        client_random: bytes,
        server_random: bytes,
        *,
        client_fingerprint: bytes,
        server_fingerprint: bytes,
        binding: bytes = b"",
        protocol: int = PROTOCOL_VERSION,
    ) -> None:
        for name, value in (("client", client_random), ("server", server_random)):
            if len(value) != RANDOM_BYTES:
                raise ValueError(f"the {name} random has {len(value)} bytes, not {RANDOM_BYTES}")
        for name, value in (("client", client_fingerprint), ("server", server_fingerprint)):
            if len(value) != FINGERPRINT_BYTES:
                raise ValueError(f"the {name} fingerprint has {len(value)} bytes, not {FINGERPRINT_BYTES}")
        if client_random == server_random:
            # A peer that mirrors our random back would make its own messages pass for ours.
            raise ProtocolError(
                "both sides of the handshake sent the same random bytes",
                hint="report this as an attack or a bug",
            )
        self._prk = HKDF.extract(SHA256(), binding or None, client_random + server_random)
        self._context = (protocol, SUITE, client_fingerprint, server_fingerprint)
        self._epochs: dict[tuple[bytes, int, Direction], int] = {}

    def hand_over(self) -> tuple[bytes, int, int, bytes, bytes]:
        """What `taken_over` makes the same secrets of in another process of this host; they are of no more use here.

        Raises:
            ValueError: a key was given already: two processes could seal with it.
        """
        if self._epochs or not self._prk:
            raise ValueError("keys of this session are in use here")
        prk, self._prk = self._prk, b""
        return prk, *self._context

    @classmethod
    def taken_over(
        cls, prk: bytes, protocol: int, suite: int, client_fingerprint: bytes, server_fingerprint: bytes
    ) -> SessionSecrets:
        """The secrets that another process of this host handed over."""
        made = cls.__new__(cls)
        made._prk, made._context, made._epochs = (
            prk,
            (protocol, suite, client_fingerprint, server_fingerprint),
            {},
        )
        return made

    def stream_keys(self, transfer_id: bytes, stream: int, direction: Direction, epoch: int) -> StreamKeys:
        """Keys of one stream in one direction, given once.

        Args:
            transfer_id: 16 bytes.
            stream: Stream number, u32.
            direction: Which way the sealed frames travel.
            epoch: u32; must be higher than any epoch asked for before for the same stream and direction.

        Raises:
            ProtocolError: the epoch was given before, or there are too many streams.
        """
        _check_id(transfer_id)
        if not 0 <= stream < 1 << 32 or not 0 <= epoch <= MAX_EPOCH:
            raise ValueError(f"stream {stream} or epoch {epoch} does not fit 32 bits")
        use = (transfer_id, stream, direction)
        if epoch <= self._epochs.get(use, -1):
            raise ProtocolError(
                f"epoch {epoch} of stream {stream} ({direction}) is not newer than epoch {self._epochs[use]}",
                hint="open the stream again under a new epoch; keys are never given twice",
            )
        if use not in self._epochs and len(self._epochs) >= MAX_KEYED_STREAMS:
            raise ProtocolError(
                f"this session already has keys for {MAX_KEYED_STREAMS} streams",
                hint="use fewer streams, or reconnect",
            )
        self._epochs[use] = epoch
        info = _STREAM_INFO.pack(*self._context, transfer_id, stream, _DIRECTION_CODES[direction], epoch, 0)
        return StreamKeys(self._prk, _STREAM_LABEL + info[:-4], stream, direction, epoch)

    def preamble_key(self, session_id: bytes, dialer: Side) -> bytes:
        """MAC key (32 bytes) of the preambles with which `dialer` opens data connections of a session.

        The key differs by who dials, so that a preamble cannot be reflected to its maker.
        """
        _check_id(session_id)
        info = _PREAMBLE_INFO.pack(*self._context, session_id, _SIDE_CODES[dialer])
        return _expand(self._prk, _PREAMBLE_LABEL + info, _KEY_BYTES)


def _check_id(identity: bytes) -> None:
    if len(identity) != ID_BYTES:
        raise ValueError(f"an id has {ID_BYTES} bytes, not {len(identity)}")


def _expand(prk: bytes, info: bytes, length: int) -> bytes:
    return HKDFExpand(SHA256(), length, info).derive(prk)
