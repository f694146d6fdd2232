"""Control message framing: limits before buffering, cuts, misuse."""

from __future__ import annotations

import pytest

from flowengine.errors import ProtocolError, TemporaryError
from flowengine.wire.control import MAX_MESSAGE_BYTES, ControlDecoder, encode


def test_messages_come_out_whole_however_they_were_split() -> None:
    stream = encode(b"one") + encode(b"two" * 1000)
    assert ControlDecoder().feed(stream) == [b"one", b"two" * 1000]
    decoder = ControlDecoder()
    assert [m for i in range(len(stream)) for m in decoder.feed(stream[i : i + 1])] == [b"one", b"two" * 1000]
    decoder.finish()


@pytest.mark.parametrize("length", [0, MAX_MESSAGE_BYTES + 1, 0xFFFFFFFF])
def test_a_length_out_of_bounds_is_refused_before_anything_is_kept(length: int) -> None:
    decoder = ControlDecoder()
    with pytest.raises(ProtocolError, match="control message"):
        decoder.feed(length.to_bytes(4, "big") + b"x" * 100)
    assert decoder.buffered_bytes == 0
    with pytest.raises(ProtocolError, match="broken"):
        decoder.feed(encode(b"good"))


def test_the_bound_can_be_raised_after_the_handshake() -> None:
    decoder = ControlDecoder(max_message=10)
    assert decoder.feed(encode(b"x" * 10)) == [b"x" * 10]
    decoder.max_message = 20
    assert decoder.feed(encode(b"x" * 20)) == [b"x" * 20]
    with pytest.raises(ProtocolError):
        decoder.feed(encode(b"x" * 21))


def test_a_cut_inside_a_message_is_told() -> None:
    decoder = ControlDecoder()
    decoder.feed(encode(b"hello")[:6])
    with pytest.raises(TemporaryError, match="after 6 bytes"):
        decoder.finish()


def test_nobody_sends_what_nobody_takes() -> None:
    for payload in (b"", b"x" * 11):
        with pytest.raises(ValueError, match="1 to 10 bytes"):
            encode(payload, max_message=10)
