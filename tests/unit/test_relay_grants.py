"""Relay grants: each site of a route finds its place, lets in the one before it, and learns no secret."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from flowengine.errors import AuthenticationError, UsageError
from flowengine.store.grants import GrantLedger
from flowengine.trust.grant import GRANT_DOMAIN, GrantKey, Party, check_grant
from flowengine.trust.relay_grant import (
    RELAY_GRANT_DOMAIN,
    RelayGrant,
    Stop,
    check_relay_grant,
    peek_relay_grant,
    sign_relay_grant,
)

RNG = random.Random(2).randbytes
KEY = GrantKey.make(RNG)
KEYS = {KEY.id: KEY.public}
NOW = 1_800_000_000
A, B, C, D = (Party(name, name * 64) for name in "abcd")


def stop(party: Party, address: str = "") -> Stop:
    return Stop(party.site, party.key_sha256, address)


def grant(**changes: Any) -> RelayGrant:
    """A pull: target d dials c, which dials b, which dials the source a."""
    fields: dict[str, Any] = {
        "id": b"i" * 16, "transfer": "t", "task": "t.1", "fence": 7, "epoch": 1, "issued": NOW, "expires": NOW + 300,
        "stops": [stop(D), stop(C, "c.example:7443"), stop(B, "[::1]:7443"), stop(A, "10.0.0.1:7443")],
        "dial": "target", "source_path": "/data/x/", "target_path": "/in", "requester": "ada", "labels": ["pii"],
    }  # fmt: skip
    return RelayGrant(**(fields | changes))


def reason(document: bytes, **changes: Any) -> str:
    arguments: dict[str, Any] = {"now": NOW, "me": C, "before": D, "keys": KEYS} | changes
    with pytest.raises(AuthenticationError) as raised:
        check_relay_grant(document, arguments.pop("keys"), arguments.pop("now"), **arguments)
    return raised.value.reason


def test_a_last_site_without_address_dials_the_relay_before_it() -> None:
    stops = [stop(D), stop(C, "c.example:7443"), stop(B, "[::1]:7443"), stop(A)]
    document = sign_relay_grant(KEY, grant(stops=stops))
    for me, before in ((D, None), (C, D), (B, C), (B, A), (A, None)):
        assert check_relay_grant(document, KEYS, NOW, me=me, before=before).meets
    for me, before in ((A, B), (C, A), (C, B), (B, None), (B, D), (D, C)):
        assert reason(document, me=me, before=before) == "grant-other-party"
    with pytest.raises(UsageError):
        sign_relay_grant(KEY, grant(stops=[stop(D), stop(C, "c.example:7443"), stop(B), stop(A)]))


def test_every_site_of_a_route_finds_its_place() -> None:
    document = sign_relay_grant(KEY, grant())
    for me, before in ((D, None), (C, D), (B, C), (A, B)):
        assert check_relay_grant(document, KEYS, NOW, me=me, before=before) == grant()
    assert not grant().meets
    found = peek_relay_grant(document, KEYS)
    assert found.sites == ("d", "c", "b", "a")
    assert found.route == (A, B, C, D)
    assert (found.source, found.target) == (A, D)
    assert (found.place(D), found.place(B), found.place(Party("b", "x"))) == (0, 2, None)
    assert [found.neighbour(at, "source") for at in range(4)] == ["c", "b", "a", ""]
    assert [found.neighbour(at, "target") for at in range(4)] == ["", "d", "c", "b"]


def test_a_push_begins_at_the_source() -> None:
    pushed = grant(dial="source")
    assert (pushed.source, pushed.target) == (D, A)
    assert pushed.route == (D, C, B, A)
    assert [pushed.neighbour(at, "target") for at in range(4)] == ["c", "b", "a", ""]


@pytest.mark.parametrize(
    ("changes", "at", "expected"),
    [
        ({}, {"keys": {}}, "grant-forged"),
        ({}, {"keys": {KEY.id: GrantKey.make(RNG).public}}, "grant-forged"),
        ({}, {"now": NOW - 61}, "grant-not-yet-valid"),
        ({}, {"now": NOW + 361}, "grant-expired"),
        ({}, {"me": Party("c", "x" * 64)}, "grant-other-party"),
        ({}, {"before": Party("d", "x" * 64)}, "grant-other-party"),
        ({}, {"before": B}, "grant-other-party"),
        ({}, {"before": A}, "grant-other-party"),
        ({}, {"before": None}, "grant-other-party"),
        ({}, {"me": D, "before": C}, "grant-other-party"),
        ({}, {"me": A, "before": C}, "grant-other-party"),
        ({}, {"highest_fence": 8}, "grant-superseded"),
        ({}, {"spent": True}, "grant-replayed"),
        ({"required": ["moon-phase"]}, {}, "incompatible"),
        ({}, {"now": NOW + 361, "before": A, "highest_fence": 8}, "grant-expired"),
        ({}, {"before": A, "highest_fence": 8}, "grant-other-party"),
    ],
)  # fmt: skip
def test_each_wrong_has_its_reason(changes: dict[str, Any], at: dict[str, Any], expected: str) -> None:
    assert reason(sign_relay_grant(KEY, grant(**changes)), **at) == expected


def test_no_bit_of_it_can_be_changed_and_it_is_no_grant() -> None:
    document = sign_relay_grant(KEY, grant())
    rng = random.Random(3)
    for _ in range(200):
        changed = bytearray(document)
        changed[rng.randrange(len(document))] ^= 1 << rng.randrange(8)
        assert reason(bytes(changed)) == "grant-forged"
    with pytest.raises(AuthenticationError) as raised:
        check_grant(document, KEYS, NOW, me=D, peer=A, end="target", dials=True)
    assert raised.value.reason == "grant-forged"
    payload = msgspec.msgpack.encode(grant())
    assert reason(KEY.sign_payload(GRANT_DOMAIN, payload)) == "grant-forged"
    assert reason(KEY.sign_payload(RELAY_GRANT_DOMAIN, b"\xc1")) == "incompatible"


@pytest.mark.parametrize(
    "changes",
    [
        {"id": b"short"},
        {"fence": 0},
        {"epoch": -1},
        {"expires": NOW},
        {"expires": NOW + 86_401},
        {"stops": [stop(D), stop(A, "a:1")]},
        {"stops": [stop(D), stop(C, "c:1"), stop(D, "d:1"), stop(A, "a:1")]},
        {"stops": [stop(D, "d:1"), stop(C, "c:1"), stop(A, "a:1")]},
        {"stops": [stop(D), stop(C, ""), stop(A, "a:1")]},
        {"stops": [stop(D), stop(C, "c:0"), stop(A, "a:1")]},
        {"stops": [stop(D), stop(C, "c:1\n"), stop(A, "a:1")]},
        {"stops": [stop(D), *(Stop(f"r{n}", "x", "r:1") for n in range(15)), stop(A, "a:1")]},
        {"stops": [stop(D), Stop("C", "x", "c:1"), stop(A, "a:1")]},
        {"byte_limit": -1},
        {"labels": ["x"] * 101},
        {"source_path": "data"},
        {"target_path": "/a/../b"},
    ],
)
def test_nobody_signs_and_nobody_takes_what_cannot_be_used(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        sign_relay_grant(KEY, grant(**changes))
    assert reason(KEY.sign_payload(RELAY_GRANT_DOMAIN, msgspec.msgpack.encode(grant(**changes)))) in (
        "incompatible",
    )


def test_a_relay_remembers_fences_like_everybody() -> None:
    ledger = GrantLedger(":memory:")
    ledger.admit(grant())
    ledger.admit(grant(expires=NOW + 200))
    assert ledger.standing("t.1") == (7, False)
    with pytest.raises(AuthenticationError, match="superseded"):
        ledger.admit(grant(fence=6))
