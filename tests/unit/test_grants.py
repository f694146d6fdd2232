"""Grants: each thing that may be wrong has its own reason."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from flowengine.errors import EXIT_CODES, AuthenticationError, Exit, UsageError
from flowengine.trust.envelope import Envelope, seal_envelope, signed_bytes
from flowengine.trust.grant import (
    GRANT_DOMAIN,
    MAX_GRANT_BYTES,
    Grant,
    GrantKey,
    Party,
    check_grant,
    check_requested_path,
    peek_grant,
    wire_path,
)

RNG = random.Random(2).randbytes
KEY = GrantKey.make(RNG)
KEYS = {KEY.id: KEY.public}
NOW = 1_800_000_000
A, B, C = (Party(name, name * 64) for name in "abc")


def grant(**changes: Any) -> Grant:
    fields: dict[str, Any] = {
        "id": b"i" * 16, "transfer": "t", "task": "t/1", "fence": 7, "epoch": 1, "issued": NOW,
        "expires": NOW + 300, "source": A, "target": B, "dial": "target", "route": ["a", "b"],
        "source_path": "/data/x/", "target_path": "/in", "mode": "copy", "secret": b"s" * 32,
    }  # fmt: skip
    return Grant(**(fields | changes))


def signed(content: object, key: GrantKey = KEY, /, **changes: Any) -> bytes:
    """Anything, signed as a grant."""
    data = content if isinstance(content, bytes) else msgspec.msgpack.encode(content)
    fields = {
        "domain": GRANT_DOMAIN,
        "payload": data,
        "key_id": key.id,
        "signature": key._key.sign(signed_bytes(GRANT_DOMAIN, data)),
    } | changes
    return seal_envelope(Envelope(**fields))


def check(document: bytes, **changes: Any) -> Grant:
    """As the target that dials, with the right peer, at the right time."""
    arguments: dict[str, Any] = {"now": NOW, "me": B, "peer": A, "end": "target", "dials": True} | changes
    return check_grant(document, arguments.pop("keys", KEYS), arguments.pop("now"), **arguments)


def reason(document: bytes, **changes: Any) -> str:
    with pytest.raises(AuthenticationError) as raised:
        check(document, **changes)
    error = raised.value
    assert EXIT_CODES[error.reason] is Exit.AUTHENTICATION or error.reason == "incompatible"
    assert b"s" * 32 not in str(error).encode()
    return error.reason


def test_a_good_grant_is_what_was_signed() -> None:
    document = KEY.sign(grant())
    assert check(document) == grant()
    assert check(document, peer=None) == grant()
    assert check(document, me=A, peer=B, end="source", dials=False) == grant()
    assert check(document, highest_fence=7) == grant()
    assert peek_grant(document, KEYS) == grant()
    assert "ssss" not in repr(grant())
    assert (grant().party("source"), grant().path("target")) == (A, "/in")


@pytest.mark.parametrize(
    ("changes", "at", "expected"),
    [
        ({}, {"keys": {}}, "grant-forged"),
        ({}, {"keys": {KEY.id: GrantKey.make(RNG).public}}, "grant-forged"),
        ({}, {"now": NOW - 61}, "grant-not-yet-valid"),
        ({}, {"now": NOW + 361}, "grant-expired"),
        ({"expires": NOW + 86_400}, {"now": NOW + 86_461}, "grant-expired"),
        ({}, {"me": C}, "grant-other-party"),
        ({}, {"me": Party("b", "x" * 64)}, "grant-other-party"),
        ({}, {"peer": C}, "grant-other-party"),
        ({}, {"peer": Party("a", "x" * 64)}, "grant-other-party"),
        ({}, {"me": B, "end": "source", "dials": False}, "grant-other-party"),
        ({}, {"dials": False}, "grant-other-party"),
        ({"dial": "source"}, {}, "grant-other-party"),
        ({}, {"highest_fence": 8}, "grant-superseded"),
        ({}, {"spent": True}, "grant-replayed"),
        ({"required": ["moon-phase"]}, {}, "incompatible"),
        ({"required": ["fed"], "version": b"v" * 32}, {"spent": True}, "grant-replayed"),
        # What is wrong first is the reason.
        ({}, {"now": NOW + 361, "me": C, "highest_fence": 8}, "grant-expired"),
        ({}, {"peer": C, "highest_fence": 8, "spent": True}, "grant-other-party"),
        ({}, {"highest_fence": 8, "spent": True}, "grant-superseded"),
    ],
)  # fmt: skip
def test_each_wrong_has_its_reason(changes: dict[str, Any], at: dict[str, Any], expected: str) -> None:
    assert reason(KEY.sign(grant(**changes)), **at) == expected


@pytest.mark.parametrize("at", [NOW - 60, NOW, NOW + 300, NOW + 360])
def test_clocks_may_differ_by_a_minute(at: int) -> None:
    check(KEY.sign(grant()), now=at)


def test_no_bit_of_a_grant_can_be_changed() -> None:
    document = KEY.sign(grant())
    rng = random.Random(3)
    for _ in range(300):
        position, bit = rng.randrange(len(document)), 1 << rng.randrange(8)
        changed = bytearray(document)
        changed[position] ^= bit
        assert reason(bytes(changed)) == "grant-forged"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xc0",
        b"\x80",
        b"x" * (MAX_GRANT_BYTES + 1),
        seal_envelope(Envelope(domain="flowengine receipt 1", payload=b"", signature=b"", key_id=KEY.id)),
        signed(grant(), domain="flowengine grant 2"),
        signed(grant(), signature=b""),
        signed(grant(), payload=msgspec.msgpack.encode(grant(target=C))),
    ],
)
def test_what_is_no_grant_is_forged(document: bytes) -> None:
    assert reason(document) == "grant-forged"


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        {},
        msgspec.to_builtins(grant()) | {"mode": "destroy"},
        msgspec.to_builtins(grant()) | {"fence": "7"},
    ],
)
def test_a_signed_payload_that_says_too_little_is_not_understood(payload: object) -> None:
    assert reason(signed(payload)) == "incompatible"


def test_unknown_fields_are_ignored_and_unknown_conditions_are_not() -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(grant()))
    assert check(signed(fields | {"weather": "fine"})) == grant()
    assert reason(signed(fields | {"required": ["weather"]})) == "incompatible"


UNUSABLE: list[dict[str, Any]] = [
    {"id": b"short"},
    {"secret": b"short"},
    {"fence": 0},
    {"fence": 1 << 63},
    {"epoch": -1},
    {"expires": NOW},
    {"expires": NOW + 86_401},
    {"route": ["a"]},
    {"route": ["b", "a"]},
    {"route": ["a", "C", "b"]},
    {"route": ["a"] + ["x"] * 15 + ["b"]},
    {"source_path": "data/x"},
    {"source_path": "/data/../x"},
    {"target_path": "/a//b"},
    {"target_path": "/a\0b"},
    {"target_path": "/" + "a/" * 300},
    {"byte_limit": -1},
    {"labels": ["x"] * 101},
]


@pytest.mark.parametrize("changes", UNUSABLE)
def test_nobody_signs_and_nobody_takes_what_cannot_be_used(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        KEY.sign(grant(**changes))
    if all(-(1 << 63) <= value < 1 << 63 for value in changes.values() if isinstance(value, int)):
        assert reason(signed(grant(**changes))) == "incompatible"


def test_a_grant_that_would_not_fit_a_handshake_is_not_signed() -> None:
    with pytest.raises(UsageError, match="too long"):
        KEY.sign(grant(labels=["x" * 128] * 100))
    name = "/" + "x" * 255
    assert len(KEY.sign(grant(source_path=name * 15, target_path=name * 15))) <= MAX_GRANT_BYTES


@pytest.mark.parametrize(
    "path", [b"", b"data", b"data/x", b"data/x/y", b"data/xy/", b"/data/x/", b"data/x//", b"data/../data/x/"]
)
def test_another_path_than_the_grants_is_refused(path: bytes) -> None:
    check_requested_path(grant(), "source", b"data/x/")
    check_requested_path(grant(), "target", b"in")
    with pytest.raises(AuthenticationError) as raised:
        check_requested_path(grant(), "source", path)
    assert raised.value.reason == "grant-other-path"


def test_paths_that_are_no_text_travel_as_bytes() -> None:
    assert wire_path("/caf\udce9/\xe9") == b"caf\xe9/\xc3\xa9"
    assert wire_path("/") == b""


def test_a_key_comes_back_from_its_bytes() -> None:
    again = GrantKey(KEY.secret_bytes())
    assert (again.id, again.public) == (KEY.id, KEY.public)
    assert KEY.secret_bytes().hex() not in repr(KEY)
