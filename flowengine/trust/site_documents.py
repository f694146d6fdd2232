"""Documents that a site signs with the key of its certificate, to be checked years later with nothing but the CA's."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from flowengine.errors import AuthenticationError, IntegrityError
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.envelope import Envelope, open_envelope, seal_envelope, signed_bytes

__all__ = ["check_signer", "open_signed", "sign_as_site"]

T = TypeVar("T", bound=msgspec.Struct)


def sign_as_site(domain: str, said: msgspec.Struct, secret_pem: bytes, certificate_der: bytes) -> bytes:
    """The document as it travels: signed with the key of the site's certificate, which goes along."""
    from flowengine.trust.certificates import parse_certificate, sign_with_key  # takes long to load

    payload = msgspec.msgpack.encode(said)
    return seal_envelope(
        Envelope(
            domain=domain,
            payload=payload,
            signature=sign_with_key(secret_pem, signed_bytes(domain, payload)),
            key_id=parse_certificate(certificate_der).key_sha256,
            certificate=certificate_der,
        )
    )


def open_signed(document: bytes, domain: str, reason: str, what: str, kind: type[T]) -> tuple[T, bytes]:
    """What a document says, and the certificate that it was signed with, which is not checked yet (`check_signer`).

    Args:
        reason: code of the error where it is forged.
        what: "receipt" and the like, for messages.

    Raises:
        AuthenticationError: it is no document of this domain.
        IntegrityError: its signature is wrong, or it cannot be understood (reason "incompatible").
    """
    from flowengine.trust.certificates import parse_certificate, verify_with_certificate  # takes long to load

    envelope = open_envelope(document, domain, reason, what)
    parse_certificate(envelope.certificate)
    if not verify_with_certificate(
        envelope.certificate, envelope.signature, signed_bytes(domain, envelope.payload)
    ):
        raise IntegrityError(f"the {what}'s signature is wrong: it was changed, or forged", reason=reason)
    try:
        return msgspec.msgpack.decode(envelope.payload, type=kind), envelope.certificate
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise IntegrityError(f"the {what} cannot be understood: {error}", reason="incompatible") from None


def check_signer(
    certificate: bytes, anchors_pem: str, site: str, at: float, reason: str, what: str
) -> CertificateFacts:
    """Whose certificate it is, if it was valid at a time and is the site's that the document names.

    Raises:
        AuthenticationError: it is not this federation's (reason "certificate-unknown"), was not valid then
            ("certificate-expired"), or it is another site's (`reason`).
    """
    from flowengine.trust.certificates import check_certificate  # takes long to load

    facts = check_certificate(certificate, anchors_pem, at, kind="site")
    if facts.site != site:
        raise AuthenticationError(
            f"{facts.shown} signed a {what} in the name of {site[:64]!r}", reason=reason
        )
    return facts
