"""Receipts: a target's signed word on what landed, to be checked years later with nothing but the CA's certificate.

The site signs with the key of its certificate (ECDSA P-256, SHA-256) and sends the certificate along. A receipt
proves that the holder of that site's key said so; when it said so is the site's own word, and must lie within the
certificate's validity.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.site_documents import check_signer, open_signed, sign_as_site

__all__ = ["RECEIPT_DOMAIN", "SignedReceipt", "sign_receipt", "verify_receipt"]

RECEIPT_DOMAIN: Final = "flowengine receipt 1"


class SignedReceipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What landed where, for which task, under which decisions.

    Attributes:
        site: the target, as in its certificate.
        transfer, task, fence, grant: of the grant under which it landed; `grant` is its id.
        source: site that it came from.
        path: site path at the target.
        version_id: Merkle root over everything that landed (docs/spec/manifest.md).
        state: "completed", or "incomplete" where objects failed.
        objects, size_bytes: of the version.
        objects_failed: how many of them did not land.
        landed: Unix seconds, by the target's clock.
        policy_digest: of the policies that permitted it; empty without.
        decisions: ids of the decisions that permitted it.
    """

    site: str
    transfer: str
    task: str
    fence: int
    grant: bytes
    source: str
    path: str
    version_id: bytes
    state: str
    objects: int
    size_bytes: int
    landed: int
    objects_failed: int = 0
    policy_digest: bytes = b""
    decisions: list[str] = []


def sign_receipt(receipt: SignedReceipt, secret_pem: bytes, certificate_der: bytes) -> bytes:
    """The receipt as it travels: signed with the key of the site's certificate, which goes along."""
    return sign_as_site(RECEIPT_DOMAIN, receipt, secret_pem, certificate_der)


def verify_receipt(document: bytes, anchors_pem: str) -> tuple[SignedReceipt, CertificateFacts]:
    """The receipt in a document, and whose it is; needs neither network nor clock.

    Args:
        anchors_pem: certificates of the federation's CA.

    Raises:
        AuthenticationError: its certificate is not this federation's (reason "certificate-unknown"), was not valid when
            the receipt was made ("certificate-expired"), or it is another site's ("receipt-forged").
        IntegrityError: its signature is wrong (reason "receipt-forged").
    """
    receipt, certificate = open_signed(document, RECEIPT_DOMAIN, "receipt-forged", "receipt", SignedReceipt)
    facts = check_signer(certificate, anchors_pem, receipt.site, receipt.landed, "receipt-forged", "receipt")
    return receipt, facts
