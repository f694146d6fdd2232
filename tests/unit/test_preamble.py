"""Preambles: constant size, one use, one answer for everything that a stranger can try."""

from __future__ import annotations

import pytest

from flowengine.errors import AuthenticationError, ProtocolError
from flowengine.wire.preamble import (
    MAX_STREAMS,
    PREAMBLE_BYTES,
    Kind,
    Preamble,
    PreambleRegistry,
    kind_of_connection,
)

SESSION, KEY = b"session id here!", b"k" * 32


def registry(kind: Kind = Kind.END_TO_END) -> PreambleRegistry:
    made = PreambleRegistry(kind)
    made.register(SESSION, KEY)
    return made


def test_a_preamble_arrives_as_it_was_sent() -> None:
    for kind in Kind:
        sent = Preamble(SESSION, MAX_STREAMS - 1, 0xFFFFFFFF, kind)
        data = sent.encode(KEY)
        assert len(data) == PREAMBLE_BYTES
        assert kind_of_connection(data[0]) is kind
        assert registry(kind).accept(data) == sent
    assert kind_of_connection(0x16) is None


@pytest.mark.parametrize("kind", Kind)
def test_a_preamble_of_one_kind_is_none_of_the_other(kind: Kind) -> None:
    (other,) = set(Kind) - {kind}
    with pytest.raises(ProtocolError, match="opened with byte"):
        registry(other).accept(Preamble(SESSION, 0, 0, kind).encode(KEY))
    forged = bytearray(Preamble(SESSION, 0, 0, kind).encode(KEY))
    forged[0] = other  # the MAC covers the first byte as well
    with pytest.raises(AuthenticationError):
        registry(other).accept(forged)


def test_a_preamble_is_used_once_and_epochs_rise() -> None:
    sessions = registry()
    first, second = (Preamble(SESSION, 0, epoch).encode(KEY) for epoch in (1, 2))
    sessions.accept(second)
    for used in (first, second):
        with pytest.raises(AuthenticationError, match="used before"):
            sessions.accept(used)
    sessions.accept(Preamble(SESSION, 1, 1).encode(KEY))
    sessions.register(SESSION, b"n" * 32)
    with pytest.raises(AuthenticationError, match="used before"):
        sessions.accept(Preamble(SESSION, 0, 2).encode(b"n" * 32))


def test_unknown_session_and_wrong_key_get_the_same_answer() -> None:
    messages = set()
    for data in (Preamble(b"another session!", 0, 0).encode(KEY), Preamble(SESSION, 0, 0).encode(b"x" * 32)):
        with pytest.raises(AuthenticationError) as caught:
            registry().accept(data)
        messages.add(str(caught.value))
    assert len(messages) == 1
    # The key that stands in for unknown sessions lets nobody in.
    with pytest.raises(AuthenticationError):
        registry().accept(Preamble(b"another session!", 0, 0).encode(bytes(32)))


def test_every_flipped_bit_is_refused_and_uses_nothing_up() -> None:
    sessions = registry()
    good = Preamble(SESSION, 3, 9).encode(KEY)
    for bit in range(PREAMBLE_BYTES * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((AuthenticationError, ProtocolError)):
            sessions.accept(bad)
    assert sessions.accept(good) == Preamble(SESSION, 3, 9)


@pytest.mark.parametrize("size", [0, 1, 63, 65])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        registry().accept(bytes(size))


def test_sessions_are_bounded_and_forgotten() -> None:
    sessions = PreambleRegistry(max_sessions=1)
    sessions.register(SESSION, KEY)
    sessions.register(SESSION, KEY)
    with pytest.raises(ProtocolError, match="limit") as caught:
        sessions.register(b"another session!", KEY)
    assert caught.value.reason == "busy"
    sessions.forget(SESSION)
    sessions.forget(SESSION)
    assert len(sessions) == 0
    with pytest.raises(AuthenticationError):
        sessions.accept(Preamble(SESSION, 0, 0).encode(KEY))
    assert repr(sessions) == "<PreambleRegistry>"


def test_misuse_is_refused() -> None:
    for bad in (Preamble(b"short", 0, 0), Preamble(SESSION, MAX_STREAMS, 0)):
        with pytest.raises(ValueError):
            bad.encode(KEY)
    with pytest.raises(ValueError):
        PreambleRegistry().register(SESSION, b"short")
