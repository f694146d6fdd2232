"""Delete certificates: a site's signed word that it destroyed something, to be checked with the CA's certificate alone.

As with receipts: it proves that the holder of that site's key said so. That no other copy exists, and that a disk gave
the blocks to nobody, it does not prove.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.site_documents import check_signer, open_signed, sign_as_site

__all__ = ["DELETION_DOMAIN", "DeleteCertificate", "sign_deletion", "verify_deletion"]

DELETION_DOMAIN: Final = "flowengine delete certificate 1"


class DeleteCertificate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was destroyed where, when, why and how.

    Attributes:
        site: that destroyed it, as in its certificate.
        transfer, task: with which it came.
        source: site that it came from.
        path: site path at which it had landed, or was to.
        cause: "policy-stopped", "delete-by", "delete-after", "cancelled" or "operator".
        why: the cause in words: rule, date, who asked.
        method: "unlink": names removed and the removal made durable; blocks are given back, not overwritten.
        objects: that had landed and were destroyed.
        size_bytes: of them.
        missing: objects of the transfer that were no longer there.
        staged_bytes: of what was under way, and had no name of its own yet.
        names: SHA-256 over the sorted paths and sizes (docs/spec/certificates.md): tells which, without naming them.
        landed: when it was complete, Unix seconds; 0 where it never was.
        due: when it had to be gone, Unix seconds; 0 where no date said so.
        hidden: since when nobody could read it, Unix seconds.
        deleted: when it was gone, Unix seconds, by this site's clock.
        policy_digest: of the bundle in force; empty without.
    """

    site: str
    transfer: str
    task: str
    source: str
    path: str
    cause: Literal["policy-stopped", "delete-by", "delete-after", "cancelled", "operator"]
    why: str
    objects: int
    size_bytes: int
    names: str
    deleted: int
    method: str = "unlink"
    missing: int = 0
    staged_bytes: int = 0
    landed: int = 0
    due: int = 0
    hidden: int = 0
    policy_digest: bytes = b""


def sign_deletion(said: DeleteCertificate, secret_pem: bytes, certificate_der: bytes) -> bytes:
    """The certificate as it travels."""
    return sign_as_site(DELETION_DOMAIN, said, secret_pem, certificate_der)


def verify_deletion(document: bytes, anchors_pem: str) -> tuple[DeleteCertificate, CertificateFacts]:
    """The certificate in a document, and whose it is; needs neither network nor clock.

    Raises:
        AuthenticationError: its signer's certificate is not this federation's (reason "certificate-unknown"), was not
            valid when it was made ("certificate-expired"), or is another site's ("deletion-forged").
        IntegrityError: its signature is wrong (reason "deletion-forged").
    """
    said, certificate = open_signed(
        document, DELETION_DOMAIN, "deletion-forged", "delete certificate", DeleteCertificate
    )
    facts = check_signer(
        certificate, anchors_pem, said.site, said.deleted, "deletion-forged", "delete certificate"
    )
    return said, facts
