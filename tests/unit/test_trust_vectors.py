"""Pinned certificates, a grant, a receipt, and a handshake under the grant.

Provenance: made by this implementation at protocol 0.1; signatures are verified here a second time, from docs/spec/trust.md
with `cryptography` and `msgspec` alone. Whatever changes one of these bytes is a new version of the format.
"""

from __future__ import annotations

import hmac
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from flowengine.trust.certificates import check_certificate
from flowengine.trust.grant import Grant, GrantKey, Party, check_grant
from flowengine.trust.receipt import SignedReceipt, sign_receipt, verify_receipt
from flowengine.wire.handshake import ClientHandshake, ServerHandshake, Software
from flowengine.wire.proofs import GrantProof, among

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "trust.json").read_text("utf-8")
)
NOW: int = VECTORS["now"]
GRANT = bytes.fromhex(VECTORS["grant"]["document"])
RECEIPT = bytes.fromhex(VECTORS["receipt"]["document"])


def shown(value: Any) -> Any:
    """Builtins with bytes in hexadecimal, as the vectors have them."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    return value


def fields(struct: object) -> Any:
    return shown(msgspec.to_builtins(struct, builtin_types=(bytes,)))


def test_certificates() -> None:
    for site, case in VECTORS["certificates"].items():
        facts = check_certificate(case["pem"], VECTORS["ca_pem"], NOW, kind="site")
        assert (facts.site, facts.serial, facts.key_sha256) == (site, case["serial"], case["key_sha256"])
        assert facts.fingerprint.hex() == case["fingerprint"]
        # Once more, without our code.
        made = x509.load_pem_x509_certificate(case["pem"].encode())
        info = made.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert sha256(info).hexdigest() == case["key_sha256"]
        assert f"{made.serial_number:x}" == case["serial"]
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"flow://site/{site}"]


def test_grant() -> None:
    key = GrantKey(bytes.fromhex(VECTORS["grant_key"]["secret"]))
    assert (key.id, key.public.hex()) == (VECTORS["grant_key"]["id"], VECTORS["grant_key"]["public"])
    one, two = (Party(site, VECTORS["certificates"][site]["key_sha256"]) for site in "ab")
    grant = check_grant(GRANT, {key.id: key.public}, NOW, me=two, peer=one, end="target", dials=True)
    assert fields(grant) == VECTORS["grant"]["fields"]
    assert key.sign(grant) == GRANT
    # Once more, from the specification.
    envelope = msgspec.msgpack.decode(GRANT)
    assert set(envelope) == {"domain", "payload", "signature", "key_id"}
    assert envelope["key_id"] == sha256(key.public).hexdigest()[:16]
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(VECTORS["grant_key"]["public"])).verify(
        envelope["signature"], b"flowengine grant 1\0" + envelope["payload"]
    )
    assert shown(msgspec.msgpack.decode(envelope["payload"])) == VECTORS["grant"]["fields"]


def test_receipt() -> None:
    receipt, facts = verify_receipt(RECEIPT, VECTORS["ca_pem"])
    assert fields(receipt) == VECTORS["receipt"]["fields"]
    assert facts.site == "b"
    leaf = x509.load_pem_x509_certificate(VECTORS["certificates"]["b"]["pem"].encode())
    made = sign_receipt(receipt, VECTORS["receipt"]["key_pem"].encode(), leaf.public_bytes(Encoding.DER))
    assert made == RECEIPT
    # Once more, from the specification.
    envelope = msgspec.msgpack.decode(RECEIPT)
    public = x509.load_der_x509_certificate(envelope["certificate"]).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(
        envelope["signature"],
        b"flowengine receipt 1\0" + envelope["payload"],
        ec.ECDSA(hashes.SHA256()),
    )
    assert shown(msgspec.msgpack.decode(envelope["payload"])) == VECTORS["receipt"]["fields"]
    assert SignedReceipt(**msgspec.msgpack.decode(envelope["payload"])) == receipt


def test_handshake() -> None:
    grant = msgspec.msgpack.decode(msgspec.msgpack.decode(GRANT)["payload"], type=Grant)
    proof = GrantProof(grant.secret, GRANT)
    fingerprint = bytes.fromhex(VECTORS["certificates"]["a"]["fingerprint"])
    software = Software("flowengine", "0.1.0", {"streams": 16}, ("zstd",))
    client = ClientHandshake(proof, fingerprint, bytes(range(32)), software=software)
    server = ServerHandshake(among([proof]), fingerprint, bytes(range(32, 64)), software=software)
    server.start()
    messages = client.start()
    for machine in (server, client, server, client):
        answers = machine.receive(messages[-1])
        messages += [answer for answer in answers if isinstance(answer, bytes)]
    assert [message.hex() for message in messages] == VECTORS["handshake"]
    shown_proof = msgspec.msgpack.decode(messages[2])
    assert (shown_proof["kind"], shown_proof["document"]) == ("grant", GRANT)
    assert shown_proof["identity"] == sha256(GRANT).digest()[:16]
    first, second = (sha256(message).digest() for message in messages[:2])
    transcript = sha256(fingerprint + first + second).digest()
    assert shown_proof["mac"] == hmac.digest(
        grant.secret, b"flowengine client proof\0" + transcript, "sha256"
    )
