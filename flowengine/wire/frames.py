"""Sealed frames: the only thing that a data stream carries after its preamble.

Goal
    A listener learns how much flows, not what, nor where one chunk or object ends. A receiver never sees a
    byte that was changed, reordered, repeated or cut off.
Plan
    A frame is a clear 16-byte header, then AES-256-GCM ciphertext and tag; the header is the AAD. Its whole
    length is one of `FRAME_SIZES`, named by a code in the header, so no length is read from the peer. The
    plaintext is payload, zero padding, then the payload's length (u32): it stands at the *end*, so that
    payloads of successive frames decrypt to where they belong, one behind the other; the next frame
    overwrites the 4 bytes. Payloads of a stream join to one byte stream of records; frames cut it anywhere.
    Inside a run every frame is full: as large as the sender makes them now, 1 to 4 MiB. Only a flush pads: up to the
    next of eight sizes an octave, or, where it may be one chunk on its own, up to the next power of two.
Invariants
    - Frame numbers have no gap and no repetition; each number is used for one sealing under its key.
    - The last frame is END and carries totals; anything after it, or end of file before it, is an error.
    - A frame whose tag is wrong leaves zeros where its plaintext would have been.
    - After an error an opener gives nothing more.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag

from flowengine.errors import IntegrityError, ProtocolError, TemporaryError
from flowengine.units import KIB, MIB
from flowengine.wire.keys import StreamKeys

__all__ = [
    "FRAME_MAGIC",
    "FRAME_SIZES",
    "FRAME_VERSION",
    "HEADER_BYTES",
    "MAX_BODY_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_PAYLOAD_BYTES",
    "MAX_PLAINTEXT_BYTES",
    "OVERHEAD_BYTES",
    "TAG_BYTES",
    "TRAILER_BYTES",
    "FrameOpener",
    "FrameSealer",
    "frame_bytes_for",
]

FRAME_MAGIC: Final = 0xF5
FRAME_VERSION: Final = 1
_STEPS: Final = 8
FRAME_SIZES: Final = (
    *(
        octave * (_STEPS + step) // _STEPS
        for octave in (KIB << n for n in range(12))
        for step in range(_STEPS)
    ),
    4 * MIB,
)
"""Whole lengths of frames; the header's size code is the index. Eight steps an octave: padding is below 12.5 % from the
second step on, and a length says three bits more than its order of magnitude."""
HEADER_BYTES: Final = 16
TAG_BYTES: Final = 16
TRAILER_BYTES: Final = 4
OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES + TRAILER_BYTES
MAX_FRAME_BYTES: Final = FRAME_SIZES[-1]
MAX_BODY_BYTES: Final = MAX_FRAME_BYTES - HEADER_BYTES
MAX_PLAINTEXT_BYTES: Final = MAX_BODY_BYTES - TAG_BYTES
MAX_PAYLOAD_BYTES: Final = MAX_PLAINTEXT_BYTES - TRAILER_BYTES

_BLOCK_BYTES: Final = 16
_DATA: Final = 1
_END: Final = 2
_HEADER: Final = struct.Struct(">BBBBIQ")
_TRAILER: Final = struct.Struct(">I")
_TOTALS: Final = struct.Struct(">QQ")
_ZEROS: Final = memoryview(bytes(MAX_PLAINTEXT_BYTES))

WritableBuffer: TypeAlias = bytearray | memoryview
Buffer: TypeAlias = bytes | bytearray | memoryview


def _size_code(used: int, lone: bool) -> int:
    if used > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{used} bytes do not fit a frame; it holds at most {MAX_PAYLOAD_BYTES}")
    code = bisect_left(FRAME_SIZES, used + OVERHEAD_BYTES)
    return -(-code // _STEPS) * _STEPS if lone else code


def frame_bytes_for(used: int, *, lone: bool = False) -> int:
    """Whole length of the frame that `used` payload bytes are sealed into.

    >>> frame_bytes_for(0), frame_bytes_for(5000), frame_bytes_for(MAX_PAYLOAD_BYTES)
    (1024, 5120, 4194304)
    >>> frame_bytes_for(5000, lone=True)
    8192
    """
    return FRAME_SIZES[_size_code(used, lone)]


class FrameSealer:
    """Seals the frames of one stream, in order. Not for use by two threads at once.

    The caller collects views of up to `MAX_PAYLOAD_BYTES`, seals them into a reused buffer of `MAX_FRAME_BYTES`, and
    sends as much of it as `seal_into` says.
    """

    def __init__(self, keys: StreamKeys) -> None:
        self._keys = keys
        self._frames = 0
        self._payload_bytes = 0
        self._ended = False

    @property
    def totals(self) -> tuple[int, int]:
        """Data frames and payload bytes sealed so far."""
        return self._frames, self._payload_bytes

    def seal_into(self, parts: Sequence[Buffer], out: WritableBuffer, *, lone: bool = False) -> int:
        """Seal a payload, given as parts in order, into the start of `out`; gives the frame's length.

        With `lone`, for what may be a single chunk, the length is a power of two.

        The parts are read where they lie. Releases the GIL; allocates nothing that grows with the frame.

        Raises:
            ValueError: the payload does not fit a frame or `out`, or the stream was ended; nothing was sealed.
        """
        used = sum(map(len, parts))
        length = self._seal(_DATA, _size_code(used, lone), parts, used, memoryview(out))
        self._frames += 1
        self._payload_bytes += used
        return length

    def seal_end(self, out: WritableBuffer) -> int:
        """Seal the last frame of the stream, with its totals, into `out`; gives the frame's length (1024)."""
        totals = _TOTALS.pack(self._frames, self._payload_bytes)
        length = self._seal(_END, 0, [totals], _TOTALS.size, memoryview(out))
        self._ended = True
        return length

    def _seal(self, kind: int, code: int, parts: Sequence[Buffer], used: int, out: memoryview) -> int:
        size = FRAME_SIZES[code]
        if len(out) < size:
            raise ValueError(f"sealing {used} bytes needs {size} bytes of output buffer (it has {len(out)})")
        if self._ended:
            raise ValueError(f"stream {self._keys.stream} was ended; no frame may follow")
        cipher, counter = self._keys.next_cipher()
        header = _HEADER.pack(FRAME_MAGIC, FRAME_VERSION, kind, code, self._keys.stream, counter)
        out[:HEADER_BYTES] = header
        cipher.authenticate_additional_data(header)
        at = HEADER_BYTES
        padding = _ZEROS[: size - OVERHEAD_BYTES - used]
        for part in (*parts, padding, _TRAILER.pack(used)):
            # The cipher asks for room for a block more than it writes; the tag's place is behind the last.
            at += cipher.update_into(part, out[at : at + len(part) + _BLOCK_BYTES - 1])
        cipher.finalize()
        out[at : at + TAG_BYTES] = cipher.tag
        return size


class FrameOpener:
    """Opens the frames of one stream, in order. Not for use by two threads at once."""

    def __init__(self, keys: StreamKeys) -> None:
        self._keys = keys
        self._frames = 0
        self._payload_bytes = 0
        self._ended = False
        self._broken = False

    @property
    def ended(self) -> bool:
        """Whether the sealed end of the stream was opened and its totals were right."""
        return self._ended

    @property
    def totals(self) -> tuple[int, int]:
        """Data frames and payload bytes opened so far."""
        return self._frames, self._payload_bytes

    def parse_header(self, header: Buffer) -> int:
        """Length of the body (ciphertext and tag) that follows `header`: one of `FRAME_SIZES`, at most 4 MiB.

        Nothing is believed yet: the header is authenticated together with the body, by `open_into`.

        Raises:
            ProtocolError: this cannot be the next frame of this stream.
        """
        return FRAME_SIZES[self._parse(header)[1]] - HEADER_BYTES

    def open_into(self, header: Buffer, body: Buffer, out: WritableBuffer) -> int:
        """Open a frame into the start of `out`; gives how many bytes of it are payload.

        `out` needs room for the whole plaintext: `len(body) - TAG_BYTES`. What lies there behind the payload
        is padding and trailer, to be overwritten by the next frame. It may be the memory of `body`. An end frame gives 0 and sets `ended`;
        a data frame may give 0 as well. Releases the GIL; allocates nothing that grows with the frame.

        Raises:
            ProtocolError: the frame is not the next one, or its sealed length or totals lie.
            IntegrityError: the tag is wrong; `out` was zeroed.
            ValueError: `out` is too short, or `body` has not the length that `parse_header` gave.
        """
        kind, code = self._parse(header)
        length = FRAME_SIZES[code] - HEADER_BYTES - TAG_BYTES
        if len(body) != length + TAG_BYTES or len(out) < length:
            raise ValueError(
                f"opening needs a body of {length + TAG_BYTES} bytes (has {len(body)}) and {length} bytes of "
                f"output buffer (has {len(out)})"
            )
        view = memoryview(out)[:length]
        aead, nonce, counter = self._keys.advance()
        try:
            aead.decrypt_into(nonce, body, bytes(header), view)
        except InvalidTag:
            # The cipher writes before it knows the tag.
            view[:] = _ZEROS[:length]
            self._broken = True
            raise IntegrityError(
                f"frame {counter} of stream {self._keys.stream} (epoch {self._keys.epoch}) was changed "
                "on its way: its tag is wrong",
                hint="nothing of it was used; the stream is opened again, look at the link if this repeats",
                stream=self._keys.stream,
                frame=counter,
            ) from None
        used: int = _TRAILER.unpack_from(view, length - TRAILER_BYTES)[0]
        if used > length - TRAILER_BYTES:
            raise self._break(f"says that {used} of {length - TRAILER_BYTES} bytes are payload", counter)
        if kind == _END:
            self._open_end(view, used, counter)
            return 0
        self._frames += 1
        self._payload_bytes += used
        return used

    def finish(self) -> None:
        """Call at end of file.

        Raises:
            TemporaryError: the stream was cut: it ended without its sealed end.
        """
        if not self._ended:
            raise TemporaryError(
                f"stream {self._keys.stream} was cut after {self._frames} frames: the connection closed "
                "without the sealed end of the stream",
                hint="what arrived whole is kept; the stream is opened again",
                reason="disconnected",
                stream=self._keys.stream,
                frames=self._frames,
            )

    def _parse(self, header: Buffer) -> tuple[int, int]:
        """Type and size code of a header that can only be the next frame's."""
        expected = self._keys.counter
        if len(header) != HEADER_BYTES:
            raise ValueError(f"a frame header has {HEADER_BYTES} bytes, not {len(header)}")
        if self._ended or self._broken:
            raise self._break(
                "follows the end of the stream" if self._ended else "follows an error", expected
            )
        magic, version, kind, code, stream, counter = _HEADER.unpack(header)
        if magic != FRAME_MAGIC:
            raise self._break(f"begins with byte 0x{magic:02x}, not 0x{FRAME_MAGIC:02x}", expected)
        if version != FRAME_VERSION:
            raise self._break(f"has format version {version}; this side knows {FRAME_VERSION}", expected)
        if kind not in (_DATA, _END):
            raise self._break(f"has the unknown type {kind}", expected)
        if code >= len(FRAME_SIZES) or (kind == _END and code != 0):
            raise self._break(f"of type {kind} has the size code {code}", expected)
        if stream != self._keys.stream:
            raise self._break(f"claims to belong to stream {stream}", expected)
        if counter != expected:
            raise self._break(f"claims to be number {counter}", expected)
        return kind, code

    def _open_end(self, view: memoryview, used: int, counter: int) -> None:
        if used != _TOTALS.size:
            raise self._break(f"ends the stream with {used} bytes of totals, not {_TOTALS.size}", counter)
        totals = _TOTALS.unpack_from(view, 0)
        if totals != self.totals:
            raise self._break(
                f"ends the stream after {totals[0]} frames and {totals[1]} bytes; {self._frames} frames and "
                f"{self._payload_bytes} bytes arrived",
                counter,
            )
        self._ended = True

    def _break(self, what: str, frame: int) -> ProtocolError:
        self._broken = True
        return ProtocolError(
            f"frame {frame} of stream {self._keys.stream} (epoch {self._keys.epoch}) {what}",
            hint="the stream is closed; if it repeats, compare the versions of both sides",
            stream=self._keys.stream,
            frame=frame,
        )
