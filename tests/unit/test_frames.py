"""Sealed frames: sizes, contiguous payloads, and every way in which a stream can be wrong."""

from __future__ import annotations

import pytest

from flowengine.errors import IntegrityError, ProtocolError, TemporaryError
from flowengine.wire.frames import (
    FRAME_SIZES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_PLAINTEXT_BYTES,
    OVERHEAD_BYTES,
    TAG_BYTES,
    FrameOpener,
    FrameSealer,
    frame_bytes_for,
)
from flowengine.wire.keys import NO_FINGERPRINT, Direction, SessionSecrets, StreamKeys


def stream_keys(stream: int = 7, epoch: int = 0) -> StreamKeys:
    secrets = SessionSecrets(
        b"c" * 32, b"s" * 32, client_fingerprint=NO_FINGERPRINT, server_fingerprint=b"S" * 32
    )
    return secrets.stream_keys(bytes(16), stream, Direction.SOURCE_TO_TARGET, epoch)


def seal(sealer: FrameSealer, payload: bytes) -> bytes:
    out = bytearray(MAX_FRAME_BYTES)
    half = len(payload) // 3
    return bytes(out[: sealer.seal_into([payload[:half], payload[half:]], out)])


def seal_end(sealer: FrameSealer) -> bytes:
    out = bytearray(FRAME_SIZES[0])
    return bytes(out[: sealer.seal_end(out)])


def open_frame(opener: FrameOpener, frame: bytes) -> bytes:
    header, body = frame[:HEADER_BYTES], frame[HEADER_BYTES:]
    assert opener.parse_header(header) == len(body)
    out = bytearray(len(body))
    return bytes(out[: opener.open_into(header, body, out)])


@pytest.mark.parametrize("size", FRAME_SIZES)
def test_a_payload_takes_the_smallest_published_size(size: int) -> None:
    capacity = size - OVERHEAD_BYTES
    sealer, opener = FrameSealer(stream_keys()), FrameOpener(stream_keys())
    for used in (capacity, capacity - 1):
        frame = seal(sealer, b"x" * used)
        assert len(frame) == size == frame_bytes_for(used)
        assert open_frame(opener, frame) == b"x" * used
    assert open_frame(opener, seal(sealer, b"")) == b""
    assert not opener.ended


def test_a_lone_payload_is_padded_to_a_power_of_two() -> None:
    for used in (0, 1000, 70_000, MAX_PLAINTEXT_BYTES - 4):
        size = frame_bytes_for(used, lone=True)
        assert size.bit_count() == 1
        assert size < 2 * (used + OVERHEAD_BYTES) or size == FRAME_SIZES[0]


def test_padding_is_below_an_eighth() -> None:
    for used in range(1100, MAX_PLAINTEXT_BYTES - 4, 997):
        assert frame_bytes_for(used) - (used + OVERHEAD_BYTES) < (used + OVERHEAD_BYTES) / 8


def test_payloads_of_successive_frames_lie_one_behind_the_other() -> None:
    sealer, opener = FrameSealer(stream_keys()), FrameOpener(stream_keys())
    payloads = [b"a" * 4060, b"b" * 10, b"c" * 5000]
    out, at = bytearray(64 * 1024), 0
    for payload in payloads:
        frame = memoryview(seal(sealer, payload))
        at += opener.open_into(frame[:HEADER_BYTES], frame[HEADER_BYTES:], memoryview(out)[at:])
    assert out[:at] == b"".join(payloads)
    assert opener.totals == sealer.totals == (3, at)


def test_what_a_reused_buffer_held_before_does_not_travel() -> None:
    sealer, opener = FrameSealer(stream_keys()), FrameOpener(stream_keys())
    out = bytearray(b"old" * (MAX_FRAME_BYTES // 3 + 1))[:MAX_FRAME_BYTES]
    length = sealer.seal_into([b"0123456789"], out)
    opened = bytearray(length)
    opener.open_into(out[:HEADER_BYTES], out[HEADER_BYTES:length], opened)
    assert opened[10 : length - OVERHEAD_BYTES] == bytes(length - OVERHEAD_BYTES - 10)


def test_a_frame_opens_where_it_lies() -> None:
    """Receivers open frames in place: the body's memory takes the plaintext."""
    sealer, opener = FrameSealer(stream_keys()), FrameOpener(stream_keys())
    for size in (0, 1, 5000, MAX_PAYLOAD_BYTES):
        payload = bytes(n * 7 & 0xFF for n in range(size))
        frame = memoryview(bytearray(seal(sealer, payload)))
        body = frame[HEADER_BYTES:]
        assert opener.open_into(frame[:HEADER_BYTES], body, body) == size
        assert body[:size] == payload
    broken = memoryview(bytearray(seal(sealer, b"secret" * 100)))
    broken[100] ^= 1
    with pytest.raises(IntegrityError):
        opener.open_into(broken[:HEADER_BYTES], broken[HEADER_BYTES:], broken[HEADER_BYTES:])
    assert bytes(broken[HEADER_BYTES:-TAG_BYTES]) == bytes(len(broken) - HEADER_BYTES - TAG_BYTES)


def test_the_end_carries_totals_and_nothing_follows() -> None:
    sealer, opener = FrameSealer(stream_keys()), FrameOpener(stream_keys())
    open_frame(opener, seal(sealer, b"x"))
    with pytest.raises(TemporaryError, match="cut after 1 frames") as caught:
        opener.finish()
    assert caught.value.reason == "disconnected"
    end = seal_end(sealer)
    assert open_frame(opener, end) == b""
    assert opener.ended
    opener.finish()
    with pytest.raises(ProtocolError, match="follows the end"):
        opener.parse_header(end[:HEADER_BYTES])
    for again in (lambda: seal(sealer, b"y"), lambda: seal_end(sealer)):
        with pytest.raises(ValueError, match="ended"):
            again()


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, 0x16, "begins with byte 0x16"),
        (1, 2, "format version 2"),
        (2, 0, "unknown type 0"),
        (2, 3, "unknown type 3"),
        (3, 97, "size code 97"),
        (3, 255, "size code 255"),
        (7, 8, "belong to stream 8"),
        (15, 1, "claims to be number 1"),
        (8, 1, "claims to be number"),
    ],
)
def test_a_header_that_cannot_be_the_next_is_refused_for_good(at: int, value: int, match: str) -> None:
    frame = seal(FrameSealer(stream_keys()), b"x")
    header = bytearray(frame[:HEADER_BYTES])
    header[at] = value
    opener = FrameOpener(stream_keys())
    with pytest.raises(ProtocolError, match=match):
        opener.parse_header(header)
    with pytest.raises(ProtocolError, match="follows an error"):
        opener.parse_header(frame[:HEADER_BYTES])


def test_an_end_frame_of_another_size_is_refused() -> None:
    header = bytearray(seal_end(FrameSealer(stream_keys()))[:HEADER_BYTES])
    header[3] = 1
    with pytest.raises(ProtocolError, match="size code 1"):
        FrameOpener(stream_keys()).parse_header(header)


def test_a_changed_frame_leaves_nothing_of_its_plaintext() -> None:
    frame = bytearray(seal(FrameSealer(stream_keys()), b"secret" * 100))
    frame[-1] ^= 1
    opener, out = FrameOpener(stream_keys()), bytearray(b"\xaa" * 5000)
    with pytest.raises(IntegrityError, match=r"frame 0 of stream 7 \(epoch 0\)") as caught:
        opener.open_into(frame[:HEADER_BYTES], frame[HEADER_BYTES:], out)
    assert caught.value.context == {"stream": 7, "frame": 0}
    plaintext_bytes = FRAME_SIZES[0] - HEADER_BYTES - TAG_BYTES
    assert out[:plaintext_bytes] == bytes(plaintext_bytes)
    assert out[plaintext_bytes:] == b"\xaa" * (5000 - plaintext_bytes)
    with pytest.raises(ProtocolError, match="follows an error"):
        opener.parse_header(frame[:HEADER_BYTES])


def test_replayed_reordered_and_lost_frames_are_refused() -> None:
    sealer = FrameSealer(stream_keys())
    frames = [seal(sealer, b"%d" % number) for number in range(3)]
    for order in ((0, 0), (1,), (0, 2), (0, 1, 0)):
        opener = FrameOpener(stream_keys())
        for number in order[:-1]:
            open_frame(opener, frames[number])
        with pytest.raises(ProtocolError, match="claims to be number"):
            open_frame(opener, frames[order[-1]])


def test_frames_of_another_epoch_or_stream_are_refused() -> None:
    frame = seal(FrameSealer(stream_keys(epoch=1)), b"x")
    with pytest.raises(IntegrityError):
        open_frame(FrameOpener(stream_keys(epoch=2)), frame)
    with pytest.raises(ProtocolError, match="stream 7"):
        open_frame(FrameOpener(stream_keys(stream=8)), frame)


def _forge(used: int, kind: int, payload: bytes = b"") -> bytes:
    """A frame that is sealed right and lies."""
    length = FRAME_SIZES[0] - HEADER_BYTES - TAG_BYTES
    aead, nonce, _ = stream_keys().advance()
    header = bytes([0xF5, 1, kind, 0, 0, 0, 0, 7]) + bytes(8)
    plaintext = payload.ljust(length - 4, b"\0") + used.to_bytes(4, "big")
    return header + aead.encrypt(nonce, plaintext, header)


def test_a_peer_that_lies_inside_a_sealed_frame_is_refused() -> None:
    for frame, match in (
        (_forge(FRAME_SIZES[0] - OVERHEAD_BYTES + 1, 1), "bytes are payload"),
        (_forge(15, 2), "15 bytes of totals"),
        (_forge(16, 2, bytes(7) + b"\1"), "after 1 frames and 0 bytes"),
        (_forge(16, 2, bytes(15) + b"\1"), "after 0 frames and 1 bytes"),
    ):
        with pytest.raises(ProtocolError, match=match):
            open_frame(FrameOpener(stream_keys()), frame)


def test_misuse_seals_and_opens_nothing() -> None:
    sealer = FrameSealer(stream_keys())
    out = bytearray(MAX_FRAME_BYTES)
    for parts, buffer in (
        ([bytes(MAX_PAYLOAD_BYTES), b"x"], out),
        ([bytes(10)], bytearray(10)),
    ):
        with pytest.raises(ValueError):
            sealer.seal_into(parts, buffer)
    assert sealer.totals == (0, 0)
    frame = seal(sealer, b"x")
    opener = FrameOpener(stream_keys())
    for header, body, room in (
        (frame[:15], frame[16:], 5000),
        (frame[:16], frame[17:], 5000),
        (frame[:16], frame[16:], 900),
    ):
        with pytest.raises(ValueError):
            opener.open_into(header, body, bytearray(room))
    assert open_frame(opener, frame) == b"x"
