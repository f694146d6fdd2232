"""The key schedule: separation of keys, rising epochs, rekeying, and that nothing shows a secret."""

from __future__ import annotations

import copy
import pickle

import pytest

from flowengine.errors import ProtocolError
from flowengine.wire import keys as wire_keys
from flowengine.wire.keys import (
    FRAMES_PER_GENERATION,
    MAX_FRAMES,
    Direction,
    SessionSecrets,
    Side,
    StreamKeys,
)

TRANSFER = bytes(range(16))
FORTH, BACK = Direction.SOURCE_TO_TARGET, Direction.TARGET_TO_SOURCE


def session(**changes: object) -> SessionSecrets:
    given: dict[str, object] = {
        "client_random": b"c" * 32, "server_random": b"s" * 32, "client_fingerprint": b"C" * 32,
        "server_fingerprint": b"S" * 32, "binding": b"b" * 32,
    }  # fmt: skip
    return SessionSecrets(**(given | changes))  # type: ignore[arg-type]


def first_block(keys: StreamKeys) -> bytes:
    aead, nonce, _ = keys.advance()
    return nonce + aead.encrypt(nonce, bytes(16), b"")


def test_both_ends_derive_the_same() -> None:
    ours, theirs = session(), session()
    assert first_block(ours.stream_keys(TRANSFER, 3, FORTH, 1)) == first_block(
        theirs.stream_keys(TRANSFER, 3, FORTH, 1)
    )
    assert ours.preamble_key(TRANSFER, Side.SOURCE) == theirs.preamble_key(TRANSFER, Side.SOURCE)


def test_every_input_separates_keys() -> None:
    blocks = [
        first_block(session().stream_keys(TRANSFER, 3, FORTH, 1)),
        first_block(session().stream_keys(bytes(16), 3, FORTH, 1)),
        first_block(session().stream_keys(TRANSFER, 4, FORTH, 1)),
        first_block(session().stream_keys(TRANSFER, 3, BACK, 1)),
        first_block(session().stream_keys(TRANSFER, 3, FORTH, 2)),
        first_block(session(client_random=b"x" * 32).stream_keys(TRANSFER, 3, FORTH, 1)),
        first_block(session(server_random=b"x" * 32).stream_keys(TRANSFER, 3, FORTH, 1)),
        first_block(session(client_fingerprint=b"x" * 32).stream_keys(TRANSFER, 3, FORTH, 1)),
        first_block(session(server_fingerprint=b"x" * 32).stream_keys(TRANSFER, 3, FORTH, 1)),
        first_block(session(binding=b"x" * 32).stream_keys(TRANSFER, 3, FORTH, 1)),
        first_block(session(protocol=2).stream_keys(TRANSFER, 3, FORTH, 1)),
    ]
    blocks += [
        session().preamble_key(TRANSFER, Side.SOURCE),
        session().preamble_key(TRANSFER, Side.TARGET),
        session().preamble_key(bytes(16), Side.SOURCE),
    ]
    assert len(set(blocks)) == len(blocks)


def test_an_epoch_is_given_once_and_only_rises() -> None:
    secrets = session()
    secrets.stream_keys(TRANSFER, 0, FORTH, 5)
    secrets.stream_keys(TRANSFER, 0, BACK, 5)
    for epoch in (5, 4, 0):
        with pytest.raises(ProtocolError, match="not newer"):
            secrets.stream_keys(TRANSFER, 0, FORTH, epoch)
    secrets.stream_keys(TRANSFER, 0, FORTH, 6)


def test_streams_of_a_session_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_keys, "MAX_KEYED_STREAMS", 2)
    secrets = session()
    secrets.stream_keys(TRANSFER, 0, FORTH, 0)
    secrets.stream_keys(TRANSFER, 1, FORTH, 0)
    with pytest.raises(ProtocolError, match="already has keys"):
        secrets.stream_keys(TRANSFER, 2, FORTH, 0)
    secrets.stream_keys(TRANSFER, 1, FORTH, 1)


def test_a_new_generation_has_a_new_key_and_the_counter_goes_on() -> None:
    keys, twin = (session().stream_keys(TRANSFER, 0, FORTH, 0) for _ in range(2))
    keys._counter = twin._counter = FRAMES_PER_GENERATION - 1
    old, _, number = keys.advance()
    assert (number, keys.generation) == (FRAMES_PER_GENERATION - 1, 1)
    new, nonce, number = keys.advance()
    assert number == FRAMES_PER_GENERATION
    assert new is not old
    assert new.encrypt(nonce, b"x", b"") != old.encrypt(nonce, b"x", b"")
    twin.advance()
    aead, twin_nonce, _ = twin.advance()
    assert aead.encrypt(twin_nonce, b"x", b"") == new.encrypt(nonce, b"x", b"")


def test_nonces_do_not_repeat_and_overflow_raises() -> None:
    keys = session().stream_keys(TRANSFER, 0, FORTH, 0)
    assert len({keys.advance()[1] for _ in range(1000)}) == 1000
    keys._counter = MAX_FRAMES
    for _ in range(2):
        with pytest.raises(ProtocolError, match="used up"):
            keys.advance()


def test_nothing_shows_pickles_or_copies_a_secret() -> None:
    secrets = session()
    keys = secrets.stream_keys(TRANSFER, 0, FORTH, 0)
    assert (repr(secrets), str(keys)) == ("<SessionSecrets>", "<StreamKeys>")
    for secret in (secrets, keys):
        for take in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="neither pickled nor copied"):
                take(secret)  # type: ignore[operator]


def test_wrong_lengths_and_a_mirrored_random_are_refused() -> None:
    for change in ({"client_random": b""}, {"server_fingerprint": b"x"}):
        with pytest.raises(ValueError, match="bytes, not 32"):
            session(**change)
    with pytest.raises(ProtocolError, match="same random"):
        session(client_random=b"s" * 32)
    with pytest.raises(ValueError, match="16 bytes"):
        session().stream_keys(b"short", 0, FORTH, 0)
    with pytest.raises(ValueError, match="32 bits"):
        session().stream_keys(TRANSFER, 1 << 32, FORTH, 0)
