"""Receipts: a site's word that anybody can check who has the CA's certificate."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from flowengine.errors import FlowError
from flowengine.trust.certificates import AGENT_VALID_S, issue_site, make_authority, make_key, make_request
from flowengine.trust.envelope import open_envelope, seal_envelope
from flowengine.trust.receipt import RECEIPT_DOMAIN, SignedReceipt, sign_receipt, verify_receipt

NOW = 1_800_000_000
RNG = random.Random(5).randbytes
CA = make_authority(NOW, RNG)
KEY = make_key(RNG)


def der(pem: str) -> bytes:
    return x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)


CERTIFICATE = der(issue_site(CA, make_request(KEY), "berlin", NOW, RNG))


def receipt(**changes: Any) -> SignedReceipt:
    fields: dict[str, Any] = {
        "site": "berlin", "transfer": "t", "task": "t/1", "fence": 7, "grant": b"g" * 16, "source": "paris",
        "path": "/in", "version_id": b"v" * 32, "state": "completed", "objects": 3, "size_bytes": 1 << 40,
        "landed": NOW + 10, "policy_digest": b"p" * 32, "decisions": ["d1", "d2"],
    }  # fmt: skip
    return SignedReceipt(**(fields | changes))


def reason(document: bytes, anchors: str = CA.certificate_pem) -> str:
    with pytest.raises(FlowError) as raised:
        verify_receipt(document, anchors)
    return raised.value.reason


def test_a_receipt_is_the_sites_word() -> None:
    document = sign_receipt(receipt(), KEY, CERTIFICATE)
    said, facts = verify_receipt(document, CA.certificate_pem)
    assert said == receipt()
    assert facts.site == "berlin"
    assert sign_receipt(receipt(), KEY, CERTIFICATE) == document


def test_it_holds_long_after_the_certificate_ended_but_not_from_then() -> None:
    """No clock is asked: only that the receipt is of the certificate's time."""
    late = sign_receipt(receipt(landed=NOW + AGENT_VALID_S), KEY, CERTIFICATE)
    assert verify_receipt(late, CA.certificate_pem)[0].landed == NOW + AGENT_VALID_S
    for moment in (NOW + AGENT_VALID_S + 1_000, NOW - 1_000):
        assert reason(sign_receipt(receipt(landed=moment), KEY, CERTIFICATE)) == "certificate-expired"


def test_a_forged_receipt_is_found() -> None:
    document = sign_receipt(receipt(), KEY, CERTIFICATE)
    rng = random.Random(6)
    for _ in range(100):
        changed = bytearray(document)
        changed[rng.randrange(len(document))] ^= 1 << rng.randrange(8)
        try:
            said, facts = verify_receipt(bytes(changed), CA.certificate_pem)
        except FlowError:
            continue
        # The key's name beside the certificate is a convenience that nothing rests on.
        assert (said, facts.site) == (receipt(), "berlin")
    stranger = make_key(RNG)
    assert reason(sign_receipt(receipt(), stranger, CERTIFICATE)) == "receipt-forged"
    assert reason(sign_receipt(receipt(site="paris"), KEY, CERTIFICATE)) == "receipt-forged"
    assert reason(b"") == "receipt-forged"
    other = make_authority(NOW, RNG)
    assert reason(document, other.certificate_pem) == "certificate-unknown"
    theirs = der(issue_site(other, make_request(KEY), "berlin", NOW, RNG))
    assert reason(sign_receipt(receipt(), KEY, theirs)) == "certificate-unknown"


def test_the_signature_of_another_use_is_no_receipts() -> None:
    document = sign_receipt(receipt(), KEY, CERTIFICATE)
    envelope = open_envelope(document, RECEIPT_DOMAIN, "receipt-forged", "receipt")
    assert reason(seal_envelope(msgspec.structs.replace(envelope, domain="flowengine grant 1"))) == (
        "receipt-forged"
    )


def test_unknown_fields_of_a_newer_site_are_ignored() -> None:
    class Newer(SignedReceipt, frozen=True, kw_only=True):
        weather: str = "fine"

    fields = msgspec.structs.asdict(receipt())
    document = sign_receipt(Newer(**fields, weather="rain"), KEY, CERTIFICATE)
    said, _ = verify_receipt(document, CA.certificate_pem)
    assert said == receipt()
